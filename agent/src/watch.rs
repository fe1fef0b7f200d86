//! Watches the control groups of a subtree with inotify.
//!
//! An event is only a hint that something has changed; what is there is looked up. A directory is
//! watched first and listed then, so that what is made in between is seen twice rather than never.
//!
//! The kernel forgets a watch when its file is deleted, but not on cgroupfs, where directories never
//! lose their last link: they keep their watch, and the memory behind it, until it is taken away.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::pin::Pin;
use std::task::Poll;

use cgtproxy_proto::path::ControlGroupPath;
use futures_core::Stream;
use inotify::{EventMask, EventStream, Inotify, WatchDescriptor, WatchMask, Watches};

use crate::policy::Shared;
use crate::state::Agent;
use crate::subtree::Subtree;
use crate::text::{chain, printable};

/// How many bytes of events are read at once.
const BUFFER_BYTES: usize = 16 * 1024;

/// How many events are taken at once.
const BATCH: usize = 1024;

/// How many directories are looked at before new events are read, so that a burst of new control
/// groups does not keep the next one waiting.
const LOOKS: usize = 32;

/// Who is told of control groups.
pub trait Observer {
    /// A control group is there. It may be known already. Returns the path as it is kept.
    fn added(&mut self, path: ControlGroupPath) -> Shared;
    /// A control group is gone, with everything below. Returns all that were known.
    fn removed(&mut self, path: &ControlGroupPath) -> Vec<Shared>;
    /// Events were lost: any control group may be another one than before.
    fn lost_track(&mut self);
}

