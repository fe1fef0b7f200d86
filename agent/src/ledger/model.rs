//! What the helper makes of calls, for tests.

use std::collections::{BTreeMap, BTreeSet};

use cgtproxy_proto::helper::SkipReason;
use cgtproxy_proto::path::ControlGroupPath;

use super::Call;
use crate::policy::{Element, Hold};

/// Path to identity: another one each time it is made.
pub(crate) type Disk = BTreeMap<ControlGroupPath, u64>;

/// What is in the kernel, by the identities that control groups had when the helper opened them.
#[derive(Debug, Default)]
pub(crate) struct Kernel {
    pub(crate) held: BTreeMap<ControlGroupPath, (u64, Element)>,
    /// A session begins with a whole policy.
    has_policy: bool,
}

impl Kernel {
    /// Does what a call says. Returns what is passed over, since it is not there.
    pub(crate) fn carry_out(
        &mut self,
        call: &Call,
        disk: &Disk,
    ) -> Vec<(ControlGroupPath, SkipReason)> {
        let (assign, remove) = match call {
            Call::Replace(assign) => {
                self.has_policy = true;
                self.held.clear();
                (assign, &Vec::new())
            }
            Call::Update { assign, remove } => {
                assert!(self.has_policy);
                (assign, remove)
            }
        };
        // Or the helper refuses it.
        let named = assign.iter().map(|(path, _)| path).chain(remove);
        let each: BTreeSet<_> = named.clone().collect();
        assert_eq!(each.len(), named.count(), "{call:?}");
        for path in remove {
            self.held.remove(path);
        }
        let mut skipped = Vec::new();
        for (path, element) in assign {
            match disk.get(path) {
                Some(id) => {
                    self.held.insert(path.clone(), (*id, element.clone()));
                }
                None => {
                    self.held.remove(path);
                    skipped.push((path.clone(), SkipReason::missing));
                }
            }
        }
        skipped
    }

    /// Whether a call would make more of them than there may be: paths that are not there count until they are looked
    /// for.
    pub(crate) fn has_room(&self, call: &Call, most: usize) -> bool {
        let after = match call {
            Call::Replace(assign) => assign.len(),
            Call::Update { assign, remove } => {
                let new = assign
                    .iter()
                    .filter(|(path, _)| !self.held.contains_key(path));
                let gone = remove.iter().filter(|path| self.held.contains_key(*path));
                self.held.len() + new.count() - gone.count()
            }
        };
        after <= most
    }

    /// What there is for a socket in a control group, by its nearest ancestor that is in the map, and whether it is
    /// held. None if there is nothing.
    pub(crate) fn element(&self, path: &ControlGroupPath, disk: &Disk) -> Option<Element> {
        let mut at = path.clone();
        loop {
            if let Some((id, element)) = self.held.get(&at)
                && disk.get(&at) == Some(id)
            {
                let mut element = element.clone();
                if at == *path {
                    element.hold = Hold::None;
                }
                return Some(element);
            }
            at = at.parent()?;
        }
    }
}
