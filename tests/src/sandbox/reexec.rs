//! From the test, or the program, on the host into the sandbox.

use std::io::{Read, pipe};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::channel;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};

use crate::amount;
use crate::host_cgroup::HostCgroup;

/// Set for processes inside a sandbox.
const INSIDE: &str = "CGTPROXY_TEST_SANDBOX";
/// Printed when the body has run to its end: a filter that matches no test succeeds as well.
const FINISHED: &str = "the sandboxed body ran to its end";
/// No test takes so long, however busy the machine is, unless CGTPROXY_TEST_DEADLINE gives it more seconds.
const DEADLINE: Duration = Duration::from_secs(300);

fn deadline() -> Duration {
    amount::given("CGTPROXY_TEST_DEADLINE").map_or(DEADLINE, Duration::from_secs)
}

pub(crate) fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

pub(crate) fn say_finished() {
    println!("{FINISHED}");
}

/// The directory with the binaries under test, and our own: the test's executable is in `deps`
/// below it.
pub(crate) fn bin_dir() -> PathBuf {
    let test = std::env::current_exe().expect("the path of the test's executable");
    let directory = test.parent().expect("an executable is in a directory");
    let directory = if directory.ends_with("deps") {
        directory.parent().unwrap()
    } else {
        directory
    };
    directory.to_owned()
}

/// Starts the current test's executable in a sandbox, for the current test only.
#[track_caller]
pub(crate) fn run_this_test_inside() {
    assert!(
        nix::unistd::Uid::effective().is_root(),
        "these tests make namespaces and cgroups, so they must run as root"
    );
    let name = test_name();
    let cgroup = HostCgroup::create();
    let mut command = inside(cgroup.path(), &name);
    command.args([
        "--exact",
        &name,
        "--nocapture",
        "--include-ignored",
        "--test-threads=1",
    ]);
    let (output, success) = run(command, cgroup.path());
    // The last words first: a failed test is read from its end.
    assert!(
        success,
        "in the sandbox:\n{output}\n`{name}` failed in its sandbox, see above"
    );
    assert!(
        output.contains(FINISHED),
        "no body ran in the sandbox of `{name}`:\n{output}"
    );
    // For `--nocapture` and failures later in the same test.
    print!("{output}");
}

/// Starts this very program in a sandbox, with its arguments and its terminal, and returns its
/// exit status.
pub(crate) fn run_this_program_inside() -> ExitCode {
    // An interrupt from the terminal reaches what is inside as well, and ends it. This process
    // stays to clear up. (Children of the standard library's begin without blocked signals.)
    let mut interrupts = SigSet::empty();
    interrupts.add(Signal::SIGINT);
    interrupts.add(Signal::SIGTERM);
    interrupts.thread_block().expect("a valid set of signals");
    let cgroup = HostCgroup::create();
    let status = inside(cgroup.path(), "a program")
        .args(std::env::args_os().skip(1))
        .status()
        .expect("the sandbox can be started");
    drop(cgroup);
    ExitCode::from(
        status
            .code()
            .and_then(|code| code.try_into().ok())
            .unwrap_or(1),
    )
}

/// This very program in a sandbox of its own, spoken to through its standard input and output. Dropped,
/// it is killed.
pub struct Inside {
    /// Its process, whose standard input and output are pipes.
    pub child: Child,
    // Dropped after the child: it kills whatever is left.
    _cgroup: HostCgroup,
}

impl Inside {
    /// Starts this program once more, with these arguments, in a sandbox. There, it comes to
    /// [`super::run_in_sandbox`].
    pub fn start(arguments: &[&str]) -> Self {
        let cgroup = HostCgroup::create();
        let child = inside(cgroup.path(), "a program")
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the sandbox can be started");
        Self {
            child,
            _cgroup: cgroup,
        }
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The command that runs this very executable in a sandbox, to be given its arguments.
#[track_caller]
fn inside(cgroup: &Path, name: &str) -> Command {
    let bin = bin_dir();
    let testapp = bin.join("cgtproxy-testapp");
    assert!(
        testapp.exists(),
        "{} is missing: run `cargo build -p cgtproxy-tests --bins`",
        testapp.display()
    );
    let mut command = Command::new(testapp);
    command
        .arg("sandbox")
        .arg(cgroup)
        .arg(bin)
        .arg(std::env::current_exe().expect("the path of this executable"))
        .env(INSIDE, name)
        .stdin(Stdio::null());
    command
}

/// libtest names the thread of a test after it.
#[track_caller]
fn test_name() -> String {
    let thread = std::thread::current();
    match thread.name() {
        Some("main") | None => std::env::var("NEXTEST_TEST_NAME")
            .expect("sandbox() must be called on a test's own thread"),
        Some(name) => name.to_owned(),
    }
}

/// Returns what it printed, and whether it succeeded.
fn run(mut command: Command, cgroup: &Path) -> (String, bool) {
    // One pipe for both, so that what belongs together stays together.
    let (mut reader, writer) = pipe().expect("a pipe");
    let mut child = command
        .stdout(writer.try_clone().expect("a pipe"))
        .stderr(writer)
        .spawn()
        .expect("the sandbox can be started");
    // It holds the pipe open.
    drop(command);
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut output = Vec::new();
        let _ = reader.read_to_end(&mut output);
        let _ = sender.send(output);
    });
    let mut note = String::new();
    // The output ends when the last process of the sandbox has ended.
    let deadline = deadline();
    let output = receiver.recv_timeout(deadline).unwrap_or_else(|_| {
        note = format!("killed after {deadline:?}\n");
        let _ = std::fs::write(cgroup.join("cgroup.kill"), "1");
        receiver
            .recv_timeout(Duration::from_secs(10))
            .unwrap_or_default()
    });
    let status = child.wait().expect("a child can be waited for");
    (
        format!("{}{note}", String::from_utf8_lossy(&output)),
        status.success(),
    )
}
