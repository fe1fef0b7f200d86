//! The table `inet cgtproxy`: its base chains, and each user's objects in it.
//!
//! ```text
//! table inet cgtproxy {
//!   chain version-6 { }                       # the format of this table
//!   map users   { type cgroupsv2 : verdict }  # user@1000.service : goto user-1000
//!   map opens   { type cgroupsv2 : verdict }  # user@1000.service : goto open-1000
//!   map marks   { type mark : verdict }       # a mark of a proxy of the system's : goto divert-0-mihomo
//!   map deliver { type mark : verdict }       # a proxy's mark : goto deliver-1000-mihomo
//!   map divert  { type mark : verdict }       # a proxy's mark : goto divert-1000-mihomo
//!   map guard   { type mark : verdict }       # a proxy's mark : goto guard-1000
//!   map resolve { type mark : verdict }       # a proxy's DNS mark : goto resolve-1000-mihomo
//!                                             # a proxy's mark : goto redirect-1000-mihomo
//!   map receive { type mark : verdict }       # both : goto receive-1000-mihomo
//!   map stamps { type uid : mark }            # a user : the name of that user's layout, no mark of a packet's
//!   set proxy-uids { type uid }               # root, and whom the administrator allows
//!   set interfaces { type ifname }            # from where forwarded traffic is diverted
//!   chain output         { type route hook output priority mangle; … goto enforced }
//!   chain output-nat     { type nat hook output priority dstnat; … }
//!   chain prerouting     { type filter hook prerouting priority mangle; … goto gateway }
//!   chain prerouting-nat { type nat hook prerouting priority dstnat; … }
//!   chain input          { type filter hook input priority mangle; … }
//!   chain forward        { type filter hook forward priority mangle; … }
//!   chain delivery       { type filter hook prerouting priority 2147483647; … }
//!   chain postrouting    { type filter hook postrouting priority mangle; … }
//!   chain enforced { … goto sessions }        # what the system's policy enforces
//!   chain sessions { … goto system }          # users' own verdicts
//!   chain system   { … goto open }            # what the system's policy says besides
//!   chain open     { … }                      # nobody's verdict: open connections go on
//!   chain gateway { … }   chain forwarded { … }   # what the system's policy says of forwarded packets
//!
//!   map cgroups-1000 { type cgroupsv2 : mark }  # a control group : a number, no mark of a packet's
//!   map choices-1000 { type mark : verdict }    # that number : goto tproxy-1000-mihomo
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
//! The system's policy is that of root: its objects have the number 0, but for the chains and maps above
//! that stand in for those with a user's number. They are there without a policy too, so that nothing else
//! depends on whether there is one.
//!
//! The mark of a proxy has the divert bit, by which the `ip rule` sends a packet back in over lo.
//! The connection keeps it as its conntrack mark, so that it goes on as it began whatever becomes
//! of the rules; only drops look at every packet. It is by that mark that a packet is delivered. A hijacked DNS query carries the same mark
//! without the divert bit, as its conntrack mark only: it is not diverted but translated. So is what goes
//! to a proxy that is no TPROXY server; its conntrack mark has the divert bit.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CStr;

use cgtproxy_proto::name::ProxyName;
use nftnl::{ChainType, Hook, MsgType};

use super::ffi::{Content, Element, KeyType};
use super::names::Names;
use super::plan::{Before, Hold, Layout, LeftBehind, Plan, Proxy, Stamp, Step};
use super::rule::{Family, Protocol};
use super::transaction::Transaction;
use crate::cgroup::ControlGroupId;
use crate::mark::Mark;
use crate::peer::Uid;

