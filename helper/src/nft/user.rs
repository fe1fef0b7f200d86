//! What a user has in the table: chains and sets with that user's number in their names.

use std::collections::BTreeSet;
use std::ffi::CStr;

use nftnl::MsgType;

use super::ffi::{Content, Element, KeyType};
use super::names::Names;
use super::plan::{ElementChanges, Layout, Looks};
use super::rule::Family;
use super::ruleset::{DROP_SYSTEM, ENFORCED, SESSIONS, SYSTEM};
use super::shared::Shared;
use super::transaction::Transaction;

impl Transaction<'_> {
    /// A user's chains and sets, with what leads from marks and numbers to them. No control group has such a
    /// number yet.
    pub(super) fn create_user(&mut self, names: &Names, layout: &Layout) {
        if names.is_system() {
            self.create_system_sets(names);
        }
        self.create_bypass(names, layout);
        self.system_drop_rules(names, layout);
        for (name, proxy) in &layout.proxies {
            self.create_proxy(names, layout, name, proxy);
        }
        for hold in &layout.holds {
            self.create_hold(names, layout, hold);
        }
        self.add_leads(&names.lead_of_user(layout));
    }

    /// What leads packets to a user who had nothing.
    pub(super) fn lead_to_user(
        &mut self,
        names: &Names,
        layout: &Layout,
        elements: &ElementChanges<'_>,
        shared: &Shared,
    ) {
        self.add_leads(&names.lead_of_drop(layout));
        let changed = shared.look_at(names.uid, &layout.looks());
        if names.is_system() {
            self.system_level_rules(names, &layout.levels, layout.enforced);
            self.first_rules(&shared.looked_at(), true);
            self.gateway(names, layout);
        } else {
            self.first_rules_at(changed, shared);
        }
        self.add_verdicts(names, layout, &elements.added);
    }

    /// Rules that look at this in place of rules that look at that.
    pub(super) fn level_rules(
        &mut self,
        names: &Names,
        from: &Looks<'_>,
        to: &Looks<'_>,
        shared: &Shared,
    ) {
        if from == to {
            return;
        }
        let same = from.levels == to.levels && from.enforced == to.enforced;
        if names.is_system() && !same {
            self.system_level_rules(names, &to.levels, to.enforced);
        }
        self.first_rules_at(shared.look_at(names.uid, to), shared);
    }

    pub(super) fn system_level_rules(
        &mut self,
        names: &Names,
        levels: &BTreeSet<u32>,
        enforced: bool,
    ) {
        self.flush_chain(SYSTEM);
        self.level_rules_of(SYSTEM, levels, |rule, level| {
            rule.socket_cgroupv2_map_vmap(level, names.cgroups(), names.choices())
        });
        self.flush_chain(ENFORCED);
        if enforced {
            self.level_rules_of(ENFORCED, levels, |rule, level| {
                rule.socket_cgroupv2_vmap(level, ENFORCED)
            });
        }
        // goto sessions
        self.add_rules(ENFORCED, [&|rule| rule.goto(SESSIONS)]);
    }

    /// References go before what they refer to: elements, then rules, then sets and chains.
    pub(super) fn delete_user(
        &mut self,
        names: &Names,
        layout: &Layout,
        elements: &ElementChanges<'_>,
        shared: &Shared,
    ) {
        if names.is_system() {
            self.no_system(shared);
            for map in names.verdict_maps() {
                self.flush_set(map);
            }
        } else {
            self.delete_leads(names.lead_of_drop(layout).keys());
            self.delete_verdicts(names, elements.deleted.iter().copied());
            self.first_rules_at(shared.look_only_at(names.uid, None), shared);
        }
        self.delete_layout(names, layout, shared);
    }

    /// A user's chains and sets, to which nothing leads but marks and numbers.
    pub(super) fn delete_layout(&mut self, names: &Names, layout: &Layout, shared: &Shared) {
        let mut leads = names.lead_of_user(layout);
        for (name, proxy) in &layout.proxies {
            leads.extend(names.leads_of_proxy(self.marks, name, proxy));
        }
        self.delete_leads(leads.keys());
        for hold in &layout.holds {
            self.delete_hold(names, layout, hold, shared);
        }
        let proxies = layout.proxies.iter();
        self.delete_chains(proxies.flat_map(|(name, proxy)| names.of_proxy(name, proxy)));
        if names.is_system() {
            self.flush_chain(DROP_SYSTEM);
            self.delete_system_sets(names);
        }
        self.delete_bypass(names, layout);
    }

    /// The sets that only the system's policy has.
    pub(super) fn create_system_sets(&mut self, names: &Names) {
        let group = KeyType::ControlGroup;
        self.add_set(names.cgroups(), group, Content::Values(KeyType::Mark));
        self.add_set(names.choices(), KeyType::Mark, Content::Verdicts);
        self.add_set(ENFORCED, group, Content::Verdicts);
        self.common_choices(names.choices(), DROP_SYSTEM, Element::Return);
    }

    pub(super) fn delete_system_sets(&mut self, names: &Names) {
        self.flush_set(names.choices());
        for set in [names.cgroups(), names.choices(), ENFORCED] {
            self.delete_set(set);
        }
    }

    /// The sets of bypassed destinations, if there are any, and a user's chain for what is dropped but for them.
    pub(super) fn create_bypass(&mut self, names: &Names, layout: &Layout) {
        if layout.bypass.is_empty() {
            return;
        }
        self.add_bypass_sets(names);
        self.bypass_elements(names, layout);
        if !names.is_system() {
            self.add_chain(&names.drop);
            self.drop_rules(names);
        }
    }

    /// What a user drops but for bypassed destinations: every protocol, and open connections too.
    pub(super) fn drop_rules(&mut self, names: &Names) {
        self.flush_chain(&names.drop);
        self.bypass_rules(names, &names.drop);
        // drop
        self.add_rules(&names.drop, [&|rule| rule.drop()]);
    }

    /// What [`Self::create_bypass`] made, when no rule looks at it any more.
    pub(super) fn delete_bypass(&mut self, names: &Names, layout: &Layout) {
        if layout.bypass.is_empty() {
            return;
        }
        if !names.is_system() {
            self.flush_chain(&names.drop);
            self.delete_chain(&names.drop);
        }
        self.delete_bypass_sets(names);
    }

    pub(super) fn add_bypass_sets(&mut self, names: &Names) {
        self.add_set(&names.bypass4, KeyType::Ipv4, Content::Intervals);
        self.add_set(&names.bypass6, KeyType::Ipv6, Content::Intervals);
    }

    pub(super) fn delete_bypass_sets(&mut self, names: &Names) {
        for set in [&names.bypass4, &names.bypass6] {
            self.delete_set(set);
        }
    }

    /// The same for what the system's policy drops, whether anything is bypassed or not.
    pub(super) fn system_drop_rules(&mut self, names: &Names, layout: &Layout) {
        if !names.is_system() {
            return;
        }
        self.flush_chain(DROP_SYSTEM);
        if !layout.bypass.is_empty() {
            self.bypass_rules(names, DROP_SYSTEM);
        }
        // drop
        self.add_rules(DROP_SYSTEM, [&|rule| rule.drop()]);
    }

    /// Bypassed destinations leave the chain.
    pub(super) fn bypass_rules(&mut self, names: &Names, chain: &CStr) {
        self.add_rules(
            chain,
            [
                // ip daddr @bypass4-UID return
                &|rule| rule.daddr_in(Family::Ipv4, &names.bypass4).leave(),
                // ip6 daddr @bypass6-UID return
                &|rule| rule.daddr_in(Family::Ipv6, &names.bypass6).leave(),
            ],
        );
    }

    /// What is bypassed, in place of what was.
    pub(super) fn replace_bypass_elements(&mut self, names: &Names, layout: &Layout) {
        for set in [&names.bypass4, &names.bypass6] {
            self.flush_set(set);
        }
        self.bypass_elements(names, layout);
    }

    fn bypass_elements(&mut self, names: &Names, layout: &Layout) {
        let mut ipv4 = self.set(&names.bypass4, KeyType::Ipv4, Content::Intervals);
        for (first, last) in &layout.bypass.ipv4 {
            ipv4.push(&first.octets(), Element::Key);
            // A range up to the last address of all has no end.
            if let Some(end) = last.to_bits().checked_add(1) {
                ipv4.push(&end.to_be_bytes(), Element::IntervalEnd);
            }
        }
        self.write_elements(&ipv4, MsgType::Add);
        let mut ipv6 = self.set(&names.bypass6, KeyType::Ipv6, Content::Intervals);
        for (first, last) in &layout.bypass.ipv6 {
            ipv6.push(&first.octets(), Element::Key);
            if let Some(end) = last.to_bits().checked_add(1) {
                ipv6.push(&end.to_be_bytes(), Element::IntervalEnd);
            }
        }
        self.write_elements(&ipv6, MsgType::Add);
    }
}
