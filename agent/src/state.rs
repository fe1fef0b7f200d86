//! What the agent knows, shared by its tasks: the watcher writes the control groups, the session with
//! the helper what is in force, and the server reads both.

use std::cell::{Cell, Ref, RefCell, RefMut};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use cgtproxy_proto::path::ControlGroupPath;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::config::{Config, Means};
use crate::policy::{Start, Target, Tree};
use crate::relay::Relay;
use crate::said::Said;
use crate::subtree::Subtree;
use crate::sync::{Call, Handling, Ledger, length_of, too_many_control_groups};
use crate::watch::{Observer, Watching};

/// How long to wait before trying a configuration again that the helper could not put into force: doubled from one to
/// the other.
const POSTPONED: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(60));

/// A configuration and where it comes from.
#[derive(Debug)]
pub struct Source {
    /// What it means.
    pub config: Config,
    /// The file; none if there is none.
    pub file: Option<PathBuf>,
}

/// How it stands with the helper.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Link {
    /// It holds this agent's policy.
    Connected,
    /// It was told nothing yet.
    Waiting(Awaited),
    /// It does not hold it, for this reason.
    Broken(String),
}

impl Link {
    /// Why the helper does not hold the policy, in a sentence.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        match self {
            Self::Connected => None,
            Self::Waiting(awaited) => Some(awaited.to_string()),
            Self::Broken(why) => Some(why.clone()),
        }
    }
}

/// What has to come before anything can be said to the helper.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Awaited {
    /// A configuration that is right: this is wrong with the one there is.
    #[error("{configuration}: {0}", configuration = Self::CONFIGURATION)]
    Configuration(String),
    /// The user's service manager has to have this control group.
    #[error("waiting for the control group {0}")]
    ControlGroup(String),
}

impl Awaited {
    /// What is said, before the reason, without a configuration that is right.
    pub const CONFIGURATION: &str = "waiting for the configuration to be fixed";
}

/// A configuration that is right and that the helper refused, so that the old one was kept.
#[derive(Debug)]
struct Postponed {
    source: Rc<Source>,
    /// Why the helper refused it.
    why: String,
    delay: Duration,
    /// When it is tried again; none if only somebody who saves it again, or another session, is a reason to.
    at: Option<Instant>,
}

/// What the agent knows.
#[derive(Debug)]
pub struct State {
    /// Where the control groups are.
    pub subtree: Subtree,
    /// How it stands with the helper.
    pub link: Link,
    /// Counts the helper's changes of the policy, those for an earlier agent included.
    pub generation: i64,
    /// What is wrong with the configuration on disk, which was to replace the one in force or to be the first one.
    file_error: Option<String>,
    /// There was no configuration yet that is right: nothing may be said to the helper, since it would take away what
    /// is left of an earlier agent's policy.
    unconfigured: bool,
    /// What the helper refused last, if that still stands.
    pub refusal: Option<String>,
    /// A reload is under way, and the service manager waits for its end.
    pub reloading: bool,
    /// What is known of the relay.
    pub relay: Relay,
    /// It was said that the policy is in force, in this session.
    pub announced: bool,
    /// The service manager was told that the policy is in force, in some session.
    pub ready: bool,
    /// How well control groups are noticed.
    pub watching: Watching,
    /// What was said of control groups that users have made so.
    pub said: Said,
    /// Something was learnt of control groups, and nobody was woken for it yet: see [`Agent::wake_if_news`].
    news: bool,
    source: Rc<Source>,
    /// The configuration that the helper holds, in this session.
    accepted: Option<Rc<Source>>,
    /// The one that it held last, in whichever session: what another helper keeps for this agent is of that.
    held_last: Option<Rc<Source>>,
    postponed: Option<Postponed>,
    tree: Tree,
    ledger: Ledger,
}

impl State {
    fn new(subtree: Subtree, source: Source, config_error: Option<String>) -> Self {
        let tree = Tree::new(subtree.prefix(), source.config.rules.clone());
        let mut ledger = Ledger::default();
        ledger.make_room_for(length_of(&source.config));
        Self {
            subtree,
            link: Link::Broken("the helper has not answered yet".into()),
            generation: 0,
            unconfigured: config_error.is_some(),
            file_error: config_error,
            refusal: None,
            reloading: false,
            relay: Relay::default(),
            announced: false,
            ready: false,
            watching: Watching::default(),
            said: Said::default(),
            news: false,
            source: Rc::new(source),
            accepted: None,
            held_last: None,
            postponed: None,
            tree,
            ledger,
        }
    }

