//! A proxy as the helper is told of it.

use cgtproxy_proto::helper::{DnsHijack, Proxy};

use crate::config::{self, FakeAddresses, Means};
use crate::state::Relay;

/// A port where nobody can listen for the relay's queries until the relay has one: privileged, and the
/// helper lets nobody else have them.
const NOBODY: u16 = 1;

/// What is said of a proxy, where `relay` is what is known of the relay.
pub(super) fn proxy(proxy: &config::Proxy, fake: &FakeAddresses, relay: &Relay) -> Proxy {
    let mut networks = None;
    let mut dns_hijack = proxy.dns_hijack.as_ref().map(|hijack| DnsHijack {
        ipv4: hijack.ipv4.map(|address| address.to_string()),
        ipv6: hijack.ipv6.map(|address| address.to_string()),
        port: hijack.port.get().into(),
        tcp: Some(hijack.tcp),
        loopback: Some(hijack.loopback),
        own: None,
    });
    let (port, redirect, tcp_alone) = match &proxy.means {
        Means::Tproxy(port) => (port.get(), false, false),
        Means::Redirect(port) => (port.get(), true, false),
        Means::Relay { upstream, fake_dns } => {
            if *fake_dns {
                let text = |(address, prefix)| format!("{address}/{prefix}");
                networks = Some(fake.networks().map(text));
                dns_hijack = Some(DnsHijack {
                    ipv4: Some("127.0.0.1".to_owned()),
                    ipv6: Some("::1".to_owned()),
                    port: relay.dns_port(proxy).unwrap_or(NOBODY).into(),
                    tcp: Some(true),
                    loopback: Some(true),
                    own: Some(true),
                });
            }
            (relay.port(proxy), true, upstream.scheme.is_http())
        }
    };
    let [fake_ipv4, fake_ipv6] = networks.map_or([None, None], |networks| networks.map(Some));
    Proxy {
        name: proxy.name.to_string(),
        port: port.into(),
        redirect: Some(redirect),
        rejectUdp: Some(tcp_alone && !proxy.no_udp),
        noTcp: Some(proxy.no_tcp),
        noUdp: Some(proxy.no_udp),
        noIpv4: Some(proxy.no_ipv4),
        noIpv6: Some(proxy.no_ipv6),
        dnsHijack: dns_hijack,
        fakeIpv4: fake_ipv4,
        fakeIpv6: fake_ipv6,
    }
}
