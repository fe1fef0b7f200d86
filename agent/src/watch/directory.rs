//! From which directory control groups are looked at.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use cgtproxy_proto::path::ControlGroupPath;
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::watcher::{Watcher, errno};

/// How long a path may be that the kernel is given, with the NUL at its end (linux/limits.h).
const PATH_MAX: usize = 4096;

/// How the working directory is kept hold of.
pub(super) const HOME: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

impl Watcher {
    /// Makes the directory that a control group is in the working directory: the kernel takes a lock for every
    /// component of a path in cgroupfs, and there are eight in the usual one. Those that come next are often in
    /// the same directory.
    pub(super) fn go_beside(&mut self, path: &ControlGroupPath) {
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
                .is_some_and(|parent| self.go_to(parent).is_err())
            {
                self.go_home();
            }
        }
    }

    /// Makes the directory of a control group the working directory.
    pub(super) fn go_to(&self, path: &ControlGroupPath) -> io::Result<()> {
        match std::env::set_current_dir(self.subtree.directory(path)) {
            // From the one that it is in, then.
            Err(error) if errno(&error) == Some(Errno::NAMETOOLONG) => {
                let (Some(parent), Some(name)) = (path.parent(), path.name()) else {
                    return Err(error);
                };
                self.go_to(&parent)?;
                std::env::set_current_dir(OsStr::from_bytes(name))
            }
            result => result,
        }
    }

    /// Goes beside a control group if its whole path is longer than the kernel takes it.
    pub(super) fn approach(&mut self, path: &ControlGroupPath) {
        let above = self.subtree.root().as_os_str().len() + self.subtree.path().as_bytes().len();
        // Two slashes and a NUL.
        match above + path.as_bytes().len() + 3 > PATH_MAX {
            true => self.go_beside(path),
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
    pub(super) fn directory(&self, path: &ControlGroupPath) -> PathBuf {
        match (path.split_last(), &self.here) {
            (Some((parent, name)), Some(here)) if parent == here.as_bytes() => {
                Path::new(OsStr::from_bytes(name)).to_owned()
            }
            _ => self.subtree.directory(path),
        }
    }
}
