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

mod dbus;
pub mod inotify;
mod run;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::ffi::OsStr;
use std::io;
use std::iter::successors;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::path::{Path, PathBuf};

use ::inotify::WatchDescriptor;
use cgtproxy_proto::path::{ControlGroupPath, InvalidPath};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::said::{Kind, Said};
use crate::subtree::Subtree;
use crate::text::{chain, printable};

pub use run::{Sources, open};

/// How long a path may be that the kernel is given, with the NUL at its end (linux/limits.h).
const PATH_MAX: usize = 4096;

/// How the working directory is kept hold of.
const HOME: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// Who is told of control groups.
pub trait Observer {
    /// A control group is there. It may be known already. Returns the path as it is kept.
    fn added(&mut self, path: ControlGroupPath) -> ControlGroupPath;
    /// A control group is gone, with everything below. Returns all that were known.
    fn removed(&mut self, path: &ControlGroupPath) -> Vec<ControlGroupPath>;
    /// Events were lost: any control group may be another one than before.
    fn lost_track(&mut self);
}

/// By what control groups are noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Monitor {
    /// By inotify; and where that can't be, by what systemd tells.
    #[default]
    Auto,
    /// By inotify alone.
    Inotify,
    /// By what systemd tells over D-Bus alone.
    Dbus,
}

/// How well control groups are noticed, for those who ask.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Watching {
    /// What tells of them: `inotify`, `dbus`, both or neither.
    pub by: Vec<&'static str>,
    /// Why some are noticed late or not at all, if that is so.
    pub problem: Option<String>,
}

/// Why nothing can be watched.
#[derive(Debug, thiserror::Error)]
pub enum Error {
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
pub enum Hint {
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

/// A control group that is known.
#[derive(Debug, Default)]
struct Known {
    /// None if it is not watched.
    watch: Option<WatchDescriptor>,
    /// Which one it is, if that is known by another way than its watch.
    id: Option<u64>,
}

/// The control groups of a subtree, as far as they are known.
#[derive(Debug)]
pub struct Watcher {
    subtree: Subtree,
    monitor: Monitor,
    /// None if inotify is not to be used, or can't be.
    watches: Option<inotify::Watches>,
    groups: BTreeMap<ControlGroupPath, Known>,
    /// Those that should be watched and are not.
    unwatched: BTreeSet<ControlGroupPath>,
    /// Why, the last time.
    unwatched_why: String,
    /// Those of which it is not known what is in them.
    unlisted: BTreeSet<ControlGroupPath>,
    /// Why, the last time.
    unlisted_why: String,
    /// cgroupfs can't be read at all.
    blind: bool,
    /// Control groups that were announced and not looked at yet.
    pending: VecDeque<ControlGroupPath>,
    /// What was found in control groups that are to be watched later, with inodes and in order.
    noted: BTreeMap<ControlGroupPath, Vec<(ControlGroupPath, u64)>>,
    /// This process's working directory; none if it can't be opened.
    home: Option<OwnedFd>,
    /// The control group whose directory is the working directory for the moment.
    here: Option<ControlGroupPath>,
    /// What was said of control groups that users have made so.
    said: Said,
    /// It was said that events were lost.
    said_lost: bool,
    /// It was said that there are no watches left.
    said_exhausted: bool,
    /// It was said that control groups can't be listed.
    said_unlisted: bool,
}

impl Watcher {
    fn new(subtree: Subtree, monitor: Monitor) -> Self {
        let mut watcher = Self {
            subtree,
            monitor,
            watches: None,
            groups: BTreeMap::new(),
            unwatched: BTreeSet::new(),
            unwatched_why: String::new(),
            unlisted: BTreeSet::new(),
            unlisted_why: String::new(),
            blind: false,
            pending: VecDeque::new(),
            noted: BTreeMap::new(),
            home: rustix::fs::open(".", HOME, Mode::empty()).ok(),
            here: None,
            said: Said::default(),
            said_lost: false,
            said_exhausted: false,
            said_unlisted: false,
        };
        watcher.open_eyes();
        watcher
    }

