//! Much that comes and goes for long: what is held afterwards is what was held before.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a panic is a failed test"
)]

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use cgtproxy_tests::agent::Agent;
use cgtproxy_tests::amount;
use cgtproxy_tests::relayed::Relayed;
use cgtproxy_tests::sandbox::{
    App, INTERNET_V4, PORTS, Program, Sandbox, Server, Service, User, sandbox,
};
use cgtproxy_tests::session::{Session, to_proxy, verdict};
use cgtproxy_tests::wait::wait_until;
use cgtproxy_tests::wire::Transport::Tcp;
use cgtproxy_tests::wire::{Afterwards, Speech};
use serde_json::json;

/// How often everything comes and goes, unless CGTPROXY_TEST_ROUNDS says otherwise.
const ROUNDS: u32 = 3;
/// After so many rounds everything has been there once.
const WARM_UP: u32 = 1;
/// By how much a daemon's own memory may grow from then on. It is some 400 after a hundred rounds and does
/// not go on: what was freed is not always used again at once.
const SLACK_KIB: u64 = 512;

/// Of a user whose agent and relay go on.
const STAYING: &str = "
version: 1
bypass: [10.0.0.0/8]
tproxies: {mihomo: {port: 7890}}
proxies:
  own: {upstream: 'socks5h://192.0.2.2:1080'}
rules:
  - {app: one, proxy: own}
  - {app: two, tproxy: mihomo}
  - {app: three, drop: true}
  - {match: '/deep$', direct: true}
";

/// Of one whose agent doesn't.
const GOING: &str = "
version: 1
tproxies: {mihomo: {port: 7890}}
rules:
  - {app: two, tproxy: mihomo}
  - {app: three, drop: all}
";

fn rounds() -> u32 {
    amount::given("CGTPROXY_TEST_ROUNDS").unwrap_or(ROUNDS)
}

/// Another configuration each time: other proxies, other lists, another start.
fn other_config(round: u32) -> String {
    let byte = round % 256;
    let start = ["open", "closed"][round as usize % 2];
    let no_udp = round.is_multiple_of(2);
    format!(
        "
version: 1
start: {start}
bypass: [10.{byte}.0.0/16, 'fd00:{byte:x}::/32', 172.16.0.0/12]
fake-addresses: [100.64.0.0/10, 'fd4a:1c9e:7b02::/64']
tproxies:
  mihomo: {{port: 7890, no-udp: {no_udp}}}
  mihomo-{round}: {{port: 7891, dns-hijack: {{port: 1053}}}}
redirects:
  redir-{byte}: {{port: 7892}}
proxies:
  own: {{upstream: 'http://192.0.2.2:3128'}}
  silent: {{upstream: 'socks5://192.0.2.2:1081'}}
  rude: {{upstream: 'socks5://192.0.2.2:1082'}}
  broken: {{upstream: 'socks5://192.0.2.2:1083'}}
  absent: {{upstream: 'socks5://192.0.2.2:1084'}}
rules:
  - {{app: rude, proxy: rude}}
  - {{app: silent, proxy: silent}}
  - {{app: broken, proxy: broken}}
  - {{app: absent, proxy: absent}}
  - {{app: one, proxy: own}}
  - {{app: two, tproxy: mihomo-{round}}}
  - {{app: three, proxy: redir-{byte}}}
  - {{match: '/deep$', drop: true}}
"
    )
}

/// What each part holds: a name for each kind of thing, and how many there are.
type Held = BTreeMap<String, u64>;

fn held_by(name: &str, daemon: &Service, held: &mut Held) {
    let pid = daemon.pid();
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("it runs");
    // What /proc/PID/status says is not exact, and lacks what is swapped out: proc_pid_status(5).
    let kib = |key: &str| -> u64 {
        let number = rollup.lines().find_map(|line| line.strip_prefix(key));
        let number = number.expect("it is there").trim().trim_end_matches(" kB");
        number.parse().expect("a number")
    };
    held.insert(format!("{name} KiB"), kib("Anonymous:") + kib("Swap:"));
    held.insert(format!("{name} descriptors"), daemon.open_descriptors());
    let mut watches = 0;
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo")).expect("it runs") {
        let info = fs::read_to_string(entry.expect("it is there").path()).unwrap_or_default();
        watches += info.matches("inotify wd:").count() as u64;
    }
    held.insert(format!("{name} watches"), watches);
}

fn held_by_kernel(sb: &Sandbox, held: &mut Held) {
    let maps = sb.maps();
    for map in &maps {
        held.insert(
            format!("elements of {map}"),
            sb.map_elements(map).len() as u64,
        );
    }
    held.insert("maps".into(), maps.len() as u64);
    held.insert("chains".into(), sb.chains().len() as u64);
    held.insert("bypass lists".into(), sb.bypass_lists() as u64);
    for family in [4, 6] {
        let rules = sb.mark_rules(family).len() + sb.routes(family, "25447").len();
        held.insert(format!("routing {family}"), rules as u64);
    }
    let files = sb.run(&["find", "/run/cgtproxy", "/run/user", "/run/home"]);
    held.insert("files".into(), files.lines().count() as u64);
}

