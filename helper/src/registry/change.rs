//! From what is to be to what the kernel has to do.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use crate::cgroup::{ControlGroupId, OwnedControlGroup};
use crate::nft::{Element, Enforced, Hold, Verdict};

/// How many control groups need each part of a layout: a part is there while one does. Of a change: how many more.
#[derive(Debug, Clone, Default)]
pub(super) struct Census {
    levels: BTreeMap<u32, isize>,
    holds: BTreeMap<Hold, isize>,
    enforced: isize,
    holding_back: isize,
}

impl Census {
    pub(super) fn add(&mut self, cgroup: OwnedControlGroup, element: &Element) {
        self.count(cgroup, element, 1);
    }

    pub(super) fn remove(&mut self, cgroup: OwnedControlGroup, element: &Element) {
        self.count(cgroup, element, -1);
    }

    fn count(&mut self, cgroup: OwnedControlGroup, element: &Element, more: isize) {
        add_to(&mut self.levels, cgroup.level(), more);
        for hold in Hold::all_of(cgroup.level(), element) {
            add_to(&mut self.holds, hold, more);
        }
        self.enforced += more * isize::from(element.enforced != Enforced::Nothing);
        self.holding_back += more * isize::from(element.holds_back());
    }

    /// Counts what a change makes of it.
    pub(super) fn change(&mut self, by: Self) {
        for (level, more) in by.levels {
            add_to(&mut self.levels, level, more);
        }
        for (hold, more) in by.holds {
            add_to(&mut self.holds, hold, more);
        }
        self.enforced += by.enforced;
        self.holding_back += by.holding_back;
    }

    pub(super) fn levels(&self) -> impl Iterator<Item = &u32> {
        self.levels.keys()
    }

    pub(super) fn holds(&self) -> impl Iterator<Item = &Hold> {
        self.holds.keys()
    }

    pub(super) fn enforced(&self) -> bool {
        self.enforced > 0
    }

    pub(super) fn holds_back(&self) -> bool {
        self.holding_back > 0
    }

    /// The levels at which anything is before or after a change.
    pub(super) fn levels_around<'a>(&'a self, by: &'a Self) -> impl Iterator<Item = &'a u32> {
        self.levels.keys().chain(new(&self.levels, &by.levels))
    }

    /// What is held after a change.
    pub(super) fn holds_after<'a>(&'a self, by: &'a Self) -> impl Iterator<Item = &'a Hold> {
        let more = |hold: &Hold| by.holds.get(hold).copied().unwrap_or_default();
        let old = self.holds.iter();
        let old = old.filter(move |(hold, count)| **count + more(hold) > 0);
        old.map(|(hold, _)| hold).chain(new(&self.holds, &by.holds))
    }

    /// Whether anything is enforced after a change.
    pub(super) fn enforced_after(&self, by: &Self) -> bool {
        self.enforced + by.enforced > 0
    }

    /// Whether anything is dropped or held after a change.
    pub(super) fn holds_back_after(&self, by: &Self) -> bool {
        self.holding_back + by.holding_back > 0
    }
}

fn add_to<K: Ord>(counts: &mut BTreeMap<K, isize>, key: K, more: isize) {
    match counts.entry(key) {
        Entry::Vacant(entry) => {
            entry.insert(more);
        }
        Entry::Occupied(mut entry) => {
            *entry.get_mut() += more;
            if *entry.get() == 0 {
                entry.remove();
            }
        }
    }
}

/// What a change adds that was not there.
fn new<'a, K: Ord>(
    counts: &'a BTreeMap<K, isize>,
    by: &'a BTreeMap<K, isize>,
) -> impl Iterator<Item = &'a K> {
    let more = by.iter().filter(|(_, more)| **more > 0);
    more.map(|(key, _)| key)
        .filter(|key| !counts.contains_key(key))
}

/// Whether these, none of them twice, are just what is in a set.
pub(super) fn are<'a, K: Ord + 'a>(
    mut keys: impl Iterator<Item = &'a K>,
    set: &BTreeSet<K>,
) -> bool {
    let mut count = 0;
    let all = keys.all(|key| {
        count += 1;
        set.contains(key)
    });
    all && count == set.len()
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
