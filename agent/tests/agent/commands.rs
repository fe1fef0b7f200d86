//! The other commands of the agent.

use std::fs::{File, Permissions};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::CONFIG;
use crate::world::{World, agent_command, output};

#[test]
fn check_tells_by_its_exit_status() {
    let world = World::new(CONFIG);
    let file = world.config.display();
    let check = |text: &str| {
        std::fs::write(&world.config, text).unwrap();
        let mut command = world.command();
        command.arg("check");
        output(command)
    };
    assert_eq!(
        check(CONFIG),
        (Some(0), format!("{file}: no errors\n"), String::new())
    );
    assert_eq!(
        check("version: 1\nroute-table: 5\n"),
        (
            Some(0),
            format!(
                "{file}:2:14: warning: 'route-table' is ignored\n    help: the helper sees to it now; \
                 the line can go\n{file}: 1 warning\n"
            ),
            String::new()
        )
    );
    let (code, out, _) = check("version: 1\nrules:\n- match: a(b\n  tproxy: x\n");
    assert_eq!(code, Some(1));
    assert_eq!(
        out,
        format!(
            "{file}:3:11: error: bad regular expression: unclosed group\n    a(b\n     ^\n\
             {file}:4:11: error: there is no tproxy 'x'\n    help: the file names no proxy\n\
             {file}: 2 errors\n"
        )
    );
    let mut command = agent_command();
    command.args(["check", "/nonexistent"]);
    assert_eq!(output(command).0, Some(1));
}

#[test]
fn status_and_explain_show_what_is_in_force() {
    let mut world = World::new(CONFIG);
    world.make(&[
        "app.slice",
        "app.slice/a.scope",
        "app.slice/cgtproxy-relay.service",
        "app.slice/_io.github.Foo.service",
    ]);
    world.helper.start();
    let mut agent = world.agent();
    world.notified("READY=1");
    let run = |arguments: &[&str]| {
        let mut command = world.command();
        command
            .arg("--cgroup-root")
            .arg(&world.cgroups)
            .args(arguments);
        output(command)
    };
    let (code, out, _) = run(&["status"]);
    assert_eq!(code, Some(0));
    assert!(out.contains("Helper:         connected\n"), "{out}");
    assert!(
        out.contains(&format!(
            "p       rule 3              yes       {}/app.slice\n",
            world.prefix
        )),
        "{out}"
    );
    let (_, out, _) = run(&["status", "--json"]);
    let status: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(status["controlGroups"][2]["target"], "p");

    let scope = format!("{}/app.slice/a.scope", world.prefix);
    let on_disk = world.subtree.join("app.slice/a.scope");
    let meant = format!(
        "{scope}\n  goes through 'p'\n  No rule matches it; it inherits from {}/app.slice, which rule 3 \
         matches.\n  rule 3 (match: /app\\.slice$), {}:9\n  The kernel holds this verdict.\n",
        world.prefix,
        world.config.display()
    );
    for name in [
        "a.scope",
        "app.slice/a.scope",
        &scope,
        on_disk.to_str().unwrap(),
    ] {
        assert_eq!(
            run(&["explain", name]),
            (Some(0), meant.clone(), String::new()),
            "{name}"
        );
    }
    // systemd names the control group of this unit so.
    let (_, out, _) = run(&["explain", "io.github.Foo.service"]);
    assert!(out.contains("app.slice/_io.github.Foo.service\n"), "{out}");
    let (_, out, _) = run(&["explain", "cgtproxy-relay.service"]);
    assert!(
        out.contains("goes direct\n  It is the relay, which goes direct whatever the rules say.\n"),
        "{out}"
    );
    let (_, out, _) = run(&["status"]);
    // As 'apps' has it.
    assert!(out.contains("direct  the relay "), "{out}");
    let file = world.config.to_str().unwrap();
    // No rule has anything to do with that one.
    let (_, out, _) = run(&["explain", "--json", "_io.github.Foo.service"]);
    let explained: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(explained["config"], file);
    let (_, out, _) = run(&["explain", "--json", "a.scope"]);
    let explained: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(explained["agentRunning"], true);
    assert_eq!(explained["controlGroup"]["rule"], 3);
    assert_eq!(explained["rule"]["line"], 9);
    assert_eq!(explained["config"], file);
    for (name, said) in [
        (
            "nothing.scope",
            "there is no control group or unit 'nothing.scope'",
        ),
        ("/user.slice", "your agent does not decide about it"),
        ("4194999", "there is no process"),
    ] {
        let (code, _, err) = run(&["explain", name]);
        assert_eq!(code, Some(1));
        assert!(err.contains(said), "{err}");
    }

    agent.stop();
    for name in ["a.scope", "app.slice/a.scope", &scope] {
        let (_, out, _) = run(&["explain", name]);
        let meant = meant.replace(
            "The kernel holds this verdict.",
            "cgtproxy-agent is not running: nothing of this is in force.",
        );
        assert_eq!(out, meant, "{name}");
    }
    let (code, _, err) = run(&["status"]);
    assert_eq!(code, Some(1));
    assert!(
        err.contains("cgtproxy-agent is not running; start it with"),
        "{err}"
    );
}

