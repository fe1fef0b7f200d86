//! What happens to a whole system in its life, while traffic flows: daemons that are killed together and
//! upgraded, service managers that are started again, users that are deleted.

#![allow(clippy::expect_used, reason = "a panic is a failed test")]

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use cgtproxy_tests::installed::{AGENT, HELPER, Installed};
use cgtproxy_tests::sandbox::{App, Outcome, Sandbox, Server, by, direct, proxied, sandbox};
use cgtproxy_tests::session::{mapped_ids, mapped_ids_now};
use cgtproxy_tests::steady::Steady;
use cgtproxy_tests::wait::wait_until;

const CONFIG: &str = r"
version: 1
tproxies:
  mihomo: {port: 7890}
rules:
  - {match: app-tracker, drop: true}
  - {match: '/app\.slice$', tproxy: mihomo}
";

#[test]
fn kills_stops_and_upgrades_leave_no_gap_in_an_owned_table() {
    sandbox(|sb| kill_stop_and_upgrade(sb, "own-table: true"));
}

#[test]
fn kills_stops_and_upgrades_leave_no_gap_in_a_table_of_nobody() {
    sandbox(|sb| kill_stop_and_upgrade(sb, "own-table: false"));
}

/// Puts another file in the place of a program, as package managers do. It behaves the same.
fn replace_program(installed: &Installed<'_>, path: &str) {
    let script = "cp \"$1\" \"$1.new\" && printf ' ' >>\"$1.new\" && mv \"$1.new\" \"$1\"";
    installed.system.run(&["sh", "-ec", script, "sh", path]);
}

/// Whether a process runs the file that is at this path now.
fn runs(installed: &Installed<'_>, pid: &str, path: &str) -> bool {
    let inode = |path: &str| installed.system.run(&["stat", "-L", "-c", "%i", path]);
    inode(&format!("/proc/{pid}/exe")) == inode(path)
}

/// Alice's TPROXY server and agent, an application that goes there, and one that is dropped.
fn alices_desktop(sb: &Sandbox, installed: &Installed<'_>) -> (Server, App, App) {
    let alice = installed.system.alice();
    let mihomo = sb.tproxy("mihomo").uid(alice.uid()).port(7890).start();
    installed.enable(alice, CONFIG);
    let browser = installed.system.desktop_app(alice, "browser");
    let tracker = installed.system.desktop_app(alice, "tracker");
    installed.wait_in_force(alice);
    (mihomo, browser, tracker)
}

fn kill_stop_and_upgrade(sb: &Sandbox, helper: &str) {
    let installed = Installed::boot(sb, helper, |_| ());
    let system = &installed.system;
    let alice = system.alice();
    let (_mihomo, browser, tracker) = alices_desktop(sb, &installed);
    let traffic = Steady::start(sb, &browser);
    let to = sb.destinations();
    let open = to.map(|to| browser.open_tcp(to).expect("the proxy answers"));
    let holds = |what: &str| {
        eprintln!("{what}");
        for (open, to) in open.iter().zip(to) {
            assert_eq!(open.ask(), proxied("mihomo", to), "{what}");
        }
        traffic.assert_proxied("mihomo");
        traffic.assert_none_strayed(sb, &["mihomo"]);
        installed.expect_dropped(&tracker);
    };
    holds("at first");
    let helper = || system.property(HELPER, "MainPID");
    let agent = || system.user_property(alice, AGENT, "MainPID");
    let goes_on = |what: &str, before: [&str; 2]| {
        holds(what);
        for (old, new) in before
            .into_iter()
            .zip([&helper as &dyn Fn() -> String, &agent])
        {
            wait_until("another process has taken its place", || {
                let now = new();
                old.is_empty() || now != old && now != "0"
            });
        }
        installed.wait_in_force(alice);
        holds(what);
        // And it works on.
        let new = system.app_as(alice, &["cgtproxy-exec", "drop"]);
        installed.expect_dropped(&new);
    };

    let before = [helper(), agent()];
    system.run(&["kill", "-KILL", &before[0], &before[1]]);
    goes_on("both killed", [&before[0], &before[1]]);

    let before = helper();
    system.run(&["systemctl", "stop", HELPER]);
    holds("the helper stopped");
    system.run(&["systemctl", "start", HELPER]);
    goes_on("the helper started", [&before, ""]);

    let before = helper();
    replace_program(&installed, "/usr/libexec/cgtproxy-helper");
    assert!(!runs(&installed, &before, "/usr/libexec/cgtproxy-helper"));
    system.run(&["systemctl", "restart", HELPER]);
    goes_on("the helper upgraded", [&before, ""]);
    assert!(runs(&installed, &helper(), "/usr/libexec/cgtproxy-helper"));

    let before = agent();
    replace_program(&installed, "/usr/bin/cgtproxy-agent");
    system.run_as(alice, &["systemctl", "--user", "restart", AGENT]);
    goes_on("the agent upgraded", ["", &before]);
    assert!(runs(&installed, &agent(), "/usr/bin/cgtproxy-agent"));
}

