//! The proxies.

use std::collections::HashMap;
use std::num::NonZeroU16;
use std::rc::Rc;

use cgtproxy_proto::name::{InvalidProxyName, ProxyName};

use crate::config::finding::Place;
use crate::config::reader::{Entries, Reader, list, one_or_more};
use crate::config::yaml::{Node, Value};
use crate::config::{Means, Proxy, Scheme, Upstream};
use crate::text::printable;

use super::dns_hijack::DNS_HIJACK_KEYS;

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
    "upstream-user",
    "no-tcp",
    "no-udp",
    "no-ipv4",
    "no-ipv6",
    "dns-hijack",
];

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
        let mut leaves_out = |key| self.flag(&entries, key, false);
        let (no_tcp, no_udp) = (leaves_out("no-tcp"), leaves_out("no-udp"));
        let (no_ipv4, no_ipv6) = (leaves_out("no-ipv4"), leaves_out("no-ipv6"));
        if (no_tcp && no_udp) || (no_ipv4 && no_ipv6) {
            self.warning(node.place, format!("nothing goes through {what}"))
                .help = Some("what it leaves out goes direct".into());
        }
        let means = match section {
            Section::Tproxies => self.own_port(node, &what, &entries).map(Means::Tproxy),
            Section::Redirects => self.own_port(node, &what, &entries).map(Means::Redirect),
            Section::Proxies => {
                let upstream = self.upstream(node, &what, &entries);
                upstream.map(|upstream| Means::Relay {
                    fake_dns: fake_dns
                        .unwrap_or(dns_hijack.is_none() && upstream.scheme != Scheme::Socks5),
                    upstream,
                })
            }
        };
        if let Some(Means::Relay { fake_dns: true, .. }) = &means {
            self.warn_of_names_left_out(node.place, &what, no_tcp, no_udp);
        }
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

    /// The port of a server on this machine.
    fn own_port(&mut self, node: &Node, what: &str, entries: &Entries<'_>) -> Option<NonZeroU16> {
        let Some(port) = entries.get("port") else {
            self.error(node.place, format!("{what} has no port")).help =
                Some("write the port that the proxy listens on, like 'port: 7893'".into());
            return None;
        };
        self.port(port)
    }

    /// The upstream of a proxy. No message has its text, in which there may be a password.
    fn upstream(&mut self, node: &Node, what: &str, entries: &Entries<'_>) -> Option<Upstream> {
        let Some(upstream) = entries.get("upstream") else {
            self.error(node.place, format!("{what} has no upstream"))
                .help = Some(UPSTREAM_HELP.into());
            return None;
        };
        let users = entries.get("upstream-user");
        let users = users.map_or_else(Vec::new, |users| self.users(users));
        match self.text(upstream, "'upstream'")?.parse() {
            Ok(upstream) => Some(Upstream { users, ..upstream }),
            Err(why) => {
                self.error(upstream.place, format!("this is no upstream: {why}"))
                    .help = Some(UPSTREAM_HELP.into());
                None
            }
        }
    }

    /// Uids, of which `u32::MAX` is none.
    fn users(&mut self, node: &Node) -> Vec<u32> {
        let uid = |value: &Value| match value {
            Value::Integer(number) => u32::try_from(*number).ok().filter(|uid| *uid != u32::MAX),
            _ => None,
        };
        let mut users = Vec::new();
        for node in one_or_more(node) {
            if let Some(uid) = uid(&node.value) {
                users.push(uid);
                continue;
            }
            let written = self.written(node);
            let bare = node.value.without_quotes();
            if bare.as_ref().and_then(uid).is_some() {
                self.quoted(node, "'upstream-user'", &written);
                continue;
            }
            let message = format!(
                "'upstream-user' is '{}', which is no uid",
                printable(&written)
            );
            self.error(node.place, message).help =
                Some("write the user's number, which 'id -u NAME' prints".into());
        }
        users
    }

    /// Warns of a proxy that looks names up and does not take what goes to them.
    fn warn_of_names_left_out(&mut self, place: Place, what: &str, no_tcp: bool, no_udp: bool) {
        let (transport, key) = match (no_tcp, no_udp) {
            (false, true) => ("UDP", "no-udp"),
            (true, false) => ("TCP", "no-tcp"),
            _ => return,
        };
        let message =
            format!("{transport} to names reaches nobody: {what} looks them up and leaves it out");
        self.warning(place, message).help = Some(format!(
            "remove '{key}', or write 'dns-hijack: false' to look names up here"
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::read::tests::{found, read_text};

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
    fn users_of_an_upstream_are_numbers() {
        for (entries, expected) in [
            ("", &[][..]),
            (", upstream-user: 1002", &[1002]),
            (
                ", upstream-user: [0, 100000, 4294967294]",
                &[0, 100_000, 4_294_967_294],
            ),
            (", upstream-user: []", &[]),
        ] {
            let (means, findings) = relay(&format!("upstream: 'socks5://h:1'{entries}"));
            assert!(findings.is_empty(), "{findings:?}");
            let Some(Means::Relay { upstream, .. }) = means else {
                panic!("{means:?}");
            };
            assert_eq!(upstream.users, expected, "{entries}");
        }
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
                "upstream: 'http://h', upstream-user: [1, bob]",
                "'upstream-user' is 'bob', which is no uid",
            ),
            (
                "upstream: 'http://h', upstream-user: '7'",
                "'upstream-user' is a string; write 7 without the quotes",
            ),
            (
                "upstream: 'http://h', upstream-user: 4294967295",
                "is no uid; write the user's number",
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
}
