//! Control groups and who is in them.

use std::fs;
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use cgtproxy_proto::path::ControlGroupPath;

use super::{Hierarchy, Manager, Session};
use crate::doctor::Look;
use crate::subtree::{self, Subtree, find_root};

/// How control groups are mounted, with the root as it was given or found.
pub(crate) fn hierarchy(root: Option<&Path>) -> Hierarchy {
    let found = match root {
        Some(root) => Some(root.to_owned()),
        None => find_root().ok(),
    };
    match found {
        None => Hierarchy::None,
        Some(root) if root.ends_with("unified") => Hierarchy::Hybrid,
        Some(root) if root.join("cgroup.controllers").exists() => Hierarchy::Unified,
        Some(_) => Hierarchy::None,
    }
}

/// Looks through the control groups of a user's service manager.
pub(crate) fn manager(subtree: &Subtree) -> Manager {
    let root = ControlGroupPath::root();
    let owner = match fs::metadata(subtree.directory(&root)) {
        Ok(found) => Ok(Some(found.uid())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.to_string()),
    };
    Manager {
        path: subtree.to_wire(&root),
        groups: groups(subtree).map_err(|error| error.to_string()),
        owner,
        in_container: in_container(),
    }
}

fn in_container() -> bool {
    let own = fs::read("/proc/self/cgroup").unwrap_or_default();
    subtree::of_process(&own).is_some_and(subtree::is_out_of_sight)
}

/// How many control groups are looked at: in the system's subtree users make as many as they like.
const MOST_GROUPS: usize = 100_000;

fn groups(subtree: &Subtree) -> io::Result<Vec<(u64, String)>> {
    let mut found = Vec::new();
    subtree.walk(|path, id| {
        found.push((id, subtree.to_wire(&path)));
        match found.len() < MOST_GROUPS {
            true => ControlFlow::Continue(()),
            false => ControlFlow::Break(()),
        }
    })?;
    Ok(found)
}

/// Looks for processes with a display in the login sessions beside a user's service manager.
pub(crate) fn session(subtree: &Subtree) -> Session {
    let scopes = subtree.sessions().into_values();
    let processes = scopes
        .filter_map(|scope| fs::read_to_string(scope.join("cgroup.procs")).ok())
        .flat_map(|list| list.lines().map(str::to_owned).collect::<Vec<_>>());
    Session {
        desktop: std::env::var("XDG_CURRENT_DESKTOP")
            .ok()
            .filter(|name| !name.is_empty()),
        graphical: processes.filter(|pid| has_display(pid)).count(),
    }
}

fn has_display(pid: &str) -> bool {
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    environment.split(|&byte| byte == 0).any(|variable| {
        variable.starts_with(b"WAYLAND_DISPLAY=") || variable.starts_with(b"DISPLAY=")
    })
}

/// Whether a unit of the system has processes.
pub(super) fn unit_runs(root: &Path, unit: &str) -> Look<bool> {
    let file = root.join("system.slice").join(unit).join("cgroup.events");
    match fs::read_to_string(file) {
        Ok(events) => Ok(events.lines().any(|line| line == "populated 1")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error.to_string()),
    }
}
