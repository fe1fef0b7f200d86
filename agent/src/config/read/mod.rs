//! From what was typed to what it means. Nothing stops at the first mistake.

mod dns_hijack;
mod fake;
mod gateway;
mod proxies;
mod rule;
mod selector;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::rc::Rc;

use super::finding::{Finding, Findings, Place, Severity};
use super::reader::{Entries, Reader};
use super::yaml::{self, Node, SyntaxError, Value};
use super::{Config, FakeAddresses, Monitor, Network, Scope, migrate};
use crate::policy::{ExecSlices, Rules, Start};
use crate::text::printable;
use proxies::{Proxies, Section};

/// The version of the format.
const VERSION: i128 = 1;

/// All keys of the file.
pub(super) const KEYS: &[&str] = &[
    "version",
    "bypass",
    "tproxies",
    "redirects",
    "proxies",
    "fake-addresses",
    "rules",
    "exec-slices",
    "gateway",
    "start",
    "monitor",
    "cgroup-root",
    "route-table",
];

/// Reads the text of `file`: what it means, unless there are errors, and all that was found.
pub(crate) fn read(file: &Path, bytes: &[u8], scope: Scope) -> (Option<Config>, Findings) {
    let (text, root) = match document(file, bytes) {
        Ok(document) => document,
        Err(findings) => return (None, findings),
    };
    let mut reader = Reader::new(text, Findings::new(file));
    let config = reader.config(&root, scope);
    let findings = reader.finish();
    (config.filter(|_| !findings.has_errors()), findings)
}

/// The text of a file, and the YAML that it is.
pub(super) fn document<'b>(file: &Path, bytes: &'b [u8]) -> Result<(&'b str, Node), Findings> {
    let refuse = |error: SyntaxError| {
        let mut findings = Findings::new(file);
        findings.list.push(Finding {
            severity: Severity::Error,
            place: error.place,
            message: printable(&error.message),
            help: error.help.map(str::to_owned),
            excerpt: None,
        });
        findings
    };
    let text = yaml::text(bytes).map_err(refuse)?;
    let root = yaml::parse(text).map_err(refuse)?;
    Ok((text, root))
}

