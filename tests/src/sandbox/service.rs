//! The product's daemons: started, watched, killed.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::launch::{Launch, binary};
use super::network::state_dir;
use super::world::World;
use crate::command::run;
use crate::wait::{DEADLINE, wait_for};

/// The helper's socket.
pub(super) const SOCKET: &str = "/run/cgtproxy/helper.sock";

/// How a daemon is started, and started again.
pub struct Spec {
    pub(super) program: &'static str,
    pub(super) arguments: Vec<OsString>,
    pub(super) environment: Vec<(OsString, OsString)>,
    pub(super) launch: Launch,
    pub(super) config: Option<PathBuf>,
    pub(super) uid: u32,
    pub(super) stdin: Option<OwnedFd>,
    /// A command that runs the program.
    pub(super) wrapper: Vec<OsString>,
}

/// A daemon of the product's. Dropped, it is killed.
pub struct Service {
    spec: Spec,
    child: Child,
    log: PathBuf,
    /// Lines to the service manager, as they come.
    lines: Receiver<String>,
    /// Those that nobody has waited for yet.
    notifications: Vec<String>,
    notify_path: PathBuf,
}

impl Service {
    pub(super) fn spawn(world: &Arc<World>, spec: Spec) -> Self {
        let log = world.new_log(spec.program);
        let notify_path = state_dir("notify").join(world.number().to_string());
        let notify = UnixDatagram::bind(&notify_path).expect("a socket in our own directory");
        fs::set_permissions(&notify_path, fs::Permissions::from_mode(0o666)).unwrap();
        let child = start(&spec, &log, &notify_path);
        Self {
            spec,
            child,
            log,
            lines: read_lines(notify),
            notifications: Vec::new(),
            notify_path,
        }
    }

