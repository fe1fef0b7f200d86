//! What the service manager was told of the agent, so that it is told only what is new.

/// What the service manager was told.
#[derive(Debug, Default)]
pub(crate) struct Readiness {
    /// That the policy is in force, in this session: in these words.
    announced: Option<String>,
    /// The same, in some session.
    ready: bool,
    /// That a reload is under way: it waits for its end.
    reloading: bool,
}

impl Readiness {
    /// Notes that not all is in force: when it is, that is said again.
    pub(crate) fn note_not_in_force(&mut self) {
        self.announced = None;
    }

    /// Notes that all is in force, in these words. Returns whether that is to be said: once, and at the end of each reload;
    /// and whether the words are, which may have changed.
    pub(crate) fn note_in_force(&mut self, words: &str) -> (bool, bool) {
        self.ready = true;
        let reloaded = self.end_reload();
        let before = self.announced.replace(words.to_owned());
        let changed = before.as_deref() != Some(words);
        (before.is_none() || reloaded, changed || reloaded)
    }

    /// Notes that a reload begins. Returns whether that is to be said: an agent that was never ready has nothing to be
    /// ready with again.
    pub(crate) fn begin_reload(&mut self) -> bool {
        self.reloading |= self.ready;
        self.ready
    }

    /// Notes that a reload is over. Returns whether one was under way.
    pub(crate) fn end_reload(&mut self) -> bool {
        std::mem::take(&mut self.reloading)
    }
}
