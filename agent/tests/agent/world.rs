//! A place for one agent: control groups that are plain directories, a home, a helper that pretends.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Instant;

use cgtproxy_proto::agent::{
    ControlGroup, Explain_Args, Explain_Reply, GetStatus_Args, GetStatus_Reply, GetTargets_Args,
    GetTargets_Reply,
};
use cgtproxy_proto::client::{CallError, Client};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::fake::{Helper, PATIENCE};

/// The directories of a test.
pub(crate) struct World {
    pub(crate) helper: Helper,
    pub(crate) subtree: PathBuf,
    pub(crate) config: PathBuf,
    pub(crate) cgroups: PathBuf,
    /// What the service manager is told.
    notify: Receiver<String>,
    directory: TempDir,
    /// The prefix of the subtree from the control group root.
    pub(crate) prefix: String,
}

/// A running agent, killed in the end.
pub(crate) struct Agent {
    pub(crate) process: Child,
    /// Its messages.
    log: Receiver<String>,
    pub(crate) said: Vec<String>,
    runtime: Runtime,
    socket: PathBuf,
}

/// An ordinary user: root's agent is the machine's. Where the tests run as root, the agent has a user
/// namespace of its own in which root has another number.
const USER: &str = "1000";

/// The agent as an ordinary user runs it.
fn agent_words() -> Vec<String> {
    let mut words = Vec::new();
    if rustix::process::getuid().is_root() {
        words.extend(["unshare".into(), "--user".into()]);
        words.extend([format!("--map-user={USER}"), format!("--map-group={USER}")]);
    }
    words.push(env!("CARGO_BIN_EXE_cgtproxy-agent").into());
    words
}

pub(crate) fn agent_command() -> Command {
    let words = agent_words();
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]);
    command
}

impl World {
    /// With a configuration, or without.
    pub(crate) fn new(config: &str) -> Self {
        let directory = TempDir::new().unwrap();
        let cgroups = directory.path().join("cgroup");
        Self::in_cgroups(config, directory, cgroups)
    }

    /// With control groups at `cgroups`.
    pub(crate) fn in_cgroups(config: &str, directory: TempDir, cgroups: PathBuf) -> Self {
        let uid = match rustix::process::getuid() {
            root if root.is_root() => USER.to_owned(),
            uid => uid.as_raw().to_string(),
        };
        let prefix = format!("/user.slice/user-{uid}.slice/user@{uid}.service");
        let subtree = cgroups.join(&prefix[1..]);
        std::fs::create_dir_all(&subtree).unwrap();
        let file = directory.path().join("home/cgtproxy/config.yaml");
        if !config.is_empty() {
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(&file, config).unwrap();
        }
        let notify = UnixDatagram::bind(directory.path().join("notify")).unwrap();
        // Nobody must have to wait for it to be read.
        let (sender, notifications) = channel();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length) = notify.recv(&mut buffer) {
                let message = String::from_utf8_lossy(&buffer[..length]).into_owned();
                if sender.send(message).is_err() {
                    break;
                }
            }
        });
        std::fs::create_dir(directory.path().join("run")).unwrap();
        Self {
            helper: Helper::new(&directory.path().join("helper.sock"), &subtree),
            subtree,
            config: file,
            cgroups,
            notify: notifications,
            directory,
            prefix,
        }
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    /// A command of the agent in this world.
    pub(crate) fn command(&self) -> Command {
        self.dress(agent_command())
    }

    fn dress(&self, mut command: Command) -> Command {
        command
            .env_clear()
            .env("HOME", self.path())
            .env("XDG_CONFIG_HOME", self.path().join("home"))
            .env("XDG_RUNTIME_DIR", self.path().join("run"))
            .env("CGTPROXY_SOCKET", self.path().join("helper.sock"))
            .env("NOTIFY_SOCKET", self.path().join("notify"))
            // As in a shell of a terminal that runs as a unit, whose standard error is another one.
            .env("JOURNAL_STREAM", "1:1")
            .env("CGTPROXY_LOG", "debug")
            .env("CGROUPS", &self.cgroups)
            .stdin(Stdio::null());
        command
    }

    pub(crate) fn agent(&self) -> Agent {
        let mut command = self.command();
        command.arg("--cgroup-root").arg(&self.cgroups);
        self.spawn(command)
    }

    /// An agent that a shell script starts as `"$@"`.
    pub(crate) fn agent_by(&self, mut shell: Command, script: &str) -> Agent {
        shell.args(["sh", "-c", script, "sh"]).args(agent_words());
        shell.arg("--cgroup-root").arg(&self.cgroups);
        let command = self.dress(shell);
        self.spawn(command)
    }

    fn spawn(&self, mut command: Command) -> Agent {
        let (stderr, journal) = std::io::pipe().unwrap();
        let stat = rustix::fs::fstat(&journal).unwrap();
        let process = command
            .env("JOURNAL_STREAM", format!("{}:{}", stat.st_dev, stat.st_ino))
            .stderr(journal)
            .process_group(0)
            .spawn()
            .unwrap();
        // Its end is the agent's alone.
        drop(command);
        let (sender, log) = channel();
        thread::spawn(move || {
            for line in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).into_owned();
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Agent {
            process,
            log,
            said: Vec::new(),
            runtime: tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap(),
            socket: self.path().join("run/cgtproxy/agent.sock"),
        }
    }

    /// Waits for a message to the service manager that has this line.
    pub(crate) fn notified(&self, line: &str) {
        loop {
            match self.notify.recv_timeout(PATIENCE) {
                Ok(message) if message.lines().any(|l| l.starts_with(line)) => return,
                Ok(_) => {}
                Err(_) => panic!("'{line}' never came"),
            }
        }
    }

    /// Waits until the service manager is told that this, and no more, is the status.
    pub(crate) fn status_becomes(&self, status: &str) {
        loop {
            match self.notify.recv_timeout(PATIENCE) {
                Ok(message) if message == format!("STATUS={status}") => return,
                Ok(_) => {}
                Err(_) => panic!("the status never became '{status}'"),
            }
        }
    }

    /// Whether a message with this line is there already.
    pub(crate) fn is_notified(&self, line: &str) -> bool {
        let mut messages = self.notify.try_iter();
        messages.any(|message| message.lines().any(|l| l.starts_with(line)))
    }

    /// Makes control groups.
    pub(crate) fn make(&self, paths: &[&str]) {
        for path in paths {
            std::fs::create_dir(self.subtree.join(path)).unwrap();
        }
    }

    /// Removes control groups.
    pub(crate) fn remove(&self, paths: &[&str]) {
        for path in paths {
            std::fs::remove_dir(self.subtree.join(path)).unwrap();
        }
    }

    /// Replaces the configuration as an editor does: all at once.
    pub(crate) fn write(&self, config: &str) {
        std::fs::create_dir_all(self.config.parent().unwrap()).unwrap();
        let new = self.config.with_extension("new");
        std::fs::write(&new, config).unwrap();
        std::fs::rename(new, &self.config).unwrap();
    }
}

