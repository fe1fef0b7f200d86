//! Whole files.

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
fn warns_of_a_bypass_without_sense() {
    assert_eq!(
        found(
            "version: 1\nbypass: ['::ffff:1.2.3.4', '::ffff:10.0.0.0/104', '::/0', 192.0.2.0/24]"
        ),
        [
            "warning 2:10: no packet goes to '::ffff:1.2.3.4': on the wire these are IPv4 addresses; write '1.2.3.4'",
            "warning 2:28: no packet goes to '::ffff:10.0.0.0/104': on the wire these are IPv4 addresses; write \
             '10.0.0.0/8'",
        ]
    );
    assert_eq!(
        found("version: 1\nbypass:\n- ::/0\n- 0.0.0.0/0\n"),
        [
            "warning 4:3: nothing goes to a proxy: 'bypass' has every address; list what is to go direct, and nothing \
             else"
        ]
    );
}

/// The default networks are not meant.
#[test]
fn wrong_networks_for_names_overlap_nothing() {
    let text = "version: 1\nproxies: {a: {upstream: 'http://h'}}\nbypass: [198.18.0.0/16]\nfake-addresses: ";
    for wrong in [
        "127.0.0.0/8",
        "[x, 'fd00:99::/64']",
        "[10.99.0.0/16, 10.98.0.0/16]",
        "[[]]",
    ] {
        let found = found(&format!("{text}{wrong}\n"));
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(!found[0].contains("'bypass'"), "{found:?}");
    }
}

#[test]
fn reads_selectors() {
    let text = r"version: 1
rules:
  - {app: org.telegram.desktop, direct: true}
  - {app: [firefox, 'google\x2d*'], direct: true}
  - {unit: [mihomo, 'ssh@*.service', run-*, x.scope], direct: true}
  - {slice: background, direct: true}
  - {slice: [a-*, b.slice], drop: true}
  - {unit: [foo.bar, '*.mount', a.timer.service, 'a.timer*'], drop: true}
  - {slice: [foo.bar, a.service.slice, service], drop: true}
  - {app: [org.example.timer], drop: true}
";
    let (config, findings) = read_text(text);
    assert_eq!(findings.to_string(), "");
    let rules = &config.unwrap().rules.rules;
    let shown: Vec<_> = rules.iter().map(|r| r.selector.to_string()).collect();
    assert_eq!(
        shown,
        [
            "app: org.telegram.desktop",
            "app: firefox, google-*",
            "unit: mihomo.service, ssh@*.service, run-*, x.scope",
            "slice: background.slice",
            "slice: a-*.slice, b.slice",
            "unit: foo.bar.service, *.mount, a.timer.service, a.timer*",
            "slice: foo.bar.slice, a.service.slice, service.slice",
            "app: org.example.timer",
        ]
    );
}

#[test]
fn finds_what_is_wrong_with_selectors() {
    let text = r"version: 1
rules:
  - {app: x, match: y, direct: true}
  - {app: app-gnome-firefox-1234.scope, direct: true}
  - {app: firefox.service, direct: true}
  - {unit: ssh@.service, direct: true}
  - {unit: [a, ''], direct: true}
  - {slice: /a/b, direct: true}
  - {slice: [], direct: true}
  - {aps: x, direct: true}
  - {app: {id: x}, direct: true}
  - {app: [[x]], direct: true}
";
    assert_eq!(
        found(text),
        [
            "error 3:5: this rule has 2 selectors: 'app', 'match'; keep one of them, or write a rule for each",
            "error 4:11: 'app-gnome-firefox-1234.scope' is the name of a unit, not of an application; write \
             'app: firefox' or 'unit: app-gnome-firefox-1234.scope'",
            "error 5:11: 'firefox.service' is the name of a unit, not of an application; write 'unit: \
             firefox.service'",
            "error 6:12: 'ssh@.service' is a template, and no unit; write 'ssh@*.service' for all its units",
            "error 7:16: 'unit' is empty; write a name, in which '*' stands for any text; 'match' takes paths",
            "error 8:13: 'slice' is a path, '/a/b', not a name; write a name, in which '*' stands for any \
             text; 'match' takes paths",
            "error 9:13: 'slice' is an empty list; write at least one name",
            "error 10:5: this rule does not say what it is about; write one of 'app: ID', 'unit: NAME', \
             'slice: NAME', 'match: REGEX'; 'match: \"\"' is everything",
            "error 10:6: unknown key 'aps' in a rule; did you mean 'app'?",
            "error 11:11: 'app' is a map, not a string",
            "error 12:12: 'app' is a list, not a string",
        ]
    );
}

