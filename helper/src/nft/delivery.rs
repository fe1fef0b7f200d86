//! The chains that hand what is diverted or translated to a proxy, and to no other socket.

use nftnl::{ChainType, Hook};

use super::names::Names;
use super::rule::Protocol;
use super::ruleset::{
    DELIVER, DELIVER_ANSWERS, DELIVERY, FORWARD, GATEWAY, GUARD, GUARD_ANSWERS,
    GUARD_ANSWERS_SYSTEM, GUARD_SYSTEM, INPUT, INTERFACES, LOOPBACK, OUTPUT_NAT, OWNERS, PORTS,
    POSTROUTING, PREROUTING, PREROUTING_NAT, PRIORITY_MANGLE, PROXY_UIDS, RECEIVE, REFUSE, RESOLVE,
    SYSTEM_UIDS,
};
use super::transaction::Transaction;
use crate::route::Family;

/// After the chains of all other programs (NF_IP_PRI_LAST).
const PRIORITY_LAST: i32 = i32::MAX;

/// Before `dstnat` (NF_IP_PRI_NAT_DST), where other programs' chains are. Of chains with one priority, the one that was
/// made last is first (nf_hook_entries_grow, net/netfilter/core.c), and the first that translates decides.
const PRIORITY_BEFORE_DSTNAT: i32 = -101;