    /// Finds out whether cgroupfs can be read.
    fn open_eyes(&mut self) {
        self.blind = match std::fs::read_dir(self.subtree.root()) {
            Ok(_) => !self.subtree.is_mounted(),
            // Out of descriptors, most likely: that passes.
            Err(error) => matches!(
                error.kind(),
                io::ErrorKind::NotFound
                    | io::ErrorKind::PermissionDenied
                    | io::ErrorKind::NotADirectory
            ),
        };
    }

    /// Says again what is wrong, if it still is.
    pub fn forget_what_was_said(&mut self) {
        self.said.forget();
        self.said_lost = false;
        self.said_exhausted = false;
        self.said_unlisted = false;
    }

    /// Reports what is in the whole subtree, of which nothing is known yet, and leaves it to be watched later: what
    /// is there already waits for its verdict and not for its watch. What comes or was overlooked meanwhile is found
    /// when its parent is watched and listed, and so is what has gone: nobody tells of it, and if there is another one
    /// at its path by then, which its inode says, that has no verdict yet. What has others in it is watched first: it is
    /// there that service managers make more of them.
    fn discover(&mut self, observer: &mut dyn Observer) {
        if self.blind {
            return;
        }
        self.watch_ancestors();
        let root = ControlGroupPath::root();
        if self.enter(&root, observer).is_none() {
            return;
        }
        let mut stack = vec![(root, self.subtree.directory(&ControlGroupPath::root()))];
        let mut empty = Vec::new();
        while let Some((path, directory)) = stack.pop() {
            let mut found = Vec::new();
            // Whoever watches it will say so.
            let _ = self.children(&path, &mut found);
            // In order, so that each one's place in a tree is beside that of the one before, which is in the
            // processor's cache.
            found.sort_unstable();
            let nested = contains_more_than(&directory, found.len());
            for (child, _) in &found {
                observer.added(child.clone());
                match child.name() {
                    Some(name) if nested => {
                        stack.push((child.clone(), directory.join(OsStr::from_bytes(name))));
                    }
                    _ => empty.push(child.clone()),
                }
            }
            if self.is_watched(&path) {
                continue;
            }
            if found.is_empty() {
                empty.push(path);
            } else {
                self.pending.push_back(path.clone());
                self.noted.insert(path, found);
            }
        }
        self.pending.extend(empty);
    }

    /// Looks at the whole subtree. What is gone is reported as well.
    pub fn scan(&mut self, observer: &mut dyn Observer) {
        self.open_eyes();
        if self.blind {
            return;
        }
        self.watch_ancestors();
        let mut seen = HashSet::new();
        let mut stack = vec![ControlGroupPath::root()];
        while let Some(path) = stack.pop() {
            self.approach(&path);
            if let Some(path) = self.enter(&path, observer) {
                if !self.list(&path, &mut stack, observer) {
                    // What is in it is as good as seen.
                    let below = self.groups.keys().filter(|other| other.is_within(&path));
                    seen.extend(below.cloned());
                }
                seen.insert(path);
            }
        }
        self.go_home();
        let gone: Vec<ControlGroupPath> = self
            .groups
            .keys()
            .filter(|path| !seen.contains(*path))
            .cloned()
            .collect();
        for path in gone {
            self.gone(&path, observer);
        }
    }

    /// Looks at one control group and, if it is new or not watched, at everything below it. Those that it is in may be
    /// others than before, too, which takes away all that was known of it.
    pub fn look(&mut self, path: &ControlGroupPath, observer: &mut dyn Observer) {
        if self.blind {
            return;
        }
        let mut stack = Vec::new();
        let mut around = Vec::from_iter(successors(path.parent(), ControlGroupPath::parent));
        while let Some(path) = around.pop() {
            let before = self.identity(&path);
            self.approach(&path);
            if self.enter(&path, observer).is_some() && before != self.identity(&path) {
                self.list(&path, &mut stack, observer);
            }
        }
        stack.push(path.clone());
        while let Some(path) = stack.pop() {
            self.approach(&path);
            self.look_at(&path, &mut stack, observer);
        }
        self.go_home();
    }

