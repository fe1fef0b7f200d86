//! The project installed in a whole system, set up as its README says and used as users use it.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a panic is a failed test"
)]

mod accounts;
mod commands;
mod confinement;

use std::os::unix::process::ExitStatusExt;
use std::process::Output;

use cgtproxy_tests::installed::{AGENT, HELPER, Installed};
use cgtproxy_tests::sandbox::{by, direct, proxied, sandbox};
use cgtproxy_tests::steady::Steady;
use cgtproxy_tests::system::{System, SystemUser};
use cgtproxy_tests::wait::wait_until;
use serde_json::Value;

/// What it is, the process id that it changes, and how to bring it about.
type Disruption<'a> = (&'a str, &'a dyn Fn() -> String, &'a dyn Fn());

const CONFIG: &str = r"
version: 1
tproxies:
  mihomo: {port: 7890}
  other: {port: 7891}
rules:
  - {match: app-game, direct: true}
  - {match: app-tracker, drop: true}
  - {match: '/app\.slice$', tproxy: mihomo}
";

/// What cgtproxy-exec returns when it does not run the command.
const NOT_RUN: i32 = 125;

/// Waits until a control group of the user's, by its unit's name, has that target in the kernel.
#[track_caller]
fn wait_for_target(system: &System, user: &SystemUser, unit: &str, target: &str) {
    wait_until(&format!("{target} for {unit}"), || {
        let json = system.run_as(user, &["cgtproxy-agent", "explain", "--json", unit]);
        let group = &serde_json::from_str::<Value>(&json).expect("JSON")["controlGroup"];
        group["target"] == target && group["inForce"] == true
    });
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Insists that a command was not run, with its file left as the proof.
#[track_caller]
fn assert_not_run(system: &System, output: &Output, why: &str) {
    assert_eq!(output.status.code(), Some(NOT_RUN), "{output:?}");
    let said = text(&output.stderr);
    assert!(
        said.starts_with("cgtproxy-exec: ") && said.contains(why),
        "{said}"
    );
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(
        !system
            .output(&["test", "-e", "/tmp/was-run"])
            .status
            .success()
    );
}

#[test]
fn users_set_it_up_and_have_their_applications_and_commands_routed() {
    sandbox(|sb| {
        let installed = Installed::boot(sb, "", |_| ());
        let system = &installed.system;
        let (alice, bob) = (system.alice(), system.bob());
        let mihomo = sb.tproxy("mihomo").uid(alice.uid()).port(7890).start();
        let _other = sb.tproxy("other").uid(alice.uid()).port(7891).start();
        let bobs = sb.tproxy("bobs").uid(bob.uid()).port(7892).start();
        installed.enable(alice, CONFIG);

        // Applications of the desktop.
        sb.expect(&system.desktop_app(alice, "browser"), by("mihomo"));
        let (game, tracker) = ["game", "tracker"]
            .map(|name| system.desktop_app(alice, name))
            .into();
        installed.wait_in_force(alice);
        sb.expect(&game, direct);
        sb.expect_all_dropped(&tracker);

        // Commands under a target, from a shell in a login session. No waiting here: when the
        // command runs, its target is in force.
        let run = |target: &str| system.app_as(alice, &["cgtproxy-exec", target]);
        sb.expect(&system.app_as(alice, &[]), direct);
        sb.expect(&run("direct"), direct);
        sb.expect(&run("mihomo"), by("mihomo"));
        sb.expect(&run("other"), by("other"));
        sb.expect(&run("proxy"), by("mihomo"));
        sb.expect_all_dropped(&run("drop"));

        commands_are_what_they_would_be_without(system);

        // Without an agent, nothing is run.
        let touch = ["touch", "/tmp/was-run"];
        let output = system.output_as(bob, &[&["cgtproxy-exec", "direct"], &touch[..]].concat());
        assert_not_run(
            system,
            &output,
            "cgtproxy-agent is not running; start it with 'systemctl --user",
        );
        sb.expect(&system.desktop_app(bob, "browser"), direct);

        // Another user, with the same names and another proxy.
        installed.enable(bob, &CONFIG.replace("7890", "7892"));
        sb.expect(&system.desktop_app(bob, "browser"), by("bobs"));
        sb.expect(&system.app_as(bob, &["cgtproxy-exec", "proxy"]), by("bobs"));
        sb.expect_all_dropped(&system.app_as(bob, &["cgtproxy-exec", "drop"]));
        let before = (mihomo.arrivals().len(), bobs.arrivals().len());
        system.run_as(
            bob,
            &["systemctl", "--user", "disable", "--now", "cgtproxy-agent"],
        );
        sb.expect(&system.desktop_app(bob, "browser"), direct);
        assert_eq!((mihomo.arrivals().len(), bobs.arrivals().len()), before);
        sb.expect(&run("proxy"), by("mihomo"));
        sb.expect_all_dropped(&tracker);
    });
}

/// What a shell sees of a command under a target.
fn commands_are_what_they_would_be_without(system: &System) {
    let alice = system.alice();
    let output = |script: &str| system.output_as(alice, &["sh", "-c", script]);
    let prints = |script: &str| {
        let output = output(script);
        assert!(output.status.success(), "{script}: {output:?}");
        assert_eq!(text(&output.stderr), "", "{script}");
        text(&output.stdout)
    };
    assert_eq!(
        output("cgtproxy-exec direct sh -c 'exit 7'").status.code(),
        Some(7)
    );
    let killed = output("exec cgtproxy-exec direct sh -c 'kill -KILL $$'");
    assert_eq!(killed.status.signal(), Some(9), "{killed:?}");
    assert_eq!(
        prints("cgtproxy-exec proxy printf '[%s]' 'a b' '' '*' -- --help '$HOME'"),
        "[a b][][*][--][--help][$HOME]"
    );
    assert_eq!(
        prints("cd /usr/share && cgtproxy-exec drop pwd"),
        "/usr/share\n"
    );
    assert_eq!(
        prints("A='1 2' cgtproxy-exec drop sh -c 'echo \"$A\"'"),
        "1 2\n"
    );
    assert_eq!(prints("echo in | cgtproxy-exec drop cat"), "in\n");
    let cgroup = prints("cgtproxy-exec other grep ^0: /proc/self/cgroup");
    let slice = format!(
        "0::{}/cgtproxy.slice/cgtproxy-other.slice/",
        alice.service()
    );
    assert!(cgroup.starts_with(&slice), "{cgroup}");
    assert_eq!(
        prints("cgtproxy-exec --list"),
        "direct\ndrop\nproxy\nmihomo\nother\n"
    );

    let unknown = output("cgtproxy-exec nobody touch /tmp/was-run");
    assert_not_run(
        system,
        &unknown,
        "there is no target 'nobody'; known: direct, drop, proxy, mihomo, other",
    );
    let missing = output("cgtproxy-exec direct /no/such/command");
    assert_eq!(missing.status.code(), Some(127));
    assert!(
        text(&missing.stderr).contains("/no/such/command"),
        "{missing:?}"
    );
    let no_program = output("cgtproxy-exec direct /etc/passwd");
    assert_eq!(no_program.status.code(), Some(126));
}

#[test]
fn restarts_kills_and_edits_in_the_middle_of_traffic_leave_no_gap() {
    sandbox(|sb| {
        let installed = Installed::boot(sb, "", |_| ());
        let system = &installed.system;
        let alice = system.alice();
        let _mihomo = sb.tproxy("mihomo").uid(alice.uid()).port(7890).start();
        let _other = sb.tproxy("other").uid(alice.uid()).port(7891).start();
        installed.enable(alice, CONFIG);
        let browser = system.desktop_app(alice, "browser");
        let command = system.app_as(alice, &["cgtproxy-exec", "proxy"]);
        let tracker = system.desktop_app(alice, "tracker");
        let dropped = system.app_as(alice, &["cgtproxy-exec", "drop"]);
        installed.wait_in_force(alice);
        let traffic = [&browser, &command].map(|app| Steady::start(sb, app));
        let to = sb.destinations();
        let open = to.map(|to| browser.open_tcp(to).expect("the proxy answers"));

        let holds = |what: &str, proxy: &str| {
            eprintln!("{what}");
            for (open, to) in open.iter().zip(to) {
                assert_eq!(open.ask(), proxied("mihomo", to), "{what}");
            }
            for traffic in &traffic {
                traffic.assert_proxied(proxy);
                traffic.assert_none_strayed(sb, &["mihomo", "other"]);
            }
            sb.expect_all_dropped(&tracker);
            sb.expect_all_dropped(&dropped);
        };
        holds("at first", "mihomo");
        let on_system = |command: &[&str]| system.run(command);
        let by_alice = |command: &[&str]| system.run_as(alice, command);
        let helper = || system.property(HELPER, "MainPID");
        let agent = || system.user_property(alice, AGENT, "MainPID");
        let disruptions: [Disruption<'_>; 4] = [
            ("the helper restarted", &helper, &|| {
                on_system(&["systemctl", "restart", HELPER]);
            }),
            ("the helper killed", &helper, &|| {
                on_system(&["systemctl", "kill", "--signal=KILL", HELPER]);
            }),
            ("the agent restarted", &agent, &|| {
                by_alice(&["systemctl", "--user", "restart", AGENT]);
            }),
            ("the agent killed", &agent, &|| {
                by_alice(&["systemctl", "--user", "kill", "--signal=KILL", AGENT]);
            }),
        ];
        for (what, pid, disrupt) in disruptions {
            let before = pid();
            disrupt();
            holds(what, "mihomo");
            wait_until("another process has taken its place", || {
                let now = pid();
                now != before && now != "0"
            });
            installed.wait_in_force(alice);
            holds(what, "mihomo");
            // And it works on.
            let new = system.app_as(alice, &["cgtproxy-exec", "drop"]);
            sb.expect_all_dropped(&new);
        }
        // Oftener than the service manager starts a service by default.
        let kill_often = format!(
            "while [ $(systemctl --user show --value --property=NRestarts {AGENT}) -lt 25 ]; do
                systemctl --user --quiet is-failed {AGENT} && exit
                systemctl --user --quiet kill --signal=KILL {AGENT}
            done"
        );
        by_alice(&["sh", "-c", &kill_often]);
        installed.wait_in_force(alice);
        holds("the agent killed again and again", "mihomo");
        // The file edited: what is open goes on, what is new follows. (From here on to new
        // destinations, since a UDP socket may get a port that an earlier one had, and with it,
        // for the kernel, that one's connection.)
        let holds = |proxy: &str| {
            sb.expect(&browser, by(proxy));
            sb.expect(&command, by("mihomo"));
            sb.expect_all_dropped(&tracker);
            sb.expect_all_dropped(&dropped);
            for (open, to) in open.iter().zip(to) {
                assert_eq!(open.ask(), proxied("mihomo", to));
            }
            for traffic in &traffic {
                traffic.assert_none_strayed(sb, &["mihomo", "other"]);
            }
        };
        let other = CONFIG.replace("$', tproxy: mihomo", "$', tproxy: other");
        system.write_config(alice, &other);
        wait_for_target(system, alice, "app.slice", "other");
        holds("other");
        // The file broken: said in the journal, and nothing changes.
        system.write_config(alice, "version: 1\nrules: {}\n");
        wait_until("the agent says so", || {
            system.agent_status(Some(alice))["configError"].is_string()
        });
        let journal = system.user_journal(alice, AGENT);
        assert!(
            journal.contains("/.config/cgtproxy/config.yaml:2:"),
            "{journal}"
        );
        holds("other");
        // And mended, by an explicit reload.
        system.write_config(alice, CONFIG);
        by_alice(&["systemctl", "--user", "reload", AGENT]);
        wait_for_target(system, alice, "app.slice", "mihomo");
        holds("mihomo");
        assert_eq!(system.user_property(alice, AGENT, "ActiveState"), "active");
    });
}

/// Its start ends without success when it has taken long enough, and the unit goes on starting.
#[test]
fn an_agent_waits_for_a_configuration_that_is_broken_when_it_starts() {
    sandbox(|sb| {
        let installed = Installed::boot(sb, "", |_| ());
        let system = &installed.system;
        let alice = system.alice();
        let _mihomo = sb.tproxy("mihomo").uid(alice.uid()).port(7890).start();
        system.write_config(alice, "version: 1\nruls: []\n");
        let start = ["systemctl", "--user", "enable", "--now", AGENT];
        let started = system.output_as(alice, &start);
        assert!(!started.status.success(), "{started:?}");
        let property = |name: &str| system.user_property(alice, AGENT, name);
        let is = |state: &str| {
            assert_eq!(property("ActiveState"), state);
            assert_eq!(property("NRestarts"), "0");
            property("MainPID")
        };
        let process = is("activating");
        // It is said in every place in which one looks.
        let sentence = "config.yaml:2:1: unknown key 'ruls'";
        assert!(property("StatusText").contains(sentence));
        let journal = system.user_journal(alice, AGENT);
        assert_eq!(journal.matches(sentence).count(), 1, "{journal}");
        assert!(journal.contains("timed out"), "{journal}");
        let shown = system.run_as(alice, &["cgtproxy-agent", "status"]);
        assert!(shown.contains(sentence), "{shown}");
        let command = ["cgtproxy-exec", "mihomo", "sh", "-c", "echo ran"];
        let refused = system.output_as(alice, &command);
        assert_eq!(refused.status.code(), Some(NOT_RUN));
        assert_eq!(text(&refused.stdout), "");
        assert!(text(&refused.stderr).contains(sentence), "{refused:?}");

        system.write_config(alice, CONFIG);
        wait_until("it is ready", || property("ActiveState") == "active");
        assert_eq!(is("active"), process);
        sb.expect(&system.desktop_app(alice, "browser"), by("mihomo"));
        // And stopped while it waits.
        system.write_config(alice, "version: 1\nruls: []\n");
        let user = |verb| ["systemctl", "--user", verb, "--no-block", AGENT];
        system.run_as(alice, &user("restart"));
        wait_until("it waits again", || {
            property("StatusText").contains(sentence)
        });
        system.run_as(alice, &["systemctl", "--user", "stop", AGENT]);
        is("inactive");
    });
}

/// Starts a service under a user whom its service manager makes up, and who is known only to those who ask it: as with
/// all services that know users, over a socket in /run/systemd/userdb.
fn start_made_up(installed: &Installed<'_>) {
    // With this type it is known when the unit has started.
    let by = [
        "systemd-run",
        "--quiet",
        "--unit=made-up",
        "--service-type=exec",
    ];
    let user = ["--property=DynamicUser=yes", "--property=User=made-up"];
    let (sleep, config) = (["sleep", "infinity"], "proxy-users: [made-up]");
    installed.system.run(&[&by[..], &user, &sleep].concat());
    installed.configure_helper(config);
}
