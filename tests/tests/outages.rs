//! Daemons that are killed together, stopped, or have nothing left to open files with, while traffic flows.

#![allow(clippy::expect_used, reason = "a panic is a failed test")]

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::time::{Duration, Instant};

use cgtproxy_tests::agent::Agent;
use cgtproxy_tests::sandbox::{
    App, Cgroup, Connection, HELPER_UID, Sandbox, Server, Service, User, proxied, sandbox,
};
use cgtproxy_tests::session::{SOCKET, Session, mapped_ids, to_proxy, verdict};
use cgtproxy_tests::steady::Steady;
use cgtproxy_tests::wait::{DEADLINE, wait_until};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const CONFIG: &str = r"
version: 1
tproxies:
  mihomo: {port: 7890}
rules:
  - {match: app-tracker, drop: true}
  - {match: '/app\.slice$', tproxy: mihomo}
";

fn scope(user: &User, name: &str) -> Cgroup {
    user.cgroup(format!("app.slice/app-{name}.scope"))
}

/// An own verdict for each of these, by hand.
fn policy() -> Value {
    json!({
        "proxies": [{ "name": "mihomo", "port": 7890 }], "bypass": [],
        "assignments": [to_proxy("app.slice", "mihomo"), verdict("app.slice/app-tracker.scope", "drop")],
    })
}

#[test]
fn both_daemons_killed_at_once_leave_no_gap_in_an_owned_table() {
    sandbox(|sb| kill_both(sb, "own-table: true"));
}

#[test]
fn both_daemons_killed_at_once_leave_no_gap_in_a_table_of_nobody() {
    sandbox(|sb| kill_both(sb, "own-table: false"));
}

fn kill_both(sb: &Sandbox, helper: &str) {
    let mut helper = sb.helper().config(helper).start();
    let alice = sb.user(1001);
    let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
    let mut agent = alice.agent(CONFIG).start();
    let app = scope(&alice, "any").app();
    let tracker = scope(&alice, "tracker");
    Agent::of(&alice).wait_for_verdict(&tracker, "drop");
    let dropped = tracker.app();
    let traffic = Steady::start(sb, &app);
    let to = sb.destinations();
    let open = to.map(|to| app.open_tcp(to).expect("the proxy answers"));
    let holds = |what: &str| {
        for (open, to) in open.iter().zip(to) {
            assert_eq!(open.ask(), proxied("mihomo", to), "{what}");
        }
        traffic.assert_proxied("mihomo");
        traffic.assert_none_strayed(sb, &["mihomo"]);
        for to in sb.destinations() {
            assert!(dropped.udp(to).is_dropped(), "{what}");
            assert!(dropped.tcp(to).is_dropped(), "{what}");
            sb.assert_nothing_left_for(to.ip());
        }
    };
    holds("at first");
    for round in 0..4 {
        for daemon in [&helper, &agent] {
            daemon.signal(Signal::SIGKILL);
        }
        helper.wait();
        agent.wait();
        holds("without both");
        // What comes meanwhile is found.
        let new = scope(&alice, &format!("tracker-{round}"));
        if round % 2 == 0 {
            helper.start_again();
            holds("without the agent");
            agent.start_again();
        } else {
            // It is not ready without a helper.
            agent.begin_again();
            agent.wait_log("trying again");
            holds("without the helper");
            helper.start_again();
            agent.wait_ready();
        }
        Agent::of(&alice).wait_for_verdict(&new, "drop");
        let new = new.app();
        for to in sb.destinations() {
            assert!(new.udp(to).is_dropped());
        }
        holds("with both again");
    }
}

