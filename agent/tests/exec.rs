//! cgtproxy-exec as a process, with a systemd and an agent that only pretend: what becomes of the
//! command, and in which order things happen. That the real ones agree is shown on a booted system
//! by the crate `cgtproxy-tests`.

// clippy.toml allows these in tests, which to clippy are the functions marked as such alone.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::ffi::OsStr;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use cgtproxy_proto::agent::{
    AwaitTarget_Args, AwaitTarget_Reply, DESCRIPTION, GetStatus_Reply, INTERFACE, Target,
};
use cgtproxy_proto::message::MessageReader;
use cgtproxy_proto::service::{Fault, Identity, Service, parameters, reply, serve};
use futures_core::Stream;
use serde_json::{Value, json};
use zbus::message::Type;
use zbus::{Message, MessageStream, OwnedObjectPath, OwnedVariant};

/// What the program asked for.
#[derive(Debug, PartialEq)]
enum Asked {
    Status,
    Start { slice: String, pid: u32 },
    Await { target: String },
}

/// What the pretenders do.
#[derive(Clone)]
struct Behaviour {
    /// There is an agent.
    agent: bool,
    /// It has a helper.
    connected: bool,
    /// How systemd's job ends.
    job: &'static str,
    /// How `AwaitTarget` ends: a fault, or success.
    fault: Option<Fault>,
    /// How often there is no such control group before that.
    unseen: u32,
    /// `AwaitTarget` never ends.
    silent: bool,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            agent: true,
            connected: true,
            job: "done",
            fault: None,
            unseen: 0,
            silent: false,
        }
    }
}

/// A runtime directory with the sockets of an agent and a systemd in it.
struct Session {
    directory: tempfile::TempDir,
    asked: Arc<Mutex<Vec<Asked>>>,
    /// `AwaitTarget` ends once this says so.
    release: Option<Sender<()>>,
    /// Says that `AwaitTarget` was called.
    awaited: Receiver<()>,
}

impl Session {
    fn new(behaviour: Behaviour) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().to_owned();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (release, released) = channel();
        let (say_awaited, awaited) = channel();
        let (say_ready, ready) = channel();
        let pretender = Pretender {
            behaviour,
            asked: Arc::clone(&asked),
            released: Arc::new(Mutex::new(released)),
            awaited: say_awaited,
        };
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                std::fs::create_dir(path.join("systemd")).unwrap();
                std::fs::create_dir(path.join("cgtproxy")).unwrap();
                let systemd = tokio::net::UnixListener::bind(path.join("systemd/private")).unwrap();
                let agent = pretender
                    .behaviour
                    .agent
                    .then(|| tokio::net::UnixListener::bind(path.join("cgtproxy/agent.sock")));
                say_ready.send(()).unwrap();
                if let Some(agent) = agent {
                    tokio::spawn(pretender.clone().agent(agent.unwrap()));
                }
                pretender.systemd(systemd).await;
            });
        });
        ready.recv().unwrap();
        Self {
            directory,
            asked,
            release: Some(release),
            awaited,
        }
    }

    /// The program, with the arguments given.
    fn command<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        self.wrapped("env", ["--"], args)
    }

    /// The program, run by another one.
    fn wrapped<S: AsRef<OsStr>>(
        &self,
        wrapper: &str,
        wrapper_args: impl IntoIterator<Item = &'static str>,
        args: impl IntoIterator<Item = S>,
    ) -> Command {
        let mut command = Command::new(wrapper);
        command
            .args(wrapper_args)
            .arg(env!("CARGO_BIN_EXE_cgtproxy-exec"))
            .args(args)
            .stdin(Stdio::null())
            .env("XDG_RUNTIME_DIR", self.directory.path())
            .env("DBUS_SESSION_BUS_ADDRESS", "unix:path=/nonexistent");
        command
    }

    /// Runs the program, with nothing that keeps the agent from answering.
    fn run<S: AsRef<OsStr>>(&mut self, args: impl IntoIterator<Item = S>) -> Output {
        self.release = None;
        self.command(args).output().unwrap()
    }

    fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

#[derive(Clone)]
struct Pretender {
    behaviour: Behaviour,
    asked: Arc<Mutex<Vec<Asked>>>,
    released: Arc<Mutex<Receiver<()>>>,
    awaited: Sender<()>,
}

impl Pretender {
    fn note(&self, asked: Asked) {
        self.asked.lock().unwrap().push(asked);
    }

