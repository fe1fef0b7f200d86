//! From what was typed to what it means. Nothing stops at the first mistake.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU16;
use std::path::Path;
use std::rc::Rc;

use cgtproxy_proto::name::{InvalidProxyName, ProxyName};

use super::finding::{Excerpt, Finding, Findings, Place, Severity};
use super::reader::{Reader, list, nearest};
use super::yaml::{self, Node, Value};
use super::{Config, DnsHijack, Network, Proxy};
use crate::policy::{ExecSlices, Pattern, PatternError, Rule, Rules, Selector, Target};
use crate::text::printable;

/// The version of the format.
const VERSION: i128 = 1;

/// All keys of the file.
const KEYS: &[&str] = &[
    "version",
    "bypass",
    "tproxies",
    "rules",
    "exec-slices",
    "cgroup-root",
    "route-table",
];
const TPROXY_KEYS: &[&str] = &["port", "no-udp", "no-ipv6", "dns-hijack", "mark"];
const DNS_HIJACK_KEYS: &[&str] = &["ip", "port", "tcp", "loopback"];
const RULE_KEYS: &[&str] = &["match", "tproxy", "drop", "direct"];

/// Reads the text of `file`: what it means, unless there are errors, and all that was found.
#[must_use]
pub fn read(file: &Path, bytes: &[u8]) -> (Option<Config>, Findings) {
    let mut findings = Findings::new(file);
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text.strip_prefix('\u{feff}').unwrap_or(text),
        Err(error) => {
            let (valid, _) = bytes.split_at(error.valid_up_to());
            let line = valid.split(|&b| b == b'\n').count() as u64;
            let column = String::from_utf8_lossy(valid)
                .rsplit('\n')
                .next()
                .map_or(0, |last| last.chars().count()) as u64
                + 1;
            let place = Place { line, column };
            let message = "this byte is not UTF-8";
            findings
                .list
                .push(Finding::new(Severity::Error, place, message));
            return (None, findings);
        }
    };
    let root = match yaml::parse(text) {
        Ok(root) => root,
        Err(error) => {
            findings.list.push(Finding {
                severity: Severity::Error,
                place: error.place,
                message: printable(&error.message),
                help: None,
                excerpt: None,
            });
            return (None, findings);
        }
    };
    let mut reader = Reader::new(text, findings);
    let config = reader.config(&root);
    let findings = reader.finish();
    (config.filter(|_| !findings.has_errors()), findings)
}

