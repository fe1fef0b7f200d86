//! Whole files.

mod networks;
mod rules;
mod selectors;

use std::path::Path;

use proptest::prelude::*;

use cgtproxy_proto::path::ControlGroupPath;

use super::read;
use crate::config::{Config, Findings, Means, Network, Scope};
use crate::policy::Subject;

pub(super) fn read_text(text: &str) -> (Option<Config>, Findings) {
    read(Path::new("c.yaml"), text.as_bytes(), Scope::User)
}

/// Findings as `line:column: severity: message; help`.
pub(super) fn found(text: &str) -> Vec<String> {
    lines(read_text(text))
}

/// The same of a system's file.
fn found_in_systems(text: &str) -> Vec<String> {
    lines(read(Path::new("c.yaml"), text.as_bytes(), Scope::System))
}

fn lines((config, findings): (Option<Config>, Findings)) -> Vec<String> {
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
            proxy.means.clone(),
            proxy.no_udp,
            proxy.no_ipv6
        ),
        (
            "clash-meta",
            Means::Tproxy(7893.try_into().unwrap()),
            false,
            true
        )
    );
    let targets: Vec<_> = config.rules.rules.iter().map(|r| r.target.name()).collect();
    assert_eq!(targets, ["direct", "drop", "drop-all", "clash-meta"]);
    assert!(config.rules.exec_slices.is_some());
    let path = ControlGroupPath::from_bytes(b"app.slice/app-clash.service").unwrap();
    let group = Subject::new(b"/user.slice/user-7.slice/user@7.service", &path);
    assert!(config.rules.rules[0].selector.matches(&group));
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
            "error 13:5: this rule does not say what it is about; write one of 'app: ID', 'unit: NAME', \
             'slice: NAME', 'match: REGEX'; 'match: \"\"' is everything",
            "error 13:13: there is no tproxy 'aa'; did you mean 'a'?",
            "error 14:5: this rule has no target; write one of 'tproxy: NAME', 'proxy: NAME', \
             'drop: true', 'direct: true'",
            "error 15:5: this rule has 2 targets: 'drop', 'direct'; keep one of them",
            "error 18:15: bad regular expression: invalid character class range, the start must be \
             <= the end",
            "error 19:11: 'drop' is 'some'; write 'true', or 'all' to drop bypassed destinations too",
            "error 20:5: this rule has no target; write one of 'tproxy: NAME', 'proxy: NAME', \
             'drop: true', 'direct: true'",
        ]
    );
}

#[test]
fn quotes_make_strings_of_numbers_and_booleans() {
    for (text, expected) in [
        (
            "version: '2'",
            "error 1:10: version '2' is unknown; write 'version: 1'",
        ),
        (
            "version: 1\ntproxies: {a: {port: \"7893\"}}",
            "error 2:22: 'port' is a string; write 7893 without the quotes",
        ),
        (
            "version: 1\ntproxies: {a: {port: \"78930\"}}",
            "error 2:22: '78930' is no port; a port is a number from 1 to 65535",
        ),
        (
            "version: 1\ntproxies: {a: {port: 1, no-ipv4: 'true'}}",
            "error 2:34: 'no-ipv4' is a string; write true without the quotes",
        ),
        (
            "version: 1\nrules: [{match: a, direct: 'true'}]",
            "error 2:28: 'direct' is a string; write true without the quotes",
        ),
        (
            "version: 1\nrules: [{match: a, drop: 'true'}]",
            "error 2:26: 'drop' is a string; write true without the quotes",
        ),
    ] {
        assert_eq!(found(text), [expected]);
    }
    // The original's is a string.
    assert_eq!(found("version: '1'"), [""; 0]);
}

#[test]
fn what_yaml_takes_for_something_else_needs_quotes() {
    let quotes = "put the value in single quotes, as in 'VALUE'";
    let escape = "in double quotes '\\' begins an escape, and this is none; put the value in single quotes, where '\\' \
                  is a character like others";
    let tab = "there is a tab where only spaces can be; use spaces, not tabs";
    for (text, expected) in [
        (
            "- app: *",
            format!("error 3:8: a value can't begin with '*' or '&'; {quotes}"),
        ),
        (
            "- app: *.foo",
            format!("error 3:8: a value can't begin with '*'; {quotes}"),
        ),
        (
            "- match: [^/]*foo\n  drop: true",
            format!("error 3:14: this does not go on as it began; {quotes}"),
        ),
        (
            "- match: @x",
            format!("error 3:10: a value can't begin with this character; {quotes}"),
        ),
        ("- match: \"app\\.slice\"", format!("error 3:10: {escape}")),
        ("\t- match: a", format!("error 3:1: {tab}")),
        ("- match: a\n\tdrop: true", format!("error 4:1: {tab}")),
    ] {
        assert_eq!(found(&format!("version: 1\nrules:\n{text}\n")), [expected]);
    }
    assert_eq!(
        found("version: 1\nbypass: [fc00::]"),
        [
            "error 2:10: an entry of 'bypass' is a map, not a string; a text with a ':' at its end needs quotes: 'fc00::'"
        ]
    );
    assert_eq!(
        found("version: 1\n---\nversion: 1\n"),
        [
            "error 2:1: a second document begins; the file is one document: there is no second '---' in it, and nothing \
             after '...'"
        ]
    );
    let nested = "lists and maps are nested too deep; there can be 32 of them within each other, and no more";
    for depth in [33, 3000] {
        let (open, close) = ("[".repeat(depth), "]".repeat(depth));
        let found = found(&format!("version: 1\nrules: {open}{close}\n"));
        assert!(found[0].ends_with(nested), "{found:?}");
    }
}

