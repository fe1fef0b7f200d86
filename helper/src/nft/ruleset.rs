//! The table `inet cgtproxy`: how it is laid out, and what of it no user owns.
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
//!   chain output         { type route hook output priority mangle; … goto enforced, or open }
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
//! of the rules; only drops look at every packet. It is by that mark that a packet is delivered. A hijacked DNS
//! query carries the same mark without the divert bit, as its conntrack mark only: it is not diverted but
//! translated. So is what goes to a proxy that is no TPROXY server; its conntrack mark has the divert bit.

use std::ffi::CStr;

use nftnl::{ChainType, Hook, MsgType};

use super::ffi::{Content, Element, KeyType};
use super::rule::Protocol;
use super::transaction::Transaction;

/// The chain that says how this table is laid out. A table without it is made anew.
pub(super) const VERSION: &CStr = c"version-6";
pub(super) const USERS: &CStr = c"users";
pub(super) const OPENS: &CStr = c"opens";
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
pub(super) const PROXY_UIDS: &CStr = c"proxy-uids";
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
pub(super) const SYSTEM_UIDS: [(u32, u32); 2] = [(1, 999), (61184, 65519)];

impl Transaction<'_> {
    /// Everything that no user owns. What is there already, unless the table is `fresh`, stays, and its rules are
    /// written anew, but for those of the system's policy if there is one.
    pub(super) fn base(&mut self, proxy_uids: &[u32], fresh: bool, system: bool) {
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
        if system {
            self.lead_to_system();
        } else {
            self.no_system_rules();
        }
        if !fresh {
            // There may be proxies, whose agents come back later.
            self.tproxy_chains();
        }
    }

    fn outgoing_rules(&mut self) {
        let (mask, divert) = (self.marks.mask(), self.marks.divert());
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
                // Nearly every packet is nothing of ours and ends here.
                // meta mark & DIVERT == 0 return
                &|rule| rule.meta_mark_lacks(divert).leave(),
                // Whose it is says the connection's mark, which nobody but a rule can set: a program with CAP_NET_RAW
                // may give its packets any mark (SO_MARK), and another user's proxy would take them for that user's.
                // iif lo ct mark & MASK vmap @deliver
                &|rule| rule.iif_lo().ct_mark_vmap(mask, DELIVER),
                // What is diverted to nobody reaches nobody.
                // iif lo drop
                &|rule| rule.iif_lo().drop(),
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

    /// The first chain of every packet that leaves, where the system has a policy.
    pub(super) fn lead_to_system(&mut self) {
        self.flush_chain(OUTPUT);
        self.add_rules(
            OUTPUT,
            [
                // ct direction reply return
                &|rule| rule.ct_direction_reply().leave(),
                // goto enforced
                &|rule| rule.goto(ENFORCED),
            ],
        );
    }

    /// The chains of the system's policy when there is none. What they would lead to in several steps stands
    /// in the first chain of all, since every packet of the machine comes by.
    pub(super) fn no_system_rules(&mut self) {
        let divert = self.marks.divert();
        self.flush_chain(OUTPUT);
        self.add_rules(
            OUTPUT,
            [
                // ct direction reply return
                &|rule| rule.ct_direction_reply().leave(),
                // socket cgroupv2 level 3 vmap @users
                &|rule| rule.socket_cgroupv2_vmap(USER_LEVEL, USERS),
                // ct mark & DIVERT == 0 return
                &|rule| rule.ct_mark_lacks(divert).leave(),
                // goto open
                &|rule| rule.goto(OPEN),
            ],
        );
        self.flush_chain(ENFORCED);
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
}
