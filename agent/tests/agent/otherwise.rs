//! What the commands say of what no rule in force decides: root may have a policy for the machine, and the helper may
//! hold something of an agent that is gone.

use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::CONFIG;
use crate::world::{World, output};

/// What the last agent dropped.
const KEPT: &str = "What the last agent dropped is still dropped, or everything is: on-agent-loss in \
                    /etc/cgtproxy/helper.yaml. Nothing goes to a proxy.";

/// A process that waits, killed in the end.
struct Process(Child);

impl Process {
    /// Starts it in these control groups, which are plain directories.
    fn start_in(groups: &[&std::path::Path]) -> Self {
        let mut command = Command::new("sleep");
        let child = command.arg("1000").stdin(Stdio::null()).spawn().unwrap();
        for group in groups {
            std::fs::write(group.join("cgroup.procs"), child.id().to_string()).unwrap();
        }
        Self(child)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a command prints.
fn run(world: &World, arguments: &[&str]) -> String {
    let mut command = world.command();
    command.arg("--cgroup-root").arg(&world.cgroups);
    command.args(arguments);
    let (code, out, said) = output(command);
    assert!(code.is_some(), "{arguments:?}");
    out + &said
}

/// Lets the helper say what it holds, and whether root has a policy.
fn says(world: &World, session: &'static str, system_policy: bool) {
    let mut books = world.helper.books();
    books.says = Some(session);
    books.system_policy = system_policy;
}

/// The cells of the row of a table that ends with this.
fn row<'t>(text: &'t str, end: &str) -> Vec<&'t str> {
    let line = text.lines().find(|line| line.ends_with(end));
    let line = line.unwrap_or_else(|| panic!("no {end}: {text}"));
    line.split("  ")
        .map(str::trim)
        .filter(|c| !c.is_empty())
        .collect()
}

#[test]
fn what_is_left_to_the_system_policy_does_not_pass_for_direct() {
    let mut world = World::new(CONFIG);
    let (app, free) = ("app-firefox-1.scope", "free-1");
    world.make(&[app, free]);
    let session = world.subtree.parent().unwrap().join("session-9.scope");
    std::fs::create_dir(&session).unwrap();
    let _process = Process::start_in(&[&world.subtree.join(app), &session]);
    world.helper.start();
    let agent = world.agent();
    world.notified("READY=1");
    agent.in_force(app);
    for (system_policy, target) in [(true, "system policy"), (false, "direct")] {
        says(&world, "active", system_policy);
        let apps = run(&world, &["apps"]);
        assert_eq!(row(&apps, app), ["firefox", target, "-", app], "{apps}");
        let status = run(&world, &["status"]);
        let (app, free) = (
            format!("{}/{app}", world.prefix),
            format!("{}/{free}", world.prefix),
        );
        assert_eq!(row(&status, &app), [target, "-", "yes", &app], "{status}");
        assert_eq!(row(&status, &free)[0], "direct", "{status}");
        // The root, and the application.
        let counts = match system_policy {
            true => ["\ndirect         -     1\n", "\nsystem policy  -     2\n"],
            false => ["\ndirect  -     3\n", "\ndrop    -     0\n"],
        };
        assert!(counts.iter().all(|row| status.contains(row)), "{status}");
        let goes = match system_policy {
            true => "out of reach of your rules altogether: it goes as the system policy says.",
            false => "out of reach of your rules altogether: it goes direct.",
        };
        assert!(apps.contains(goes), "{apps}");
        for command in ["apps", "status"] {
            let json: Value = serde_json::from_str(&run(&world, &[command, "--json"])).unwrap();
            assert_eq!(json["systemPolicy"], system_policy, "{command}");
        }
    }
}

#[test]
fn doctor_knows_of_the_system_policy() {
    let mut world = World::new("");
    world.helper.start();
    for (system_policy, goes) in [
        (true, "goes as the system policy says"),
        (false, "goes direct"),
    ] {
        says(&world, "none", system_policy);
        let doctor = run(&world, &["doctor"]);
        let (effect, missing) = (
            format!("    Everything of yours {goes}.\n"),
            format!("    Without it, everything {goes}, unless cgtproxy-exec says otherwise.\n"),
        );
        assert!(
            doctor.contains(&effect) && doctor.contains(&missing),
            "{doctor}"
        );
    }
}

#[test]
fn the_machines_own_commands_know_that_users_rules_come_first() {
    let world = World::new(CONFIG);
    world.make(&["app-firefox-1.scope", "app-steam-1.scope"]);
    let service = world.cgroups.join("system.slice/app-server.service");
    std::fs::create_dir_all(&service).unwrap();
    let at = |name: &str| world.subtree.join(name);
    let (firefox, steam) = (at("app-firefox-1.scope"), at("app-steam-1.scope"));
    let _process = Process::start_in(&[&firefox, &steam, &service]);
    let config = world.path().join("system.yaml");
    let rules = "version: 1\nrules:\n- {app: steam, drop: true, enforce: true}\n- {app: firefox, drop: true}\n\
                 - {match: system, drop: true}\n";
    std::fs::write(&config, rules).unwrap();
    let system = ["--system", "--config", config.to_str().unwrap()];
    let explain = |name: &str| run(&world, &[&system[..], &["explain", name]].concat());
    let unless = ", unless that user's own rules decide\n";
    for (name, yields) in [
        ("app-firefox-1.scope", true),
        ("app-steam-1.scope", false),
        ("app-server.service", false),
        // No rule is about it.
        (&world.prefix, true),
        ("/user.slice", false),
    ] {
        let text = explain(name);
        assert_eq!(text.contains(unless), yields, "{text}");
    }
    let apps = run(&world, &[&system[..], &["apps"]].concat());
    let by = |app: &str| row(&apps, app)[2];
    assert_eq!(
        by("app-steam-1.scope"),
        "rule 1 (app: steam), enforced",
        "{apps}"
    );
    assert_eq!(by("app-firefox-1.scope"), "rule 2 (app: firefox)", "{apps}");
    let note = "What is below a user@UID.service and not enforced holds unless that user's own rules decide.\n";
    assert_eq!(apps.matches(note).count(), 1, "{apps}");
    // A user's own says nothing of that.
    let apps = run(&world, &["apps"]);
    assert!(!apps.contains("that user"), "{apps}");
}

