//! The limit of inotify watches that a process in a user namespace of its own is under.

use std::ffi::OsStr;
use std::fs::File;

use nix::sched::{CloneFlags, setns};

/// Changes that limit. Not by a command of its own: it would lose the rights in the namespace when
/// it is executed, because root is nobody there.
pub(crate) fn limit(pid: &OsStr, count: &OsStr) {
    let pid = pid.to_str().expect("a number");
    let namespace = File::open(format!("/proc/{pid}/ns/user")).expect("it is running");
    setns(namespace, CloneFlags::CLONE_NEWUSER).expect("root may enter it");
    let file = "/proc/sys/user/max_inotify_watches";
    std::fs::write(file, count.as_encoded_bytes()).expect("the namespace's root may write it");
}
