//! The state as the agent's tasks share it.

use std::cell::{Cell, Ref, RefCell, RefMut};

use tokio::sync::{Notify, watch};

use super::{FileError, Source, State};
use crate::subtree::Subtree;

/// The state, and who is told of its changes.
#[derive(Debug)]
pub(crate) struct Agent {
    state: RefCell<State>,
    /// There may be something to tell the helper.
    work: Notify,
    /// The helper is being told of something.
    calling: Cell<bool>,
    changed: watch::Sender<()>,
}

impl Agent {
    /// An agent that knows no control group yet. With an error, `source` only stands for a configuration that is still
    /// to come.
    pub(crate) fn new(subtree: Subtree, source: Source, file_error: Option<FileError>) -> Self {
        Self {
            state: RefCell::new(State::new(subtree, source, file_error)),
            work: Notify::new(),
            calling: Cell::new(false),
            changed: watch::Sender::new(()),
        }
    }

    /// Looks at the state. Not to be held over an await.
    pub(crate) fn state(&self) -> Ref<'_, State> {
        self.state.borrow()
    }

    /// Changes the state. Not to be held over an await.
    pub(crate) fn state_mut(&self) -> RefMut<'_, State> {
        self.state.borrow_mut()
    }

    /// Puts another configuration into force.
    pub(crate) fn replace_config(&self, source: Source) {
        self.state_mut().replace_config(source);
        self.wake();
    }

    /// Tells the session with the helper that there may be something to say, and everybody else that
    /// something has changed.
    pub(crate) fn wake(&self) {
        self.work.notify_one();
        self.tell();
    }

    /// Does what [`Self::wake`] does if anything was learnt of control groups since this was called last.
    pub(crate) fn wake_if_news(&self) {
        let news = std::mem::take(&mut self.state_mut().news);
        if news {
            self.wake();
        }
    }

    /// Tells everybody but the session that something has changed.
    pub(crate) fn tell(&self) {
        self.changed.send_replace(());
    }

    /// Returns when there may be something to tell the helper.
    pub(crate) async fn work(&self) {
        self.work.notified().await;
    }

    /// The helper is told of something for as long as the returned value lives.
    pub(crate) fn calling(&self) -> Calling<'_> {
        self.calling.set(true);
        Calling(self)
    }

    /// Whether the helper is being told of something.
    pub(crate) fn is_calling(&self) -> bool {
        self.calling.get()
    }

    /// Is told of every change.
    pub(crate) fn subscribe(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }
}

/// A call to the helper is under way.
#[derive(Debug)]
#[must_use]
pub(crate) struct Calling<'a>(&'a Agent);

impl Drop for Calling<'_> {
    fn drop(&mut self) {
        self.0.calling.set(false);
        self.0.tell();
    }
}