/// What counts is how much happens meanwhile, not how long it takes: nobody waits for the helper with a time-out. The
/// one timer that could run out, the grace, is what the test after this is about.
#[test]
fn nothing_is_lost_while_the_helper_is_stopped() {
    sandbox(|sb| {
        let helper = sb.helper().start();
        let alice = sb.user(1001);
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let _agent = alice.agent(CONFIG).start();
        let mut agent = Agent::of(&alice);
        let app = scope(&alice, "any").app();
        let early = scope(&alice, "tracker-0");
        agent.wait_for_verdict(&early, "drop");
        let traffic = Steady::start(sb, &app);
        let slice = alice.cgroup("app.slice");
        let directory = slice.directory();
        let directory = directory.to_str().expect("ASCII");
        let before = resident(helper.pid());

        helper.signal(Signal::SIGSTOP);
        // 300 come, of which 200 go again, some of them to come back as others of the same name.
        alice.shell(&format!(
            "cd {directory}
             for n in 1 2 3; do
                 seq -f app-tracker-$n%02g.scope 0 99 | xargs mkdir
             done
             seq -f app-tracker-1%02g.scope 0 99 | xargs rmdir
             seq -f app-tracker-2%02g.scope 0 99 | xargs rmdir
             seq -f app-tracker-2%02g.scope 0 2 98 | xargs mkdir"
        ));
        // The agent goes on: it has seen all, and the helper knows none.
        wait_until("the agent has seen everything", || {
            let status = agent.status();
            let groups = status["controlGroups"].as_array().expect("a list");
            let trackers = groups.iter().filter(|group| group["target"] == "drop");
            trackers.count() == 151
        });
        assert_eq!(mapped_ids(sb, 1001).len(), 2);
        // Calls of others pile up in their connections.
        let bob = sb.user(1002);
        let mut waiting: Vec<_> = (0..16)
            .map(|_| {
                let mut session = bob.varlink(SOCKET);
                for _ in 0..100 {
                    session.send(&json!({ "method": "org.cgtproxy.Helper.GetStatus" }));
                }
                session
            })
            .collect();
        traffic.assert_proxied("mihomo");
        traffic.assert_none_strayed(sb, &["mihomo"]);

        helper.signal(Signal::SIGCONT);
        let mut expected = vec![slice.id(), early.id()];
        for group in fs::read_dir(slice.directory())
            .expect("it is there")
            .flatten()
        {
            if group
                .file_name()
                .to_string_lossy()
                .starts_with("app-tracker-")
                && group.path() != early.directory()
            {
                expected.push(group.metadata().expect("it is there").ino());
            }
        }
        expected.sort_unstable();
        assert_eq!(expected.len(), 152);
        wait_until("all verdicts are in force", || {
            mapped_ids(sb, 1001) == expected
        });
        for name in ["tracker-0", "tracker-200", "tracker-399"] {
            let late = scope(&alice, name).app();
            for to in sb.destinations() {
                assert!(late.udp(to).is_dropped(), "{name}");
            }
        }
        for session in &mut waiting {
            for _ in 0..100 {
                let reply = session.receive().expect("it is answered");
                assert_eq!(reply.get("error"), None);
            }
        }
        traffic.assert_proxied("mihomo");
        traffic.assert_none_strayed(sb, &["mihomo"]);
        let grown = resident(helper.pid()).saturating_sub(before);
        assert!(grown < 16 * 1024, "the helper has grown by {grown} KiB");
    });
}