/// Everything that comes and goes.
struct Bed<'a> {
    sb: &'a Sandbox,
    helper: Service,
    relayed: Relayed,
    bob: User,
    /// How many descriptors the relay has that nobody uses.
    idle: u64,
    going: Service,
    _servers: Vec<Program>,
    _proxy: Server,
}

impl<'a> Bed<'a> {
    fn new(sb: &'a Sandbox) -> Self {
        // Conversations are forgotten soon.
        for name in [
            "udp_timeout",
            "udp_timeout_stream",
            "tcp_timeout_close_wait",
        ] {
            let file = format!("/proc/sys/net/netfilter/nf_conntrack_{name}");
            fs::write(file, "4").expect("the network is ours");
        }
        let at = |port| SocketAddr::new(INTERNET_V4, port);
        let speech = |say: &[u8], then| Speech {
            say: say.to_vec(),
            then,
        };
        let _servers = vec![
            sb.socks_server(at(1080)),
            sb.http_proxy(at(3128)),
            sb.speaker(at(1081), &speech(b"", Afterwards::Hold)),
            sb.speaker(
                at(1082),
                &speech(b"HTTP/1.0 400 What?\r\n", Afterwards::Close),
            ),
            sb.speaker(at(1083), &speech(b"\x05\x00\x05", Afterwards::Close)),
        ];
        let helper = sb.helper().config("grace-seconds: 1").start();
        let relayed = Relayed::builder(sb).start(STAYING);
        // Two connections to the helper come with the first datagrams.
        let idle = relayed.relay.open_descriptors() + 2;
        let bob = sb.user(1002);
        let going = bob.agent(GOING).start();
        Self {
            sb,
            helper,
            relayed,
            bob,
            idle,
            going,
            _servers,
            _proxy: sb.tproxy("mihomo").uid(1001).port(7890).start(),
        }
    }

    fn app(&self, id: &str) -> App {
        let unit = format!("app.slice/app-{id}-1.scope");
        self.relayed.user.cgroup(unit).app()
    }

    /// The agent has that configuration, and the kernel what follows from it for these applications.
    fn configure(&self, config: &str, targets: &[(&str, &str)]) {
        self.relayed.agent.write_config(config);
        for (id, target) in targets {
            let cgroup = format!("app.slice/app-{id}-1.scope");
            let cgroup = self.relayed.user.cgroup(cgroup);
            Agent::of(&self.relayed.user).wait_for_verdict(&cgroup, target);
        }
    }

    /// Control groups, flat and nested, some of which are gone at once.
    fn control_groups(&self, users: &[&User]) {
        for user in users {
            let mut made = Vec::new();
            for number in 2..12 {
                for id in ["one", "two", "three", "four"] {
                    made.push(user.cgroup(format!("app.slice/app-{id}-{number}.scope")));
                    let slice = format!("app.slice/app-{id}.slice");
                    made.push(user.cgroup(&slice));
                    made.push(user.cgroup(format!("{slice}/app-{id}-{number}.service")));
                    made.push(user.cgroup(format!("{slice}/app-{id}-{number}.service/a")));
                    let deep = format!("{slice}/app-{id}-{number}.service/a/deep");
                    made.push(user.cgroup(&deep));
                    if number % 2 == 0 {
                        user.cgroup(&deep).remove();
                        made.pop();
                    }
                }
            }
            made.sort_by_key(|cgroup| std::cmp::Reverse(cgroup.path()));
            made.dedup_by_key(|cgroup| cgroup.path());
            for cgroup in made {
                cgroup.remove();
            }
        }
    }

    /// Connections that end in every way: of applications that are answered, and of others.
    fn connections(&self, answered: &[&str], unanswered: &[&str]) {
        let destinations = self.sb.destinations();
        for id in answered {
            let app = self.app(id);
            for to in destinations {
                app.burst(Tcp, to, 20);
                app.udp(to);
                if let Ok(connection) = app.open_tcp(to) {
                    connection.say("and never again");
                    connection.reset();
                }
                app.udp(SocketAddr::new(to.ip(), PORTS[2]));
            }
        }
        for id in unanswered {
            let app = self.app(id);
            for to in destinations {
                app.tcp(to);
                app.udp(to);
                if *id == "silent" {
                    // These are open when the application is killed.
                    app.hoard(to, 3);
                }
            }
        }
    }

    fn calls(&self) {
        for user in [&self.relayed.user, &self.bob] {
            let mut session = Session::of(user);
            session.status();
            session.0.send_bytes(b"{\"method\":\"org.cgtproxy.Help");
            let mut agent = Agent::of(user);
            agent.status();
            // Hangs up while it waits.
            agent.0.send(&json!({
                "method": "org.cgtproxy.Agent.AwaitTarget",
                "parameters": { "controlGroup": "/user.slice/none", "target": "direct" },
            }));
        }
        for command in ["apps", "status", "doctor"] {
            self.relayed.agent(command);
        }
    }

