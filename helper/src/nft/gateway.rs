//! What is forwarded: packets from networks behind the machine that its policy diverts.
//!
//! They need no detour over lo: they are where TPROXY takes them already, before they are routed.

use std::ffi::CStr;

use cgtproxy_proto::interface::InterfaceName;
use nftnl::MsgType;

use super::common_rules::to_proxy_of_answer;
use super::ffi::{Content, Element, KeyType};
use super::names::{Names, ProxyChain};
use super::plan::Layout;
use super::policy::{Gateway, Proxy, UdpVerdicts};
use super::rule::{Protocol, RuleBuilder};
use super::ruleset::{BEHIND, DELIVER, DIVERT, FORWARDED, GATEWAY, INTERFACES, REFUSE};
use super::transaction::Transaction;

/// `IFNAMSIZ` (linux/if.h): nftables' keys are that long.
const KEY_BYTES: usize = 16;

impl Transaction<'_> {
    /// Empties the chains and the set for forwarded packets: none is diverted.
    pub(super) fn no_gateway(&mut self) {
        self.flush_chain(GATEWAY);
        self.flush_chain(FORWARDED);
        self.flush_set(INTERFACES);
    }

    /// Chains `gateway` and `forwarded`, and the set of interfaces, as the layout says. Connections that are open go on
    /// as they began, also when their interface is not listed any more, or none is.
    pub(super) fn gateway(&mut self, names: &Names, layout: &Layout) {
        self.gateway_chain();
        self.no_gateway();
        let gateway = layout.gateway.as_ref();
        let gateway =
            gateway.and_then(|gateway| Some((gateway, layout.proxies.get(&gateway.proxy)?)));
        if let Some((_, proxy)) = gateway {
            self.forwarded_answer_rules(names, proxy);
        }
        self.open_forwarded_rules();
        if let Some((gateway, proxy)) = gateway {
            self.new_forwarded_rules(names, layout, gateway, proxy);
        }
    }

    /// Chain `gateway`, for answers to a peer for whom the TPROXY server has spoken first. Chain `forward` refuses an
    /// answer whose proxy is not there any more.
    fn forwarded_answer_rules(&mut self, names: &Names, proxy: &Proxy) {
        let (mask, begun) = (self.marks.mask(), self.marks.begun_by_proxy());
        self.add_rules(
            GATEWAY,
            [
                // iifname @interfaces ct mark & MASK == DIVERT ct direction reply fib daddr type 2-5 return
                &|rule| answer(rule, mask, begun).daddr_local_or_many().return_(),
                // An ICMP error about such a connection is refused there: it would tell the peer the host's address.
                // iifname @interfaces ct mark & MASK == DIVERT ct direction reply
                //   meta priority set MARK meta mark set meta mark & ~MASK | DIVERT goto deliver-answers-system
                &|rule| {
                    to_proxy_of_answer(answer(rule, mask, begun), proxy, mask, begun)
                        .goto(names.deliver_answers())
                },
            ],
        );
    }

    /// Chains `gateway` and `forwarded`, for open connections.
    fn open_forwarded_rules(&mut self) {
        let (mask, divert) = (self.marks.mask(), self.marks.divert());
        self.add_rules(
            GATEWAY,
            [
                // iifname @interfaces jump forwarded
                &|rule| rule.iifname_in(INTERFACES).jump(FORWARDED),
                // iifname @interfaces meta mark & MASK vmap @deliver
                &|rule| rule.iifname_in(INTERFACES).meta_mark_vmap(mask, DELIVER),
                // iif != lo ct mark & DIVERT != 0 jump forwarded
                &|rule| rule.iif_not_lo().ct_mark_has(divert).jump(FORWARDED),
                // iif != lo ct mark & DIVERT != 0 meta mark & MASK vmap @deliver
                &|rule| {
                    rule.iif_not_lo()
                        .ct_mark_has(divert)
                        .meta_mark_vmap(mask, DELIVER)
                },
            ],
        );
        self.add_rules(
            FORWARDED,
            [
                // See `replies`.
                // ct direction reply tcp flags & (syn | ack) == syn drop
                &|rule| rule.ct_direction_reply().tcp_syn().drop(),
                // Answers of a service behind the machine.
                // ct direction reply return
                &|rule| rule.ct_direction_reply().return_(),
                // Chain `forward` refuses an open connection whose proxy is not there any more.
                // ct mark & MASK vmap @divert
                &|rule| rule.ct_mark_vmap(mask, DIVERT),
            ],
        );
        // The kernel may have given it the machine's address, with which a proxy would see it.
        self.open_connection_rules(FORWARDED, UdpVerdicts::PerConversation, |rule| rule);
    }

    /// Chain `forwarded`, for new connections.
    fn new_forwarded_rules(
        &mut self,
        names: &Names,
        layout: &Layout,
        gateway: &Gateway,
        proxy: &Proxy,
    ) {
        // What is open there outlives the list, and so do its replies, until the table is made anew.
        for set in [INTERFACES, BEHIND] {
            let mut interfaces = self.set(set, KeyType::Interface, Content::Keys);
            for interface in &gateway.interfaces {
                interfaces.push(&key(interface), Element::Key);
            }
            self.write_elements(&interfaces, MsgType::Add);
        }
        self.unreachable_rules(FORWARDED);
        if let Some(hijack) = &proxy.settings.dns_hijack {
            let dns = names.chain(ProxyChain::Dns, &gateway.proxy);
            // Nothing from elsewhere may go to a loopback address.
            for address in hijack.addresses.iter().filter(|a| !a.is_loopback()) {
                self.query_rules(FORWARDED, address, hijack.tcp, &dns);
            }
        }
        self.fake_rules(FORWARDED, proxy);
        self.exception_rules(FORWARDED, proxy.settings.exceptions);
        let (divert, reject_udp) = (
            names.chain(ProxyChain::Divert, &gateway.proxy),
            proxy.settings.reject_udp,
        );
        if let Some(list) = &layout.bypass {
            self.bypass_rules(list, FORWARDED);
        }
        self.begun_by_others_rules(FORWARDED, proxy.settings.delivery);
        self.add_rules(
            FORWARDED,
            [
                // meta l4proto tcp goto divert-0-NAME
                &|rule| rule.l4proto(Protocol::Tcp).goto(&divert),
                // meta l4proto udp goto divert-0-NAME, or reject
                &|rule| match rule.l4proto(Protocol::Udp) {
                    rule if reject_udp => rule.reject(),
                    rule => rule.goto(&divert),
                },
            ],
        );
    }

    /// Chain `divert-0-NAME`: what is forwarded is marked here, and delivered by the chain `gateway`. The system's proxies are
    /// all TPROXY servers: the helper accepts no `redirect` from root.
    pub(super) fn divert_rules(&mut self, chain: &CStr, proxy: &Proxy) {
        let (mask, mark) = (self.marks.mask(), proxy.mark.value());
        self.add_rules(
            chain,
            [
                // ct mark set ct mark & ~MASK | MARK meta mark set meta mark & ~MASK | MARK return
                &|rule| {
                    rule.ct_mark_set(mask, mark)
                        .meta_mark_set(mask, mark)
                        .return_()
                },
                // What belongs to no connection, as in `new_rules`.
                // tcp flags ! syn drop
                &|rule| rule.tcp_without_syn().drop(),
                // goto refuse
                &|rule| rule.goto(REFUSE),
            ],
        );
    }
}

/// A reply to a peer that a TPROXY server has introduced.
fn answer(rule: RuleBuilder<'_>, mask: u32, begun: u32) -> RuleBuilder<'_> {
    rule.iifname_in(INTERFACES)
        .ct_mark_is(mask, begun)
        .ct_direction_reply()
}

/// An interface's name as a key of the set. No name is longer than a key.
fn key(interface: &InterfaceName) -> [u8; KEY_BYTES] {
    let mut key = [0; KEY_BYTES];
    for (to, from) in key.iter_mut().zip(interface.as_str().bytes()) {
        *to = from;
    }
    key
}
