//! From what an earlier helper left, and no snapshot describes, to what is wanted.
//!
//! That goes by the same steps as any other change. What is known of what is there is its names: which chains there
//! are, which elements, and at which levels rules look. Chains and elements that stay are filled anew.

use std::borrow::Cow;

use super::map_elements::{MapElements, MapKey};
use super::names::{Names, ProxyChain};
use super::plan::{ElementChanges, Layout, Looks, Step};
use super::shared::{Remnants, Shared};
use super::transaction::Transaction;

impl Transaction<'_> {
    /// One step on the way to a layout.
    pub(super) fn take_over(
        &mut self,
        names: &Names,
        left: &Remnants,
        after: &Layout,
        elements: &ElementChanges<'_>,
        step: Step,
        shared: &Shared,
    ) {
        match step {
            Step::Chains => self.take_over_chains(names, left, after, shared),
            Step::Additions => {
                let drop = names.drop_element(after);
                let drop = drop.into_iter().filter(|(key, _)| is_new(left, key));
                self.add_map_elements(&drop.collect());
                // Whether anything was enforced, dropped or held is not known.
                let looks = Looks {
                    levels: Cow::Owned(left.levels.union(&after.levels).copied().collect()),
                    enforced: true,
                    holds_back: true,
                };
                if names.is_system() {
                    self.system_level_rules(names, &looks.levels, looks.enforced);
                }
                self.look_at(shared.needed_with(names.uid, &looks), shared);
                self.add_verdicts(names, after, &elements.added);
            }
            Step::Changes => {
                let changed = elements.changed.iter().map(|(cgroup, _)| cgroup.id());
                self.delete_verdicts(names, changed);
                self.add_verdicts(names, after, &elements.changed);
                for (name, proxy) in &after.proxies {
                    if left.chains.contains(&names.chain(ProxyChain::Proxy, name)) {
                        self.proxy_rules(names, after, name, proxy);
                    }
                }
                let wanted = self.layout_elements(names, after);
                let stay = wanted.keys().filter(|key| !is_new(left, key));
                self.delete_map_elements(stay);
                // What is there already is as it is to be.
                self.add_map_elements(&wanted);
                if names.is_system() {
                    self.system_drop_rules(names, after);
                    self.gateway(names, after);
                }
            }
            Step::Deletions => {
                self.delete_verdicts(names, elements.deleted.iter().copied());
                if names.is_system() {
                    self.system_level_rules(names, &after.levels, after.enforced);
                }
                self.look_only_at(shared.needed_with(names.uid, &after.looks()), shared);
                let wanted = self.layout_elements(names, after);
                let gone = left.map_keys.iter().filter(|key| !wanted.contains_key(key));
                self.delete_map_elements(gone);
                let needed = names.chains(after);
                self.delete_chains(left.chains.difference(&needed));
                let holds = left.holds.iter();
                let gone = holds.filter(|(hold, _)| !after.holds.contains(hold));
                self.delete_holds(names, gone, shared);
                let mut lists = left.lists.clone();
                if let Some(list) = &after.bypass {
                    lists.remove(&list.number);
                }
                self.delete_lists(names, &lists, shared);
            }
        }
    }

    /// Adds the chains that are not there yet, with the elements that lead to them.
    fn take_over_chains(
        &mut self,
        names: &Names,
        left: &Remnants,
        after: &Layout,
        shared: &Shared,
    ) {
        if names.is_system() {
            self.create_system_sets(names);
        }
        self.create_list(names, after, shared);
        let needed = names.chains(after);
        for chain in needed.difference(&left.chains) {
            self.add_chain(chain);
        }
        let mut elements = MapElements::new();
        for (name, proxy) in &after.proxies {
            if !left.chains.contains(&names.chain(ProxyChain::Proxy, name)) {
                self.proxy_rules(names, after, name, proxy);
                elements.extend(names.proxy_elements(self.marks, name, proxy));
            }
        }
        elements.retain(|key, _| is_new(left, key));
        self.add_map_elements(&elements);
        for hold in &after.holds {
            if !left.chains.contains(&names.hold(hold)) {
                self.create_hold(names, after, hold);
            }
        }
    }

    /// All elements of shared maps that a layout needs, but for those of control groups.
    fn layout_elements(&self, names: &Names, layout: &Layout) -> MapElements {
        let mut elements = names.user_element(layout);
        elements.extend(names.drop_element(layout));
        for (name, proxy) in &layout.proxies {
            elements.extend(names.proxy_elements(self.marks, name, proxy));
        }
        for hold in &layout.holds {
            elements.extend(names.hold_elements(self.marks, layout, hold));
        }
        elements
    }

    /// Deletes what was left of a user who has nothing from now on.
    pub(super) fn delete_remnants(&mut self, names: &Names, left: &Remnants, shared: &Shared) {
        if names.is_system() {
            self.no_system(shared);
            self.create_system_sets(names);
            for map in names.number_maps() {
                self.flush_set(map);
            }
        } else {
            self.delete_verdicts(names, left.cgroups.iter().copied());
            self.look_only_at(shared.needed_without(names.uid), shared);
        }
        self.delete_map_elements(&left.map_keys);
        self.delete_chains(&left.chains);
        self.delete_holds(names, &left.holds, shared);
        if names.is_system() {
            self.delete_system_sets(names);
        }
        self.delete_lists(names, &left.lists, shared);
    }
}

/// Whether the map has no element with this key.
fn is_new(left: &Remnants, key: &MapKey) -> bool {
    !left.map_keys.contains(key)
}
