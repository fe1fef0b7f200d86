//! From a plan to the changes of the ruleset that carry it out: all at once where there was nothing or will be nothing,
//! and else step by step.

use super::ffi::Element;
use super::names::Names;
use super::plan::{Before, ElementChanges, Layout, Plan, Stamp, Step};
use super::ruleset::STAMPS;
use super::shared::Shared;
use super::transaction::Transaction;
use crate::peer::Uid;

impl Transaction<'_> {
    /// One user's change.
    pub(super) fn plan(&mut self, plan: &Plan, shared: &Shared) {
        let names = Names::of(plan.uid);
        let elements = plan.element_changes(shared);
        match (&plan.before, &plan.after) {
            (Before::Nothing, None) => {}
            (_, Some(_)) => {
                for step in Step::ALL {
                    if step.has_work(plan, &elements) {
                        self.step(plan, &elements, step, shared);
                    }
                }
            }
            (Before::Layout(before), None) => {
                self.delete_user(&names, &before.layout, &elements, shared);
            }
            (Before::LeftBehind(_), None) => {
                self.delete_remnants(&names, shared.left(plan.uid), shared);
            }
        }
        self.unstamp(plan);
        self.stamp(plan);
    }

    /// How many messages the steps would write that have no work, which are left out: none, if all that a step does is
    /// said in [`Step::has_work`] too.
    pub(super) fn left_out(
        mut self,
        plan: &Plan,
        elements: &ElementChanges<'_>,
        shared: &Shared,
    ) -> usize {
        let idle = |step: &Step| !step.has_work(plan, elements);
        for step in Step::ALL.into_iter().filter(idle) {
            self.step(plan, elements, step, shared);
        }
        self.messages()
    }

    /// The layout that the kernel has is not that of before any more.
    pub(super) fn unstamp(&mut self, plan: &Plan) {
        if !plan.keeps_layout() && plan.before.stamp().is_some() {
            let key = plan.uid.value().to_ne_bytes();
            self.delete_element(STAMPS, &key);
        }
    }

    /// The stamp of the layout that the kernel has from here on.
    pub(super) fn stamp(&mut self, plan: &Plan) {
        if let Some((uid, stamp, _)) = plan.coming() {
            self.add_stamp(uid, stamp);
        }
    }

    fn add_stamp(&mut self, uid: Uid, stamp: Stamp) {
        let (key, value) = (uid.value().to_ne_bytes(), stamp.value().to_ne_bytes());
        self.add_element(STAMPS, &key, Element::Value(&value));
    }

    /// One step of a change of what a user has.
    ///
    /// A packet that is on its way goes by the rules that were in force when it entered the base chain, and
    /// finds in maps what is in force at each look-up (nft_do_chain, net/netfilter/nf_tables_core.c). So no step
    /// may take away what a rule looks for before there is what stands in its place, nor lead to a chain that
    /// the rules of before the step know as empty: that chain would let the packet go.
    pub(super) fn step(
        &mut self,
        plan: &Plan,
        elements: &ElementChanges<'_>,
        step: Step,
        shared: &Shared,
    ) {
        let names = Names::of(plan.uid);
        let (before, after) = match (&plan.before, &plan.after) {
            (Before::Nothing, Some(after)) => {
                let after = &after.layout;
                match step {
                    Step::Chains => self.create_user(&names, after, shared),
                    Step::Additions => self.lead_to_user(&names, after, elements, shared),
                    Step::Changes | Step::Deletions => {}
                }
                return;
            }
            (Before::Layout(before), Some(after)) => (&before.layout, &after.layout),
            (Before::LeftBehind(_), Some(after)) => {
                let left = shared.left(plan.uid);
                return self.take_over(&names, left, &after.layout, elements, step, shared);
            }
            (_, None) => return,
        };
        match step {
            Step::Chains => {
                if before.bypass != after.bypass {
                    self.create_list(&names, after, shared);
                }
                for (name, proxy) in &after.proxies {
                    match before.proxies.get(name) {
                        Some(old) => self.create_chains_between(&names, name, old, proxy),
                        None => self.create_proxy(&names, after, name, proxy),
                    }
                }
                for hold in after.holds.difference(&before.holds) {
                    self.create_hold(&names, after, hold);
                }
            }
            Step::Additions => {
                let both = before.looks_of_both(after);
                self.level_rules(&names, &before.looks(), &both, shared);
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
                let both = before.looks_of_both(after);
                self.level_rules(&names, &both, &after.looks(), shared);
                for hold in before.holds.difference(&after.holds) {
                    self.delete_hold(&names, before, hold, shared);
                }
                self.drop_proxies(&names, before, after);
                if before.bypass != after.bypass {
                    self.delete_list(&names, before, shared);
                }
            }
        }
    }

    /// Takes back what these first steps have added.
    pub(super) fn take_back(
        &mut self,
        plan: &Plan,
        elements: &ElementChanges<'_>,
        done: &[Step],
        shared: &Shared,
    ) {
        let names = Names::of(plan.uid);
        let (before, after) = match (&plan.before, &plan.after) {
            // A first policy has two steps. The second one, with what leads to the layout, is the one that was refused.
            (Before::Nothing, Some(after)) => {
                return self.delete_layout(&names, &after.layout, shared);
            }
            (Before::Layout(before), Some(after)) => (&before.layout, &after.layout),
            _ => return,
        };
        if done.contains(&Step::Additions) {
            let added = elements.added.iter().map(|(cgroup, _)| cgroup.id());
            self.delete_verdicts(&names, added);
            let both = before.looks_of_both(after);
            self.level_rules(&names, &both, &before.looks(), shared);
        }
        if done.contains(&Step::Chains) {
            for hold in after.holds.difference(&before.holds) {
                self.delete_hold(&names, after, hold, shared);
            }
            self.drop_proxies(&names, after, before);
            if before.bypass != after.bypass {
                self.delete_list(&names, after, shared);
            }
        }
        if let Some(stamp) = plan.before.stamp().filter(|_| !plan.keeps_layout()) {
            self.add_stamp(plan.uid, stamp);
        }
    }

    /// Deletes the proxies that this layout has and that one has not, and chains that they do not need any more.
    fn drop_proxies(&mut self, names: &Names, from: &Layout, to: &Layout) {
        for (name, proxy) in &from.proxies {
            let kept = to.proxies.get(name);
            if kept.is_none() {
                let elements = names.proxy_elements(self.marks, name, proxy);
                self.delete_map_elements(elements.keys());
            }
            let needed = kept.map(|kept| names.of_proxy(name, kept));
            let needed = needed.unwrap_or_default();
            let chains = || names.of_proxy(name, proxy).into_iter();
            for chain in chains().filter(|chain| !needed.contains(chain)) {
                self.flush_chain(&chain);
                self.delete_chain(&chain);
            }
        }
    }

    /// What a user's layout has in both, and says otherwise.
    fn change_layout(&mut self, names: &Names, before: &Layout, after: &Layout) {
        let around = before.proxies_surroundings_change(after);
        for (name, old, new) in before.proxies_that_stay(after) {
            // Its mark is the same: a proxy keeps it for as long as the policy has its name.
            if old != new || around {
                self.change_proxy(names, after, name, old, new);
            }
        }
        if before.bypass != after.bypass {
            self.system_drop_rules(names, after);
        }
        if before.gateway_changes(after) {
            self.gateway(names, after);
        }
        self.change_map_elements(&names.drop_element(before), &names.drop_element(after));
        self.change_map_elements(&names.user_element(before), &names.user_element(after));
    }
}
