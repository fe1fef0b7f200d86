//! The project installed in a whole system, set up as its README says and used as users use it.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a panic is a failed test"
)]

use std::os::unix::process::ExitStatusExt;
use std::process::Output;

use cgtproxy_tests::confinement::{Tried, assert_confined, assert_users_confined, mounts};
use cgtproxy_tests::sandbox::{Sandbox, by, direct, proxied, sandbox};
use cgtproxy_tests::steady::Steady;
use cgtproxy_tests::system::{System, SystemUser};
use cgtproxy_tests::wait::{wait_for, wait_until};
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
const HELPER: &str = "cgtproxy-helper.service";
const AGENT: &str = "cgtproxy-agent.service";
/// What cgtproxy-exec returns when it does not run the command.
const NOT_RUN: i32 = 125;

/// System calls that take the place of others on 32-bit machines or with other C libraries.
const TWINS: [&str; 6] = [
    "fstat",
    "fstat64",
    "fstatat64",
    "fstatfs64",
    "fcntl64",
    "timerfd_settime64",
];

/// Prints the helper's answer to a call that is so long that what it is read into has to grow a good deal.
const LONG_CALL: &str = r#"
my $helper = IO::Socket::UNIX->new("/run/cgtproxy/helper.sock") or die "connect: $!";
print $helper '{"method": "org.varlink.service.GetInfo", "x": "', "x" x 1000000, "\"}\0";
$helper->flush;
$/ = "\0";
print scalar <$helper>;
"#;

/// As the README says: what the administrator does.
fn boot(sb: &Sandbox) -> System {
    let system = System::builder(sb).install_project().boot();
    system.run(&["systemctl", "enable", "--now", "cgtproxy-helper.socket"]);
    system
}

/// As the README says: what a user does.
fn enable(system: &System, user: &SystemUser, config: &str) {
    write_config(system, user, config);
    system.run_as(
        user,
        &["systemctl", "--user", "enable", "--now", "cgtproxy-agent"],
    );
}

fn write_config(system: &System, user: &SystemUser, config: &str) {
    let script = "mkdir -p ~/.config/cgtproxy && cd ~/.config/cgtproxy &&
                  printf %s \"$1\" > new && mv new config.yaml";
    system.run_as(user, &["sh", "-c", script, "sh", config]);
}

fn status(system: &System, user: &SystemUser) -> Value {
    let json = system.run_as(user, &["cgtproxy-agent", "status", "--json"]);
    serde_json::from_str(&json).expect("JSON")
}

/// Waits until the user's agent has the helper's word that everything is in the kernel.
#[track_caller]
fn wait_in_force(system: &System, user: &SystemUser) {
    wait_until("everything is in force", || {
        let output = system.output_as(user, &["cgtproxy-agent", "status", "--json"]);
        // None yet, if the agent is about to start again.
        let status: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let groups = status["controlGroups"].as_array();
        status["connected"] == true
            && groups.is_some_and(|all| all.iter().all(|group| group["inForce"] == true))
    });
}

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
        let system = boot(sb);
        let (alice, bob) = (system.alice(), system.bob());
        let mihomo = sb.tproxy("mihomo").uid(alice.uid()).port(7890).start();
        let _other = sb.tproxy("other").uid(alice.uid()).port(7891).start();
        let bobs = sb.tproxy("bobs").uid(bob.uid()).port(7892).start();
        enable(&system, alice, CONFIG);

        // Applications of the desktop.
        sb.expect(&system.desktop_app(alice, "browser"), by("mihomo"));
        let (game, tracker) = ["game", "tracker"]
            .map(|name| system.desktop_app(alice, name))
            .into();
        wait_in_force(&system, alice);
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

        commands_are_what_they_would_be_without(&system);

        // Without an agent, nothing is run.
        let touch = ["touch", "/tmp/was-run"];
        let output = system.output_as(bob, &[&["cgtproxy-exec", "direct"], &touch[..]].concat());
        assert_not_run(
            &system,
            &output,
            "cgtproxy-agent is not running; start it with 'systemctl --user",
        );
        sb.expect(&system.desktop_app(bob, "browser"), direct);

        // Another user, with the same names and another proxy.
        enable(&system, bob, &CONFIG.replace("7890", "7892"));
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

