//! The chains of the output hook that come before any user's own: an open connection goes on as it began, and a new one
//! gets the verdict of its socket's control group.

use std::collections::BTreeSet;
use std::ffi::CStr;

use super::rule::{Protocol, RuleBuilder};
use super::ruleset::{
    ANSWERS, BEHIND, BROUGHT, CGROUPS, CHOICES, ENFORCED, FIRST_PACKETS, FORGED, INTERFACES,
    KERNEL, MARKED, MARKS, OPEN, OUTPUT, REFUSE, REPLIES, SYSTEM, USER_VERDICTS,
    USER_VERDICTS_DEEP,
};
use super::shared::{LookedAt, Shared};
use super::transaction::Transaction;
use crate::route::Family;

/// Sockets that are no deeper than this pay for no level below it: an application is at level 5, what a terminal or a
/// container starts at 6 or 7. However deep one user's control groups are, the packets of others need not know.
const SHALLOW: u32 = 8;

impl Transaction<'_> {
    /// Chains `output`, `marked`, `open`, `answers`, `replies` and `user-verdicts`: users' own verdicts at these levels,
    /// between what the system's policy enforces and what else it says, if there is one.
    ///
    /// While nothing is dropped or held, no verdict changes anything for an open connection, and none is looked up.
    pub(super) fn first_rules(&mut self, system: bool) {
        let chains = [
            OUTPUT,
            MARKED,
            OPEN,
            ANSWERS,
            REPLIES,
            USER_VERDICTS,
            USER_VERDICTS_DEEP,
        ];
        for chain in chains {
            self.flush_chain(chain);
        }
        let LookedAt { levels, open } = self.looked_at.clone();
        let verdicts = if system { ENFORCED } else { USER_VERDICTS };
        self.output_chain(&levels, open, system);
        self.user_verdict_rules(USER_VERDICTS, &levels, system);
        self.deep_level_rules(USER_VERDICTS_DEEP, &levels, own_verdict);
        if system {
            // goto system
            self.add_rules(USER_VERDICTS_DEEP, [&|rule| rule.goto(SYSTEM)]);
        }
        self.marked_chain(verdicts, system);
        self.replies_chain(verdicts);
        self.answers_chain(verdicts);
        self.open_chain(open.then_some(verdicts));
    }

    /// Chain `output`, by which every packet of the machine comes: most have no mark, and belong to no open connection.
    fn output_chain(&mut self, levels: &BTreeSet<u32>, open: bool, system: bool) {
        let mask = self.marks.mask();
        let begun = self.marks.begun_by_proxy();
        if !open {
            // ct mark & MASK == 0 …: return
            self.open_connection_rules(OUTPUT, self.udp_verdicts, |rule| rule.ct_mark_lacks(mask));
        }
        self.add_rules(
            OUTPUT,
            [
                // ct direction reply ct mark & MASK != DIVERT goto replies
                &|rule| {
                    rule.ct_direction_reply()
                        .ct_mark_is_not(mask, begun)
                        .goto(REPLIES)
                },
                // ct mark & MASK != 0 goto marked
                &|rule| rule.ct_mark_has(mask).goto(MARKED),
            ],
        );
        self.first_packets_of(OUTPUT, system);
        if system {
            // goto enforced
            self.add_rules(OUTPUT, [&|rule| rule.goto(ENFORCED)]);
        } else {
            // Every packet of the machine comes by, so the rules are in this chain itself, which saves a jump.
            self.user_verdict_rules(OUTPUT, levels, system);
        }
    }

    /// Chain `marked`: packets of connections with a mark, which is this table's or another program's. `verdicts` is where
    /// those of the others go on.
    fn marked_chain(&mut self, verdicts: &CStr, system: bool) {
        let divert = self.marks.divert();
        self.add_rules(
            MARKED,
            [
                // ct mark & DIVERT != 0 goto open
                &|rule| rule.ct_mark_has(divert).goto(OPEN),
            ],
        );
        self.first_packets_of(MARKED, system);
        self.add_rules(
            MARKED,
            [
                // A conversation with a DNS server, which has no divert bit.
                // ct status & (confirmed | dnat) == confirmed | dnat goto open
                &|rule| rule.ct_confirmed_dnat().goto(OPEN),
                // Not one of this table's.
                // goto enforced, or user-verdicts
                &|rule| rule.goto(verdicts),
            ],
        );
    }

    /// Chain `replies`: what answers on a connection that no TPROXY server began.
    fn replies_chain(&mut self, verdicts: &CStr) {
        let divert = self.marks.divert();
        self.add_rules(
            REPLIES,
            [
                // Nobody answers so: a connection that somebody has begun in the name of the peer, and nobody has refused.
                // tcp flags & (syn | ack) == syn goto enforced, or user-verdicts
                &|rule| rule.tcp_syn().goto(verdicts),
                // ct mark & DIVERT != 0 goto brought
                &|rule| rule.ct_mark_has(divert).goto(BROUGHT),
            ],
        );
    }

    /// Chain `answers`: connections that a TPROXY server began, in the name of the peer.
    fn answers_chain(&mut self, verdicts: &CStr) {
        let mask = self.marks.mask();
        self.add_rules(
            ANSWERS,
            [
                // ct direction original goto brought
                &|rule| rule.ct_direction_original().goto(BROUGHT),
                // Clear bits that other programs may have restored; the chains below set them again.
                // meta mark set meta mark & ~MASK
                &|rule| rule.meta_mark_set(mask, 0),
                // meta skuid >= 0 goto enforced, or user-verdicts
                &|rule| rule.skuid_known().goto(verdicts),
                // The last packets of a closed socket, which has no owner any more.
                // socket wildcard 0 goto enforced, or user-verdicts
                &|rule| rule.socket_wildcard_0().goto(verdicts),
                // Sockets of the kernel's own, to which other programs speak.
                // meta l4proto udp return
                &|rule| rule.l4proto(Protocol::Udp).return_(),
                // What the kernel says by itself.
                // drop
                &|rule| rule.drop(),
            ],
        );
    }

    /// Chain `open`: connections that have a proxy or a DNS server already. `verdicts` is where a drop or a hold is looked
    /// for, if there may be one.
    fn open_chain(&mut self, verdicts: Option<&CStr>) {
        let (mask, divert) = (self.marks.mask(), self.marks.divert());
        let begun = self.marks.begun_by_proxy();
        self.add_rules(
            OPEN,
            [
                // ct mark & MASK == DIVERT goto answers
                &|rule| rule.ct_mark_is(mask, begun).goto(ANSWERS),
            ],
        );
        if let Some(verdicts) = verdicts {
            // jump enforced, or user-verdicts
            self.add_rules(OPEN, [&|rule| rule.jump(verdicts)]);
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
                &|rule| rule.ct_mark_lacks(divert).return_(),
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

    /// Writes [`Self::first_rules`] anew if they do not do for what is needed from now on.
    pub(super) fn look_at(&mut self, needed: LookedAt, shared: &Shared) {
        if !self.looked_at.does_for(&needed) {
            self.look_only_at(needed, shared);
        }
    }

    /// Writes [`Self::first_rules`] anew if they look at anything else than what is needed from now on.
    pub(super) fn look_only_at(&mut self, needed: LookedAt, shared: &Shared) {
        if self.looked_at != needed {
            self.looked_at = needed;
            self.first_rules(shared.has_system());
        }
    }

    /// First packets go by the chain `forged`, and those that may be a TPROXY server's for somebody else by `first-packets`.
    fn first_packets_of(&mut self, chain: &CStr, system: bool) {
        self.add_rules(
            chain,
            [
                // ct status ! confirmed meta nfproto ipv6 jump forged
                &|rule| rule.ct_unconfirmed().nfproto(Family::Ipv6).jump(FORGED),
                // ct status ! confirmed oif lo jump first-packets
                &|rule| rule.ct_unconfirmed().oif_lo().jump(FIRST_PACKETS),
            ],
        );
        if system {
            // ct status ! confirmed oifname @interfaces jump first-packets
            self.add_rules(
                chain,
                [&|rule| {
                    rule.ct_unconfirmed()
                        .oifname_in(INTERFACES)
                        .jump(FIRST_PACKETS)
                }],
            );
        }
    }

    /// Chain `first-packets`. A TPROXY server speaks for somebody whom the application has not spoken to, or not for long.
    /// In TCP, that is the middle of a connection that the kernel has forgotten; its beginning is another program's.
    pub(super) fn first_packet_rules(&mut self) {
        let (mask, begun) = (self.marks.mask(), self.marks.begun_by_proxy());
        self.flush_chain(FIRST_PACKETS);
        self.add_rules(
            FIRST_PACKETS,
            [
                // meta l4proto udp socket transparent 1 ct mark set ct mark & ~MASK | DIVERT accept
                &|rule| {
                    rule.l4proto(Protocol::Udp)
                        .socket_is_transparent()
                        .ct_mark_set(mask, begun)
                        .accept()
                },
                // tcp flags ! syn socket transparent 1 ct mark set ct mark & ~MASK | DIVERT accept
                &|rule| {
                    rule.tcp_without_syn()
                        .socket_is_transparent()
                        .ct_mark_set(mask, begun)
                        .accept()
                },
            ],
        );
    }

    /// Chain `brought`. What a proxy says goes to an application of this machine, or to a network behind it. When the
    /// machine has left the network that the application's address was of, that address is somebody else's: what would go
    /// there tells what is said, and to whom.
    pub(super) fn brought_rules(&mut self, has_fib: bool) {
        self.flush_chain(BROUGHT);
        if !has_fib {
            return;
        }
        self.add_rules(
            BROUGHT,
            [
                // A proxy speaks in the name of somebody elsewhere, or is translated so. What a service here answers
                // has such a mark by another program's doing.
                // ct status & (confirmed | dnat) == confirmed fib saddr type local return
                &|rule| rule.ct_confirmed_without_dnat().saddr_is_local().return_(),
                // oif lo return
                &|rule| rule.oif_lo().return_(),
                // oifname @behind return
                &|rule| rule.oifname_in(BEHIND).return_(),
                // A packet that leaves by a VRF comes by once more, with the interface.
                // meta oifkind "vrf" return
                &|rule| rule.oif_is_vrf().return_(),
                // drop
                &|rule| rule.drop(),
            ],
        );
    }

    /// Chain `forged`. A program could begin a conversation in the name of somebody elsewhere: what its addressee then says
    /// to that peer is an answer, and answers leave as they are. For IPv6 it needs no privilege, but a socket option
    /// (`IPV6_FREEBIND`). For IPv4 the kernel refuses to (`ip_route_output_key_hash_rcu`, net/ipv4/route.c).
    pub(super) fn forged_rules(&mut self, has_fib: bool) {
        self.flush_chain(FORGED);
        if !has_fib {
            return;
        }
        self.add_rules(
            FORGED,
            [
                // fib saddr type local return
                &|rule| rule.saddr_is_local().return_(),
                // An address of a VRF is found on its interface alone, and a packet passes the VRF's own before.
                // fib saddr . oif type local return
                &|rule| rule.saddr_is_of_oif().return_(),
                // meta oifkind "vrf" return
                &|rule| rule.oif_is_vrf().return_(),
                // Root may.
                // meta skuid 0 return
                &|rule| rule.skuid_from_to(0, 0).return_(),
                // socket transparent 0 drop
                &|rule| rule.socket_is_not_transparent().drop(),
            ],
        );
    }

    /// What chain `user-verdicts` has, and `output` while there is no system policy.
    fn user_verdict_rules(&mut self, chain: &CStr, levels: &BTreeSet<u32>, system: bool) {
        self.shallow_level_rules(chain, USER_VERDICTS_DEEP, levels, own_verdict);
        if system {
            // goto system
            self.add_rules(chain, [&|rule| rule.goto(SYSTEM)]);
        }
    }

    /// Rules that look at the levels of a socket's control group down to [`SHALLOW`]. If there are deeper levels,
    /// sockets that are deeper go on to the chain `deep`.
    pub(super) fn shallow_level_rules(
        &mut self,
        chain: &CStr,
        deep: &CStr,
        levels: &BTreeSet<u32>,
        look: impl Fn(RuleBuilder<'_>, u32) -> RuleBuilder<'_>,
    ) {
        if levels.last() > Some(&SHALLOW) {
            // socket cgroupv2 level 9 != 0 goto DEEP
            self.add_rules(
                chain,
                [&|rule| rule.socket_level_exists(SHALLOW + 1).goto(deep)],
            );
        }
        let shallow = levels.range(..=SHALLOW).copied().collect();
        self.level_rules_of(chain, &shallow, look);
    }

    /// The rules of the chain `deep` of [`Self::shallow_level_rules`]: none if no level is that deep.
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

    /// Rules that look at the levels of a socket's control group, deepest first: the nearest control group
    /// with a verdict of its own decides.
    fn level_rules_of(
        &mut self,
        chain: &CStr,
        levels: &BTreeSet<u32>,
        look: impl Fn(RuleBuilder<'_>, u32) -> RuleBuilder<'_>,
    ) {
        for &level in levels.iter().rev() {
            if level == 0 {
                // The kernel's own sockets are at the root too, and have no owner. What they send (neighbour
                // discovery, ICMP errors, resets) is left alone, since it is about all users' connections. TCP sockets
                // that were made in a control group are not: the rest of a closed one has no owner either.
                self.add_rules(
                    chain,
                    [
                        // meta skuid >= 0 socket cgroupv2 level 0 …
                        &|rule| look(rule.skuid_known(), level),
                        // meta l4proto tcp socket wildcard 0 socket cgroupv2 level 1 != 0 socket cgroupv2 level 0 …
                        &|rule| {
                            let tcp = rule.l4proto(Protocol::Tcp).socket_wildcard_0();
                            look(tcp.socket_level_exists(1), level)
                        },
                    ],
                );
            } else {
                // socket cgroupv2 level LEVEL map @cgroups vmap @choices
                self.add_rules(chain, [&|rule| look(rule, level)]);
            }
        }
    }

    /// Chain `kernel`. The packets of a tunnel have the socket of who sends something through it (skb_scrub_packet,
    /// net/core/skbuff.c), so that an application's proxy may take the tunnel; those that the kernel sends through it
    /// by itself have nobody's. With the first of these the tunnel is the kernel's again, unless it was translated,
    /// which can't be taken back. A closed UDP socket sends nothing more.
    pub(super) fn kernel_rules(&mut self) {
        let mask = self.marks.mask();
        self.flush_chain(KERNEL);
        self.add_rules(
            KERNEL,
            [
                // socket cgroupv2 level 1 != 0 return
                &|rule| rule.socket_level_exists(1).return_(),
                // meta skuid >= 0 return
                &|rule| rule.skuid_known().return_(),
                // ct status & (confirmed | dnat) == confirmed
                //   ct mark set ct mark & ~MASK meta mark set meta mark & ~MASK accept
                &|rule| {
                    rule.ct_confirmed_without_dnat()
                        .ct_mark_set(mask, 0)
                        .meta_mark_set(mask, 0)
                        .accept()
                },
            ],
        );
    }
}

/// Takes the verdict that a user's policy has on the socket's control group at this level, if any.
fn own_verdict(rule: RuleBuilder<'_>, level: u32) -> RuleBuilder<'_> {
    rule.socket_cgroupv2_map_vmap(level, CGROUPS, CHOICES)
}