/// The agents that wait have systemd start it over and over, which it would take for a socket that is of no use: with
/// that everything would be removed.
#[test]
fn a_helper_with_a_wrong_configuration_takes_nothing_out_of_force() {
    sandbox(|sb| {
        let installed = Installed::boot(sb, "own-table: true", |_| ());
        let system = &installed.system;
        let alice = system.alice();
        let (_mihomo, browser, tracker) = alices_desktop(sb, &installed);
        let write = |text: &str| {
            let script = "printf '%s\n' \"$1\" >/etc/cgtproxy/helper.yaml";
            system.run(&["sh", "-c", script, "sh", text]);
        };
        write("grace: 5");
        let start = Instant::now();
        let restarted = system.output(&["systemctl", "restart", HELPER]);
        assert!(!restarted.status.success());
        wait_until("it has been tried again", || {
            system.journal(HELPER).matches("helper.yaml:1:1").count() > 1
        });
        // What has to be started 20 times in two seconds systemd gives up.
        assert!(start.elapsed() > Duration::from_secs(2));
        for to in sb.destinations() {
            assert_eq!(browser.udp(to), proxied("mihomo", to));
            assert!(tracker.udp(to).is_dropped());
        }
        // Once it is mended nobody has to do anything else.
        write("own-table: true");
        installed.wait_in_force(alice);
        assert_eq!(system.property(HELPER, "ActiveState"), "active");
    });
}

/// Nor does one that can't do what it has to, as on a kernel that lacks it.
#[test]
fn a_helper_that_can_not_work_takes_nothing_out_of_force() {
    sandbox(|sb| {
        let installed = Installed::boot(sb, "own-table: false", |_| ());
        let system = &installed.system;
        let alice = system.alice();
        let (_mihomo, browser, tracker) = alices_desktop(sb, &installed);
        let directory = format!("/run/systemd/system/{HELPER}.d");
        let script = "mkdir -p \"$1\" && printf '%s\n' '[Service]' \
                      'RestrictAddressFamilies=' 'RestrictAddressFamilies=AF_UNIX' >\"$1/no.conf\" &&
                      systemctl daemon-reload";
        system.run(&["sh", "-ec", script, "sh", &directory]);
        let start = Instant::now();
        let restarted = system.output(&["systemctl", "restart", HELPER]);
        assert!(!restarted.status.success());
        wait_until("it has been tried again", || {
            system.journal(HELPER).matches("netlink socket").count() > 1
        });
        assert!(start.elapsed() > Duration::from_secs(2));
        let status = system.property("cgtproxy-helper.socket", "ActiveState");
        assert_eq!(status, "active");
        for to in sb.destinations() {
            assert_eq!(browser.udp(to), proxied("mihomo", to));
            assert!(tracker.udp(to).is_dropped());
        }
        let script = "rm -r \"$1\" && systemctl daemon-reload";
        system.run(&["sh", "-ec", script, "sh", &directory]);
        installed.wait_in_force(alice);
        assert_eq!(system.property(HELPER, "ActiveState"), "active");
    });
}

/// Nor does one that finds the table to be another's, who runs beside it.
#[test]
fn a_helper_beside_another_one_takes_its_time_to_give_up() {
    sandbox(|sb| {
        let installed = Installed::boot(sb, "own-table: true", |_| ());
        let system = &installed.system;
        let helper = "/usr/libexec/cgtproxy-helper --socket /run/another.sock";
        let run = ["systemd-run", "--quiet", "--unit=another", "sh", "-c"];
        system.run(&[&run[..], &[&format!("exec {helper}")]].concat());
        wait_until("the other one has the table", || sb.has_table());
        let start = Instant::now();
        let started = system.output(&["systemctl", "start", HELPER]);
        assert!(!started.status.success());
        wait_until("it has been tried again", || {
            let journal = system.journal(HELPER);
            journal.matches("belongs to another process").count() > 1
        });
        assert!(start.elapsed() > Duration::from_secs(2));
        system.run(&["systemctl", "stop", "another"]);
        wait_until("it works", || {
            system.property(HELPER, "ActiveState") == "active"
        });
    });
}