    /// Looks at one control group, and adds what is in it to `found` if it is new or not watched.
    fn look_at(
        &mut self,
        path: &ControlGroupPath,
        found: &mut Vec<ControlGroupPath>,
        observer: &mut dyn Observer,
    ) {
        let before = self.identity(path);
        if let Some(path) = self.enter(path, observer)
            && (before != self.identity(&path) || !self.is_watched(&path))
        {
            self.list(&path, found, observer);
        }
    }

    /// The path, or the highest control group above it that is not known.
    fn first_unknown(&self, path: &ControlGroupPath) -> ControlGroupPath {
        let mut first = path.clone();
        // Those above one that is known are known.
        while let Some((parent, _)) = first.split_last()
            && !self.groups.contains_key(parent)
            && let Some(parent) = first.parent()
        {
            first = parent;
        }
        first
    }

    fn look_at_pending(&mut self, count: usize, observer: &mut dyn Observer) -> bool {
        let mut looked = false;
        let mut found = Vec::new();
        for _ in 0..count {
            let Some(path) = self.pending.pop_front() else {
                break;
            };
            looked = true;
            // Seen when its parent was listed; had it gone since, it would not be watched any more.
            if self.blind || self.is_watched(&path) {
                continue;
            }
            let path = self.first_unknown(&path);
            self.go_beside(&path);
            self.look_at(&path, &mut found, observer);
            for child in found.drain(..) {
                if !self.groups.contains_key(&child) {
                    observer.added(child.clone());
                    self.pending.push_back(child);
                }
            }
        }
        self.go_home();
        looked
    }

