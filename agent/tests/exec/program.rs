//! What becomes of the command, and in which order things happen.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use cgtproxy_proto::agent::INTERFACE;
use cgtproxy_proto::service::Fault;
use serde_json::json;

use crate::pretender::{Asked, Behaviour, Session, stderr, stdout};

/// A process to be moved, which is killed whatever becomes of the test.
struct Sleeping(Child);

impl Sleeping {
    fn new(mut sleep: Command) -> Self {
        Self(sleep.arg("1000").spawn().unwrap())
    }
}

impl Drop for Sleeping {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The output is one line that says all of `parts`, and the status is `code`.
#[track_caller]
fn assert_refused(output: &Output, code: i32, parts: &[&str]) {
    let said = stderr(output);
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(said.starts_with("cgtproxy-exec: "), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    for part in parts {
        assert!(said.contains(part), "{part:?} is not in {said:?}");
    }
    assert_eq!(stdout(output), "");
}

#[test]
fn starts_the_command_only_when_the_verdict_is_in_the_kernel() {
    let mut session = Session::new(Behaviour::default());
    let released = session.directory.path().join("released");
    let command = ["mihomo", "test", "-e"].map(OsStr::new);
    let mut child = session
        .command([&command[..], &[released.as_ref()]].concat())
        .spawn()
        .unwrap();
    session.awaited.recv().unwrap();
    // It sleeps as itself: one that did not wait would be another program by now, or have ended.
    let stat = format!("/proc/{}/stat", child.id());
    let deadline = Instant::now() + Duration::from_secs(60);
    while !std::fs::read_to_string(&stat)
        .unwrap()
        .contains("(cgtproxy-exec) S")
    {
        assert!(Instant::now() < deadline, "it did not wait");
        std::thread::yield_now();
    }
    std::fs::write(&released, "").unwrap();
    session.release = None;
    assert!(child.wait().unwrap().success());
    assert_eq!(
        session.asked(),
        [
            Asked::Targets,
            Asked::Start {
                slice: "cgtproxy-mihomo.slice".into(),
                pid: child.id(),
            },
            Asked::Await {
                target: "mihomo".into()
            },
        ]
    );
}

#[test]
fn every_kind_of_target_has_its_slice() {
    let mut session = Session::new(Behaviour::default());
    for target in ["direct", "drop", "proxy", "mihomo", "my-proxy"] {
        let output = session.run([target, "true"]);
        assert!(output.status.success(), "{target}: {}", stderr(&output));
        let asked = session.asked();
        let Asked::Start { slice, .. } = &asked[1] else {
            panic!("{asked:?}");
        };
        assert_eq!(*slice, format!("cgtproxy-{target}.slice"));
    }
}

#[test]
fn the_command_is_this_process() {
    let mut session = Session::new(Behaviour::default());
    session.release = None;
    let child = session
        .command(["direct", "sh", "-c", "echo $$"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = child.id();
    let output = child.wait_with_output().unwrap();
    assert_eq!(stdout(&output), format!("{pid}\n"));
}

#[test]
fn arguments_environment_and_directory_arrive_as_they_are() {
    let mut session = Session::new(Behaviour::default());
    session.release = None;
    let script = "pwd; printf '[%s]' \"$@\"";
    let output = session
        .command([
            "direct",
            "sh",
            "-c",
            script,
            "sh",
            "a b",
            "",
            "--no-wait",
            "--",
            "*",
            "ä\n",
        ])
        .current_dir("/usr/bin")
        .output()
        .unwrap();
    assert_eq!(stdout(&output), "/usr/bin\n[a b][][--no-wait][--][*][ä\n]");

    let environment = |mut command: Command| {
        command.env("EMPTY", "").env("SPACE", "a b");
        stdout(&command.output().unwrap())
    };
    let mut bare = Command::new("env");
    bare.arg("-0")
        .env("XDG_RUNTIME_DIR", session.directory.path())
        .env("DBUS_SESSION_BUS_ADDRESS", "unix:path=/nonexistent");
    assert_eq!(
        environment(session.command(["direct", "env", "-0"])),
        environment(bare)
    );
}

#[test]
fn exit_status_and_signal_are_the_commands_own() {
    let mut session = Session::new(Behaviour::default());
    for code in [0, 1, 7, 125, 255] {
        let output = session.run(["direct", "sh", "-c", &format!("exit {code}")]);
        assert_eq!(output.status.code(), Some(code));
        assert_eq!(stderr(&output), "");
    }
    let output = session.run(["direct", "sh", "-c", "kill -TERM $$"]);
    assert_eq!(output.status.signal(), Some(15));
}

#[test]
fn a_command_that_cannot_run_is_reported_as_env_does() {
    let mut session = Session::new(Behaviour::default());
    let output = session.run(["direct", "cgtproxy-no-such-command", "x"]);
    assert_refused(&output, 127, &["cgtproxy-no-such-command", "No such file"]);
    let output = session.run(["direct", "/etc/passwd"]);
    assert_refused(&output, 126, &["/etc/passwd", "Permission denied"]);
    let output = session.run(["direct", "/"]);
    assert_refused(&output, 126, &["Permission denied"]);
    let output = session.run(["direct", ""]);
    assert_refused(&output, 127, &["No such file"]);
}

/// What `command` says if `wrapper` runs it, through the program and without it.
fn both_ways(
    wrapper: &str,
    wrapper_args: &[&'static str],
    command: &[&'static str],
) -> (String, String) {
    let mut session = Session::new(Behaviour::default());
    session.release = None;
    let through = session
        .wrapped(
            wrapper,
            wrapper_args.iter().copied(),
            ["direct"].iter().chain(command),
        )
        .output()
        .unwrap();
    let without = Command::new(wrapper)
        .args(wrapper_args)
        .args(command)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(through.status.success(), "{}", stderr(&through));
    (stdout(&through), stdout(&without))
}

#[test]
fn the_commands_descriptors_are_the_callers() {
    let list =
        "for fd in 0 1 2 3 4 5 6 7 8 9 10 11 12; do test -e /proc/$$/fd/$fd && echo $fd; done; :";
    let caller = "exec 9</dev/null; exec \"$@\"";
    let (through, without) = both_ways("sh", &["-c", caller, "sh"], &["sh", "-c", list]);
    assert_eq!(through, without);
    assert!(through.lines().any(|fd| fd == "9"), "{through}");
}

/// The line of proc(5)'s `status` that begins with `name`, as a set of signals.
fn signals(status: &str, name: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    u64::from_str_radix(line.unwrap().trim_start_matches(':').trim(), 16).unwrap()
}

#[test]
fn signals_are_as_the_caller_has_them() {
    let (through, without) = both_ways(
        "env",
        &["--ignore-signal=HUP", "--block-signal=USR1"],
        &["cat", "/proc/self/status"],
    );
    for set in ["SigIgn", "SigBlk", "SigCgt"] {
        assert_eq!(signals(&through, set), signals(&without, set), "{set}");
    }
    let (hangup, user) = (1 << 0, 1 << 9);
    assert_eq!(signals(&through, "SigIgn") & hangup, hangup);
    assert_eq!(signals(&through, "SigBlk"), user);
}

#[test]
fn sigpipe_ends_the_command() {
    let mut session = Session::new(Behaviour::default());
    session.release = None;
    let mut child = session
        .command(["direct", "yes"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().signal(), Some(13));
    // And what the command runs, whether the caller ignores the signal or not.
    let pipe = "yes | head -n 1; echo ${PIPESTATUS[@]}";
    for ignored in ["--default-signal=PIPE", "--ignore-signal=PIPE"] {
        let output = session
            .wrapped("env", [ignored], ["direct", "bash", "-c", pipe])
            .output()
            .unwrap();
        assert_eq!(
            stdout(&output),
            "y\n141 0\n",
            "{ignored}: {}",
            stderr(&output)
        );
    }
}

#[test]
fn without_an_agent_it_says_what_to_do() {
    let mut session = Session::new(Behaviour {
        agent: false,
        ..Behaviour::default()
    });
    session.release = None;
    let run = |user| {
        let arguments = ["mihomo", "echo", "ran"];
        let mut command = session.wrapped("unshare", ["--user", user], arguments);
        command.output().unwrap()
    };
    assert_refused(
        &run("--map-user=1000"),
        125,
        &[
            "not running",
            "systemctl --user enable --now cgtproxy-agent",
            "--no-wait",
        ],
    );
    // An agent of root's would be the machine's.
    let output = run("--map-root-user");
    assert_refused(&output, 125, &["as a user", "cgtproxy-exec TARGET sudo"]);
    assert!(!stderr(&output).contains("enable --now"));
    assert_eq!(session.asked(), []);
}

#[test]
fn a_relative_runtime_directory_is_not_looked_into() {
    let mut session = Session::new(Behaviour::default());
    let mut command = session.command(["mihomo", "true"]);
    command
        .env("XDG_RUNTIME_DIR", ".")
        .current_dir(session.directory.path());
    session.release = None;
    command.status().unwrap();
    assert_eq!(session.asked(), []);
}

#[test]
fn no_wait_does_without_the_agent_but_not_without_the_slice() {
    let mut session = Session::new(Behaviour {
        agent: false,
        ..Behaviour::default()
    });
    let output = session.run(["--no-wait", "mihomo", "echo", "ran"]);
    assert_eq!(stdout(&output), "ran\n");
    let [Asked::Start { slice, .. }] = &session.asked()[..] else {
        panic!("the agent was asked");
    };
    assert_eq!(slice, "cgtproxy-mihomo.slice");

    std::fs::remove_file(session.directory.path().join("bus")).unwrap();
    session.release = None;
    let run = |user| {
        let arguments = ["--no-wait", "mihomo", "echo", "ran"];
        let mut command = session.wrapped("unshare", ["--user", user], arguments);
        command.output().unwrap()
    };
    let output = run("--map-user=1000");
    assert_refused(&output, 125, &["systemd user manager", "/nonexistent"]);
    // Root most often is so in another user's session.
    let output = run("--map-root-user");
    assert_refused(&output, 125, &["as a user", "cgtproxy-exec TARGET sudo"]);
}

#[test]
fn without_a_helper_it_says_so() {
    let mut session = Session::new(Behaviour {
        connected: false,
        ..Behaviour::default()
    });
    let output = session.run(["mihomo", "echo", "ran"]);
    assert_refused(
        &output,
        125,
        &[
            "not in force",
            "no such socket",
            "cgtproxy-agent status",
            "--no-wait",
        ],
    );
    // More than once: the helper may be just starting.
    let asked = session.asked();
    assert!(asked.len() > 1, "{asked:?}");
    let moved = asked.iter().any(|asked| *asked != Asked::Targets);
    assert!(!moved, "nothing was moved: {asked:?}");
}

#[test]
fn a_wrong_target_lists_the_right_ones() {
    let mut session = Session::new(Behaviour::default());
    for target in ["mihom", "drop-all", "../x", ""] {
        for options in [&[][..], &["--no-wait"]] {
            let output = session.run([options, &[target, "echo", "ran"]].concat());
            assert_refused(&output, 125, &["direct, drop, proxy, mihomo, my-proxy"]);
            assert_eq!(session.asked(), [Asked::Targets], "nothing was moved");
        }
    }
}

#[test]
fn no_slice_is_named_after_what_is_no_name() {
    let mut session = Session::new(Behaviour {
        agent: false,
        ..Behaviour::default()
    });
    let output = session.run(["--no-wait", "../x", "echo", "ran"]);
    assert_refused(&output, 125, &["'../x' is no target"]);
    let output = session.run(["--no-wait", "a--b", "echo", "ran"]);
    assert_refused(&output, 125, &["no slice", "'a--b'"]);
    assert_eq!(session.asked(), []);
}

#[test]
fn what_the_agent_says_after_the_move_counts() {
    for (error, parameters, part) in [
        (
            "OtherTarget",
            json!({ "controlGroup": "/x", "target": "direct" }),
            "exec-slices: false",
        ),
        (
            "NotConnected",
            json!({ "problem": "went away" }),
            "went away",
        ),
        (
            "UnknownTarget",
            json!({ "name": "mihomo", "known": ["direct", "drop"] }),
            "known: direct, drop",
        ),
    ] {
        let mut session = Session::new(Behaviour {
            fault: Some(Fault::new(INTERFACE, error, parameters)),
            ..Behaviour::default()
        });
        let output = session.run(["mihomo", "echo", "ran"]);
        assert_refused(&output, 125, &[part]);
    }
}

#[test]
fn a_control_group_that_the_agent_does_not_know_yet_is_asked_for_again() {
    let mut session = Session::new(Behaviour {
        unseen: 3,
        ..Behaviour::default()
    });
    let output = session.run(["mihomo", "echo", "ran"]);
    assert_eq!(stdout(&output), "ran\n", "{}", stderr(&output));
}

#[test]
fn an_agent_that_does_not_answer_is_not_waited_for_forever() {
    let mut session = Session::new(Behaviour {
        silent: true,
        ..Behaviour::default()
    });
    let output = session.run(["mihomo", "echo", "ran"]);
    assert_refused(&output, 125, &["within 5 seconds", "cgtproxy-agent status"]);
}

/// A session with a listener in an agent's place.
fn listening() -> (Session, UnixListener) {
    let session = Session::new(Behaviour {
        agent: false,
        ..Behaviour::default()
    });
    let socket = session.directory.path().join("cgtproxy/agent.sock");
    (session, UnixListener::bind(socket).unwrap())
}

/// A session in which an agent's place is taken by whoever says this, one message to each connection, whatever is asked.
fn answering<const N: usize>(answers: [&'static str; N]) -> Session {
    let (session, listener) = listening();
    std::thread::spawn(move || {
        for answer in answers {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(format!("{answer}\0").as_bytes()).unwrap();
        }
    });
    session
}

#[test]
fn an_agent_that_does_not_say_which_targets_there_are_is_not_waited_for_forever() {
    let (mut session, _silent) = listening();
    let output = session.run(["--list"]);
    let said = "cgtproxy-exec: cgtproxy-agent gave no answer within 5 seconds\n";
    assert_eq!((output.status.code(), &*stderr(&output)), (Some(125), said));
}

#[test]
fn an_agent_of_another_version_is_to_be_restarted() {
    let mut session = answering([
        r#"{"error":"org.varlink.service.MethodNotFound","parameters":{"method":"x"}}"#,
    ]);
    let output = session.run(["mihomo", "echo", "ran"]);
    assert_refused(
        &output,
        125,
        &["another version", "systemctl --user try-restart"],
    );
}

/// Others that are done make room.
#[test]
fn an_agent_with_as_many_programs_as_it_takes_is_asked_again() {
    let fault = r#"{"error":"org.cgtproxy.Agent.TooManyConnections","parameters":{"limit":64}}"#;
    let targets = r#"{"parameters":{"targets":["direct","drop"]}}"#;
    let mut session = answering([fault, fault, fault, targets]);
    let output = session.run(["--list"]);
    assert_eq!(
        (&*stdout(&output), &*stderr(&output)),
        ("direct\ndrop\n", "")
    );
}

#[test]
fn a_scope_that_does_not_start_is_reported() {
    let mut session = Session::new(Behaviour {
        job: "failed",
        ..Behaviour::default()
    });
    let output = session.run(["mihomo", "echo", "ran"]);
    assert_refused(&output, 125, &["could not move this process", "'failed'"]);
}

#[test]
fn an_agent_that_is_restarted_is_waited_for() {
    for (late, hangs_up) in [(50, 0), (0, 1), (50, 1)] {
        let mut session = Session::new(Behaviour {
            late: Duration::from_millis(late),
            hangs_up,
            ..Behaviour::default()
        });
        let output = session.run(["mihomo", "echo", "ran"]);
        assert_eq!(stdout(&output), "ran\n", "{}", stderr(&output));
    }
}

#[test]
fn says_that_another_users_process_can_not_be_moved() {
    let mut session = Session::new(Behaviour {
        job: "failed",
        ..Behaviour::default()
    });
    // Init is root's, who is somebody else mostly.
    let others = rustix::process::geteuid().is_root().then(|| {
        let mut sleep = Command::new("setpriv");
        sleep.args(["--reuid=65534", "--clear-groups", "sleep"]);
        Sleeping::new(sleep)
    });
    let pid = others.as_ref().map_or(1, |others| others.0.id());
    let name = format!("/proc/{pid}/comm");
    let has_become_that_users = || {
        (0..10_000).any(|_| {
            std::thread::sleep(Duration::from_millis(1));
            std::fs::read_to_string(&name).unwrap() == "sleep\n"
        })
    };
    assert!(others.is_none() || has_become_that_users());
    let output = session.run(["--pid", &pid.to_string(), "mihomo"]);
    assert_refused(
        &output,
        125,
        &[&format!("process {pid}, which is another user's")],
    );
}

#[test]
fn another_process_is_moved_without_being_touched() {
    let mut session = Session::new(Behaviour::default());
    let mut other = Sleeping::new(Command::new("sleep"));
    let pid = other.0.id().to_string();
    let output = session.run(["--pid", &pid, "mihomo"]);
    assert_eq!(output.status.code(), Some(0));
    assert_eq!((stdout(&output), stderr(&output)), Default::default());
    assert_eq!(other.0.try_wait().unwrap(), None);
    assert_eq!(
        session.asked()[1],
        Asked::Start {
            slice: "cgtproxy-mihomo.slice".into(),
            pid: other.0.id(),
        }
    );
    drop(other);
    let output = session.run(["--pid", &pid, "mihomo"]);
    assert_refused(&output, 125, &["control group of process", &pid]);
}

#[test]
fn says_that_open_sockets_stay_behind() {
    let mut session = Session::new(Behaviour::default());
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut sleep = Command::new("sleep");
    sleep.stdin(std::os::fd::OwnedFd::from(socket));
    let other = Sleeping::new(sleep);
    let output = session.run(["--pid", &other.0.id().to_string(), "mihomo"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(stderr(&output).contains("sockets open"));
}

#[test]
fn lists_targets_for_completion() {
    let mut session = Session::new(Behaviour::default());
    let output = session.run(["--list"]);
    assert_eq!(stdout(&output), "direct\ndrop\nproxy\nmihomo\nmy-proxy\n");
    assert_eq!(session.asked(), [Asked::Targets]);
}

/// Without an agent nobody knows them.
#[test]
fn who_lists_targets_is_not_told_to_do_without_an_agent() {
    let mut session = Session::new(Behaviour {
        agent: false,
        ..Behaviour::default()
    });
    session.release = None;
    let mut command = session.wrapped("unshare", ["--user", "--map-user=1000"], ["--list"]);
    let output = command.output().unwrap();
    assert_refused(
        &output,
        125,
        &["not running", "enable --now cgtproxy-agent"],
    );
    let said = stderr(&output);
    assert!(!said.contains("--no-wait"), "{said}");
}

#[test]
fn a_reader_of_the_list_that_is_gone_is_no_error() {
    let session = Session::new(Behaviour::default());
    let (here, there) = std::os::unix::net::UnixStream::pair().unwrap();
    drop(there);
    let mut command = session.command(["--list"]);
    let output = command.stdout(std::os::fd::OwnedFd::from(here));
    let output = output.stderr(Stdio::piped()).output().unwrap();
    assert_eq!(
        (output.status.code(), stderr(&output).as_str()),
        (Some(0), "")
    );
}

#[test]
fn a_wrong_command_line_is_its_own_failure() {
    let session = Session::new(Behaviour::default());
    let status = |args: &[&str]| session.command(args).output().unwrap().status.code();
    assert_eq!(status(&[]), Some(125));
    assert_eq!(status(&["mihomo"]), Some(125));
    assert_eq!(status(&["--nonsense", "mihomo", "true"]), Some(125));
    assert_eq!(status(&["--help"]), Some(0));
    assert_eq!(status(&["--version"]), Some(0));
}

#[test]
fn a_help_that_can_not_be_written_is_a_failure() {
    for option in ["--version", "--help"] {
        let output = Command::new(env!("CARGO_BIN_EXE_cgtproxy-exec"))
            .arg(option)
            .stdout(File::options().write(true).open("/dev/full").unwrap())
            .output()
            .unwrap();
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(125), "{option}: {said}");
        assert!(
            said.starts_with("error: can't write the output: "),
            "{said}"
        );
    }
}
