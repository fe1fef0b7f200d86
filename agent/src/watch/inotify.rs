//! inotify: what it says of control groups, and of other files that the agent waits for.
//!
//! The kernel forgets a watch when its file is deleted, but not on cgroupfs, where directories never
//! lose their last link: they keep their watch, and the memory behind it, until it is taken away.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::rc::Rc;

use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask};
use tokio::net::unix::pipe::Receiver;

use super::Hint;
use crate::subtree::Subtree;
use cgtproxy_proto::path::ControlGroupPath;

/// How many bytes of events are read at once.
const BUFFER_BYTES: usize = 16 * 1024;

/// How many events are taken at once; those that were read together with the last one come on top.
const BATCH: usize = 1024;

/// How many bytes an event has without its name. The length of the name is a multiple of it (struct inotify_event).
const EVENT_BYTES: usize = 16;

/// How many bytes an event has with the longest name.
const LONGEST_EVENT: usize = EVENT_BYTES + 256;

/// Something that happened in a watched directory.
#[derive(Debug)]
pub(crate) struct Event {
    /// The number of the watch.
    pub watch: i32,
    /// What happened.
    pub mask: EventMask,
    /// The name of what it happened to; empty if that is the directory itself.
    pub name: Vec<u8>,
}

/// The queue of an inotify instance, which may be read without waiting.
#[derive(Debug)]
struct Queue {
    inotify: Inotify,
    buffer: Vec<u8>,
}

/// The events of an inotify instance.
#[derive(Debug)]
pub(crate) struct Events {
    queue: Rc<RefCell<Queue>>,
    waiting: Waiting,
}

/// A copy of the descriptor, with which the runtime waits for events as for what is in a pipe. It is kept while nobody
/// waits: once closed, there may be no descriptor left for another copy.
#[derive(Debug)]
enum Waiting {
    /// The runtime waits.
    Runtime(Receiver),
    /// Nobody waits: events are left in the queue.
    Nobody(OwnedFd),
    /// The copy is gone, since the runtime could not be told to wait or to stop waiting.
    Lost,
}

