//! DNS queries that go to another server than they ask: which of them, where to, and who may answer.

use std::ffi::CStr;
use std::net::IpAddr;

use cgtproxy_proto::name::ProxyName;

use super::names::{Names, ProxyChain};
use super::plan::Layout;
use super::policy::DnsHijack;
use super::rule::Protocol;
use super::ruleset::REFUSE;
use super::transaction::Transaction;
use crate::cgroup::Slices;
use crate::mark::Mark;
use crate::route::Family;

/// The port of DNS (RFC 1035, 4.2).
const DNS_PORT: u16 = 53;

impl Transaction<'_> {
    /// DNS queries of the family of this address go to the chain `dns`.
    pub(super) fn query_rules(&mut self, chain: &CStr, address: &IpAddr, tcp: bool, dns: &CStr) {
        let family = Family::of(address);
        let protocols: &[Protocol] = match tcp {
            true => &[Protocol::Udp, Protocol::Tcp],
            false => &[Protocol::Udp],
        };
        for &protocol in protocols {
            // meta nfproto FAMILY PROTOCOL dport 53 goto dns-UID-NAME
            self.add_rules(
                chain,
                [&|rule| rule.nfproto(family).dport(protocol, DNS_PORT).goto(dns)],
            );
        }
    }

    /// Chain `dns-UID-NAME`: the first packet of a DNS query is marked for translation, unless it goes to the hijacker
    /// itself. Later ones come here by that mark, which may have been another user's when the conversation began.
    pub(super) fn dns_rules(
        &mut self,
        names: &Names,
        layout: &Layout,
        name: &ProxyName,
        mark: Mark,
        hijack: &DnsHijack,
    ) {
        let chain = &names.chain(ProxyChain::Dns, name);
        let (mask, value) = (self.marks.mask(), self.marks.dns_value(mark));
        // ct status confirmed ct mark & MASK != 0 …: return
        self.whose_rules(
            chain,
            names,
            layout,
            |rule| rule.ct_confirmed().ct_mark_has(mask),
            |rule| rule.return_(),
        );
        for address in &hijack.addresses {
            if hijack.port.get() == DNS_PORT {
                // ip daddr ADDRESS return, ip6 daddr ADDRESS return
                self.add_rules(chain, [&|rule| rule.daddr(*address).return_()]);
            }
            // A query to a stub on the loopback interface has a loopback source address, with which
            // nothing can leave the machine (__mkroute_output, net/ipv4/route.c).
            if !hijack.loopback || !address.is_loopback() {
                // ip daddr 127.0.0.0/8 return, ip6 daddr ::1 return
                self.add_rules(
                    chain,
                    [&|rule| rule.daddr_loopback(Family::of(address)).return_()],
                );
            }
        }
        if hijack.addresses.iter().any(IpAddr::is_ipv6) {
            // A link-local address is one of an interface, to which the socket is bound: translated, the query would
            // be sent there. Its sender should not have to wait before asking the next server.
            // ip6 daddr fe80::/10 goto refuse
            self.add_rules(chain, [&|rule| rule.daddr_link_local().goto(REFUSE)]);
        }
        self.add_rules(
            chain,
            [
                // As in `new_rules`.
                // ct status confirmed goto refuse
                &|rule| rule.ct_confirmed().goto(REFUSE),
                // ct mark set ct mark & ~MASK | DNS-MARK accept
                &|rule| rule.ct_mark_set(mask, value).accept(),
                // What is not tracked can't be translated.
                // goto refuse
                &|rule| rule.goto(REFUSE),
            ],
        );
    }

    /// Chain `resolve-UID-NAME`: the translation of DNS queries.
    pub(super) fn resolve_rules(&mut self, chain: &CStr, hijack: &DnsHijack) {
        for address in &hijack.addresses {
            // dnat ip to ADDRESS:PORT, dnat ip6 to [ADDRESS]:PORT
            self.add_rules(chain, [&|rule| rule.dnat(*address, hijack.port.get())]);
        }
    }

    /// Chain `receive-UID-NAME`, for DNS queries. A DNS server is often a service of the machine's, in whatever control
    /// group, and a user may have an own one in any session. None is below a slice of another user's. In the system's
    /// policy, it is whoever has the server's address and port: the mark may have been a user's when the conversation
    /// began.
    pub(super) fn answerer_rules(
        &mut self,
        names: &Names,
        layout: &Layout,
        name: &ProxyName,
        mark: Mark,
        hijack: &DnsHijack,
    ) {
        let chain = &names.chain(ProxyChain::Receive, name);
        let (mask, value) = (self.marks.mask(), self.marks.dns_value(mark));
        if let Some(Slices { users, own }) = layout.subtree.slices() {
            let (users, own) = (users.to_bytes(), own.to_bytes());
            self.add_rules(
                chain,
                [
                    // ct mark & MASK == DNS-MARK socket cgroupv2 level 2 user-UID.slice return
                    &|rule| {
                        rule.ct_mark_is(mask, value)
                            .socket_cgroupv2(2, &own)
                            .return_()
                    },
                    // ct mark & MASK == DNS-MARK socket cgroupv2 level 1 user.slice goto refuse
                    &|rule| {
                        rule.ct_mark_is(mask, value)
                            .socket_cgroupv2(1, &users)
                            .goto(REFUSE)
                    },
                ],
            );
        }
        if !names.is_system() {
            // ct mark & MASK == DNS-MARK return
            return self.add_rules(chain, [&|rule| rule.ct_mark_is(mask, value).return_()]);
        }
        for address in &hijack.addresses {
            for protocol in [Protocol::Udp, Protocol::Tcp] {
                // ct mark & MASK == DNS-MARK ip daddr ADDRESS PROTOCOL dport PORT return
                self.add_rules(
                    chain,
                    [&|rule| {
                        rule.ct_mark_is(mask, value)
                            .daddr(*address)
                            .dport(protocol, hijack.port.get())
                            .return_()
                    }],
                );
            }
        }
        // What the kernel says of such a conversation (ICMP) is not looked at.
        for protocol in [Protocol::Udp, Protocol::Tcp] {
            // ct mark & MASK == DNS-MARK meta l4proto PROTOCOL goto refuse
            self.add_rules(
                chain,
                [&|rule| rule.ct_mark_is(mask, value).l4proto(protocol).goto(REFUSE)],
            );
        }
    }
}