#[test]
fn check_of_no_file_is_no_failure_unless_it_was_named() {
    let world = World::new("");
    let check = |arguments: &[&str]| {
        let mut command = world.command();
        command.args(arguments).arg("check");
        output(command)
    };
    let said = format!(
        "there is no file {}: everything goes direct, or as the system policy says, unless cgtproxy-exec says otherwise\n",
        world.config.display()
    );
    assert_eq!(check(&[]), (Some(0), said, String::new()));
    let (code, _, said) = check(&["--config", world.config.to_str().unwrap()]);
    assert_eq!(code, Some(1), "{said}");
    // Root's would be the machine's.
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user"]);
    command.arg(env!("CARGO_BIN_EXE_cgtproxy-agent"));
    command.arg("check");
    command.env_clear().env("XDG_CONFIG_HOME", "/nonexistent");
    command.stdin(Stdio::null());
    let (code, out, said) = output(command);
    assert_eq!((code, out.as_str()), (Some(1), ""));
    assert!(said.contains("add --system"), "{said}");
}

#[test]
fn explain_knows_what_rules_and_apps_call_things() {
    let mut world = World::new(CONFIG);
    let first = r"app.slice/app-gnome-google\x2dchrome-1.scope";
    let second = r"app.slice/app-gnome-google\x2dchrome-2.scope";
    let elsewhere = ["app-gnome-bar-1.scope", "app-gnome-bar-2.scope"];
    world.make(&["app.slice", first, second, "app.slice/foo.service"]);
    world.make(&elsewhere);
    world.helper.start();
    let mut agent = world.agent();
    world.notified("READY=1");
    let explain = |arguments: &[&str]| {
        let mut command = world.command();
        command.arg("--cgroup-root").arg(&world.cgroups);
        command.arg("explain").args(arguments);
        output(command)
    };
    for running in [true, false] {
        if !running {
            agent.stop();
        }
        let (code, out, said) = explain(&["foo"]);
        assert_eq!(code, Some(0), "{said}");
        assert!(
            out.starts_with(&format!("{}/app.slice/foo.service\n", world.prefix)),
            "{out}"
        );
        let (code, out, said) = explain(&["google-chrome"]);
        assert_eq!(code, Some(0), "{said}");
        let found: Vec<_> = out.lines().filter(|line| line.starts_with('/')).collect();
        let expected = [first, second].map(|path| format!("{}/{path}", world.prefix));
        assert_eq!(found, expected, "{out}");
        let (_, out, _) = explain(&["--json", "google-chrome"]);
        let json: Value = serde_json::from_str(&out).unwrap();
        assert_eq!(json["agentRunning"], running);
        assert_eq!(json["controlGroup"]["path"], expected[0]);
        assert_eq!(json["others"][0]["controlGroup"]["path"], expected[1]);
        let file = world.config.to_str().unwrap();
        assert_eq!(json["config"], file);
        assert_eq!(json["others"][0]["config"], file);
        // Whose verdict is no rule's, so that there is no file of one.
        let (_, out, _) = explain(&["--json", "bar"]);
        let json: Value = serde_json::from_str(&out).unwrap();
        assert_eq!(json["config"], file);
        assert_eq!(json["others"][0]["config"], Value::Null, "{running}");
        let (code, _, said) = explain(&["firefox"]);
        assert_eq!(code, Some(1));
        assert!(said.contains("cgtproxy-agent apps --all"), "{said}");
    }
}