#[test]
fn units_without_a_control_group_are_no_units_of_a_rule() {
    let text = r"version: 1
rules:
  - {unit: backup.timer, direct: true}
  - {unit: [a, 'b-*.path'], direct: true}
  - {unit: mnt.automount, direct: true}
  - {unit: default.target, direct: true}
  - {unit: '*.device', direct: true}
  - {slice: [background, foo.service], direct: true}
  - {slice: backup.timer, direct: true}
";
    assert_eq!(
        found(text),
        [
            "error 3:12: 'backup.timer' is a timer, and has no control group; write 'unit: backup.service' if that is \
             what it starts",
            "error 4:16: 'b-*.path' is a path, and has no control group; write 'unit: b-*.service' if that is what it \
             starts",
            "error 5:12: 'mnt.automount' is an automount, and has no control group; write 'unit: mnt.mount'",
            "error 6:12: 'default.target' is a target, and has no control group; write the names of units that have \
             processes",
            "error 7:12: '*.device' is a device, and has no control group; write the names of units that have \
             processes",
            "error 8:26: 'foo.service' is no slice; write 'unit: foo.service'",
            "error 9:13: 'backup.timer' is no slice; write the name of a slice",
        ]
    );
}

#[test]
fn users_enforce_nothing() {
    let text = "version: 1\nrules:\n  - {match: a, drop: true, enforce: true}\n  \
                - {match: b, drop: true, enforce: false}\n";
    let error = |line| {
        format!(
            "error {line}:37: only the system configuration can enforce a rule; your own rules hold for your own \
             applications already; the line can go"
        )
    };
    assert_eq!(found(text), [error(3), error(4)]);
    let system = lines(read(Path::new("c.yaml"), text.as_bytes(), Scope::System));
    assert_eq!(system, [""; 0]);
}

#[test]
fn warns_of_rules_that_are_never_reached() {
    let text = "version: 1\nexec-slices: off\ntproxies: {a: {port: 1}}\nrules:\n\
                - {match: x, drop: true}\n- {match: x, direct: true}\n\
                - {match: .*, direct: true}\n- {match: y, drop: true}\n";
    assert_eq!(
        found(text),
        [
            "warning 3:12: nothing uses the proxy 'a'",
            "warning 6:3: this rule is never reached; rule 1 in line 5 comes first and matches the \
             same",
            "warning 8:3: this rule is never reached; rule 3 in line 7 comes first and matches \
             everything",
        ]
    );
    assert!(read_text(text).0.unwrap().rules.exec_slices.is_none());
}

#[test]
fn warns_of_rules_that_the_slices_of_cgtproxy_exec_come_before() {
    let found = |more: &str, rule: &str| {
        let proxies = "tproxies: {a: {port: 1}, a-b: {port: 2}}";
        let mut lines = found(&format!(
            "version: 1\n{proxies}\nrules: [{{{rule}}}]\n{more}"
        ));
        lines.retain(|line| !line.contains("nothing uses the proxy"));
        lines
    };
    for (rule, slice, target) in [
        (
            r"match: '\/cgtproxy\.slice\/cgtproxy-proxy\.slice\/.*', tproxy: a-b",
            "proxy",
            "a",
        ),
        (
            "match: /cgtproxy-direct.slice/banned, drop: true",
            "direct",
            "direct",
        ),
        (
            r"match: cgtproxy-direct\.slice, drop: true",
            "direct",
            "direct",
        ),
        (
            r"match: '/cgtproxy-a\.slice/cgtproxy-a-b\.slice/', direct: true",
            "a-b",
            "a-b",
        ),
        (
            "slice: [background, cgtproxy-drop], drop: all",
            "drop",
            "drop",
        ),
        ("unit: cgtproxy-a.slice, drop: true", "a", "a"),
    ] {
        let warning = format!(
            "warning 3:9: this rule decides about nothing in 'cgtproxy-{slice}.slice'; the slices of cgtproxy-exec \
             come before rules, and the target of this one is '{target}': write 'exec-slices: false', or take the \
             rule out"
        );
        assert_eq!(found("", rule), [warning], "{rule}");
        assert_eq!(found("exec-slices: false\n", rule), [""; 0], "{rule}");
    }
    for rule in [
        // They say what holds anyway.
        r"match: '/cgtproxy-proxy\.slice/', tproxy: a",
        r"match: '/cgtproxy-a\.slice/cgtproxy-a-b\.slice/', tproxy: a-b",
        "slice: cgtproxy-drop, drop: true",
        // They are about others, or about others as well.
        "slice: cgtproxy-vpn, drop: true",
        "slice: cgtproxy-*, drop: true",
        "unit: cgtproxy-drop, direct: true",
        r"match: '/my-cgtproxy-drop\.slice/', direct: true",
        "match: '', drop: true",
    ] {
        assert_eq!(found("", rule), [""; 0], "{rule}");
    }
}