/// A program that runs already is moved by the user's service manager, and what it begins then goes where it is to.
#[test]
fn a_process_that_runs_is_moved_to_another_target() {
    sandbox(|sb| {
        let system = boot(sb);
        let alice = system.alice();
        let _mihomo = sb.tproxy("mihomo").uid(alice.uid()).port(7890).start();
        enable(&system, alice, CONFIG);
        let game = system.desktop_app(alice, "game");
        wait_for_target(&system, alice, "app-game.service", "direct");
        sb.expect(&game, direct);
        let pid = system.user_property(alice, "app-game.service", "MainPID");
        let cgroup = || system.run(&["grep", "^0:", &format!("/proc/{pid}/cgroup")]);
        let to = |target: &str| {
            let by = ["cgtproxy-exec", "--pid", &pid, target];
            let output = system.output_as(alice, &by);
            assert!(output.status.success(), "{target}: {output:?}");
            let slice = format!("/cgtproxy.slice/cgtproxy-{target}.slice/");
            assert!(cgroup().contains(&slice), "{}", cgroup());
        };
        // It is in the kernel when the command returns.
        to("mihomo");
        sb.expect(&game, by("mihomo"));
        let open = sb.destinations().map(|to| (game.open_udp(to), to));
        to("drop");
        sb.expect_all_dropped(&game);
        // A socket stays where it was made.
        for (open, to) in open {
            assert_eq!(open.ask(), proxied("mihomo", to));
        }
        to("direct");
        sb.expect(&game, direct);
        // Its standard output is a Unix socket of the journal's.
        let quiet = ["systemd-run", "--user", "--unit=quiet", "sleep", "infinity"];
        system.run_as(alice, &quiet);
        let quiet = system.user_property(alice, "quiet.service", "MainPID");
        let by = ["cgtproxy-exec", "--pid", &quiet, "drop"];
        let output = system.output_as(alice, &by);
        assert!(
            output.status.success() && output.stderr.is_empty(),
            "{output:?}"
        );
        // Nobody moves what is another user's.
        let bob = system.bob();
        enable(&system, bob, "version: 1\nrules: []\n");
        let before = cgroup();
        let refused = system.output_as(bob, &["cgtproxy-exec", "--pid", &pid, "drop"]);
        assert_eq!(refused.status.code(), Some(NOT_RUN), "{refused:?}");
        assert_eq!(cgroup(), before);
        sb.expect(&game, direct);
    });
}

