//! From what is to be to what the kernel has to do.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use crate::cgroup::{ControlGroupId, OwnedControlGroup, Top};
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
    /// How many of these need each part.
    pub(super) fn of<'a>(
        elements: impl IntoIterator<Item = &'a (OwnedControlGroup, Element)>,
    ) -> Self {
        let mut census = Self::default();
        elements.into_iter().for_each(|element| census.add(element));
        census
    }

    pub(super) fn add(&mut self, (cgroup, element): &(OwnedControlGroup, Element)) {
        *self.levels.entry(cgroup.level()).or_default() += 1;
        for hold in Hold::all_of(cgroup.level(), element) {
            *self.holds.entry(hold).or_default() += 1;
        }
        self.enforced += usize::from(element.enforced != Enforced::Nothing);
        self.holding_back += usize::from(element.holds_back());
    }

    pub(super) fn remove(&mut self, (cgroup, element): &(OwnedControlGroup, Element)) {
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

    /// The layout that a change makes of this one, for which there was another census.
    ///
    /// A level that no control group needs any more is left out one change later: what starts next is often what has
    /// just ended, and writing another layout takes longer than everything else that a new control group needs. For as long,
    /// open connections are looked at when nothing is dropped or held any more.
    pub(super) fn layout_after(
        &self,
        before: &Self,
        layout: &Rc<Layout>,
        subtree: Top,
    ) -> Rc<Layout> {
        let holds_back = self.holds_back() || before.holds_back();
        let same = self.holds.keys().eq(&layout.holds)
            && self.enforced() == layout.enforced
            && self.levels_are(before, &layout.levels)
            && holds_back == layout.holds_back
            && subtree == layout.subtree;
        if same {
            return Rc::clone(layout);
        }
        Rc::new(Layout {
            subtree,
            levels: &self.levels() | &before.levels(),
            holds: self.holds(),
            enforced: self.enforced(),
            holds_back,
            ..Layout::clone(layout)
        })
    }

    /// Whether these are the levels at which anything is, or was before.
    fn levels_are(&self, before: &Self, levels: &BTreeSet<u32>) -> bool {
        let has = |level| self.levels.contains_key(level) || before.levels.contains_key(level);
        let mut both = self.levels.keys().chain(before.levels.keys());
        levels.iter().all(has) && both.all(|level| levels.contains(level))
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

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    Before,
    After,
}

/// Which elements the kernel has to delete and to add, so that it has those of `after` in place of those of `before`.
pub(super) fn changes<'a>(
    before: impl IntoIterator<Item = &'a (OwnedControlGroup, Element)>,
    after: impl IntoIterator<Item = &'a (OwnedControlGroup, Element)>,
) -> (Vec<ControlGroupId>, Vec<(OwnedControlGroup, Element)>) {
    let before = before
        .into_iter()
        .map(|(cgroup, element)| (When::Before, *cgroup, element));
    let after = after
        .into_iter()
        .map(|(cgroup, element)| (When::After, *cgroup, element));
    differences(before.chain(after).collect())
}

/// What differs between the last element of each control group before and after.
fn differences(
    mut all: Vec<(When, OwnedControlGroup, &Element)>,
) -> (Vec<ControlGroupId>, Vec<(OwnedControlGroup, Element)>) {
    all.sort_by_key(|(_, cgroup, _)| cgroup.id());
    let mut delete = Vec::new();
    let mut add = Vec::new();
    for same in all.chunk_by(|(_, a, _), (_, b, _)| a.id() == b.id()) {
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