    /// Root's policy and a third user's, given by hand and lost.
    fn sessions(&self, round: u32) {
        let mut root = Session::of(&self.sb.user(0));
        self.sb.cgroup("system.slice/web.service");
        root.replace(
            json!([{ "name": format!("company-{round}"), "port": 7899 }]),
            json!([format!("10.{}.0.0/16", round % 256)]),
            json!([
                to_proxy("", &format!("company-{round}")),
                verdict("system.slice/web.service", "drop"),
            ]),
        );
        let carol = self.sb.user(1003);
        let mut session = Session::of(&carol);
        session.replace(
            json!([{ "name": "mihomo", "port": 7000 }]),
            json!([]),
            json!([to_proxy("", "mihomo")]),
        );
        // What it drops would be kept.
        root.call("RemovePolicy", json!({}));
    }

    fn round(&mut self, round: u32) {
        let users = [&self.relayed.user.clone(), &self.bob.clone()];
        self.control_groups(&users);
        self.connections(&["one", "two", "four"], &["three"]);
        self.calls();
        let open = [self.app("one"), self.app("two")];
        let opened: Vec<_> = open
            .iter()
            .flat_map(|app| self.sb.destinations().map(|to| app.open_tcp(to)))
            .collect();
        assert!(opened.iter().all(Result::is_ok), "{round}");
        self.configure(
            &other_config(round),
            &[("two", &format!("mihomo-{round}")), ("silent", "silent")],
        );
        self.control_groups(&users);
        self.connections(
            &["one", "two", "four"],
            &["rude", "silent", "broken", "absent", "three"],
        );
        self.sessions(round);
        match round % 3 {
            0 => self.going.kill(),
            1 => drop(self.going.stop()),
            _ => {
                self.going.kill();
                wait_until("the grace to be over", || {
                    !self
                        .sb
                        .chains()
                        .iter()
                        .any(|chain| chain.contains("-1002-mihomo"))
                });
            }
        }
        self.control_groups(&users[..1]);
        if round.is_multiple_of(2) {
            self.sb.forget_connections();
        }
        self.configure(STAYING, &[("two", "mihomo"), ("one", "own")]);
        self.going.start_again();
        drop(opened);
    }

    /// What is held while nothing happens.
    fn held(&mut self) -> Held {
        for id in [
            "one", "two", "three", "four", "rude", "silent", "broken", "absent",
        ] {
            let unit = format!("app.slice/app-{id}-1.scope");
            self.relayed.user.cgroup(unit).remove();
        }
        let cgroup = self.relayed.user.cgroup("app.slice/app-two-1.scope");
        Agent::of(&self.relayed.user).wait_for_verdict(&cgroup, "mihomo");
        wait_until("what was given by hand to be gone", || {
            self.sb.map_elements("users").len() == 2
        });
        // Conversations are over some seconds after their last packet, connections that are prepared after five. An
        // application's end of a connection that the kernel has forgotten is missed when the relay asks for it.
        let relay = &self.relayed.relay;
        let end = Instant::now() + Duration::from_secs(30);
        while relay.open_descriptors() > self.idle && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(100));
        }
        let mut held = Held::new();
        held_by("helper", &self.helper, &mut held);
        held_by("relay", &self.relayed.relay, &mut held);
        held_by("agent", &self.relayed.agent, &mut held);
        held_by_kernel(self.sb, &mut held);
        held
    }
}

/// A helper that is killed comes back with other `udp-verdicts`.
fn restart(bed: &mut Bed<'_>, round: u32) {
    bed.helper.kill();
    let udp = ["per-datagram", "per-conversation"][round as usize % 2];
    bed.helper
        .write_config(&format!("grace-seconds: 1\nudp-verdicts: {udp}\n"));
    bed.helper.start_again();
}

/// Insists on that when everything has come and gone so often, and this in between.
fn churn(between: impl Fn(&mut Bed<'_>, u32)) {
    sandbox(|sb| {
        let mut bed = Bed::new(sb);
        let mut before = Held::new();
        for round in 1..=rounds() {
            bed.round(round);
            between(&mut bed, round);
            if round == WARM_UP {
                before = bed.held();
            }
        }
        let after = bed.held();
        for (what, count) in &before {
            let now = after.get(what).copied().unwrap_or(0);
            let slack = if what.ends_with("KiB") { SLACK_KIB } else { 0 };
            assert!(now <= count + slack, "{what}\n{before:#?}\n{after:#?}");
        }
        eprintln!("{before:#?}\n{after:#?}");
    });
}

#[test]
fn who_goes_on_holds_what_was_held_before() {
    churn(|_, _| {});
}

#[test]
fn what_a_killed_helper_leaves_does_not_grow() {
    churn(restart);
}
