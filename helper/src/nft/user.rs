//! What a user has in the table: chains and sets with that user's number in their names.

use std::collections::{BTreeMap, BTreeSet};

use cgtproxy_proto::name::ProxyName;
use nftnl::MsgType;

use super::ffi::{Content, Element, KeyType};
use super::names::Names;
use super::plan::{ElementChanges, Hold, Layout, Proxy};
use super::rule::{Family, Protocol};
use super::ruleset::{ENFORCED, MARKS, OPENS, PROXY_UIDS, SESSIONS, SYSTEM, SYSTEM_UIDS, USERS};
use super::transaction::Transaction;
use crate::cgroup::ControlGroupId;
use crate::mark::Mark;

impl Transaction<'_> {
    /// All that a user has. Nothing leads there yet, but for the system's policy, which every packet comes by.
    pub(super) fn create_user(
        &mut self,
        names: &Names,
        layout: &Layout,
        elements: &ElementChanges<'_>,
    ) {
        self.add_set(&names.cgroups, KeyType::ControlGroup, Content::Numbers);
        self.add_set(&names.choices, KeyType::Mark, Content::Verdicts);
        self.add_set(&names.bypass4, KeyType::Ipv4, Content::Intervals);
        self.add_set(&names.bypass6, KeyType::Ipv6, Content::Intervals);
        if names.is_system() {
            self.add_set(ENFORCED, KeyType::ControlGroup, Content::Verdicts);
        } else {
            self.add_set(&names.marks, KeyType::Mark, Content::Verdicts);
        }
        for chain in names.own_chains() {
            self.add_chain(chain);
        }
        if !names.is_system() {
            self.open_rules(names);
        }
        self.drop_rules(names);
        self.guard_rules(names);
        self.owner_rules(names, layout);
        self.common_choices(names);
        for (name, proxy) in &layout.proxies {
            self.create_proxy(names, name, proxy);
        }
        for hold in &layout.holds {
            self.create_hold(names, layout, hold);
        }
        self.bypass_elements(names, layout);
        self.level_rules(names, &layout.levels, layout.enforced);
        self.add_verdicts(names, layout, &elements.added);
        if names.is_system() {
            self.lead_to_system();
            self.gateway(names, layout);
        }
    }

    /// The elements that lead from a user's control group to that user's chains.
    pub(super) fn lead_to_user(&mut self, names: &Names, subtree: ControlGroupId) {
        if names.is_system() {
            return;
        }
        for (map, chain) in [(USERS, &names.user), (OPENS, &names.open)] {
            self.map_to_chain(map, KeyType::ControlGroup, &subtree.to_bytes(), chain);
        }
    }

    pub(super) fn lead_nowhere(&mut self, subtree: ControlGroupId) {
        for map in [USERS, OPENS] {
            self.delete_element(map, KeyType::ControlGroup, &subtree.to_bytes());
        }
    }

    pub(super) fn drop_proxy(&mut self, names: &Names, name: &ProxyName, proxy: &Proxy) {
        self.delete_proxy_elements(names, proxy.mark);
        self.delete_proxy_choice(names, proxy);
        self.flush_proxy(names, name);
        self.delete_proxy_chains(names, name);
    }

    /// References go before what they refer to: elements, then rules, then sets and chains.
    pub(super) fn delete_user<'p>(
        &mut self,
        names: &Names,
        subtree: Option<ControlGroupId>,
        proxies: impl Iterator<Item = (&'p ProxyName, Mark)>,
        holds: &BTreeSet<Hold>,
    ) {
        let proxies: BTreeMap<&ProxyName, Mark> = proxies.collect();
        if let Some(subtree) = subtree {
            self.lead_nowhere(subtree);
        }
        if names.is_system() {
            self.no_system_rules();
        }
        for map in names.verdict_maps() {
            self.flush_set(map);
        }
        for &mark in proxies.values() {
            self.delete_proxy_elements(names, mark);
        }
        self.flush_set(&names.choices);
        let holds: Vec<_> = holds.iter().map(|hold| names.hold(hold)).collect();
        for chain in names.own_chains().into_iter().chain(&holds) {
            self.flush_chain(chain);
        }
        for proxy in proxies.keys() {
            self.flush_proxy(names, proxy);
        }
        for set in names.own_sets() {
            self.delete_set(set);
        }
        for proxy in proxies.keys() {
            self.delete_proxy_chains(names, proxy);
        }
        for chain in names.own_chains().into_iter().chain(&holds) {
            self.delete_chain(chain);
        }
    }

    /// Rules that look at these levels, if those of before don't.
    pub(super) fn level_rules_between(
        &mut self,
        names: &Names,
        before: &Layout,
        levels: &BTreeSet<u32>,
        enforced: bool,
    ) {
        if before.levels != *levels || before.enforced != enforced {
            self.level_rules(names, levels, enforced);
        }
    }

    pub(super) fn level_rules(&mut self, names: &Names, levels: &BTreeSet<u32>, enforced: bool) {
        self.flush_chain(&names.user);
        self.level_rules_of(&names.user, levels, |rule, level| {
            rule.socket_cgroupv2_map_vmap(level, &names.cgroups, &names.choices)
        });
        if names.is_system() {
            // goto open
            self.add_rules(SYSTEM, [&|rule| rule.goto(names.rest())]);
            self.flush_chain(ENFORCED);
            if enforced {
                self.level_rules_of(ENFORCED, levels, |rule, level| {
                    rule.socket_cgroupv2_vmap(level, ENFORCED)
                });
            }
            // goto sessions
            self.add_rules(ENFORCED, [&|rule| rule.goto(SESSIONS)]);
        } else {
            // goto system
            self.add_rules(&names.user, [&|rule| rule.goto(names.rest())]);
        }
    }

    /// Connections that are open go on as they began, whether a user's verdict or the system's was the
    /// reason, and everything else goes direct.
    fn open_rules(&mut self, names: &Names) {
        let (mask, divert) = (self.marks.mask(), self.marks.divert());
        self.add_rules(
            &names.open,
            [
                // ct mark & DIVERT == 0 return
                &|rule| rule.ct_mark_lacks(divert).leave(),
                // ct mark & MASK vmap @marks-UID
                &|rule| rule.ct_mark_vmap(mask, &names.marks),
                // ct mark & MASK vmap @marks
                &|rule| rule.ct_mark_vmap(mask, MARKS),
                // The connection's proxy is not in the policy any more, or is another user's by
                // now: the connection ends, and never goes on directly.
                // ct mark & DIVERT != 0 meta l4proto tcp reject with tcp reset
                &|rule| {
                    rule.ct_mark_has(divert)
                        .l4proto(Protocol::Tcp)
                        .reject_with_tcp_reset()
                },
                // ct mark & DIVERT != 0 reject
                &|rule| rule.ct_mark_has(divert).reject(),
            ],
        );
    }

    /// Every protocol is dropped, and open connections too.
    fn drop_rules(&mut self, names: &Names) {
        self.add_rules(
            &names.drop,
            [
                // ip daddr @bypass4-UID goto open-UID
                &|rule| {
                    rule.daddr_in(Family::Ipv4, &names.bypass4)
                        .goto(&names.open)
                },
                // ip6 daddr @bypass6-UID goto open-UID
                &|rule| {
                    rule.daddr_in(Family::Ipv6, &names.bypass6)
                        .goto(&names.open)
                },
                // drop
                &|rule| rule.drop(),
            ],
        );
    }

    /// A diverted packet reaches only a socket of the same user, or of an allowed uid.
    ///
    /// TCP is looked at when a connection opens: after that its packets belong to a socket that
    /// was let in, and while that waits to be accepted it has no owner that `skuid` could see
    /// (nft_meta_get_eval_skugid wants a file). UDP is looked at packet by packet.
    ///
    /// Services have users of their own: the system's policy takes proxies of every system user.
    fn guard_rules(&mut self, names: &Names) {
        let uid = names.uid.value();
        self.add_rules(
            &names.guard,
            [
                // meta l4proto tcp ct state != new return
                &|rule| rule.l4proto(Protocol::Tcp).ct_state_not_new().leave(),
                // meta skuid UID return
                &|rule| rule.skuid(uid).leave(),
                // meta skuid @proxy-uids return
                &|rule| rule.skuid_in(PROXY_UIDS).leave(),
            ],
        );
        if names.is_system() {
            for (first, last) in SYSTEM_UIDS {
                // meta skuid FIRST-LAST return
                self.add_rules(
                    &names.guard,
                    [&|rule| rule.skuid_from_to(first, last).leave()],
                );
            }
        }
        self.add_rules(
            &names.guard,
            [
                // meta l4proto tcp reject with tcp reset
                &|rule| rule.l4proto(Protocol::Tcp).reject_with_tcp_reset(),
                // reject
                &|rule| rule.reject(),
            ],
        );
    }

    /// A translated packet reaches only a socket that was made below the user's own subtree.
    ///
    /// Unlike one that `tproxy` delivers, it does not have its socket yet, so `skuid` knows nothing;
    /// `socket` looks for it, and knows its control group.
    pub(super) fn owner_rules(&mut self, names: &Names, layout: &Layout) {
        let (level, id) = (layout.subtree.level(), layout.subtree.id().to_bytes());
        self.add_rules(
            &names.owner,
            [
                // meta l4proto tcp ct state != new return
                &|rule| rule.l4proto(Protocol::Tcp).ct_state_not_new().leave(),
                // socket cgroupv2 level LEVEL SUBTREE return
                &|rule| rule.socket_cgroupv2(level, &id).leave(),
                // Whoever else has the port.
                // meta l4proto tcp socket wildcard { 0, 1 } reject with tcp reset
                &|rule| {
                    rule.l4proto(Protocol::Tcp)
                        .socket_is_full()
                        .reject_with_tcp_reset()
                },
                // The rest of an earlier connection from the same port, which was let in, and whose
                // listener takes this one too.
                // meta l4proto tcp socket transparent { 0, 1 } return
                &|rule| rule.l4proto(Protocol::Tcp).socket_exists().leave(),
                // meta l4proto tcp reject with tcp reset
                &|rule| rule.l4proto(Protocol::Tcp).reject_with_tcp_reset(),
                // reject
                &|rule| rule.reject(),
            ],
        );
    }

    pub(super) fn bypass_elements(&mut self, names: &Names, layout: &Layout) {
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
