//! From a plan to the changes of the ruleset that carry it out: all at once where there was nothing or will be nothing,
//! and else step by step.

use nftnl::MsgType;

use super::ffi::{Content, Element, KeyType};
use super::names::Names;
use super::plan::{Before, ElementChanges, Layout, LeftBehind, Plan, Stamp, Step};
use super::ruleset::STAMPS;
use super::transaction::Transaction;
use crate::cgroup::ControlGroupId;
use crate::peer::Uid;

impl Transaction<'_> {
    /// One user's change.
    pub(super) fn plan(&mut self, plan: &Plan) {
        let names = Names::of(plan.uid);
        match (&plan.before, &plan.after) {
            (Before::Nothing, None) => {}
            (Before::Nothing | Before::Layout(_), Some(_)) => {
                let elements = plan.element_changes();
                for step in Step::ALL {
                    if step.has_work(plan, &elements) {
                        self.step(plan, &elements, step);
                    }
                }
            }
            (Before::Layout(before), None) => {
                let subtree = Some(before.subtree.id()).filter(|_| !names.is_system());
                self.delete_layout(&names, subtree, before);
            }
            (Before::LeftBehind(left), Some(after)) => self.take_over(&names, left, after, plan),
            (Before::LeftBehind(left), None) => {
                let proxies = left.proxies.iter().map(|(name, mark)| (name, *mark));
                self.delete_user(&names, left.subtree, proxies, &left.holds);
            }
        }
        self.unstamp(plan);
        self.stamp(plan);
    }

    /// Everything that a user has, and what leads there from this control group.
    fn delete_layout(&mut self, names: &Names, subtree: Option<ControlGroupId>, layout: &Layout) {
        let proxies = layout
            .proxies
            .iter()
            .map(|(name, proxy)| (name, proxy.mark));
        self.delete_user(names, subtree, proxies, &layout.holds);
    }

    /// The layout that the kernel has is not that of before any more.
    pub(super) fn unstamp(&mut self, plan: &Plan) {
        if !plan.keeps_layout() && plan.had.is_some() {
            let key = plan.uid.value().to_ne_bytes();
            self.delete_element(STAMPS, KeyType::Uid, &key);
        }
    }

    /// The name of the layout that the kernel has from here on.
    pub(super) fn stamp(&mut self, plan: &Plan) {
        if !plan.keeps_layout() && plan.after.is_some() {
            self.add_stamp(plan.uid, plan.stamp);
        }
    }

    fn add_stamp(&mut self, uid: Uid, stamp: Stamp) {
        let mut stamps = self.set(STAMPS, KeyType::Uid, Content::Numbers);
        stamps.push(&uid.value().to_ne_bytes(), Element::Number(stamp.value()));
        self.write_elements(&stamps, MsgType::Add);
    }

    /// What is there is made to be what is wanted without a look at what it was. No chain or map that is needed
    /// is deleted, only filled anew: a packet that is on its way through them finds every element, either as
    /// it was or as it is to be, while one of a map that is deleted finds none.
    fn take_over(&mut self, names: &Names, left: &LeftBehind, after: &Layout, plan: &Plan) {
        if let Some(subtree) = left.subtree {
            self.lead_nowhere(subtree);
        }
        for map in names.verdict_maps() {
            self.flush_set(map);
        }
        for &mark in left.proxies.values() {
            self.delete_proxy_elements(names, mark);
        }
        for set in [&names.choices, &names.bypass4, &names.bypass6] {
            self.flush_set(set);
        }
        let holds: Vec<_> = left.holds.iter().map(|hold| names.hold(hold)).collect();
        for chain in names.own_chains().into_iter().chain(&holds) {
            self.flush_chain(chain);
        }
        for proxy in left.proxies.keys() {
            self.flush_proxy(names, proxy);
        }
        self.create_user(names, after, &plan.element_changes());
        self.lead_to_user(names, after.subtree.id());
        for proxy in left.proxies.keys() {
            if !after.proxies.contains_key(proxy) {
                self.delete_proxy_chains(names, proxy);
            }
        }
        for hold in left.holds.difference(&after.holds) {
            self.delete_chain(&names.hold(hold));
        }
    }

    /// One step of a change of what a user has.
    ///
    /// A packet that is on its way goes by the rules that were in force when it entered the base chain, and
    /// finds in maps what is in force at each look-up (nft_do_chain, net/netfilter/nf_tables_core.c). So no step
    /// may take away what a rule looks for before there is what stands in its place, nor lead to a chain that
    /// the rules of before the step know as empty: that chain would let the packet go.
    pub(super) fn step(&mut self, plan: &Plan, elements: &ElementChanges<'_>, step: Step) {
        let names = Names::of(plan.uid);
        let (before, after) = match (&plan.before, &plan.after) {
            (Before::Nothing, Some(after)) => {
                match step {
                    Step::Chains => self.create_user(&names, after, elements),
                    Step::Entrance => self.lead_to_user(&names, after.subtree.id()),
                    Step::Additions | Step::Changes | Step::Deletions => {}
                }
                return;
            }
            (Before::Layout(before), Some(after)) => (before, after),
            _ => return,
        };
        match step {
            Step::Entrance => {}
            Step::Chains => {
                for (name, proxy) in &after.proxies {
                    if !before.proxies.contains_key(name) {
                        self.create_proxy(&names, name, proxy);
                    }
                }
                for hold in after.holds.difference(&before.holds) {
                    self.create_hold(&names, after, hold);
                }
            }
            Step::Additions => {
                let levels = before.levels.union(&after.levels).copied().collect();
                let enforced = before.enforced || after.enforced;
                self.level_rules_between(&names, before, &levels, enforced);
                self.add_verdicts(&names, after, &elements.added);
            }
            Step::Changes => {
                let changed = elements.changed.iter().map(|(cgroup, _)| cgroup.id());
                self.delete_verdicts(&names, changed);
                self.add_verdicts(&names, after, &elements.changed);
                self.change_layout(&names, before, after);
            }
            Step::Deletions => {
                self.delete_verdicts(&names, elements.deleted.iter().copied());
                if before.levels != after.levels || before.enforced != after.enforced {
                    self.level_rules(&names, &after.levels, after.enforced);
                }
                for hold in before.holds.difference(&after.holds) {
                    self.delete_hold(&names, before, hold);
                }
                for (name, proxy) in &before.proxies {
                    if !after.proxies.contains_key(name) {
                        self.drop_proxy(&names, name, proxy);
                    }
                }
            }
        }
    }

    /// Takes back what these first steps have added.
    pub(super) fn take_back(&mut self, plan: &Plan, elements: &ElementChanges<'_>, done: &[Step]) {
        let names = Names::of(plan.uid);
        let (before, after) = match (&plan.before, &plan.after) {
            // What was to lead to it is what was refused.
            (Before::Nothing, Some(after)) => return self.delete_layout(&names, None, after),
            (Before::Layout(before), Some(after)) => (before, after),
            _ => return,
        };
        if done.contains(&Step::Additions) {
            let added = elements.added.iter().map(|(cgroup, _)| cgroup.id());
            self.delete_verdicts(&names, added);
            self.level_rules(&names, &before.levels, before.enforced);
        }
        if done.contains(&Step::Chains) {
            for hold in after.holds.difference(&before.holds) {
                self.delete_hold(&names, after, hold);
            }
            for (name, proxy) in &after.proxies {
                if !before.proxies.contains_key(name) {
                    self.drop_proxy(&names, name, proxy);
                }
            }
        }
        if let Some(had) = plan.had.filter(|_| !plan.keeps_layout()) {
            self.add_stamp(plan.uid, had);
        }
    }

    /// What a user's layout has in both, and says otherwise.
    fn change_layout(&mut self, names: &Names, before: &Layout, after: &Layout) {
        for (name, proxy) in &after.proxies {
            // Its mark is the same: a proxy keeps it for as long as the policy has its name.
            if before.proxies.get(name).is_some_and(|old| old != proxy) {
                self.change_proxy(names, name, proxy);
            }
        }
        if before.bypass != after.bypass {
            self.flush_set(&names.bypass4);
            self.flush_set(&names.bypass6);
            self.bypass_elements(names, after);
        }
        if before.gateway != after.gateway
            || (after.gateway.is_some() && before.proxies != after.proxies)
        {
            self.gateway(names, after);
        }
        if before.subtree != after.subtree {
            if !names.is_system() {
                self.lead_nowhere(before.subtree.id());
                self.lead_to_user(names, after.subtree.id());
            }
            self.flush_chain(&names.owner);
            self.owner_rules(names, after);
        }
    }
}