    /// The configuration that decides about verdicts.
    #[must_use]
    pub fn source(&self) -> &Rc<Source> {
        &self.source
    }

    /// The configuration that the helper holds, in this session.
    #[must_use]
    pub fn accepted(&self) -> Option<&Rc<Source>> {
        self.accepted.as_ref()
    }

    /// What is wrong with the configuration on disk, if something is.
    #[must_use]
    pub fn file_error(&self) -> Option<&str> {
        self.file_error.as_deref()
    }

    /// Why a configuration was taken back, if it did.
    #[must_use]
    pub fn postponed_why(&self) -> Option<&str> {
        self.postponed.as_ref().map(|postponed| &*postponed.why)
    }

    /// What is wrong with the configuration that was to replace the one in force, or to be the first one.
    #[must_use]
    pub fn config_error(&self) -> Option<&str> {
        self.file_error().or_else(|| self.postponed_why())
    }

    /// The control groups.
    #[must_use]
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// What the helper holds.
    #[must_use]
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Whether the user's service manager has a control group.
    #[must_use]
    pub fn has_root(&self) -> bool {
        !self.tree.is_empty()
    }

    /// A configuration that is right, if there was none yet.
    #[must_use]
    pub fn awaited_configuration(&self) -> Option<Awaited> {
        let why = || self.file_error.clone().unwrap_or_default();
        self.unconfigured.then(|| Awaited::Configuration(why()))
    }

    /// What has to come before anything can be said to the helper.
    #[must_use]
    pub fn awaited(&self) -> Option<Awaited> {
        let root = || self.subtree.to_wire(&ControlGroupPath::root());
        let waits_for_root = || (!self.has_root()).then(|| Awaited::ControlGroup(root()));
        self.awaited_configuration().or_else(waits_for_root)
    }