#[test]
fn a_user_manager_that_is_started_again_has_its_policy_again() {
    sandbox(|sb| {
        let installed = Installed::boot(sb, "grace-seconds: 1", |_| ());
        let system = &installed.system;
        let (alice, bob) = (system.alice(), system.bob());
        let _alices = sb.tproxy("mihomo").uid(alice.uid()).port(7890).start();
        let _bobs = sb.tproxy("bobs").uid(bob.uid()).port(7892).start();
        installed.enable(alice, CONFIG);
        installed.enable(bob, &CONFIG.replace("7890", "7892"));
        let bobs = installed.system.desktop_app(bob, "browser");
        installed.wait_in_force(bob);
        let traffic = Steady::start(sb, &bobs);
        let manager = format!("user@{}.service", alice.uid());
        let mut known = Vec::new();
        for manner in [
            &["systemctl", "restart"][..],
            &["systemctl", "kill", "--signal=KILL"],
        ] {
            installed.wait_in_force(alice);
            let browser = installed.system.desktop_app(alice, "browser");
            let tracker = installed.system.desktop_app(alice, "tracker");
            installed.wait_in_force(alice);
            installed.expect(&browser, by("mihomo"));
            installed.expect_dropped(&tracker);
            let ids = mapped_ids(sb, alice.uid());
            assert!(ids.iter().all(|id| !known.contains(id)), "{ids:?}");
            known = ids;
            // Its applications go with it.
            system.run(&[manner, &[&manager]].concat());
            drop((browser, tracker));
            if manner.contains(&"kill") {
                // Nobody says goodbye, and nobody comes back.
                wait_until("its policy is gone", || {
                    sb.objects_of(alice.uid()).is_empty()
                });
            }
            traffic.assert_proxied("bobs");
            system.run(&["systemctl", "start", &manager]);
        }
        installed.wait_in_force(alice);
        let browser = installed.system.desktop_app(alice, "browser");
        installed.expect(&browser, by("mihomo"));
        traffic.assert_proxied("bobs");
        traffic.assert_none_strayed(sb, &["bobs"]);
    });
}

#[test]
fn nothing_is_left_of_a_user_who_is_deleted() {
    sandbox(|sb| {
        // Who may use the helper is looked up in the databases that bob vanishes from.
        let allow = "grace-seconds: 1\nallow: {groups: [cgt-alice, cgt-bob]}";
        let installed = Installed::boot(sb, allow, |_| ());
        let system = &installed.system;
        let (alice, bob) = (system.alice(), system.bob());
        let _alices = sb.tproxy("mihomo").uid(alice.uid()).port(7890).start();
        let _bobs = sb.tproxy("bobs").uid(bob.uid()).port(7892).start();
        installed.enable(alice, CONFIG);
        installed.enable(bob, &CONFIG.replace("7890", "7892"));
        let browser = installed.system.desktop_app(alice, "browser");
        let bobs = installed.system.desktop_app(bob, "browser");
        installed.wait_in_force(alice);
        installed.wait_in_force(bob);
        let traffic = Steady::start(sb, &browser);
        installed.expect(&bobs, by("bobs"));

        system.run(&["userdel", "--force", bob.name()]);
        // What runs goes on as it did: it is not the name that has the policy.
        installed.expect(&bobs, by("bobs"));
        let manager = format!("user@{}.service", bob.uid());
        system.run(&["systemctl", "kill", "--signal=KILL", &manager]);
        drop(bobs);
        wait_until("nothing is left of bob", || {
            sb.objects_of(bob.uid()).is_empty()
        });
        assert!(
            !sb.run(&["nft", "list", "ruleset"])
                .contains(&bob.uid().to_string())
        );
        traffic.assert_proxied("mihomo");
        traffic.assert_none_strayed(sb, &["mihomo"]);
        // Who gets the number next begins with nothing.
        system.run(&["useradd", "--uid", &bob.uid().to_string(), "cgt-carol"]);
        let next = system.app_as(bob, &[]);
        installed.expect(&next, direct);
    });
}

