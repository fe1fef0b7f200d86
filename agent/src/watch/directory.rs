//! From which directory control groups are looked at.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use cgtproxy_proto::path::ControlGroupPath;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::known::errno;
use crate::subtree::Subtree;

/// How long a path may be that the kernel is given, with the NUL at its end (linux/limits.h).
const PATH_MAX: usize = 4096;

/// How the working directory is kept hold of.
const HOME: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// This process's working directory, which may be that of a control group for a while.
#[derive(Debug)]
pub(super) struct WorkingDirectory {
    /// The one that the process was started in; none if it can't be opened: then it is always that.
    home: Option<OwnedFd>,
    /// The control group whose directory is the working directory at the moment; none if `home` is.
    here: Option<ControlGroupPath>,
}

impl WorkingDirectory {
    /// The one that the process is in.
    pub(super) fn new() -> Self {
        let home = rustix::fs::open(".", HOME, Mode::empty()).ok();
        Self { home, here: None }
    }

    /// One that stays as it is.
    #[cfg(test)]
    pub(super) fn fixed() -> Self {
        Self {
            home: None,
            here: None,
        }
    }

    /// Makes the directory that a control group is in the working directory: the kernel takes a lock for every
    /// component of a path in cgroupfs, and there are eight in the usual one. Those that come next are often in
    /// the same directory.
    pub(super) fn go_beside(&mut self, subtree: &Subtree, path: &ControlGroupPath) {
        let parent = path.split_last().map(|(parent, _)| parent);
        if parent != self.here.as_ref().map(ControlGroupPath::as_bytes) {
            // The control group root may have been given relative to it.
            self.go_home();
            if self.home.is_none() {
                return;
            }
            self.here = path.parent();
            if self
                .here
                .as_ref()
                .is_some_and(|parent| go_to(subtree, parent).is_err())
            {
                self.go_home();
            }
        }
    }

    /// Goes beside a control group if its whole path is longer than the kernel takes it.
    pub(super) fn approach(&mut self, subtree: &Subtree, path: &ControlGroupPath) {
        let above = subtree.root().as_os_str().len() + subtree.path().as_bytes().len();
        // Two slashes and a NUL.
        match above + path.as_bytes().len() + 3 > PATH_MAX {
            true => self.go_beside(subtree, path),
            false => self.go_home(),
        }
    }

    /// Nothing else of this program knows of another working directory than the one it was started in.
    pub(super) fn go_home(&mut self) {
        if self.here.take().is_some()
            && let Some(home) = &self.home
            && let Err(error) = rustix::process::fchdir(home)
        {
            tracing::warn!("can't go back to the working directory: {error}");
            self.home = None;
        }
    }

    /// A control group's directory: its name, where that is enough.
    pub(super) fn directory(&self, subtree: &Subtree, path: &ControlGroupPath) -> PathBuf {
        match (path.split_last(), &self.here) {
            (Some((parent, name)), Some(here)) if parent == here.as_bytes() => {
                Path::new(OsStr::from_bytes(name)).to_owned()
            }
            _ => subtree.directory(path),
        }
    }
}

/// Makes the directory of a control group the working directory.
fn go_to(subtree: &Subtree, path: &ControlGroupPath) -> io::Result<()> {
    match std::env::set_current_dir(subtree.directory(path)) {
        // From the one that it is in, then.
        Err(error) if errno(&error) == Some(Errno::NAMETOOLONG) => {
            let (Some(parent), Some(name)) = (path.parent(), path.name()) else {
                return Err(error);
            };
            go_to(subtree, &parent)?;
            std::env::set_current_dir(OsStr::from_bytes(name))
        }
        result => result,
    }
}
