//! inotify: what it says of control groups, and of other files that the agent waits for.
//!
//! The kernel forgets a watch when its file is deleted, but not on cgroupfs, where directories never
//! lose their last link: they keep their watch, and the memory behind it, until it is taken away.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::pin::Pin;
use std::task::Poll;

use futures_core::Stream;
use inotify::{EventMask, EventStream, Inotify, WatchDescriptor, WatchMask};

use super::Hint;
use crate::policy::Shared;
use crate::subtree::Subtree;
use crate::text::printable;

/// How many bytes of events are read at once.
const BUFFER_BYTES: usize = 16 * 1024;

/// How many events are taken at once.
const BATCH: usize = 1024;

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

/// The events of an inotify instance.
#[derive(Debug)]
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
    Group(Shared),
}

/// The watches on a subtree.
#[derive(Debug)]
pub(super) struct Watches {
    inner: inotify::Watches,
    /// Those above the subtree's root.
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
        let watches = Self {
            inner,
            ancestors: Vec::new(),
            watched: HashMap::new(),
        };
        Ok((Events::new(inotify)?, watches))
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
    pub(super) fn group(&self, watch: &WatchDescriptor) -> Option<&Shared> {
        match self.watched.get(&watch.get_watch_descriptor_id())? {
            Watched::Group(path) => Some(path),
            Watched::Ancestor(_) => None,
        }
    }

    /// Notes which control group a watch is on.
    pub(super) fn assign(&mut self, watch: &WatchDescriptor, path: Shared) {
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
                Err(why) => {
                    tracing::warn!(
                        "can't follow '{}' in '{}': {why}",
                        printable(&String::from_utf8_lossy(&event.name)),
                        printable(&parent.to_wire()),
                    );
                    None
                }
            },
        }
    }
}