/// To systemd, the numbers of processes in another PID namespace, as sandboxes make them, are those of other processes.
#[test]
fn a_command_in_a_pid_namespace_is_moved_and_nobody_else_is() {
    sandbox(|sb| {
        let system = boot(sb);
        let alice = system.alice();
        enable(&system, alice, CONFIG);
        let _browser = system.desktop_app(alice, "browser");
        wait_in_force(&system, alice);
        let other = system.user_property(alice, "app-browser.service", "MainPID");
        let cgroup = || system.run(&["grep", "^0:", &format!("/proc/{other}/cgroup")]);
        let before = cgroup();
        // One process after the other, until there is one with that number.
        let inside = |arguments: &[&str]| {
            let script = "pid=$1; shift; i=1; while [ $i -lt $pid ]; do i=$((i+1)); \
                          sh -c 'test $$ -eq $0 || exit 0; exec cgtproxy-exec \"$@\"' $pid \"$@\"; \
                          status=$?; done; exit $status";
            let namespace = ["unshare", "-U", "--map-current-user", "-p", "-f"];
            let shell = ["sh", "-c", script, "sh", &other];
            let output = system.output_as(alice, &[&namespace[..], &shell, arguments].concat());
            assert_eq!(cgroup(), before, "{output:?}");
            output
        };
        let shown = ["grep", "^0:", "/proc/self/cgroup"];
        for options in [&[][..], &["--no-wait"]] {
            let output = inside(&[options, &["drop"], &shown].concat());
            assert!(output.status.success(), "{output:?}");
            let said = text(&output.stdout);
            assert!(
                said.contains("/cgtproxy-drop.slice/cgtproxy-exec-grep-"),
                "{output:?}"
            );
        }
        let output = inside(&["--no-wait", "--pid", &other, "drop"]);
        assert_not_run(&system, &output, "from within a PID namespace");
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
        let system = boot(sb);
        let alice = system.alice();
        let _mihomo = sb.tproxy("mihomo").uid(alice.uid()).port(7890).start();
        let _other = sb.tproxy("other").uid(alice.uid()).port(7891).start();
        enable(&system, alice, CONFIG);
        let browser = system.desktop_app(alice, "browser");
        let command = system.app_as(alice, &["cgtproxy-exec", "proxy"]);
        let tracker = system.desktop_app(alice, "tracker");
        let dropped = system.app_as(alice, &["cgtproxy-exec", "drop"]);
        wait_in_force(&system, alice);
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
            wait_in_force(&system, alice);
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
        wait_in_force(&system, alice);
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
        write_config(&system, alice, &other);
        wait_for_target(&system, alice, "app.slice", "other");
        holds("other");
        // The file broken: said in the journal, and nothing changes.
        write_config(&system, alice, "version: 1\nrules: {}\n");
        wait_until("the agent says so", || {
            status(&system, alice)["configError"].is_string()
        });
        let journal = system.user_journal(alice, AGENT);
        assert!(
            journal.contains("/.config/cgtproxy/config.yaml:2:"),
            "{journal}"
        );
        holds("other");
        // And mended, by an explicit reload.
        write_config(&system, alice, CONFIG);
        by_alice(&["systemctl", "--user", "reload", AGENT]);
        wait_for_target(&system, alice, "app.slice", "mihomo");
        holds("mihomo");
        assert_eq!(system.user_property(alice, AGENT, "ActiveState"), "active");
    });
}

#[test]
fn a_command_needs_the_users_bus_and_no_other() {
    sandbox(|sb| {
        let system = boot(sb);
        let alice = system.alice();
        enable(&system, alice, CONFIG);
        wait_in_force(&system, alice);
        // A variable of another session's.
        let elsewhere = ["env", "DBUS_SESSION_BUS_ADDRESS=unix:path=/nonexistent"];
        let dropped = [&elsewhere[..], &["cgtproxy-exec", "drop"]].concat();
        sb.expect_all_dropped(&system.app_as(alice, &dropped));
        let bus = |verb| {
            let command = ["systemctl", "--user", verb, "dbus.socket", "dbus.service"];
            system.run_as(alice, &command);
        };
        bus("stop");
        let echo = ["cgtproxy-exec", "drop", "echo", "ran"];
        let refused = system.output_as(alice, &echo);
        assert_eq!(refused.status.code(), Some(NOT_RUN), "{refused:?}");
        assert_eq!(text(&refused.stdout), "");
        let why = text(&refused.stderr);
        assert!(
            why.contains("can't reach your systemd user manager"),
            "{why}"
        );
        assert!(why.contains("/bus: ") && why.lines().count() == 1, "{why}");
        bus("start");
        assert_eq!(system.run_as(alice, &echo), "ran\n");
    });
}

/// Its start ends without success when it has taken long enough, and the unit goes on starting.
#[test]
fn an_agent_waits_for_a_configuration_that_is_broken_when_it_starts() {
    sandbox(|sb| {
        let system = boot(sb);
        let alice = system.alice();
        let _mihomo = sb.tproxy("mihomo").uid(alice.uid()).port(7890).start();
        write_config(&system, alice, "version: 1\nruls: []\n");
        let start = ["systemctl", "--user", "enable", "--now", "cgtproxy-agent"];
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

        write_config(&system, alice, CONFIG);
        wait_until("it is ready", || property("ActiveState") == "active");
        assert_eq!(is("active"), process);
        sb.expect(&system.desktop_app(alice, "browser"), by("mihomo"));
        // And stopped while it waits.
        write_config(&system, alice, "version: 1\nruls: []\n");
        let user = |verb| ["systemctl", "--user", verb, "--no-block", AGENT];
        system.run_as(alice, &user("restart"));
        wait_until("it waits again", || {
            property("StatusText").contains(sentence)
        });
        system.run_as(alice, &["systemctl", "--user", "stop", AGENT]);
        is("inactive");
    });
}