/// The original's paths begin there.
#[test]
fn the_mount_point_of_control_groups_is_no_part_of_a_path() {
    let file = |pattern: &str| format!("version: 1\nrules: [{{match: '{pattern}', drop: true}}]\n");
    let selector = |pattern: &str| {
        let config = read_text(&file(pattern)).0.unwrap();
        config.rules.rules[0].selector.to_string()
    };
    for (pattern, meant) in [
        (r"^/sys/fs/cgroup/user\.slice", r"^/user\.slice"),
        (r"/sys/fs/cgroup/unified/user\.slice/", r"^/user\.slice/"),
        (r"^\/sys\/fs\/cgroup\/user\.slice", r"^\/user\.slice"),
        ("/sys/fs/cgroup/.*", "^/.*"),
        ("/sys/fs/cgroup.*x", "^.*x"),
        ("/sys/fs/cgroup", "^"),
        (
            "^/sys/fs/cgroup/a|(?:/sys/fs/cgroup/(b|c))|^/sys/fs/cgroup/unified(/d|/e)",
            "^/a|(?:^/(b|c))|^(/d|/e)",
        ),
    ] {
        assert_eq!(selector(pattern), format!("match: {meant}"), "{pattern}");
        let said = found(&file(pattern));
        let warning = "warning 2:17: a path begins at the control group root, and not with '/sys/fs/cgroup'; it is \
                       taken as '";
        assert!(said[0].starts_with(warning), "{said:?}");
        assert!(
            said[0].ends_with(&format!("taken as '{meant}'")),
            "{said:?}"
        );
        let system = read(Path::new("c.yaml"), file(pattern).as_bytes(), Scope::System);
        assert!(lines(system)[0].starts_with(warning), "{pattern}");
    }
    for pattern in [
        "/sys/fs/cgroups/",
        "/sys/fs/cgroup?/x",
        "/x/sys/fs/cgroup/x",
        "/sys/fs",
    ] {
        assert_eq!(selector(pattern), format!("match: {pattern}"));
        assert_eq!(found(&file(pattern)), [""; 0], "{pattern}");
    }
    assert_eq!(
        found(&file("/sys/fs/cgroup/(")),
        ["error 2:33: bad regular expression: unclosed group"]
    );
}

/// Root's configuration has no slices of cgtproxy-exec, but it may have a gateway.
#[test]
fn warns_of_proxies_that_nothing_uses() {
    let text = "version: 1\ntproxies:\n  unused: {port: 1}\n  forwarded: {port: 2}\n  ruled: {port: 3}\n\
                rules: [{match: x, tproxy: ruled}]\ngateway: {interfaces: [br0], tproxy: forwarded}\n";
    let found = lines(read(Path::new("c.yaml"), text.as_bytes(), Scope::System));
    assert_eq!(found, ["warning 3:3: nothing uses the proxy 'unused'"]);
}