/// The same for as long as it takes for a timer to run out, if anybody had one: here it is the time that counts. Control
/// groups are made and removed and processes are moved all the while, of two users.
#[test]
fn nobody_notices_a_helper_that_is_stopped_for_ten_seconds() {
    sandbox(|sb| {
        const STOPPED: Duration = Duration::from_secs(10);
        let mut helper = sb.helper().start();
        let users = [(1001, "alices", "7890"), (1002, "bobs", "7891")];
        let mut sides: Vec<_> = users
            .into_iter()
            .map(|(uid, name, port)| {
                let user = sb.user(uid);
                let number = port.parse().expect("a number");
                let proxy = sb.tproxy(name).uid(uid).port(number).start();
                let service = user.agent(&CONFIG.replace("7890", port)).start();
                let early = scope(&user, "tracker-early");
                let mut agent = Agent::of(&user);
                agent.wait_for_verdict(&early, "drop");
                let app = scope(&user, "any").app();
                let traffic = Steady::start(sb, &app);
                let open: Vec<_> = sb
                    .destinations()
                    .map(|to| (to, app.open_tcp(to).expect("the proxy answers")))
                    .into();
                let nomad = scope(&user, "nomad").app();
                let before = agent.generation();
                Side {
                    user,
                    name,
                    service,
                    agent,
                    early,
                    traffic,
                    open,
                    app,
                    nomad,
                    before,
                    _proxy: proxy,
                }
            })
            .collect();

        helper.signal(Signal::SIGSTOP);
        let begin = Instant::now();
        let mut round = 0;
        while begin.elapsed() < STOPPED {
            for side in &sides {
                let directory = side.user.cgroup("app.slice").directory();
                let directory = directory.to_str().expect("ASCII");
                // Ten come, and those of the last time go but for one, whose name is used again.
                let (last, next) = (round % 2, 1 - round % 2);
                side.user.shell(&format!(
                    "cd {directory}
                     mkdir app-tracker-{round}-kept.scope
                     seq -f app-tracker-{next}-%g.scope 0 9 | xargs mkdir -p
                     seq -f app-tracker-{last}-%g.scope 0 8 | xargs rmdir 2>/dev/null || true"
                ));
                // A process that moves has the verdict of where it is, which the kernel knows by itself.
                move_to(&side.nomad, &side.early);
                for to in sb.destinations() {
                    assert!(side.nomad.udp(to).is_dropped());
                    sb.assert_nothing_left_for(to.ip());
                }
                move_to(&side.nomad, &scope(&side.user, "nomad"));
                side.assert_proxied(sb);
            }
            round += 1;
        }
        assert!(round > 1, "there was time for {round} rounds");
        helper.signal(Signal::SIGCONT);

        for side in &mut sides {
            let slice = side.user.cgroup("app.slice");
            let trackers = fs::read_dir(slice.directory())
                .expect("it is there")
                .flatten();
            let mut expected: Vec<u64> = trackers
                .filter(|group| {
                    group
                        .file_name()
                        .to_string_lossy()
                        .starts_with("app-tracker-")
                })
                .map(|group| group.metadata().expect("it is there").ino())
                .collect();
            assert!(expected.len() > round);
            expected.push(slice.id());
            expected.sort_unstable();
            wait_until("the kernel has what there is", || {
                mapped_ids(sb, side.user.uid()) == expected
            });
            wait_until("the agent has heard of it", || {
                let status = side.agent.status();
                let groups = status["controlGroups"].as_array().expect("a list");
                groups.iter().all(|group| group["inForce"] == true)
            });
            // The helper knows what the kernel has.
            let known = Session::of(&side.user).status();
            assert_eq!(known["controlGroups"], json!(expected.len()));
            assert_eq!(known["session"], "active");
            for name in [
                format!("tracker-{}-kept", round - 1),
                "tracker-0-9".to_owned(),
            ] {
                let late = scope(&side.user, &name).app();
                for to in sb.destinations() {
                    assert!(late.udp(to).is_dropped(), "{name}");
                    assert!(late.tcp(to).is_dropped(), "{name}");
                }
            }
            side.assert_proxied(sb);
            // The session is the same one, and so are the processes.
            assert!(side.agent.generation() > side.before);
            assert!(side.service.is_running());
            for end in ["trying again", "lost the helper", "closed the connection"] {
                assert!(!side.service.log().contains(end), "{}", side.service.log());
            }
        }
        assert!(helper.is_running());
        for end in ["an agent is gone", "removed the policy"] {
            assert!(!helper.log().contains(end), "{}", helper.log());
        }
    });
}

