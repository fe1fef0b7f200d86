//! Others take away what the helper put into the kernel, while traffic flows: it is back at once.

#![allow(clippy::expect_used, reason = "a panic is a failed test")]

use std::fs;
use std::process::{Child, Command, Stdio};

use cgtproxy_tests::injection::Injection;
use cgtproxy_tests::sandbox::{Sandbox, Service, User, direct, proxied, sandbox};
use cgtproxy_tests::session::{Session, mapped_ids, to_proxy, verdict};
use cgtproxy_tests::steady::Steady;
use cgtproxy_tests::wait::{wait_for, wait_until};
use nix::sys::signal::Signal;
use serde_json::json;

const APP: &str = "app.slice/app-a.scope";

/// A helper on a kernel that does not protect tables, and a policy.
fn with_policy(sb: &Sandbox, config: &str) -> (Service, User, Session) {
    let helper = sb.helper().config(config).start();
    let user = sb.user(1001);
    user.cgroup("app.slice/app-drop.scope");
    let mut session = Session::of(&user);
    session.replace(
        json!([{ "name": "mihomo", "port": 7890 }]),
        json!(["10.0.0.0/8"]),
        json!([
            to_proxy("", "mihomo"),
            verdict("app.slice/app-drop.scope", "drop")
        ]),
    );
    (helper, user, session)
}

/// How others take routing away.
const WRECKS: [&[&str]; 5] = [
    &["ip", "rule", "del", "priority", "800"],
    &["ip", "-6", "rule", "del", "priority", "800"],
    &["ip", "route", "flush", "table", "25447"],
    &["ip", "-6", "route", "flush", "table", "25447"],
    &["sh", "-c", "ip link set lo down; ip link set lo up"],
];

#[track_caller]
fn wait_for_routing(sb: &Sandbox, after: &[&str]) {
    wait_until(&format!("routing after {}", after.join(" ")), || {
        [4, 6]
            .into_iter()
            .all(|family| sb.mark_rules(family).len() == 1 && sb.routes(family, "25447").len() == 1)
    });
}

#[test]
fn flushed_rules_and_routes_are_restored_and_nothing_leaves_meanwhile() {
    sandbox(|sb| {
        let (_helper, user, _session) = with_policy(sb, "");
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let app = user.cgroup(APP).app();
        let traffic = Steady::start(sb, &app);
        traffic.assert_proxied("mihomo");
        for wreck in WRECKS {
            for _ in 0..3 {
                sb.run(wreck);
                wait_for_routing(sb, wreck);
            }
            for to in sb.destinations() {
                assert_eq!(app.tcp(to), proxied("mihomo", to), "{wreck:?}");
                assert_eq!(app.udp(to), proxied("mihomo", to), "{wreck:?}");
            }
            traffic.assert_nothing_left(sb);
        }
        // All rules of a family, the machine's own included, which are not ours to restore.
        sb.run(&["ip", "rule", "flush"]);
        sb.run(&["ip", "rule", "add", "priority", "32766", "lookup", "main"]);
        wait_until("ip rule flush", || sb.mark_rules(4).len() == 1);
    });
}

/// The helper can't restore anything, so that there is no race.
#[test]
fn what_is_diverted_does_not_leave_while_rules_or_routes_are_missing() {
    sandbox(|sb| {
        let (helper, user, _session) = with_policy(sb, "");
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let app = user.cgroup(APP).app();
        let other = sb.user(1002).cgroup(APP).app();
        for wreck in WRECKS {
            helper.signal(Signal::SIGSTOP);
            sb.run(wreck);
            for to in sb.destinations() {
                let held = [app.tcp(to), app.udp(to)];
                let lost = held.iter().all(|outcome| outcome.is_dropped());
                let proxied = held.iter().all(|outcome| *outcome == proxied("mihomo", to));
                assert!(lost || proxied, "{wreck:?} {to}: {held:?}");
                sb.assert_nothing_left_for(to.ip());
            }
            for to in sb.destinations() {
                assert_eq!(other.udp(to), direct(to), "{wreck:?}");
            }
            helper.signal(Signal::SIGCONT);
            wait_for_routing(sb, wreck);
            for to in sb.destinations() {
                assert_eq!(app.udp(to), proxied("mihomo", to), "{wreck:?}");
            }
        }
    });
}