/// The chain that says how this table is laid out. A table without it is made anew.
pub(super) const VERSION: &CStr = c"version-6";
pub(super) const USERS: &CStr = c"users";
const OPENS: &CStr = c"opens";
pub(super) const MARKS: &CStr = c"marks";
pub(super) const INTERFACES: &CStr = c"interfaces";
/// The map of the chain of this name: every control group of the system's policy.
pub(super) const ENFORCED: &CStr = c"enforced";
pub(super) const SESSIONS: &CStr = c"sessions";
pub(super) const SYSTEM: &CStr = c"system";
pub(super) const OPEN: &CStr = c"open";
pub(super) const GATEWAY: &CStr = c"gateway";
pub(super) const FORWARDED: &CStr = c"forwarded";
pub(super) const DELIVER: &CStr = c"deliver";
pub(super) const DIVERT: &CStr = c"divert";
pub(super) const GUARD: &CStr = c"guard";
pub(super) const RESOLVE: &CStr = c"resolve";
pub(super) const RECEIVE: &CStr = c"receive";
pub(super) const STAMPS: &CStr = c"stamps";
const PROXY_UIDS: &CStr = c"proxy-uids";
const OUTPUT: &CStr = c"output";
const OUTPUT_NAT: &CStr = c"output-nat";
const PREROUTING: &CStr = c"prerouting";
const DELIVERY: &CStr = c"delivery";
const PREROUTING_NAT: &CStr = c"prerouting-nat";
const INPUT: &CStr = c"input";
const FORWARD: &CStr = c"forward";
const POSTROUTING: &CStr = c"postrouting";

/// `mangle` of the inet family (linux/netfilter_ipv4.h, NF_IP_PRI_MANGLE).
const PRIORITY_MANGLE: i32 = -150;

/// After everybody else's (NF_IP_PRI_LAST).
const PRIORITY_LAST: i32 = i32::MAX;

/// `dstnat` (NF_IP_PRI_NAT_DST).
const PRIORITY_DSTNAT: i32 = -100;

/// The level of user@UID.service: user.slice, user-UID.slice, user@UID.service.
const USER_LEVEL: u32 = 3;

/// The uids of system users: systemd's uids-gids document.
const SYSTEM_UIDS: [(u32, u32); 2] = [(1, 999), (61184, 65519)];

