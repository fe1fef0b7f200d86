//! The table `inet cgtproxy`: how it is laid out, and what of it no user owns.
//!
//! ```text
//! table inet cgtproxy {
//!   chain version-12-ff000000 { }              # the format of this table, and the mask of marks
//!   map cgroups { type cgroupsv2 : mark }     # a control group : a number, no mark of a packet's
//!   map choices { type mark : verdict }       # that number : goto proxy-1000-mihomo
//!   map enforced { type cgroupsv2 : mark }    # a control group of the system's policy : what of that is enforced
//!   map choices-enforced { type mark : verdict }  # that number : goto proxy-0-mihomo; where it is nothing, goto sessions
//!   map marks   { type mark : verdict }       # a proxy's mark : goto proxy-1000-mihomo
//!                                             # a proxy's DNS mark : goto dns-1000-mihomo
//!   map drops   { type cgroupsv2 : verdict }  # user@1000.service : goto drop-1
//!   map deliver { type mark : verdict }       # a proxy's mark : goto deliver
//!   map deliver-answers { type mark : verdict }   # a proxy's mark : goto deliver-answers
//!   map ports   { type mark : inet_service }  # a proxy's mark : where it listens
//!   map guard   { type mark : verdict }       # a proxy's mark : goto guard
//!   set owners  { type mark . uid }           # a proxy's mark, and whose sockets may receive what has it
//!   map divert  { type mark : verdict }       # a mark of a proxy of the system's : goto divert-0-mihomo
//!   map resolve { type mark : verdict }       # a proxy's DNS mark : goto resolve-1000-mihomo
//!                                             # a proxy's mark : goto redirect-1000-mihomo
//!   map receive { type mark : verdict }       # both : goto receive-1000-mihomo, or return
//!   map users   { type uid : cgroupsv2 }      # whoever has a policy : user@1000.service
//!   map stamps  { type uid : mark }           # a user : the name of that user's layout, no mark of a packet's
//!   set proxy-uids { type uid }               # root, and whom the administrator allows
//!   set interfaces { type ifname }            # from where forwarded traffic is diverted
//!   chain output         { type route hook output priority mangle; … goto enforced, or … }
//!   chain output-nat     { type nat hook output priority -101; … }
//!   chain prerouting     { type filter hook prerouting priority mangle; … goto gateway }
//!   chain prerouting-nat { type nat hook prerouting priority -101; … }
//!   chain input          { type filter hook input priority mangle; … }
//!   chain forward        { type filter hook forward priority mangle; … }
//!   chain delivery       { type filter hook prerouting priority 2147483647; … }
//!   chain postrouting    { type filter hook postrouting priority mangle; … }
//!   chain loopback       { type filter hook postrouting priority mangle; … }
//!   chain enforced { … goto sessions }        # what the system's policy enforces
//!   chain sessions { … goto system }          # users' own verdicts
//!   chain system   { … }                      # what the system's policy says besides
//!   chain enforced-deep { … }  chain sessions-deep { … }   # the same for sockets deeper than level 8
//!   chain system-deep { … }
//!   chain open     { … }                      # connections to proxies go on as they began
//!   chain kernel   { … }                      # but for what no socket of anybody's sends
//!   chain answers  { … goto enforced, or … }  # to somebody for whom a proxy has spoken first
//!   chain drop     { … }   chain refuse  { … }
//!   chain deliver  { … }   chain guard   { … }
//!   chain deliver-answers { … }   chain guard-answers { … }
//!   chain drop-system { … }   chain deliver-system { … }   chain guard-system { … }
//!   chain deliver-answers-system { … }   chain guard-answers-system { … }
//!   chain gateway  { … }   chain forwarded { … }   # what the system's policy says of forwarded packets
//!
//!   set bypass4-1 { type ipv4_addr; flags interval }       # these three for whoever bypasses the same
//!   set bypass6-1 { type ipv6_addr; flags interval }
//!   chain drop-1 { … }
//!   chain proxy-1000-mihomo { … }
//!   chain dns-1000-mihomo { … }      chain resolve-1000-mihomo { … }    # with dns-hijack
//!   chain redirect-1000-mihomo { … }          # if it is no TPROXY server
//!   chain receive-1000-mihomo { … }           # in both cases
//!   chain hold-1000-5-mihomo { … }            # control groups at level 4, below which all is held
//!   chain hold-5-direct { … }                 # the same where all users can have one
//!   chain hold-0-5-_users { … }               # what the system's policy holds before users' own have a say
//! }
//! ```
//!
//! Users share the rules that every packet goes through and the maps that these look into. The kernel goes over
//! every chain with every transaction, so that each chain of each user makes every other user's changes slower;
//! and a packet that had to find its user first would look up one thing more. What is one user's is that all the
//! same: an element's key is a control group below that user's own or a mark of that user's proxy, and chains
//! have the uid in their names.
//!
//! The system's policy is that of root: its objects have the number 0, but for the chains above
//! that stand in for those with a user's number. They are there without a policy too, so that nothing else
//! depends on whether there is one.
//!
//! The mark of a proxy has the divert bit, by which the `ip rule` sends a packet back in over lo.
//! The connection keeps it as its conntrack mark, so that it goes on as it began whatever becomes
//! of the rules; only drops look at every packet, and there are such rules only while anything is dropped or held.
//! It is by that mark that a packet is delivered. A hijacked DNS
//! query carries the same mark without the divert bit, as its conntrack mark only: it is not diverted but
//! translated. So is what goes to a proxy that is no TPROXY server; its conntrack mark has the divert bit.
//!
//! Connections that are open to a proxy leave the first chain at once, for `open`, and those of services have left it
//! before. What is left is not diverted, or not yet: what the chains that decide return leaves as it is.

