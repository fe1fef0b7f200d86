//! Which configuration is in force, which one is to be, and what is wrong with it.

use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use cgtproxy_proto::back_off::BackOff;
use tokio::time::Instant;

use super::{Awaited, Link, State};
use crate::config::Config;
use crate::ledger::{Call, length_of};

/// How long to wait before trying a configuration again that the helper could not put into force, at first and at most.
const POSTPONED: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(60));

/// A configuration and where it comes from.
#[derive(Debug)]
pub(crate) struct Source {
    /// What it means.
    pub config: Config,
    /// The file; none if there is none.
    pub file: Option<PathBuf>,
}

/// What is wrong with a file that was to be the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FileError {
    /// All of it.
    pub whole: String,
    /// The first mistake, in a few words.
    pub short: String,
}

/// A configuration that is right and that the helper refused, so that the old one was kept.
#[derive(Debug)]
pub(super) struct Postponed {
    pub(super) source: Rc<Source>,
    /// Why the helper refused it.
    why: String,
    back_off: BackOff,
    /// When it is tried again; none if only somebody who saves it again, or another session, is a reason to.
    pub(super) at: Option<Instant>,
}

/// What becomes of a call that was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    /// It is said again.
    Again,
    /// The configuration that it was to bring is no more: the old one stays.
    TakenBack,
    /// Another configuration has come meanwhile, and is said instead.
    Overtaken,
}

impl State {
    /// The configuration that decides about verdicts.
    pub(crate) fn source(&self) -> &Rc<Source> {
        &self.source
    }

    /// The configuration that the helper holds, in this session.
    pub(crate) fn accepted(&self) -> Option<&Rc<Source>> {
        self.accepted.as_ref()
    }

    /// What is wrong with the configuration on disk, if something is.
    pub(crate) fn file_error(&self) -> Option<&FileError> {
        self.file_error.as_ref()
    }

    /// Why a configuration was taken back, if it did.
    pub(crate) fn postponed_why(&self) -> Option<&str> {
        self.postponed.as_ref().map(|postponed| &*postponed.why)
    }

    /// Whether a call was refused for this reason already, and none was accepted since.
    pub(crate) fn was_refused(&self, why: &str) -> bool {
        let said = [self.refusal.as_deref(), self.postponed_why()];
        said.into_iter().flatten().any(|said| said == why)
    }

    /// What is wrong with the configuration that was to replace the one in force, or to be the first one.
    pub(crate) fn config_error(&self) -> Option<&str> {
        let on_disk = self.file_error().map(|error| &*error.whole);
        on_disk.or_else(|| self.postponed_why())
    }

    /// A configuration that is right, if there was none yet.
    pub(crate) fn awaited_configuration(&self) -> Option<Awaited> {
        let why = || self.config_error().unwrap_or_default().to_owned();
        self.unconfigured.then(|| Awaited::Configuration(why()))
    }

    /// Notes that the last call, made with the configuration `sent`, was refused, and whether the reason may pass by
    /// itself. If the call was to put `sent` into force, the configuration that the helper held last is put back and sent
    /// once more, even if no session has begun with it yet.
    pub(crate) fn refused(
        &mut self,
        call: &Call,
        why: &str,
        passing: bool,
        sent: &Rc<Source>,
    ) -> Refused {
        if !Rc::ptr_eq(sent, &self.source) {
            self.ledger.refuse();
            return Refused::Overtaken;
        }
        match &self.held_last {
            Some(old) if matches!(call, Call::Replace(_)) && !Rc::ptr_eq(old, sent) => {
                let old = old.clone();
                self.postpone(sent, why, passing);
                self.ledger.refuse();
                // As a whole policy: the refused call had more in it than its configuration, such as changes that had
                // been missed.
                self.put(old);
                Refused::TakenBack
            }
            _ => {
                self.ledger.refuse();
                if let Link::Broken(reason) = &mut self.link {
                    why.clone_into(reason);
                }
                self.refusal = Some(why.to_owned());
                Refused::Again
            }
        }
    }

    fn postpone(&mut self, source: &Rc<Source>, why: &str, passing: bool) {
        let before = self.postponed.take();
        let before = before.filter(|before| Rc::ptr_eq(&before.source, source));
        let mut back_off = before.map_or(BackOff::new(POSTPONED), |before| before.back_off);
        let delay = back_off.next_wait();
        self.postponed = Some(Postponed {
            source: source.clone(),
            why: why.to_owned(),
            back_off,
            at: passing.then(|| Instant::now() + delay),
        });
    }

    /// When a configuration is to be tried again that was taken back, if one is.
    pub(crate) fn postponed_until(&self) -> Option<Instant> {
        self.postponed.as_ref().and_then(|postponed| postponed.at)
    }

    /// Whether the configuration that came last was taken back.
    pub(crate) fn is_postponed(&self) -> bool {
        self.postponed.is_some()
    }

    /// Tries a configuration again that was taken back, if it is time to.
    pub(crate) fn try_postponed(&mut self) {
        let now = Instant::now();
        if let Some(postponed) = &mut self.postponed
            && postponed.at.take_if(|at| *at <= now).is_some()
        {
            let source = postponed.source.clone();
            self.put(source);
        }
    }