impl Agent {
    /// Waits until it has logged a line with this text.
    pub(crate) fn says(&mut self, text: &str) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(line) = self.said.iter().find(|line| line.contains(text)) {
                return line.clone();
            }
            let left = end.saturating_duration_since(Instant::now());
            match self.log.recv_timeout(left) {
                Ok(line) => self.said.push(line),
                Err(_) => panic!("'{text}' was never said: {:#?}", self.said),
            }
        }
    }

    /// All lines so far that have this text.
    pub(crate) fn count(&mut self, text: &str) -> usize {
        self.said.extend(self.log.try_iter());
        self.said.iter().filter(|line| line.contains(text)).count()
    }

    /// Lets it open nothing more. Returns how many descriptors it could have.
    pub(crate) fn leave_no_descriptors(&self) -> Option<u64> {
        let numbers = || -> BTreeSet<u64> {
            let open = std::fs::read_dir(format!("/proc/{}/fd", self.process.id())).unwrap();
            let names = open.map(|fd| fd.unwrap().file_name());
            names
                .map(|n| n.to_str().unwrap().parse().unwrap())
                .collect()
        };
        // While it does something, it may have one open that is not there to stay.
        let mut open = numbers();
        for _ in 0..10 {
            thread::sleep(std::time::Duration::from_millis(20));
            let now = numbers();
            open.retain(|number| now.contains(number));
        }
        let free = (0..).find(|number| !open.contains(number));
        self.limit_descriptors(free)
    }

    /// Changes how many descriptors it may have. Returns how many it could have.
    pub(crate) fn limit_descriptors(&self, count: Option<u64>) -> Option<u64> {
        let pid = Some(Pid::from_child(&self.process));
        let maximum = getrlimit(Resource::Nofile).maximum;
        let limit = Rlimit {
            current: count,
            maximum,
        };
        prlimit(pid, Resource::Nofile, limit).unwrap().current
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.process);
        kill_process(pid, signal).unwrap();
    }

    /// Tells it to stop and waits for it.
    pub(crate) fn stop(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.process.wait().unwrap()
    }

    /// Calls one of its methods.
    pub(crate) fn call<R: serde::de::DeserializeOwned>(
        &self,
        method: &str,
        arguments: impl serde::Serialize,
    ) -> Result<R, CallError> {
        self.runtime.block_on(async {
            let mut client = Client::connect(&self.socket).await.unwrap();
            client
                .call(&format!("org.cgtproxy.Agent.{method}"), arguments)
                .await
        })
    }

    pub(crate) fn status(&self) -> GetStatus_Reply {
        self.call("GetStatus", GetStatus_Args {}).unwrap()
    }

    pub(crate) fn targets(&self) -> GetTargets_Reply {
        self.call("GetTargets", GetTargets_Args {}).unwrap()
    }

    pub(crate) fn explain(&self, name: &str) -> ControlGroup {
        let arguments = Explain_Args {
            controlGroup: name.into(),
        };
        let reply: Explain_Reply = self.call("Explain", arguments).unwrap();
        reply.controlGroup
    }

    /// Waits until the verdict of a control group is in force: the agent hears of that a little later
    /// than it is.
    pub(crate) fn in_force(&self, name: &str) -> ControlGroup {
        let end = Instant::now() + PATIENCE;
        loop {
            let group = self.explain(name);
            if group.inForce {
                return group;
            }
            assert!(Instant::now() < end, "never in force: {group:?}");
            thread::sleep(std::time::Duration::from_millis(5));
        }
    }

    /// Waits until its status is as it should be.
    pub(crate) fn wait(
        &self,
        what: &str,
        is: impl Fn(&GetStatus_Reply) -> bool,
    ) -> GetStatus_Reply {
        let end = Instant::now() + PATIENCE;
        loop {
            let status = self.status();
            if is(&status) {
                return status;
            }
            assert!(Instant::now() < end, "{what} never came: {status:#?}");
            thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if thread::panicking() {
            self.said.extend(self.log.try_iter());
            eprintln!("the agent said: {:#?}", self.said);
        }
    }
}

/// What a command prints.
pub(crate) fn output(mut command: Command) -> (Option<i32>, String, String) {
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut out, mut err) = (String::new(), String::new());
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut out)
        .unwrap();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut err)
        .unwrap();
    (child.wait().unwrap().code(), out, err)
}