impl Waiting {
    /// Has the runtime wait for what can be read.
    fn wait(&mut self, inotify: &Inotify) -> io::Result<&mut Receiver> {
        let copy = match std::mem::replace(self, Self::Lost) {
            Self::Runtime(waiting) => {
                *self = Self::Runtime(waiting);
                None
            }
            Self::Nobody(copy) => Some(copy),
            Self::Lost => Some(inotify.as_fd().try_clone_to_owned()?),
        };
        if let Some(copy) = copy {
            *self = Self::Runtime(Receiver::from_owned_fd_unchecked(copy)?);
        }
        match self {
            Self::Runtime(waiting) => Ok(waiting),
            Self::Nobody(_) | Self::Lost => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// Has nobody wait any more.
    fn leave(&mut self) -> io::Result<()> {
        *self = match std::mem::replace(self, Self::Lost) {
            Self::Runtime(waiting) => Self::Nobody(waiting.into_nonblocking_fd()?),
            other => other,
        };
        Ok(())
    }
}

impl Events {
    /// The events of this instance.
    ///
    /// # Errors
    /// If the runtime can't wait for them.
    pub(crate) fn new(inotify: Inotify) -> io::Result<Self> {
        let mut waiting = Waiting::Lost;
        waiting.wait(&inotify)?;
        let queue = Queue {
            inotify,
            buffer: vec![0; BUFFER_BYTES],
        };
        Ok(Self {
            waiting,
            queue: Rc::new(RefCell::new(queue)),
        })
    }

    /// Waits for events and returns those that there are, at most some `BATCH`. Cancel safe.
    ///
    /// # Errors
    /// If they can't be read.
    pub(crate) async fn next(&mut self) -> io::Result<Vec<Event>> {
        let waiting = self.waiting.wait(&self.queue.borrow().inotify)?;
        loop {
            waiting.readable().await?;
            let mut batch = Vec::new();
            let read = waiting.try_io(|| self.queue.borrow_mut().read(&mut batch));
            match read {
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                _ if batch.is_empty() => {}
                _ => return Ok(batch),
            }
        }
    }

    /// Returns when there are events, and leaves them in the queue: nobody is woken by more of them until somebody
    /// waits for the [next](Self::next) ones. Cancel safe.
    ///
    /// # Errors
    /// If nobody can wait for them.
    pub(crate) async fn leave(&mut self) -> io::Result<()> {
        if let Waiting::Runtime(waiting) = &self.waiting {
            waiting.readable().await?;
        }
        self.waiting.leave()
    }

    /// Whether events are left in the queue.
    pub(crate) fn are_left(&self) -> bool {
        !matches!(self.waiting, Waiting::Runtime(_))
    }

    /// The events that there are now, at most some `BATCH`.
    ///
    /// # Errors
    /// If they can't be read.
    pub(crate) fn fetch(&mut self) -> io::Result<Vec<Event>> {
        self.queue.borrow_mut().fetch()
    }
}

impl Queue {
    /// The events that there are now, at most some `BATCH`.
    fn fetch(&mut self) -> io::Result<Vec<Event>> {
        let mut batch = Vec::new();
        match self.read(&mut batch) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(batch),
        }
    }

    /// Adds the events in the queue to a batch, until it has some [`BATCH`]. The error is `WouldBlock` if the queue is
    /// empty. That is known without asking the kernel again: it stops where the next event does not fit into the
    /// buffer, so there is no next event if the longest one would have fitted.
    fn read(&mut self, batch: &mut Vec<Event>) -> io::Result<()> {
        while batch.len() < BATCH {
            let events = match self.inotify.read_events(&mut self.buffer) {
                Ok(events) => events,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let mut bytes = 0;
            for event in events {
                let name = event.name.map(OsStr::as_bytes).unwrap_or_default();
                // A name ends with a NUL, and is filled up with more of them.
                bytes += EVENT_BYTES + (name.len() + 1).next_multiple_of(EVENT_BYTES);
                batch.push(Event {
                    watch: event.wd.get_watch_descriptor_id(),
                    mask: event.mask,
                    name: name.to_vec(),
                });
            }
            if bytes + LONGEST_EVENT <= BUFFER_BYTES {
                return Err(io::ErrorKind::WouldBlock.into());
            }
        }
        Ok(())
    }
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

/// What a watch is on.
#[derive(Debug)]
enum Watched {
    /// The directory of this index above the subtree's root.
    Ancestor(usize),
    /// A control group.
    Group(ControlGroupPath),
}

/// The watches on a subtree.
#[derive(Debug)]
pub(super) struct Watches {
    inner: inotify::Watches,
    /// Where their events are.
    queue: Rc<RefCell<Queue>>,
    /// The watches on the directories above the subtree's root.
    ancestors: Vec<Option<WatchDescriptor>>,
    watched: HashMap<i32, Watched>,
}

impl Watches {
    /// An inotify instance: its events, and the watches that they come from.
    ///
    /// # Errors
    /// If the kernel has none to spare.
    pub(super) fn open() -> io::Result<(Events, Self)> {
        let inotify = Inotify::init()?;
        let inner = inotify.watches();
        let events = Events::new(inotify)?;
        let watches = Self {
            inner,
            queue: Rc::clone(&events.queue),
            ancestors: Vec::new(),
            watched: HashMap::new(),
        };
        Ok((events, watches))
    }

    /// How many events there are now, at most.
    pub(super) fn waiting(&self) -> usize {
        let bytes = rustix::io::ioctl_fionread(&self.queue.borrow().inotify);
        let bytes = bytes.ok().and_then(|bytes| usize::try_from(bytes).ok());
        bytes.map_or(usize::MAX, |bytes| bytes / EVENT_BYTES)
    }

    /// The events that there are now, at most some `BATCH`.
    ///
    /// # Errors
    /// If they can't be read.
    pub(super) fn fetch(&self) -> io::Result<Vec<Event>> {
        self.queue.borrow_mut().fetch()
    }

    /// Watches a directory, which may be watched already.
    ///
    /// # Errors
    /// If it is not there, or there are no watches left.
    pub(super) fn add(&mut self, directory: &Path) -> io::Result<WatchDescriptor> {
        self.inner.add(directory, mask())
    }

    /// Ends a watch.
    pub(super) fn remove(&mut self, watch: WatchDescriptor) {
        self.watched.remove(&watch.get_watch_descriptor_id());
        // Fails where the kernel has forgotten it by itself.
        let _ = self.inner.remove(watch);
    }

    /// The control group that a watch is on, if it is on one.
    pub(super) fn group(&self, watch: &WatchDescriptor) -> Option<&ControlGroupPath> {
        match self.watched.get(&watch.get_watch_descriptor_id())? {
            Watched::Group(path) => Some(path),
            Watched::Ancestor(_) => None,
        }
    }

    /// Notes which control group a watch is on.
    pub(super) fn assign(&mut self, watch: &WatchDescriptor, path: ControlGroupPath) {
        self.watched
            .insert(watch.get_watch_descriptor_id(), Watched::Group(path));
    }

    /// Watches the directories above the root, which tell when the root comes and goes.
    pub(super) fn watch_ancestors(&mut self, subtree: &Subtree) {
        let directories: Vec<_> = subtree.ancestors().map(|(d, _)| d).collect();
        self.ancestors.resize_with(directories.len(), || None);
        for (index, directory) in directories.into_iter().enumerate() {
            let new = self.inner.add(&directory, mask()).ok();
            let Some(slot) = self.ancestors.get_mut(index) else {
                return;
            };
            let id = new.as_ref().map(WatchDescriptor::get_watch_descriptor_id);
            let old = std::mem::replace(slot, new);
            if let Some(old) = old
                && Some(old.get_watch_descriptor_id()) != id
            {
                self.watched.remove(&old.get_watch_descriptor_id());
                let _ = self.inner.remove(old);
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

    /// What an event says of control groups, if anything.
    pub(super) fn hint(&self, subtree: &Subtree, event: &Event) -> Option<Hint> {
        tracing::trace!("inotify: {event:?}");
        if event.mask.contains(EventMask::Q_OVERFLOW) {
            return Some(Hint::LostTrack);
        }
        // A watch that was taken away meanwhile: what it saw has been looked at since.
        let watched = self.watched.get(&event.watch)?;
        if !event.mask.contains(EventMask::ISDIR) || event.mask.contains(EventMask::IGNORED) {
            return None;
        }
        let deleted = event
            .mask
            .intersects(EventMask::DELETE | EventMask::MOVED_FROM);
        match watched {
            Watched::Ancestor(index) => {
                let leads_on = subtree.path().components().nth(*index);
                (leads_on == Some(event.name.as_slice())).then_some(Hint::Above { deleted })
            }
            Watched::Group(parent) => match parent.join(&event.name) {
                Ok(path) if deleted => Some(Hint::Gone(path)),
                Ok(path) => Some(Hint::Made(path)),
                Err(_) if deleted => None,
                Err(why) => Some(Hint::Unnameable {
                    parent: parent.clone(),
                    name: event.name.clone(),
                    why,
                }),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use tempfile::TempDir;

    use super::*;

    /// A directory, and what happens in it.
    fn watched() -> (TempDir, Events) {
        let directory = tempfile::tempdir().unwrap();
        let inotify = Inotify::init().unwrap();
        let mut watches = inotify.watches();
        watches.add(directory.path(), mask()).unwrap();
        (directory, Events::new(inotify).unwrap())
    }

    /// Makes directories with names as long as can be.
    fn make(directory: &TempDir, numbers: Range<usize>) {
        for number in numbers {
            std::fs::create_dir(directory.path().join(format!("{number:0>255}"))).unwrap();
        }
    }

    fn numbers(batch: Vec<Event>) -> Vec<usize> {
        let number = |event: Event| String::from_utf8(event.name).unwrap().parse().unwrap();
        batch.into_iter().map(number).collect()
    }

    #[tokio::test]
    async fn what_is_left_is_there_later() {
        let (directory, mut events) = watched();
        make(&directory, 0..1);
        events.leave().await.unwrap();
        assert!(events.are_left());
        make(&directory, 1..3);
        assert_eq!(numbers(events.fetch().unwrap()), [0, 1, 2]);
        assert!(events.fetch().unwrap().is_empty());
        // Before anybody waits again, and after.
        make(&directory, 3..4);
        assert_eq!(numbers(events.next().await.unwrap()), [3]);
        assert!(!events.are_left());
        let (next, ()) = tokio::join!(events.next(), async { make(&directory, 4..5) });
        assert_eq!(numbers(next.unwrap()), [4]);
    }

    #[tokio::test]
    async fn all_are_read_however_many_there_are() {
        const MANY: usize = 3 * BATCH;
        let (directory, mut events) = watched();
        make(&directory, 0..MANY);
        let mut read = Vec::new();
        while read.len() < MANY {
            let batch = events.next().await.unwrap();
            assert!(batch.len() < 2 * BATCH);
            read.extend(numbers(batch));
        }
        assert!(read.into_iter().eq(0..MANY));
        let (next, ()) = tokio::join!(events.next(), async { make(&directory, MANY..MANY + 1) });
        assert_eq!(numbers(next.unwrap()), [MANY]);
    }
}
