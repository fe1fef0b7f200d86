//! Booting a whole system: more namespaces, another root, and systemd as their first process.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{chdir, pivot_root};

use crate::lines::say;

/// What a machine in a box must not do to the one it runs on.
const WITHOUT: &str =
    "-sys_time,-sys_module,-sys_rawio,-sys_boot,-syslog,-mac_admin,-mac_override,-wake_alarm";

/// Enters the cgroup, then new namespaces (the network stays), starts the system as their first
/// process, tells its process id and waits for its end.
pub(crate) fn boot(cgroup: &OsStr, root: &OsStr, notify: &OsStr) {
    set_pdeathsig(Signal::SIGKILL).unwrap();
    fs::write(Path::new(cgroup).join("cgroup.procs"), "0").unwrap();
    unshare(
        CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWCGROUP
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWPID,
    )
    .unwrap();
    let mut system = Command::new("/proc/self/exe")
        .arg("boot-init")
        .args([root, notify])
        .spawn()
        .expect("this very program can be started");
    say(&system.id());
    let status = system.wait().expect("a child can be waited for");
    eprintln!("the system has ended: {status}");
}

/// Mounts what a machine has, changes to the new root and becomes systemd.
pub(crate) fn boot_init(root: &OsStr, notify: &OsStr) {
    set_pdeathsig(Signal::SIGKILL).unwrap();
    let root = Path::new(root);
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    mount_proc(root);
    mount_sys(root);
    mount_dev(root);
    mount_new(
        "tmpfs",
        &root.join("run"),
        MsFlags::empty(),
        Some("mode=755"),
    );
    mount_new(
        "tmpfs",
        &root.join("tmp"),
        MsFlags::empty(),
        Some("mode=1777"),
    );
    chdir(root).unwrap();
    // The old root ends up on top of the new one, and is then taken away from there.
    pivot_root(".", ".").unwrap();
    umount2(".", MntFlags::MNT_DETACH).unwrap();
    chdir("/").unwrap();
    let error = Command::new("/usr/bin/setpriv")
        .args([
            "--bounding-set",
            WITHOUT,
            "/lib/systemd/systemd",
            "--show-status=1",
        ])
        .env_clear()
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .env("container", "cgtproxy-test")
        .env("NOTIFY_SOCKET", notify)
        .exec();
    panic!("cannot run systemd: {error}");
}

/// Sysctls outside of the network are the host's: readable, and no more.
fn mount_proc(root: &Path) {
    let proc = root.join("proc");
    mount_new("proc", &proc, MsFlags::empty(), None);
    let sys = proc.join("sys");
    bind(&sys, &sys);
    // A mount of its own, which does not become read-only with the one below it.
    bind(&sys.join("net"), &sys.join("net"));
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    mount(None::<&str>, &sys, None::<&str>, read_only, None::<&str>).unwrap();
}

fn mount_sys(root: &Path) {
    let sys = root.join("sys");
    mount_new("sysfs", &sys, MsFlags::MS_RDONLY, None);
    mount_new("cgroup2", &sys.join("fs/cgroup"), MsFlags::empty(), None);
}

/// The harmless devices of the host, and an empty file for a console.
fn mount_dev(root: &Path) {
    let dev = root.join("dev");
    mount_new("tmpfs", &dev, MsFlags::empty(), Some("mode=755"));
    for name in ["null", "zero", "full", "random", "urandom", "tty"] {
        File::create(dev.join(name)).unwrap();
        bind(&Path::new("/dev").join(name), &dev.join(name));
    }
    fs::create_dir(dev.join("pts")).unwrap();
    let options = "newinstance,ptmxmode=0666,mode=620,gid=5";
    mount_new("devpts", &dev.join("pts"), MsFlags::empty(), Some(options));
    std::os::unix::fs::symlink("pts/ptmx", dev.join("ptmx")).unwrap();
    for (link, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "fd/0"),
        ("stdout", "fd/1"),
        ("stderr", "fd/2"),
    ] {
        std::os::unix::fs::symlink(target, dev.join(link)).unwrap();
    }
    fs::create_dir(dev.join("shm")).unwrap();
    mount_new(
        "tmpfs",
        &dev.join("shm"),
        MsFlags::empty(),
        Some("mode=1777"),
    );
    File::create(dev.join("console")).unwrap();
}

fn mount_new(kind: &str, target: &Path, flags: MsFlags, options: Option<&str>) {
    mount(Some(kind), target, Some(kind), flags, options)
        .unwrap_or_else(|e| panic!("cannot mount {kind} on {}: {e}", target.display()));
}

fn bind(source: &Path, target: &Path) {
    mount(
        Some(source),
        target,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .unwrap_or_else(|e| panic!("cannot bind {}: {e}", target.display()));
}
