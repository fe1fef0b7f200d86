//! What runs, and which rule is about it.

use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::world::{World, output};

const CONFIG: &str = "version: 1
tproxies:
  p: {port: 7893}
rules:
  - {app: org.telegram.desktop, tproxy: p}
  - {unit: pipewire, drop: true}
";

/// A process that waits, killed in the end.
struct Process(Child);

impl Process {
    fn start() -> Self {
        let mut command = Command::new("sleep");
        Self(command.arg("1000").stdin(Stdio::null()).spawn().unwrap())
    }

    /// What its executable is called.
    fn name(&self) -> String {
        let file = std::fs::read_link(format!("/proc/{}/exe", self.0.id())).unwrap();
        file.file_name().unwrap().to_str().unwrap().to_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn apps_lists_what_runs_with_and_without_an_agent() {
    let mut world = World::new(CONFIG);
    let process = Process::start();
    let telegram = "app.slice/app-flatpak-org.telegram.desktop-7.scope";
    let shell = "session.slice/org.gnome.Shell@wayland.service";
    let editor = r"app.slice/app-gnome-code\x2doss-8.scope";
    world.make(&["app.slice", "session.slice"]);
    world.make(&[telegram, shell, editor, "app.slice/pipewire.service"]);
    let tab = "app.slice/vte-spawn-1.scope";
    world.make(&[tab, "app.slice/app-empty-1.scope"]);
    let session = world.subtree.parent().unwrap().join("session-9.scope");
    std::fs::create_dir(&session).unwrap();
    let pid = format!("{}\n", process.0.id());
    for group in [telegram, shell, editor, tab, "app.slice/pipewire.service"] {
        std::fs::write(world.subtree.join(group).join("cgroup.procs"), &pid).unwrap();
    }
    std::fs::write(session.join("cgroup.procs"), &pid).unwrap();
    let apps = |arguments: &[&str]| {
        let mut command = world.command();
        command.arg("--cgroup-root").arg(&world.cgroups);
        command.arg("apps").args(arguments);
        let (code, out, err) = output(command);
        assert_eq!(code, Some(0), "{err}");
        out
    };
    let name = process.name();
    let table = "APP                   TARGET  BY                                  UNIT\n\
                 code-oss              direct  -                                   app-gnome-code\\x2doss-8.scope\n\
                 org.telegram.desktop  p       rule 1 (app: org.telegram.desktop)  \
                 app-flatpak-org.telegram.desktop-7.scope\n";
    let others = "3 other units, of no application: 'cgtproxy-agent apps --all' shows them.\n";
    let shared = format!(
        "Without a control group of their own, so that no rule can tell them apart:\n  \
         session-9.scope: {name}\n  vte-spawn-1.scope: {name}\n  org.gnome.Shell@wayland.service: {name}\n\
         A login session (session-*.scope) is out of reach of your rules altogether: it goes direct, or as the \
         system policy says.\n\
         Start such programs so that each gets one:\n"
    );
    let without = apps(&[]);
    let not_running = "cgtproxy-agent is not running: nothing of this is in force.\n";
    assert!(
        without.starts_with(&format!("{table}\n{not_running}\n{others}\n{shared}")),
        "{without}"
    );

    world.helper.start();
    let agent = world.agent();
    world.notified("READY=1");
    agent.in_force("app-flatpak-org.telegram.desktop-7.scope");
    let apps = |arguments: &[&str]| {
        let mut command = world.command();
        command.arg("--cgroup-root").arg(&world.cgroups);
        command.arg("apps").args(arguments);
        output(command).1
    };
    let with = apps(&[]);
    assert!(
        with.starts_with(&format!("{table}\n{others}\n{shared}")),
        "{with}"
    );
    let all = apps(&["--all"]);
    assert!(
        all.contains(
            "-                     drop    rule 2 (unit: pipewire.service)     pipewire.service\n"
        ),
        "{all}"
    );
    let json: Value = serde_json::from_str(&apps(&["--json"])).unwrap();
    assert_eq!(json["agentRunning"], true);
    let telegram = &json["applications"][1];
    assert_eq!(telegram["id"], "org.telegram.desktop");
    assert_eq!(telegram["selector"], "app: org.telegram.desktop");
    assert_eq!(telegram["executables"][0], name.as_str());
    assert_eq!(telegram["controlGroup"]["target"], "p");
    assert_eq!(telegram["controlGroup"]["inForce"], true);
    assert_eq!(json["shared"][0]["inReach"], false);
    assert_eq!(json["shared"][1]["inReach"], true);
}