/// A user with all that must not notice anything.
struct Side {
    user: User,
    name: &'static str,
    service: Service,
    agent: Agent,
    early: Cgroup,
    traffic: Steady,
    open: Vec<(SocketAddr, Connection)>,
    app: App,
    nomad: App,
    /// The helper's transactions before.
    before: u64,
    _proxy: Server,
}

impl Side {
    #[track_caller]
    fn assert_proxied(&self, sb: &Sandbox) {
        for (to, open) in &self.open {
            assert_eq!(open.ask(), proxied(self.name, *to));
        }
        for to in sb.destinations() {
            for app in [&self.app, &self.nomad] {
                assert_eq!(app.tcp(to), proxied(self.name, to));
            }
        }
        self.traffic.assert_proxied(self.name);
        self.traffic.assert_none_strayed(sb, &[self.name]);
    }
}

fn move_to(app: &App, cgroup: &Cgroup) {
    let processes = cgroup.directory().join("cgroup.procs");
    fs::write(processes, app.pid().to_string()).expect("root may move it");
}

/// A service manager that reads nothing, with its queue full, halts neither daemon at its start, nor when it reloads
/// or ends; it is told when it reads again.
#[test]
fn a_service_manager_that_does_not_read_halts_nobody() {
    sandbox(|sb| {
        const DEAF: &str = "/run/deaf";
        let manager = UnixDatagram::bind(DEAF).expect("/run is ours");
        fs::set_permissions(DEAF, fs::Permissions::from_mode(0o666)).expect("it is ours");
        let noise = UnixDatagram::unbound().expect("a socket");
        noise.connect(DEAF).expect("somebody is bound to it");
        noise.set_nonblocking(true).expect("a socket");
        let mut full = 0;
        while noise.send(b"NOISE=1").is_ok() {
            full += 1;
        }

        let mut helper = sb.helper().env("NOTIFY_SOCKET", DEAF).spawn();
        wait_until("the helper serves", || UnixStream::connect(SOCKET).is_ok());
        let alice = sb.user(1001);
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let mut service = alice.agent(CONFIG).env("NOTIFY_SOCKET", DEAF).spawn();
        wait_until("the agent's policy is in force", || {
            let status = alice.run("cgtproxy-agent", &["status"]).stdout;
            String::from_utf8_lossy(&status).starts_with("Helper:         connected\n")
        });
        let (app, tracker) = (scope(&alice, "any").app(), scope(&alice, "tracker"));
        let mut agent = Agent::of(&alice);
        for round in 0..3 {
            service.write_config(&format!(
                "{CONFIG}  - {{match: round-{round}, drop: true}}\n"
            ));
            service.reload();
            let new = scope(&alice, &format!("round-{round}"));
            agent.wait_for_verdict(&new, "drop");
            agent.wait_for_verdict(&tracker, "drop");
            for to in sb.destinations() {
                assert_eq!(app.udp(to), proxied("mihomo", to));
                assert!(new.app().udp(to).is_dropped());
            }
        }

        // Now it reads.
        manager.set_read_timeout(Some(DEADLINE)).expect("a socket");
        let read = || {
            let mut buffer = [0; 4096];
            let length = manager.recv(&mut buffer).expect("there is more");
            String::from_utf8_lossy(&buffer[..length]).into_owned()
        };
        for _ in 0..full {
            assert_eq!(read(), "NOISE=1");
        }
        let mut told: Vec<String> = Vec::new();
        while told.iter().filter(|line| *line == "READY=1").count() < 2
            || !told.iter().any(|line| line.starts_with("STATUS=In force"))
        {
            told.push(read());
        }
        // In order, and of each kind no more than the last, besides the one that was on its way.
        // (Both daemons say that they are ready; the last to say so comes after all that the helper says.)
        let place = |said: &str| told.iter().rposition(|line| line == said);
        let places = [
            "FDSTOREREMOVE=1\nFDNAME=snapshot",
            "FDSTORE=1\nFDNAME=snapshot",
            "READY=1",
        ]
        .map(place);
        assert!(places.is_sorted() && places[0].is_some(), "{told:?}");
        assert!(
            told.iter()
                .filter(|line| line.starts_with("RELOADING=1"))
                .count()
                <= 2,
            "{told:?}"
        );

        // And no more.
        while noise.send(b"NOISE=2").is_ok() {}
        assert!(service.stop().success());
        assert!(helper.stop().success());
    });
}