impl Reader<'_> {
    fn config(&mut self, root: &Node) -> Option<Config> {
        if matches!(root.value, Value::Null) {
            self.error(root.place, "the file is empty").help =
                Some("it says at least 'version: 1'".into());
            return None;
        }
        let top = self.entries(root, "the file", KEYS)?;
        match top.get("version") {
            None => {
                self.error(root.place, "there is no key 'version'").help =
                    Some("write 'version: 1'".into());
            }
            Some(node) if !matches!(node.value, Value::Integer(VERSION)) => {
                let version = printable(&self.written(node));
                self.error(node.place, format!("version '{version}' is unknown"))
                    .help = Some("write 'version: 1'".into());
            }
            Some(_) => {}
        }
        for key in ["cgroup-root", "route-table"] {
            if let Some(node) = top.get(key) {
                self.ignored(node.place, key);
            }
        }
        let exec_slices = top
            .get("exec-slices")
            .and_then(|node| self.boolean(node, "'exec-slices'"))
            .unwrap_or(true);
        let bypass = top.get("bypass").map_or_else(Vec::new, |n| self.bypass(n));
        let proxies = top
            .get("tproxies")
            .map_or_else(Proxies::default, |n| self.tproxies(n));
        let rules = top
            .get("rules")
            .map_or_else(Vec::new, |n| self.rules(n, &proxies, exec_slices));
        let exec_slices =
            exec_slices.then(|| ExecSlices::new(proxies.list.iter().map(|p| &p.name)));
        Some(Config {
            proxies: proxies.list,
            bypass,
            rules: Rc::new(Rules { exec_slices, rules }),
        })
    }

    fn ignored(&mut self, place: Place, key: &str) {
        self.warning(place, format!("'{key}' is ignored")).help =
            Some("the helper sees to it now; the line can go".into());
    }

    fn bypass(&mut self, node: &Node) -> Vec<Network> {
        let Value::List(items) = &node.value else {
            self.wrong_kind(node, "'bypass'", "a list of addresses and networks");
            return Vec::new();
        };
        let mut networks = Vec::new();
        for item in items {
            let Some(text) = self.text(item, "an entry of 'bypass'") else {
                continue;
            };
            match text.parse::<Network>() {
                Err(why) => {
                    let message = format!("'{}' can't be bypassed: {why}", printable(&text));
                    self.error(item.place, message).help =
                        Some("write an address like '192.0.2.1' or a network like '10.0.0.0/8' or 'fe80::/10'".into());
                }
                Ok(named) => {
                    let network = named.network();
                    if network != named {
                        let message = format!("'{text}' is not the first address of its network");
                        self.warning(item.place, message).help =
                            Some(format!("it is taken as '{network}'"));
                    }
                    networks.push(network);
                }
            }
        }
        networks
    }

    fn tproxies(&mut self, node: &Node) -> Proxies {
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
        let (no_udp, no_ipv6) = (switch("no-udp"), switch("no-ipv6"));
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
            no_udp,
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

    fn rules(&mut self, node: &Node, proxies: &Proxies, exec_slices: bool) -> Vec<Rule> {
        let Value::List(items) = &node.value else {
            self.wrong_kind(node, "'rules'", "a list of rules");
            return Vec::new();
        };
        let mut rules: Vec<Rule> = Vec::new();
        let mut reached: Vec<(Place, usize, Rule)> = Vec::new();
        let mut used: Vec<String> = Vec::new();
        for (item, number) in items.iter().zip(1usize..) {
            let Some(rule) = self.rule(item, proxies, &mut used) else {
                continue;
            };
            self.warn_if_unreachable(item.place, &rule, &reached);
            reached.push((item.place, number, rule.clone()));
            rules.push(rule);
        }
        if !exec_slices {
            for proxy in &proxies.list {
                let name = proxy.name.as_str();
                if !used.iter().any(|used| used == name)
                    && let Some(place) = proxies.places.get(name)
                {
                    self.warning(*place, format!("no rule uses tproxy '{name}'"));
                }
            }
        }
        rules
    }

    fn warn_if_unreachable(&mut self, place: Place, rule: &Rule, earlier: &[(Place, usize, Rule)]) {
        let hider = earlier.iter().find_map(|(place, number, other)| {
            if other.selector.is_catch_all() {
                Some((place.line, number, "matches everything"))
            } else if other.selector.is_same_as(&rule.selector) {
                Some((place.line, number, "matches the same"))
            } else {
                None
            }
        });
        if let Some((line, number, why)) = hider {
            self.warning(place, "this rule is never reached").help = Some(format!(
                "rule {number} in line {line} comes first and {why}"
            ));
        }
    }

    fn rule(&mut self, node: &Node, proxies: &Proxies, used: &mut Vec<String>) -> Option<Rule> {
        let entries = self.entries(node, "a rule", RULE_KEYS)?;
        let selector = match entries.get("match") {
            None => {
                self.error(node.place, "this rule has no 'match'").help = Some(
                    "write a regular expression; an empty one in quotes matches everything".into(),
                );
                None
            }
            Some(pattern) => self.pattern(pattern).map(Selector::Match),
        };
        let mut targets: Vec<(&str, Option<Target>)> = Vec::new();
        if let Some(tproxy) = entries.get("tproxy") {
            let target = self.reference(tproxy, proxies, used);
            targets.push(("tproxy", target));
        }
        if let Some(drop) = entries.get("drop") {
            let all = matches!(&drop.value, Value::Text(text) if text == "all");
            let target = match all {
                true => Some(Some(Target::DropAll)),
                false => self
                    .switch(
                        drop,
                        "'drop'",
                        "'true', or 'all' to drop bypassed destinations too",
                    )
                    .map(|drop| drop.then_some(Target::Drop)),
            };
            push_target(&mut targets, "drop", target);
        }
        if let Some(direct) = entries.get("direct") {
            let target = self
                .boolean(direct, "'direct'")
                .map(|direct| direct.then_some(Target::Direct));
            push_target(&mut targets, "direct", target);
        }
        let names: Vec<&str> = targets.iter().map(|(name, _)| *name).collect();
        match targets.as_slice() {
            [(_, target)] => Some(Rule {
                selector: selector?,
                target: target.clone()?,
            }),
            [] => {
                self.error(node.place, "this rule has no target").help =
                    Some("write one of 'tproxy: NAME', 'drop: true', 'direct: true'".into());
                None
            }
            _ => {
                let message = format!("this rule has {} targets: {}", names.len(), list(&names));
                self.error(node.place, message).help = Some("keep one of them".into());
                None
            }
        }
    }

    /// The proxy that a rule names.
    fn reference(
        &mut self,
        node: &Node,
        proxies: &Proxies,
        used: &mut Vec<String>,
    ) -> Option<Target> {
        let name = self.text(node, "'tproxy'")?;
        if proxies.places.contains_key(&name) {
            used.push(name.clone());
            // Known, but wrong itself: that has been said where it stands.
            let proxy = proxies.list.iter().find(|p| p.name.as_str() == name)?;
            return Some(Target::Proxy(proxy.name.clone()));
        }
        let mut names: Vec<&str> = proxies.places.keys().map(String::as_str).collect();
        names.sort_unstable();
        let help = match name.as_str() {
            "direct" => "write 'direct: true'".to_owned(),
            "drop" | "drop-all" => "write 'drop: true' or 'drop: all'".to_owned(),
            _ => match nearest(&name, names.iter().copied()) {
                Some(near) => format!("did you mean '{near}'?"),
                None if names.is_empty() => "there are none under 'tproxies'".to_owned(),
                None => format!("known are {}", list(&names)),
            },
        };
        let message = format!("there is no tproxy '{}'", printable(&name));
        self.error(node.place, message).help = Some(help);
        None
    }

    fn pattern(&mut self, node: &Node) -> Option<Pattern> {
        let text = self.text(node, "'match'")?;
        match Pattern::new(&text) {
            Ok(pattern) => Some(pattern),
            Err(PatternError { message, span }) => {
                let span = span.unwrap_or(0..text.len());
                let before = text.get(..span.start).unwrap_or_default();
                let place = self.place_within(node, &text, before);
                let finding = self.error(place, format!("bad regular expression: {message}"));
                // One line of it: a pattern may span several.
                let line_before = before.rsplit('\n').next().unwrap_or_default();
                let rest = text.get(span.start..).unwrap_or_default();
                let part = text.get(span).unwrap_or_default();
                let part = part.split('\n').next().unwrap_or_default();
                finding.excerpt = Some(Excerpt {
                    line: format!(
                        "{line_before}{}",
                        rest.split('\n').next().unwrap_or_default()
                    ),
                    before: printable(line_before).chars().count(),
                    length: printable(part).chars().count(),
                });
                None
            }
        }
    }

    /// Where in the file the part of a scalar after `before` stands, if it is written there as it is.
    fn place_within(&self, node: &Node, value: &str, before: &str) -> Place {
        let source = node.range.clone().and_then(|range| self.text.get(range));
        let shift = match source {
            Some(source) if source == value => 0,
            Some(source)
                if source
                    .strip_prefix(['"', '\''])
                    .and_then(|s| s.strip_suffix(['"', '\'']))
                    == Some(value) =>
            {
                1
            }
            _ => return node.place,
        };
        if before.contains('\n') {
            return node.place;
        }
        Place {
            column: node.place.column + shift + before.chars().count() as u64,
            ..node.place
        }
    }
}