    /// Whether the helper holds all that it should.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.link == Link::Connected && self.ledger.is_settled()
    }

    /// What the helper does not hold of the policy and why, in a sentence.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        let refusal = self.refusal.clone();
        refusal.or_else(|| {
            let (count, path, most) = self.ledger.shortage()?;
            Some(self.has_no_room(count - 1, path, most))
        })
    }

    /// For whose control groups there is no room since this was asked last, in a sentence each.
    pub fn news_of_shortage(&mut self) -> Vec<String> {
        let news = self.ledger.news_of_shortage();
        let Some((_, _, most)) = self.ledger.shortage() else {
            return Vec::new();
        };
        let sentence = |path| self.has_no_room(0, path, most);
        news.iter().map(sentence).collect()
    }

    fn has_no_room(&self, others: usize, path: &ControlGroupPath, most: usize) -> String {
        let name = self.subtree.shown(path);
        let whose = match others {
            0 => format!("'{name}' has no verdict of its own"),
            _ => format!("'{name}' and {others} more have no verdict of their own"),
        };
        let closed = self.source.config.rules.start == Start::Closed;
        let why = too_many_control_groups(most, closed);
        match self.subtree.path().as_bytes().is_empty() {
            true => format!(
                "{whose}: {why}; one user's may take no more of the machine's than is left for all others"
            ),
            false => format!("{whose}: {why}"),
        }
    }

    /// Whether the relay is still to say where it listens.
    #[must_use]
    pub fn awaits_relay(&self) -> bool {
        self.relay.is_awaited(&self.source.config)
    }

    /// Why what has this target is refused, though that is in the kernel: it is a proxy of the relay's, and it is not known
    /// where that listens, or the helper is still to be told.
    #[must_use]
    pub fn lacks_relay(&self, target: &Target) -> Option<String> {
        let Target::Proxy(name) = target else {
            return None;
        };
        let mut proxies = self.source.config.proxies.iter();
        let proxy = proxies.find(|proxy| proxy.name == *name)?;
        if !matches!(proxy.means, Means::Relay { .. }) {
            return None;
        }
        if let Some(problem) = &self.relay.problem {
            return Some(problem.clone());
        }
        if self.relay.port(proxy) == 0 {
            return Some("the relay has not said yet where it listens".to_owned());
        }
        let untold = self.ledger.is_replacing();
        untold.then(|| {
            let problem = self.problem();
            problem.unwrap_or_else(|| "the helper does not know yet where the relay listens".into())
        })
    }

    /// Whether the verdict of a control group is in the kernel.
    #[must_use]
    pub fn in_force(&self, path: &ControlGroupPath) -> bool {
        let Some(verdict) = self.tree.get(path) else {
            return false;
        };
        let current = self
            .accepted
            .as_ref()
            .is_some_and(|a| Rc::ptr_eq(a, &self.source));
        let is_meant = match self.ledger.handling(path) {
            Handling::By(element) => element.verdict == *verdict,
            Handling::Hold => false,
            Handling::Nothing => *verdict == self.tree.rules().undecided(),
        };
        self.link == Link::Connected && current && is_meant
    }

    /// The next call to the helper.
    pub fn next_call(&mut self) -> Option<Call> {
        // Without a control group there is nothing to hold a policy for; when it comes back everything
        // is said anew.
        if self.unconfigured || !self.has_root() {
            return None;
        }
        self.ledger.next(&self.tree)
    }

    /// The last call was carried out.
    pub fn acknowledged(
        &mut self,
        call: &Call,
        generation: i64,
        skipped: Vec<(ControlGroupPath, cgtproxy_proto::helper::SkipReason)>,
        sent: &Rc<Source>,
    ) -> Vec<(ControlGroupPath, cgtproxy_proto::helper::SkipReason)> {
        self.generation = generation;
        if matches!(call, Call::Replace(_)) {
            let is_first = self.accepted.replace(sent.clone()).is_none();
            self.held_last = Some(sent.clone());
            self.link = Link::Connected;
            match &mut self.postponed {
                Some(postponed) if Rc::ptr_eq(&postponed.source, sent) => {
                    self.postponed = None;
                }
                // It may be another helper, or know other limits by now.
                Some(postponed) if is_first => postponed.at = Some(Instant::now()),
                _ => {}
            }
        }
        self.ledger.acknowledge(skipped)
    }

    /// The last call was refused, since it would have made more control groups than these. Returns whether that is news,
    /// so that the next one says what there is room for.
    pub fn bound(&mut self, most: usize) -> bool {
        self.ledger.bound(most)
    }

    /// The last call, by this configuration, was refused, for a reason that may pass by itself or not. If it was to
    /// bring it into force, the old one stays, which the helper holds still, and is said once more; also if no session has
    /// begun with it yet.
    pub fn refused(&mut self, call: &Call, why: &str, passing: bool, sent: &Rc<Source>) -> Refused {
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
                Refused::Again
            }
        }
    }

    fn postpone(&mut self, source: &Rc<Source>, why: &str, passing: bool) {
        let before = self.postponed.take();
        let before = before.filter(|before| Rc::ptr_eq(&before.source, source));
        let delay = before.map_or(POSTPONED.0, |b| (b.delay * 2).min(POSTPONED.1));
        self.postponed = Some(Postponed {
            source: source.clone(),
            why: why.to_owned(),
            delay,
            at: passing.then(|| Instant::now() + delay),
        });
    }

    /// When a configuration is to be tried again that was taken back, if one is.
    #[must_use]
    pub fn postponed_until(&self) -> Option<Instant> {
        self.postponed.as_ref().and_then(|postponed| postponed.at)
    }

    /// Whether the configuration that came last was taken back.
    #[must_use]
    pub fn is_postponed(&self) -> bool {
        self.postponed.is_some()
    }

    /// Tries a configuration again that was taken back, if it is time to.
    pub fn try_postponed(&mut self) {
        let now = Instant::now();
        if let Some(postponed) = &mut self.postponed
            && postponed.at.take_if(|at| *at <= now).is_some()
        {
            let source = postponed.source.clone();
            self.put(source);
        }
    }

    /// The session is over: nobody knows what is in force.
    pub fn disconnected(&mut self, why: String) {
        self.link = Link::Broken(why);
        // A refused configuration is tried again only when the old one is in force again: refused once more before that,
        // it would leave the helper with none.
        if let Some(postponed) = &mut self.postponed {
            postponed.at = None;
        }
        self.accepted = None;
        if let Some(old) = &self.held_last
            && let Some(postponed) = &self.postponed
            && Rc::ptr_eq(&postponed.source, &self.source)
        {
            self.put(old.clone());
        }
        self.generation = 0;
        self.refusal = None;
        self.announced = false;
        self.ledger.lost();
    }

    /// The relay listens elsewhere.
    pub fn relay_moved(&mut self) {
        self.ledger.replace_all();
    }

    /// There is something wrong with the configuration that came last.
    pub fn keep_config(&mut self, why: String) {
        self.file_error = Some(why);
        self.postponed = None;
    }

    fn replace_config(&mut self, source: Source) {
        self.unconfigured = false;
        self.file_error = None;
        self.postponed = None;
        self.put(Rc::new(source));
    }

    fn put(&mut self, source: Rc<Source>) {
        self.tree.replace_rules(source.config.rules.clone());
        self.ledger.make_room_for(length_of(&source.config));
        self.source = source;
        self.ledger.replace_all();
    }
}