#[test]
fn a_file_that_is_not_in_force_is_told_of() {
    let mut world = World::new(CONFIG);
    world.make(&["app.slice"]);
    world.helper.start();
    let mut agent = world.agent();
    world.notified("READY=1");
    std::fs::write(&world.config, "version: 2\n").unwrap();
    agent.says("the old configuration stays in force");
    let run = |arguments: &[&str]| {
        let mut command = world.command();
        command.arg("--cgroup-root").arg(&world.cgroups);
        command.args(arguments);
        output(command)
    };
    for arguments in [&["explain", "app.slice"][..], &["apps"]] {
        let (code, out, said) = run(arguments);
        assert_eq!(code, Some(0), "{said}");
        assert!(
            out.contains("The configuration file is not in force: this is what was loaded before."),
            "{out}"
        );
        let (_, out, _) = run(&[arguments, &["--json"]].concat());
        let json: Value = serde_json::from_str(&out).unwrap();
        let error = json["configError"].as_str().unwrap();
        assert!(error.contains("config.yaml:1:10"), "{error}");
    }
}

#[test]
fn an_agent_is_not_asked_about_another_file() {
    let mut world = World::new(CONFIG);
    world.make(&["app.slice"]);
    world.helper.start();
    let _agent = world.agent();
    world.notified("READY=1");
    let other = world.path().join("other.yaml");
    std::fs::write(&other, CONFIG).unwrap();
    for arguments in [&["status"][..], &["apps"], &["explain", "app.slice"]] {
        let run = |file: &std::path::Path| {
            let mut command = world.command();
            command.arg("--cgroup-root").arg(&world.cgroups);
            command.arg("--config").arg(file).args(arguments);
            output(command)
        };
        let (code, _, said) = run(&other);
        assert_eq!(code, Some(1), "{arguments:?}");
        let said_of = format!(
            "is running with {} and not with {}",
            world.config.display(),
            other.display()
        );
        assert!(said.contains(&said_of), "{said}");
        // The agent's own, however it is written.
        let written = world
            .config
            .parent()
            .unwrap()
            .join("../cgtproxy/config.yaml");
        let (code, _, said) = run(&written);
        assert_eq!(code, Some(0), "{arguments:?}: {said}");
    }
}

/// Whoever asks an agent is in another directory than the one that it was started in.
#[test]
fn an_agent_tells_the_whole_name_of_its_file() {
    let mut world = World::new(CONFIG);
    world.make(&["app.slice"]);
    world.helper.start();
    let directory = world.config.parent().unwrap().to_owned();
    let mut shell = Command::new("env");
    shell.current_dir(&directory);
    let _agent = world.agent_by(shell, "exec \"$@\" --config ./config.yaml");
    world.notified("READY=1");
    let mut command = world.command();
    command.arg("--config").arg(&world.config).arg("status");
    let (code, out, said) = output(command);
    assert_eq!(code, Some(0), "{said}");
    assert!(out.contains(world.config.to_str().unwrap()), "{out}");
}

#[test]
fn a_port_that_nobody_has_told_yet_is_not_shown() {
    let mut world = World::new(
        "version: 1\nproxies: {there: {upstream: 'socks5://192.0.2.1:1080'}}\nrules: []\n",
    );
    world.helper.start();
    let _agent = world.agent();
    world.notified("READY=1");
    let status = |arguments: &[&str]| {
        let mut command = world.command();
        command.arg("--cgroup-root").arg(&world.cgroups);
        command.arg("status").args(arguments);
        output(command).1
    };
    let text = status(&[]);
    let line = text
        .lines()
        .find(|line| line.starts_with("there "))
        .unwrap();
    let cells: Vec<_> = line.split_whitespace().collect();
    assert_eq!(cells, ["there", "relay", "0"], "{text}");
    let json: Value = serde_json::from_str(&status(&["--json"])).unwrap();
    let targets = json["targets"].as_array().unwrap();
    let there = targets.iter().find(|target| target["name"] == "there");
    let there = there.unwrap();
    assert_eq!(
        (&there["port"], &there["relayed"]),
        (&Value::Null, &true.into())
    );
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    let mut world = World::new(CONFIG);
    for n in 0..3000 {
        world.make(&[&format!("group-with-a-long-name-{n}")]);
    }
    world.helper.start();
    let _agent = world.agent();
    world.notified("READY=1");
    let mut command = world.command();
    command
        .arg("status")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut out = child.stdout.take().unwrap();
    out.read_exact(&mut [0; 10]).unwrap();
    drop(out);
    let mut said = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    assert_eq!((child.wait().unwrap().code(), said.as_str()), (Some(0), ""));
}

