//! Bypass lists: destinations that neither a proxy nor a drop touches.
//!
//! Most users bypass what everybody does, as an example or an administrator says, so that a list is in the table once
//! for all who have the same one. It never changes: who bypasses something else has another list.

use std::collections::BTreeSet;
use std::ffi::CStr;

use nftnl::MsgType;

use super::ffi::{Content, Element, KeyType};
use super::names::{ListNames, Names};
use super::plan::Layout;
use super::policy::{Bypass, BypassList};
use super::ruleset::DROP_SYSTEM;
use super::shared::Shared;
use super::transaction::Transaction;
use crate::route::Family;

impl Transaction<'_> {
    /// Adds the layout's bypass list, if it has one that nobody else has.
    pub(super) fn create_list(&mut self, names: &Names, layout: &Layout, shared: &Shared) {
        let Some(list) = &layout.bypass else { return };
        if shared.is_list_elsewhere(names.uid, list.number) {
            return;
        }
        let sets = ListNames::of(list.number);
        self.add_set(&sets.ipv4, KeyType::Ipv4, Content::Intervals);
        self.add_set(&sets.ipv6, KeyType::Ipv6, Content::Intervals);
        self.destinations(&sets, list);
        self.add_chain(&sets.drop);
        self.bypass_rules(list, &sets.drop);
        // drop
        self.add_rules(&sets.drop, [&|rule| rule.drop()]);
    }

    /// Deletes the layout's bypass list, which no rule of this user's names any more, unless somebody else has it.
    pub(super) fn delete_list(&mut self, names: &Names, layout: &Layout, shared: &Shared) {
        if let Some(list) = &layout.bypass {
            self.delete_lists(names, &[list.number].into(), shared);
        }
    }

    /// Deletes bypass lists, by their numbers alone, unless somebody else has them.
    pub(super) fn delete_lists(&mut self, names: &Names, numbers: &BTreeSet<u32>, shared: &Shared) {
        let is_elsewhere = |number: &&u32| shared.is_list_elsewhere(names.uid, **number);
        for &number in numbers.iter().filter(|number| !is_elsewhere(number)) {
            let sets = ListNames::of(number);
            self.flush_chain(&sets.drop);
            self.delete_chain(&sets.drop);
            for set in [&sets.ipv4, &sets.ipv6] {
                self.delete_set(set);
            }
        }
    }

    /// Chain `drop-system`.
    pub(super) fn system_drop_rules(&mut self, names: &Names, layout: &Layout) {
        if !names.is_system() {
            return;
        }
        self.flush_chain(DROP_SYSTEM);
        match &layout.bypass {
            // goto drop-NUMBER
            Some(list) => {
                let drop = ListNames::of(list.number).drop;
                self.add_rules(DROP_SYSTEM, [&|rule| rule.goto(&drop)]);
            }
            // drop
            None => self.add_rules(DROP_SYSTEM, [&|rule| rule.drop()]),
        }
    }

    /// Bypassed destinations leave the chain.
    pub(super) fn bypass_rules(&mut self, list: &BypassList, chain: &CStr) {
        let sets = ListNames::of(list.number);
        self.add_rules(
            chain,
            [
                // ip daddr @bypass4-NUMBER return
                &|rule| rule.daddr_in(Family::Ipv4, &sets.ipv4).return_(),
                // ip6 daddr @bypass6-NUMBER return
                &|rule| rule.daddr_in(Family::Ipv6, &sets.ipv6).return_(),
            ],
        );
    }

    /// Fills the list's two sets.
    fn destinations(&mut self, sets: &ListNames, list: &BypassList) {
        // A range up to the last address of all has no end.
        let Bypass { ipv4, ipv6 } = &*list.destinations;
        let ipv4 = ipv4.iter().map(|(first, last)| {
            let end = last.to_bits().checked_add(1);
            (first.octets(), end.map(u32::to_be_bytes))
        });
        self.ranges(&sets.ipv4, KeyType::Ipv4, ipv4);
        let ipv6 = ipv6.iter().map(|(first, last)| {
            let end = last.to_bits().checked_add(1);
            (first.octets(), end.map(u128::to_be_bytes))
        });
        self.ranges(&sets.ipv6, KeyType::Ipv6, ipv6);
    }

    /// Adds ranges of keys, each with the key after its last one.
    fn ranges<const N: usize>(
        &mut self,
        set: &CStr,
        key: KeyType,
        ranges: impl Iterator<Item = ([u8; N], Option<[u8; N]>)>,
    ) {
        let mut elements = self.set(set, key, Content::Intervals);
        for (first, end) in ranges {
            elements.push(&first, Element::Key);
            if let Some(end) = end {
                elements.push(&end, Element::IntervalEnd);
            }
        }
        self.write_elements(&elements, MsgType::Add);
    }
}
