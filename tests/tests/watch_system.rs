//! How agents notice the control groups of real units, by inotify and by what systemd tells.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a panic is a failed test"
)]

use std::fs;
use std::path::Path;

use cgtproxy_tests::sandbox::{Sandbox, applications_below, sandbox};
use cgtproxy_tests::session::mapped_ids_now;
use cgtproxy_tests::system::{System, SystemUser};
use cgtproxy_tests::wait::{wait_for, wait_until};
use serde_json::{Value, json};

/// Every application is dropped, by a verdict of its own.
const DROP_EACH: &str = "
version: 1
rules: [{match: '/app-[^/]*$', drop: true}]
";
const AGENT: &str = "cgtproxy-agent.service";
/// More than a desktop ever starts at once.
const BURST: usize = 300;

/// How an agent is to notice control groups.
#[derive(Debug, Clone, Copy, PartialEq)]
enum By {
    Inotify,
    Dbus,
    /// Over D-Bus, because cgroupfs can't be seen.
    DbusAlone,
    /// inotify has no watches left, so systemd tells of what it does not see.
    Both,
}

/// A system with alice's agent.
struct Bed<'a> {
    sb: &'a Sandbox,
    system: System,
}

impl<'a> Bed<'a> {
    fn new(sb: &'a Sandbox, by: By) -> Self {
        let system = System::builder(sb).install_project().boot();
        system.run(&["systemctl", "enable", "--now", "cgtproxy-helper.socket"]);
        let bed = Self { sb, system };
        let alice = bed.alice();
        let monitor = match by {
            By::Inotify => "inotify",
            By::Dbus => "dbus",
            By::DbusAlone | By::Both => "auto",
        };
        bed.write(
            ".config/cgtproxy/config.yaml",
            &format!("{DROP_EACH}monitor: {monitor}\n"),
        );
        let command = match by {
            By::Inotify | By::Dbus => None,
            By::DbusAlone => Some("/usr/bin/cgtproxy-agent --cgroup-root /nowhere".to_owned()),
            // So that its limit can be changed.
            By::Both => Some(format!(
                "/usr/bin/unshare --user --map-user={} /usr/bin/cgtproxy-agent",
                alice.uid()
            )),
        };
        if let Some(command) = command {
            bed.write(
                ".config/systemd/user/cgtproxy-agent.service.d/test.conf",
                &format!(
                    "[Service]\nExecStart=\nExecStart={command}\nRestrictNamespaces=no\n\
                     SystemCallFilter=\n"
                ),
            );
        }
        bed.write(
            ".config/systemd/user/app-burst@.service",
            "[Service]\nExecStart=/bin/sleep infinity\nSlice=app.slice\n\
             [Unit]\nStartLimitIntervalSec=0\n",
        );
        bed.systemctl(&["daemon-reload"]);
        bed.systemctl(&["enable", "--now", "cgtproxy-agent"]);
        if by == By::Both {
            sb.limit_watches(bed.agent_pid(), 4);
        }
        bed
    }

    fn alice(&self) -> &SystemUser {
        self.system.alice()
    }

    /// The agent's process, as the sandbox knows it.
    fn agent_pid(&self) -> u32 {
        let group = self
            .system
            .user_property(self.alice(), AGENT, "ControlGroup");
        let processes = self.system.cgroup_directory(&group).join("cgroup.procs");
        let process = fs::read_to_string(processes).expect("it runs");
        process.trim().parse().expect("one process")
    }

    fn write(&self, path: &str, text: &str) {
        let script = "mkdir -p \"$(dirname \"$1\")\" && printf %s \"$2\" > \"$1\"";
        let path = format!("{}/{path}", self.alice().home());
        self.system
            .run_as(self.alice(), &["sh", "-c", script, "sh", &path, text]);
    }

    #[track_caller]
    fn systemctl(&self, arguments: &[&str]) {
        let command = [&["systemctl", "--user"], arguments].concat();
        self.system.run_as(self.alice(), &command);
    }

    /// Starts a unit in the background.
    #[track_caller]
    fn start(&self, kind: &[&str], command: &[&str]) {
        let command = [
            &["systemd-run", "--user", "--quiet", "--collect"],
            kind,
            command,
        ]
        .concat();
        self.system.run_as(self.alice(), &command);
    }

    /// Waits until there are so many applications and the kernel has exactly those.
    #[track_caller]
    fn wait_for_all(&self, count: usize) -> Vec<u64> {
        self.wait_for(count, count)
    }

    /// Waits until there are so many applications and the kernel has so many of them, and no others.
    #[track_caller]
    fn wait_for(&self, count: usize, known: usize) -> Vec<u64> {
        let top = self.system.cgroup_directory(&self.alice().service());
        wait_for_mapped(self.sb, self.alice().uid(), &top, count, known)
    }

    fn status(&self) -> Value {
        self.system.agent_status(Some(self.alice()))
    }

