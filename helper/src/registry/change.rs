//! From what is to be to what the kernel has to do.

use std::collections::{BTreeMap, BTreeSet};

use crate::cgroup::{ControlGroupId, OwnedControlGroup};
use crate::nft::{Element, Enforced, Hold, Layout, Verdict};

/// How many control groups need each part of a layout: a part is there while one does.
#[derive(Debug, Clone, Default)]
pub(super) struct Census {
    levels: BTreeMap<u32, usize>,
    holds: BTreeMap<Hold, usize>,
    enforced: usize,
    holding_back: usize,
}

impl Census {
    pub(super) fn add(&mut self, cgroup: OwnedControlGroup, element: &Element) {
        *self.levels.entry(cgroup.level()).or_default() += 1;
        for hold in Hold::all_of(cgroup.level(), element) {
            *self.holds.entry(hold).or_default() += 1;
        }
        self.enforced += usize::from(element.enforced != Enforced::Nothing);
        self.holding_back += usize::from(element.holds_back());
    }

    pub(super) fn remove(&mut self, cgroup: OwnedControlGroup, element: &Element) {
        decrement(&mut self.levels, &cgroup.level());
        for hold in Hold::all_of(cgroup.level(), element) {
            decrement(&mut self.holds, &hold);
        }
        self.enforced -= usize::from(element.enforced != Enforced::Nothing);
        self.holding_back -= usize::from(element.holds_back());
    }

    pub(super) fn levels(&self) -> BTreeSet<u32> {
        self.levels.keys().copied().collect()
    }

    pub(super) fn holds(&self) -> BTreeSet<Hold> {
        self.holds.keys().cloned().collect()
    }

    pub(super) fn enforced(&self) -> bool {
        self.enforced > 0
    }

    pub(super) fn holds_back(&self) -> bool {
        self.holding_back > 0
    }

    /// Whether these are the levels at which anything is, or was before.
    pub(super) fn levels_are(&self, before: &Self, levels: &BTreeSet<u32>) -> bool {
        let has = |level| self.levels.contains_key(level) || before.levels.contains_key(level);
        let mut both = self.levels.keys().chain(before.levels.keys());
        levels.iter().all(has) && both.all(|level| levels.contains(level))
    }

    /// Whether a layout has just the parts that are needed, but for levels.
    pub(super) fn is_of(&self, layout: &Layout) -> bool {
        self.holds.keys().eq(&layout.holds) && self.enforced() == layout.enforced
    }
}

fn decrement<K: Ord>(counts: &mut BTreeMap<K, usize>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

/// What the kernel is told of an element: a hold that holds nothing is none.
fn told((cgroup, element): (OwnedControlGroup, &Element)) -> (&Verdict, Option<u32>, Enforced) {
    let hold = Hold::of(cgroup.level(), element);
    (
        &element.verdict,
        hold.map(|hold| hold.level),
        element.enforced,
    )
}

/// Which elements the kernel has to delete and to add.
#[derive(Debug, Default)]
pub(super) struct Changes<'a>(Vec<(When, OwnedControlGroup, &'a Element)>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    Before,
    After,
}

impl<'a> Changes<'a> {
    pub(super) fn had(&mut self, cgroup: OwnedControlGroup, element: &'a Element) {
        self.0.push((When::Before, cgroup, element));
    }

    pub(super) fn has(&mut self, cgroup: OwnedControlGroup, element: &'a Element) {
        self.0.push((When::After, cgroup, element));
    }

    pub(super) fn finish(mut self) -> (Vec<ControlGroupId>, Vec<(OwnedControlGroup, Element)>) {
        let mut delete = Vec::new();
        let mut add = Vec::new();
        self.0.sort_by_key(|(_, cgroup, _)| cgroup.id());
        for same in self.0.chunk_by(|(_, a, _), (_, b, _)| a.id() == b.id()) {
            let last = |wanted| {
                let found = same.iter().rfind(|(when, ..)| *when == wanted);
                found.map(|&(_, cgroup, element)| (cgroup, element))
            };
            let (before, after) = (last(When::Before), last(When::After));
            if before.map(told) == after.map(told) {
                continue;
            }
            if let Some((cgroup, _)) = before {
                delete.push(cgroup.id());
            }
            if let Some((cgroup, element)) = after {
                add.push((cgroup, element.clone()));
            }
        }
        (delete, add)
    }
}