    /// Makes the directory that a control group is in the working directory: the kernel takes a lock for every
    /// component of a path in cgroupfs, and there are eight in the usual one. Those that come next are often in
    /// the same directory.
    fn go_beside(&mut self, path: &ControlGroupPath) {
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
    fn go_to(&self, path: &ControlGroupPath) -> io::Result<()> {
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
    fn approach(&mut self, path: &ControlGroupPath) {
        let above = self.subtree.root().as_os_str().len() + self.subtree.path().as_bytes().len();
        // Two slashes and a NUL.
        match above + path.as_bytes().len() + 3 > PATH_MAX {
            true => self.go_beside(path),
            false => self.go_home(),
        }
    }

    /// Nothing else of this program knows of another working directory than the one it was started in.
    fn go_home(&mut self) {
        if self.here.take().is_some()
            && let Some(home) = &self.home
            && let Err(error) = rustix::process::fchdir(home)
        {
            tracing::warn!("can't go back to the working directory: {error}");
            self.home = None;
        }
    }

    /// A control group's directory: its name, where that is enough.
    fn directory(&self, path: &ControlGroupPath) -> PathBuf {
        match (path.split_last(), &self.here) {
            (Some((parent, name)), Some(here)) if parent == here.as_bytes() => {
                Path::new(OsStr::from_bytes(name)).to_owned()
            }
            _ => self.subtree.directory(path),
        }
    }

    /// Takes a hint.
    fn hint(&mut self, hint: Hint, observer: &mut dyn Observer) {
        match hint {
            Hint::LostTrack => {
                let text = "more happened at once than inotify could tell: looking at everything";
                // Whoever makes enough control groups brings this about again and again.
                match std::mem::replace(&mut self.said_lost, true) {
                    false => tracing::info!("{text}"),
                    true => tracing::debug!("{text}"),
                }
                self.scan(observer);
                observer.lost_track();
            }
            Hint::Above { deleted } => {
                if deleted {
                    self.gone(&ControlGroupPath::root(), observer);
                }
                self.watch_ancestors();
                self.look(&ControlGroupPath::root(), observer);
            }
            // Which control group has gone can't be told from the event. If there is another one, it was made
            // later, and is told of next: the helper must look the path up again. To look for it now would be to wait
            // for who removes others in the same directory.
            Hint::Gone(path) => self.gone(&path, observer),
            Hint::Made(path) => {
                observer.added(path.clone());
                self.pending.push_back(path);
            }
            Hint::Unnameable { parent, name, why } => self.say_unnameable(&parent, &name, why),
            Hint::Unit { path, id } if self.blind => self.believe(path, id, observer),
            Hint::NoUnit(path) if self.blind => self.gone(&path, observer),
            Hint::Unit { path, .. } | Hint::NoUnit(path) => self.look(&path, observer),
        }
    }

    /// Takes a control group as there without having seen it.
    fn believe(&mut self, path: ControlGroupPath, id: Option<u64>, observer: &mut dyn Observer) {
        let known = self.groups.get(&path).and_then(|known| known.id);
        if known.is_some() && id.is_some() && known != id {
            self.gone(&path, observer);
        }
        let shared = observer.added(path);
        self.groups.insert(shared, Known { watch: None, id });
    }

    /// Takes these control groups, and those above them, as all that there are.
    fn believe_all(
        &mut self,
        all: Vec<(ControlGroupPath, Option<u64>)>,
        observer: &mut dyn Observer,
    ) {
        let mut there = BTreeSet::new();
        for (path, _) in &all {
            let mut at = Some(path.clone());
            while let Some(path) = at {
                at = path.parent();
                there.insert(path);
            }
        }
        let gone = self.groups.keys().filter(|path| !there.contains(*path));
        for path in gone.cloned().collect::<Vec<_>>() {
            self.gone(&path, observer);
        }
        for (path, id) in all {
            self.believe(path, id, observer);
        }
    }

    /// What tells a control group from another one at the same path.
    fn identity(&self, path: &ControlGroupPath) -> Option<(Option<i32>, Option<u64>)> {
        let known = self.groups.get(path)?;
        let watch = known.watch.as_ref();
        Some((
            watch.map(WatchDescriptor::get_watch_descriptor_id),
            known.id,
        ))
    }

    fn is_watched(&self, path: &ControlGroupPath) -> bool {
        let known = self.groups.get(path);
        known.is_some_and(|known| known.watch.is_some())
    }

    fn watch_ancestors(&mut self) {
        if let Some(watches) = &mut self.watches {
            watches.watch_ancestors(&self.subtree);
        }
    }

    /// Watches a control group and reports it, or that it is gone.
    fn enter(
        &mut self,
        path: &ControlGroupPath,
        observer: &mut dyn Observer,
    ) -> Option<ControlGroupPath> {
        tracing::trace!("looking at {path:?}");
        let directory = self.directory(path);
        let watch = match self.watch(path, &directory) {
            Ok(watch) => watch,
            Err(Vanished) => {
                self.gone(path, observer);
                return None;
            }
        };
        let before = self.groups.get_key_value(path);
        let known_id = before.and_then(|(_, known)| known.id);
        let id = match (&watch, before) {
            // It has the same watch, so it is the same directory.
            (Some(watch), Some((path, known))) if known.watch.as_ref() == Some(watch) => {
                return Some(path.clone());
            }
            (Some(_), _) if known_id.is_none() => None,
            _ => match std::fs::symlink_metadata(&directory) {
                Ok(metadata) if metadata.is_dir() => Some(metadata.ino()),
                found => {
                    let known = before.map(|(path, _)| path.clone());
                    // No control group has this watch yet, so nothing else would remove it.
                    if let (Some(watch), Some(watches)) = (watch, &mut self.watches)
                        && watches.group(&watch).is_none()
                    {
                        watches.remove(watch);
                    }
                    if let (Err(error), Some(known)) = (found, known)
                        && !is_absence(&error)
                    {
                        if !is_lasting(&error) {
                            self.unwatched_why =
                                format!("control groups can't be looked at ({})", chain(&error));
                            self.unwatched.insert(known.clone());
                        }
                        return Some(known);
                    }
                    self.gone(path, observer);
                    return None;
                }
            },
        };
        let another = match (known_id, id) {
            (Some(before), Some(now)) => before != now,
            // A directory that is watched already would have the watch that it had: this is another one.
            _ => before.is_some_and(|(_, known)| known.watch.is_some()),
        };
        if another {
            self.gone(path, observer);
        }
        // Another path had this very directory: it was renamed, which cgroupfs never does.
        let holder = match (&watch, &self.watches) {
            (Some(watch), Some(watches)) => watches.group(watch).cloned(),
            _ => None,
        };
        if let Some(other) = holder
            && other != *path
        {
            self.gone(&other, observer);
            return self.enter(path, observer);
        }
        let kept = observer.added(path.clone());
        let id = match &watch {
            Some(watch) => {
                if let Some(watches) = &mut self.watches {
                    watches.assign(watch, kept.clone());
                }
                self.unwatched.remove(path);
                None
            }
            None => id,
        };
        self.groups.insert(kept.clone(), Known { watch, id });
        Some(kept)
    }

    /// Watches a directory, if inotify is to be used and can.
    fn watch(
        &mut self,
        path: &ControlGroupPath,
        directory: &Path,
    ) -> Result<Option<WatchDescriptor>, Vanished> {
        let Some(watches) = &mut self.watches else {
            return Ok(None);
        };
        let error = match watches.add(directory) {
            Ok(watch) => return Ok(Some(watch)),
            Err(error) => error,
        };
        match errno(&error) {
            _ if is_absence(&error) => return Err(Vanished),
            _ if is_lasting(&error) => {
                self.unwatched.remove(path);
                self.say_closed(path, &error);
                return Ok(None);
            }
            Some(Errno::NOSPC) => {
                "inotify has no watches left (fs.inotify.max_user_watches)"
                    .clone_into(&mut self.unwatched_why);
                if !std::mem::replace(&mut self.said_exhausted, true) {
                    tracing::warn!(
                        "inotify has no watches left for '{}': raise fs.inotify.max_user_watches with \
                         sysctl; until then control groups are looked at every now and then",
                        self.subtree.shown(path),
                    );
                }
            }
            _ => {
                self.unwatched_why = format!("control groups can't be watched ({})", chain(&error));
                if !self.unwatched.contains(path) {
                    let name = self.subtree.shown(path);
                    let text = format!("can't watch '{name}': {}", chain(&error));
                    match self.said.is_news(Kind::Unwatched, path) {
                        true => tracing::warn!("{text}"),
                        false => tracing::debug!("{text}"),
                    }
                }
            }
        }
        self.unwatched.insert(path.clone());
        Ok(None)
    }

    /// This user may not look into a control group, as into those that a container's users have for themselves. To look
    /// again and again would change nothing.
    fn say_closed(&mut self, path: &ControlGroupPath, error: &io::Error) {
        let name = self.subtree.shown(path);
        let why = chain(error);
        let text = format!("can't look into '{name}': {why}; what is in it has its verdict");
        match self.said.is_news(Kind::Closed, path) {
            true => tracing::info!("{text}"),
            false => tracing::debug!("{text}"),
        }
    }

    /// A control group can't be named.
    fn say_unnameable(&mut self, parent: &ControlGroupPath, name: &[u8], why: InvalidPath) {
        let name = printable(&String::from_utf8_lossy(name));
        let above = self.subtree.shown(parent);
        let text = format!(
            "can't follow '{name}' in '{above}': {why}; it has the verdict of what it is in"
        );
        match self.said.is_news(Kind::Unnameable, parent) {
            true => tracing::warn!("{text}"),
            false => tracing::debug!("{text}"),
        }
    }

    /// Adds the control groups in one to `found`. Returns whether it is known what is in it.
    fn list(
        &mut self,
        path: &ControlGroupPath,
        found: &mut Vec<ControlGroupPath>,
        observer: &mut dyn Observer,
    ) -> bool {
        let mut children = Vec::new();
        let listed = self.children(path, &mut children);
        let noted = match &listed {
            Ok(()) => {
                self.unlisted.remove(path);
                self.noted.remove(path)
            }
            Err(error) if is_lasting(error) => {
                self.unlisted.remove(path);
                self.say_closed(path, error);
                None
            }
            Err(error) => {
                self.unlisted_why = chain(error);
                if !self.said_unlisted {
                    self.said_unlisted = true;
                    let name = self.subtree.shown(path);
                    tracing::warn!("can't list '{name}': {}; trying again", chain(error));
                }
                self.unlisted.insert(path.clone());
                None
            }
        };
        if let Some(noted) = noted {
            children.sort_unstable();
            let watched = self.is_watched(path);
            for one in noted {
                let there = children.binary_search(&one).is_ok();
                let (child, inode) = one;
                if !there {
                    self.gone(&child, observer);
                } else if !watched {
                    // Without a watch, nothing reports what happens before it is looked at itself.
                    let id = Some(inode);
                    let known = self.groups.entry(child);
                    known.or_insert(Known { watch: None, id });
                }
            }
        }
        found.extend(children.into_iter().map(|(child, _)| child));
        listed.is_ok()
    }

    /// The control groups in one, with their inodes.
    fn children(
        &mut self,
        path: &ControlGroupPath,
        found: &mut Vec<(ControlGroupPath, u64)>,
    ) -> io::Result<()> {
        let directory = self.directory(path);
        // Each directory in it is a link to it, beside the two that every directory has. (File
        // systems that do not count so say 1.)
        match std::fs::symlink_metadata(&directory) {
            Ok(metadata) if metadata.nlink() != 2 => {}
            Err(error) if !is_absence(&error) => return Err(error),
            _ => return Ok(()),
        }
        let entries = match std::fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) if is_absence(&error) => return Ok(()),
            Err(error) => return Err(error),
        };
        // Reading ends early when the directory vanishes meanwhile; its parent tells of that.
        for entry in entries.map_while(Result::ok) {
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                let name: &OsStr = &entry.file_name();
                match path.join(name.as_bytes()) {
                    Ok(child) => found.push((child, entry.ino())),
                    Err(why) => self.say_unnameable(path, name.as_bytes(), why),
                }
            }
        }
        Ok(())
    }