/// Why nothing can be watched.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The limit of inotify instances, most likely.
    #[error("can't use inotify; if 'too many open files', raise fs.inotify.max_user_instances")]
    Init(#[source] io::Error),
    /// Reading events failed.
    #[error("can't read inotify events")]
    Read(#[source] io::Error),
}

/// What a watch is on.
#[derive(Debug)]
enum Watched {
    /// The directory of this index above the subtree's root.
    Ancestor(usize),
    /// A control group.
    Group(Shared),
}

/// Something that happened in a watched directory.
#[derive(Debug)]
pub struct Event {
    /// The number of the watch.
    pub watch: i32,
    /// What happened.
    pub mask: EventMask,
    /// To what; empty if to the directory itself.
    pub name: Vec<u8>,
}

/// The watches on a subtree.
#[derive(Debug)]
pub struct Watcher {
    subtree: Subtree,
    watches: Watches,
    /// The watches above the subtree's root.
    ancestors: Vec<Option<WatchDescriptor>>,
    /// None for a control group that could not be watched.
    groups: BTreeMap<Shared, Option<WatchDescriptor>>,
    watched: HashMap<i32, Watched>,
    /// Control groups that were announced and not looked at yet.
    pending: VecDeque<ControlGroupPath>,
    /// It was said that there are no watches left.
    exhausted: bool,
}

fn mask() -> WatchMask {
    WatchMask::CREATE
        | WatchMask::DELETE
        | WatchMask::MOVED_FROM
        | WatchMask::MOVED_TO
        | WatchMask::ONLYDIR
        | WatchMask::DONT_FOLLOW
        | WatchMask::EXCL_UNLINK
}

/// The events of an inotify instance.
pub struct Events(EventStream<Vec<u8>>);

impl Events {
    /// The events of this instance.
    ///
    /// # Errors
    /// If the runtime can't wait for them.
    pub fn new(inotify: Inotify) -> io::Result<Self> {
        Ok(Self(inotify.into_event_stream(vec![0; BUFFER_BYTES])?))
    }

    /// Waits for events and returns those that there are, at most [`BATCH`]. Cancel safe.
    ///
    /// # Errors
    /// If they can't be read.
    pub async fn next(&mut self) -> io::Result<Vec<Event>> {
        let mut batch = Vec::new();
        std::future::poll_fn(|context| {
            while batch.len() < BATCH {
                match Pin::new(&mut self.0).poll_next(context) {
                    Poll::Ready(Some(event)) => {
                        let event = event?;
                        batch.push(Event {
                            watch: event.wd.get_watch_descriptor_id(),
                            mask: event.mask,
                            name: event.name.map(OsString::into_vec).unwrap_or_default(),
                        });
                    }
                    Poll::Ready(None) => {
                        return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
                    }
                    Poll::Pending if batch.is_empty() => return Poll::Pending,
                    Poll::Pending => break,
                }
            }
            Poll::Ready(Ok(std::mem::take(&mut batch)))
        })
        .await
    }
}

/// inotify over a subtree: the events, and the watches that they come from.
///
/// # Errors
/// If the kernel has no inotify instance to spare.
pub fn open(subtree: Subtree) -> Result<(Events, Watcher), Error> {
    let inotify = Inotify::init().map_err(Error::Init)?;
    let watches = inotify.watches();
    let events = Events::new(inotify).map_err(Error::Init)?;
    let watcher = Watcher {
        ancestors: subtree.ancestors().map(|_| None).collect(),
        subtree,
        watches,
        groups: BTreeMap::new(),
        watched: HashMap::new(),
        pending: VecDeque::new(),
        exhausted: false,
    };
    Ok((events, watcher))
}

/// Watches until it fails. `watcher` has looked at everything once.
///
/// # Errors
/// If events can't be read any more.
pub async fn run(
    mut events: Events,
    watcher: &RefCell<Watcher>,
    agent: &Agent,
) -> Result<(), Error> {
    loop {
        let idle = watcher.borrow().pending.is_empty();
        let batch = tokio::select! {
            biased;
            batch = events.next() => batch.map_err(Error::Read)?,
            () = tokio::task::yield_now(), if !idle => Vec::new(),
        };
        if !batch.is_empty() {
            {
                let mut watcher = watcher.borrow_mut();
                let mut state = agent.state_mut();
                for event in batch {
                    watcher.hint(&event, &mut *state);
                }
            }
            agent.wake();
            // What is known by now goes out before the new directories are looked into.
            tokio::task::yield_now().await;
        }
        let looked = {
            let mut watcher = watcher.borrow_mut();
            let mut state = agent.state_mut();
            watcher.look_at_pending(LOOKS, &mut *state)
        };
        if looked {
            agent.wake();
        }
    }
}

impl Watcher {
    /// Looks at the whole subtree. What is gone is reported as well.
    pub fn scan(&mut self, observer: &mut dyn Observer) {
        self.pending.clear();
        self.watch_ancestors();
        let mut seen = HashSet::new();
        let mut stack = vec![ControlGroupPath::root()];
        while let Some(path) = stack.pop() {
            if let Some(path) = self.enter(&path, observer) {
                self.list(&path, &mut stack);
                seen.insert(path);
            }
        }
        let gone: Vec<Shared> = self
            .groups
            .keys()
            .filter(|path| !seen.contains(*path))
            .cloned()
            .collect();
        for path in gone {
            self.gone(&path, observer);
        }
    }

    /// Looks at one control group and, if it is new, at everything below it.
    pub fn look(&mut self, path: &ControlGroupPath, observer: &mut dyn Observer) {
        let mut stack = vec![path.clone()];
        while let Some(path) = stack.pop() {
            let known = self.groups.contains_key(&path);
            let before = self.watch_of(&path);
            if let Some(path) = self.enter(&path, observer)
                && !(known && before == self.watch_of(&path))
            {
                self.list(&path, &mut stack);
            }
        }
    }

    fn look_at_pending(&mut self, count: usize, observer: &mut dyn Observer) -> bool {
        let mut looked = false;
        for _ in 0..count {
            let Some(path) = self.pending.pop_front() else {
                break;
            };
            self.look(&path, observer);
            looked = true;
        }
        looked
    }

    fn hint(&mut self, event: &Event, observer: &mut dyn Observer) {
        tracing::trace!("inotify: {event:?}");
        if event.mask.contains(EventMask::Q_OVERFLOW) {
            tracing::info!("more happened at once than inotify could tell: looking at everything");
            self.scan(observer);
            observer.lost_track();
            return;
        }
        // A watch that was taken away meanwhile: what it saw has been looked at since.
        let Some(watched) = self.watched.get(&event.watch) else {
            return;
        };
        if !event.mask.contains(EventMask::ISDIR) || event.mask.contains(EventMask::IGNORED) {
            return;
        }
        let deleted = event
            .mask
            .intersects(EventMask::DELETE | EventMask::MOVED_FROM);
        match watched {
            Watched::Ancestor(index) => {
                let leads_on = self.subtree.path().components().nth(*index);
                if leads_on == Some(event.name.as_slice()) {
                    if deleted {
                        self.gone(&ControlGroupPath::root(), observer);
                    }
                    self.watch_ancestors();
                    self.look(&ControlGroupPath::root(), observer);
                }
            }
            Watched::Group(parent) => match parent.join(&event.name) {
                Err(why) => tracing::warn!(
                    "can't follow '{}' in '{}': {why}",
                    printable(&String::from_utf8_lossy(&event.name)),
                    printable(&parent.to_wire()),
                ),
                // Which control group has gone can't be told from the event. If there is one, it
                // counts as another one: the helper must look the path up again.
                Ok(path) if deleted => {
                    self.gone(&path, observer);
                    self.look(&path, observer);
                }
                Ok(path) => {
                    observer.added(path.clone());
                    self.pending.push_back(path);
                }
            },
        }
    }

    fn watch_of(&self, path: &ControlGroupPath) -> Option<i32> {
        let watch = self.groups.get(path)?.as_ref()?;
        Some(watch.get_watch_descriptor_id())
    }

    /// Watches the directories above the root, which tell when the root comes and goes.
    fn watch_ancestors(&mut self) {
        let directories: Vec<_> = self.subtree.ancestors().map(|(d, _)| d).collect();
        for (index, directory) in directories.into_iter().enumerate() {
            let new = self.watches.add(&directory, mask()).ok();
            let Some(slot) = self.ancestors.get_mut(index) else {
                return;
            };
            let id = new.as_ref().map(WatchDescriptor::get_watch_descriptor_id);
            let old = std::mem::replace(slot, new);
            if let Some(old) = old
                && Some(old.get_watch_descriptor_id()) != id
            {
                self.watched.remove(&old.get_watch_descriptor_id());
                let _ = self.watches.remove(old);
            }
            match id {
                Some(id) => {
                    self.watched.insert(id, Watched::Ancestor(index));
                }
                // What is below it is not there either.
                None => tracing::debug!("can't watch '{}'", directory.display()),
            }
        }
    }

    /// Watches a control group and reports it, or that it is gone.
    fn enter(&mut self, path: &ControlGroupPath, observer: &mut dyn Observer) -> Option<Shared> {
        tracing::trace!("looking at {path:?}");
        let directory = self.subtree.directory(path);
        let watch = match self.watches.add(&directory, mask()) {
            Ok(watch) => {
                self.exhausted = false;
                Some(watch)
            }
            Err(error) => match self.unwatched(path, &directory, &error) {
                true => None,
                false => {
                    self.gone(path, observer);
                    return None;
                }
            },
        };
        let id = watch.as_ref().map(WatchDescriptor::get_watch_descriptor_id);
        if let Some((known, before)) = self.groups.get_key_value(path) {
            let before = before
                .as_ref()
                .map(WatchDescriptor::get_watch_descriptor_id);
            match (before, id) {
                (Some(before), Some(id)) if before == id => return Some(known.clone()),
                // It could not be watched before, or can't any more: that does not make it another.
                (None, _) | (_, None) => {}
                (Some(_), Some(_)) => self.gone(path, observer),
            }
        }
        // Another path had this very directory: it was renamed, which cgroupfs never does.
        if let Some(Watched::Group(other)) = id.and_then(|id| self.watched.get(&id)) {
            let other = other.clone();
            if *other != *path {
                self.gone(&other, observer);
                return self.enter(path, observer);
            }
        }
        let shared = observer.added(path.clone());
        if let Some(id) = id {
            self.watched.insert(id, Watched::Group(shared.clone()));
        }
        self.groups.insert(shared.clone(), watch);
        Some(shared)
    }

    /// Whether a control group that can't be watched is there nevertheless.
    fn unwatched(&mut self, path: &ControlGroupPath, directory: &Path, error: &io::Error) -> bool {
        match error
            .raw_os_error()
            .map(rustix::io::Errno::from_raw_os_error)
        {
            Some(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => false,
            Some(rustix::io::Errno::NOSPC) => {
                if !self.exhausted {
                    self.exhausted = true;
                    tracing::warn!(
                        "inotify has no watches left for '{}': what starts in it and in later ones \
                         goes unnoticed; raise fs.inotify.max_user_watches with sysctl and reload",
                        printable(&self.subtree.to_wire(path)),
                    );
                }
                std::fs::symlink_metadata(directory).is_ok_and(|m| m.is_dir())
            }
            _ => {
                let name = printable(&self.subtree.to_wire(path));
                tracing::warn!("can't watch '{name}': {}", chain(error));
                std::fs::symlink_metadata(directory).is_ok_and(|m| m.is_dir())
            }
        }
    }

    /// Adds the control groups in one to `found`.
    fn list(&self, path: &ControlGroupPath, found: &mut Vec<ControlGroupPath>) {
        let directory = self.subtree.directory(path);
        // Each directory in it is a link to it, beside the two that every directory has. (File
        // systems that do not count so say 1.)
        match std::fs::symlink_metadata(&directory) {
            Ok(metadata) if metadata.nlink() != 2 => {}
            _ => return,
        }
        let entries = match std::fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => {
                let name = printable(&self.subtree.to_wire(path));
                return tracing::warn!("can't list '{name}': {}", chain(&error));
            }
        };
        // Reading ends early when the directory vanishes meanwhile; its parent tells of that.
        for entry in entries.map_while(Result::ok) {
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                let name: &OsStr = &entry.file_name();
                match path.join(name.as_bytes()) {
                    Ok(child) => found.push(child),
                    Err(why) => tracing::warn!(
                        "can't follow '{}': {why}",
                        printable(&entry.path().to_string_lossy())
                    ),
                }
            }
        }
    }

    /// A control group is gone: forgets it and all below.
    fn gone(&mut self, path: &ControlGroupPath, observer: &mut dyn Observer) {
        for path in observer.removed(path) {
            self.forget(&path);
        }
        self.forget(path);
    }

    fn forget(&mut self, path: &ControlGroupPath) {
        if let Some(Some(watch)) = self.groups.remove(path) {
            self.watched.remove(&watch.get_watch_descriptor_id());
            // Fails where the kernel has forgotten it by itself.
            let _ = self.watches.remove(watch);
        }
    }
}
