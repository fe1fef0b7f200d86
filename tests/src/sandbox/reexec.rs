//! From the test on the host into the sandbox.

use std::io::{Read, pipe};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::time::Duration;

use crate::host_cgroup::HostCgroup;

/// Set for processes inside a sandbox.
const INSIDE: &str = "CGTPROXY_TEST_SANDBOX";
/// Printed when the body has run to its end: a filter that matches no test succeeds as well.
const FINISHED: &str = "the sandboxed body ran to its end";
/// No test takes so long, however busy the machine is.
const DEADLINE: Duration = Duration::from_secs(300);

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
    let bin = bin_dir();
    let testapp = bin.join("cgtproxy-testapp");
    assert!(
        testapp.exists(),
        "{} is missing: run `cargo build -p cgtproxy-tests --bins`",
        testapp.display()
    );
    let cgroup = HostCgroup::create();
    let (output, success) = run(&testapp, cgroup.path(), &bin, &name);
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
fn run(testapp: &Path, cgroup: &Path, bin: &Path, name: &str) -> (String, bool) {
    // One pipe for both, so that what belongs together stays together.
    let (mut reader, writer) = pipe().expect("a pipe");
    let mut child = Command::new(testapp)
        .arg("sandbox")
        .arg(cgroup)
        .arg(bin)
        .arg(std::env::current_exe().unwrap())
        .args([
            "--exact",
            name,
            "--nocapture",
            "--include-ignored",
            "--test-threads=1",
        ])
        .env(INSIDE, name)
        .stdin(Stdio::null())
        .stdout(writer.try_clone().expect("a pipe"))
        .stderr(writer)
        .spawn()
        .expect("the sandbox can be started");
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut output = Vec::new();
        let _ = reader.read_to_end(&mut output);
        let _ = sender.send(output);
    });
    let mut note = String::new();
    // The output ends when the last process of the sandbox has ended.
    let output = receiver.recv_timeout(DEADLINE).unwrap_or_else(|_| {
        note = format!("killed after {DEADLINE:?}\n");
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