/// Much is announced of lo that takes nothing of ours away.
#[test]
fn nobody_is_said_to_have_changed_what_is_as_it_was() {
    sandbox(|sb| {
        let (helper, _user, mut session) = with_policy(sb, "");
        for change in [
            "ip -6 address add 2001:db8:1::1/128 dev lo",
            "ip link set lo mtu 60000",
            "ip link set lo alias mine",
        ] {
            let command: Vec<_> = change.split(' ').collect();
            sb.run(&command);
            // It reads what was announced before it is asked again.
            for _ in 0..20 {
                session.status();
            }
            assert!(!helper.log().contains("another program"), "{change}");
        }
        let changed = "the routing of diverted packets was changed by another program";
        for (family, times) in [("-6", 1), ("-4", 2)] {
            let wreck = ["ip", family, "rule", "del", "priority", "800"];
            sb.run(&wreck);
            wait_until("the helper to say so", || {
                helper.log().matches(changed).count() == times
            });
            wait_for_routing(sb, &wreck);
        }
    });
}

#[test]
fn what_can_not_be_restored_is_said_once() {
    sandbox(|sb| {
        let (helper, _user, mut session) = with_policy(sb, "");
        sb.run(&["ip", "link", "set", "lo", "down"]);
        // Each is announced, and looked at: nothing of ours can be put back while lo is down.
        sb.run(&["ip", "rule", "del", "priority", "800"]);
        for _ in 0..5 {
            sb.run(&["ip", "rule", "add", "priority", "900", "lookup", "25447"]);
            sb.run(&["ip", "rule", "del", "priority", "900"]);
            session.status();
            session.status();
        }
        helper.wait_log("can't be restored");
        sb.run(&["ip", "link", "set", "lo", "up"]);
        wait_for_routing(sb, &["lo is up"]);
        let log = helper.log();
        assert_eq!(log.matches("can't be restored").count(), 1, "{log}");
    });
}

/// A network that its administrator wants no IPv6 in, and then does.
#[test]
fn a_helper_starts_without_ipv6_and_diverts_it_once_it_is_there() {
    sandbox(|sb| {
        let switch = |setting: &str| sb.run(&["sysctl", "-w", setting]);
        switch("net.ipv6.conf.lo.disable_ipv6=1");
        let (helper, user, mut session) = with_policy(sb, "");
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let app = user.cgroup(APP).app();
        for _ in 0..2 {
            assert_eq!(session.status()["ipv6"], json!(false));
            let [v4, v6] = sb.destinations();
            assert_eq!(app.udp(v4), proxied("mihomo", v4));
            assert!(app.udp(v6).is_dropped());
            switch("net.ipv6.conf.lo.disable_ipv6=0");
            wait_for_routing(sb, &["IPv6"]);
            wait_until("the helper says so", || {
                session.status()["ipv6"] == json!(true)
            });
            let [_, v6] = sb.destinations();
            assert_eq!(app.udp(v6), proxied("mihomo", v6));
            assert_eq!(app.tcp(v6), proxied("mihomo", v6));
            switch("net.ipv6.conf.lo.disable_ipv6=1");
            wait_until("the helper says so", || {
                session.status()["ipv6"] == json!(false)
            });
        }
        let log = helper.log();
        for (sentence, times) in [
            ("it is switched off on lo: only IPv4 is diverted", 1),
            ("IPv6 has been switched on: it is diverted as well", 2),
            ("IPv6 has been switched off on lo: only IPv4 is diverted", 2),
            ("can't be restored", 0),
        ] {
            assert_eq!(log.matches(sentence).count(), times, "{sentence}: {log}");
        }
    });
}

/// A helper that strace runs, with what it sends in a file.
struct Traced(Child);

impl Traced {
    const SENT: &str = "/run/strace-sent";
    const SAID: &str = "/run/strace-said";

    /// Starts it with that for strace, and returns when it listens.
    fn start(options: &[&str]) -> Self {
        let _ = fs::remove_file(Service::socket());
        fs::create_dir_all("/run/cgtproxy").expect("/run is ours");
        let helper = Command::new("strace")
            // What it starts is the helper itself.
            .args(["-D", "-o", Self::SENT, "-e", "trace=sendto"])
            .args(options)
            .args(["/run/testbed/bin/cgtproxy-helper", "--socket"])
            .arg(Service::socket())
            .stdin(Stdio::null())
            .stderr(fs::File::create(Self::SAID).expect("/run is ours"))
            .spawn()
            .expect("strace is installed");
        let this = Self(helper);
        wait_until("the helper to listen", || Service::socket().exists());
        this
    }