#[test]
fn an_agent_that_does_not_answer_is_not_waited_for_forever() {
    let world = World::new(CONFIG);
    std::fs::create_dir(world.path().join("run/cgtproxy")).unwrap();
    let _silent = UnixListener::bind(world.path().join("run/cgtproxy/agent.sock")).unwrap();
    std::thread::scope(|scope| {
        for arguments in [&["status"][..], &["apps"], &["explain", "app.slice"]] {
            let mut command = world.command();
            command.arg("--cgroup-root").arg(&world.cgroups);
            command.args(arguments);
            scope.spawn(move || {
                let (code, _, said) = output(command);
                assert_eq!(code, Some(1), "{arguments:?}: {said}");
                assert!(said.contains("within 5 seconds"), "{arguments:?}: {said}");
            });
        }
    });
}

/// What nobody reads.
fn closed() -> Stdio {
    let (here, there) = UnixStream::pair().unwrap();
    drop(there);
    OwnedFd::from(here).into()
}

#[test]
fn a_reader_that_is_gone_changes_no_status() {
    let world = World::new("version: 1\nruls: []\n");
    for arguments in [&["check"][..], &["doctor"], &["doctor", "--json"]] {
        let mut command = world.command();
        let status = command.args(arguments).stdout(closed()).status().unwrap();
        assert_eq!(status.code(), Some(1), "{arguments:?}");
    }
    // A key that is not taken over is said.
    let (old, new) = (world.path().join("config.json"), world.path().join("new"));
    std::fs::write(&old, r#"{"port": 12345, "fwmark": 1}"#).unwrap();
    let mut command = world.command();
    command.arg("migrate").arg(&old).arg("--output").arg(&new);
    let status = command.stderr(closed()).status().unwrap();
    assert_eq!(status.code(), Some(0));
    let written = std::fs::read_to_string(&new).unwrap();
    assert!(written.contains("12345"), "{written}");
}

#[test]
fn root_is_told_that_its_agent_is_the_machines() {
    let commands = [
        &["status"][..],
        &["apps"],
        &["explain", "/"],
        &["doctor"],
        &["check", "permission"],
        &["run"],
    ];
    for arguments in commands {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user"]);
        command.arg(env!("CARGO_BIN_EXE_cgtproxy-agent"));
        command.args(arguments).stdin(Stdio::null());
        let (code, out, said) = output(command);
        assert_eq!((code, out.as_str()), (Some(1), ""), "{arguments:?}");
        assert!(said.contains("add --system"), "{arguments:?}: {said}");
    }
}

#[test]
fn migrate_overwrites_only_what_it_is_told_to() {
    let world = World::new(CONFIG);
    let old = world.path().join("config.json");
    std::fs::write(&old, r#"{"port": 7893, "cgroup_proxy": ["/"]}"#).unwrap();
    let migrate = |arguments: &[&str]| {
        let mut command = world.command();
        command.arg("migrate").arg(&old).args(arguments);
        output(command)
    };
    let (code, new, said) = migrate(&[]);
    assert_eq!(code, Some(0));
    assert!(new.ends_with("rules:\n  # cgroup_proxy\n  - match: ''\n    tproxy: proxy\n"));
    let of = |file: &str| {
        format!(
            "{file}:1:1: warning: the commands 'cgproxy' and 'cgnoproxy' are not there any more\n    \
             help: use 'cgtproxy-exec proxy' and 'cgtproxy-exec direct'\n"
        )
    };
    assert_eq!(said, of(old.to_str().unwrap()));
    let mut from_input = world.command();
    from_input.args(["migrate", "-"]);
    from_input.stdin(File::open(&old).unwrap());
    assert_eq!(output(from_input), (Some(0), new.clone(), of("-")));

    let file = world.config.to_str().unwrap();
    let (code, out, said) = migrate(&["-o", file]);
    assert_eq!((code, out.as_str()), (Some(1), ""));
    assert!(
        said.contains("is there already; --force replaces it"),
        "{said}"
    );
    assert_eq!(std::fs::read_to_string(file).unwrap(), CONFIG);
    assert_eq!(migrate(&["-o", file, "--force"]).0, Some(0));
    assert_eq!(std::fs::read_to_string(file).unwrap(), new);
    let other = format!("{file}.other");
    assert_eq!(migrate(&["-o", &other]).0, Some(0));
    assert_eq!(std::fs::read_to_string(&other).unwrap(), new);
    // Nothing else is left behind.
    let files = std::fs::read_dir(world.config.parent().unwrap()).unwrap();
    assert_eq!(files.count(), 2);
    // What only its owner may read, it may still, and a link leads where it did.
    let kept = world.path().join("kept");
    std::fs::rename(file, &kept).unwrap();
    std::fs::set_permissions(&kept, Permissions::from_mode(0o600)).unwrap();
    symlink(&kept, file).unwrap();
    std::fs::write(&kept, CONFIG).unwrap();
    assert_eq!(migrate(&["-o", file, "--force"]).0, Some(0));
    assert_eq!(std::fs::read_to_string(&kept).unwrap(), new);
    assert!(world.config.is_symlink());
    let mode = kept.metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut check = world.command();
    check.arg("check");
    assert_eq!(output(check).0, Some(0));

    std::fs::write(&old, r#"{"port": 0}"#).unwrap();
    let (code, out, said) = migrate(&[]);
    assert_eq!((code, out.as_str()), (Some(1), ""));
    assert!(said.ends_with(
        "config.json:1:10: error: '0' is no port\n    help: a port is a number from 1 to 65535\n"
    ));
    let mut check = world.command();
    check
        .args(["check", "-"])
        .stdin(File::open(&world.config).unwrap());
    let (code, out, _) = output(check);
    assert_eq!((code, out.as_str()), (Some(0), "-: no errors\n"));
}

#[test]
fn a_help_that_can_not_be_written_is_a_failure() {
    for arguments in [&["--version"][..], &["--help"], &["help", "status"]] {
        let mut command = agent_command();
        command.args(arguments);
        command.stdout(File::options().write(true).open("/dev/full").unwrap());
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {said}");
        assert!(
            said.starts_with("error: can't write the output: "),
            "{said}"
        );
    }
}

#[test]
fn what_a_command_line_names_may_be_a_pipe() {
    let world = World::new(CONFIG);
    let run = |command: &str| {
        let mut shell = Command::new("bash");
        shell.args(["-c", command, env!("CARGO_BIN_EXE_cgtproxy-agent")]);
        shell.arg(&world.config);
        output(shell)
    };
    let (code, out, err) = run("$0 check <(cat $1)");
    assert_eq!(code, Some(0), "{err}");
    assert!(out.ends_with(": no errors\n"), "{out}");
    let (code, out, err) = run("cat $1 | $0 migrate /dev/stdin");
    assert_eq!((code, out.contains("tproxies:")), (Some(0), true), "{err}");
    // What names standard output does not become a file.
    for name in ["-", "/dev/stdout"] {
        let (code, out, err) = run(&format!(
            "cd /; $0 migrate $1 --output {name} --force | cat"
        ));
        assert_eq!((code, out.contains("tproxies:")), (Some(0), true), "{err}");
        assert!(!std::fs::exists("/-").unwrap());
        // Nor is a file replaced that it leads to: what is in it already stays.
        let file = world.config.with_file_name("output");
        std::fs::write(&file, "before\n").unwrap();
        let (code, _, err) = run(&format!(
            "$0 migrate $1 --output {name} --force >> $(dirname $1)/output"
        ));
        assert_eq!(code, Some(0), "{err}");
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(text.starts_with("before\n") && text.contains("tproxies:"));
    }
    // The agent would not wait for it.
    let (code, _, err) = run("$0 --config <(cat $1) check");
    assert!(err.ends_with(": it is not a regular file\n"), "{err}");
    assert_eq!(code, Some(1));
}
