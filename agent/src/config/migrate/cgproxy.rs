//! A configuration of cgproxy, <https://github.com/springzfx/cgproxy>: its `config.json`.

use std::fmt::Write as _;

use crate::config::finding::Place;
use crate::config::reader::{Entries, Reader, one_or_more};
use crate::config::yaml::{Node, Value};
use crate::text::printable;

use super::write::{names, scalar, slice};

/// All that cgproxy knows; it refuses a file with anything else.
pub(super) const KEYS: &[&str] = &[
    "comment",
    "port",
    "program_proxy",
    "program_noproxy",
    "cgroup_proxy",
    "cgroup_noproxy",
    "enable_gateway",
    "enable_dns",
    "enable_udp",
    "enable_tcp",
    "enable_ipv4",
    "enable_ipv6",
    "table",
    "fwmark",
    "mark_newin",
];

/// The port without 'port'.
const PORT: u16 = 12345;

/// The name that the proxy gets.
const PROXY: &str = "proxy";

/// What the rules of one list select.
#[derive(Debug, Default)]
struct Selected {
    apps: Vec<String>,
    units: Vec<String>,
    slices: Vec<String>,
    patterns: Vec<String>,
}

/// The new configuration.
pub(super) fn migrate(reader: &mut Reader<'_>, root: &Node) -> Option<String> {
    let old = reader.entries(root, "the file", KEYS)?;
    let port = match old.get("port") {
        None => PORT,
        Some(node) => reader.port(node)?.get(),
    };
    let mut new =
        String::from("# Made from a configuration of cgproxy by 'cgtproxy-agent migrate'.\n");
    let _ = write!(
        new,
        "version: 1\n\ntproxies:\n  {PROXY}:\n    port: {port}\n"
    );
    for line in switches(reader, &old) {
        let _ = writeln!(new, "    {line}: true");
    }
    left_out(reader, &old, root.place);
    // In cgproxy's order: the first of them that knows a process decides.
    let mut known = Selected::default();
    let mut rules = String::new();
    for (key, target) in [
        ("program_noproxy", "direct: true".to_owned()),
        ("program_proxy", format!("tproxy: {PROXY}")),
        ("cgroup_noproxy", "direct: true".to_owned()),
        ("cgroup_proxy", format!("tproxy: {PROXY}")),
    ] {
        let Some(node) = old.get(key) else {
            continue;
        };
        let selected = match key.starts_with("program") {
            true => programs(reader, node, key),
            false => control_groups(reader, node, key),
        };
        let lines = selected.lines(&mut known);
        if !lines.is_empty() {
            let _ = writeln!(rules, "  # {key}");
        }
        for line in lines {
            let _ = write!(rules, "  - {line}\n    {target}\n");
        }
    }
    match rules.is_empty() {
        true => new.push_str("\nrules: []\n"),
        false => {
            let _ = write!(new, "\nrules:\n{rules}");
        }
    }
    Some(new)
}

impl Selected {
    /// The selectors, but for what is `known` from earlier rules already.
    fn lines(self, known: &mut Self) -> Vec<String> {
        let mut lines = Vec::new();
        for (key, list, known) in [
            ("app", self.apps, &mut known.apps),
            ("unit", self.units, &mut known.units),
            ("slice", self.slices, &mut known.slices),
        ] {
            let list = fresh(list, known);
            if !list.is_empty() {
                lines.push(format!("{key}: {}", names(&list)));
            }
        }
        let patterns = fresh(self.patterns, &mut known.patterns).into_iter();
        lines.extend(patterns.map(|pattern| format!("match: {}", scalar(&pattern))));
        lines
    }
}

/// What is not `known` yet, and is from now on.
fn fresh(list: Vec<String>, known: &mut Vec<String>) -> Vec<String> {
    let mut new = Vec::new();
    for name in list {
        if !known.contains(&name) {
            known.push(name.clone());
            new.push(name);
        }
    }
    new
}

/// The switches that are off, as keys of ours.
fn switches(reader: &mut Reader<'_>, old: &Entries<'_>) -> Vec<&'static str> {
    let mut is_on = |key: &str| {
        let node = old.get(key)?;
        let on = reader.boolean(node, &format!("'{key}'"))?;
        Some((on, node.place))
    };
    let (tcp, udp) = (is_on("enable_tcp"), is_on("enable_udp"));
    let (ipv4, ipv6) = (is_on("enable_ipv4"), is_on("enable_ipv6"));
    let (dns, gateway) = (is_on("enable_dns"), is_on("enable_gateway"));
    let off = |switch: Option<(bool, Place)>| switch.filter(|(on, _)| !on);
    let mut lines = Vec::new();
    for (switch, line) in [
        (tcp, "no-tcp"),
        (udp, "no-udp"),
        (ipv4, "no-ipv4"),
        (ipv6, "no-ipv6"),
    ] {
        if off(switch).is_some() {
            lines.push(line);
        }
    }
    // It sends queries over UDP to the proxy's port even when other UDP goes direct.
    if let Some((_, place)) = off(udp)
        && dns.is_none_or(|(on, _)| on)
    {
        reader
            .warning(
                place,
                "'enable_dns' is not carried over without 'enable_udp'",
            )
            .help = Some(
            "if the proxy has a DNS server, write 'dns-hijack: {port: PORT}' below its port".into(),
        );
    }
    if let Some((true, place)) = gateway {
        reader
            .warning(place, "'enable_gateway' is not carried over")
            .help = Some(
            "in /etc/cgtproxy/config.yaml, name the interfaces whose traffic the proxy gets: 'gateway: \
             {interfaces: [br0], tproxy: proxy}'"
                .into(),
        );
    }
    lines
}