/// The next helper knows what the one before it had in force, before any agent is back: another kind of table
/// opens no gap, and what is flushed then is put back.
#[test]
fn a_helper_knows_what_the_one_before_it_had_in_force() {
    sandbox(|sb| {
        let config = "own-table: true\nudp-verdicts: per-conversation\ngrace-seconds: 600";
        let installed = Installed::boot(sb, config, |_| ());
        let system = &installed.system;
        let alice = system.alice();
        let (_mihomo, browser, tracker) = alices_desktop(sb, &installed);
        let to = sb.destinations();
        let open = to.map(|to| browser.open_tcp(to).expect("the proxy answers"));
        let ids = mapped_ids(sb, alice.uid());
        // The agent does not come back for now.
        let agent = system.user_property(alice, AGENT, "MainPID");
        system.run(&["kill", "-STOP", &agent]);
        let holds = |what: &str| {
            assert_eq!(mapped_ids(sb, alice.uid()), ids, "{what}");
            for (open, to) in open.iter().zip(to) {
                assert_eq!(open.ask(), proxied("mihomo", to), "{what}");
            }
            installed.expect(&browser, by("mihomo"));
            installed.expect_dropped(&tracker);
        };
        let traffic = Steady::start(sb, &browser);
        traffic.assert_proxied("mihomo");
        for (key, value) in [
            ("own-table", "false"),
            ("own-table", "true"),
            ("own-table", "false"),
            ("udp-verdicts", "per-datagram"),
        ] {
            let config = "/etc/cgtproxy/helper.yaml";
            let edit = format!("sed -i 's/{key}: .*/{key}: {value}/' {config}");
            system.run(&["sh", "-ec", &edit]);
            if value == "true" {
                let helper = system.property(HELPER, "MainPID");
                system.run(&["kill", "-KILL", &helper]);
                wait_until("another process has taken its place", || {
                    let now = system.property(HELPER, "MainPID");
                    now != helper
                        && now != "0"
                        && system.property(HELPER, "ActiveState") == "active"
                });
            } else {
                system.run(&["systemctl", "restart", HELPER]);
            }
            holds(value);
            traffic.assert_proxied("mihomo");
            traffic.assert_none_strayed(sb, &["mihomo"]);
        }
        drop(traffic);
        sb.nft("flush ruleset");
        wait_until("the table is back", || {
            mapped_ids_now(sb, alice.uid()).is_some()
        });
        holds("flushed before the agent is back");
        system.run(&["kill", "-CONT", &agent]);
        installed.wait_in_force(alice);
        holds("the agent is back");
        let log = system.journal(HELPER);
        assert!(!log.contains("replaced as a whole"), "{log}");
        assert_eq!(system.property(HELPER, "NFileDescriptorStore"), "1");
        system.run(&["systemctl", "stop", "cgtproxy-helper.socket"]);
        assert!(!sb.has_table());
        wait_until("the store is empty", || {
            system.property(HELPER, "NFileDescriptorStore") == "0"
        });
    });
}

/// With a snapshot, the next helper knows what is kept of an agent that is gone, and how to go on from there.
#[test]
fn what_is_kept_of_an_agent_that_is_gone_is_handed_on() {
    sandbox(|sb| {
        let config = "own-table: false\ngrace-seconds: 1";
        let installed = Installed::boot(sb, config, |_| ());
        let system = &installed.system;
        let alice = system.alice();
        let (_mihomo, browser, tracker) = alices_desktop(sb, &installed);
        let agent = system.user_property(alice, AGENT, "MainPID");
        system.run(&["kill", "-STOP", &agent]);
        for time in 1..=2 {
            let steady = Steady::start(sb, &tracker);
            // The agent does not hear that its connection is gone, and does not come back.
            system.run(&["systemctl", "restart", HELPER]);
            wait_until("the grace is over", || {
                let log = system.journal(HELPER);
                log.matches("an agent is gone: what is dropped stays so")
                    .count()
                    == time
            });
            installed.expect(&browser, direct);
            installed.expect_dropped(&tracker);
            steady.assert_nothing_left(sb);
            drop(steady);
            sb.nft("flush ruleset");
            wait_until("the table is back", || sb.has_table());
            installed.expect(&browser, direct);
            installed.expect_dropped(&tracker);
        }
        system.run(&["kill", "-CONT", &agent]);
        installed.wait_in_force(alice);
        installed.expect(&browser, by("mihomo"));
        let log = system.journal(HELPER);
        assert!(!log.contains("replaced as a whole"), "{log}");
    });
}

const SYSTEM_AGENT: &str = "cgtproxy-agent-system.service";

/// Root's, for one service.
const SYSTEM_CONFIG: &str = r"
version: 1
tproxies:
  machine: {port: 7892}