#[test]
fn warns_of_rules_that_select_nothing_of_a_users() {
    let file =
        |pattern: &str| format!("version: 1\nrules:\n  - {{match: '{pattern}', drop: true}}\n");
    let elsewhere =
        "it has an effect in /etc/cgtproxy/config.yaml, with 'cgtproxy-agent --system', only";
    for pattern in [
        r"^/system\.slice/cron\.service",
        r"\/system\.slice\/(?:one\.)?clash-meta\.service",
        r"/system\.slice",
        r"(/system\.slice/a|/system\.slice/b)\.service",
    ] {
        let services = format!(
            "warning 3:13: this rule is about the machine's own services; no user's agent can decide about them: \
             {elsewhere}"
        );
        assert_eq!(found(&file(pattern)), [services], "{pattern}");
    }
    for pattern in [
        r"/session-1\.scope",
        r"/session-c2\.scope",
        r"/session-\d+\.scope",
        r"^/user\.slice/user-\d+\.slice/session-[^/]*\.scope$",
        r"session-\w+\.scope",
    ] {
        let sessions = format!(
            "warning 3:13: this rule is about login sessions; no user's agent can decide about them: {elsewhere}"
        );
        assert_eq!(found(&file(pattern)), [sessions], "{pattern}");
    }
    for pattern in [
        r"^/machine\.slice/",
        r"^/init\.scope$",
        r"^app\.slice",
        "^/$",
        "^$",
    ] {
        let others = "warning 3:13: this rule matches nothing below a user's service manager; paths there begin with \
                      '/user.slice/user-UID.slice/user@UID.service', and others are for \
                      /etc/cgtproxy/config.yaml, with 'cgtproxy-agent --system'";
        assert_eq!(found(&file(pattern)), [others], "{pattern}");
    }
    for pattern in [
        "",
        "system",
        r"/app\.slice/",
        r"^/user\.slice/user-1000\.slice",
        r"(/system\.slice/|/app\.slice/)x",
        r"/user@\d+\.service/.*/session-1\.scope",
        r"/session-migration\.service",
        r"/session-(a|b)",
        r"/app-[^/]*session-1\.scope",
        r"(/system\.slice)?/x",
        r"/session\.slice/",
    ] {
        assert_eq!(found(&file(pattern)), [""; 0], "{pattern}");
        // In root's file any of them may be meant.
        let system = read(Path::new("c.yaml"), file(pattern).as_bytes(), Scope::System);
        assert_eq!(lines(system), [""; 0], "{pattern}");
    }
}

/// Users choose the names of their units, and with that whom a rule of root's file is about.
#[test]
fn warns_of_names_by_which_users_get_out_of_what_root_enforces() {
    let rule = |rule: &str| format!("  - {{{rule}}}\n");
    let file = |rules: &[&str]| {
        let rules: String = rules.iter().map(|text| rule(text)).collect();
        let text = format!("version: 1\nrules:\n{rules}");
        lines(read(Path::new("c.yaml"), text.as_bytes(), Scope::System))
    };
    let enforced = "match: '', drop: true, enforce: true";
    for exempt in [
        "unit: clash-meta, direct: true",
        "app: firefox, direct: true",
        "slice: trusted, direct: true, enforce: true",
        r"match: '/system\.slice/clash-meta\.service', direct: true",
    ] {
        assert_eq!(
            file(&["slice: x, drop: true", exempt, enforced]),
            [
                "warning 4:5: users name their own units, and so get out of rule 3, which is enforced; write \
                 'match' with the whole path, as in 'match: ^/system\\.slice/NAME\\.service$'"
            ],
            "{exempt}"
        );
        assert_eq!(
            file(&[enforced.trim_end_matches(", enforce: true"), exempt]).len(),
            1
        );
    }
    // From what is dropped, a proxy is a way out as well.
    let file_with = |rules: &[&str]| {
        let rules: String = rules.iter().map(|text| rule(text)).collect();
        let text = format!("version: 1\ntproxies: {{a: {{port: 1}}}}\nrules:\n{rules}");
        lines(read(Path::new("c.yaml"), text.as_bytes(), Scope::System))
    };
    let to_proxy = "match: '', tproxy: a, enforce: true";
    assert_eq!(file_with(&["unit: vpn, tproxy: a", enforced]).len(), 1);
    assert_eq!(file_with(&["unit: vpn, tproxy: a", to_proxy]), [""; 0]);
    for rules in [
        // Nothing is enforced, or nothing of users'.
        ["unit: clash-meta, direct: true", "match: '', drop: true"],
        [
            "unit: clash-meta, direct: true",
            r"match: '^/system\.slice/', drop: true, enforce: true",
        ],
        [
            r"match: '^/system\.slice/clash-meta\.service', direct: true",
            enforced,
        ],
        [
            r"match: '^/user\.slice/user-1001\.slice/', direct: true",
            enforced,
        ],
        ["unit: cron, drop: true", enforced],
    ] {
        assert_eq!(file(&rules), [""; 0], "{rules:?}");
    }
}

