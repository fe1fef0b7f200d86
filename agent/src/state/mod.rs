//! What the agent knows, shared by its tasks: the watcher writes the control groups, the session with
//! the helper what is in force, and the server reads both.

mod agent;
mod configuration;
mod observer;
mod readiness;
mod relay;

use std::rc::Rc;

use cgtproxy_proto::path::ControlGroupPath;
use tokio::time::Instant;

use crate::ledger::{Call, Handling, Ledger, length_of, too_many_control_groups};
use crate::policy::{Start, Tree};
use crate::said::Said;
use crate::subtree::Subtree;

pub(crate) use agent::Agent;
pub(crate) use configuration::{FileError, Refused, Source};
pub(crate) use observer::{Observer, Watching};
pub(crate) use readiness::Readiness;
pub(crate) use relay::Relay;

pub(crate) use relay::Ports;

use configuration::Postponed;

/// How it stands with the helper.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Link {
    /// It holds this agent's policy.
    Connected,
    /// It was told nothing yet.
    Waiting(Awaited),
    /// It does not hold it, for this reason.
    Broken(String),
}

impl Link {
    /// Why the helper does not hold the policy, in a sentence.
    pub(crate) fn problem(&self) -> Option<String> {
        match self {
            Self::Connected => None,
            Self::Waiting(awaited) => Some(awaited.to_string()),
            Self::Broken(why) => Some(why.clone()),
        }
    }
}

/// What has to come before anything can be said to the helper.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Awaited {
    /// A configuration that is right: this is wrong with the one there is.
    #[error("{configuration}: {0}", configuration = Self::CONFIGURATION)]
    Configuration(String),
    /// The user's service manager has to have this control group.
    #[error("waiting for the control group {0}")]
    ControlGroup(String),
}

impl Awaited {
    /// What is said, before the reason, without a configuration that is right.
    pub(crate) const CONFIGURATION: &str = "waiting for the configuration to be fixed";
}

/// What the agent knows.
#[derive(Debug)]
pub(crate) struct State {
    /// Where the control groups are.
    pub subtree: Subtree,
    /// How it stands with the helper.
    pub link: Link,
    /// Counts the helper's changes of the policy, those for an earlier agent included.
    pub generation: i64,
    /// What is wrong with the configuration on disk, which was to replace the one in force or to be the first one.
    file_error: Option<FileError>,
    /// There was no configuration yet that is right: nothing may be said to the helper, since it would take away what
    /// is left of an earlier agent's policy.
    unconfigured: bool,
    /// Why the helper refused the last call, if it did.
    refusal: Option<String>,
    /// What is known of the relay.
    pub relay: Relay,
    /// What the service manager was told.
    pub readiness: Readiness,
    /// How well control groups are noticed.
    pub watching: Watching,
    /// What was said of control groups that users have made so.
    pub said: Said,
    /// Something was learnt of control groups, and nobody was woken for it yet: see [`Agent::wake_if_news`].
    news: bool,
    source: Rc<Source>,
    /// The configuration that the helper holds, in this session.
    accepted: Option<Rc<Source>>,
    /// The configuration that the helper held last, in whichever session. What a helper that has been started again has in
    /// force for this agent comes from it.
    held_last: Option<Rc<Source>>,
    postponed: Option<Postponed>,
    tree: Tree,
    ledger: Ledger,
}