impl Transaction<'_> {
    /// Everything that no user owns. What is there already stays, its rules are written anew, but for those
    /// of the system's policy, unless the table is `fresh`.
    pub(super) fn base(&mut self, proxy_uids: &[u32], fresh: bool) {
        self.add_chain(VERSION);
        self.add_set(USERS, KeyType::ControlGroup, Content::Verdicts);
        self.add_set(OPENS, KeyType::ControlGroup, Content::Verdicts);
        for map in [MARKS, DELIVER, DIVERT, GUARD, RESOLVE, RECEIVE] {
            self.add_set(map, KeyType::Mark, Content::Verdicts);
        }
        self.add_set(STAMPS, KeyType::Uid, Content::Numbers);
        self.add_set(INTERFACES, KeyType::Interface, Content::Keys);
        self.add_set(PROXY_UIDS, KeyType::Uid, Content::Keys);
        self.flush_set(PROXY_UIDS);
        let mut uids = self.set(PROXY_UIDS, KeyType::Uid, Content::Keys);
        for uid in proxy_uids {
            uids.push(&uid.to_ne_bytes(), Element::Key);
        }
        self.write_elements(&uids, MsgType::Add);
        for chain in [ENFORCED, SESSIONS, SYSTEM, OPEN, GATEWAY, FORWARDED] {
            self.add_chain(chain);
        }
        let mangle = PRIORITY_MANGLE;
        self.add_base_chain(OUTPUT, ChainType::Route, Hook::Out, mangle);
        self.add_base_chain(FORWARD, ChainType::Filter, Hook::Forward, mangle);
        self.outgoing_rules();
        self.forward_rules();
        if fresh {
            self.no_system_rules();
        } else {
            // There may be proxies, whose agents come back later.
            self.tproxy_chains();
        }
    }

    fn outgoing_rules(&mut self) {
        let (mask, divert) = (self.marks.mask(), self.marks.divert());
        self.add_rules(
            OUTPUT,
            [
                // ct direction reply return
                &|rule| rule.ct_direction_reply().leave(),
                // goto enforced
                &|rule| rule.goto(ENFORCED),
            ],
        );
        self.flush_chain(SESSIONS);
        self.add_rules(
            SESSIONS,
            [
                // socket cgroupv2 level 3 vmap @users
                &|rule| rule.socket_cgroupv2_vmap(USER_LEVEL, USERS),
                // goto system
                &|rule| rule.goto(SYSTEM),
            ],
        );
        self.flush_chain(OPEN);
        self.add_rules(
            OPEN,
            [
                // ct mark & DIVERT == 0 return
                &|rule| rule.ct_mark_lacks(divert).leave(),
                // ct mark & MASK vmap @marks
                &|rule| rule.ct_mark_vmap(mask, MARKS),
                // A user's own proxy has it, whatever the system says of new connections.
                // socket cgroupv2 level 3 vmap @opens
                &|rule| rule.socket_cgroupv2_vmap(USER_LEVEL, OPENS),
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
    }

    /// The chains that translate. They are there from the first proxy on that needs them, since every packet
    /// of the machine pays for them, and stay then, since connections need them for as long as they are open.
    pub(super) fn nat_chains(&mut self) {
        let mask = self.marks.mask();
        let hooks = [(OUTPUT_NAT, Hook::Out), (PREROUTING_NAT, Hook::PreRouting)];
        for (chain, hook) in hooks {
            self.add_base_chain(chain, ChainType::Nat, hook, PRIORITY_DSTNAT);
            // ct mark & MASK vmap @resolve
            self.add_rules(chain, [&|rule| rule.ct_mark_vmap(mask, RESOLVE)]);
        }
        self.input_chain();
    }

    /// A diverted packet goes to lo. While the `ip rule` or its route is missing, because another program
    /// took it away and the helper has not put it back yet, the packet would go where it is addressed to. The
    /// chains are there from the first proxy on that packets are diverted to, and stay, as those that translate.
    ///
    /// What has come in over lo gets its socket last of all: before it has one, everybody's reverse path
    /// filter takes it for what it is, a packet of this machine's own. With one, `fib saddr . iif` looks for
    /// a route back, which is none over lo for IPv6 (nft_fib_can_skip, net/netfilter/nft_fib.h), and firewalld
    /// drops what has none.
    pub(super) fn tproxy_chains(&mut self) {
        let (mask, divert) = (self.marks.mask(), self.marks.divert());
        self.add_base_chain(DELIVERY, ChainType::Filter, Hook::PreRouting, PRIORITY_LAST);
        self.add_rules(
            DELIVERY,
            [
                // Nearly every packet has no mark and ends this rule here. Whose it is says the connection's
                // mark, which nobody but a rule can set: a program with CAP_NET_RAW may give its packets any mark
                // (SO_MARK), and another user's proxy would take them for that user's.
                // meta mark & DIVERT != 0 iif lo ct mark & MASK vmap @deliver
                &|rule| {
                    rule.meta_mark_has(divert)
                        .iif_lo()
                        .ct_mark_vmap(mask, DELIVER)
                },
                // What is diverted to nobody reaches nobody.
                // meta mark & DIVERT != 0 iif lo drop
                &|rule| rule.meta_mark_has(divert).iif_lo().drop(),
            ],
        );
        self.add_base_chain(
            POSTROUTING,
            ChainType::Filter,
            Hook::PostRouting,
            PRIORITY_MANGLE,
        );
        self.add_rules(
            POSTROUTING,
            [
                // meta mark & DIVERT != 0 oif != lo drop
                &|rule| rule.meta_mark_has(divert).oif_not_lo().drop(),
            ],
        );
    }

    /// The chain for what comes from networks behind the machine: there from the system's first policy on.
    pub(super) fn gateway_chain(&mut self) {
        self.add_base_chain(
            PREROUTING,
            ChainType::Filter,
            Hook::PreRouting,
            PRIORITY_MANGLE,
        );
        // goto gateway
        self.add_rules(PREROUTING, [&|rule| rule.goto(GATEWAY)]);
        self.input_chain();
    }

    /// The chain for what was translated, and for what a gateway has diverted. Like those that translate, it is
    /// there from the first need on: what is diverted to a TPROXY server by the machine itself is looked at
    /// where it is delivered.
    fn input_chain(&mut self) {
        let (mask, divert) = (self.marks.mask(), self.marks.divert());
        self.add_base_chain(INPUT, ChainType::Filter, Hook::In, PRIORITY_MANGLE);
        self.add_rules(
            INPUT,
            [
                // Nearly every packet is nothing of ours and ends here.
                // meta mark & DIVERT == 0 ct mark & MASK == 0 return
                &|rule| rule.meta_mark_lacks(divert).ct_mark_lacks(mask).leave(),
                // iif lo meta mark & MASK vmap @guard
                &|rule| rule.iif_lo().meta_mark_vmap(mask, GUARD),
                // What is diverted to nobody reaches nobody.
                // iif lo meta mark & DIVERT != 0 drop
                &|rule| rule.iif_lo().meta_mark_has(divert).drop(),
                // meta mark & DIVERT != 0 iifname @interfaces meta mark & MASK vmap @guard
                &|rule| {
                    rule.meta_mark_has(divert)
                        .iifname_in(INTERFACES)
                        .meta_mark_vmap(mask, GUARD)
                },
                // meta mark & DIVERT != 0 iifname @interfaces drop
                &|rule| rule.meta_mark_has(divert).iifname_in(INTERFACES).drop(),
                // An open connection of an interface that is not listed any more.
                // meta mark & DIVERT != 0 ct mark & DIVERT != 0 iif != lo meta mark & MASK vmap @guard
                &|rule| {
                    rule.meta_mark_has(divert)
                        .ct_mark_has(divert)
                        .iif_not_lo()
                        .meta_mark_vmap(mask, GUARD)
                },
                // meta mark & DIVERT != 0 ct mark & DIVERT != 0 iif != lo drop
                &|rule| {
                    rule.meta_mark_has(divert)
                        .ct_mark_has(divert)
                        .iif_not_lo()
                        .drop()
                },
                // A forwarded connection whose proxy is not there any more, and whose socket the kernel
                // remembers: it has the packet before it is routed (tcp_v4_early_demux).
                // meta mark & DIVERT == 0 ct mark & DIVERT != 0 iif != lo ct direction original
                //   meta l4proto tcp reject with tcp reset
                &|rule| {
                    rule.meta_mark_lacks(divert)
                        .ct_mark_has(divert)
                        .iif_not_lo()
                        .ct_direction_original()
                        .l4proto(Protocol::Tcp)
                        .reject_with_tcp_reset()
                },
                // meta mark & DIVERT == 0 ct mark & DIVERT != 0 iif != lo ct direction original reject
                &|rule| {
                    rule.meta_mark_lacks(divert)
                        .ct_mark_has(divert)
                        .iif_not_lo()
                        .ct_direction_original()
                        .reject()
                },
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

    fn forward_rules(&mut self) {
        let divert = self.marks.divert();
        self.add_rules(
            FORWARD,
            [
                // ct mark & DIVERT == 0 return
                &|rule| rule.ct_mark_lacks(divert).leave(),
                // The proxy of a forwarded connection is not there any more.
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

    /// The chains of the system's policy when there is none. What they would lead to in several steps stands
    /// in the first of them, since every packet of the machine comes by.
    fn no_system_rules(&mut self) {
        let divert = self.marks.divert();
        self.flush_chain(ENFORCED);
        self.add_rules(
            ENFORCED,
            [
                // socket cgroupv2 level 3 vmap @users
                &|rule| rule.socket_cgroupv2_vmap(USER_LEVEL, USERS),
                // ct mark & DIVERT == 0 return
                &|rule| rule.ct_mark_lacks(divert).leave(),
                // goto open
                &|rule| rule.goto(OPEN),
            ],
        );
        self.flush_chain(SYSTEM);
        self.add_rules(
            SYSTEM,
            [
                // ct mark & DIVERT == 0 return
                &|rule| rule.ct_mark_lacks(divert).leave(),
                // goto open
                &|rule| rule.goto(OPEN),
            ],
        );
        self.no_gateway();
    }

    /// One user's change.
    pub(super) fn plan(&mut self, plan: &Plan) {
        let names = Names::of(plan.uid);
        match (&plan.before, &plan.after) {
            (Before::Nothing, None) => {}
            (Before::Nothing, Some(after)) => self.create_user(&names, after, plan),
            (Before::Layout(_), Some(_)) => {
                for step in Step::ALL.into_iter().filter(|step| step.has_work(plan)) {
                    self.step(plan, step);
                }
            }
            (Before::Layout(before), None) => {
                let proxies = before
                    .proxies
                    .iter()
                    .map(|(name, proxy)| (name, proxy.mark));
                let subtree = Some(before.subtree.id()).filter(|_| !names.is_system());
                self.delete_user(&names, subtree, proxies, &before.holds);
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
        self.create_user(names, after, plan);
        for proxy in left.proxies.keys() {
            if !after.proxies.contains_key(proxy) {
                self.delete_proxy_chains(names, proxy);
            }
        }
        for hold in left.holds.difference(&after.holds) {
            self.delete_chain(&names.hold(hold));
        }
    }

    fn create_user(&mut self, names: &Names, layout: &Layout, plan: &Plan) {
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
        self.add_verdicts(names, layout, &plan.additions());
        if names.is_system() {
            self.gateway(names, layout);
        } else {
            self.lead_to_user(names, layout.subtree.id());
        }
    }

    /// The elements that lead from a user's control group to that user's chains.
    fn lead_to_user(&mut self, names: &Names, subtree: ControlGroupId) {
        for (map, chain) in [(USERS, &names.user), (OPENS, &names.open)] {
            self.map_to_chain(map, KeyType::ControlGroup, &subtree.to_bytes(), chain);
        }
    }

    fn lead_nowhere(&mut self, subtree: ControlGroupId) {
        for map in [USERS, OPENS] {
            self.delete_element(map, KeyType::ControlGroup, &subtree.to_bytes());
        }
    }

    /// One step of a change of what a user has.
    ///
    /// A packet that is on its way goes by the rules that were in force when it entered the base chain, and
    /// finds in maps what is in force at each look-up (nft_do_chain, net/netfilter/nf_tables_core.c). So no step
    /// may take away what a rule looks for before there is what stands in its place, nor lead to a chain that
    /// the rules of before the step know as empty: that chain would let the packet go.
    pub(super) fn step(&mut self, plan: &Plan, step: Step) {
        let (Before::Layout(before), Some(after)) = (&plan.before, &plan.after) else {
            return;
        };
        let names = Names::of(plan.uid);
        match step {
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
                if step.has_work(plan) {
                    let levels = before.levels.union(&after.levels).copied().collect();
                    let enforced = before.enforced || after.enforced;
                    self.level_rules_between(&names, before, &levels, enforced);
                    self.add_verdicts(&names, after, &plan.additions());
                }
            }
            Step::Changes => {
                let changes = plan.changes();
                self.delete_verdicts(&names, changes.iter().map(|(cgroup, _)| cgroup.id()));
                self.add_verdicts(&names, after, &changes);
                self.change_layout(&names, before, after);
            }
            Step::Deletions => {
                self.delete_verdicts(&names, plan.deletions().into_iter());
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
    pub(super) fn take_back(&mut self, plan: &Plan, done: &[Step]) {
        let (Before::Layout(before), Some(after)) = (&plan.before, &plan.after) else {
            return;
        };
        let names = Names::of(plan.uid);
        if done.contains(&Step::Additions) {
            let added = plan.additions();
            self.delete_verdicts(&names, added.iter().map(|(cgroup, _)| cgroup.id()));
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

    fn drop_proxy(&mut self, names: &Names, name: &ProxyName, proxy: &Proxy) {
        self.delete_proxy_elements(names, proxy.mark);
        self.delete_proxy_choice(names, proxy);
        self.flush_proxy(names, name);
        self.delete_proxy_chains(names, name);
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
    fn level_rules_between(
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

    fn level_rules(&mut self, names: &Names, levels: &BTreeSet<u32>, enforced: bool) {
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
}
