//! The table `inet cgtproxy`: its base chains, and each user's objects in it.
//!
//! ```text
//! table inet cgtproxy {
//!   chain version-2 { }                       # the format of this table
//!   map users   { type cgroupsv2 : verdict }  # user@1000.service : goto user-1000
//!   map deliver { type mark : verdict }       # a proxy's mark : goto deliver-1000-mihomo
//!   map divert  { type mark : verdict }       # a proxy's mark : goto divert-1000-mihomo
//!   map guard   { type mark : verdict }       # a proxy's mark : goto guard-1000
//!   map resolve { type mark : verdict }       # a proxy's DNS mark : goto resolve-1000-mihomo
//!                                             # a proxy's mark : goto redirect-1000-mihomo
//!   map receive { type mark : verdict }       # both : goto receive-1000-mihomo
//!   set proxy-uids { type uid }               # root, and whom the administrator allows
//!   chain output     { type route hook output priority mangle; … }
//!   chain output-nat { type nat hook output priority dstnat; … }
//!   chain prerouting { type filter hook prerouting priority mangle; … }
//!   chain input      { type filter hook input priority mangle; … }
//!
//!   map cgroups-1000 { type cgroupsv2 : verdict }
//!   map marks-1000   { type mark : verdict }  # a proxy's mark : goto divert-1000-mihomo
//!   set bypass4-1000 { type ipv4_addr; flags interval }
//!   set bypass6-1000 { type ipv6_addr; flags interval }
//!   chain user-1000 { … }   chain open-1000 { … }   chain drop-1000 { … }   chain guard-1000 { … }
//!   chain owner-1000 { … }
//!   chain tproxy-1000-mihomo { … }   chain divert-1000-mihomo { … }   chain deliver-1000-mihomo { … }
//!   chain dns-1000-mihomo { … }      chain resolve-1000-mihomo { … }
//!   chain redirect-1000-mihomo { … }  chain receive-1000-mihomo { … }
//!   chain hold-1000-5-mihomo { … }            # control groups at level 4, below which all is held
//! }
//! ```
//!
//! The mark of a proxy has the divert bit, by which the `ip rule` sends a packet back in over lo.
//! The connection keeps it as its conntrack mark, so that it goes on as it began whatever becomes
//! of the rules; only drops look at every packet. A hijacked DNS query carries the same mark
//! without the divert bit, as its conntrack mark only: it is not diverted but translated. So is what goes
//! to a proxy that is no TPROXY server; its conntrack mark has the divert bit.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CStr, CString};

use cgtproxy_proto::name::ProxyName;
use nftnl::{ChainType, Hook, MsgType};

use super::ffi::{Content, Element, KeyType};
use super::names::Names;
use super::plan::{Before, Hold, Layout, Plan, Verdict};
use super::rule::{Family, Protocol};
use super::transaction::Transaction;
use crate::cgroup::ControlGroupId;
use crate::mark::Mark;

/// The chain that says how this table is laid out. A table without it is made anew.
pub(super) const VERSION: &CStr = c"version-2";
pub(super) const USERS: &CStr = c"users";
pub(super) const DELIVER: &CStr = c"deliver";
pub(super) const DIVERT: &CStr = c"divert";
pub(super) const GUARD: &CStr = c"guard";
pub(super) const RESOLVE: &CStr = c"resolve";
pub(super) const RECEIVE: &CStr = c"receive";
const PROXY_UIDS: &CStr = c"proxy-uids";
const OUTPUT: &CStr = c"output";
const OUTPUT_NAT: &CStr = c"output-nat";
const PREROUTING: &CStr = c"prerouting";
const INPUT: &CStr = c"input";

/// `mangle` of the inet family (linux/netfilter_ipv4.h, NF_IP_PRI_MANGLE).
const PRIORITY_MANGLE: i32 = -150;

/// `dstnat` in an output chain (NF_IP_PRI_NAT_DST).
const PRIORITY_DSTNAT: i32 = -100;

/// The level of user@UID.service: user.slice, user-UID.slice, user@UID.service.
const USER_LEVEL: u32 = 3;