/// What the helper's unit says of families of addresses, tried by root with all capabilities: of itself the helper tries
/// no other.
fn no_socket_but_local_ones_and_netlink(system: &System) {
    // UNIX and netlink; IPv4, IPv6, packets, Bluetooth, the kernel's cryptography, virtual machines.
    let families = ["1", "16", "2", "10", "17", "31", "38", "40"];
    let script = "for (@ARGV) { print socket(my $s, $_, SOCK_RAW, 0) ? 'made' : $!{EAFNOSUPPORT} ? 'no' : 'other', ' ' }";
    let tried = |restriction: &[&str]| {
        let run = ["systemd-run", "--quiet", "--collect", "--pipe", "--wait"];
        let perl = ["perl", "-MSocket", "-MErrno", "-e", script];
        system.run(&[&run, restriction, &perl, &families].concat())
    };
    let of_unit = system.property(HELPER, "RestrictAddressFamilies");
    let restriction = format!("--property=RestrictAddressFamilies={of_unit}");
    assert_eq!(tried(&[&restriction]), "made made no no no no no no ");
    // Without it, the kernel knows the first five at least.
    let without = tried(&[]);
    assert!(
        without.split(' ').take(5).all(|said| said != "no"),
        "{without}"
    );
}

/// All that there is below a directory of the helper's own root, which is to be nothing else than this.
#[track_caller]
fn nothing_else_in(system: &System, pid: &str, directory: &str, known: &[&str]) {
    // Not all of them are there on every machine.
    let there = system.output(&["ls", "-A", &format!("/proc/{pid}/root{directory}")]);
    let there = text(&there.stdout);
    for name in there.split_whitespace() {
        assert!(known.contains(&name), "{directory} has {name}: {there}");
    }
}

/// What the helper sees of the file system, and what becomes of what it does not do.
fn sees_nothing_it_does_not_use(system: &System) {
    let pid = system.property(HELPER, "MainPID");
    // What the unit binds, what the service manager puts there by itself, and where these are.
    let roots = [
        "usr", "lib", "lib64", "etc", "sys", "dev", "proc", "root", "run", "tmp", "var",
    ];
    nothing_else_in(system, &pid, "", &roots);
    nothing_else_in(system, &pid, "/var", &["tmp", "lib"]);
    nothing_else_in(system, &pid, "/var/lib", &["sss"]);
    let run = [
        "cgtproxy-helper",
        "systemd",
        "userdb",
        "host",
        "nslcd",
        "samba",
    ];
    nothing_else_in(system, &pid, "/run", &run);
    // What follows is newer systemd's: which distribution this is, and where it is told that a service is ready.
    let host = ["userdb", "os-release", ".os-release-stage", "notify"];
    nothing_else_in(system, &pid, "/run/host", &host);
    nothing_else_in(
        system,
        &pid,
        "/run/systemd",
        &["incoming", "notify", "userdb", "journal"],
    );
    // Newer systemd lets it log.
    let log = ["dev-log", "socket", "stdout"];
    nothing_else_in(system, &pid, "/run/systemd/journal", &log);
    for empty in ["/root", "/tmp", "/var/tmp"] {
        nothing_else_in(system, &pid, empty, &[]);
    }
    let mounts = mounts(system, &pid);
    for bound in ["/usr", "/etc", "/sys/fs/cgroup"] {
        assert_eq!(mounts.get(bound), Some(&true), "{bound}: {mounts:?}");
    }

    let free = Tried::by_root(system);
    for what in [
        "memory",
        "socket:2",
        "unshare:user",
        "open:/proc/cpuinfo",
        "create:/",
    ] {
        assert_eq!(free.of(what), "ok", "{what}");
    }
    // Its own directory is its root as well, and has a /run for what is bound there.
    let tried = assert_confined(system, HELPER, &["/run"]);
    assert_eq!(tried.of("open:/etc/shadow"), "EACCES");
    // Neither other processes nor what is no process's.
    for what in ["open:/proc/1/stat", "open:/proc/cpuinfo"] {
        assert_eq!(tried.of(what), "ENOENT", "{what}");
    }
}

