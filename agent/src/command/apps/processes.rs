//! What runs in a control group.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// The names of the executables of all processes in the control group at `directory`, but not below it, and
/// without this process. Empty if none can be seen.
pub(super) fn executables(directory: &Path) -> BTreeSet<String> {
    let Ok(processes) = fs::read_to_string(directory.join("cgroup.procs")) else {
        return BTreeSet::new();
    };
    processes
        .lines()
        .filter_map(|line| line.parse().ok())
        .filter(|pid| *pid != std::process::id())
        .filter_map(executable)
        .collect()
}

/// The file name of a process's executable; the process's own name if that is not for us to know; none if the
/// process has gone.
fn executable(pid: u32) -> Option<String> {
    if let Ok(file) = fs::read_link(format!("/proc/{pid}/exe")) {
        let name = file.file_name()?.to_string_lossy().into_owned();
        return Some(match name.strip_suffix(" (deleted)") {
            Some(name) => name.to_owned(),
            None => name,
        });
    }
    let name = fs::read(format!("/proc/{pid}/comm")).ok()?;
    Some(String::from_utf8_lossy(name.trim_ascii_end()).into_owned())
}
