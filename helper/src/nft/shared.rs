//! What users have together: rules that look at every level at which any of them has a verdict, and chains that lead
//! to nothing of any of them.

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
}

impl Shared {
    /// A table in which these are.
    pub(super) fn found(layouts: BTreeMap<Uid, Rc<Layout>>, left: BTreeMap<Uid, Remnants>) -> Self {
        Self { layouts, left }
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
    pub(super) fn all_levels(&self) -> BTreeSet<u32> {
        let users = self.layouts.iter().filter(|(uid, _)| **uid != Uid::ROOT);
        let mut levels: BTreeSet<u32> = users
            .flat_map(|(_, layout)| &layout.levels)
            .copied()
            .collect();
        let mut left = self.left.iter();
        if let Some((_, left)) = left.find(|(uid, _)| **uid != Uid::ROOT) {
            levels.extend(&left.levels);
        }
        levels
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