rules:
  - {match: '/system\.slice/web\.service$', tproxy: machine}
";

/// How a snapshot is spoilt, by a script with the file as `$1` and alice's uid as `$2`, and what is said of it.
const SPOILT: [(&str, &str, &str); 5] = [
    (
        "garbage",
        "head -c 4096 /dev/urandom >\"$1\"",
        "is not one that this version wrote; threw it away",
    ),
    (
        "of another version",
        "printf '\\377' | dd of=\"$1\" bs=1 seek=10 conv=notrunc status=none",
        "is not one that this version wrote; threw it away",
    ),
    (
        "for another mask",
        "printf '\\377' | dd of=\"$1\" bs=1 seek=12 conv=notrunc status=none",
        "is for another mark-mask; threw it away",
    ),
    (
        "empty",
        ": >\"$1\"",
        "is not one that this version wrote; threw it away",
    ),
    (
        "of another layout",
        "nft \"delete element inet cgtproxy stamps { $2 }; add element inet cgtproxy stamps { $2 : 0x1 }\"",
        "that of 1 user is not in a snapshot: it is replaced as a whole",
    ),
];

/// Waits for the helper that comes after one that was killed.
fn kill_helper(installed: &Installed<'_>) {
    let system = &installed.system;
    let helper = system.property(HELPER, "MainPID");
    system.run(&["kill", "-KILL", &helper]);
    wait_until("another process has taken its place", || {
        let now = system.property(HELPER, "MainPID");
        now != helper && now != "0" && system.property(HELPER, "ActiveState") == "active"
    });
}

/// What the kernel does not confirm is not believed: nothing changes for packets, and one line says so. What it
/// confirms is root's policy as well as users'.
#[test]
fn a_snapshot_that_does_not_fit_is_thrown_away() {
    sandbox(|sb| {
        let installed = Installed::boot(sb, "own-table: false\ngrace-seconds: 600", |_| ());
        let system = &installed.system;
        let alice = system.alice();
        let _mihomo = sb.tproxy("mihomo").uid(alice.uid()).port(7890).start();
        let _machine = sb.tproxy("machine").uid(0).port(7892).start();
        let write = "printf '%s\n' \"$1\" >/etc/cgtproxy/config.yaml";
        system.run(&["sh", "-c", write, "sh", SYSTEM_CONFIG]);
        system.run(&["systemctl", "enable", "--now", SYSTEM_AGENT]);
        installed.enable(alice, CONFIG);
        let browser = installed.system.desktop_app(alice, "browser");
        let tracker = installed.system.desktop_app(alice, "tracker");
        let unit = ["systemd-run", "--quiet", "--collect", "--pipe", "--wait"];
        let web = system.app(&[&unit[..], &["--unit=web.service"]].concat());
        let in_force = || {
            installed.wait_in_force(alice);
            wait_until("root's agent has its verdict in force", || {
                let status = [
                    "cgtproxy-agent",
                    "--system",
                    "explain",
                    "/system.slice/web.service",
                ];
                let output = system.output(&status);
                String::from_utf8_lossy(&output.stdout).contains("machine")
                    && mapped_ids_now(sb, 0).is_some_and(|ids| !ids.is_empty())
            });
        };
        in_force();
        let to = sb.destinations();
        let open = to.map(|to| browser.open_tcp(to).expect("the proxy answers"));
        let traffic = [Steady::start(sb, &browser), Steady::start(sb, &web)];
        let holds = |what: &str| {
            eprintln!("{what}");
            for (open, to) in open.iter().zip(to) {
                assert_eq!(open.ask(), proxied("mihomo", to), "{what}");
            }
            installed.expect(&browser, by("mihomo"));
            installed.expect(&web, by("machine"));
            installed.expect_dropped(&tracker);
            for (traffic, proxy) in traffic.iter().zip(["mihomo", "machine"]) {
                traffic.assert_proxied(proxy);
                traffic.assert_none_strayed(sb, &[proxy]);
            }
        };
        holds("at first");
        let agents = [
            system.user_property(alice, AGENT, "MainPID"),
            system.property(SYSTEM_AGENT, "MainPID"),
        ];
        let signal = |signal: &str| {
            for agent in &agents {
                system.run(&["kill", signal, agent]);
            }
        };
        let snapshot = "for fd in /proc/1/fd/*; do case $(readlink $fd) in
                        */memfd:cgtproxy-snapshot*|/memfd:cgtproxy-snapshot*) echo $fd;; esac; done";
        let uid = alice.uid().to_string();
        for (what, spoil, said) in SPOILT {
            signal("-STOP");
            let helper = system.property(HELPER, "MainPID");
            // It writes nothing after this.
            system.run(&["kill", "-STOP", &helper]);
            let file = system.run(&["sh", "-c", snapshot]);
            assert_eq!(file.lines().count(), 1, "{file}");
            system.run(&["sh", "-ec", spoil, "sh", file.trim(), &uid]);
            let count = || system.journal(HELPER).matches(said).count();
            let before = count();
            kill_helper(&installed);
            wait_until("it is said", || count() > before);
            holds(what);
            assert_eq!(count(), before + 1, "{what}");
            signal("-CONT");
            in_force();
            holds(&format!("after one that was {what}"));
        }
        // This one is good again, and has root's policy, too.
        signal("-STOP");
        kill_helper(&installed);
        holds("without agents");
        // What is open when others flush is not what this is about.
        for traffic in &traffic {
            traffic.assert_nothing_left(sb);
        }
        let uids = [0, alice.uid()];
        let ids = uids.map(|uid| mapped_ids(sb, uid));
        sb.nft("flush ruleset");
        wait_until("the table is back", || {
            uids.map(|uid| mapped_ids_now(sb, uid)) == ids.each_ref().map(|ids| Some(ids.clone()))
        });
        installed.expect(&browser, by("mihomo"));
        installed.expect(&web, by("machine"));
        installed.expect_dropped(&tracker);
        signal("-CONT");
    });
}