#[test]
fn what_an_earlier_agent_left_is_told_of_while_a_file_is_waited_for() {
    let mut world = World::new("version: 2");
    let app = "app-firefox-1.scope";
    world.make(&[app]);
    let _process = Process::start_in(&[&world.subtree.join(app)]);
    world.helper.start();
    let _agent = world.agent();
    world.notified("STATUS=waiting for the configuration to be fixed: ");
    let grace = "What the last agent had in force still is, until grace-seconds in /etc/cgtproxy/helper.yaml are over.";
    for (session, system_policy, means) in [
        ("kept", false, KEPT),
        ("kept", true, KEPT),
        ("grace", false, grace),
        ("none", false, "Everything of yours goes direct."),
        (
            "none",
            true,
            "Everything of yours goes as the system policy says.",
        ),
    ] {
        says(&world, session, system_policy);
        let waits = format!(
            "The agent waits for the configuration file to be fixed: see 'cgtproxy-agent check'. {means}\n"
        );
        let explained = run(&world, &["explain", app]);
        assert_eq!(
            explained,
            format!(
                "{}/{app}\n  has no verdict of the agent's, which waits for the configuration\n\n{waits}",
                world.prefix
            )
        );
        let apps = run(&world, &["apps"]);
        assert!(apps.contains(&waits), "{apps}");
        assert_eq!(row(&apps, app), ["firefox", "-", "-", app], "{apps}");
        let status = run(&world, &["status"]);
        assert!(status.contains(&format!("  {means}\n")), "{status}");
        assert!(status.contains("\ndirect  -     0\n"), "{status}");
        assert_eq!(row(&status, app)[..3], ["-", "-", "no"], "{status}");
        let doctor = run(&world, &["doctor"]);
        assert!(
            doctor.contains(&format!(
                "    The agent waits for the file to be fixed. {means}\n"
            )),
            "{doctor}"
        );
    }
}

#[test]
fn what_an_earlier_agent_left_is_told_of_while_none_runs() {
    let mut world = World::new(CONFIG);
    world.make(&["drop-1"]);
    world.helper.start();
    for (session, said) in [
        (
            "kept",
            format!("cgtproxy-agent is not running: this is not in force. {KEPT}\n"),
        ),
        (
            "none",
            "cgtproxy-agent is not running: nothing of this is in force.\n".to_owned(),
        ),
    ] {
        says(&world, session, true);
        for arguments in [&["explain", "drop-1"][..], &["apps"]] {
            let text = run(&world, arguments);
            assert!(text.contains(&said), "{text}");
        }
        // What no rule is about, too.
        let text = run(&world, &["explain", &world.prefix]);
        assert!(text.contains("is left to the system policy"), "{text}");
        assert_eq!(text.contains(KEPT), session == "kept", "{text}");
    }
}

#[test]
fn commands_that_are_offered_can_be_pasted() {
    let mut world = World::new(CONFIG);
    let name = r"app-app\x2dbar.slice";
    world.make(&[name]);
    world.helper.start();
    let agent = world.agent();
    world.notified("READY=1");
    agent.in_force(name);
    says(&world, "active", true);
    let text = run(&world, &["explain", name]);
    let offered = text
        .lines()
        .find_map(|line| line.strip_prefix("  $ sudo cgtproxy-agent --system "));
    let offered = offered.unwrap_or_else(|| panic!("none: {text}"));
    // A shell takes it for the path.
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("printf '%s\\n' {offered}")]);
    let (_, words, _) = output(shell);
    assert_eq!(words, format!("explain\n{}/{name}\n", world.prefix));
}

#[test]
fn explain_says_where_a_login_session_goes_and_what_to_do() {
    let mut world = World::new(CONFIG);
    world.helper.start();
    let session = format!(
        "{}/session-1.scope",
        world.prefix.rsplit_once('/').unwrap().0
    );
    let exec = "'cgtproxy-exec TARGET COMMAND' gives a command a target";
    for (system_policy, goes) in [
        (true, "it goes as the system policy says"),
        (false, "it goes direct"),
    ] {
        says(&world, "none", system_policy);
        for path in [session.as_str(), "/system.slice/cron.service"] {
            let said = run(&world, &["explain", path]);
            assert!(
                said.contains(&format!("does not decide about it: {goes}; {exec}")),
                "{said}"
            );
        }
        // Another user's agent may decide about it.
        let said = run(
            &world,
            &["explain", "/user.slice/user-5.slice/user@5.service/a"],
        );
        assert!(
            said.contains("does not decide about it: that user's may"),
            "{said}"
        );
        assert!(!said.contains("goes"), "{said}");
    }
}
