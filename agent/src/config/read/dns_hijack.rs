//! Who answers DNS queries in place of the server that is asked.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::config::DnsHijack;
use crate::config::reader::{Reader, one_or_more};
use crate::config::yaml::Node;
use crate::text::printable;

pub(super) const DNS_HIJACK_KEYS: &[&str] = &["ip", "port", "tcp", "loopback"];

impl Reader<'_> {
    pub(super) fn dns_hijack(&mut self, node: &Node) -> Option<DnsHijack> {
        let entries = self.entries(node, "'dns-hijack'", DNS_HIJACK_KEYS)?;
        let (ipv4, ipv6) = match entries.get("ip") {
            Some(ip) => self.addresses(ip),
            None => (Some(Ipv4Addr::LOCALHOST), Some(Ipv6Addr::LOCALHOST)),
        };
        let port = match entries.get("port") {
            Some(port) => self.port(port),
            None => {
                self.error(node.place, "'dns-hijack' has no port").help =
                    Some("write the port that answers DNS queries, like 'port: 53'".into());
                None
            }
        };
        let tcp = self.flag(&entries, "tcp", false);
        let loopback = self.flag(&entries, "loopback", true);
        let remote = ipv4.is_some_and(|address| !address.is_loopback())
            || ipv6.is_some_and(|address| !address.is_loopback());
        if remote && loopback {
            self.warning(node.place, "queries to a stub like 127.0.0.53 go to the stub").help =
                Some(
                    "they can't be sent to a server elsewhere; 'loopback: false' says that this is meant"
                        .into(),
                );
        }
        Some(DnsHijack {
            ipv4,
            ipv6,
            port: port?,
            tcp,
            loopback,
        })
    }

    /// One address, or one of each family.
    fn addresses(&mut self, node: &Node) -> (Option<Ipv4Addr>, Option<Ipv6Addr>) {
        let (mut ipv4, mut ipv6) = (None, None);
        for ip in one_or_more(node) {
            let Some(text) = self.text(ip, "'ip'") else {
                continue;
            };
            let second = match text.parse() {
                Ok(address) if is_nobodys(address) => {
                    let message = format!("'{address}' is the address of no server");
                    self.error(ip.place, message).help = Some(
                        "write the address that the DNS server listens on, like '127.0.0.1'".into(),
                    );
                    continue;
                }
                Ok(IpAddr::V4(address)) => ipv4.replace(address).is_some(),
                Ok(IpAddr::V6(address)) => ipv6.replace(address).is_some(),
                Err(_) => {
                    let message = format!("'{}' is no IPv4 or IPv6 address", printable(&text));
                    self.error(ip.place, message);
                    continue;
                }
            };
            if second {
                self.error(ip.place, "'ip' has two addresses of one family")
                    .help = Some("one IPv4 and one IPv6 address answer queries over each".into());
            }
        }
        (ipv4, ipv6)
    }
}

/// Whether no packet to one server can have this destination.
fn is_nobodys(address: IpAddr) -> bool {
    address.is_unspecified() || address.is_multicast() || address == Ipv4Addr::BROADCAST
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::read::tests::{found, read_text};

    fn hijack(entries: &str) -> (Option<DnsHijack>, Vec<String>) {
        let text = format!("version: 1\ntproxies:\n  p:\n    port: 1\n    dns-hijack: {entries}\n");
        let proxies = read_text(&text).0.map(|config| config.proxies);
        (
            proxies.and_then(|proxies| proxies[0].dns_hijack.clone()),
            found(&text),
        )
    }

    #[test]
    fn dns_goes_to_this_machine_unless_told_otherwise() {
        let (both, _) = hijack("{port: 5353}");
        let both = both.unwrap();
        assert_eq!(both.ipv4, Some(Ipv4Addr::LOCALHOST));
        assert_eq!(both.ipv6, Some(Ipv6Addr::LOCALHOST));
        assert!(both.loopback && !both.tcp);
        let (one, findings) = hijack("{ip: 127.0.0.1, port: 53, tcp: true}");
        let one = one.unwrap();
        assert_eq!(
            (one.ipv4, one.ipv6, one.tcp),
            (Some(Ipv4Addr::LOCALHOST), None, true)
        );
        assert!(findings.is_empty(), "{findings:?}");
        let (two, findings) =
            hijack("{ip: [192.0.2.1, \"2001:db8::1\"], port: 53, loopback: false}");
        let two = two.unwrap();
        assert!(two.ipv4.is_some() && two.ipv6.is_some() && !two.loopback);
        assert!(findings.is_empty(), "{findings:?}");
    }

    #[test]
    fn dns_mistakes_are_found() {
        for (entries, part) in [
            ("{ip: x, port: 53}", "'x' is no IPv4 or IPv6 address"),
            (
                "{ip: 0.0.0.0, port: 53}",
                "'0.0.0.0' is the address of no server; write the address",
            ),
            ("{ip: ['::'], port: 53}", "'::' is the address of no server"),
            (
                "{ip: 224.0.0.1, port: 53}",
                "'224.0.0.1' is the address of no server",
            ),
            (
                "{port: '53'}",
                "'port' is a string; write 53 without the quotes",
            ),
            (
                "{ip: [1.1.1.1, 8.8.8.8], port: 53}",
                "two addresses of one family",
            ),
            ("{ip: 1.1.1.1}", "has no port"),
            ("{port: 0}", "'0' is no port"),
            ("{port: 53, loopbak: false}", "did you mean 'loopback'?"),
            (
                "{ip: 192.0.2.1, port: 53}",
                "queries to a stub like 127.0.0.53 go to the stub",
            ),
        ] {
            let (_, findings) = hijack(entries);
            assert!(
                findings.iter().any(|finding| finding.contains(part)),
                "{findings:?}"
            );
        }
    }
}
