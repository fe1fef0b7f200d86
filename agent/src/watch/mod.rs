//! Watches the control groups of a subtree, by what inotify or systemd tells of them.
//!
//! What they tell is only a hint that something has changed; what is there is looked up. A directory is
//! watched first and listed then, so that what is made in between is seen twice rather than never. At the start
//! all that is there is listed first, since it waits for its verdict and not for its watch; and listed once more when
//! it is watched.
//! Where cgroupfs can't be read, systemd's word is all there is.
//!
//! Whatever is not watched, because inotify has no watches left or is not to be used, is looked at again
//! and again.

mod blind;
mod dbus;
mod directory;
pub(crate) mod inotify;
mod known;
mod listing;
mod pace;
mod pending;
mod run;
#[cfg(test)]
mod tests;
mod watcher;

use cgtproxy_proto::path::{ControlGroupPath, InvalidPath};

pub(crate) use run::open;
pub(crate) use watcher::Watcher;

/// Why nothing can be watched.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// Neither cgroupfs nor systemd tells which control groups there are.
    #[error(
        "can't read control groups at {root} (is cgroup v2 there?), and systemd does not tell of \
         them either: {why}"
    )]
    Blind {
        /// The control group root.
        root: String,
        /// Why systemd can't be asked.
        why: String,
    },
}

/// What a source of events says of control groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Hint {
    /// One has been made at this path.
    Made(ControlGroupPath),
    /// The one at this path is gone. If there is another by now, that is told next.
    Gone(ControlGroupPath),
    /// A unit has one at this path, with this id if systemd says that.
    Unit {
        /// Where it is.
        path: ControlGroupPath,
        /// Its id, which is the number of its inode.
        id: Option<u64>,
    },
    /// No unit has one at this path any more.
    NoUnit(ControlGroupPath),
    /// One that is in this one has been made, and no path can name it.
    Unnameable {
        /// What it is in.
        parent: ControlGroupPath,
        /// Its name.
        name: Vec<u8>,
        /// What is wrong with its path.
        why: InvalidPath,
    },
    /// A directory on the way to the subtree's root has been made or is gone.
    Above {
        /// It is gone.
        deleted: bool,
    },
    /// Events were lost.
    LostTrack,
}
