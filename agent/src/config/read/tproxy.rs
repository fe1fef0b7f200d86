//! The proxies, and who answers DNS queries.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU16;
use std::rc::Rc;

use cgtproxy_proto::name::{InvalidProxyName, ProxyName};

use crate::config::finding::Place;
use crate::config::reader::Reader;
use crate::config::yaml::{Node, Value};
use crate::config::{DnsHijack, Proxy};
use crate::text::printable;

/// All keys of a proxy.
pub(in crate::config) const TPROXY_KEYS: &[&str] = &[
    "port",
    "no-tcp",
    "no-udp",
    "no-ipv4",
    "no-ipv6",
    "dns-hijack",
    "mark",
];
const DNS_HIJACK_KEYS: &[&str] = &["ip", "port", "tcp", "loopback"];

/// The tproxies of a file.
#[derive(Debug, Default)]
pub(super) struct Proxies {
    /// Those that are right.
    pub(super) list: Vec<Proxy>,
    /// All that are named.
    pub(super) places: HashMap<String, Place>,
}

impl Reader<'_> {
    pub(super) fn tproxies(&mut self, node: &Node) -> Proxies {
        let mut proxies = Proxies::default();
        let Value::Map(map) = &node.value else {
            self.wrong_kind(node, "'tproxies'", "a map from names to tproxies");
            return proxies;
        };
        for (key, value) in map {
            let name = self.written(key);
            if let Some(first) = proxies.places.get(&name) {
                let first = *first;
                let what = format!("tproxy '{}'", printable(&name));
                self.repeated(key.place, first, &what);
                continue;
            }
            proxies.places.insert(name.clone(), key.place);
            let proxy = self.tproxy(value, &name);
            match name.parse::<ProxyName>() {
                Err(why) => {
                    let message = format!("no tproxy can be named '{}'", printable(&name));
                    self.error(key.place, message).help = Some(match why {
                        InvalidProxyName::Reserved => {
                            "'direct', 'drop' and 'drop-all' are targets already".into()
                        }
                        why => why.to_string(),
                    });
                }
                Ok(name) => {
                    if name.as_str().contains("--") || name.as_str().ends_with('-') {
                        self.warning(key.place, format!("cgtproxy-exec can't use '{name}'"))
                            .help = Some("systemd has no slices with such names; use single '-' between other characters".into());
                    }
                    if let Some(proxy) = proxy {
                        let name = Rc::new(name);
                        proxies.list.push(Proxy { name, ..proxy });
                    }
                }
            }
        }
        proxies
    }

    /// A tproxy with a name to be filled in.
    fn tproxy(&mut self, node: &Node, name: &str) -> Option<Proxy> {
        let what = format!("tproxy '{}'", printable(name));
        let entries = self.entries(node, &what, TPROXY_KEYS)?;
        if let Some(mark) = entries.get("mark") {
            self.ignored(mark.place, "mark");
        }
        let dns_hijack = entries
            .get("dns-hijack")
            .map(|hijack| self.dns_hijack(hijack));
        let mut switch = |key: &str| {
            entries
                .get(key)
                .and_then(|node| self.boolean(node, &format!("'{key}'")))
                .unwrap_or(false)
        };
        let (no_tcp, no_udp) = (switch("no-tcp"), switch("no-udp"));
        let (no_ipv4, no_ipv6) = (switch("no-ipv4"), switch("no-ipv6"));
        if (no_tcp && no_udp) || (no_ipv4 && no_ipv6) {
            self.warning(node.place, format!("nothing goes through {what}"))
                .help = Some("what it leaves out goes direct".into());
        }
        let port = match entries.get("port") {
            Some(port) => self.port(port),
            None => {
                self.error(node.place, format!("{what} has no port")).help =
                    Some("write the port that the proxy listens on, like 'port: 7893'".into());
                None
            }
        };
        Some(Proxy {
            // A stand-in of the right form: what is named otherwise never gets this far.
            name: Rc::new("tproxy".parse().ok()?),
            port: port?,
            no_tcp,
            no_udp,
            no_ipv4,
            no_ipv6,
            // One that is wrong has been reported: the file is refused.
            dns_hijack: dns_hijack.flatten(),
        })
    }

    fn port(&mut self, node: &Node) -> Option<NonZeroU16> {
        if let Value::Integer(number) = node.value
            && let Some(port) = u16::try_from(number).ok().and_then(NonZeroU16::new)
        {
            return Some(port);
        }
        let written = printable(&self.written(node));
        self.error(node.place, format!("'{written}' is no port"))
            .help = Some("a port is a number from 1 to 65535".into());
        None
    }

    fn dns_hijack(&mut self, node: &Node) -> Option<DnsHijack> {
        let entries = self.entries(node, "'dns-hijack'", DNS_HIJACK_KEYS)?;
        let (mut ipv4, mut ipv6) = match entries.get("ip") {
            Some(_) => (None, None),
            None => (Some(Ipv4Addr::LOCALHOST), Some(Ipv6Addr::LOCALHOST)),
        };
        let listed = match entries.get("ip") {
            Some(Node {
                value: Value::List(items),
                ..
            }) => items.as_slice(),
            Some(ip) => std::slice::from_ref(ip),
            None => &[],
        };
        for ip in listed {
            let Some(text) = self.text(ip, "'ip'") else {
                continue;
            };
            let second = match text.parse() {
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
        let port = match entries.get("port") {
            Some(port) => self.port(port),
            None => {
                self.error(node.place, "'dns-hijack' has no port").help =
                    Some("write the port that answers DNS queries, like 'port: 53'".into());
                None
            }
        };
        let mut switch = |key: &str, default| {
            entries
                .get(key)
                .and_then(|node| self.boolean(node, &format!("'{key}'")))
                .unwrap_or(default)
        };
        let (tcp, loopback) = (switch("tcp", false), switch("loopback", true));
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
