//! In which order control groups are sent, so that nobody waits for all that somebody else makes. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use cgtproxy_proto::limits::PATH_BYTES;
use cgtproxy_proto::path::ControlGroupPath;

use crate::makers::{Maker, maker};

/// After so many bytes of one user's paths it is the next user's turn.
const TURN_BYTES: usize = PATH_BYTES;

/// Control groups that wait to be sent. Parents go before what is in them. In the system policy, what no user makes goes
/// first; then users take turns.
#[derive(Debug, Default)]
pub(super) struct Dirty {
    /// Whether users take turns. In a user's policy, that user makes everything.
    shared: bool,
    /// What is in no user's turn.
    own: BTreeSet<ControlGroupPath>,
    by: BTreeMap<Maker, BTreeSet<ControlGroupPath>>,
    /// Whose turn it is, and how many bytes they have had of it.
    turn: (Maker, usize),
}

impl Dirty {
    /// None yet, of the policy that users share.
    pub(super) fn shared() -> Self {
        Self {
            shared: true,
            ..Self::default()
        }
    }

    /// None yet, of the same policy.
    pub(super) fn anew(&self) -> Self {
        Self {
            shared: self.shared,
            ..Self::default()
        }
    }

    pub(super) fn is_shared(&self) -> bool {
        self.shared
    }

    pub(super) fn is_empty(&self) -> bool {
        self.own.is_empty() && self.by.is_empty()
    }

    pub(super) fn insert(&mut self, path: ControlGroupPath) {
        let maker = self.shared.then(|| maker(&path)).flatten();
        let paths = match maker {
            Some(maker) => self.by.entry(maker.into()).or_default(),
            None => &mut self.own,
        };
        paths.insert(path);
    }

    /// Takes out the control group that comes next.
    pub(super) fn pop(&mut self) -> Option<ControlGroupPath> {
        if let Some(path) = self.own.pop_first() {
            return Some(path);
        }
        let (whose, had) = &mut self.turn;
        if *had >= TURN_BYTES || !self.by.contains_key(whose) {
            let after = (Bound::Excluded(&**whose), Bound::Unbounded);
            let mut next = self.by.range::<[u8], _>(after).chain(&self.by);
            *whose = next.next()?.0.clone();
            *had = 0;
        }
        let paths = self.by.get_mut(whose)?;
        let path = paths.pop_first()?;
        *had += path.as_bytes().len();
        if paths.is_empty() {
            self.by.remove(whose);
        }
        Some(path)
    }
}

impl Extend<ControlGroupPath> for Dirty {
    fn extend<T: IntoIterator<Item = ControlGroupPath>>(&mut self, paths: T) {
        paths.into_iter().for_each(|path| self.insert(path));
    }
}