    /// A control group is gone: forgets it and all below.
    fn gone(&mut self, path: &ControlGroupPath, observer: &mut dyn Observer) {
        for path in observer.removed(path) {
            self.forget(&path);
        }
        self.forget(path);
    }

    fn forget(&mut self, path: &ControlGroupPath) {
        self.unwatched.remove(path);
        self.unlisted.remove(path);
        self.noted.remove(path);
        if let Some(Known {
            watch: Some(watch), ..
        }) = self.groups.remove(path)
            && let Some(watches) = &mut self.watches
        {
            watches.remove(watch);
        }
    }

    /// From now on by these watches, or by none.
    fn replace_watches(&mut self, watches: Option<inotify::Watches>) {
        self.watches = watches;
        for known in self.groups.values_mut() {
            known.watch = None;
        }
        self.unwatched.clear();
    }
}

/// A control group is not there any more.
#[derive(Debug)]
struct Vanished;

fn errno(error: &io::Error) -> Option<Errno> {
    error.raw_os_error().map(Errno::from_raw_os_error)
}

/// Whether an error says that there is no such directory.
fn is_absence(error: &io::Error) -> bool {
    matches!(errno(error), Some(Errno::NOENT | Errno::NOTDIR))
}

/// Whether an error is one that no waiting mends: who has made the control group has made it so.
fn is_lasting(error: &io::Error) -> bool {
    matches!(
        errno(error),
        Some(Errno::ACCESS | Errno::PERM | Errno::NAMETOOLONG)
    )
}

/// Whether there are other control groups in a directory than so many, below those in it; yes if in doubt. The kernel
/// keeps count (`cgroup.stat`), so that not every control group has to be asked for itself.
fn contains_more_than(directory: &Path, count: usize) -> bool {
    if count == 0 {
        return false;
    }
    let text = std::fs::read_to_string(directory.join("cgroup.stat")).unwrap_or_default();
    let descendants = text
        .lines()
        .find_map(|line| line.strip_prefix("nr_descendants "))
        .and_then(|number| number.parse::<usize>().ok());
    descendants != Some(count)
}
