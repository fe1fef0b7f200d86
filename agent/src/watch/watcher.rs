//! The control groups of a subtree, as far as they are known: looks them up, and watches them.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ffi::OsStr;
use std::io;
use std::iter::successors;
use std::os::unix::ffi::OsStrExt;

use cgtproxy_proto::path::ControlGroupPath;
use tracing::Level;

use super::directory::WorkingDirectory;
use super::inotify::Event;
use super::known::{Known, share_of_watches};
use super::listing::contains_more_than;
use super::pending::Pending;
use super::{Hint, inotify};
use crate::config::Monitor;
use crate::makers::Room;
use crate::said::{Said, say};
use crate::state::Observer;
use crate::subtree::{Subtree, descendants};

/// The control groups of a subtree, as far as they are known.
#[derive(Debug)]
pub(crate) struct Watcher {
    pub(super) subtree: Subtree,
    pub(super) monitor: Monitor,
    /// None if inotify is not to be used, or can't be.
    pub(super) watches: Option<inotify::Watches>,
    pub(super) groups: BTreeMap<ControlGroupPath, Known>,
    /// How many of root's watches users' control groups may have, and have. None if the subtree is a user's own.
    pub(super) share: Option<Room>,
    /// Control groups that should be watched and are not.
    pub(super) unwatched: BTreeSet<ControlGroupPath>,
    /// Why one of `unwatched` could not be watched the last time.
    pub(super) unwatched_why: String,
    /// Control groups that could not be listed.
    pub(super) unlisted: BTreeSet<ControlGroupPath>,
    /// Why one of `unlisted` could not be listed the last time.
    pub(super) unlisted_why: String,
    /// cgroupfs can't be read at all.
    pub(super) blind: bool,
    /// Control groups that were announced and not looked at yet.
    pub(super) pending: Pending,
    /// What was found in control groups that are to be watched later, with inodes and in order.
    pub(super) noted: BTreeMap<ControlGroupPath, Vec<(ControlGroupPath, u64)>>,
    pub(super) working_directory: WorkingDirectory,
    /// What was logged of control groups that users have made so.
    pub(super) said: Said,
    /// Something has happened since everything was looked at.
    pub(super) hinted: bool,
    /// Events were lost since everything was looked at.
    pub(super) lost: bool,
    /// It was logged that events were lost.
    pub(super) said_lost: bool,
    /// It was logged that inotify can't be used.
    pub(super) said_unusable: bool,
    /// It was logged that there are no watches left.
    pub(super) said_exhausted: bool,
    /// It was logged that control groups can't be listed.
    pub(super) said_unlisted: bool,
}

impl Watcher {
    pub(super) fn new(subtree: Subtree, monitor: Monitor) -> Self {
        let is_shared = subtree.is_machines();
        let mut watcher = Self {
            subtree,
            monitor,
            watches: None,
            groups: BTreeMap::new(),
            share: is_shared.then(|| Room::new(share_of_watches())),
            unwatched: BTreeSet::new(),
            unwatched_why: String::new(),
            unlisted: BTreeSet::new(),
            unlisted_why: String::new(),
            blind: false,
            pending: Pending::new(is_shared),
            noted: BTreeMap::new(),
            working_directory: WorkingDirectory::new(),
            said: Said::default(),
            hinted: false,
            lost: false,
            said_lost: false,
            said_unusable: false,
            said_exhausted: false,
            said_unlisted: false,
        };
        watcher.check_visibility();
        watcher
    }