impl Transaction<'_> {
    /// Chains `deliver` and `deliver-answers`, or the system's. Once the packet has its socket, the delivery guard
    /// looks whose that is. Without a listener `tproxy` ends its rule, and the packet is refused. Not every kernel has
    /// `tproxy`, so nothing is there before a proxy needs it.
    pub(super) fn delivery_rules(&mut self, names: &Names) {
        let mask = self.marks.mask();
        let (chain, guard) = (names.deliver(), names.guard());
        let (answers, guard_answers) = (names.deliver_answers(), names.guard_answers());
        for chain in [chain, answers] {
            self.flush_chain(chain);
        }
        for family in [Family::Ipv4, Family::Ipv6] {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                // meta nfproto FAMILY meta l4proto PROTOCOL tproxy ip to 127.0.0.1:(ct mark & MASK map @ports) goto GUARD
                self.add_rules(
                    chain,
                    [&|rule| {
                        rule.nfproto(family)
                            .l4proto(protocol)
                            .tproxy_by_ct_mark(family, mask, PORTS)
                            .goto(guard)
                    }],
                );
                // meta nfproto FAMILY meta l4proto PROTOCOL tproxy ip to 127.0.0.1:(meta priority map @ports) goto GUARD
                self.add_rules(
                    answers,
                    [&|rule| {
                        rule.nfproto(family)
                            .l4proto(protocol)
                            .tproxy_by_priority(family, PORTS)
                            .goto(guard_answers)
                    }],
                );
            }
        }
        for chain in [chain, answers] {
            // goto refuse
            self.add_rules(chain, [&|rule| rule.goto(REFUSE)]);
        }
    }

    /// Chains `guard` and `guard-answers`, and the system's: a diverted packet reaches only a socket of the same user,
    /// or of an allowed uid.
    ///
    /// TCP is looked at when a connection opens: after that its packets belong to a socket that was let in, and while
    /// that waits to be accepted it has no owner that `skuid` could see (nft_meta_get_eval_skugid wants a file). One that
    /// opens is not always new to the kernel: if a server has broken an earlier one off between the same ports, what is
    /// remembered of that counts as open (`TCP_CONNTRACK_IGNORE` in nf_conntrack_tcp_packet), and by now the port may be
    /// somebody else's. (So the repeated beginning of a connection that waits to be accepted already, as with TCP Fast Open,
    /// is refused.) UDP is looked at packet by packet.
    ///
    /// Services have users of their own: the system's policy takes proxies of every system user.
    pub(super) fn guard_rules(&mut self) {
        let mask = self.marks.mask();
        let guards = [GUARD, GUARD_SYSTEM, GUARD_ANSWERS, GUARD_ANSWERS_SYSTEM];
        for chain in guards {
            self.flush_chain(chain);
            self.add_rules(
                chain,
                [
                    // tcp flags & (syn | ack) != syn ct state != new return
                    &|rule| rule.tcp_but_syn().ct_state_not_new().return_(),
                    // meta skuid @proxy-uids return
                    &|rule| rule.skuid_in(PROXY_UIDS).return_(),
                ],
            );
        }
        // ct mark & MASK . meta skuid @owners return
        self.add_rules(
            GUARD,
            [&|rule| rule.ct_mark_and_skuid_in(mask, OWNERS).return_()],
        );
        // meta priority . meta skuid @owners return
        self.add_rules(
            GUARD_ANSWERS,
            [&|rule| rule.priority_and_skuid_in(OWNERS).return_()],
        );
        for chain in [GUARD_SYSTEM, GUARD_ANSWERS_SYSTEM] {
            for (first, last) in SYSTEM_UIDS {
                // meta skuid FIRST-LAST return
                self.add_rules(chain, [&|rule| rule.skuid_from_to(first, last).return_()]);
            }
        }
        for chain in guards {
            // goto refuse
            self.add_rules(chain, [&|rule| rule.goto(REFUSE)]);
        }
    }

    /// Chains `output-nat`, `prerouting-nat`, `input` and `loopback`, for what is translated. They are there from the
    /// first proxy on that needs them, since every packet of the machine pays for them, and stay then, since
    /// connections need them for as long as they are open.
    pub(super) fn nat_chains(&mut self) {
        let mask = self.marks.mask();
        let hooks = [(OUTPUT_NAT, Hook::Out), (PREROUTING_NAT, Hook::PreRouting)];
        for (chain, hook) in hooks {
            self.add_base_chain(chain, ChainType::Nat, hook, PRIORITY_BEFORE_DSTNAT);
            // ct mark & MASK vmap @resolve
            self.add_rules(chain, [&|rule| rule.ct_mark_vmap(mask, RESOLVE)]);
        }
        self.input_chain();
        self.loopback_chain();
    }

    /// Chain `loopback`. An application may have bound its socket to an interface (SO_BINDTODEVICE): what is translated
    /// to a loopback address would leave by that (ip_route_me_harder, net/ipv4/netfilter.c).
    fn loopback_chain(&mut self) {
        let mask = self.marks.mask();
        let hook = Hook::PostRouting;
        self.add_base_chain(LOOPBACK, ChainType::Filter, hook, PRIORITY_MANGLE);
        for family in [Family::Ipv4, Family::Ipv6] {
            // oif != lo ip daddr 127.0.0.0/8 ct mark & MASK != 0 drop
            // oif != lo ip6 daddr ::1 ct mark & MASK != 0 drop
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

    /// Chains `delivery` and `postrouting`, which are there from the first TPROXY server on, and stay.
    ///
    /// A diverted packet goes to lo. While the `ip rule` or its route is missing, because another program took it away
    /// and the helper has not put it back yet, the packet would go where it is addressed to: `postrouting` drops it.
    ///
    /// `delivery` gives what has come in over lo its socket, last of all: before it has one, everybody's reverse path
    /// filter takes it for what it is, a packet of this machine's own. With one, `fib saddr . iif` looks for a route
    /// back, which is none over lo for IPv6 (nft_fib_can_skip, net/netfilter/nft_fib.h), and firewalld drops what has
    /// none.
    pub(super) fn tproxy_chains(&mut self) {
        let (mask, divert) = (self.marks.mask(), self.marks.divert());
        let begun = self.marks.begun_by_proxy();
        self.add_base_chain(DELIVERY, ChainType::Filter, Hook::PreRouting, PRIORITY_LAST);
        self.add_rules(
            DELIVERY,
            [
                // Nearly every packet is nothing of ours and ends here.
                // meta mark & DIVERT == 0 return
                &|rule| rule.meta_mark_lacks(divert).return_(),
                // What a proxy sends to the application is not diverted. Other programs' rules may have given it the
                // mark of its connection all the same, as wg-quick's do.
                // ct direction reply ct mark & DIVERT != 0 ct mark & MASK != DIVERT return
                &|rule| {
                    rule.ct_direction_reply()
                        .ct_mark_has(divert)
                        .ct_mark_is_not(mask, begun)
                        .return_()
                },
                // The connection's mark says which proxy gets it, since only rules can set that. A program with
                // CAP_NET_RAW may give its packets any mark (SO_MARK), and another user's proxy would take them for
                // that user's.
                // iif lo ct mark & MASK vmap @deliver
                &|rule| rule.iif_lo().ct_mark_vmap(mask, DELIVER),
                // What a proxy sends to the application on a connection that the proxy began.
                // iif lo ct mark & MASK == DIVERT ct direction original return
                &|rule| {
                    rule.iif_lo()
                        .ct_mark_is(mask, begun)
                        .ct_direction_original()
                        .return_()
                },
                // The application's reply on that: the proxy's chain has written into the priority which proxy gets it.
                // iif lo ct mark & MASK == DIVERT meta priority vmap @deliver-answers
                &|rule| {
                    rule.iif_lo()
                        .ct_mark_is(mask, begun)
                        .priority_vmap(DELIVER_ANSWERS)
                },
                // A translated packet that another program's rules have given the mark of its connection.
                // iif lo ct mark & DIVERT != 0 ct status dnat return
                &|rule| rule.iif_lo().ct_mark_has(divert).ct_dnat().return_(),
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

    /// Chain `prerouting`, for what comes from networks behind the machine: there from the system's first policy on.
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

    /// Chain `input`, for what was translated, and for what a gateway has diverted. It is there from the first need on:
    /// what the machine itself diverts to a TPROXY server is looked at where it is delivered.
    fn input_chain(&mut self) {
        self.add_base_chain(INPUT, ChainType::Filter, Hook::In, PRIORITY_MANGLE);
        self.input_over_lo();
        self.input_of_gateway();
        self.input_of_nobody();
    }

    /// The first rules of `input`: what is nothing of this table's goes on, and what has come in over lo is looked at.
    fn input_over_lo(&mut self) {
        let (mask, divert) = (self.marks.mask(), self.marks.divert());
        let begun = self.marks.begun_by_proxy();
        self.add_rules(
            INPUT,
            [
                // Nearly every packet is nothing of ours and ends here.
                // meta mark & DIVERT == 0 ct mark & MASK == 0 return
                &|rule| rule.meta_mark_lacks(divert).ct_mark_lacks(mask).return_(),
                // A connection that a proxy began; replies on it were checked when they were delivered.
                // ct mark & MASK == DIVERT return
                &|rule| rule.ct_mark_is(mask, begun).return_(),
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
                        .return_()
                },
                // What is diverted to nobody reaches nobody.
                // iif lo meta mark & DIVERT != 0 drop
                &|rule| rule.iif_lo().meta_mark_has(divert).drop(),
            ],
        );
    }

    /// The rules of `input` for what has come from networks behind the machine.
    fn input_of_gateway(&mut self) {
        let (mask, divert) = (self.marks.mask(), self.marks.divert());
        self.add_rules(
            INPUT,
            [
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
            ],
        );
    }

    /// The last rules of `input`: what was translated, and has nobody who may receive it.
    fn input_of_nobody(&mut self) {
        let (mask, divert) = (self.marks.mask(), self.marks.divert());
        self.add_rules(
            INPUT,
            [
                // iif lo ct direction original ct mark & DIVERT != 0 drop
                &|rule| {
                    rule.iif_lo()
                        .ct_direction_original()
                        .ct_mark_has(divert)
                        .drop()
                },
                // A conversation with a DNS server that no policy names any more, whose port may be anybody's by now.
                // A TCP connection stays with the server that has accepted it.
                // tcp flags & (syn | ack) != syn ct state != new return
                &|rule| rule.tcp_but_syn().ct_state_not_new().return_(),
                // iif != lo ct direction original ct status dnat ct mark & DIVERT == 0 ct mark & MASK vmap @receive
                &|rule| {
                    rule.iif_not_lo()
                        .ct_direction_original()
                        .ct_dnat()
                        .ct_mark_lacks(divert)
                        .ct_mark_vmap(mask, RECEIVE)
                },
                // ct direction original ct status dnat ct mark & MASK != 0 goto refuse
                &|rule| {
                    rule.ct_direction_original()
                        .ct_dnat()
                        .ct_mark_has(mask)
                        .goto(REFUSE)
                },
            ],
        );
    }

    /// Chain `forward`.
    pub(super) fn forward_rules(&mut self) {
        let divert = self.marks.divert();
        self.add_rules(
            FORWARD,
            [
                // ct mark & DIVERT == 0 return
                &|rule| rule.ct_mark_lacks(divert).return_(),
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
}