#[test]
fn says_what_was_meant() {
    for (key, near) in [("tproxy", "tproxies"), ("proxy", "proxies")] {
        assert_eq!(
            found(&format!("version: 1\n{key}: {{}}")),
            [format!(
                "error 2:1: unknown key '{key}' in the file; did you mean '{near}'?"
            )]
        );
    }
    let nothing_near = &found("version: 1\nx: {}")[0];
    let expected = "error 2:1: unknown key 'x' in the file; known are ";
    assert!(nothing_near.starts_with(expected), "{nothing_near}");
    assert_eq!(
        found("{\"port\": 12345, \"cgroup_proxy\": []}"),
        [
            "error 1:1: this is a configuration of cgproxy; 'cgtproxy-agent migrate FILE' makes one for this agent of it"
        ]
    );
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
    let (config, findings) = read(Path::new("c.yaml"), b"version: 1\n# \xff", Scope::User);
    assert!(config.is_none());
    assert_eq!(
        findings.to_string(),
        "c.yaml:2:3: error: this byte is not UTF-8\n    help: save the file as text in UTF-8\n"
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
    fn no_text_breaks_it(text in "(version: 1\n|rules:\n|tproxies:\n|  - |match: |app: |unit: |slice: |drop: |\\PC{0,8}|[\\[\\]{}:,&*!?|>\"'%@`# \n-]{0,6}){0,20}") {
        let _ = found(&text);
    }

    #[test]
    fn no_bytes_break_it(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
        let _ = read(Path::new("c.yaml"), &bytes, Scope::User);
    }
}

#[test]
fn all_keys_are_listed_once() {
    // As from another program's file.
    let found = found("version: 1\nexternal-controller: x\nallow-lan: true\nproxy-groups: []\n");
    assert_eq!(found.len(), 3, "{found:?}");
    let lists = |line: &&String| line.contains("known are 'version', ");
    assert_eq!(found.iter().filter(lists).count(), 1, "{found:?}");
    assert!(lists(&&found[0]), "{found:?}");
}

#[test]
fn the_monitor_is_one_of_three() {
    use crate::config::Monitor;
    let monitor = |text: &str| {
        let config = read_text(&format!("version: 1\n{text}")).0;
        config.map(|config| config.monitor)
    };
    assert_eq!(monitor(""), Some(Monitor::Auto));
    assert_eq!(monitor("monitor: auto"), Some(Monitor::Auto));
    assert_eq!(monitor("monitor: inotify"), Some(Monitor::Inotify));
    assert_eq!(monitor("monitor: 'dbus'"), Some(Monitor::Dbus));
    for wrong in ["Dbus", "false", "[dbus]", "systemd"] {
        assert_eq!(monitor(&format!("monitor: {wrong}")), None, "{wrong}");
    }
    let findings = found("version: 1\nmonitor: udev");
    let [finding] = findings.as_slice() else {
        panic!("{findings:?}");
    };
    assert!(
        finding.starts_with("error 2:10: 'monitor' is 'udev'; "),
        "{finding}"
    );
    assert!(finding.contains("'dbus'"), "{finding}");
}

/// They are a file's, which may be somebody else's.
#[test]
fn names_that_are_there_give_a_terminal_no_orders() {
    for name in ["nothing-like-it", "\\e[2Jy"] {
        let found = found(&format!(
            "version: 1\ntproxies: {{\"\\e[2Jx\": {{port: 1}}}}\nrules: [{{match: a, tproxy: \"{name}\"}}]\n"
        ));
        let help = |line: &String| line.contains("'\\u{1b}[2Jx'") && !line.contains('\u{1b}');
        assert!(
            found.iter().all(|line| !line.contains('\u{1b}')),
            "{found:?}"
        );
        assert!(
            found
                .iter()
                .filter(|line| line.contains("there is no tproxy"))
                .all(help),
            "{found:?}"
        );
    }
}