/// A helper that finds the table of an earlier version, which lacks what this one has for each user, makes it anew with
/// all that was in force, and with what it lacked.
#[test]
fn a_table_of_an_earlier_version_is_replaced_with_all_that_was_in_force() {
    sandbox(|sb| {
        let installed = Installed::boot(sb, "own-table: false\ngrace-seconds: 600", |_| ());
        let system = &installed.system;
        let (alice, bob) = (system.alice(), system.bob());
        let _mihomo = sb.tproxy("mihomo").uid(alice.uid()).port(7890).start();
        let hijack = "{port: 7890, dns-hijack: {port: 1053}}";
        installed.enable(alice, &CONFIG.replace("{port: 7890}", hijack));
        let browser = installed.system.desktop_app(alice, "browser");
        let tracker = installed.system.desktop_app(alice, "tracker");
        installed.wait_in_force(alice);
        // The agent does not come back for now.
        let agent = system.user_property(alice, AGENT, "MainPID");
        system.run(&["kill", "-STOP", &agent]);
        let evil = system.cgroup(&format!("{}/app.slice/evil.scope", bob.service()));
        let query = |to: IpAddr| browser.udp(SocketAddr::new(to, 53));
        let bobs = || {
            let server = sb.service("evil").uid(bob.uid()).cgroup(&evil);
            server.port(1053).start()
        };
        let holds = || {
            let evil = bobs();
            installed.expect(&browser, by("mihomo"));
            installed.expect_dropped(&tracker);
            for to in sb.destinations() {
                assert_eq!(query(to.ip()), Outcome::Refused);
            }
            evil.assert_idle();
        };
        holds();
        // Nor does the helper put back what is changed.
        let helper = system.property(HELPER, "MainPID");
        system.run(&["kill", "-STOP", &helper]);
        let chains = sb.chains();
        let version = chains.iter().find(|chain| chain.starts_with("version-"));
        let version = version.expect("the table has a version");
        let receive = format!("receive-{}-mihomo", alice.uid());
        assert!(chains.contains(&receive));
        sb.nft(&format!(
            "flush chain inet cgtproxy input; flush map inet cgtproxy receive; \
             delete chain inet cgtproxy {receive}; \
             delete chain inet cgtproxy {version}; add chain inet cgtproxy version-9-ff000000"
        ));
        // As that one had it.
        let evil = bobs();
        assert!(matches!(query(sb.fresh_v4()), Outcome::Local { .. }));
        drop(evil);
        system.run(&["kill", "-KILL", &helper]);
        wait_until("another process has taken its place", || {
            let now = system.property(HELPER, "MainPID");
            now != helper && now != "0" && system.property(HELPER, "ActiveState") == "active"
        });
        holds();
        assert!(sb.chains().contains(&receive));
        let log = system.journal(HELPER);
        assert!(!log.contains("replaced as a whole"), "{log}");
        system.run(&["kill", "-CONT", &agent]);
        installed.wait_in_force(alice);
    });
}