/// The memory of a process, in KiB.
fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.trim().strip_suffix(" kB"));
    number.and_then(|kib| kib.parse().ok()).expect("a number")
}

/// How many connections wait to be accepted by the helper.
fn backlog(sb: &Sandbox) -> u32 {
    let listening = sb.run(&["ss", "-xlH", "src", SOCKET]);
    // Netid State Recv-Q Send-Q …
    let count = listening.split_whitespace().nth(2);
    count.and_then(|n| n.parse().ok()).expect("a number")
}

#[test]
fn a_grace_does_not_end_while_the_helper_can_not_be_reached() {
    sandbox(|sb| {
        const GRACE: Duration = Duration::from_secs(5);
        let config = format!("grace-seconds: {}", GRACE.as_secs());
        let helper = sb.helper().config(&config).start();
        let alice = sb.user(1001);
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let app = scope(&alice, "any").app();
        scope(&alice, "tracker");
        let mut session = Session::of(&alice);
        session.call("ReplacePolicy", policy());
        let traffic = Steady::start(sb, &app);
        traffic.assert_proxied("mihomo");
        let mut other = Session::of(&alice);
        drop(session);
        wait_until("the grace begins", || other.status()["session"] == "grace");
        helper.signal(Signal::SIGSTOP);
        // The next agent is there in time, and waits.
        let mut next = alice.varlink(SOCKET);
        let call = json!({ "method": "org.cgtproxy.Helper.ReplacePolicy", "parameters": policy() });
        next.send(&call);
        wait_until("it waits", || backlog(sb) == 1);
        // It is time that this is about.
        std::thread::sleep(GRACE + Duration::from_millis(500));
        helper.signal(Signal::SIGCONT);
        let reply = next.receive().expect("a reply");
        assert_eq!(reply.get("error"), None, "{reply}");
        traffic.assert_proxied("mihomo");
        traffic.assert_none_strayed(sb, &["mihomo"]);
        for end in ["removed the policy", "an agent is gone"] {
            assert!(!helper.log().contains(end), "{}", helper.log());
        }
    });
}

/// Lets a daemon of this uid have so many more files open than it has, and no more.
fn leave_descriptors(sb: &Sandbox, daemon: &Service, uid: u32, more: usize) {
    let limit = daemon.descriptors_and(more);
    set_descriptors(sb, daemon, uid, limit);
}

/// By the daemon's own user: nobody needs a capability for that.
fn set_descriptors(sb: &Sandbox, daemon: &Service, uid: u32, limit: u64) {
    let (pid, uid) = (daemon.pid().to_string(), uid.to_string());
    let user = [
        "setpriv",
        "--reuid",
        &uid,
        "--regid",
        &uid,
        "--clear-groups",
    ];
    let limit = format!("--nofile={limit}:");
    sb.run(&[&user[..], &["prlimit", "--pid", &pid, &limit]].concat());
}

