//! A sandbox: namespaces of its own, and a first process in them.

use std::ffi::{OsStr, OsString};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, exit};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, wait};
use nix::unistd::Pid;

/// Where a sandbox finds the binaries under test. It is a bind mount, so ordinary users of the
/// sandbox get at them wherever the checkout is, be it below /root.
const BIN: &str = "/run/testbed/bin";

/// Enters the cgroup, then the new namespaces, then runs `init` as their first process.
pub(crate) fn sandbox(cgroup: &OsStr, bin: &OsStr, command: &[OsString]) {
    // The sandbox must not outlive the test, however the test ends.
    set_pdeathsig(Signal::SIGKILL).unwrap();
    // First the cgroup: the one a process is in becomes the root of its new cgroup namespace.
    std::fs::write(Path::new(cgroup).join("cgroup.procs"), "0").unwrap();
    unshare(
        CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWCGROUP
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWPID,
    )
    .expect("the tests must run as root, to make namespaces");
    let status = Command::new("/proc/self/exe")
        .arg("init")
        .arg(bin)
        .args(command)
        .status()
        .expect("the sandbox's init can be started");
    exit(
        status
            .code()
            .unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
    );
}

/// The first process of the sandbox: mounts what a machine has, runs the command and reaps
/// orphans until it ends. All that is left dies with it.
#[expect(
    clippy::zombie_processes,
    reason = "it is waited for, among all the others"
)]
pub(crate) fn init(bin: &OsStr, command: &[OsString]) {
    set_pdeathsig(Signal::SIGKILL).unwrap();
    let bin = std::fs::File::open(bin).expect("the directory of the binaries");
    mount_all(&bin);
    let child = Command::new(&command[0])
        .args(&command[1..])
        .spawn()
        .unwrap_or_else(|e| panic!("cannot run {}: {e}", command[0].display()));
    let child = Pid::from_raw(child.id().cast_signed());
    loop {
        match wait().expect("the command is still to be waited for") {
            WaitStatus::Exited(pid, code) if pid == child => exit(code),
            WaitStatus::Signaled(pid, signal, _) if pid == child => exit(128 + signal as i32),
            _ => {}
        }
    }
}

fn mount_all(bin: &std::fs::File) {
    use std::os::fd::AsRawFd;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none).unwrap();
    mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), none).unwrap();
    mount(
        Some("cgroup2"),
        "/sys/fs/cgroup",
        Some("cgroup2"),
        MsFlags::empty(),
        none,
    )
    .unwrap();
    mount(
        Some("tmpfs"),
        "/run",
        Some("tmpfs"),
        MsFlags::empty(),
        Some("mode=755"),
    )
    .unwrap();
    std::fs::create_dir_all(BIN).unwrap();
    // By descriptor, in case the directory is one that was just mounted over.
    let source = format!("/proc/self/fd/{}", bin.as_raw_fd());
    mount(Some(source.as_str()), BIN, none, MsFlags::MS_BIND, none).unwrap();
}