/// What becomes of what a user's daemons do not do.
fn users_daemons_can_do_nothing_else(system: &System, user: &SystemUser) {
    let free = Tried::by_user(system, user);
    for what in ["memory", "socket:2", "socket:10", "unshare:user"] {
        assert_eq!(free.of(what), "ok", "{what}");
    }
    assert_ne!(free.of("socket:17"), "EAFNOSUPPORT");
    assert_users_confined(system, user, AGENT, false);
    assert_users_confined(system, user, "cgtproxy-relay.service", true);
}

#[test]
fn the_daemons_are_confined_and_clean_up_after_themselves() {
    sandbox(|sb| {
        let system = boot(sb);
        let alice = system.alice();
        let _mihomo = sb.tproxy("mihomo").uid(alice.uid()).port(7890).start();
        assert!(
            !sb.has_table(),
            "a helper that nobody has asked for anything does not run"
        );
        enable(&system, alice, CONFIG);
        let browser = system.desktop_app(alice, "browser");
        sb.expect(&browser, by("mihomo"));

        let of = |pid: String| {
            let status = system.run(&["cat", &format!("/proc/{pid}/status")]);
            move |name: &str| {
                let line = status
                    .lines()
                    .find_map(|l| l.strip_prefix(name)?.strip_prefix(":\t"));
                line.unwrap_or_else(|| panic!("no {name}: {status}"))
                    .to_owned()
            }
        };
        let helper = of(system.property(HELPER, "MainPID"));
        assert!(
            helper("Uid").split('\t').all(|uid| uid != "0"),
            "{}",
            helper("Uid")
        );
        assert!(
            helper("Gid").split('\t').all(|gid| gid != "0"),
            "{}",
            helper("Gid")
        );
        let net_admin = "0000000000001000";
        for set in ["CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(helper(set), net_admin, "{set}");
        }
        let agent = of(system.user_property(alice, AGENT, "MainPID"));
        for set in ["CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(agent(set), "0000000000000000", "{set}");
        }
        assert_eq!(agent("Uid"), vec![alice.uid().to_string(); 4].join("\t"));
        for daemon in [&helper as &dyn Fn(&str) -> String, &agent] {
            assert_eq!(daemon("NoNewPrivs"), "1");
            assert_eq!(daemon("Seccomp"), "2");
        }
        users_daemons_can_do_nothing_else(&system, alice);
        // Their sandboxes let them have short slices, by which they go before programs that compute.
        for pid in [
            system.property(HELPER, "MainPID"),
            system.user_property(alice, AGENT, "MainPID"),
        ] {
            let sched = system.run(&["cat", &format!("/proc/{pid}/sched")]);
            let slice = sched.lines().find_map(|l| l.strip_prefix("se.slice"));
            let slice = slice.and_then(|l| l.trim_start_matches([' ', ':']).parse().ok());
            assert_eq!(slice, Some(100_000), "{sched}");
        }
        let analysis = system.run(&["systemd-analyze", "security", "--no-pager", HELPER]);
        let verdict = analysis.lines().last().expect("a verdict");
        let exposure = verdict
            .split_whitespace()
            .find_map(|word| word.parse::<f64>().ok());
        assert!(
            exposure.is_some_and(|exposure| exposure <= 1.4),
            "{analysis}"
        );
        no_socket_but_local_ones_and_netlink(&system);
        sees_nothing_it_does_not_use(&system);
        let mode = system.run(&["stat", "-c", "%a", "/run/cgtproxy/helper.sock"]);
        assert_eq!(mode.trim(), "666");

        for round in 0..2 {
            assert!(sb.has_table());
            assert_eq!(sb.mark_rules(4).len() + sb.mark_rules(6).len(), 2);
            let table = sb.mark_rules(4)[0].table.clone();
            assert!(!sb.routes(4, &table).is_empty() && !sb.routes(6, &table).is_empty());
            system.run(&["systemctl", "stop", "cgtproxy-helper.socket"]);
            assert!(!sb.has_table(), "round {round}");
            for family in [4, 6] {
                assert_eq!(sb.mark_rules(family), [], "round {round}");
                assert_eq!(
                    sb.routes(family, &table),
                    Vec::<String>::new(),
                    "round {round}"
                );
            }
            assert!(
                !system
                    .output(&["test", "-e", "/run/cgtproxy/helper.sock"])
                    .status
                    .success()
            );
            sb.expect(&browser, direct);
            let output =
                system.output_as(alice, &["cgtproxy-exec", "proxy", "touch", "/tmp/was-run"]);
            assert_not_run(
                &system,
                &output,
                "the target is not in force: no helper listens",
            );
            // The agent comes back by itself.
            system.run(&["systemctl", "start", "cgtproxy-helper.socket"]);
            wait_in_force(&system, alice);
            sb.expect(&browser, by("mihomo"));
        }
        // Nothing of all this was worth an error.
        assert_eq!(
            system.run(&["systemctl", "--failed", "--plain", "--no-legend"]),
            ""
        );
        let failed = ["systemctl", "--user", "--failed", "--plain", "--no-legend"];
        assert_eq!(system.run_as(alice, &failed), "");
    });
}