    async fn agent(self, listener: tokio::net::UnixListener) {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let mut service = self.clone();
            tokio::spawn(async move {
                let (read, mut write) = stream.into_split();
                let _ = serve(
                    &mut MessageReader::new(read, 10_000),
                    &mut write,
                    &mut service,
                )
                .await;
            });
        }
    }

    async fn systemd(self, listener: tokio::net::UnixListener) {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(self.clone().manager(stream));
        }
    }

    /// The part of systemd's D-Bus interface that the program needs.
    async fn manager(self, stream: tokio::net::UnixStream) {
        let connection = zbus::connection::Builder::unix_stream(stream.into_std().unwrap())
            .server(zbus::Guid::generate())
            .p2p()
            .build()
            .await
            .unwrap();
        let mut calls = MessageStream::from(&connection);
        while let Some(Ok(call)) = next(&mut calls).await {
            if call.message_type() != Type::MethodCall {
                continue;
            }
            let method = call.header().member().unwrap().to_string();
            match &*method {
                "Subscribe" => connection.reply(&call.header(), &()).await.unwrap(),
                "StartTransientUnit" => {
                    let scope = self.start(&call);
                    let job = |id: u32| -> OwnedObjectPath {
                        let path = format!("/org/freedesktop/systemd1/job/{id}");
                        path.try_into().unwrap()
                    };
                    connection.reply(&call.header(), &job(7)).await.unwrap();
                    // The end of another job comes first, and is none of the program's business.
                    for (id, result) in [(6, "failed"), (7, self.behaviour.job)] {
                        connection
                            .emit_signal(
                                None::<&str>,
                                "/org/freedesktop/systemd1",
                                "org.freedesktop.systemd1.Manager",
                                "JobRemoved",
                                &(id, job(id), &*scope, result),
                            )
                            .await
                            .unwrap();
                    }
                }
                _ => panic!("{method}"),
            }
        }
    }

    /// Notes that a scope is to be started, and returns its name.
    fn start(&self, call: &Message) -> String {
        type Properties = Vec<(String, OwnedVariant)>;
        let body = call.body();
        let (scope, mode, properties, others): (
            String,
            String,
            Properties,
            Vec<(String, Properties)>,
        ) = body.deserialize().unwrap();
        assert_eq!((&*mode, others.len()), ("fail", 0));
        assert!(scope.starts_with("cgtproxy-exec-"), "{scope}");
        assert!(scope.ends_with(".scope"), "{scope}");
        let property = |name| {
            let mut all = properties.iter();
            all.find(|(n, _)| n == name).unwrap().1.try_clone().unwrap()
        };
        assert_eq!(
            String::try_from(property("CollectMode")).unwrap(),
            "inactive-or-failed"
        );
        let pids = Vec::<u32>::try_from(property("PIDs")).unwrap();
        assert_eq!(pids.len(), 1);
        self.note(Asked::Start {
            slice: property("Slice").try_into().unwrap(),
            pid: pids[0],
        });
        scope
    }
}

async fn next<S: Stream + Unpin>(stream: &mut S) -> Option<S::Item> {
    std::future::poll_fn(|context| std::pin::Pin::new(&mut *stream).poll_next(context)).await
}

impl Service for Pretender {
    const IDENTITY: Identity = Identity {
        product: "pretender",
        version: "0",
        interface: INTERFACE,
        description: DESCRIPTION,
    };

    async fn call(&mut self, method: &str, arguments: Value) -> Result<Value, Fault> {
        let target = |name: &str, port| Target {
            name: name.into(),
            port,
            controlGroups: 0,
        };
        match method {
            "GetStatus" => {
                self.note(Asked::Status);
                reply(GetStatus_Reply {
                    version: "0".into(),
                    connected: self.behaviour.connected,
                    problem: (!self.behaviour.connected).then(|| "no such socket".into()),
                    generation: 1,
                    config: None,
                    configError: None,
                    targets: vec![
                        target("direct", None),
                        target("drop", None),
                        target("drop-all", None),
                        target("mihomo", Some(7890)),
                        target("my-proxy", Some(7891)),
                    ],
                    controlGroups: Vec::new(),
                })
            }
            "AwaitTarget" => {
                let AwaitTarget_Args {
                    controlGroup,
                    target,
                } = parameters(arguments)?;
                if self.behaviour.silent {
                    std::future::pending::<()>().await;
                }
                if self.behaviour.unseen > 0 {
                    self.behaviour.unseen -= 1;
                    let parameters = json!({ "controlGroup": controlGroup });
                    return Err(Fault::new(INTERFACE, "ControlGroupNotFound", parameters));
                }
                assert!(controlGroup.starts_with('/'), "{controlGroup}");
                self.note(Asked::Await { target });
                let _ = self.awaited.send(());
                let released = Arc::clone(&self.released);
                // Ends as well when the test lets go of its end.
                let wait = move || released.lock().unwrap().recv().is_ok();
                tokio::task::spawn_blocking(wait).await.unwrap();
                match self.behaviour.fault.clone() {
                    Some(fault) => Err(fault),
                    None => reply(AwaitTarget_Reply {}),
                }
            }
            _ => Err(Fault::method_not_found(method)),
        }
    }