    /// Keeps the configuration in force, since there is something wrong with the one on disk.
    pub(crate) fn keep_config(&mut self, error: FileError) {
        self.file_error = Some(error);
        self.postponed = None;
    }

    pub(crate) fn replace_config(&mut self, source: Source) {
        self.unconfigured = false;
        self.file_error = None;
        self.postponed = None;
        self.put(Rc::new(source));
    }

    /// Has this configuration decide about verdicts.
    pub(super) fn put(&mut self, source: Rc<Source>) {
        self.tree.replace_rules(source.config.rules.clone());
        self.ledger.make_room_for(length_of(&source.config));
        self.source = source;
        self.ledger.replace_all();
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use cgtproxy_proto::path::ControlGroupPath;

    use super::*;
    use crate::config::{self, Scope};
    use crate::state::Observer;
    use crate::subtree::Subtree;

    /// A configuration with one name in it.
    fn source(name: &str) -> Source {
        let text = format!("version: 1\nrules: [{{match: '/{name}$', drop: true}}]\n");
        let loaded = config::parse(Path::new("/c"), text.as_bytes(), Scope::User).unwrap();
        Source {
            config: loaded.config,
            file: None,
        }
    }

    /// The next call, with the control groups that it is about.
    fn next(state: &mut State) -> (Call, Vec<String>) {
        let call = state.next_call().unwrap();
        let Call::Replace(assign) = &call else {
            panic!("{call:?}");
        };
        let paths = assign.iter().map(|(path, _)| path.to_wire()).collect();
        (call, paths)
    }

    fn accept(state: &mut State) -> Vec<String> {
        let (call, paths) = next(state);
        let source = state.source().clone();
        state.acknowledged(&call, 1, Vec::new(), &source);
        paths
    }

    /// The helper holds a configuration that drops `old`; another one, which drops `new`, is about to replace it.
    fn replacing() -> State {
        let subtree = Subtree::of_user("/sys/fs/cgroup".into(), 1000).unwrap();
        let mut state = State::new(subtree, source("old"), None);
        for path in ["", "old", "new"] {
            state.added(ControlGroupPath::from_wire(path).unwrap());
        }
        assert_eq!(accept(&mut state), ["old"]);
        state.replace_config(source("new"));
        state
    }

    fn refuse(state: &mut State) {
        let (call, paths) = next(state);
        assert_eq!(paths, ["new"]);
        let source = state.source().clone();
        let refused = state.refused(&call, "no", true, &source);
        assert_eq!(refused, Refused::TakenBack);
    }

    #[test]
    fn all_is_said_again_of_a_configuration_that_is_put_back() {
        let mut state = replacing();
        // Which the refused call would have mended as well.
        state.lost_track();
        refuse(&mut state);
        assert_eq!(accept(&mut state), ["old"]);
        assert!(state.is_settled());
    }

    #[test]
    fn a_session_begins_with_what_the_one_before_it_had() {
        let mut state = replacing();
        refuse(&mut state);
        state.disconnected("gone".into());
        // However long that takes.
        if let Some(Postponed { at: Some(at), .. }) = &mut state.postponed {
            *at -= POSTPONED.1;
        }
        state.try_postponed();
        assert_eq!(accept(&mut state), ["old"]);
        state.try_postponed();
        assert_eq!(accept(&mut state), ["new"]);
    }

    #[test]
    fn what_is_wrong_on_disk_is_told_whatever_becomes_of_what_was_there_before() {
        let mut state = replacing();
        let mistake = Some("a mistake");
        let error = FileError {
            whole: "a mistake".into(),
            short: "one".into(),
        };
        // While the call with the one before it is under way.
        let (call, _) = next(&mut state);
        state.keep_config(error);
        let sent = state.source().clone();
        state.refused(&call, "no", true, &sent);
        assert_eq!(state.config_error(), mistake);
        assert_eq!(accept(&mut state), ["old"]);
        if let Some(Postponed { at: Some(at), .. }) = &mut state.postponed {
            *at -= POSTPONED.1;
        }
        state.try_postponed();
        assert_eq!(accept(&mut state), ["new"]);
        assert_eq!(state.config_error(), mistake);
        state.replace_config(source("right"));
        assert_eq!(state.config_error(), None);
    }

    #[test]
    fn what_is_refused_at_the_beginning_of_a_session_displaces_nothing() {
        let mut state = replacing();
        // It came while there was no helper.
        state.disconnected("gone".into());
        refuse(&mut state);
        assert_eq!(accept(&mut state), ["old"]);
        assert!(state.is_postponed());
    }

    /// It may be another control group by now that the helper is to hang the policy on.
    #[test]
    fn all_is_said_again_of_a_root_made_again_during_the_first_call() {
        let subtree = Subtree::of_user("/sys/fs/cgroup".into(), 1000).unwrap();
        let mut state = State::new(subtree, source("old"), None);
        let path = |text| ControlGroupPath::from_wire(text).unwrap();
        state.added(path("old"));
        let (call, _) = next(&mut state);
        state.removed(&ControlGroupPath::root());
        state.added(path("old"));
        let sent = state.source().clone();
        state.acknowledged(&call, 1, Vec::new(), &sent);
        assert_eq!(accept(&mut state), ["old"]);
        assert!(state.is_settled());
    }
}