impl Transaction<'_> {
    /// Everything that no user owns. What is there already stays, its rules are written anew.
    pub(super) fn base(&mut self, proxy_uids: &[u32]) {
        let mask = self.marks.mask();
        let divert = self.marks.divert();
        self.add_chain(VERSION);
        self.add_set(USERS, KeyType::ControlGroup, Content::Verdicts);
        self.add_set(DELIVER, KeyType::Mark, Content::Verdicts);
        self.add_set(DIVERT, KeyType::Mark, Content::Verdicts);
        self.add_set(GUARD, KeyType::Mark, Content::Verdicts);
        self.add_set(RESOLVE, KeyType::Mark, Content::Verdicts);
        self.add_set(RECEIVE, KeyType::Mark, Content::Verdicts);
        self.add_set(PROXY_UIDS, KeyType::Uid, Content::Keys);
        self.flush_set(PROXY_UIDS);
        let mut uids = self.set(PROXY_UIDS, KeyType::Uid, Content::Keys);
        for uid in proxy_uids {
            uids.push(&uid.to_ne_bytes(), Element::Key);
        }
        self.write_elements(&uids, MsgType::Add);

        let mangle = PRIORITY_MANGLE;
        self.add_base_chain(OUTPUT, ChainType::Route, Hook::Out, mangle);
        self.add_base_chain(OUTPUT_NAT, ChainType::Nat, Hook::Out, PRIORITY_DSTNAT);
        self.add_base_chain(PREROUTING, ChainType::Filter, Hook::PreRouting, mangle);
        self.add_base_chain(INPUT, ChainType::Filter, Hook::In, mangle);
        self.add_rules(
            OUTPUT,
            [
                // ct direction reply return
                &|rule| rule.ct_direction_reply().leave(),
                // socket cgroupv2 level 3 vmap @users
                &|rule| rule.socket_cgroupv2_vmap(USER_LEVEL, USERS),
                // A connection to a proxy whose user has no policy any more: it must not go on
                // directly, in the middle of what it was saying.
                // meta skuid >= 0 ct mark & DIVERT != 0 meta l4proto tcp reject with tcp reset
                &|rule| {
                    rule.skuid_known()
                        .ct_mark_has(divert)
                        .l4proto(Protocol::Tcp)
                        .reject_with_tcp_reset()
                },
                // meta skuid >= 0 ct mark & DIVERT != 0 reject
                &|rule| rule.skuid_known().ct_mark_has(divert).reject(),
                // What the kernel says by itself to a proxy, when the application's socket is
                // gone: the last acknowledgement of a connection, or that there is none. The
                // proxy would wait for it, and refuse the next connection from the same port.
                // ct mark & MASK vmap @divert
                &|rule| rule.ct_mark_vmap(mask, DIVERT),
                // ct mark & DIVERT != 0 drop
                &|rule| rule.ct_mark_has(divert).drop(),
            ],
        );
        self.add_rules(
            OUTPUT_NAT,
            [
                // ct mark & MASK vmap @resolve
                &|rule| rule.ct_mark_vmap(mask, RESOLVE),
            ],
        );
        self.add_rules(
            PREROUTING,
            [
                // iif lo meta mark & MASK vmap @deliver
                &|rule| rule.iif_lo().meta_mark_vmap(mask, DELIVER),
            ],
        );
        self.add_rules(
            INPUT,
            [
                // iif lo meta mark & MASK vmap @guard
                &|rule| rule.iif_lo().meta_mark_vmap(mask, GUARD),
                // What is diverted to nobody reaches nobody.
                // iif lo meta mark & DIVERT != 0 drop
                &|rule| rule.iif_lo().meta_mark_has(divert).drop(),
                // What was translated, which nothing but its connection tells.
                // iif lo ct direction original ct mark & MASK vmap @receive
                &|rule| {
                    rule.iif_lo()
                        .ct_direction_original()
                        .ct_mark_vmap(mask, RECEIVE)
                },
                // iif lo ct direction original ct mark & DIVERT != 0 drop
                &|rule| {
                    rule.iif_lo()
                        .ct_direction_original()
                        .ct_mark_has(divert)
                        .drop()
                },
            ],
        );
    }

    /// One user's change.
    pub(super) fn plan(&mut self, plan: &Plan) {
        let names = Names::of(plan.uid);
        match (&plan.before, &plan.after) {
            (Before::Nothing, None) => {}
            (Before::Nothing, Some(after)) => self.create_user(&names, after, plan),
            (Before::Layout(before), Some(after)) => self.change_user(&names, before, after, plan),
            (Before::Layout(before), None) => {
                let proxies = before
                    .proxies
                    .iter()
                    .map(|(name, proxy)| (name, proxy.mark));
                self.delete_user(&names, Some(before.subtree.id()), proxies, &before.holds);
            }
            (Before::LeftBehind(left), after) => {
                let proxies = left.proxies.iter().map(|(name, mark)| (name, *mark));
                self.delete_user(&names, left.subtree, proxies, &left.holds);
                if let Some(after) = after {
                    self.create_user(&names, after, plan);
                }
            }
        }
    }

    fn create_user(&mut self, names: &Names, layout: &Layout, plan: &Plan) {
        self.add_set(&names.cgroups, KeyType::ControlGroup, Content::Verdicts);
        self.add_set(&names.marks, KeyType::Mark, Content::Verdicts);
        self.add_set(&names.bypass4, KeyType::Ipv4, Content::Intervals);
        self.add_set(&names.bypass6, KeyType::Ipv6, Content::Intervals);
        for chain in names.chains() {
            self.add_chain(chain);
        }
        self.open_rules(names);
        self.drop_rules(names);
        self.guard_rules(names);
        self.owner_rules(names, layout);
        for (name, proxy) in &layout.proxies {
            self.create_proxy(names, name, proxy);
        }
        for hold in &layout.holds {
            self.create_hold(names, hold);
        }
        self.bypass_elements(names, layout);
        self.user_rules(names, layout);
        self.add_verdicts(names, plan);
        self.map_to_chain(
            USERS,
            KeyType::ControlGroup,
            &layout.subtree.id().to_bytes(),
            &names.user,
        );
    }

    fn change_user(&mut self, names: &Names, before: &Layout, after: &Layout, plan: &Plan) {
        let mut deleted = self.set(&names.cgroups, KeyType::ControlGroup, Content::Verdicts);
        for id in &plan.delete {
            deleted.push(&id.to_bytes(), Element::Key);
        }
        self.write_elements(&deleted, MsgType::Del);

        for (name, proxy) in &after.proxies {
            match before.proxies.get(name) {
                Some(old) if old.mark == proxy.mark => {
                    if old != proxy {
                        self.change_proxy(names, name, proxy);
                    }
                }
                Some(old) => {
                    self.delete_proxy_elements(names, old.mark);
                    self.change_proxy(names, name, proxy);
                    self.proxy_elements(names, name, proxy.mark);
                }
                None => self.create_proxy(names, name, proxy),
            }
        }
        if before.bypass != after.bypass {
            self.flush_set(&names.bypass4);
            self.flush_set(&names.bypass6);
            self.bypass_elements(names, after);
        }
        if before.levels != after.levels {
            self.flush_chain(&names.user);
            self.user_rules(names, after);
        }
        for hold in after.holds.difference(&before.holds) {
            self.create_hold(names, hold);
        }
        self.add_verdicts(names, plan);
        for hold in before.holds.difference(&after.holds) {
            let chain = names.hold(hold);
            self.flush_chain(&chain);
            self.delete_chain(&chain);
        }
        for (name, proxy) in &before.proxies {
            if !after.proxies.contains_key(name) {
                self.delete_proxy_elements(names, proxy.mark);
                self.flush_proxy(names, name);
                self.delete_proxy_chains(names, name);
            }
        }
        if before.subtree != after.subtree {
            let old = before.subtree.id().to_bytes();
            self.delete_element(USERS, KeyType::ControlGroup, &old);
            let new = after.subtree.id().to_bytes();
            self.map_to_chain(USERS, KeyType::ControlGroup, &new, &names.user);
            self.flush_chain(&names.owner);
            self.owner_rules(names, after);
        }
    }

    /// References go before what they refer to: elements, then rules, then sets and chains.
    fn delete_user<'p>(
        &mut self,
        names: &Names,
        subtree: Option<ControlGroupId>,
        proxies: impl Iterator<Item = (&'p ProxyName, Mark)>,
        holds: &BTreeSet<Hold>,
    ) {
        let proxies: BTreeMap<&ProxyName, Mark> = proxies.collect();
        if let Some(subtree) = subtree {
            self.delete_element(USERS, KeyType::ControlGroup, &subtree.to_bytes());
        }
        self.flush_set(&names.cgroups);
        for &mark in proxies.values() {
            self.delete_proxy_elements(names, mark);
        }
        let holds: Vec<_> = holds.iter().map(|hold| names.hold(hold)).collect();
        for chain in names.chains().into_iter().chain(&holds) {
            self.flush_chain(chain);
        }
        for proxy in proxies.keys() {
            self.flush_proxy(names, proxy);
        }
        for set in [&names.cgroups, &names.marks, &names.bypass4, &names.bypass6] {
            self.delete_set(set);
        }
        for proxy in proxies.keys() {
            self.delete_proxy_chains(names, proxy);
        }
        for chain in names.chains().into_iter().chain(&holds) {
            self.delete_chain(chain);
        }
    }

    /// Deepest level first: the nearest control group with a verdict of its own decides.
    fn user_rules(&mut self, names: &Names, layout: &Layout) {
        for &level in layout.levels.iter().rev() {
            // socket cgroupv2 level LEVEL vmap @cgroups-UID
            self.add_rules(
                &names.user,
                [&|rule| rule.socket_cgroupv2_vmap(level, &names.cgroups)],
            );
        }
        // goto open-UID
        self.add_rules(&names.user, [&|rule| rule.goto(&names.open)]);
    }

    /// Connections that are open go on as they began, and everything else goes direct.
    fn open_rules(&mut self, names: &Names) {
        let (mask, divert) = (self.marks.mask(), self.marks.divert());
        self.add_rules(
            &names.open,
            [
                // ct mark & MASK vmap @marks-UID
                &|rule| rule.ct_mark_vmap(mask, &names.marks),
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
    fn owner_rules(&mut self, names: &Names, layout: &Layout) {
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

    /// The control groups' own sockets have their verdict. A socket that is deeper comes here only if
    /// nothing nearer to it is in the map: what it may do is not decided yet.
    ///
    /// It is dropped before anything is looked at that could let it through. Connections that came
    /// from outside have been let go at the beginning of the output chain.
    fn create_hold(&mut self, names: &Names, hold: &Hold) {
        let chain = names.hold(hold);
        self.add_chain(&chain);
        // socket cgroupv2 level LEVEL != 0 drop
        self.add_rules(&chain, [&|rule| rule.socket_as_deep_as(hold.level).drop()]);
        match self.chain_of(names, &hold.verdict) {
            // goto CHAIN
            Some(decided) => self.add_rules(&chain, [&|rule| rule.goto(&decided)]),
            // drop
            None => self.add_rules(&chain, [&|rule| rule.drop()]),
        }
    }

    /// The chain for packets with this verdict; none if it is to drop them all.
    fn chain_of(&self, names: &Names, verdict: &Verdict) -> Option<CString> {
        match verdict {
            Verdict::Direct => Some(names.open.clone()),
            Verdict::Drop => Some(names.drop.clone()),
            Verdict::DropAll => None,
            Verdict::Proxy(proxy) => Some(names.tproxy(proxy)),
        }
    }

    fn add_verdicts(&mut self, names: &Names, plan: &Plan) {
        let mut map = self.set(&names.cgroups, KeyType::ControlGroup, Content::Verdicts);
        for (cgroup, element) in &plan.add {
            let key = cgroup.id().to_bytes();
            let chain = match Hold::of(cgroup.level(), element) {
                Some(hold) => Some(names.hold(&hold)),
                None => self.chain_of(names, &element.verdict),
            };
            match &chain {
                Some(chain) => map.push(&key, Element::Goto(chain)),
                None => map.push(&key, Element::Drop),
            }
        }
        self.write_elements(&map, MsgType::Add);
    }
}
