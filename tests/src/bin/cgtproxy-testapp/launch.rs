//! A process that enters a cgroup before it becomes the program it was asked to be.

use std::ffi::{OsStr, OsString};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

/// Enters the cgroup, as nobody but root may, then executes the command: nothing that the command
/// does, not even its first socket, happens outside.
pub(crate) fn launch(cgroup: &OsStr, command: &[OsString]) {
    let procs = Path::new(cgroup).join("cgroup.procs");
    std::fs::write(&procs, "0").unwrap_or_else(|e| panic!("{}: {e}", procs.display()));
    let error = Command::new(&command[0]).args(&command[1..]).exec();
    panic!("cannot run {}: {error}", command[0].display());
}