#[test]
fn sessions_go_on_when_connections_take_all_of_the_helpers_descriptors() {
    sandbox(|sb| {
        let helper = sb.helper().start();
        let alice = sb.user(1001);
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let _agent = alice.agent(CONFIG).start();
        let mut agent = Agent::of(&alice);
        let app = scope(&alice, "any").app();
        let traffic = Steady::start(sb, &app);
        traffic.assert_proxied("mihomo");
        leave_descriptors(sb, &helper, HELPER_UID, 3);
        // More users than there are descriptors for.
        let users: Vec<_> = (0..4).map(|n| sb.user(1101 + n)).collect();
        let mut crowd: Vec<_> = users
            .iter()
            .flat_map(|user| [user.varlink(SOCKET), user.varlink(SOCKET)])
            .collect();
        helper.wait_log("can't accept connections");
        wait_until("some wait", || backlog(sb) >= 1);
        for name in ["tracker-1", "tracker-2"] {
            let tracker = scope(&alice, name);
            agent.wait_for_verdict(&tracker, "drop");
            let dropped = tracker.app();
            for to in sb.destinations() {
                assert!(dropped.udp(to).is_dropped());
            }
        }
        traffic.assert_proxied("mihomo");
        // One goes, and those that waited are served, one after the other.
        while let Some(mut session) = crowd.pop() {
            if backlog(sb) == 0 {
                let reply = session.call("org.cgtproxy.Helper.GetStatus", json!({}));
                assert_eq!(reply.get("error"), None, "{reply}");
            }
        }
        assert_eq!(Session::of(&users[0]).status()["session"], "none");
        traffic.assert_none_strayed(sb, &["mihomo"]);
        // It is said once each time, however often it is tried.
        let said = helper.log().matches("can't accept connections").count();
        assert!(said <= 8, "{}", helper.log());
    });
}

/// With a limit below what is open already, not even the kept descriptors help for a while.
#[test]
fn a_helper_that_can_open_nothing_says_so_and_forgets_nothing() {
    sandbox(|sb| {
        let helper = sb.helper().start();
        let alice = sb.user(1001);
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let _agent = alice.agent(CONFIG).start();
        let mut agent = Agent::of(&alice);
        let app = scope(&alice, "any").app();
        let traffic = Steady::start(sb, &app);
        set_descriptors(sb, &helper, HELPER_UID, 3);
        let tracker = scope(&alice, "tracker");
        helper.wait_log("can't open control groups at the moment");
        wait_until("the agent says why", || {
            let problem = agent.status()["problem"].clone();
            problem
                .as_str()
                .is_some_and(|why| why.contains("at the moment"))
        });
        traffic.assert_proxied("mihomo");
        set_descriptors(sb, &helper, HELPER_UID, 1024);
        agent.wait_for_verdict(&tracker, "drop");
        let dropped = tracker.app();
        for to in sb.destinations() {
            assert!(dropped.udp(to).is_dropped());
        }
        traffic.assert_none_strayed(sb, &["mihomo"]);
    });
}

#[test]
fn both_daemons_without_descriptors_forget_nothing() {
    sandbox(|sb| {
        const CANT_OPEN: &str = "can't open control groups at the moment";
        let helper = sb.helper().start();
        let alice = sb.user(1001);
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let service = alice.agent(CONFIG).start();
        let mut agent = Agent::of(&alice);
        let app = scope(&alice, "any").app();
        let early = scope(&alice, "tracker-early");
        agent.wait_for_verdict(&early, "drop");
        let traffic = Steady::start(sb, &app);
        for round in 0..2 {
            set_descriptors(sb, &helper, HELPER_UID, 3);
            let of_agent = service.limit_descriptors(service.descriptors_and(0));
            scope(&alice, "tracker-early").remove();
            let late: Vec<_> = ["early", "late", "later"]
                .map(|name| scope(&alice, &format!("tracker-{name}")))
                .into();
            // Each says so once, however often it tries.
            wait_until("the helper says so", || {
                helper.log().matches(CANT_OPEN).count() == round + 1
            });
            let mut waits = Agent::of(&alice);
            wait_until("the agent says so", || {
                service.log().matches("can't accept connections").count() == round + 1
            });
            traffic.assert_proxied("mihomo");
            // One comes back, then the other.
            if round == 0 {
                set_descriptors(sb, &helper, HELPER_UID, 1024);
                service.limit_descriptors(of_agent);
            } else {
                service.limit_descriptors(of_agent);
                set_descriptors(sb, &helper, HELPER_UID, 1024);
            }
            for group in &late {
                waits.wait_for_verdict(group, "drop");
                let dropped = group.app();
                for to in sb.destinations() {
                    assert!(dropped.udp(to).is_dropped());
                }
            }
            let mut expected: Vec<u64> = late.iter().map(Cgroup::id).collect();
            expected.push(alice.cgroup("app.slice").id());
            expected.sort_unstable();
            wait_until("nothing else is in the kernel", || {
                mapped_ids(sb, 1001) == expected
            });
            for group in late {
                group.remove();
            }
            scope(&alice, "tracker-early");
            assert_eq!(helper.log().matches(CANT_OPEN).count(), round + 1);
        }
        traffic.assert_none_strayed(sb, &["mihomo"]);
    });
}