    #[track_caller]
    fn wait_for_monitors(&self, monitors: &[&str], degraded: bool) {
        wait_until(&format!("to be watched by {monitors:?}"), || {
            let status = self.status();
            status["monitors"] == json!(monitors)
                && status["monitorProblem"].is_string() == degraded
        });
    }

    #[track_caller]
    fn assert_dropped(&self, by: &[&str]) {
        let app = self.system.app_as(self.alice(), by);
        self.wait_for_all(1);
        self.sb.expect_dropped(&app);
    }
}

/// Waits until there are so many applications below a control group and so many of them have a verdict of a user's (0: of
/// the system's), and nothing else has.
#[track_caller]
fn wait_for_mapped(sb: &Sandbox, uid: u32, top: &Path, count: usize, known: usize) -> Vec<u64> {
    wait_for(
        &format!("{known} of {count} applications in the kernel"),
        || {
            let made = applications_below(top);
            // A user manager that starts anew gets its policy a moment later.
            let mapped = mapped_ids_now(sb, uid)?;
            let sound = made.len() == count && mapped.len() == known;
            (sound && mapped.iter().all(|id| made.contains(id))).then_some(made)
        },
    )
}

/// What holds whatever tells of control groups.
fn units_are_followed(by: By) {
    sandbox(|sb| {
        let bed = Bed::new(sb, by);
        let run = ["systemd-run", "--user", "--quiet", "--collect", "--pipe"];
        // Scopes and services, in slices that are there and in new ones.
        for kind in [
            &["--wait", "--slice=app.slice", "--unit=app-one"][..],
            &["--wait", "--slice=one-two-three.slice", "--unit=app-two"],
        ] {
            bed.assert_dropped(&[&run, kind].concat());
            bed.wait_for_all(0);
        }
        let scope = ["--scope", "--slice=app.slice", "--unit=app-three"];
        bed.assert_dropped(
            &[
                &["systemd-run", "--user", "--quiet", "--collect"],
                &scope[..],
            ]
            .concat(),
        );
        bed.wait_for_all(0);

        // The same unit again and again: always its present control group.
        bed.systemctl(&["start", "app-burst@0"]);
        let mut before = bed.wait_for_all(1);
        for _ in 0..10 {
            bed.systemctl(&["restart", "app-burst@0"]);
            let now = bed.wait_for_all(1);
            assert_ne!(now, before, "another control group");
            before = now;
        }
        bed.systemctl(&["stop", "app-burst@0"]);
        bed.wait_for_all(0);

        // Many at once, twice.
        let names: Vec<String> = (1..=BURST)
            .map(|n| format!("app-burst@{n}.service"))
            .collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        for _ in 0..2 {
            bed.systemctl(&[&["start"], &names[..]].concat());
            bed.wait_for_all(BURST);
            bed.systemctl(&[&["stop", "--no-block"], &names[..]].concat());
            bed.wait_for_all(0);
        }

        // What a unit makes in its own control group is systemd's business no more.
        if by != By::DbusAlone {
            let script = "mkdir /sys/fs/cgroup$(sed -n s/^0:://p /proc/self/cgroup)/app-inner; exec sleep infinity";
            let unit = ["--unit=outer", "--property=Delegate=yes"];
            bed.start(&unit, &["sh", "-c", script]);
            bed.wait_for_all(1);
            bed.systemctl(&["stop", "outer"]);
            bed.wait_for_all(0);
        }
        match by {
            By::Inotify => bed.wait_for_monitors(&["inotify"], false),
            By::Dbus => bed.wait_for_monitors(&["dbus"], false),
            By::DbusAlone => bed.wait_for_monitors(&["dbus"], true),
            By::Both => bed.wait_for_monitors(&["inotify", "dbus"], true),
        }
        let log = bed.system.user_journal(bed.alice(), AGENT);
        let complaints = log.matches("raise fs.inotify.max_user_watches").count();
        assert_eq!(complaints, usize::from(by == By::Both), "{log}");
    });
}

#[test]
fn units_are_followed_by_inotify() {
    units_are_followed(By::Inotify);
}

#[test]
fn units_are_followed_over_dbus() {
    units_are_followed(By::Dbus);
}

#[test]
fn units_are_followed_over_dbus_where_cgroupfs_can_not_be_seen() {
    units_are_followed(By::DbusAlone);
}

#[test]
fn units_are_followed_over_dbus_when_inotify_has_no_watches_left() {
    units_are_followed(By::Both);
}

