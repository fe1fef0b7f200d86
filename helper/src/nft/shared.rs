//! What users share in the table: rules that look at every level at which any of them has a verdict, and chains that
//! name no object of any of them.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::rc::Rc;

use super::map_elements::MapKey;
use super::plan::{Layout, Looks, Plan};
use super::policy::Hold;
use crate::cgroup::ControlGroupId;
use crate::peer::Uid;

/// A user's objects that no layout describes, as they were found.
#[derive(Debug, Clone, Default)]
pub(super) struct Remnants {
    /// Chains that are this user's alone.
    pub(super) chains: BTreeSet<CString>,
    /// The elements of shared maps that lead to these chains, or are about this user's marks.
    pub(super) map_keys: BTreeSet<MapKey>,
    /// Control groups that have an element.
    pub(super) cgroups: Vec<ControlGroupId>,
    /// The levels that rules look at, for all users together.
    pub(super) levels: BTreeSet<u32>,
    /// The bypass lists that the table had, one of which may be this user's.
    pub(super) lists: BTreeSet<u32>,
    /// The chains of holds that users have together which the table had, any of which may be this user's, each with the
    /// element that leads to it. Root has its own.
    pub(super) holds: BTreeMap<Hold, MapKey>,
}

/// What the rules of the output hook look up, for all users together.
///
/// The table's is in [`Shared`]. A transaction begins with that and has its own, which is the table's once the
/// transaction is carried out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct LookedAt {
    /// The levels at which some user's control group has a verdict.
    pub(super) levels: BTreeSet<u32>,
    /// Packets of open connections are looked up too: something is dropped or held, or may be. Otherwise connections go
    /// on as they began whatever the verdict is.
    pub(super) open: bool,
}

/// What is in the table of each user.
#[derive(Debug, Clone, Default)]
pub(super) struct Shared {
    layouts: BTreeMap<Uid, Rc<Layout>>,
    left: BTreeMap<Uid, Remnants>,
    /// What the rules look at.
    pub(super) looked_at: LookedAt,
}

impl LookedAt {
    /// Whether rules that look at this do for what is needed: one level more does no harm, and may be needed again by
    /// the next control group. To write the rules takes longer than all else that a new control group needs.
    pub(super) fn does_for(&self, needed: &Self) -> bool {
        let spare = self.levels.difference(&needed.levels).count();
        spare <= 1 && needed.levels.is_subset(&self.levels) && needed.open == self.open
    }
}

impl Shared {
    /// What is shared in a table that has these layouts and remnants.
    pub(super) fn found(layouts: BTreeMap<Uid, Rc<Layout>>, left: BTreeMap<Uid, Remnants>) -> Self {
        let mut shared = Self {
            layouts,
            left,
            looked_at: LookedAt::default(),
        };
        shared.looked_at = shared.needed(None, None);
        shared
    }

    /// Notes that the user has now what this plan makes. What the rules look at is noted with each transaction.
    pub(super) fn carried_out(&mut self, plan: &Plan) {
        self.left.remove(&plan.uid);
        match &plan.after {
            Some(after) => self.layouts.insert(plan.uid, Rc::clone(&after.layout)),
            None => self.layouts.remove(&plan.uid),
        };
    }

    /// A user's objects that no layout describes.
    pub(super) fn left(&self, uid: Uid) -> &Remnants {
        static NOTHING: Remnants = Remnants {
            chains: BTreeSet::new(),
            map_keys: BTreeSet::new(),
            cgroups: Vec::new(),
            levels: BTreeSet::new(),
            lists: BTreeSet::new(),
            holds: BTreeMap::new(),
        };
        self.left.get(&uid).unwrap_or(&NOTHING)
    }

    /// What rules have to look at for all users, if `uid` needs `own` and everybody else what they need now.
    pub(super) fn needed_with(&self, uid: Uid, own: &Looks<'_>) -> LookedAt {
        self.needed(Some(uid), Some(own))
    }

    /// What rules have to look at for everybody but this user.
    pub(super) fn needed_without(&self, uid: Uid) -> LookedAt {
        self.needed(Some(uid), None)
    }

    fn needed(&self, uid: Option<Uid>, own: Option<&Looks<'_>>) -> LookedAt {
        let mut needed = LookedAt::default();
        if let Some(own) = own {
            needed.open = own.holds_back;
            if uid != Some(Uid::ROOT) {
                needed.levels.extend(&*own.levels);
            }
        }
        let is_other = |other: &Uid| Some(*other) != uid;
        for (other, layout) in self.layouts.iter().filter(|(other, _)| is_other(other)) {
            needed.open |= layout.holds_back;
            if *other != Uid::ROOT {
                needed.levels.extend(&layout.levels);
            }
        }
        for (other, left) in self.left.iter().filter(|(other, _)| is_other(other)) {
            needed.open = true;
            if *other != Uid::ROOT {
                needed.levels.extend(&left.levels);
                // Every remnant lists the levels of the whole table, so one is enough.
                break;
            }
        }
        needed
    }

    /// Whether the system has a policy.
    pub(super) fn has_system(&self) -> bool {
        self.layouts.contains_key(&Uid::ROOT) || self.left.contains_key(&Uid::ROOT)
    }

    /// Whether some other user has, or may have, the bypass list of this number.
    pub(super) fn is_list_elsewhere(&self, uid: Uid, number: u32) -> bool {
        let mut layouts = self.layouts.iter().filter(|(other, _)| **other != uid);
        let mut left = self.left.iter().filter(|(other, _)| **other != uid);
        layouts.any(|(_, layout)| layout.bypass.as_ref().map(|list| list.number) == Some(number))
            || left.any(|(_, left)| left.lists.contains(&number))
    }

    /// Whether some other user needs, or may need, the chain of this hold, which all can have together.
    pub(super) fn is_held_elsewhere(&self, uid: Uid, hold: &Hold) -> bool {
        let mut layouts = self.layouts.iter().filter(|(other, _)| **other != uid);
        let mut left = self.left.iter().filter(|(other, _)| **other != uid);
        layouts.any(|(other, layout)| *other != Uid::ROOT && layout.holds.contains(hold))
            || left.any(|(_, left)| left.holds.contains_key(hold))
    }
}
