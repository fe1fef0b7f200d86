//! The table `inet cgtproxy`: its base chains, and each user's objects in it.
//!
//! ```text
//! table inet cgtproxy {
//!   chain version-1 { }                       # the format of this table
//!   map users   { type cgroupsv2 : verdict }  # user@1000.service : goto user-1000
//!   map deliver { type mark : verdict }       # a proxy's mark : goto deliver-1000-mihomo
//!   map guard   { type mark : verdict }       # a proxy's mark : goto guard-1000
//!   set proxy-uids { type uid }               # root, and whom the administrator allows
//!   chain output     { type route hook output priority mangle; … }
//!   chain prerouting { type filter hook prerouting priority mangle; … }
//!   chain input      { type filter hook input priority mangle; … }
//!
//!   map cgroups-1000 { type cgroupsv2 : verdict }
//!   map marks-1000   { type mark : verdict }  # a proxy's mark : goto divert-1000-mihomo
//!   set bypass4-1000 { type ipv4_addr; flags interval }
//!   set bypass6-1000 { type ipv6_addr; flags interval }
//!   chain user-1000 { … }   chain open-1000 { … }   chain drop-1000 { … }   chain guard-1000 { … }
//!   chain tproxy-1000-mihomo { … }   chain divert-1000-mihomo { … }   chain deliver-1000-mihomo { … }
//! }
//! ```
//!
//! The mark of a proxy has the divert bit, by which the `ip rule` sends a packet back in over lo.
//! The connection keeps it as its conntrack mark, so that it goes on as it began whatever becomes
//! of the rules; only drops look at every packet.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};

use cgtproxy_proto::name::ProxyName;
use nftnl::{Batch, Chain, ChainType, FinalizedBatch, Hook, MsgType, Policy, Rule, Table};

use super::ffi::{Content, Element, FlaggedTable, FlushSet, KeyType, Set};
use super::plan::{Before, Layout, Plan, Proxy, Verdict};
use super::rule::{Family, Protocol, RuleBuilder};
use crate::cgroup::ControlGroupId;
use crate::mark::{Mark, MarkRange};
use crate::peer::Uid;

/// The chain that says how this table is laid out. A table without it is made anew.
pub(super) const VERSION: &CStr = c"version-1";
pub(super) const USERS: &CStr = c"users";
const DELIVER: &CStr = c"deliver";
const GUARD: &CStr = c"guard";
const PROXY_UIDS: &CStr = c"proxy-uids";
const OUTPUT: &CStr = c"output";
const PREROUTING: &CStr = c"prerouting";
const INPUT: &CStr = c"input";

/// `mangle` of the inet family (linux/netfilter_ipv4.h, NF_IP_PRI_MANGLE).
const PRIORITY_MANGLE: i32 = -150;

/// The level of user@UID.service: user.slice, user-UID.slice, user@UID.service.
const USER_LEVEL: u32 = 3;

/// The prefix of a chain that diverts to a proxy, as dumps are searched for it.
pub(super) const DIVERT_PREFIX: &str = "divert-";
/// The prefix of a user's first chain, as dumps are searched for it.
pub(super) const USER_PREFIX: &str = "user-";

/// A name made of our own prefixes, a number and a proxy's name, none of which has a NUL.
fn name(text: String) -> CString {
    CString::new(text).unwrap_or_default()
}

/// The names of a user's objects.
struct Names {
    uid: Uid,
    user: CString,
    open: CString,
    drop: CString,
    guard: CString,
    cgroups: CString,
    marks: CString,
    bypass4: CString,
    bypass6: CString,
}

impl Names {
    fn of(uid: Uid) -> Self {
        Self {
            uid,
            user: name(format!("{USER_PREFIX}{uid}")),
            open: name(format!("open-{uid}")),
            drop: name(format!("drop-{uid}")),
            guard: name(format!("guard-{uid}")),
            cgroups: name(format!("cgroups-{uid}")),
            marks: marks(uid),
            bypass4: name(format!("bypass4-{uid}")),
            bypass6: name(format!("bypass6-{uid}")),
        }
    }

    fn tproxy(&self, proxy: &ProxyName) -> CString {
        name(format!("tproxy-{}-{proxy}", self.uid))
    }