    /// What asks for IPv6's route, and which of all that it sends that is.
    fn route_of_ipv6() -> (usize, String) {
        wait_for("the route of IPv6", || {
            let sent = fs::read_to_string(Self::SENT).expect("it is being written");
            // A line ends when the kernel has answered.
            let asks = |line: &&str| {
                line.ends_with('\n') && line.contains("RTM_NEWROUTE") && line.contains("AF_INET6")
            };
            let mut sent = sent.split_inclusive('\n').enumerate();
            let (before, line) = sent.find(|(_, line)| asks(line))?;
            Some((before + 1, line.to_owned()))
        })
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.0.id().cast_signed());
        let _ = nix::sys::signal::kill(pid, Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

/// As with `ipv6.disable=1`: the kernel knows no routes of IPv6.
#[test]
fn a_helper_starts_on_a_kernel_without_ipv6() {
    sandbox(|sb| {
        let helper = Traced::start(&[]);
        let (which, _) = Traced::route_of_ipv6();
        drop(helper);
        sb.run(&["/run/testbed/bin/cgtproxy-helper", "--remove"]);
        let lost = format!("inject=sendto:error=EAFNOSUPPORT:when={which}");
        let _helper = Traced::start(&["-e", &lost]);
        let user = sb.user(1001);
        let mut session = Session::of(&user);
        let (_, asked) = Traced::route_of_ipv6();
        assert!(asked.contains("EAFNOSUPPORT"), "{asked}");
        session.replace(
            json!([{ "name": "mihomo", "port": 7890 }]),
            json!([]),
            json!([to_proxy("", "mihomo")]),
        );
        assert_eq!(session.status()["ipv6"], json!(false));
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let app = user.cgroup(APP).app();
        let [v4, v6] = sb.destinations();
        assert_eq!(app.udp(v4), proxied("mihomo", v4));
        assert!(app.udp(v6).is_dropped());
        sb.assert_nothing_left_for(v6.ip());
        let said = fs::read_to_string(Traced::SAID).expect("it is there");
        assert_eq!(said.matches("the kernel has no IPv6").count(), 1, "{said}");
    });
}

/// `nft monitor`, which writes a line for each transaction, with who made it.
struct Transactions {
    monitor: Child,
    log: &'static str,
}

impl Transactions {
    fn watch(sb: &Sandbox) -> Self {
        let log = "/run/transactions";
        let file = fs::File::create(log).expect("/run is ours");
        let monitor = Command::new("nft")
            .arg("monitor")
            .stdout(file)
            .stdin(Stdio::null())
            .spawn()
            .expect("nft is installed");
        let this = Self { monitor, log };
        // It says nothing when it is ready.
        wait_until("nft monitors", || {
            sb.nft("add table ip begin; delete table ip begin");
            this.text().contains("ip begin")
        });
        this
    }

    fn text(&self) -> String {
        fs::read_to_string(self.log).expect("it is being written")
    }

    /// How many transactions a program has made up to now.
    fn by(&self, sb: &Sandbox, program: &str) -> usize {
        let end = format!("end-{}", self.text().len());
        sb.nft(&format!("add table ip {end}"));
        wait_until("nft has heard everything", || self.text().contains(&end));
        let by = format!("({program})");
        let text = self.text();
        let generations = text.lines().filter(|line| line.contains("new generation"));
        generations.filter(|line| line.ends_with(&by)).count()
    }
}

impl Drop for Transactions {
    fn drop(&mut self) {
        let _ = self.monitor.kill();
        let _ = self.monitor.wait();
    }
}

#[test]
fn a_table_is_restored_in_one_transaction_however_it_was_wrecked() {
    sandbox(|sb| {
        let (_helper, user, mut session) = with_policy(sb, "own-table: false");
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let app = user.cgroup(APP).app();
        let dropped = user.cgroup("app.slice/app-drop.scope").app();
        let before = sb.run(&["nft", "list", "table", "inet", "cgtproxy"]);
        let [v4, _] = sb.destinations();
        let open = app.open_tcp(v4).expect("it opens");
        assert_eq!(open.ask(), proxied("mihomo", v4));
        let others = Steady::start(sb, &sb.user(1002).cgroup(APP).app());
        let transactions = Transactions::watch(sb);
        let count = || transactions.by(sb, "cgtproxy-helper");
        for wreck in [
            "flush ruleset",
            "delete table inet cgtproxy",
            "flush chain inet cgtproxy output",
            "flush table inet cgtproxy",
            "insert rule inet cgtproxy output accept",
            "flush map inet cgtproxy users",
        ] {
            let earlier = count();
            sb.nft(wreck);
            wait_until(wreck, || {
                sb.has_table() && sb.run(&["nft", "list", "table", "inet", "cgtproxy"]) == before
            });
            assert_eq!(count(), earlier + 1, "{wreck}: {}", transactions.text());
            for to in sb.destinations() {
                assert_eq!(app.tcp(to), proxied("mihomo", to), "{wreck}");
                assert!(dropped.udp(to).is_dropped(), "{wreck}");
            }
            assert_eq!(open.ask(), proxied("mihomo", v4), "{wreck}");
            // Who has no policy notices nothing.
            others.assert_all_direct();
        }
        // What the session does next fits what is there.
        session.assign(json!([verdict("app.slice/app-drop.scope", "direct")]));
    });
}

/// How many announcements each netlink socket of a process has lost (/proc/net/netlink), by protocol.
fn lost_announcements(pid: u32) -> [u64; 2] {
    let links = fs::read_dir(format!("/proc/{pid}/fd")).expect("it runs");
    let links = links
        .flatten()
        .filter_map(|fd| fs::read_link(fd.path()).ok());
    let inodes: Vec<String> = links
        .filter_map(|link| {
            let link = link.to_str()?;
            Some(link.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned())
        })
        .collect();
    let table = fs::read_to_string(format!("/proc/{pid}/net/netlink")).expect("it runs");
    // NETLINK_ROUTE and NETLINK_NETFILTER (linux/netlink.h).
    ["0", "12"].map(|protocol| {
        let rows = table
            .lines()
            .map(|row| row.split_whitespace().collect::<Vec<_>>());
        // sk Eth Pid Groups Rmem Wmem Dump Locks Drops Inode
        let rows = rows.filter(|row| {
            row.get(1) == Some(&protocol)
                && inodes
                    .iter()
                    .any(|inode| row.get(9) == Some(&inode.as_str()))
        });
        rows.filter_map(|row| row.get(8)?.parse::<u64>().ok()).sum()
    })
}

#[test]
fn losses_that_the_kernel_had_no_room_to_announce_are_found() {
    sandbox(|sb| {
        let (helper, user, mut session) = with_policy(sb, "own-table: false");
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let app = user.cgroup(APP).app();
        let dropped = user.cgroup("app.slice/app-drop.scope").app();
        let others = Steady::start(sb, &sb.user(1002).cgroup(APP).app());
        let before = sb.run(&["nft", "list", "table", "inet", "cgtproxy"]);
        for _ in 0..2 {
            let earlier = lost_announcements(helper.pid());
            helper.signal(Signal::SIGSTOP);
            // What is nobody's business fills the helper's buffers.
            wait_until("the buffers are full", || {
                let elements: Vec<_> = (0..10_000)
                    .map(|n| format!("10.1.{}.{}", n / 250, n % 250))
                    .collect();
                sb.nft(&format!(
                    "add table inet other
                     add set inet other s {{ type ipv4_addr; }}
                     add element inet other s {{ {} }}
                     delete table inet other",
                    elements.join(", ")
                ));
                sb.run(&[
                    "sh",
                    "-c",
                    "seq -f 'route add 10.2.0.%g/32 dev uplink table 99' 250 | ip -batch - &&
                     ip route flush table 99",
                ]);
                let now = lost_announcements(helper.pid());
                now.iter().zip(earlier).all(|(now, earlier)| *now > earlier)
            });
            // Nobody hears of these any more.
            sb.nft("delete table inet cgtproxy");
            sb.run(&["ip", "rule", "del", "priority", "800"]);
            sb.run(&["ip", "-6", "route", "flush", "table", "25447"]);
            helper.signal(Signal::SIGCONT);
            wait_until("everything is back", || {
                sb.has_table() && sb.run(&["nft", "list", "table", "inet", "cgtproxy"]) == before
            });
            wait_for_routing(sb, &["a flood"]);
            for to in sb.destinations() {
                assert_eq!(app.tcp(to), proxied("mihomo", to));
                assert!(dropped.udp(to).is_dropped());
            }
            others.assert_all_direct();
        }
        session.assign(json!([verdict("app.slice/app-drop.scope", "direct")]));
        // Nor is it known who did it.
        let log = helper.log();
        for (sentence, times) in [
            (
                "made the table 'inet cgtproxy' anew: what others changed was not heard",
                2,
            ),
            (
                "the table 'inet cgtproxy' was changed by another program",
                0,
            ),
        ] {
            assert_eq!(log.matches(sentence).count(), times, "{sentence}: {log}");
        }
    });
}

#[test]
fn what_the_helper_does_itself_is_no_loss_however_much_it_is() {
    sandbox(|sb| {
        let (helper, user, mut session) = with_policy(sb, "own-table: false");
        let paths: Vec<_> = (0..3000).map(|n| format!("app.slice/{n}.scope")).collect();
        for path in &paths {
            user.cgroup(path);
        }
        let all: Vec<_> = paths.iter().map(|path| verdict(path, "drop")).collect();
        session.replace(json!([]), json!([]), json!(all));
        let made = || sb.run(&["nft", "--handle", "list", "tables", "inet"]);
        let before = made();
        // It reads what was announced before it is asked again.
        for _ in 0..20 {
            session.status();
        }
        assert_eq!(made(), before, "the table is another one");
        assert_eq!(lost_announcements(helper.pid())[1], 0);
    });
}

#[test]
fn an_answer_that_is_lost_leaves_no_doubt() {
    sandbox(|sb| {
        let (helper, user, mut session) = with_policy(sb, "");
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let app = user.cgroup(APP).app();
        let dropped = user.cgroup("app.slice/app-drop.scope").app();
        let before = mapped_ids(sb, 1001);
        let change =
            json!({ "assign": [verdict(APP, "direct")], "remove": ["app.slice/app-drop.scope"] });
        {
            // The call itself is the first that the helper reads, and the kernel's answer the second.
            let _lost = Injection::of(&helper, "recvfrom", "error=ENOBUFS:when=2");
            let (error, parameters) = session.refusal("UpdateAssignments", change.clone());
            assert_eq!(error, "KernelRefused");
            let why = parameters["message"].as_str().expect("a sentence");
            assert!(why.contains("the kernel refuses the change: "), "{why}");
        }
        // The kernel has made the change, and nobody knew: what was refused is not there.
        assert_eq!(mapped_ids(sb, 1001), before);
        for to in sb.destinations() {
            assert_eq!(app.tcp(to), proxied("mihomo", to));
            assert!(dropped.udp(to).is_dropped());
        }
        session.call("UpdateAssignments", change);
        for to in sb.destinations() {
            assert_eq!(app.tcp(to), direct(to));
            assert_eq!(dropped.tcp(to), proxied("mihomo", to));
        }
    });
}

/// What lacks memory for a moment is not said to be absent.
#[test]
fn a_service_manager_that_can_not_be_looked_at_now_is_not_absent() {
    sandbox(|sb| {
        let (helper, user, mut session) = with_policy(sb, "");
        user.cgroup(APP);
        let change = json!({ "assign": [verdict(APP, "drop")], "remove": [] });
        {
            let _no_memory = Injection::of(&helper, "fstat", "error=ENOMEM");
            let (error, parameters) = session.refusal("UpdateAssignments", change.clone());
            assert_eq!(error, "KernelRefused", "{parameters}");
            let why = parameters["message"].as_str().expect("a sentence");
            assert!(
                why.contains("can't open control groups at the moment"),
                "{why}"
            );
        }
        session.call("UpdateAssignments", change);
    });
}

/// As in a container that nobody's root has made: its capabilities are those of its own namespaces.
#[test]
fn a_helper_starts_in_a_user_namespace_of_its_own() {
    sandbox(|sb| {
        let user = sb.user(1001);
        let socket = "/run/user/1001/helper.sock";
        let helper = user.program(
            user.service(),
            &[
                "unshare",
                "--user",
                "--map-root-user",
                "--net",
                "sh",
                "-c",
                "ip link set lo up && exec \"$@\"",
                "sh",
                "/run/testbed/bin/cgtproxy-helper",
                "--socket",
                socket,
            ],
        );
        wait_until("it listens, or says why not", || {
            std::path::Path::new(socket).exists() || !helper.log().is_empty()
        });
        let status = user
            .varlink(socket)
            .call("org.cgtproxy.Helper.GetStatus", json!({}));
        assert_eq!(status.get("error"), None, "{status}\n{}", helper.log());
    });
}