/// What becomes of a call that was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// It is said again.
    Again,
    /// The configuration that it was to bring is no more: the old one stays.
    TakenBack,
    /// Another configuration has come meanwhile, and is said instead.
    Overtaken,
}

impl Observer for State {
    fn added(&mut self, path: ControlGroupPath) -> ControlGroupPath {
        let (ledger, accepted) = (&mut self.ledger, self.accepted.is_some());
        let news = &mut self.news;
        self.tree.take_in(path, &mut |path, element| {
            *news = true;
            if path.as_bytes().is_empty() && accepted {
                // The helper hangs everything on this one control group.
                ledger.replace_all();
            } else if element {
                ledger.touch(path);
            }
        })
    }

    fn removed(&mut self, path: &ControlGroupPath) -> Vec<ControlGroupPath> {
        let removed = self.tree.remove(path);
        for path in &removed {
            self.ledger.renew(path);
        }
        self.news |= !removed.is_empty();
        removed
    }

    fn lost_track(&mut self) {
        self.news = true;
        self.ledger.replace_all();
    }
}

/// The state, and who is told of its changes.
#[derive(Debug)]
pub struct Agent {
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
    #[must_use]
    pub fn new(subtree: Subtree, source: Source, config_error: Option<String>) -> Self {
        Self {
            state: RefCell::new(State::new(subtree, source, config_error)),
            work: Notify::new(),
            calling: Cell::new(false),
            changed: watch::Sender::new(()),
        }
    }

    /// Looks at the state. Not to be held over an await.
    pub fn state(&self) -> Ref<'_, State> {
        self.state.borrow()
    }

    /// Changes the state. Not to be held over an await.
    pub fn state_mut(&self) -> RefMut<'_, State> {
        self.state.borrow_mut()
    }

    /// Puts another configuration into force.
    pub fn replace_config(&self, source: Source) {
        self.state_mut().replace_config(source);
        self.wake();
    }

    /// Tells the session with the helper that there may be something to say, and everybody else that
    /// something has changed.
    pub fn wake(&self) {
        self.work.notify_one();
        self.tell();
    }

    /// The same, if anything was learnt of control groups since this was asked last.
    pub fn wake_if_news(&self) {
        let news = std::mem::take(&mut self.state_mut().news);
        if news {
            self.wake();
        }
    }

    /// Tells everybody but the session that something has changed.
    pub fn tell(&self) {
        self.changed.send_replace(());
    }

    /// Returns when there may be something to tell the helper.
    pub async fn work(&self) {
        self.work.notified().await;
    }

    /// The helper is told of something for as long as the returned value lives.
    #[must_use]
    pub fn calling(&self) -> Calling<'_> {
        self.calling.set(true);
        Calling(self)
    }

    /// Whether the helper is being told of something.
    #[must_use]
    pub fn is_calling(&self) -> bool {
        self.calling.get()
    }

    /// Is told of every change.
    pub fn subscribe(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }
}

/// A call to the helper is under way.
#[derive(Debug)]
pub struct Calling<'a>(&'a Agent);

impl Drop for Calling<'_> {
    fn drop(&mut self) {
        self.0.calling.set(false);
        self.0.tell();
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::{self, Scope};

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
        // While the call with the one before it is under way.
        let (call, _) = next(&mut state);
        state.keep_config("a mistake".into());
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
}
