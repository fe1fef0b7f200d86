//! The proxies, and who answers DNS queries.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::rc::Rc;

use cgtproxy_proto::name::{InvalidProxyName, ProxyName};

use crate::config::finding::Place;
use crate::config::reader::{Reader, list};
use crate::config::yaml::{Node, Value};
use crate::config::{DnsHijack, Means, Proxy, Scheme, Upstream};
use crate::text::printable;

/// All keys of a TPROXY server.
const TPROXY_KEYS: &[&str] = &[
    "port",
    "no-tcp",
    "no-udp",
    "no-ipv4",
    "no-ipv6",
    "dns-hijack",
    "mark",
];
const REDIRECT_KEYS: &[&str] = &[
    "port",
    "no-tcp",
    "no-udp",
    "no-ipv4",
    "no-ipv6",
    "dns-hijack",
];
const RELAY_KEYS: &[&str] = &[
    "upstream",
    "no-tcp",
    "no-udp",
    "no-ipv4",
    "no-ipv6",
    "dns-hijack",
];
const DNS_HIJACK_KEYS: &[&str] = &["ip", "port", "tcp", "loopback"];

const UPSTREAM_HELP: &str = "write 'socks5h://127.0.0.1:1080', for example";

/// A map of proxies of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Section {
    Tproxies,
    Redirects,
    Proxies,
}

impl Section {
    /// All sections.
    pub(super) const ALL: [Self; 3] = [Self::Tproxies, Self::Redirects, Self::Proxies];

    /// The key of the map.
    pub(super) fn key(self) -> &'static str {
        match self {
            Self::Tproxies => "tproxies",
            Self::Redirects => "redirects",
            Self::Proxies => "proxies",
        }
    }

    /// What a proxy in the section is called.
    fn noun(self) -> &'static str {
        match self {
            Self::Tproxies => "tproxy",
            Self::Redirects => "redirect",
            Self::Proxies => "proxy",
        }
    }

    fn keys(self) -> &'static [&'static str] {
        match self {
            Self::Tproxies => TPROXY_KEYS,
            Self::Redirects => REDIRECT_KEYS,
            Self::Proxies => RELAY_KEYS,
        }
    }
}

/// The proxies of a file, of whatever kind.
#[derive(Debug, Default)]
pub(super) struct Proxies {
    /// The proxies without a mistake.
    pub(super) list: Vec<Proxy>,
    /// Where each name stands, of proxies with mistakes too.
    pub(super) places: HashMap<String, Place>,
}

impl Proxies {
    /// Puts them in the order of the file.
    pub(super) fn sort(&mut self) {
        let places = &self.places;
        self.list
            .sort_by_key(|proxy| places.get(proxy.name.as_str()).copied());
    }
}