use std::collections::BTreeSet;
use std::ffi::{CStr, CString};

use nftnl::{ChainType, Hook, MsgType};

use super::ffi::{Content, Element, KeyType};
use super::names::{self, Names};
use super::rule::{Protocol, RuleBuilder};
use super::shared::{LookedAt, Shared};
use super::transaction::Transaction;
use crate::mark::MarkRange;
use crate::peer::Uid;
use crate::route::Family;

/// How this table is laid out.
const VERSION: u32 = 12;
pub(super) const CGROUPS: &CStr = c"cgroups";
pub(super) const CGROUPS_SYSTEM: &CStr = c"cgroups-0";
pub(super) const CHOICES: &CStr = c"choices";
pub(super) const CHOICES_SYSTEM: &CStr = c"choices-0";
pub(super) const CHOICES_ENFORCED: &CStr = c"choices-enforced";
pub(super) const MARKS: &CStr = c"marks";
pub(super) const DROPS: &CStr = c"drops";
pub(super) const PORTS: &CStr = c"ports";
pub(super) const OWNERS: &CStr = c"owners";
pub(super) const USERS: &CStr = c"users";
pub(super) const INTERFACES: &CStr = c"interfaces";
/// The map of the chain of this name: every control group of the system's policy.
pub(super) const ENFORCED: &CStr = c"enforced";
pub(super) const SESSIONS: &CStr = c"sessions";
pub(super) const SYSTEM: &CStr = c"system";
/// The same for sockets that are deeper than [`SHALLOW`].
pub(super) const ENFORCED_DEEP: &CStr = c"enforced-deep";
pub(super) const SESSIONS_DEEP: &CStr = c"sessions-deep";
pub(super) const SYSTEM_DEEP: &CStr = c"system-deep";
pub(super) const OPEN: &CStr = c"open";
pub(super) const KERNEL: &CStr = c"kernel";
pub(super) const DROP: &CStr = c"drop";
pub(super) const DROP_SYSTEM: &CStr = c"drop-system";
pub(super) const REFUSE: &CStr = c"refuse";
pub(super) const GATEWAY: &CStr = c"gateway";
pub(super) const FORWARDED: &CStr = c"forwarded";
/// A map, and the chain that it leads to, as those of the next one are.
pub(super) const DELIVER: &CStr = c"deliver";
pub(super) const GUARD: &CStr = c"guard";
pub(super) const DELIVER_SYSTEM: &CStr = c"deliver-system";
pub(super) const GUARD_SYSTEM: &CStr = c"guard-system";
pub(super) const ANSWERS: &CStr = c"answers";
pub(super) const DELIVER_ANSWERS: &CStr = c"deliver-answers";
pub(super) const DELIVER_ANSWERS_SYSTEM: &CStr = c"deliver-answers-system";
pub(super) const GUARD_ANSWERS: &CStr = c"guard-answers";
pub(super) const GUARD_ANSWERS_SYSTEM: &CStr = c"guard-answers-system";
pub(super) const DIVERT: &CStr = c"divert";
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
const LOOPBACK: &CStr = c"loopback";