    /// Finds out whether cgroupfs can be read.
    pub(super) fn check_visibility(&mut self) {
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

    /// Has everything logged again that is still wrong.
    pub(crate) fn forget_what_was_said(&mut self) {
        self.said.forget();
        self.said_lost = false;
        self.said_unusable = false;
        self.said_exhausted = false;
        self.said_unlisted = false;
    }

    /// Reports every control group of the subtree, of which nothing is known yet, and leaves them to be watched later:
    /// they wait for their verdicts and not for their watches. What comes or goes meanwhile is found when its parent is
    /// watched and listed; a control group that was made again at the same path is told by its inode. Control groups with
    /// others in them are watched first, since service managers make more there.
    pub(super) fn discover(&mut self, observer: &mut dyn Observer) {
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
        empty
            .into_iter()
            .for_each(|path| self.pending.push_back(path));
    }

    /// Looks at the whole subtree. What is gone is reported as well. If events were lost, so is what was only
    /// announced: nothing but an event would tell that there is another one at the same path.
    pub(crate) fn scan(&mut self, observer: &mut dyn Observer) {
        self.hinted = false;
        if let Some(share) = &mut self.share {
            share.resize(share_of_watches());
        }
        self.check_visibility();
        if self.blind {
            return;
        }
        let lost = std::mem::take(&mut self.lost);
        self.watch_ancestors();
        let mut seen = HashSet::new();
        let mut stack = vec![ControlGroupPath::root()];
        let mut found = Vec::new();
        while let Some(path) = stack.pop() {
            self.working_directory.approach(&self.subtree, &path);
            if lost && !self.groups.contains_key(&path) {
                self.gone(&path, observer);
            }
            if let Some(path) = self.enter(&path, observer) {
                if !self.list(&path, &mut found, observer) {
                    // What is in it is as good as seen.
                    seen.extend(descendants(&self.groups, &path).cloned());
                }
                seen.insert(path);
                stack.extend(found.drain(..).map(|(path, _)| path));
            }
        }
        self.working_directory.go_home();
        let is_gone = |path: &&ControlGroupPath| !seen.contains(*path);
        let mut gone: Vec<_> = self.groups.keys().filter(is_gone).cloned().collect();
        if lost {
            let announced = |path: &&ControlGroupPath| !self.groups.contains_key(*path);
            let unlisted =
                |path: &&ControlGroupPath| self.unlisted.iter().any(|above| path.is_within(above));
            let pending = self.pending.iter().filter(announced);
            gone.extend(pending.filter(|path| !unlisted(path)).cloned());
        }
        for path in gone {
            self.gone(&path, observer);
        }
    }

    /// Looks at one control group and, if it is new or not watched, at everything below it. Its ancestors are looked at
    /// before: if one of them was made again, what is known of the control group is forgotten. Then takes the events in
    /// inotify's queue: only they tell whether one that is not watched yet is the one that was there before.
    pub(crate) fn look(&mut self, path: &ControlGroupPath, observer: &mut dyn Observer) {
        self.look_down_to(path, observer);
        let found = self.groups.contains_key(path);
        self.take_events(observer);
        if found && !self.groups.contains_key(path) {
            self.look_down_to(path, observer);
        }
    }

    /// Looks at one control group and those above it, whatever is in inotify's queue.
    pub(super) fn look_down_to(&mut self, path: &ControlGroupPath, observer: &mut dyn Observer) {
        if self.blind {
            return;
        }
        let mut found = Vec::new();
        let mut around = Vec::from_iter(successors(path.parent(), ControlGroupPath::parent));
        while let Some(path) = around.pop() {
            let before = self.identity(&path);
            self.working_directory.approach(&self.subtree, &path);
            if self.enter(&path, observer).is_some() && before != self.identity(&path) {
                self.list(&path, &mut found, observer);
            }
        }
        let mut stack = Vec::from_iter(found.drain(..).map(|(path, _)| path));
        stack.push(path.clone());
        while let Some(path) = stack.pop() {
            self.working_directory.approach(&self.subtree, &path);
            self.look_at(&path, &mut found, observer);
            stack.extend(found.drain(..).map(|(path, _)| path));
        }
        self.working_directory.go_home();
    }

    /// Takes the events that are in inotify's queue now; of those that come meanwhile, not without end.
    fn take_events(&mut self, observer: &mut dyn Observer) {
        let mut left = self.watches.as_ref().map_or(0, inotify::Watches::waiting);
        while left > 0
            && let Some(watches) = &self.watches
            // If they can't be read, whoever waits for them finds out.
            && let Ok(batch) = watches.fetch()
            && !batch.is_empty()
        {
            left = left.saturating_sub(batch.len());
            self.take(batch, observer);
        }
    }

    /// Takes these events of inotify.
    pub(super) fn take(&mut self, batch: Vec<Event>, observer: &mut dyn Observer) {
        for event in batch {
            let watches = self.watches.as_ref();
            if let Some(hint) = watches.and_then(|watches| watches.hint(&self.subtree, &event)) {
                self.hint(hint, observer);
            }
        }
        self.hinted = true;
    }

    /// Looks at one control group, and adds what is in it to `found`, with inodes, if it is new or not watched.
    pub(super) fn look_at(
        &mut self,
        path: &ControlGroupPath,
        found: &mut Vec<(ControlGroupPath, u64)>,
        observer: &mut dyn Observer,
    ) {
        let before = self.identity(path);
        if let Some(path) = self.enter(path, observer)
            && (before != self.identity(&path) || !self.is_watched(&path))
        {
            self.list(&path, found, observer);
        }
    }

    /// The highest control group that is not known among this one and its ancestors; this one if all are known.
    pub(super) fn first_unknown(&self, path: &ControlGroupPath) -> ControlGroupPath {
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

    pub(super) fn look_at_pending(&mut self, count: usize, observer: &mut dyn Observer) -> bool {
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
            self.working_directory.go_beside(&self.subtree, &path);
            self.look_at(&path, &mut found, observer);
            let watched = self.is_watched(&path);
            for (child, inode) in found.drain(..) {
                if !self.groups.contains_key(&child) {
                    let child = observer.added(child);
                    if !watched {
                        self.note_inode(child.clone(), inode);
                    }
                    self.pending.push_back(child);
                }
            }
        }
        self.working_directory.go_home();
        looked
    }

    /// Takes a hint.
    pub(super) fn hint(&mut self, hint: Hint, observer: &mut dyn Observer) {
        match hint {
            Hint::LostTrack => {
                // Whoever makes enough control groups brings this about again and again.
                let is_news = !std::mem::replace(&mut self.said_lost, true);
                say(is_news, Level::INFO, || {
                    "more happened at once than inotify could tell: looking at everything"
                        .to_owned()
                });
                self.lost = true;
                self.scan(observer);
                observer.lost_track();
            }
            Hint::Above { deleted } => {
                if deleted {
                    self.gone(&ControlGroupPath::root(), observer);
                }
                self.watch_ancestors();
                self.look_down_to(&ControlGroupPath::root(), observer);
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

    pub(super) fn watch_ancestors(&mut self) {
        if let Some(watches) = &mut self.watches {
            watches.watch_ancestors(&self.subtree);
        }
    }

    /// Whether a control group that should be watched is not, or could not be listed.
    pub(super) fn is_incomplete(&self) -> bool {
        let unwatched = !self.unwatched.is_empty() || self.watches.is_none();
        self.monitor != Monitor::Dbus && unwatched || !self.unlisted.is_empty()
    }

    /// Whether systemd is to be asked.
    pub(super) fn needs_systemd(&self) -> bool {
        match self.monitor {
            Monitor::Dbus => true,
            Monitor::Auto => self.blind || self.is_incomplete(),
            Monitor::Inotify => false,
        }
    }

    /// Uses these watches from now on, or none.
    pub(super) fn replace_watches(&mut self, watches: Option<inotify::Watches>) {
        let former = std::mem::replace(&mut self.watches, watches);
        self.lost |= former.is_some();
        for known in self.groups.values_mut() {
            known.watch = None;
        }
        self.share = self.share.take().map(|_| Room::new(share_of_watches()));
        self.unwatched.clear();
    }
}