impl Reader<'_> {
    fn config(&mut self, root: &Node, scope: Scope) -> Option<Config> {
        let top = self.top(root)?;
        self.version(root, top.get("version"));
        for key in ["cgroup-root", "route-table"] {
            if let Some(node) = top.get(key) {
                self.ignored(node.place, key);
            }
        }
        let exec_slices = top
            .get("exec-slices")
            .and_then(|node| self.exec_slices(node, scope))
            .unwrap_or(scope == Scope::User);
        let start = top.get("start").and_then(|node| self.start(node));
        let monitor = top.get("monitor").and_then(|node| self.monitor(node));
        let bypass = top.get("bypass").map_or_else(Vec::new, |n| self.bypass(n));
        let proxies = self.all_proxies(&top, scope);
        let fake_addresses = match top.get("fake-addresses") {
            Some(node) => self.fake_addresses(node),
            None => Some(FakeAddresses::default()),
        };
        // What is wrong has been said, and what is meant in its place nobody knows.
        if let Some(networks) = &fake_addresses {
            self.check_fake_addresses(&proxies, networks, &bypass);
        }
        let mut used = Vec::new();
        let slices = exec_slices.then(|| ExecSlices::new(proxies.list.iter().map(|p| &p.name)));
        let rules = top.get("rules").map_or_else(Vec::new, |n| {
            self.rules(n, &proxies, slices.as_ref(), &mut used, scope)
        });
        let gateway = top
            .get("gateway")
            .and_then(|node| self.gateway(node, &proxies, &mut used, scope));
        if !exec_slices {
            self.warn_of_unused(&proxies, &used);
        }
        Some(Config {
            proxies: proxies.list,
            fake_addresses: fake_addresses.unwrap_or_default(),
            bypass: bypass.into_iter().map(|(_, network)| network).collect(),
            gateway,
            rules: Rc::new(Rules {
                users: scope == Scope::User,
                exec_slices: slices,
                rules,
                start: start.unwrap_or_default(),
            }),
            monitor: monitor.unwrap_or_default(),
        })
    }

    /// The entries of the file, if it is one of this program's.
    fn top<'n>(&mut self, root: &'n Node) -> Option<Entries<'n>> {
        if matches!(root.value, Value::Null) {
            self.error(root.place, "the file is empty").help =
                Some("it says at least 'version: 1'".into());
            return None;
        }
        if migrate::is_of_cgproxy(self, root) {
            self.error(root.place, "this is a configuration of cgproxy")
                .help = Some("'cgtproxy-agent migrate FILE' makes one for this agent of it".into());
            return None;
        }
        self.entries(root, "the file", KEYS)
    }

    fn version(&mut self, root: &Node, node: Option<&Node>) {
        let is_version = |value: &Value| matches!(value, Value::Integer(VERSION));
        match node {
            None => {
                self.error(root.place, "there is no key 'version'").help =
                    Some("write 'version: 1'".into());
            }
            // The original's is a string, which may be in quotes.
            Some(node) if node.value.without_quotes().as_ref().is_some_and(is_version) => {}
            Some(node) if !is_version(&node.value) => {
                let version = printable(&self.written(node));
                self.error(node.place, format!("version '{version}' is unknown"))
                    .help = Some("write 'version: 1'".into());
            }
            Some(_) => {}
        }
    }

    fn start(&mut self, node: &Node) -> Option<Start> {
        let starts = [("open", Start::Open), ("closed", Start::Closed)];
        self.one_of(node, "'start'", &starts)
    }

    fn monitor(&mut self, node: &Node) -> Option<Monitor> {
        let monitors = [
            ("auto", Monitor::Auto),
            ("inotify", Monitor::Inotify),
            ("dbus", Monitor::Dbus),
        ];
        self.one_of(node, "'monitor'", &monitors)
    }

    /// The proxies of all sections.
    fn all_proxies(&mut self, top: &Entries<'_>, scope: Scope) -> Proxies {
        let mut proxies = Proxies::default();
        for section in Section::ALL {
            let Some(node) = top.get(section.key()) else {
                continue;
            };
            if scope == Scope::System && section != Section::Tproxies {
                let message = format!("the system configuration has no '{}'", section.key());
                self.error(node.place, message).help =
                    Some("root's proxies are TPROXY servers; users have the others".into());
                continue;
            }
            self.proxies(node, section, &mut proxies);
        }
        proxies.sort();
        proxies
    }

    /// Users own the control groups with such names, so the system policy does not go by them.
    fn exec_slices(&mut self, node: &Node, scope: Scope) -> Option<bool> {
        let wanted = self.boolean(node, "'exec-slices'")?;
        if wanted && scope == Scope::System {
            self.error(
                node.place,
                "the system configuration has no slices of cgtproxy-exec",
            )
            .help = Some("they are in users' own; the line can go".into());
        }
        Some(wanted && scope == Scope::User)
    }

    fn ignored(&mut self, place: Place, key: &str) {
        self.warning(place, format!("'{key}' is ignored")).help =
            Some("the helper sees to it now; the line can go".into());
    }

    /// Warns of IPv4 addresses written as IPv6 ones, which programs use and packets do not have.
    fn warn_of_mapped(&mut self, place: Place, network: Network) {
        let Some((address, prefix)) = network.ipv6() else {
            return;
        };
        if let (Some(ipv4), Some(prefix)) = (address.to_ipv4_mapped(), prefix.checked_sub(96)) {
            let message =
                format!("no packet goes to '{network}': on the wire these are IPv4 addresses");
            self.warning(place, message).help = Some(match prefix {
                32 => format!("write '{ipv4}'"),
                _ => format!("write '{ipv4}/{prefix}'"),
            });
        }
    }

    /// What is bypassed, and where the file says so.
    fn bypass(&mut self, node: &Node) -> Vec<(Place, Network)> {
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
                    self.warn_of_mapped(item.place, network);
                    networks.push((item.place, network));
                }
            }
        }
        let everything = |ipv4| {
            let mut networks = networks.iter();
            networks.find(|(_, n)| n.prefix() == 0 && n.address().is_ipv4() == ipv4)
        };
        if let (Some((ipv4, _)), Some((ipv6, _))) = (everything(true), everything(false)) {
            let place = *ipv4.max(ipv6);
            self.warning(place, "nothing goes to a proxy: 'bypass' has every address")
                .help = Some("list what is to go direct, and nothing else".into());
        }
        networks
    }
}