    fn divert(&self, proxy: &ProxyName) -> CString {
        name(format!("{DIVERT_PREFIX}{}-{proxy}", self.uid))
    }

    fn deliver(&self, proxy: &ProxyName) -> CString {
        name(format!("deliver-{}-{proxy}", self.uid))
    }
}

/// The name of a user's map of marks.
pub(super) fn marks(uid: Uid) -> CString {
    name(format!("marks-{uid}"))
}

/// A batch in the making, in the order in which the kernel will carry it out.
pub(super) struct Transaction<'a> {
    batch: Batch,
    table: &'a Table,
    marks: MarkRange,
    next_set_id: u32,
}

impl<'a> Transaction<'a> {
    pub(super) fn new(table: &'a Table, marks: MarkRange) -> Self {
        Self {
            batch: Batch::new(),
            table,
            marks,
            next_set_id: 1,
        }
    }

    pub(super) fn finish(self) -> FinalizedBatch {
        self.batch.finalize()
    }

    /// `add table inet cgtproxy { flags … }`
    pub(super) fn add_table(&mut self, flags: u32) {
        self.batch.add(
            &FlaggedTable {
                table: self.table,
                flags,
            },
            MsgType::Add,
        );
    }

    /// `delete table inet cgtproxy`
    pub(super) fn delete_table(&mut self) {
        self.batch.add(self.table, MsgType::Del);
    }

    fn add_chain(&mut self, chain: &CStr) {
        self.batch.add(&Chain::new(chain, self.table), MsgType::Add);
    }

    fn delete_chain(&mut self, chain: &CStr) {
        self.batch.add(&Chain::new(chain, self.table), MsgType::Del);
    }

    /// A deletion that names no rule deletes all of a chain.
    fn flush_chain(&mut self, chain: &CStr) {
        let chain = Chain::new(chain, self.table);
        self.batch.add(&Rule::new(&chain), MsgType::Del);
    }

    /// Adds rules to the end of a chain.
    fn add_rules<const N: usize>(
        &mut self,
        chain: &CStr,
        rules: [&dyn Fn(RuleBuilder<'_>) -> RuleBuilder<'_>; N],
    ) {
        let chain = Chain::new(chain, self.table);
        for rule in rules {
            self.batch
                .add(&rule(RuleBuilder::new(&chain)).finish(), MsgType::Add);
        }
    }

    fn set(&mut self, name: &CStr, key: KeyType, content: Content) -> Set<'a> {
        let id = self.next_set_id;
        self.next_set_id += 1;
        Set::new(self.table, name, id, key, content)
    }

    fn add_set(&mut self, name: &CStr, key: KeyType, content: Content) {
        let set = self.set(name, key, content);
        self.batch.add(&set, MsgType::Add);
    }

    fn delete_set(&mut self, name: &CStr) {
        let set = self.set(name, KeyType::Mark, Content::Keys);
        self.batch.add(&set, MsgType::Del);
    }

    fn flush_set(&mut self, name: &CStr) {
        let set = self.set(name, KeyType::Mark, Content::Keys);
        self.batch.add(&FlushSet(&set), MsgType::Add);
    }

    fn write_elements(&mut self, set: &Set<'_>, message: MsgType) {
        let mut messages = set.elements();
        while let Some(elements) = messages.next() {
            self.batch.add(&elements, message);
        }
    }

    fn delete_element(&mut self, set: &CStr, key: KeyType, value: &[u8]) {
        let mut set = self.set(set, key, Content::Keys);
        set.push(value, Element::Key);
        self.write_elements(&set, MsgType::Del);
    }

    fn map_to_chain(&mut self, map: &CStr, key: KeyType, value: &[u8], chain: &CStr) {
        let mut map = self.set(map, key, Content::Verdicts);
        map.push(value, Element::Goto(chain));
        self.write_elements(&map, MsgType::Add);
    }