/// `mangle` of the inet family (linux/netfilter_ipv4.h, NF_IP_PRI_MANGLE).
const PRIORITY_MANGLE: i32 = -150;

/// After everybody else's (NF_IP_PRI_LAST).
const PRIORITY_LAST: i32 = i32::MAX;

/// Before `dstnat` (NF_IP_PRI_NAT_DST), where everybody's are: among those of one priority, whoever came last is first
/// (nf_hook_entries_grow, net/netfilter/core.c), and the first that translates decides.
const PRIORITY_DSTNAT: i32 = -101;

/// The level of user@UID.service: user.slice, user-UID.slice, user@UID.service.
const USER_LEVEL: u32 = 3;

/// Sockets that are no deeper than this pay for no level below it: an application is at level 5, what a terminal or a
/// container starts at 6 or 7. However deep one user's control groups are, the packets of others need not know.
const SHALLOW: u32 = 8;

/// The uids of system users: systemd's uids-gids document.
pub(super) const SYSTEM_UIDS: [(u32, u32); 2] = [(1, 999), (61184, 65519)];

/// The chain that says how a table is laid out, and by which bits of marks its rules go. A table without it is made
/// anew: under another mask, the number of one user's proxy may be that of another's.
pub(super) fn version(marks: MarkRange) -> CString {
    names::name(format!("version-{VERSION}-{:08x}", marks.mask()))
}

