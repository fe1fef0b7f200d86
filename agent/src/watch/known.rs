//! By what a control group is known, and told from another one at the same path.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use ::inotify::WatchDescriptor;
use cgtproxy_proto::path::ControlGroupPath;
use rustix::io::Errno;
use tracing::Level;

use super::watcher::Watcher;
use crate::makers::maker;
use crate::said::{Kind, say};
use crate::state::Observer;
use crate::text::chain;

/// How many watches a user has at least, unless somebody has lowered that (`inotify_user_setup`,
/// fs/notify/inotify/inotify_user.c).
const FEWEST_WATCHES: usize = 8192;

/// A control group that is known.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// None if it is not watched.
    pub(super) watch: Option<WatchDescriptor>,
    /// The number of its inode, if it is known by that and not by its watch.
    pub(super) id: Option<u64>,
}

impl Watcher {
    /// What tells a control group from another one at the same path.
    pub(super) fn identity(&self, path: &ControlGroupPath) -> Option<(Option<i32>, Option<u64>)> {
        let known = self.groups.get(path)?;
        let watch = known.watch.as_ref();
        Some((
            watch.map(WatchDescriptor::get_watch_descriptor_id),
            known.id,
        ))
    }

    pub(super) fn is_watched(&self, path: &ControlGroupPath) -> bool {
        let known = self.groups.get(path);
        known.is_some_and(|known| known.watch.is_some())
    }

    /// Watches a control group and reports it, or that it is gone.
    pub(super) fn enter(
        &mut self,
        path: &ControlGroupPath,
        observer: &mut dyn Observer,
    ) -> Option<ControlGroupPath> {
        tracing::trace!("looking at {path:?}");
        let directory = self.working_directory.directory(&self.subtree, path);
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
                    self.remove_unless_assigned(watch);
                    return self.unseen(path, found.err(), observer);
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
        self.know(&kept, watch, id);
        Some(kept)
    }

    /// Notes by what a control group is known.
    fn know(&mut self, path: &ControlGroupPath, watch: Option<WatchDescriptor>, id: Option<u64>) {
        if let Some(watch) = &watch {
            if let Some(watches) = &mut self.watches {
                watches.assign(watch, path.clone());
            }
            self.unwatched.remove(path);
        }
        let is_watched = watch.is_some();
        let id = id.filter(|_| !is_watched);
        let before = self.groups.insert(path.clone(), Known { watch, id });
        let was_watched = before.is_some_and(|before| before.watch.is_some());
        if let Some(share) = self.share.as_mut().filter(|_| maker(path).is_some()) {
            match (was_watched, is_watched) {
                (false, true) => share.count(path),
                (true, false) => share.give_back(path),
                _ => {}
            }
        }
    }

    /// Takes a watch away that no control group has yet: nothing else would remove it.
    fn remove_unless_assigned(&mut self, watch: Option<WatchDescriptor>) {
        if let (Some(watch), Some(watches)) = (watch, &mut self.watches)
            && watches.group(&watch).is_none()
        {
            watches.remove(watch);
        }
    }

    /// No directory could be seen, and by which error, if there was one. A control group that was known and may be there
    /// still stays as it was; any other is gone.
    fn unseen(
        &mut self,
        path: &ControlGroupPath,
        error: Option<io::Error>,
        observer: &mut dyn Observer,
    ) -> Option<ControlGroupPath> {
        let known = self
            .groups
            .get_key_value(path)
            .map(|(path, _)| path.clone());
        if let (Some(error), Some(known)) = (error, known)
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
        None
    }

    /// Watches a directory, if inotify is to be used and can, and whoever makes the control group has not too many watches
    /// already.
    fn watch(
        &mut self,
        path: &ControlGroupPath,
        directory: &Path,
    ) -> Result<Option<WatchDescriptor>, Vanished> {
        let Some(watches) = &mut self.watches else {
            return Ok(None);
        };
        let known = self.groups.get(path);
        let is_new = known.is_none_or(|known| known.watch.is_none());
        if let Some(share) = &self.share
            && is_new
            && !share.is_for_maker_of(path)
        {
            "one user's control groups may have no more of root's inotify watches than are left for \
             others (fs.inotify.max_user_watches)"
                .clone_into(&mut self.unwatched_why);
            if self.unwatched.insert(path.clone()) {
                let is_news = self.said.is_news(Kind::Unwatched, path);
                say(is_news, Level::WARN, || {
                    let name = self.subtree.shown(path);
                    format!(
                        "'{name}' is looked at every now and then: {}",
                        self.unwatched_why
                    )
                });
            }
            return Ok(None);
        }
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
                    let is_news = self.said.is_news(Kind::Unwatched, path);
                    say(is_news, Level::WARN, || {
                        let name = self.subtree.shown(path);
                        format!("can't watch '{name}': {}", chain(&error))
                    });
                }
            }
        }
        self.unwatched.insert(path.clone());
        Ok(None)
    }

    /// A control group is gone: forgets it and all below.
    pub(super) fn gone(&mut self, path: &ControlGroupPath, observer: &mut dyn Observer) {
        for path in observer.removed(path) {
            self.forget(&path);
        }
        self.forget(path);
    }

    fn forget(&mut self, path: &ControlGroupPath) {
        self.unwatched.remove(path);
        self.unlisted.remove(path);
        self.noted.remove(path);
        self.pending.remove(path);
        if let Some(Known {
            watch: Some(watch), ..
        }) = self.groups.remove(path)
            && let Some(watches) = &mut self.watches
        {
            watches.remove(watch);
            if let Some(share) = self.share.as_mut().filter(|_| maker(path).is_some()) {
                share.give_back(path);
            }
        }
    }
}

/// How many watches the agent may have for users' control groups: root's watches are for other programs as well, the
/// service manager among them, so half of them are. If nobody says how many there are, they are as few as the kernel has
/// at least.
pub(super) fn share_of_watches() -> usize {
    let limits = [
        "/proc/sys/fs/inotify/max_user_watches",
        // The same, but for a user namespace.
        "/proc/sys/user/max_inotify_watches",
    ];
    let read = |file: &str| std::fs::read_to_string(file).ok()?.trim().parse().ok();
    limits
        .into_iter()
        .filter_map(read)
        .min()
        .unwrap_or(FEWEST_WATCHES)
        / 2
}

/// A control group is not there any more.
#[derive(Debug)]
pub(super) struct Vanished;

pub(super) fn errno(error: &io::Error) -> Option<Errno> {
    error.raw_os_error().map(Errno::from_raw_os_error)
}

/// Whether an error says that there is no such directory.
pub(super) fn is_absence(error: &io::Error) -> bool {
    matches!(errno(error), Some(Errno::NOENT | Errno::NOTDIR))
}

/// Whether an error is one that no waiting mends: who has made the control group has made it so.
pub(super) fn is_lasting(error: &io::Error) -> bool {
    matches!(
        errno(error),
        Some(Errno::ACCESS | Errno::PERM | Errno::NAMETOOLONG)
    )
}