impl Reader<'_> {
    pub(super) fn proxies(&mut self, node: &Node, section: Section, proxies: &mut Proxies) {
        let (section_key, noun) = (section.key(), section.noun());
        let Value::Map(map) = &node.value else {
            let wanted = format!("a map from names to {section_key}");
            return self.wrong_kind(node, &format!("'{section_key}'"), &wanted);
        };
        for (key, value) in map {
            let name = self.written(key);
            if let Some(first) = proxies.places.get(&name) {
                let first = *first;
                let what = format!("{noun} '{}'", printable(&name));
                self.repeated(key.place, first, &what);
                continue;
            }
            proxies.places.insert(name.clone(), key.place);
            let proxy = self.proxy(value, &name, section);
            match name.parse::<ProxyName>() {
                Err(why) => {
                    let message = format!("no {noun} can be named '{}'", printable(&name));
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
    }

    /// A proxy with a name to be filled in.
    fn proxy(&mut self, node: &Node, name: &str, section: Section) -> Option<Proxy> {
        let what = format!("{} '{}'", section.noun(), printable(name));
        let entries = self.entries(node, &what, section.keys())?;
        if let Some(mark) = entries.get("mark") {
            self.ignored(mark.place, "mark");
        }
        let (fake_dns, dns_hijack) = match entries.get("dns-hijack") {
            None => (None, None),
            // The relay can answer by itself, or be told not to.
            Some(node) if section == Section::Proxies && !matches!(node.value, Value::Map(_)) => {
                let wanted = format!(
                    "'true', 'false' or a map with the keys {}",
                    list(DNS_HIJACK_KEYS)
                );
                (self.switch(node, "'dns-hijack'", &wanted), None)
            }
            Some(node) => (None, self.dns_hijack(node)),
        };
        let hijacked = dns_hijack.is_some();
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
        let means = match section {
            Section::Proxies => {
                let upstream = match entries.get("upstream") {
                    Some(upstream) => self.upstream(upstream),
                    None => {
                        self.error(node.place, format!("{what} has no upstream"))
                            .help = Some(UPSTREAM_HELP.into());
                        None
                    }
                };
                let default = |upstream: &Upstream| !hijacked && upstream.scheme != Scheme::Socks5;
                let means = upstream.map(|upstream| Means::Relay {
                    fake_dns: fake_dns.unwrap_or_else(|| default(&upstream)),
                    upstream,
                });
                let left_out = match (no_tcp, no_udp) {
                    (false, true) => Some(("UDP", "no-udp")),
                    (true, false) => Some(("TCP", "no-tcp")),
                    _ => None,
                };
                if let Some(Means::Relay { fake_dns: true, .. }) = &means
                    && let Some((transport, key)) = left_out
                {
                    let message = format!(
                        "{transport} to names reaches nobody: {what} looks them up and leaves it out"
                    );
                    self.warning(node.place, message).help = Some(format!(
                        "remove '{key}', or write 'dns-hijack: false' to look names up here"
                    ));
                }
                means
            }
            Section::Tproxies | Section::Redirects => {
                let port = match entries.get("port") {
                    Some(port) => self.port(port),
                    None => {
                        self.error(node.place, format!("{what} has no port")).help = Some(
                            "write the port that the proxy listens on, like 'port: 7893'".into(),
                        );
                        None
                    }
                };
                port.map(match section {
                    Section::Redirects => Means::Redirect,
                    _ => Means::Tproxy,
                })
            }
        };
        Some(Proxy {
            // A stand-in of the right form: what is named otherwise never gets this far.
            name: Rc::new("tproxy".parse().ok()?),
            means: means?,
            no_tcp,
            no_udp,
            no_ipv4,
            no_ipv6,
            // One that is wrong has been reported: the file is refused.
            dns_hijack,
        })
    }

    /// The upstream of a proxy. No message has its text, in which there may be a password.
    fn upstream(&mut self, node: &Node) -> Option<Upstream> {
        match self.text(node, "'upstream'")?.parse() {
            Ok(upstream) => Some(upstream),
            Err(why) => {
                self.error(node.place, format!("this is no upstream: {why}"))
                    .help = Some(UPSTREAM_HELP.into());
                None
            }
        }
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

/// Whether no packet to one server can have this destination.
fn is_nobodys(address: IpAddr) -> bool {
    address.is_unspecified() || address.is_multicast() || address == Ipv4Addr::BROADCAST
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU16;

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

    fn relay(entries: &str) -> (Option<Means>, Vec<String>) {
        let text = format!("version: 1\nproxies: {{p: {{{entries}}}}}\n");
        let proxies = read_text(&text).0.map(|config| config.proxies);
        (
            proxies.map(|proxies| proxies[0].means.clone()),
            found(&text),
        )
    }

    #[test]
    fn names_are_looked_up_by_the_proxy_unless_it_is_said_otherwise() {
        for (entries, expected) in [
            ("upstream: 'socks5://h:1'", false),
            ("upstream: 'socks5://h:1', dns-hijack: true", true),
            ("upstream: 'socks5h://h:1'", true),
            ("upstream: 'http://h:1'", true),
            ("upstream: 'https://h:1', dns-hijack: false", false),
            ("upstream: 'socks5h://h:1', dns-hijack: {port: 53}", false),
            ("upstream: 'socks5://h:1', dns-hijack: yes", true),
            ("upstream: 'socks5h://h:1', dns-hijack: Off", false),
        ] {
            let (means, findings) = relay(entries);
            assert!(findings.is_empty(), "{findings:?}");
            let Some(Means::Relay { fake_dns, .. }) = means else {
                panic!("{means:?}");
            };
            assert_eq!(fake_dns, expected, "{entries}");
        }
        let redirect = read_text("version: 1\nredirects: {r: {port: 7892}}\n")
            .0
            .unwrap();
        let port = NonZeroU16::new(7892).unwrap();
        assert_eq!(redirect.proxies[0].means, Means::Redirect(port));
    }

    #[test]
    fn mistakes_in_proxies_are_found_and_passwords_stay_out_of_it() {
        for (entries, part) in [
            ("", "proxy 'p' has no upstream"),
            (
                "upstream: 'socks4://me:secret@h'",
                "it does not begin with 'socks5://'",
            ),
            (
                "upstream: 'http://me:secret@h:0'",
                "is no port from 1 to 65535",
            ),
            ("upstream: 'http://secret@h'", "written as 'USER:PASSWORD@'"),
            ("port: 7893", "unknown key 'port' in proxy 'p'"),
            (
                "upstream: [], no-udp: x",
                "'upstream' is a list, not a string",
            ),
            (
                "upstream: 'http://h', dns-hijack: maybe",
                "'dns-hijack' is 'maybe'; write 'true', 'false' or a map with the keys 'ip', ",
            ),
            (
                "upstream: 'http://h', dns-hijack: [53]",
                "'dns-hijack' is a list, not 'true', 'false' or a map with the keys 'ip', ",
            ),
            (
                "upstream: 'http://h', dns-hijack: 'false'",
                "'dns-hijack' is a string; write false without the quotes",
            ),
        ] {
            let (means, findings) = relay(entries);
            assert_eq!(means, None);
            assert!(findings.iter().any(|f| f.contains(part)), "{findings:?}");
            assert!(
                !findings.iter().any(|f| f.contains("secret")),
                "{findings:?}"
            );
        }
        let twice = "version: 1\ntproxies: {p: {port: 1}}\nproxies: {p: {upstream: 'http://h'}}\n";
        let findings = found(twice);
        assert!(
            findings[0].contains("proxy 'p' is there twice, first in line 2"),
            "{findings:?}"
        );
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
