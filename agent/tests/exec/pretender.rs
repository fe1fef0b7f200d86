//! A systemd and an agent that only pretend, in a runtime directory of their own.

use std::ffi::OsStr;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use cgtproxy_proto::agent::{
    AwaitTarget_Args, AwaitTarget_Reply, DESCRIPTION, GetTargets_Reply, INTERFACE,
};
use cgtproxy_proto::path::CGROUP2_MOUNTS;
use cgtproxy_proto::service::{
    Answer, Fault, Identity, Parameters, Service, parameters, reply, serve_stream,
};
use futures_core::Stream;
use serde_json::json;
use zbus::message::Type;
use zbus::{Message, MessageStream, OwnedObjectPath, OwnedVariant};

/// What the program asked for.
#[derive(Debug, PartialEq)]
pub(crate) enum Asked {
    Targets,
    Start { slice: String, pid: u32 },
    Await { target: String },
}

/// What the pretenders do.
#[derive(Clone)]
pub(crate) struct Behaviour {
    /// There is an agent.
    pub(crate) agent: bool,
    /// It listens only after this time.
    pub(crate) late: Duration,
    /// How many callers it hangs up on, as one does that ends.
    pub(crate) hangs_up: u32,
    /// It has a helper.
    pub(crate) connected: bool,
    /// How systemd's job ends.
    pub(crate) job: &'static str,
    /// How `AwaitTarget` ends: a fault, or success.
    pub(crate) fault: Option<Fault>,
    /// How often there is no such control group before that.
    pub(crate) unseen: u32,
    /// `AwaitTarget` never ends.
    pub(crate) silent: bool,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            agent: true,
            late: Duration::ZERO,
            hangs_up: 0,
            connected: true,
            job: "done",
            fault: None,
            unseen: 0,
            silent: false,
        }
    }
}

/// A runtime directory with the sockets of an agent and of a bus with nobody but a systemd on it.
pub(crate) struct Session {
    pub(crate) directory: tempfile::TempDir,
    asked: Arc<Mutex<Vec<Asked>>>,
    scopes: Arc<Mutex<Vec<Scope>>>,
    /// `AwaitTarget` ends once this says so.
    pub(crate) release: Option<Sender<()>>,
    /// Says that `AwaitTarget` was called.
    pub(crate) awaited: Receiver<()>,
}

impl Session {
    pub(crate) fn new(behaviour: Behaviour) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().to_owned();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let scopes = Arc::default();
        let (release, released) = channel();
        let (say_awaited, awaited) = channel();
        let (say_ready, ready) = channel();
        let pretender = Pretender {
            behaviour,
            asked: Arc::clone(&asked),
            scopes: Arc::clone(&scopes),
            released: Arc::new(Mutex::new(released)),
            awaited: say_awaited,
        };
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                std::fs::create_dir(path.join("cgtproxy")).unwrap();
                let systemd = tokio::net::UnixListener::bind(path.join("bus")).unwrap();
                let bind = move || tokio::net::UnixListener::bind(path.join("cgtproxy/agent.sock"));
                let Behaviour { agent, late, .. } = pretender.behaviour;
                let now = (agent && late.is_zero()).then(&bind);
                say_ready.send(()).unwrap();
                let pretends = pretender.clone();
                if agent {
                    tokio::spawn(async move {
                        tokio::time::sleep(late).await;
                        pretends.agent(now.unwrap_or_else(bind).unwrap()).await;
                    });
                }
                pretender.systemd(systemd).await;
            });
        });
        ready.recv().unwrap();
        Self {
            directory,
            asked,
            scopes,
            release: Some(release),
            awaited,
        }
    }

    /// The program, with the arguments given.
    pub(crate) fn command<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        self.wrapped("env", ["--"], args)
    }

    /// The program, run by another one.
    pub(crate) fn wrapped<S: AsRef<OsStr>>(
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
    pub(crate) fn run<S: AsRef<OsStr>>(&mut self, args: impl IntoIterator<Item = S>) -> Output {
        self.release = None;
        self.command(args).output().unwrap()
    }

    /// What it asked for, by the number of the process that is moved.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

/// A control group beside this process, with what is in it for as long as it is there.
struct Scope(PathBuf);

impl Scope {
    /// A process that is gone is in none.
    fn with(name: &str, pid: u32) -> Self {
        let mounts = CGROUP2_MOUNTS.map(Path::new);
        let mount = mounts
            .iter()
            .find(|at| at.join("cgroup.controllers").exists());
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let own = own.lines().find_map(|line| line.strip_prefix("0::/"));
        let directory = mount.unwrap().join(own.unwrap()).join(name);
        fs::create_dir(&directory).unwrap();
        let _ = fs::write(directory.join("cgroup.procs"), pid.to_string());
        Self(directory)
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        let _ = fs::write(self.0.join("cgroup.kill"), "1");
        // Until the last one has ended.
        while fs::remove_dir(&self.0).is_err_and(|error| error.kind() == ErrorKind::ResourceBusy) {
            thread::yield_now();
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // The pretender has them as well, and never ends.
        self.scopes.lock().unwrap().clear();
    }
}

#[derive(Clone)]
struct Pretender {
    behaviour: Behaviour,
    asked: Arc<Mutex<Vec<Asked>>>,
    scopes: Arc<Mutex<Vec<Scope>>>,
    released: Arc<Mutex<Receiver<()>>>,
    awaited: Sender<()>,
}

impl Pretender {
    fn note(&self, asked: Asked) {
        self.asked.lock().unwrap().push(asked);
    }

    async fn agent(mut self, listener: tokio::net::UnixListener) {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            if self.behaviour.hangs_up > 0 {
                self.behaviour.hangs_up -= 1;
                continue;
            }
            let mut service = self.clone();
            tokio::spawn(async move {
                let _ = serve_stream(stream, 10_000, &mut service).await;
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
        let caller = stream.peer_cred().unwrap().pid().unwrap();
        let caller = u32::try_from(caller).unwrap();
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
                // What every client of a bus asks of it.
                "Hello" => connection.reply(&call.header(), &":1.7").await.unwrap(),
                "GetConnectionUnixProcessID" => {
                    connection.reply(&call.header(), &caller).await.unwrap();
                }
                "AddMatch" | "RemoveMatch" | "Subscribe" => {
                    connection.reply(&call.header(), &()).await.unwrap()
                }
                "StartTransientUnit" => {
                    let scope = self.start(&call, caller);
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

    /// Notes that a scope is to be started, moves the process there if that is what becomes of the job, and returns
    /// the scope's name.
    fn start(&self, call: &Message, caller: u32) -> String {
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
        // The caller itself, whatever its PID namespace.
        let pid = if pids[0] == 0 { caller } else { pids[0] };
        if self.behaviour.job == "done" {
            let there = Scope::with(&scope, pid);
            self.scopes.lock().unwrap().push(there);
        }
        self.note(Asked::Start {
            slice: property("Slice").try_into().unwrap(),
            pid,
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

    async fn call(&mut self, method: &str, arguments: Parameters<'_>) -> Result<Answer, Fault> {
        match method {
            "GetTargets" => {
                self.note(Asked::Targets);
                let targets = ["direct", "drop", "proxy", "mihomo", "my-proxy"];
                reply(GetTargets_Reply {
                    targets: targets.map(str::to_owned).into(),
                    problem: (!self.behaviour.connected).then(|| "no such socket".into()),
                    configError: None,
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
}

pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}