/// Counts a target that is there: wrong ones count, switched off ones do not.
fn push_target<'a>(
    targets: &mut Vec<(&'a str, Option<Target>)>,
    key: &'a str,
    target: Option<Option<Target>>,
) {
    match target {
        None => targets.push((key, None)),
        Some(Some(target)) => targets.push((key, Some(target))),
        Some(None) => {}
    }
}

/// The tproxies of a file.
#[derive(Debug, Default)]
struct Proxies {
    /// Those that are right.
    list: Vec<Proxy>,
    /// All that are named.
    places: HashMap<String, Place>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read_text(text: &str) -> (Option<Config>, Findings) {
        read(Path::new("c.yaml"), text.as_bytes())
    }

    /// Findings as `line:column: severity: message; help`.
    fn found(text: &str) -> Vec<String> {
        let (config, findings) = read_text(text);
        assert_eq!(config.is_none(), findings.has_errors());
        findings
            .lines()
            .map(|(severity, line)| {
                let line = line.strip_prefix("c.yaml").unwrap();
                let line = line.strip_prefix(':').unwrap_or(line);
                format!("{} {line}", severity.name())
            })
            .collect()
    }

    /// The example of the original's documentation, shortened.
    const ORIGINAL: &str = r#"
version: 1
cgroup-root: AUTO
route-table: 300
bypass:
  - 127.0.0.0/8
  - 192.168.0.0/16
  - ::1
tproxies:
  clash-meta:
    mark: 0x100
    port: 7893
    no-udp: false
    no-ipv6: yes
    dns-hijack:
      ip: 127.0.0.1
      port: 53
      tcp: true
rules:
  - match: \/user\.slice\/user-\d+\.slice\/user@\d+\.service\/app\.slice\/app-clash\.service
    direct: true
  - match: "\\/user\\.slice\\/.*\\/app-game\\.scope"
    drop: true
  - match: |
      \/user\.slice
    drop: all
  - match: .*
    tproxy: clash-meta
"#;

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

