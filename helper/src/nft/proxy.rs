//! The chains of one proxy: which packets are diverted to it, how they are delivered, and where its DNS
//! queries go.

use std::ffi::CStr;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use cgtproxy_proto::name::ProxyName;

use super::ffi::KeyType;
use super::names::Names;
use super::plan::{Delivery, DnsHijack, Exceptions, Proxy};
use super::rule::{Family, Protocol};
use super::ruleset::{DELIVER, DIVERT, GUARD, RECEIVE, RESOLVE};
use super::transaction::Transaction;
use crate::mark::Mark;

/// The port of DNS (RFC 1035, 4.2).
const DNS_PORT: u16 = 53;

impl Transaction<'_> {
    pub(super) fn create_proxy(&mut self, names: &Names, name: &ProxyName, proxy: &Proxy) {
        for chain in names.of_proxy(name) {
            self.add_chain(&chain);
        }
        self.proxy_rules(names, name, proxy);
        self.proxy_elements(names, name, proxy.mark);
        self.proxy_choice(names, name, proxy);
    }

    /// Another port, other exceptions, another DNS server: the mark stays.
    pub(super) fn change_proxy(&mut self, names: &Names, name: &ProxyName, proxy: &Proxy) {
        self.flush_proxy(names, name);
        self.proxy_rules(names, name, proxy);
    }

    pub(super) fn flush_proxy(&mut self, names: &Names, name: &ProxyName) {
        for chain in names.of_proxy(name) {
            self.flush_chain(&chain);
        }
    }

    pub(super) fn delete_proxy_chains(&mut self, names: &Names, name: &ProxyName) {
        for chain in names.of_proxy(name) {
            self.delete_chain(&chain);
        }
    }

    /// The elements that lead from a proxy's mark to its chains.
    pub(super) fn proxy_elements(&mut self, names: &Names, name: &ProxyName, mark: Mark) {
        let key = mark.value().to_ne_bytes();
        self.map_to_chain(&names.marks, KeyType::Mark, &key, &names.divert(name));
        self.map_to_chain(DIVERT, KeyType::Mark, &key, &names.divert(name));
        self.map_to_chain(DELIVER, KeyType::Mark, &key, &names.deliver(name));
        self.map_to_chain(GUARD, KeyType::Mark, &key, &names.guard);
        let dns = self.marks.dns_value(mark).to_ne_bytes();
        self.map_to_chain(RESOLVE, KeyType::Mark, &dns, &names.resolve(name));
        self.map_to_chain(RESOLVE, KeyType::Mark, &key, &names.redirect(name));
        for key in [&key, &dns] {
            self.map_to_chain(RECEIVE, KeyType::Mark, key, &names.receive(name));
        }
    }

    pub(super) fn delete_proxy_elements(&mut self, names: &Names, mark: Mark) {
        for map in [names.marks.as_c_str(), DIVERT, DELIVER, GUARD] {
            self.delete_element(map, KeyType::Mark, &mark.value().to_ne_bytes());
        }
        for mark in [mark.value(), self.marks.dns_value(mark)] {
            for map in [RESOLVE, RECEIVE] {
                self.delete_element(map, KeyType::Mark, &mark.to_ne_bytes());
            }
        }
    }

    /// The rules of a proxy's chains, which are empty.
    pub(super) fn proxy_rules(&mut self, names: &Names, name: &ProxyName, proxy: &Proxy) {
        if proxy.dns_hijack.is_some() || matches!(proxy.delivery, Delivery::Redirect(_)) {
            self.nat_chains();
        }
        self.tproxy_rules(names, name, proxy);
        let divert = names.divert(name);
        match proxy.delivery {
            Delivery::Tproxy(port) => {
                self.tproxy_chains();
                self.divert_rules(&divert, proxy.mark);
                self.deliver_rules(names, &names.deliver(name), port.get());
            }
            Delivery::Redirect(Some(port)) => {
                self.translate_rules(&divert, proxy.mark);
                self.redirect_rules(&names.redirect(name), port.get());
            }
            Delivery::Redirect(None) => self.refuse_rules(&divert),
        }
        self.receive_rules(names, name, proxy);
        if let Some(hijack) = &proxy.dns_hijack {
            self.dns_rules(&names.dns(name), proxy.mark, hijack);
            self.resolve_rules(&names.resolve(name), hijack);
        }
    }

    /// Whether a connection is diverted is decided at its first packet.
    fn tproxy_rules(&mut self, names: &Names, name: &ProxyName, proxy: &Proxy) {
        let chain = names.tproxy(name);
        let (divert, dns) = (names.divert(name), names.dns(name));
        // ct status confirmed goto open-UID
        self.add_rules(&chain, [&|rule| rule.ct_confirmed().goto(&names.open)]);
        if let Some(hijack) = &proxy.dns_hijack {
            for address in &hijack.addresses {
                self.query_rules(&chain, address, hijack.tcp, &dns);
            }
        }
        self.exception_rules(&chain, proxy.exceptions);
        let reject_udp = proxy.reject_udp;
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
                // meta l4proto udp goto divert-UID-NAME, or reject
                &|rule| match rule.l4proto(Protocol::Udp) {
                    rule if reject_udp => rule.reject(),
                    rule => rule.goto(&divert),
                },
            ],
        );
    }

    /// Queries of the family of this address go to the chain for DNS.
    pub(super) fn query_rules(&mut self, chain: &CStr, address: &IpAddr, tcp: bool, dns: &CStr) {
        let family = Family::of(address);
        let protocols = [(Protocol::Udp, true), (Protocol::Tcp, tcp)];
        for (protocol, _) in protocols.into_iter().filter(|(_, wanted)| *wanted) {
            // meta nfproto FAMILY PROTOCOL dport 53 goto dns-UID-NAME
            self.add_rules(
                chain,
                [&|rule| rule.nfproto(family).dport(protocol, DNS_PORT).goto(dns)],
            );
        }
    }

    /// What the proxy does not take leaves the chain.
    pub(super) fn exception_rules(&mut self, chain: &CStr, exceptions: Exceptions) {
        let families = [
            (exceptions.no_ipv4, Family::Ipv4),
            (exceptions.no_ipv6, Family::Ipv6),
        ];
        for (_, family) in families.into_iter().filter(|(left_out, _)| *left_out) {
            // meta nfproto FAMILY return
            self.add_rules(chain, [&|rule| rule.nfproto(family).leave()]);
        }
        let protocols = [
            (exceptions.no_tcp, Protocol::Tcp),
            (exceptions.no_udp, Protocol::Udp),
        ];
        for (_, protocol) in protocols.into_iter().filter(|(left_out, _)| *left_out) {
            // meta l4proto PROTOCOL return
            self.add_rules(chain, [&|rule| rule.l4proto(protocol).leave()]);
        }
    }

    fn divert_rules(&mut self, chain: &CStr, mark: Mark) {
        let (mask, value) = (self.marks.mask(), mark.value());
        self.add_rules(
            chain,
            [
                // ct mark set ct mark & ~MASK | MARK
                &|rule| rule.ct_mark_set(mask, value),
                // meta mark set meta mark & ~MASK | MARK
                &|rule| rule.meta_mark_set(mask, value),
            ],
        );
    }

    /// The packet stays as it is until the nat chain has its turn, which sees the first packet of a
    /// connection only.
    fn translate_rules(&mut self, chain: &CStr, mark: Mark) {
        let (mask, value) = (self.marks.mask(), mark.value());
        self.add_rules(
            chain,
            [
                // A connection that was open before this proxy was what it is now: its packets
                // would leave as they are.
                // meta l4proto tcp ct status & (confirmed | dnat) == confirmed reject with tcp reset
                &|rule| {
                    rule.l4proto(Protocol::Tcp)
                        .ct_not_redirected()
                        .reject_with_tcp_reset()
                },
                // ct status & (confirmed | dnat) == confirmed reject
                &|rule| rule.ct_not_redirected().reject(),
                // ct mark set ct mark & ~MASK | MARK
                &|rule| rule.ct_mark_set(mask, value),
            ],
        );
    }

    /// Nobody listens yet.
    fn refuse_rules(&mut self, chain: &CStr) {
        self.add_rules(
            chain,
            [
                // meta l4proto tcp reject with tcp reset
                &|rule| rule.l4proto(Protocol::Tcp).reject_with_tcp_reset(),
                // reject
                &|rule| rule.reject(),
            ],
        );
    }

    fn redirect_rules(&mut self, chain: &CStr, port: u16) {
        for address in [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()] {
            // dnat ip to 127.0.0.1:PORT, dnat ip6 to [::1]:PORT
            self.add_rules(chain, [&|rule| rule.dnat(address, port)]);
        }
    }

    /// Who may receive what was translated: a DNS server that the user named, wherever it is, and
    /// nobody but the user otherwise.
    fn receive_rules(&mut self, names: &Names, name: &ProxyName, proxy: &Proxy) {
        let chain = names.receive(name);
        let divert = self.marks.divert();
        if matches!(proxy.delivery, Delivery::Tproxy(_)) {
            // ct mark & DIVERT != 0 return
            self.add_rules(&chain, [&|rule| rule.ct_mark_has(divert).leave()]);
        }
        if !proxy.dns_hijack.as_ref().is_some_and(|hijack| hijack.own) {
            // ct mark & DIVERT == 0 return
            self.add_rules(&chain, [&|rule| rule.ct_mark_lacks(divert).leave()]);
        }
        // goto owner-UID
        self.add_rules(&chain, [&|rule| rule.goto(&names.owner)]);
    }

    /// Once the packet has its socket, the delivery guard looks whose it is. Without a listener `tproxy` ends its
    /// rule, and the packet is refused.
    fn deliver_rules(&mut self, names: &Names, chain: &CStr, port: u16) {
        self.add_rules(
            chain,
            [
                // meta l4proto tcp tproxy to :PORT goto guard-UID
                &|rule| rule.l4proto(Protocol::Tcp).tproxy(port).goto(&names.guard),
                // meta l4proto udp tproxy to :PORT goto guard-UID
                &|rule| rule.l4proto(Protocol::Udp).tproxy(port).goto(&names.guard),
            ],
        );
        self.refuse_rules(chain);
    }

    /// The first packet of a DNS query: it is marked for translation, unless it goes to the
    /// hijacker itself.
    fn dns_rules(&mut self, chain: &CStr, mark: Mark, hijack: &DnsHijack) {
        for address in &hijack.addresses {
            if hijack.port.get() == DNS_PORT {
                // ip daddr ADDRESS return, ip6 daddr ADDRESS return
                self.add_rules(chain, [&|rule| rule.daddr(*address).leave()]);
            }
            // A query to a stub on the loopback interface has a loopback source address, with which
            // nothing can leave the machine (__mkroute_output, net/ipv4/route.c).
            if !hijack.loopback || !address.is_loopback() {
                // ip daddr 127.0.0.0/8 return, ip6 daddr ::1 return
                self.add_rules(
                    chain,
                    [&|rule| rule.daddr_loopback(Family::of(address)).leave()],
                );
            }
        }
        let (mask, value) = (self.marks.mask(), self.marks.dns_value(mark));
        // ct mark set ct mark & ~MASK | DNS-MARK
        self.add_rules(chain, [&|rule| rule.ct_mark_set(mask, value)]);
    }

    fn resolve_rules(&mut self, chain: &CStr, hijack: &DnsHijack) {
        for address in &hijack.addresses {
            // dnat ip to ADDRESS:PORT, dnat ip6 to [ADDRESS]:PORT
            self.add_rules(chain, [&|rule| rule.dnat(*address, hijack.port.get())]);
        }
    }
}