#[test]
fn a_bus_that_goes_and_a_manager_that_starts_anew_lose_nothing() {
    sandbox(|sb| {
        let bed = Bed::new(sb, By::DbusAlone);
        bed.systemctl(&["start", "app-burst@1"]);
        bed.wait_for_all(1);
        // While there is no bus, what is known stays.
        bed.systemctl(&["stop", "dbus.socket", "dbus.service"]);
        bed.wait_for_monitors(&[], true);
        bed.systemctl(&["start", "app-burst@2"]);
        bed.wait_for(2, 1);
        bed.systemctl(&["start", "dbus.socket"]);
        bed.wait_for_all(2);
        for verb in ["daemon-reload", "daemon-reexec"] {
            bed.systemctl(&[verb]);
            bed.systemctl(&["stop", "app-burst@1"]);
            bed.systemctl(&["start", "app-burst@3"]);
            bed.wait_for_all(2);
            bed.systemctl(&["start", "app-burst@1"]);
            bed.systemctl(&["stop", "app-burst@3"]);
            bed.wait_for_all(2);
        }
        // With another control group for everything.
        let uid = bed.alice().uid();
        bed.system
            .run(&["systemctl", "restart", &format!("user@{uid}.service")]);
        bed.wait_for_all(0);
        bed.systemctl(&["start", "app-burst@4"]);
        bed.wait_for_all(1);
        bed.wait_for_monitors(&["dbus"], true);
    });
}

/// Root's agent follows the system's own units, over the system's bus.
fn the_systems_units_are_followed(arguments: &str, monitors: &[&str], degraded: bool) {
    const SYSTEM_AGENT: &str = "cgtproxy-agent-system.service";
    sandbox(|sb| {
        let system = System::builder(sb)
            .install_project()
            .install(|root| {
                let write = |path: &str, text: &str| {
                    let file = root.join(path);
                    fs::create_dir_all(file.parent().expect("a file")).expect("it is ours");
                    fs::write(file, text).expect("the overlay is ours");
                };
                let config = format!("{DROP_EACH}monitor: dbus\n");
                write("etc/cgtproxy/config.yaml", &config);
                let command = format!("/usr/bin/cgtproxy-agent --system {arguments}");
                write(
                    &format!("etc/systemd/system/{SYSTEM_AGENT}.d/test.conf"),
                    &format!("[Service]\nExecStart=\nExecStart={command}\n"),
                );
                write(
                    "etc/systemd/system/app-burst@.service",
                    "[Service]\nExecStart=/bin/sleep infinity\n[Unit]\nStartLimitIntervalSec=0\n",
                );
            })
            .boot();
        let enable = ["enable", "--now", "cgtproxy-helper.socket", SYSTEM_AGENT];
        let systemctl = |arguments: &[&str]| {
            system.run(&[&["systemctl"], arguments].concat());
        };
        systemctl(&enable);
        let top = system.cgroup_directory("/system.slice");
        let wait_for_all = |count| wait_for_mapped(sb, 0, &top, count, count);
        let status = || system.agent_status(None);
        let wait_for_monitors = || {
            wait_until(&format!("to be watched by {monitors:?}"), || {
                let status = status();
                status["monitors"] == json!(monitors)
                    && status["monitorProblem"].is_string() == degraded
            });
        };
        wait_for_all(0);
        wait_for_monitors();
        // A service in a slice that is there, and one in a slice that is not.
        for place in [
            &["--unit=app-one"][..],
            &["--unit=app-two", "--slice=system-new.slice"],
        ] {
            let run = ["systemd-run", "--quiet", "--collect", "--pipe", "--wait"];
            let app = system.app(&[&run, place].concat());
            wait_for_all(1);
            sb.expect_dropped(&app);
            drop(app);
            wait_for_all(0);
        }
        // The same unit with another control group each time, and many at once.
        systemctl(&["start", "app-burst@0"]);
        let mut before = wait_for_all(1);
        for _ in 0..5 {
            systemctl(&["restart", "app-burst@0"]);
            let now = wait_for_all(1);
            assert_ne!(now, before, "another control group");
            before = now;
        }
        let names: Vec<String> = (1..50).map(|n| format!("app-burst@{n}.service")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        systemctl(&[&["start"], &names[..]].concat());
        wait_for_all(50);
        systemctl(&[&["stop", "--no-block"], &names[..]].concat());
        wait_for_all(1);
        // A bus that is killed, and a manager that starts anew.
        for disruption in [
            &["kill", "--signal=KILL", "dbus.service"][..],
            &["daemon-reexec"],
        ] {
            systemctl(disruption);
            systemctl(&["start", "app-burst@1"]);
            systemctl(&["stop", "app-burst@0"]);
            wait_for_all(1);
            systemctl(&["start", "app-burst@0"]);
            systemctl(&["stop", "app-burst@1"]);
            wait_for_all(1);
            wait_for_monitors();
        }
        assert_eq!(system.property(SYSTEM_AGENT, "NRestarts"), "0");
    });
}

#[test]
fn the_systems_units_are_followed_over_its_bus() {
    the_systems_units_are_followed("", &["dbus"], false);
}

#[test]
fn the_systems_units_are_followed_over_its_bus_where_cgroupfs_can_not_be_seen() {
    the_systems_units_are_followed("--cgroup-root /nowhere", &["dbus"], true);
}