    #[test]
    fn takes_a_file_of_the_original() {
        let (config, _) = read_text(ORIGINAL);
        let config = config.unwrap();
        assert_eq!(
            found(ORIGINAL),
            [
                "warning 3:14: 'cgroup-root' is ignored; the helper sees to it now; the line can go",
                "warning 4:14: 'route-table' is ignored; the helper sees to it now; the line can go",
                "warning 11:11: 'mark' is ignored; the helper sees to it now; the line can go",
            ]
        );
        let bypass: Vec<_> = config.bypass.iter().map(Network::to_string).collect();
        assert_eq!(bypass, ["127.0.0.0/8", "192.168.0.0/16", "::1"]);
        let proxy = &config.proxies[0];
        assert_eq!(
            (
                proxy.name.as_str(),
                proxy.port.get(),
                proxy.no_udp,
                proxy.no_ipv6
            ),
            ("clash-meta", 7893, false, true)
        );
        let targets: Vec<_> = config.rules.rules.iter().map(|r| r.target.name()).collect();
        assert_eq!(targets, ["direct", "drop", "drop-all", "clash-meta"]);
        assert!(config.rules.exec_slices.is_some());
        let path = b"/user.slice/user-7.slice/user@7.service/app.slice/app-clash.service";
        assert!(config.rules.rules[0].selector.matches(path));
    }

