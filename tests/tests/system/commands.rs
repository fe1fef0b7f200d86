//! cgtproxy-exec, in a whole system.

use cgtproxy_tests::installed::Installed;
use cgtproxy_tests::sandbox::{by, direct, proxied, sandbox};

use crate::{CONFIG, NOT_RUN, assert_not_run, text, wait_for_target};

/// A program that runs already is moved by the user's service manager, and what it begins then goes where it is to.
#[test]
fn a_process_that_runs_is_moved_to_another_target() {
    sandbox(|sb| {
        let installed = Installed::boot(sb, "", |_| ());
        let system = &installed.system;
        let alice = system.alice();
        let _mihomo = sb.tproxy("mihomo").uid(alice.uid()).port(7890).start();
        installed.enable(alice, CONFIG);
        let game = system.desktop_app(alice, "game");
        wait_for_target(system, alice, "app-game.service", "direct");
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
        installed.enable(bob, "version: 1\nrules: []\n");
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
        let installed = Installed::boot(sb, "", |_| ());
        let system = &installed.system;
        let alice = system.alice();
        installed.enable(alice, CONFIG);
        let _browser = system.desktop_app(alice, "browser");
        installed.wait_in_force(alice);
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
        assert_not_run(system, &output, "from within a PID namespace");
    });
}

#[test]
fn a_command_needs_the_users_bus_and_no_other() {
    sandbox(|sb| {
        let installed = Installed::boot(sb, "", |_| ());
        let system = &installed.system;
        let alice = system.alice();
        installed.enable(alice, CONFIG);
        installed.wait_in_force(alice);
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

/// A sandboxed application may be on the user's bus, and is not systemd.
#[test]
fn nobody_on_the_users_bus_passes_for_systemd() {
    sandbox(|sb| {
        let installed = Installed::boot(sb, "", |_| ());
        let system = &installed.system;
        let alice = system.alice();
        installed.enable(alice, CONFIG);
        installed.wait_in_force(alice);
        // To all, and to each that is there.
        let emit = "signal='/org/freedesktop/systemd1 org.freedesktop.systemd1.Manager JobRemoved s nonsense'
                    while :; do
                        busctl --user emit $signal || exit
                        for name in $(busctl --user --unique --no-legend list | cut -d ' ' -f 1); do
                            busctl --user emit --destination=$name $signal
                        done
                    done";
        let unit = [
            "systemd-run",
            "--user",
            "--quiet",
            "--unit=pretender",
            "sh",
            "-c",
            emit,
        ];
        system.run_as(alice, &unit);
        for _ in 0..20 {
            let output = system.run_as(alice, &["cgtproxy-exec", "drop", "echo", "run"]);
            assert_eq!(output, "run\n");
        }
        let state = ["systemctl", "--user", "is-active", "pretender"];
        assert_eq!(system.run_as(alice, &state), "active\n");
    });
}