/// Clocks that a test can set for those who are started with it, which the machine's own would be set for all.
struct Clocks;

impl Clocks {
    const LIBRARY: &str = "/run/clocks/clocks.so";

    fn new(sb: &Sandbox) -> Self {
        fs::create_dir("/run/clocks").expect("/run is ours");
        fs::write("/run/clocks/clocks.c", include_str!("outages/clocks.c")).expect("it is ours");
        let compile = ["cc", "-shared", "-fPIC", "-O2", "-o", Self::LIBRARY];
        sb.run(&[&compile[..], &["/run/clocks/clocks.c"]].concat());
        Self
    }

    fn set(&self, clock: &str, seconds_from_now: i64) {
        let file = format!("/run/clocks/{clock}");
        fs::write(format!("{file}.new"), seconds_from_now.to_string()).expect("it is ours");
        fs::rename(format!("{file}.new"), file).expect("it was just written");
    }

    fn assert_used_by(&self, service: &Service) {
        let maps = fs::read_to_string(format!("/proc/{}/maps", service.pid()));
        assert!(maps.expect("it runs").contains(Self::LIBRARY));
    }
}

#[test]
fn a_clock_that_is_set_changes_nothing() {
    sandbox(|sb| {
        const YEAR: i64 = 366 * 24 * 3600;
        let clocks = Clocks::new(sb);
        let preload = ("LD_PRELOAD", Clocks::LIBRARY);
        let helper = sb
            .helper()
            .config("grace-seconds: 3600")
            .env(preload.0, preload.1)
            .start();
        let alice = sb.user(1001);
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let mut service = alice.agent(CONFIG).env(preload.0, preload.1).start();
        clocks.assert_used_by(&helper);
        clocks.assert_used_by(&service);
        let app = scope(&alice, "any").app();
        let traffic = Steady::start(sb, &app);
        let mut other = Session::of(&alice);
        for (round, seconds) in [YEAR, -YEAR, 0].into_iter().enumerate() {
            // In the middle of a grace.
            service.kill();
            wait_until("the grace begins", || other.status()["session"] == "grace");
            clocks.set("realtime", seconds);
            assert_eq!(other.status()["session"], "grace");
            service.start_again();
            let late = scope(&alice, &format!("tracker-{round}"));
            Agent::of(&alice).wait_for_verdict(&late, "drop");
            let dropped = late.app();
            for to in sb.destinations() {
                assert!(dropped.udp(to).is_dropped());
            }
            traffic.assert_proxied("mihomo");
            traffic.assert_none_strayed(sb, &["mihomo"]);
        }
        // It is the monotonic clock that they go by, which nobody can set.
        service.kill();
        wait_until("the grace begins", || other.status()["session"] == "grace");
        clocks.set("monotonic", YEAR);
        assert_eq!(other.status()["session"], "grace");
        helper.wait_log("an agent is gone");
    });
}
