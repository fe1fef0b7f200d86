//! The directories that lead to a file.

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsString;
use std::fs::Metadata;
use std::path::{Component, Path, PathBuf};

use inotify::WatchMask;

/// How many links lead to a file at most, as for the kernel.
const LINKS: usize = 40;

/// What is of interest in a directory on the way to a file, beside that it stays where it is.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Wanted {
    /// Whose events count.
    pub(super) names: HashSet<OsString>,
    /// The file is in it, or would be.
    pub(super) last: bool,
    /// It would be.
    pub(super) missing: bool,
}

impl Wanted {
    /// As little as there has to be: a home directory is busy, and nobody is to be woken by that.
    pub(super) fn mask(&self) -> WatchMask {
        let mut mask = WatchMask::MOVE_SELF | WatchMask::DELETE_SELF | WatchMask::ONLYDIR;
        if !self.names.is_empty() {
            mask |=
                WatchMask::MOVED_TO | WatchMask::MOVED_FROM | WatchMask::CREATE | WatchMask::DELETE;
            // What could not be read may be readable by now.
            mask |= WatchMask::ATTRIB;
        }
        if self.last {
            mask |= WatchMask::CLOSE_WRITE;
        }
        if self.missing {
            // Tells a file that somebody writes from one that had another name.
            mask |= WatchMask::OPEN | WatchMask::CLOSE_NOWRITE;
            // Of two events in a row that are the same the kernel tells one (inotify(7)): a writer's open and a reader's.
            mask |= WatchMask::MODIFY;
        }
        mask
    }
}

/// The directories that lead to a file, as far as they are there, none of which is a link: each has one path, and one
/// watch.
pub(super) fn way(file: &Path) -> BTreeMap<PathBuf, Wanted> {
    let mut way: BTreeMap<PathBuf, Wanted> = BTreeMap::new();
    let mut directory = PathBuf::new();
    let mut ahead = components(file);
    let mut links = 0;
    while let Some(component) = ahead.pop() {
        if component == ".." {
            directory.pop();
            continue;
        }
        let next = directory.join(&component);
        if component == "/" {
            directory = next;
            continue;
        }
        let interest = way.entry(directory.clone()).or_default();
        let found = std::fs::symlink_metadata(&next).ok();
        if found.as_ref().is_some_and(Metadata::is_dir) && !ahead.is_empty() {
            directory = next;
            continue;
        }
        interest.names.insert(component);
        if found.as_ref().is_some_and(Metadata::is_symlink) {
            links += 1;
            match std::fs::read_link(&next) {
                Ok(target) if links <= LINKS => ahead.extend(components(&target)),
                _ => break,
            }
            continue;
        }
        interest.last = ahead.is_empty();
        interest.missing = interest.last && found.is_none();
        // While somebody is in it, a directory is not said to be deleted. It is empty then: what it is in tells.
        if interest.missing
            && let (Some(above), Some(name)) = (directory.parent(), directory.file_name())
        {
            let above = way.entry(above.to_owned()).or_default();
            above.names.insert(name.to_owned());
        }
        break;
    }
    way
}

/// The components of a path, the first one last.
fn components(path: &Path) -> Vec<OsString> {
    let components = path.components().rev();
    let named = components.filter(|component| *component != Component::CurDir);
    named.map(|c| c.as_os_str().to_owned()).collect()
}