impl State {
    /// What the agent knows at the beginning: see [`Agent::new`].
    pub(crate) fn new(subtree: Subtree, source: Source, file_error: Option<FileError>) -> Self {
        let tree = Tree::new(subtree.prefix(), source.config.rules.clone());
        let mut ledger = match subtree.is_machines() {
            true => Ledger::of_machine(),
            false => Ledger::default(),
        };
        ledger.make_room_for(length_of(&source.config));
        Self {
            subtree,
            link: Link::Broken("the helper has not answered yet".into()),
            generation: 0,
            unconfigured: file_error.is_some(),
            file_error,
            refusal: None,
            relay: Relay::default(),
            readiness: Readiness::default(),
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

    /// The control groups.
    pub(crate) fn tree(&self) -> &Tree {
        &self.tree
    }

    /// What the helper holds.
    pub(crate) fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    #[cfg(test)]
    pub(crate) fn ledger_mut(&mut self) -> &mut Ledger {
        &mut self.ledger
    }

    /// Whether the user's service manager has a control group.
    pub(crate) fn has_root(&self) -> bool {
        !self.tree.is_empty()
    }

    /// What has to come before anything can be said to the helper.
    pub(crate) fn awaited(&self) -> Option<Awaited> {
        let root = || self.subtree.to_wire(&ControlGroupPath::root());
        let waits_for_root = || (!self.has_root()).then(|| Awaited::ControlGroup(root()));
        self.awaited_configuration().or_else(waits_for_root)
    }

    /// Whether the helper holds all that it should.
    pub(crate) fn is_settled(&self) -> bool {
        self.link == Link::Connected && self.ledger.is_settled()
    }

    /// What the helper does not hold of the policy and why, in a sentence.
    pub(crate) fn problem(&self) -> Option<String> {
        let refusal = self.refusal.clone();
        refusal.or_else(|| {
            let (count, path, most) = self.ledger.shortage()?;
            Some(self.has_no_room(count - 1, path, most))
        })
    }

    /// Whose control groups there is no room for, unless that was told before, in a sentence for each user.
    pub(crate) fn news_of_shortage(&mut self) -> Vec<String> {
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
        match self.subtree.is_machines() {
            true => format!(
                "{whose}: {why}; one user's may take no more of the machine's than is left for all others"
            ),
            false => format!("{whose}: {why}"),
        }
    }

    /// Whether the relay is still to say where it listens.
    pub(crate) fn awaits_relay(&self) -> bool {
        self.relay.is_awaited(&self.source.config)
    }

    /// Whether the verdict of a control group is in the kernel.
    pub(crate) fn in_force(&self, path: &ControlGroupPath) -> bool {
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
    pub(crate) fn next_call(&mut self) -> Option<Call> {
        // Without a control group there is nothing to hold a policy for; when it comes back everything
        // is said anew.
        if self.unconfigured || !self.has_root() {
            return None;
        }
        self.ledger.next(&self.tree)
    }

    /// Notes that the last call was carried out, with the configuration `sent`, but for what was skipped. Returns what
    /// was not skipped for the same reason before.
    pub(crate) fn acknowledged(
        &mut self,
        call: &Call,
        generation: i64,
        skipped: Vec<(ControlGroupPath, cgtproxy_proto::helper::SkipReason)>,
        sent: &Rc<Source>,
    ) -> Vec<(ControlGroupPath, cgtproxy_proto::helper::SkipReason)> {
        self.generation = generation;
        self.refusal = None;
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

    /// Notes that the last call was refused, since the helper takes no more than `most` control groups. Returns whether
    /// that was not known, so that the next call keeps to it.
    pub(crate) fn bound(&mut self, most: usize) -> bool {
        self.ledger.bound(most)
    }

    /// Notes that the session is over, and why: nobody knows what is in force.
    pub(crate) fn disconnected(&mut self, why: String) {
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
        self.readiness.note_not_in_force();
        self.ledger.lost();
    }

    /// Has the helper told where the relay listens now.
    pub(crate) fn relay_moved(&mut self) {
        self.ledger.replace_all();
    }
}

impl Observer for State {
    fn added(&mut self, path: ControlGroupPath) -> ControlGroupPath {
        let (ledger, news) = (&mut self.ledger, &mut self.news);
        self.tree.take_in(path, &mut |path, element| {
            *news = true;
            if path.as_bytes().is_empty() {
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
        self.ledger.doubt_all();
    }
}