/// Commands that change users and groups put other files in the place of those that the helper has seen.
#[test]
fn whoever_comes_to_be_in_a_denied_group_is_denied() {
    sandbox(|sb| {
        let system = boot(sb);
        let (alice, bob) = (system.alice(), system.bob());
        system.run(&["groupadd", "unproxied"]);
        write_helpers_config(&system, "deny: {groups: [unproxied]}");
        enable(&system, alice, CONFIG);
        wait_in_force(&system, alice);
        system.run(&["usermod", "--append", "--groups", "unproxied", "cgt-bob"]);
        write_config(&system, bob, CONFIG);
        // It waits for the helper.
        let start = [
            "systemctl",
            "--user",
            "start",
            "--no-block",
            "cgtproxy-agent",
        ];
        system.run_as(bob, &start);
        wait_until_denied(&system, bob);
        system.run(&["gpasswd", "--delete", "cgt-bob", "unproxied"]);
        wait_in_force(&system, bob);
    });
}

/// Waits until a user's agent has been told that it may not use the helper.
#[track_caller]
fn wait_until_denied(system: &System, user: &SystemUser) {
    wait_until("the user is told", || {
        let output = system.output_as(user, &["cgtproxy-agent", "status"]);
        text(&output.stdout).contains("the administrator does not allow this user")
    });
}

/// Starts a service under a user whom its service manager makes up, and who is known only to those who ask it: as with
/// all services that know users, over a socket in /run/systemd/userdb.
fn start_made_up(system: &System) {
    // With this type it is known when the unit has started.
    let by = [
        "systemd-run",
        "--quiet",
        "--unit=made-up",
        "--service-type=exec",
    ];
    let user = ["--property=DynamicUser=yes", "--property=User=made-up"];
    let (sleep, config) = (["sleep", "infinity"], "proxy-users: [made-up]");
    system.run(&[&by[..], &user, &sleep].concat());
    write_helpers_config(system, config);
}

fn write_helpers_config(system: &System, text: &str) {
    let script = "mkdir -p /etc/cgtproxy && printf '%s\\n' \"$1\" >/etc/cgtproxy/helper.yaml";
    system.run(&["sh", "-c", script, "sh", text]);
}