impl Transaction<'_> {
    /// Everything that no user owns. What is there already, unless the table is `fresh`, stays, and its rules are
    /// written anew, but for those of the system's policy if there is one.
    pub(super) fn base(&mut self, proxy_uids: &[u32], shared: &Shared, fresh: bool) {
        self.add_chain(&version(self.marks));
        let group = KeyType::ControlGroup;
        self.add_set(CGROUPS, group, Content::Values(KeyType::Mark));
        self.add_set(DROPS, group, Content::Verdicts);
        for map in [
            CHOICES,
            MARKS,
            DELIVER,
            DELIVER_ANSWERS,
            DIVERT,
            GUARD,
            RESOLVE,
            RECEIVE,
        ] {
            self.add_set(map, KeyType::Mark, Content::Verdicts);
        }
        self.add_set(PORTS, KeyType::Mark, Content::Values(KeyType::Port));
        self.add_set(OWNERS, KeyType::MarkAndUid, Content::Keys);
        self.add_set(USERS, KeyType::Uid, Content::Values(group));
        self.add_set(STAMPS, KeyType::Uid, Content::Values(KeyType::Mark));
        self.add_set(INTERFACES, KeyType::Interface, Content::Keys);
        self.add_set(PROXY_UIDS, KeyType::Uid, Content::Keys);
        self.flush_set(PROXY_UIDS);
        let mut uids = self.set(PROXY_UIDS, KeyType::Uid, Content::Keys);
        for uid in proxy_uids {
            uids.push(&uid.to_ne_bytes(), Element::Key);
        }
        self.write_elements(&uids, MsgType::Add);
        for chain in [
            ENFORCED,
            ENFORCED_DEEP,
            SESSIONS,
            SESSIONS_DEEP,
            SYSTEM,
            SYSTEM_DEEP,
            OPEN,
            KERNEL,
            DROP,
            DROP_SYSTEM,
            REFUSE,
            DELIVER,
            DELIVER_SYSTEM,
            GUARD,
            GUARD_SYSTEM,
            ANSWERS,
            DELIVER_ANSWERS,
            DELIVER_ANSWERS_SYSTEM,
            GUARD_ANSWERS,
            GUARD_ANSWERS_SYSTEM,
            GATEWAY,
            FORWARDED,
        ] {
            self.add_chain(chain);
        }
        self.common_choices(CHOICES, DROP, Element::Goto(SYSTEM));
        let mangle = PRIORITY_MANGLE;
        self.add_base_chain(OUTPUT, ChainType::Route, Hook::Out, mangle);
        self.add_base_chain(FORWARD, ChainType::Filter, Hook::Forward, mangle);
        self.first_rules(&shared.looked_at(), shared.has_system());
        self.drop_and_refuse_rules();
        self.kernel_rules();
        self.guard_rules();
        self.forward_rules();
        if !fresh {
            // There may be proxies, whose agents come back later.
            self.tproxy_chains();
        }
    }

    fn drop_and_refuse_rules(&mut self) {
        self.flush_chain(DROP);
        self.add_rules(
            DROP,
            [
                // socket cgroupv2 level 3 vmap @drops
                &|rule| rule.socket_cgroupv2_vmap(USER_LEVEL, DROPS),
                // drop
                &|rule| rule.drop(),
            ],
        );
        self.flush_chain(REFUSE);
        self.add_rules(
            REFUSE,
            [
                // meta l4proto tcp reject with tcp reset
                &|rule| rule.l4proto(Protocol::Tcp).reject_with_tcp_reset(),
                // reject
                &|rule| rule.reject(),
            ],
        );
    }

    /// The packets of a tunnel have the socket of who sends something through it (skb_scrub_packet, net/core/skbuff.c), so
    /// that an application's proxy may take the tunnel; those that the kernel sends through it by itself have nobody's. With
    /// the first of these the tunnel is the kernel's again, unless it was translated, which can't be taken back. In UDP, no
    /// socket says anything once it is closed.
    fn kernel_rules(&mut self) {
        let mask = self.marks.mask();
        self.flush_chain(KERNEL);
        self.add_rules(
            KERNEL,
            [
                // socket cgroupv2 level 1 != 0 return
                &|rule| rule.socket_as_deep_as(1).leave(),
                // meta skuid >= 0 return
                &|rule| rule.skuid_known().leave(),
                // ct status & (confirmed | dnat) == confirmed ct mark set ct mark & ~MASK meta mark set meta mark & ~MASK
                //   accept
                &|rule| {
                    rule.ct_not_redirected()
                        .ct_mark_set(mask, 0)
                        .meta_mark_set(mask, 0)
                        .accept()
                },
            ],
        );
    }

    /// Once the packet has its socket, the delivery guard looks whose it is. Without a listener `tproxy` ends its
    /// rule, and the packet is refused. Not every kernel has `tproxy`, so nothing is there before a proxy needs it.
    pub(super) fn delivery_rules(&mut self, names: &Names) {
        let mask = self.marks.mask();
        let (chain, guard) = (names.deliver(), names.guard());
        let (answers, guard_answers) = (names.deliver_answers(), names.guard_answers());
        for chain in [chain, answers] {
            self.flush_chain(chain);
        }
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            // meta l4proto PROTOCOL tproxy to :ct mark & MASK map @ports goto GUARD
            self.add_rules(
                chain,
                [&|rule| {
                    rule.l4proto(protocol)
                        .tproxy_by_ct_mark(mask, PORTS)
                        .goto(guard)
                }],
            );
            // meta l4proto PROTOCOL tproxy to :meta priority map @ports goto GUARD
            self.add_rules(
                answers,
                [&|rule| {
                    rule.l4proto(protocol)
                        .tproxy_by_priority(PORTS)
                        .goto(guard_answers)
                }],
            );
        }
        for chain in [chain, answers] {
            // goto refuse
            self.add_rules(chain, [&|rule| rule.goto(REFUSE)]);
        }
    }

    /// A diverted packet reaches only a socket of the same user, or of an allowed uid.
    ///
    /// TCP is looked at when a connection opens: after that its packets belong to a socket that
    /// was let in, and while that waits to be accepted it has no owner that `skuid` could see
    /// (nft_meta_get_eval_skugid wants a file). UDP is looked at packet by packet.
    ///
    /// Services have users of their own: the system's policy takes proxies of every system user.
    fn guard_rules(&mut self) {
        let mask = self.marks.mask();
        let guards = [GUARD, GUARD_SYSTEM, GUARD_ANSWERS, GUARD_ANSWERS_SYSTEM];
        for chain in guards {
            self.flush_chain(chain);
            self.add_rules(
                chain,
                [
                    // meta l4proto tcp ct state != new return
                    &|rule| rule.l4proto(Protocol::Tcp).ct_state_not_new().leave(),
                    // meta skuid @proxy-uids return
                    &|rule| rule.skuid_in(PROXY_UIDS).leave(),
                ],
            );
        }
        // ct mark & MASK . meta skuid @owners return
        self.add_rules(
            GUARD,
            [&|rule| rule.ct_mark_and_skuid_in(mask, OWNERS).leave()],
        );
        // meta priority . meta skuid @owners return
        self.add_rules(
            GUARD_ANSWERS,
            [&|rule| rule.priority_and_skuid_in(OWNERS).leave()],
        );
        for chain in [GUARD_SYSTEM, GUARD_ANSWERS_SYSTEM] {
            for (first, last) in SYSTEM_UIDS {
                // meta skuid FIRST-LAST return
                self.add_rules(chain, [&|rule| rule.skuid_from_to(first, last).leave()]);
            }
        }
        for chain in guards {
            // goto refuse
            self.add_rules(chain, [&|rule| rule.goto(REFUSE)]);
        }
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
        self.loopback_chain();
    }

    /// An application may have bound its socket to an interface (SO_BINDTODEVICE). What is translated to a loopback address
    /// then leaves by that one (ip_route_me_harder, net/ipv4/netfilter.c).
    fn loopback_chain(&mut self) {
        let mask = self.marks.mask();
        let hook = Hook::PostRouting;
        self.add_base_chain(LOOPBACK, ChainType::Filter, hook, PRIORITY_MANGLE);
        for family in [Family::Ipv4, Family::Ipv6] {
            // oif != lo ip daddr 127.0.0.0/8 ct mark & MASK != 0 drop, oif != lo ip6 daddr ::1 ct mark & MASK != 0 drop
            self.add_rules(
                LOOPBACK,
                [&|rule| {
                    rule.oif_not_lo()
                        .daddr_loopback(family)
                        .ct_mark_has(mask)
                        .drop()
                }],
            );
        }
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
        let begun = self.marks.begun_by_proxy();
        self.add_base_chain(DELIVERY, ChainType::Filter, Hook::PreRouting, PRIORITY_LAST);
        self.add_rules(
            DELIVERY,
            [
                // Nearly every packet is nothing of ours and ends here.
                // meta mark & DIVERT == 0 return
                &|rule| rule.meta_mark_lacks(divert).leave(),
                // What a proxy sends to the application is not diverted. Other programs' rules may have given it the
                // mark of its connection all the same, as wg-quick's do.
                // ct direction reply ct mark & DIVERT != 0 ct mark & MASK != DIVERT return
                &|rule| {
                    rule.ct_direction_reply()
                        .ct_mark_has(divert)
                        .ct_mark_is_not(mask, begun)
                        .leave()
                },
                // The connection's mark says which proxy gets it, since only rules can set that. A program with
                // CAP_NET_RAW may give its packets any mark (SO_MARK), and another user's proxy would take them for that
                // user's.
                // iif lo ct mark & MASK vmap @deliver
                &|rule| rule.iif_lo().ct_mark_vmap(mask, DELIVER),
                // What a proxy sends to the application, as above, on a connection that the proxy began.
                // iif lo ct mark & MASK == DIVERT ct direction original return
                &|rule| {
                    rule.iif_lo()
                        .ct_mark_is(mask, begun)
                        .ct_direction_original()
                        .leave()
                },
                // A reply on such a connection: the proxy's chain has written into the priority which proxy gets it.
                // iif lo ct mark & MASK == DIVERT meta priority vmap @deliver-answers
                &|rule| {
                    rule.iif_lo()
                        .ct_mark_is(mask, begun)
                        .priority_vmap(DELIVER_ANSWERS)
                },
                // What was translated, as above.
                // iif lo ct mark & DIVERT != 0 ct status dnat return
                &|rule| rule.iif_lo().ct_mark_has(divert).ct_redirected().leave(),
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
        let begun = self.marks.begun_by_proxy();
        self.add_base_chain(INPUT, ChainType::Filter, Hook::In, PRIORITY_MANGLE);
        self.add_rules(
            INPUT,
            [
                // Nearly every packet is nothing of ours and ends here.
                // meta mark & DIVERT == 0 ct mark & MASK == 0 return
                &|rule| rule.meta_mark_lacks(divert).ct_mark_lacks(mask).leave(),
                // A connection that a proxy began; replies on it were checked when they were delivered.
                // ct mark & MASK == DIVERT return
                &|rule| rule.ct_mark_is(mask, begun).leave(),
                // A translated packet, which only the mark of its connection tells from others.
                // iif lo ct direction original ct mark & MASK vmap @receive
                &|rule| {
                    rule.iif_lo()
                        .ct_direction_original()
                        .ct_mark_vmap(mask, RECEIVE)
                },
                // iif lo ct direction reply ct mark & DIVERT != 0 return
                &|rule| {
                    rule.iif_lo()
                        .ct_direction_reply()
                        .ct_mark_has(divert)
                        .leave()
                },
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
                // iif lo ct direction original ct mark & DIVERT != 0 drop
                &|rule| {
                    rule.iif_lo()
                        .ct_direction_original()
                        .ct_mark_has(divert)
                        .drop()
                },
                // A conversation with a DNS server that no policy names any more, whose port may be anybody's by now. In
                // TCP, it is with the server that has accepted it.
                // meta l4proto tcp ct state != new return
                &|rule| rule.l4proto(Protocol::Tcp).ct_state_not_new().leave(),
                // iif != lo ct direction original ct status dnat ct mark & DIVERT == 0 ct mark & MASK vmap @receive
                &|rule| {
                    rule.iif_not_lo()
                        .ct_direction_original()
                        .ct_redirected()
                        .ct_mark_lacks(divert)
                        .ct_mark_vmap(mask, RECEIVE)
                },
                // ct direction original ct status dnat ct mark & MASK != 0 goto refuse
                &|rule| {
                    rule.ct_direction_original()
                        .ct_redirected()
                        .ct_mark_has(mask)
                        .goto(REFUSE)
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

    /// The chains that packets come by before anything is known of them: users' own verdicts at these levels, and
    /// those of the system's policy around them, if there is one.
    ///
    /// Where nothing is dropped or held, a connection that is open goes on as it began: no verdict changes that.
    pub(super) fn first_rules(&mut self, looked_at: &LookedAt, system: bool) {
        let (mask, divert) = (self.marks.mask(), self.marks.divert());
        let begun = self.marks.begun_by_proxy();
        let levels = &looked_at.levels;
        for chain in [OUTPUT, OPEN, ANSWERS, SESSIONS, SESSIONS_DEEP] {
            self.flush_chain(chain);
        }
        if !looked_at.open {
            self.add_rules(
                OUTPUT,
                [
                    // ct mark & MASK == 0 ct status confirmed return
                    &|rule| rule.ct_mark_lacks(mask).ct_confirmed().leave(),
                ],
            );
        }
        self.add_rules(
            OUTPUT,
            [
                // ct direction reply ct mark & MASK != DIVERT return
                &|rule| {
                    rule.ct_direction_reply()
                        .ct_mark_is_not(mask, begun)
                        .leave()
                },
                // ct mark & DIVERT != 0 goto open
                &|rule| rule.ct_mark_has(divert).goto(OPEN),
            ],
        );
        self.begun_rules(|rule| rule.oif_lo());
        if system {
            self.begun_rules(|rule| rule.oifname_in(INTERFACES));
        }
        self.add_rules(
            OUTPUT,
            [
                // A conversation with a DNS server, which has no divert bit.
                // ct status & (confirmed | dnat) == confirmed | dnat ct mark & MASK != 0 goto open
                &|rule| rule.ct_known_redirected().ct_mark_has(mask).goto(OPEN),
            ],
        );
        let first = if system {
            // goto enforced
            self.add_rules(OUTPUT, [&|rule| rule.goto(ENFORCED)]);
            ENFORCED
        } else {
            // Every packet of the machine comes by, so the rules are in this chain itself, which saves a jump.
            self.session_rules(OUTPUT, levels, system);
            SESSIONS
        };
        self.session_rules(SESSIONS, levels, system);
        self.deep_level_rules(SESSIONS_DEEP, levels, own_verdict);
        if system {
            // goto system
            self.add_rules(SESSIONS_DEEP, [&|rule| rule.goto(SYSTEM)]);
        }
        self.add_rules(
            OPEN,
            [
                // ct mark & MASK == DIVERT goto answers
                &|rule| rule.ct_mark_is(mask, begun).goto(ANSWERS),
            ],
        );
        self.add_rules(
            ANSWERS,
            [
                // ct direction original return
                &|rule| rule.ct_direction_original().leave(),
                // Clear bits that other programs may have restored; the chains below set them again.
                // meta mark set meta mark & ~MASK
                &|rule| rule.meta_mark_set(mask, 0),
                // meta skuid >= 0 goto enforced, or sessions
                &|rule| rule.skuid_known().goto(first),
                // The last packets of a closed socket, which has no owner any more.
                // socket wildcard 0 goto enforced, or sessions
                &|rule| rule.socket_has_address().goto(first),
                // Sockets of the kernel's own, to which other programs speak.
                // meta l4proto udp return
                &|rule| rule.l4proto(Protocol::Udp).leave(),
                // What the kernel says by itself.
                // drop
                &|rule| rule.drop(),
            ],
        );
        if looked_at.open {
            // jump enforced, or sessions
            self.add_rules(OPEN, [&|rule| rule.jump(first)]);
        }
        self.add_rules(
            OPEN,
            [
                // meta l4proto udp jump kernel
                &|rule| rule.l4proto(Protocol::Udp).jump(KERNEL),
                // A proxy's chain knows its own connections.
                // ct mark & MASK vmap @marks
                &|rule| rule.ct_mark_vmap(mask, MARKS),
                // A conversation with a DNS server is looked at where it is received.
                // ct mark & DIVERT == 0 return
                &|rule| rule.ct_mark_lacks(divert).leave(),
                // A connection to a proxy that is not in the policy any more: it must not go on directly, in
                // the middle of what it was saying.
                // meta skuid >= 0 goto refuse
                &|rule| rule.skuid_known().goto(REFUSE),
                // What the kernel says by itself.
                // drop
                &|rule| rule.drop(),
            ],
        );
    }

    /// A TPROXY server speaks for somebody whom the application has not spoken to, or not for long. In TCP, that is the
    /// middle of a connection that the kernel has forgotten; its beginning is another program's.
    fn begun_rules(&mut self, to: impl Fn(RuleBuilder<'_>) -> RuleBuilder<'_>) {
        let (mask, begun) = (self.marks.mask(), self.marks.begun_by_proxy());
        self.add_rules(
            OUTPUT,
            [
                // ct status ! confirmed TO meta l4proto udp socket transparent 1 ct mark set ct mark & ~MASK | DIVERT return
                &|rule| {
                    to(rule.ct_unconfirmed())
                        .l4proto(Protocol::Udp)
                        .socket_is_transparent()
                        .ct_mark_set(mask, begun)
                        .leave()
                },
                // ct status ! confirmed TO tcp flags ! syn socket transparent 1 ct mark set ct mark & ~MASK | DIVERT return
                &|rule| {
                    to(rule.ct_unconfirmed())
                        .tcp_without_syn()
                        .socket_is_transparent()
                        .ct_mark_set(mask, begun)
                        .leave()
                },
            ],
        );
    }

    /// Users' own verdicts.
    fn session_rules(&mut self, chain: &CStr, levels: &BTreeSet<u32>, system: bool) {
        self.shallow_level_rules(chain, SESSIONS_DEEP, levels, own_verdict);
        if system {
            // goto system
            self.add_rules(chain, [&|rule| rule.goto(SYSTEM)]);
        }
    }

    /// Rules that look at the levels of a socket's control group. Sockets that are deeper than others need to know go to a
    /// chain of their own.
    pub(super) fn shallow_level_rules(
        &mut self,
        chain: &CStr,
        deep: &CStr,
        levels: &BTreeSet<u32>,
        look: impl Fn(RuleBuilder<'_>, u32) -> RuleBuilder<'_>,
    ) {
        if levels.last() > Some(&SHALLOW) {
            // socket cgroupv2 level 9 != 0 goto CHAIN-deep
            self.add_rules(
                chain,
                [&|rule| rule.socket_as_deep_as(SHALLOW + 1).goto(deep)],
            );
        }
        let shallow = levels.range(..=SHALLOW).copied().collect();
        self.level_rules_of(chain, &shallow, look);
    }

    /// The rules of that chain, to which nothing leads if no level is that deep.
    pub(super) fn deep_level_rules(
        &mut self,
        chain: &CStr,
        levels: &BTreeSet<u32>,
        look: impl Fn(RuleBuilder<'_>, u32) -> RuleBuilder<'_>,
    ) {
        if levels.last() > Some(&SHALLOW) {
            self.level_rules_of(chain, levels, look);
        }
    }

    /// The same, if they are to look at something else.
    pub(super) fn first_rules_at(&mut self, looked_at: Option<LookedAt>, shared: &Shared) {
        if let Some(looked_at) = looked_at {
            self.first_rules(&looked_at, shared.has_system());
        }
    }

    /// The system has no policy any more.
    pub(super) fn no_system(&mut self, shared: &Shared) {
        for chain in [ENFORCED, ENFORCED_DEEP, SYSTEM, SYSTEM_DEEP, DROP_SYSTEM] {
            self.flush_chain(chain);
        }
        self.no_gateway();
        shared.look_only_at(Uid::ROOT, None);
        self.first_rules(&shared.looked_at(), false);
    }
}

/// What a user has said of the control group at this level, if anything.
fn own_verdict(rule: RuleBuilder<'_>, level: u32) -> RuleBuilder<'_> {
    rule.socket_cgroupv2_map_vmap(level, CGROUPS, CHOICES)
}
