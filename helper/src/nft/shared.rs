//! What users have together: rules that look at every level at which any of them has a verdict, and chains that lead
//! to nothing of any of them.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::rc::Rc;

use super::leads::Place;
use super::plan::{Hold, Layout, Plan};
use crate::cgroup::ControlGroupId;
use crate::peer::Uid;

/// A user's objects that no layout describes, as they were found.
#[derive(Debug, Clone, Default)]
pub(super) struct Remnants {
    /// Chains that are this user's alone.
    pub(super) chains: BTreeSet<CString>,
    /// Elements of shared maps that lead to these chains, or are about this user's marks.
    pub(super) places: BTreeSet<Place>,
    /// Control groups that have an element.
    pub(super) cgroups: Vec<ControlGroupId>,
    /// At which levels rules look, all users' together.
    pub(super) levels: BTreeSet<u32>,
}

/// What is in the table of each user.
#[derive(Debug, Clone, Default)]
pub(super) struct Shared {
    layouts: BTreeMap<Uid, Rc<Layout>>,
    left: BTreeMap<Uid, Remnants>,
    /// The levels that rules look at once the transaction in the making is carried out.
    looked_at: RefCell<BTreeSet<u32>>,
}

impl Shared {
    /// A table in which these are.
    pub(super) fn found(layouts: BTreeMap<Uid, Rc<Layout>>, left: BTreeMap<Uid, Remnants>) -> Self {
        let shared = Self {
            layouts,
            left,
            looked_at: RefCell::default(),
        };
        let levels = shared.levels_with(Uid::ROOT, None);
        shared.looked_at.replace(levels);
        shared
    }

    /// The table is now as this plan makes it.
    pub(super) fn carried_out(&mut self, plan: &Plan) {
        self.left.remove(&plan.uid);
        match &plan.after {
            Some(layout) => self.layouts.insert(plan.uid, Rc::clone(layout)),
            None => self.layouts.remove(&plan.uid),
        };
    }

    /// What there is of a user's that no layout describes.
    pub(super) fn left(&self, uid: Uid) -> &Remnants {
        static NOTHING: Remnants = Remnants {
            chains: BTreeSet::new(),
            places: BTreeSet::new(),
            cgroups: Vec::new(),
            levels: BTreeSet::new(),
        };
        self.left.get(&uid).unwrap_or(&NOTHING)
    }

    /// The levels at which some user has a verdict, if what `uid` has is this.
    pub(super) fn levels_with(&self, uid: Uid, own: Option<&BTreeSet<u32>>) -> BTreeSet<u32> {
        let others = self.layouts.iter().filter(|(other, _)| **other != uid);
        let mut levels: BTreeSet<u32> = others
            .filter(|(other, _)| **other != Uid::ROOT)
            .flat_map(|(_, layout)| &layout.levels)
            .copied()
            .collect();
        levels.extend(own.filter(|_| uid != Uid::ROOT).into_iter().flatten());
        let mut left = self.left.iter().filter(|(other, _)| **other != uid);
        // Each has all users'.
        if let Some((_, left)) = left.find(|(other, _)| **other != Uid::ROOT) {
            levels.extend(&left.levels);
        }
        levels
    }

    /// The levels that the rules look at.
    pub(super) fn looked_at(&self) -> BTreeSet<u32> {
        self.looked_at.borrow().clone()
    }

    /// Has the rules look at these levels. None if they can stay as they are: one level more does no harm, and may be
    /// needed again by the next control group. To write them takes longer than all else that a new one needs.
    pub(super) fn look_at(&self, needed: BTreeSet<u32>) -> Option<BTreeSet<u32>> {
        let spare = self.looked_at.borrow().difference(&needed).count();
        if spare <= 1 && needed.is_subset(&self.looked_at.borrow()) {
            return None;
        }
        self.look_only_at(needed)
    }

    /// Has the rules look at these levels and at no other. None if they do.
    pub(super) fn look_only_at(&self, needed: BTreeSet<u32>) -> Option<BTreeSet<u32>> {
        let before = self.looked_at.replace(needed.clone());
        (before != needed).then_some(needed)
    }

    /// A transaction was not carried out: the rules look at what they looked at before it.
    pub(super) fn look_again_at(&self, levels: BTreeSet<u32>) {
        self.looked_at.replace(levels);
    }

    /// Whether the system has a policy.
    pub(super) fn has_system(&self) -> bool {
        self.layouts.contains_key(&Uid::ROOT) || self.left.contains_key(&Uid::ROOT)
    }

    /// Whether some other user needs, or may need, this chain that all can have together.
    pub(super) fn is_held_elsewhere(&self, uid: Uid, hold: &Hold) -> bool {
        let mut others = self.layouts.iter().filter(|(other, _)| **other != uid);
        self.left.keys().any(|other| *other != uid)
            || others.any(|(other, layout)| *other != Uid::ROOT && layout.holds.contains(hold))
    }
}
