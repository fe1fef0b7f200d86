//! Rules that several chains have, each for other packets: what leaves the chain, and what is refused, before anything
//! goes to a proxy.

use std::ffi::CStr;

use super::policy::{Delivery, Exceptions, Proxy, UdpVerdicts};
use super::rule::{Protocol, RuleBuilder};
use super::ruleset::REFUSE;
use super::transaction::Transaction;
use crate::route::Family;

impl Transaction<'_> {
    /// Packets of open connections that `of` matches leave the chain. One of TCP is not open that is only beginning:
    /// somebody else may have begun one between these ports in vain. Of one of UDP nobody can tell, so that none of its
    /// packets leaves the chain if each datagram has a verdict.
    pub(super) fn open_connection_rules(
        &mut self,
        chain: &CStr,
        udp_verdicts: UdpVerdicts,
        of: impl Fn(RuleBuilder<'_>) -> RuleBuilder<'_>,
    ) {
        self.add_rules(
            chain,
            [
                // … ct status confirmed meta l4proto != tcp return, or … meta l4proto != tcp meta l4proto != udp return
                &|rule| {
                    let rule = of(rule).ct_confirmed().l4proto_not(Protocol::Tcp);
                    match udp_verdicts {
                        UdpVerdicts::PerConversation => rule.return_(),
                        UdpVerdicts::PerDatagram => rule.l4proto_not(Protocol::Udp).return_(),
                    }
                },
                // … ct status confirmed tcp flags & (syn | ack) != syn return
                &|rule| of(rule).ct_confirmed().tcp_but_syn().return_(),
            ],
        );
    }

    /// What begins a connection that the kernel knows already is refused if it can't be taken.
    pub(super) fn begun_by_others_rules(&mut self, chain: &CStr, delivery: Delivery) {
        match delivery {
            // The delivery guard looks at each datagram, but only at connections of TCP that nobody has answered.
            // meta l4proto tcp ct status seen-reply goto refuse
            Delivery::Tproxy(_) => {
                self.add_rules(
                    chain,
                    [&|rule| rule.l4proto(Protocol::Tcp).ct_seen_reply().goto(REFUSE)],
                );
            }
            // Only the first packet that the kernel knows of can be translated.
            // ct status confirmed goto refuse
            Delivery::Redirect(_) => {
                self.add_rules(chain, [&|rule| rule.ct_confirmed().goto(REFUSE)]);
            }
        }
    }

    /// Destinations that no proxy could reach leave the chain.
    pub(super) fn unreachable_rules(&mut self, chain: &CStr) {
        self.add_rules(
            chain,
            [
                // The machine itself, broadcast and multicast.
                // fib daddr type 2-5 return
                &|rule| rule.daddr_local_or_many().return_(),
                // `fib` says multicast only where the kernel finds a route to the group.
                // ip6 daddr ff00::/8 return
                &|rule| rule.daddr_multicast6().return_(),
                // A link-local address means nothing without an interface.
                // ip6 daddr fe80::/10 return
                &|rule| rule.daddr_link_local().return_(),
            ],
        );
    }

    /// What goes to a fake address by a protocol that the proxy leaves out is refused: it would reach nobody, and what
    /// it says could be read on its way.
    pub(super) fn fake_rules(&mut self, chain: &CStr, proxy: &Proxy) {
        let exceptions = proxy.settings.exceptions;
        for (address, prefix) in proxy.settings.fakes.networks() {
            let family_taken = exceptions.takes_family(Family::of(&address));
            // meta l4proto != tcp meta l4proto != udp ip daddr NETWORK goto refuse, with the protocols that it takes
            self.add_rules(
                chain,
                [&|mut rule| {
                    for protocol in [Protocol::Tcp, Protocol::Udp] {
                        if family_taken && exceptions.takes(protocol) {
                            rule = rule.l4proto_not(protocol);
                        }
                    }
                    rule.daddr_within(address, prefix).goto(REFUSE)
                }],
            );
        }
    }

    /// Families and protocols that the proxy does not take leave the chain.
    pub(super) fn exception_rules(&mut self, chain: &CStr, exceptions: Exceptions) {
        for family in [Family::Ipv4, Family::Ipv6] {
            if !exceptions.takes_family(family) {
                // meta nfproto FAMILY return
                self.add_rules(chain, [&|rule| rule.nfproto(family).return_()]);
            }
        }
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            if !exceptions.takes(protocol) {
                // meta l4proto PROTOCOL return
                self.add_rules(chain, [&|rule| rule.l4proto(protocol).return_()]);
            }
        }
    }
}

/// Writes into the priority which proxy an answer goes to. The packet keeps the mark of its connection, so that other
/// programs may save and restore marks; and the connection keeps a mark that is no proxy's, since its answers may go to
/// another proxy later.
pub(super) fn to_proxy_of_answer<'a>(
    rule: RuleBuilder<'a>,
    proxy: &Proxy,
    mask: u32,
    begun: u32,
) -> RuleBuilder<'a> {
    rule.priority_set(proxy.mark.value())
        .meta_mark_set(mask, begun)
}
