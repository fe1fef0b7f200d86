//! What a user has in the table: chains and sets with that user's number in their names.

use std::collections::BTreeSet;

use super::ffi::{Content, KeyType};
use super::names::Names;
use super::plan::{ElementChanges, Layout, Looks};
use super::rule::RuleBuilder;
use super::ruleset::{
    CHOICES_ENFORCED, DROP_SYSTEM, ENFORCED, ENFORCED_DEEP, SYSTEM, SYSTEM_DEEP, USER_VERDICTS,
};
use super::shared::Shared;
use super::transaction::Transaction;
use crate::peer::Uid;

impl Transaction<'_> {
    /// A user's chains and sets, with the elements that lead from marks and numbers to them. No control group has such
    /// a number yet.
    pub(super) fn create_user(&mut self, names: &Names, layout: &Layout, shared: &Shared) {
        if names.is_system() {
            self.create_system_sets(names);
            self.nothing_is_enforced();
        }
        self.create_list(names, layout, shared);
        self.system_drop_rules(names, layout);
        for (name, proxy) in &layout.proxies {
            self.create_proxy(names, layout, name, proxy);
        }
        for hold in &layout.holds {
            self.create_hold(names, layout, hold);
        }
        self.add_map_elements(&names.user_element(layout));
    }

    /// Adds what leads packets to the chains of a user who had none.
    pub(super) fn lead_to_user(
        &mut self,
        names: &Names,
        layout: &Layout,
        elements: &ElementChanges<'_>,
        shared: &Shared,
    ) {
        self.add_map_elements(&names.drop_element(layout));
        let needed = shared.needed_with(names.uid, &layout.looks());
        if names.is_system() {
            self.system_level_rules(names, &layout.levels, layout.enforced);
            if !self.looked_at.does_for(&needed) {
                self.looked_at = needed;
            }
            // They lead to the system's policy now, whatever they look at.
            self.first_rules(true);
            self.gateway(names, layout);
        } else {
            self.look_at(needed, shared);
        }
        self.add_verdicts(names, layout, &elements.added);
    }

    /// Writes rules that look at `to` in place of those that look at `from`.
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
        self.look_at(shared.needed_with(names.uid, to), shared);
    }

    /// Chains `enforced` and `system`, with what there is of them for deep sockets.
    pub(super) fn system_level_rules(
        &mut self,
        names: &Names,
        levels: &BTreeSet<u32>,
        enforced: bool,
    ) {
        for chain in [SYSTEM, SYSTEM_DEEP, ENFORCED, ENFORCED_DEEP] {
            self.flush_chain(chain);
        }
        let (cgroups, choices) = (names.cgroups(), names.choices());
        let verdict: &dyn Fn(RuleBuilder<'_>, u32) -> RuleBuilder<'_> =
            &|rule, level| rule.socket_cgroupv2_map_vmap(level, cgroups, choices);
        self.shallow_level_rules(SYSTEM, SYSTEM_DEEP, levels, verdict);
        self.deep_level_rules(SYSTEM_DEEP, levels, verdict);
        if enforced {
            self.shallow_level_rules(ENFORCED, ENFORCED_DEEP, levels, enforced_verdict);
            self.deep_level_rules(ENFORCED_DEEP, levels, enforced_verdict);
        }
        self.go_on_to_users();
    }

    /// Users' verdicts come after what is enforced.
    fn go_on_to_users(&mut self) {
        for chain in [ENFORCED, ENFORCED_DEEP] {
            // goto user-verdicts
            self.add_rules(chain, [&|rule| rule.goto(USER_VERDICTS)]);
        }
    }

    /// `output` leads to these chains as long as the map `users` names the system, which may be all that a helper that was
    /// killed has made, or left, of the system's policy: users' verdicts are in force all the same.
    fn nothing_is_enforced(&mut self) {
        for chain in [ENFORCED, ENFORCED_DEEP] {
            self.flush_chain(chain);
        }
        self.go_on_to_users();
    }

    /// Deletes all that a user has. References go before what they refer to: elements, then rules, then sets and
    /// chains.
    pub(super) fn delete_user(
        &mut self,
        names: &Names,
        layout: &Layout,
        elements: &ElementChanges<'_>,
        shared: &Shared,
    ) {
        if names.is_system() {
            self.no_system(shared);
            for map in names.number_maps() {
                self.flush_set(map);
            }
        } else {
            self.delete_map_elements(names.drop_element(layout).keys());
            self.delete_verdicts(names, elements.deleted.iter().copied());
            self.look_only_at(shared.needed_without(names.uid), shared);
        }
        self.delete_layout(names, layout, shared);
    }

    /// Deletes a user's chains and sets, to which nothing leads but marks and numbers.
    pub(super) fn delete_layout(&mut self, names: &Names, layout: &Layout, shared: &Shared) {
        let mut elements = names.user_element(layout);
        for (name, proxy) in &layout.proxies {
            elements.extend(names.proxy_elements(self.marks, name, proxy));
        }
        self.delete_map_elements(elements.keys());
        for hold in &layout.holds {
            self.delete_hold(names, layout, hold, shared);
        }
        let proxies = layout.proxies.iter();
        self.delete_chains(proxies.flat_map(|(name, proxy)| names.of_proxy(name, proxy)));
        if names.is_system() {
            self.flush_chain(DROP_SYSTEM);
            self.delete_system_sets(names);
        }
        self.delete_list(names, layout, shared);
    }

    /// Empties the chains of the system's policy, and has the rules for users do without it.
    pub(super) fn no_system(&mut self, shared: &Shared) {
        for chain in [SYSTEM, SYSTEM_DEEP, DROP_SYSTEM] {
            self.flush_chain(chain);
        }
        self.nothing_is_enforced();
        self.no_gateway();
        self.looked_at = shared.needed_without(Uid::ROOT);
        self.first_rules(false);
    }

    /// Adds the maps that only the system's policy has.
    pub(super) fn create_system_sets(&mut self, names: &Names) {
        let group = KeyType::ControlGroup;
        for map in names.number_maps() {
            self.add_set(map, group, Content::Values(KeyType::Mark));
        }
        for map in names.choices_maps() {
            self.add_set(map, KeyType::Mark, Content::Verdicts);
        }
        self.common_system_choices(names);
    }

    /// Deletes the maps that only the system's policy has.
    pub(super) fn delete_system_sets(&mut self, names: &Names) {
        for map in names.choices_maps() {
            self.flush_set(map);
        }
        for map in names.number_maps().iter().chain(names.choices_maps()) {
            self.delete_set(map);
        }
    }
}

/// Takes the verdict that the system's policy enforces on the socket's control group at this level, if any.
fn enforced_verdict(rule: RuleBuilder<'_>, level: u32) -> RuleBuilder<'_> {
    rule.socket_cgroupv2_map_vmap(level, ENFORCED, CHOICES_ENFORCED)
}