    fn message_too_large(_: usize) -> Fault {
        Fault::permission_denied()
    }
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
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
    let mark = session.directory.path().join("ran");
    let mut child = session
        .command([OsStr::new("mihomo"), "touch".as_ref(), mark.as_ref()])
        .spawn()
        .unwrap();
    session.awaited.recv().unwrap();
    // Nothing tells when a program has had the time to do what it must not do.
    thread::sleep(Duration::from_millis(100));
    assert!(!mark.exists());
    session.release = None;
    assert!(child.wait().unwrap().success());
    assert!(mark.exists());
    assert_eq!(
        session.asked(),
        [
            Asked::Status,
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
}

#[test]
fn without_an_agent_it_says_what_to_do() {
    let mut session = Session::new(Behaviour {
        agent: false,
        ..Behaviour::default()
    });
    let output = session.run(["mihomo", "echo", "ran"]);
    assert_refused(
        &output,
        125,
        &[
            "not running",
            "systemctl --user enable --now cgtproxy-agent",
            "--no-wait",
        ],
    );
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

    std::fs::remove_file(session.directory.path().join("systemd/private")).unwrap();
    let output = session.run(["--no-wait", "mihomo", "echo", "ran"]);
    assert_refused(&output, 125, &["systemd user manager", "/nonexistent"]);
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
            "not connected",
            "no such socket",
            "cgtproxy-helper.socket",
            "--no-wait",
        ],
    );
    assert_eq!(session.asked(), [Asked::Status], "nothing was moved");
}

#[test]
fn a_wrong_target_lists_the_right_ones() {
    let mut session = Session::new(Behaviour::default());
    for target in ["mihom", "drop-all", "../x", ""] {
        let output = session.run([target, "echo", "ran"]);
        assert_refused(&output, 125, &["direct, drop, proxy, mihomo, my-proxy"]);
        assert_eq!(session.asked(), [Asked::Status], "nothing was moved");
    }
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
fn another_process_is_moved_without_being_touched() {
    let mut session = Session::new(Behaviour::default());
    let mut other = Command::new("sleep").arg("1000").spawn().unwrap();
    let pid = other.id().to_string();
    let output = session.run(["--pid", &pid, "mihomo"]);
    assert_eq!(output.status.code(), Some(0));
    assert_eq!((stdout(&output), stderr(&output)), Default::default());
    assert_eq!(other.try_wait().unwrap(), None);
    assert_eq!(
        session.asked()[1],
        Asked::Start {
            slice: "cgtproxy-mihomo.slice".into(),
            pid: other.id(),
        }
    );
    other.kill().unwrap();
    other.wait().unwrap();
    let output = session.run(["--pid", &pid, "mihomo"]);
    assert_refused(&output, 125, &["control group of process", &pid]);
}

#[test]
fn says_that_open_sockets_stay_behind() {
    let mut session = Session::new(Behaviour::default());
    let (socket, _other_end) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut other = Command::new("sleep")
        .arg("1000")
        .stdin(std::os::fd::OwnedFd::from(socket))
        .spawn()
        .unwrap();
    let output = session.run(["--pid", &other.id().to_string(), "mihomo"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(stderr(&output).contains("sockets open"));
    other.kill().unwrap();
    other.wait().unwrap();
}

#[test]
fn lists_targets_for_completion() {
    let mut session = Session::new(Behaviour::default());
    let output = session.run(["--list"]);
    assert_eq!(stdout(&output), "direct\ndrop\nproxy\nmihomo\nmy-proxy\n");
    assert_eq!(session.asked(), [Asked::Status]);
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