/// Says what there is nothing for.
fn left_out(reader: &mut Reader<'_>, old: &Entries<'_>, place: Place) {
    for (key, default) in [("table", 10007), ("fwmark", 39283)] {
        if let Some(node) = old.get(key)
            && !matches!(node.value, Value::Integer(number) if number == default)
        {
            reader
                .warning(node.place, format!("'{key}' is left out"))
                .help = Some(
                "the helper has marks and a routing table of its own; /etc/cgtproxy/helper.yaml has \
                 'mark-mask' and 'route-table' for when others use the same"
                    .into(),
            );
        }
    }
    reader
        .warning(
            place,
            "the commands 'cgproxy' and 'cgnoproxy' are not there any more",
        )
        .help = Some("use 'cgtproxy-exec proxy' and 'cgtproxy-exec direct'".into());
}

/// A list of texts, or one.
fn texts<'n>(reader: &mut Reader<'_>, node: &'n Node, key: &str) -> Vec<(&'n Node, String)> {
    let what = format!("an entry of '{key}'");
    one_or_more(node)
        .iter()
        .filter_map(|item| Some((item, reader.text(item, &what)?)))
        .collect()
}

/// Stand-ins for programs: units and applications of the same name.
fn programs(reader: &mut Reader<'_>, node: &Node, key: &str) -> Selected {
    let mut selected = Selected::default();
    for (node, text) in texts(reader, node, key) {
        let name = text.rsplit('/').next().unwrap_or_default();
        let usable = !name.is_empty()
            && name
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'+'))
            && ![".service", ".scope", ".slice", ".socket", ".mount", ".swap"]
                .iter()
                .any(|suffix| name.ends_with(suffix));
        let program = printable(&text);
        let message = match usable {
            true => format!(
                "'{program}' is a program: taken as the application and the service of that name"
            ),
            false => format!("'{program}' in '{key}' is left out"),
        };
        reader.warning(node.place, message).help = Some(
            "nothing is told by its program here: compare with the ids in 'cgtproxy-agent apps', or start \
             it with 'cgtproxy-exec TARGET'"
                .into(),
        );
        if usable {
            selected.apps.push(name.to_owned());
            selected.apps.push(format!("*.{name}"));
            selected.units.push(format!("{name}.service"));
            selected.units.push(format!("{name}@*.service"));
        }
    }
    selected
}

fn control_groups(reader: &mut Reader<'_>, node: &Node, key: &str) -> Selected {
    let mut selected = Selected::default();
    let mut everything = false;
    for (node, text) in texts(reader, node, key) {
        let path = text.trim_end_matches('/');
        if path.is_empty() && text.starts_with('/') {
            everything = true;
            continue;
        }
        if !path.starts_with('/') {
            let message = format!("'{}' is no path of a control group", printable(&text));
            reader.error(node.place, message).help = Some("it begins with a slash".into());
            continue;
        }
        let of_users = path == "/user.slice" || path.starts_with("/user.slice/");
        if !of_users {
            let message = format!(
                "'{}' is not below a user's service manager",
                printable(path)
            );
            reader.warning(node.place, message).help = Some(
                "no user's agent can decide about it: it has an effect in /etc/cgtproxy/config.yaml, with \
                 'cgtproxy-agent --system', only"
                    .into(),
            );
        }
        let name = path.rsplit('/').next().unwrap_or_default();
        // Above or beside a service manager, whose own units are the only ones that names are compared with.
        let in_manager = !of_users || path.contains("/user@");
        // Neither a manager itself nor anything that could be taken for a glob or a template.
        let plain = !name.starts_with("user@")
            && !name.contains("@.")
            && name
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || br".:_-@\".contains(&b));
        match name.rsplit_once('.') {
            Some((_, "slice")) if in_manager && plain => selected.slices.push(slice(name)),
            Some((_, "service")) if in_manager && plain => selected.units.push(name.to_owned()),
            _ => selected
                .patterns
                .push(format!("^{}(?:/|$)", regex_syntax::escape(path))),
        }
    }
    // After what it has in it.
    selected.patterns.extend(everything.then(String::new));
    selected
}