#[test]
fn users_and_groups_that_systemd_alone_knows_are_like_others() {
    sandbox(|sb| {
        let system = boot(sb);
        let (alice, bob) = (system.alice(), system.bob());
        start_made_up(&system);
        let uid = system.run(&["id", "-u", "made-up"]);
        let uid = uid.trim().parse().expect("a uid");
        let _mihomo = sb.tproxy("mihomo").uid(uid).port(7890).start();
        enable(&system, alice, CONFIG);
        sb.expect(&system.desktop_app(alice, "browser"), by("mihomo"));
        // A group that is in a file of systemd's, and who is in it.
        let script = "mkdir -p /run/userdb && cd /run/userdb &&
                      echo '{\"groupName\": \"unproxied\", \"gid\": 60321}' >unproxied.group &&
                      ln -s unproxied.group 60321.group && echo '{}' >cgt-bob:unproxied.membership";
        system.run(&["sh", "-c", script]);
        write_helpers_config(&system, "deny: {groups: [unproxied]}");
        system.run(&["systemctl", "restart", HELPER]);
        wait_in_force(&system, alice);
        write_config(&system, bob, CONFIG);
        let start = ["systemctl", "--user", "start", "--no-block", AGENT];
        system.run_as(bob, &start);
        wait_until_denied(&system, bob);
        system.run(&["rm", "/run/userdb/cgt-bob:unproxied.membership"]);
        wait_in_force(&system, bob);
    });
}

/// The entries of the helper's list of system calls, without those that another architecture has in
/// place of one that is listed beside it.
fn system_calls_of_the_unit() -> Vec<String> {
    let unit = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../systemd/cgtproxy-helper.service"
    );
    let unit = std::fs::read_to_string(unit).expect("the unit is there");
    let lists = unit
        .lines()
        .filter_map(|line| line.strip_prefix("SystemCallFilter="));
    let entries = lists.flat_map(str::split_whitespace);
    entries
        .filter(|entry| !TWINS.contains(entry))
        .map(str::to_owned)
        .collect()
}

#[test]
fn the_helper_may_make_no_system_call_that_it_does_not_make() {
    sandbox(|sb| {
        let system = boot(sb);
        let alice = system.alice();
        let _mihomo = sb.tproxy("mihomo").uid(alice.uid()).port(7890).start();
        enable(&system, alice, CONFIG);
        start_made_up(&system);
        let dies_without = |entry: Option<&str>| {
            system.run(&["systemctl", "stop", "cgtproxy-helper.socket"]);
            wait_until("the agent knows", || {
                status(&system, alice)["connected"] == false
            });
            let without = entry.map(|entry| format!("SystemCallFilter=~{entry}"));
            let without = without.unwrap_or_default();
            // What is not allowed kills, so that nothing is overlooked; but for what the dynamic linker looks for, and
            // libcap when nss-systemd is loaded, and newer nss-systemd with its sockets (attributes), which do without.
            let script = format!(
                "mkdir -p /run/systemd/system/{HELPER}.d && printf '%s\\n' '[Service]' \
                 'Restart=no' 'SystemCallErrorNumber=kill' \
                 'SystemCallFilter=access faccessat prctl fgetxattr fsetxattr' '{without}' \
                 >/run/systemd/system/{HELPER}.d/without.conf && systemctl daemon-reload && \
                 systemctl reset-failed {HELPER} cgtproxy-helper.socket && \
                 systemctl start cgtproxy-helper.socket && systemctl --no-block start {HELPER}"
            );
            let deaths = || system.journal(HELPER).matches("status=31/SYS").count();
            let before = deaths();
            system.run(&["sh", "-c", &script]);
            // Without it the helper dies, at its start, when the agent comes back, when it is sent much, or when it takes
            // over what the one before it left; or it does not: then the agent's policy gets into force, and so on.
            let died = wait_for("the helper is dead or at work", || {
                if deaths() > before {
                    return Some(true);
                }
                (status(&system, alice)["connected"] == true).then_some(false)
            });
            let answers = || {
                !system
                    .output_as(alice, &["perl", "-MIO::Socket::UNIX", "-e", LONG_CALL])
                    .stdout
                    .is_empty()
            };
            let restarts = || {
                system
                    .output(&["systemctl", "restart", HELPER])
                    .status
                    .success()
            };
            died || !answers() || !restarts()
        };
        assert!(
            !dies_without(None),
            "the helper needs more than its unit has"
        );
        let entries = system_calls_of_the_unit();
        let not_needed: Vec<_> = entries
            .into_iter()
            .filter(|entry| !dies_without(Some(entry)))
            .collect();
        assert!(
            not_needed.is_empty(),
            "the helper does not need {not_needed:?}"
        );
    });
}