    /// Everything that no user owns. What is there already stays, its rules are written anew.
    pub(super) fn base(&mut self, proxy_uids: &[u32]) {
        let mask = self.marks.mask();
        let divert = self.marks.divert();
        self.add_chain(VERSION);
        self.add_set(USERS, KeyType::ControlGroup, Content::Verdicts);
        self.add_set(DELIVER, KeyType::Mark, Content::Verdicts);
        self.add_set(GUARD, KeyType::Mark, Content::Verdicts);
        self.add_set(PROXY_UIDS, KeyType::Uid, Content::Keys);
        self.flush_set(PROXY_UIDS);
        let mut uids = self.set(PROXY_UIDS, KeyType::Uid, Content::Keys);
        for uid in proxy_uids {
            uids.push(&uid.to_ne_bytes(), Element::Key);
        }
        self.write_elements(&uids, MsgType::Add);

        for (chain, kind, hook) in [
            (OUTPUT, ChainType::Route, Hook::Out),
            (PREROUTING, ChainType::Filter, Hook::PreRouting),
            (INPUT, ChainType::Filter, Hook::In),
        ] {
            let mut base = Chain::new(chain, self.table);
            base.set_type(kind);
            base.set_hook(hook, PRIORITY_MANGLE);
            base.set_policy(Policy::Accept);
            self.batch.add(&base, MsgType::Add);
            self.flush_chain(chain);
        }
        self.add_rules(
            OUTPUT,
            [
                // ct direction reply return
                &|rule| rule.ct_direction_reply().leave(),
                // socket cgroupv2 level 3 vmap @users
                &|rule| rule.socket_cgroupv2_vmap(USER_LEVEL, USERS),
                // A connection to a proxy whose user has no policy any more: it must not go on
                // directly, in the middle of what it was saying.
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
                self.delete_user(&names, Some(before.subtree.id()), proxies);
            }
            (Before::LeftBehind(left), after) => {
                let proxies = left.proxies.iter().map(|(name, mark)| (name, *mark));
                self.delete_user(&names, left.subtree, proxies);
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
        for chain in [&names.user, &names.open, &names.drop, &names.guard] {
            self.add_chain(chain);
        }
        self.open_rules(names);
        self.drop_rules(names);
        self.guard_rules(names);
        for (name, proxy) in &layout.proxies {
            self.create_proxy(names, name, proxy);
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
                        self.flush_chain(&names.tproxy(name));
                        self.flush_chain(&names.deliver(name));
                        self.tproxy_rules(names, name, proxy);
                        self.deliver_rules(names, name, proxy);
                    }
                }
                Some(old) => {
                    self.delete_proxy_keys(names, old.mark);
                    self.flush_proxy(names, name);
                    self.proxy_rules(names, name, proxy);
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
        self.add_verdicts(names, plan);
        for (name, proxy) in &before.proxies {
            if !after.proxies.contains_key(name) {
                self.delete_proxy_keys(names, proxy.mark);
                self.flush_proxy(names, name);
                self.delete_proxy_chains(names, name);
            }
        }
        if before.subtree != after.subtree {
            let old = before.subtree.id().to_bytes();
            self.delete_element(USERS, KeyType::ControlGroup, &old);
            let new = after.subtree.id().to_bytes();
            self.map_to_chain(USERS, KeyType::ControlGroup, &new, &names.user);
        }
    }

    /// References go before what they refer to: elements, then rules, then sets and chains.
    fn delete_user<'p>(
        &mut self,
        names: &Names,
        subtree: Option<ControlGroupId>,
        proxies: impl Iterator<Item = (&'p ProxyName, Mark)>,
    ) {
        let proxies: BTreeMap<&ProxyName, Mark> = proxies.collect();
        if let Some(subtree) = subtree {
            self.delete_element(USERS, KeyType::ControlGroup, &subtree.to_bytes());
        }
        self.flush_set(&names.cgroups);
        for &mark in proxies.values() {
            self.delete_proxy_keys(names, mark);
        }
        for chain in [&names.user, &names.open, &names.drop, &names.guard] {
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
        for chain in [&names.user, &names.open, &names.drop, &names.guard] {
            self.delete_chain(chain);
        }
    }

    fn create_proxy(&mut self, names: &Names, name: &ProxyName, proxy: &Proxy) {
        for chain in [names.divert(name), names.tproxy(name), names.deliver(name)] {
            self.add_chain(&chain);
        }
        self.proxy_rules(names, name, proxy);
    }

    /// The rules of a proxy's chains, which are empty, and the elements that lead to them.
    fn proxy_rules(&mut self, names: &Names, name: &ProxyName, proxy: &Proxy) {
        let divert = names.divert(name);
        let (mask, value) = (self.marks.mask(), proxy.mark.value());
        self.add_rules(
            &divert,
            [
                // ct mark set ct mark & ~MASK | MARK
                &|rule| rule.ct_mark_set(mask, value),
                // meta mark set meta mark & ~MASK | MARK
                &|rule| rule.meta_mark_set(mask, value),
            ],
        );
        self.tproxy_rules(names, name, proxy);
        self.deliver_rules(names, name, proxy);
        let key = value.to_ne_bytes();
        self.map_to_chain(&names.marks, KeyType::Mark, &key, &divert);
        self.map_to_chain(DELIVER, KeyType::Mark, &key, &names.deliver(name));
        self.map_to_chain(GUARD, KeyType::Mark, &key, &names.guard);
    }

    fn delete_proxy_keys(&mut self, names: &Names, mark: Mark) {
        for map in [names.marks.as_c_str(), DELIVER, GUARD] {
            self.delete_element(map, KeyType::Mark, &mark.value().to_ne_bytes());
        }
    }

    fn flush_proxy(&mut self, names: &Names, name: &ProxyName) {
        for chain in [names.tproxy(name), names.divert(name), names.deliver(name)] {
            self.flush_chain(&chain);
        }
    }

    fn delete_proxy_chains(&mut self, names: &Names, name: &ProxyName) {
        for chain in [names.tproxy(name), names.divert(name), names.deliver(name)] {
            self.delete_chain(&chain);
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

    /// Whether a connection is diverted is decided at its first packet.
    fn tproxy_rules(&mut self, names: &Names, name: &ProxyName, proxy: &Proxy) {
        let chain = names.tproxy(name);
        let divert = names.divert(name);
        // ct status confirmed goto open-UID
        self.add_rules(&chain, [&|rule| rule.ct_confirmed().goto(&names.open)]);
        if proxy.no_ipv6 {
            // meta nfproto ipv6 return
            self.add_rules(&chain, [&|rule| rule.nfproto(Family::Ipv6).leave()]);
        }
        if proxy.no_udp {
            // meta l4proto udp return
            self.add_rules(&chain, [&|rule| rule.l4proto(Protocol::Udp).leave()]);
        }
        self.add_rules(
            &chain,
            [
                // The machine itself, broadcast and multicast.
                // fib daddr type != unicast return
                &|rule| rule.daddr_not_unicast().leave(),
                // No proxy could reach it: the address says nothing without an interface.
                // ip6 daddr fe80::/10 return
                &|rule| rule.daddr_link_local().leave(),
                // ip daddr @bypass4-UID return
                &|rule| rule.daddr_in(Family::Ipv4, &names.bypass4).leave(),
                // ip6 daddr @bypass6-UID return
                &|rule| rule.daddr_in(Family::Ipv6, &names.bypass6).leave(),
                // meta l4proto tcp goto divert-UID-NAME
                &|rule| rule.l4proto(Protocol::Tcp).goto(&divert),
                // meta l4proto udp goto divert-UID-NAME
                &|rule| rule.l4proto(Protocol::Udp).goto(&divert),
            ],
        );
    }

    /// Without a listener the packet goes on to the input chain, which refuses it.
    fn deliver_rules(&mut self, names: &Names, name: &ProxyName, proxy: &Proxy) {
        let port = proxy.port.get();
        self.add_rules(
            &names.deliver(name),
            [
                // meta l4proto tcp tproxy to :PORT accept
                &|rule| rule.l4proto(Protocol::Tcp).tproxy_accept(port),
                // meta l4proto udp tproxy to :PORT accept
                &|rule| rule.l4proto(Protocol::Udp).tproxy_accept(port),
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

    fn add_verdicts(&mut self, names: &Names, plan: &Plan) {
        let mut map = self.set(&names.cgroups, KeyType::ControlGroup, Content::Verdicts);
        for (cgroup, verdict) in &plan.add {
            let key = cgroup.id().to_bytes();
            match verdict {
                Verdict::Direct => map.push(&key, Element::Goto(&names.open)),
                Verdict::Drop => map.push(&key, Element::Goto(&names.drop)),
                Verdict::DropAll => map.push(&key, Element::Drop),
                Verdict::Proxy(proxy) => map.push(&key, Element::Goto(&names.tproxy(proxy))),
            }
        }
        self.write_elements(&map, MsgType::Add);
    }
}