#[test]
fn what_no_proxy_gets_stands_for_no_name() {
    let error = |column, network, left_out| {
        format!(
            "error 2:{column}: 'fake-addresses' has {network}, but no proxy gets what goes to {left_out}; \
             choose one that nobody uses, like '198.18.0.0/15' or '2001:2::/48'"
        )
    };
    for (text, network, left_out) in [
        ("127.8.0.0/16", "127.8.0.0/16", "127.0.0.0/8"),
        ("230.0.0.0/8", "230.0.0.0/8", "224.0.0.0/4"),
        (
            "255.255.255.252/30",
            "255.255.255.252/30",
            "255.255.255.255/32",
        ),
        ("'fe80::/64'", "fe80::/64", "fe80::/10"),
        ("'ff05::/64'", "ff05::/64", "ff00::/8"),
        ("'::/96'", "::/96", "::1/128"),
    ] {
        let text = format!("version: 1\nfake-addresses: {text}\n");
        assert_eq!(found(&text), [error(17, network, left_out)]);
    }
    let right = "version: 1\nfake-addresses: [10.99.0.0/16, 'fd00:99::/64']\n";
    assert_eq!(found(right), [""; 0]);
}

#[test]
fn what_stands_for_a_name_is_not_bypassed() {
    let text = |rest: &str| {
        format!(
            "version: 1\nproxies: {{a: {{upstream: 'socks5h://192.0.2.1'}}}}\nbypass:\n  - 10.0.0.0/8\n  \
             - 198.18.1.0/24\n  - '2001::/16'\n{rest}"
        )
    };
    let error = |line, bypassed, network| {
        format!(
            "error {line}:5: 'bypass' has {bypassed}, but {network} stands for names that a proxy looks up; take it \
             out of 'bypass', or choose other networks with 'fake-addresses'"
        )
    };
    let expected = [
        error(5, "198.18.1.0/24", "198.18.0.0/15"),
        error(6, "2001::/16", "2001:2::/48"),
    ];
    assert_eq!(found(&text("")), expected);
    let others = "fake-addresses: [10.99.0.0/16, 'fd00:99::/64']\n";
    assert_eq!(
        found(&text(others)),
        [error(4, "10.0.0.0/8", "10.99.0.0/16")]
    );
}

#[test]
fn warns_of_names_whose_addresses_lead_past_the_proxy() {
    let text = |options| {
        format!("version: 1\nproxies:\n  a: {{upstream: 'socks5h://192.0.2.1'{options}}}\n")
    };
    let warning = |transport, key| {
        format!(
            "warning 3:6: {transport} to names reaches nobody: proxy 'a' looks them up and leaves it out; \
             remove '{key}', or write 'dns-hijack: false' to look names up here"
        )
    };
    for (options, expected) in [
        (", no-udp: true", vec![warning("UDP", "no-udp")]),
        (", no-tcp: true", vec![warning("TCP", "no-tcp")]),
        (", no-udp: true, dns-hijack: false", vec![]),
        (", no-ipv4: true", vec![]),
        ("", vec![]),
    ] {
        assert_eq!(found(&text(options)), expected, "{options}");
    }
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
fn points_into_a_pattern_of_wide_characters() {
    let (_, findings) = read_text("version: 1\nrules:\n  - match: 日本(\n    drop: true\n");
    assert_eq!(
        findings.to_string(),
        "c.yaml:3:14: error: bad regular expression: unclosed group\n    日本(\n        ^\n"
    );
}

#[test]
fn points_into_the_pattern() {
    let (_, findings) = read_text("version: 1\nrules:\n  - match: \"foo(bar\"\n    drop: true\n");
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