    #[test]
    fn finds_everything_at_once() {
        let text = r"version: 2
bypas: []
bypass: [10.0.0.0/33, 10.1.2.3/8, localhost]
tproxies:
  a: {port: 0}
  drop: {port: 1}
  a b: {port: 70000, no_udp: true}
  a: {port: 5}
  c-: {no-ipv6: perhaps}
rules:
  - match: foo(bar
    tproxy: a
  - tproxy: aa
  - match: x
  - match: x
    drop: true
    direct: yes
  - match: 'a[z-b]'
    drop: some
  - match: x
    direct: false
";
        assert_eq!(
            found(text),
            [
                "error 1:10: version '2' is unknown; write 'version: 1'",
                "error 2:1: unknown key 'bypas' in the file; did you mean 'bypass'?",
                "error 3:10: '10.0.0.0/33' can't be bypassed: after the '/' stands a number from 0 to \
                 32; write an address like '192.0.2.1' or a network like '10.0.0.0/8' or 'fe80::/10'",
                "warning 3:23: '10.1.2.3/8' is not the first address of its network; it is taken as \
                 '10.0.0.0/8'",
                "error 3:35: 'localhost' can't be bypassed: it is no IPv4 or IPv6 address; write an \
                 address like '192.0.2.1' or a network like '10.0.0.0/8' or 'fe80::/10'",
                "error 5:13: '0' is no port; a port is a number from 1 to 65535",
                "error 6:3: no tproxy can be named 'drop'; 'direct', 'drop' and 'drop-all' are targets \
                 already",
                "error 7:3: no tproxy can be named 'a b'; a proxy's name is a letter or digit, then \
                 letters, digits, '.', '_' and '-'",
                "error 7:15: '70000' is no port; a port is a number from 1 to 65535",
                "error 7:22: unknown key 'no_udp' in tproxy 'a b'; did you mean 'no-udp'?",
                "error 8:3: tproxy 'a' is there twice, first in line 5; keep one of them",
                "warning 9:3: cgtproxy-exec can't use 'c-'; systemd has no slices with such names; use \
                 single '-' between other characters",
                "error 9:7: tproxy 'c-' has no port; write the port that the proxy listens on, like \
                 'port: 7893'",
                "error 9:17: 'no-ipv6' is 'perhaps'; write 'true' or 'false'",
                "error 11:15: bad regular expression: unclosed group",
                "error 13:5: this rule has no 'match'; write a regular expression; an empty one in \
                 quotes matches everything",
                "error 13:13: there is no tproxy 'aa'; did you mean 'a'?",
                "error 14:5: this rule has no target; write one of 'tproxy: NAME', 'drop: true', \
                 'direct: true'",
                "error 15:5: this rule has 2 targets: 'drop', 'direct'; keep one of them",
                "error 18:15: bad regular expression: invalid character class range, the start must be \
                 <= the end",
                "error 19:11: 'drop' is 'some'; write 'true', or 'all' to drop bypassed destinations too",
                "error 20:5: this rule has no target; write one of 'tproxy: NAME', 'drop: true', \
                 'direct: true'",
            ]
        );
    }

    #[test]
    fn warns_of_rules_that_are_never_reached() {
        let text = "version: 1\nexec-slices: off\ntproxies: {a: {port: 1}}\nrules:\n\
                    - {match: x, drop: true}\n- {match: x, direct: true}\n\
                    - {match: .*, direct: true}\n- {match: y, drop: true}\n";
        assert_eq!(
            found(text),
            [
                "warning 3:12: no rule uses tproxy 'a'",
                "warning 6:3: this rule is never reached; rule 1 in line 5 comes first and matches the \
                 same",
                "warning 8:3: this rule is never reached; rule 3 in line 7 comes first and matches \
                 everything",
            ]
        );
        assert!(read_text(text).0.unwrap().rules.exec_slices.is_none());
    }

    #[test]
    fn an_empty_or_cut_off_file_is_not_a_configuration() {
        for text in [
            "",
            "# nothing\n",
            "[]",
            "version: 1\nrules: {",
            "x",
            "version:",
            "rules: []",
        ] {
            assert!(read_text(text).1.has_errors(), "{text}");
        }
        assert!(read_text("version: 1").1.list.is_empty());
        let (config, findings) = read(Path::new("c.yaml"), b"version: 1\n# \xff");
        assert!(config.is_none());
        assert_eq!(
            findings.to_string(),
            "c.yaml:2:3: error: this byte is not UTF-8\n"
        );
    }

    #[test]
    fn points_into_the_pattern() {
        let (_, findings) =
            read_text("version: 1\nrules:\n  - match: \"foo(bar\"\n    drop: true\n");
        assert_eq!(
            findings.to_string(),
            "c.yaml:3:16: error: bad regular expression: unclosed group\n    foo(bar\n       ^\n"
        );
    }

    #[test]
    fn numbers_and_words_may_be_names() {
        let text = "version: 1\ntproxies: {007: {port: 1}, on: {port: 2}, 1e3: {port: 3}}\n\
                    rules: [{match: a, tproxy: 007}, {match: b, tproxy: on}, {match: 1e3, tproxy: 1e3}]\n";
        let (config, findings) = read_text(text);
        assert_eq!(findings.to_string(), "");
        let names: Vec<_> = config
            .unwrap()
            .proxies
            .iter()
            .map(|p| p.name.to_string())
            .collect();
        assert_eq!(names, ["007", "on", "1e3"]);
    }

    proptest! {
        #[test]
        fn no_text_breaks_it(text in "(version: 1\n|rules:\n|tproxies:\n|  - |match: |drop: |\\PC{0,8}|[\\[\\]{}:,&*!?|>\"'%@`# \n-]{0,6}){0,20}") {
            let _ = found(&text);
        }

        #[test]
        fn no_bytes_break_it(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = read(Path::new("c.yaml"), &bytes);
        }
    }
}