    /// Where the helper listens.
    pub fn socket() -> &'static Path {
        Path::new(SOCKET)
    }

    /// Waits for `READY=1`.
    ///
    /// # Panics
    /// When it ends instead, or says nothing.
    #[track_caller]
    pub fn wait_ready(&mut self) {
        self.wait_notification("READY=1");
    }

    /// Waits for a line that it sends to the service manager.
    ///
    /// # Panics
    /// When it ends instead, or says nothing of the kind.
    #[track_caller]
    pub fn wait_notification(&mut self, line: &str) {
        let start = Instant::now();
        loop {
            if let Some(at) = self.notifications.iter().position(|n| n == line) {
                self.notifications.drain(..=at);
                return;
            }
            if let Ok(line) = self.lines.recv_timeout(Duration::from_millis(50)) {
                self.notifications.push(line);
                continue;
            }
            let ended = self.child.try_wait().expect("a child can be waited for");
            let problem = match ended {
                Some(status) => format!("ended ({status})"),
                None if start.elapsed() > DEADLINE => "said no such thing".to_owned(),
                None => continue,
            };
            panic!(
                "{} {problem} before {line}:\n{}",
                self.spec.program,
                self.log()
            );
        }
    }

    /// Whether it has sent that line to the service manager by now.
    pub fn has_notified(&mut self, line: &str) -> bool {
        self.receive_notifications();
        self.notifications.iter().any(|n| n == line)
    }

    /// Forgets what it has told the service manager so far.
    pub fn forget_notifications(&mut self) {
        self.receive_notifications();
        self.notifications.clear();
    }

    /// Takes all that it has sent by now: all that was before a line of our own.
    fn receive_notifications(&mut self) {
        let end = "X_END_OF_LINES=1";
        let to_self = UnixDatagram::unbound().expect("a socket");
        to_self
            .send_to(end.as_bytes(), &self.notify_path)
            .expect("somebody reads it");
        loop {
            let line = self.lines.recv_timeout(DEADLINE).expect("at least that");
            if line == end {
                return;
            }
            self.notifications.push(line);
        }
    }

    /// All it has written to stderr and stdout since it was first started.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Waits until its log has that text in it.
    ///
    /// # Panics
    /// When it never has.
    #[track_caller]
    pub fn wait_log(&self, text: &str) {
        let start = Instant::now();
        loop {
            // In this order: what it has said last counts.
            let ended = self.has_ended();
            let log = self.log();
            if log.contains(text) {
                return;
            }
            let program = self.spec.program;
            assert!(!ended, "{program} ended before {text:?}:\n{log}");
            assert!(
                start.elapsed() < DEADLINE,
                "{program} never said {text:?}:\n{log}"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Whether it has ended, and nobody has taken note of that yet.
    fn has_ended(&self) -> bool {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid()));
        status.map_or(true, |status| status.contains("\nState:\tZ"))
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The most memory it has ever had since it was started, in KiB.
    ///
    /// # Panics
    /// When it does not run.
    pub fn peak_memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("it runs");
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))
            .expect("it has memory");
        let number = line.trim().trim_end_matches(" kB");
        number.parse().expect("a number")
    }

    /// Whether it is running.
    pub fn is_running(&mut self) -> bool {
        self.child
            .try_wait()
            .expect("a child can be waited for")
            .is_none()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).expect("it is running");
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it does not end.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        wait_for(&format!("the end of {}", self.spec.program), || {
            self.child.try_wait().expect("a child can be waited for")
        })
    }

    /// Asks it to stop, and waits for its end.
    #[track_caller]
    pub fn stop(&mut self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.wait()
    }

    /// Kills it: it gets no chance to clean up.
    #[track_caller]
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        self.wait();
    }

    /// Starts it again, once it has ended; it is ready when this returns.
    #[track_caller]
    pub fn start_again(&mut self) {
        self.begin_again();
        self.wait_ready();
    }

    /// Starts it again, once it has ended, without waiting for it to be ready.
    ///
    /// # Panics
    /// When it has not ended.
    #[track_caller]
    pub fn begin_again(&mut self) {
        assert!(!self.is_running(), "{} is still running", self.spec.program);
        self.forget_notifications();
        self.child = start(&self.spec, &self.log, &self.notify_path);
    }

    /// Replaces its config file, as an editor does: by a rename.
    ///
    /// # Panics
    /// When it was started without one.
    pub fn write_config(&self, yaml: &str) {
        let path = self
            .spec
            .config
            .as_ref()
            .expect("it was started with a config");
        write_atomically(path, yaml, self.spec.uid);
    }

    /// Changes how many file descriptors it may have. Returns how many it could have.
    ///
    /// # Panics
    /// When that can't be done.
    #[track_caller]
    pub fn limit_descriptors(&self, count: u64) -> u64 {
        let (pid, uid) = (self.pid().to_string(), self.spec.uid.to_string());
        // Whoever it belongs to may do so, and needs no privilege for it.
        let as_user = [
            "setpriv",
            "--reuid",
            &uid,
            "--regid",
            &uid,
            "--clear-groups",
        ];
        let show = [
            "prlimit",
            "--pid",
            &pid,
            "--nofile",
            "--noheadings",
            "--output=SOFT",
        ];
        let before = run(&[&as_user, &show[..]].concat())
            .trim()
            .parse()
            .expect("a number");
        let limit = format!("--nofile={count}:");
        run(&[&as_user[..], &["prlimit", "--pid", &pid, &limit]].concat());
        before
    }

    /// How many file descriptors it has open.
    ///
    /// # Panics
    /// When it does not run.
    pub fn open_descriptors(&self) -> u64 {
        self.descriptors().len() as u64
    }

    /// The numbers of its file descriptors.
    ///
    /// # Panics
    /// When it does not run.
    pub fn descriptors(&self) -> BTreeSet<u64> {
        let open = || fs::read_dir(format!("/proc/{}/fd", self.pid())).expect("it is running");
        // While it does something, it may have one open that is not there to stay.
        wait_for("a moment in which it sleeps", || {
            let before = self.sleeps()?;
            let names = open().flatten().map(|fd| fd.file_name());
            let numbers = names.filter_map(|name| name.to_str()?.parse().ok());
            let numbers = numbers.collect();
            (self.sleeps()? == before).then_some(numbers)
        })
    }

    /// How many descriptors it may have if it is to be able to open so many more, and no others: new ones get the lowest
    /// numbers that are free, and the limit is one of numbers.
    ///
    /// # Panics
    /// When it does not run.
    pub fn descriptors_and(&self, more: usize) -> u64 {
        let open = self.descriptors();
        let mut free = (0..).filter(|number| !open.contains(number));
        free.nth(more).expect("there are many")
    }

    /// How often it has gone to sleep, if it is asleep (proc(5)).
    fn sleeps(&self) -> Option<String> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid()));
        let status = status.expect("it is running");
        let line = |name| status.lines().find(|line| line.starts_with(name));
        let is_asleep = line("State:")?.contains("S (sleeping)");
        let sleeps = line("voluntary_ctxt_switches:")?;
        is_asleep.then(|| sleeps.to_owned())
    }

    /// Tells it to read its config again.
    pub fn reload(&self) {
        self.signal(Signal::SIGHUP);
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads, as a service manager does, whether or not a test is waiting: a full socket would halt the
/// daemon.
fn read_lines(notify: UnixDatagram) -> Receiver<String> {
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count) = notify.recv(&mut buffer) {
            let text = String::from_utf8_lossy(&buffer[..count]);
            for line in text.lines() {
                if sender.send(line.to_owned()).is_err() {
                    return;
                }
            }
        }
    });
    lines
}

fn start(spec: &Spec, log: &Path, notify: &Path) -> Child {
    let program = binary(spec.program);
    assert!(
        program.exists(),
        "{} has not been built: run `make test`, or `cargo build --workspace` first",
        spec.program
    );
    let log = File::options()
        .create(true)
        .append(true)
        .open(log)
        .expect("our own directory");
    let stdin = match &spec.stdin {
        Some(stdin) => stdin.try_clone().expect("a descriptor").into(),
        None => Stdio::null(),
    };
    let mut command = match spec.wrapper.split_first() {
        None => spec.launch.command(program),
        Some((wrapper, rest)) => {
            let mut command = spec.launch.command(wrapper);
            command.args(rest).arg(program);
            command
        }
    };
    command
        .args(&spec.arguments)
        .env("NOTIFY_SOCKET", notify)
        .envs(spec.environment.iter().map(|(name, value)| (name, value)))
        .stdin(stdin)
        .stdout(log.try_clone().expect("a file"))
        .stderr(log)
        .spawn()
        .unwrap_or_else(|e| panic!("cannot start {}: {e}", spec.program))
}

pub(super) fn write_atomically(path: &Path, text: &str, uid: u32) {
    let new = path.with_extension("new");
    fs::write(&new, text).expect("a file in a directory of ours");
    chown(&new, Some(uid), Some(uid)).expect("root may give away");
    fs::rename(&new, path).expect("in the same directory");
}
