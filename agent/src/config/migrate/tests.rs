//! Whole files, of both projects.

use proptest::prelude::*;

use super::*;
use crate::config::Scope;
use crate::policy::Selector;

/// `config.json` as cgproxy installs it.
const CGPROXY: &str = r#"{
    "comment":"For usage, see https://github.com/springzfx/cgproxy",

    "port": 12345,
    "program_noproxy": ["v2ray", "qv2ray"],
    "program_proxy": [],
    "cgroup_noproxy": ["/system.slice/v2ray.service"],
    "cgroup_proxy": [],
    "enable_gateway": false,
    "enable_dns": true,
    "enable_udp": true,
    "enable_tcp": true,
    "enable_ipv4": true,
    "enable_ipv6": true,
    "table": 10007,
    "fwmark": 39283
}
"#;

/// `misc/config/example.yaml` of the original, with fewer comments.
const ORIGINAL: &str = r"# This file is my daily use configuration,
version: 1
cgroup-root: AUTO # path to cgroupfs v2 mount point
route-table: 300

bypass:
  - 127.0.0.0/8
  - ::1

tproxies:
  clash-meta:
    mark: 3000
    port: 7893
    # Do not proxy UDP traffic.
    # no-udp: false
    dns-hijack:
      ip: 127.0.0.1
      port: 53

rules:
  - # AUR packages
    match: |-
      \/system\.slice\/(?:one\.metacubex\.)?clash-meta\.service
    direct: true

  - match: |-
      \/user\.slice\/user-\d+\.slice/user@\d+\.service\/cgtproxy\.slice\/cgtproxy-direct\.slice\/.*
    direct: true
  # `parsec` should always connect to network directly.
  - match: |-
      \/user\.slice\/user-\d+\.slice\/user@\d+\.service\/app\.slice\/app(?:-(?:gnome|DDE|flatpak))?-(?:parsecd|com\.parsecgaming\.parsec)(?:-.+\.scope|(?:@.+)?\.service)
    direct: true
  - {match: '\/app\.slice\/app(?:-(?:gnome|DDE|flatpak))?-steam(?:-.+\.scope|(?:@.+)?\.service)', tproxy: clash-meta} # games

  # For any cgroup else, TPROXY to clash-meta.
  - match: |-
      \/.*
    tproxy: clash-meta
";

/// The new text and what was said, after `check` found nothing wrong with it.
fn migrated(text: &str) -> (String, Vec<String>) {
    let (new, said, found) = checked(text);
    assert!(found.is_empty(), "{found:#?}\n{new}");
    (new, said)
}

/// The new text, what was said, and what `check` says of it.
fn checked(text: &str) -> (String, Vec<String>, Vec<String>) {
    let (new, said) = migrate(Path::new("old"), text.as_bytes()).unwrap();
    let (config, found) = read::read(Path::new("new"), new.as_bytes(), Scope::User);
    assert!(config.is_some(), "{found}\n{new}");
    let [said, found] = [said, found].map(|findings| {
        let lines = findings.lines().map(|(_, line)| line);
        lines.collect()
    });
    (new, said, found)
}

#[test]
fn takes_the_file_that_cgproxy_installs() {
    let (new, said) = migrated(CGPROXY);
    assert_eq!(
        new,
        "# Made from a configuration of cgproxy by 'cgtproxy-agent migrate'.
version: 1

tproxies:
  proxy:
    port: 12345

rules:
  # program_noproxy
  - app: [v2ray, '*.v2ray', qv2ray, '*.qv2ray']
    direct: true
  - unit: [v2ray.service, 'v2ray@*.service', qv2ray.service, 'qv2ray@*.service']
    direct: true
"
    );
    assert_eq!(said.len(), 4, "{said:#?}");
    assert!(said[0].starts_with("old:1:1: the commands 'cgproxy'"));
    assert!(said[1].starts_with("old:5:25: 'v2ray' is a program: taken as"));
    assert!(said[3].starts_with("old:7:24: '/system.slice/v2ray.service' is not below a user's"));
}

#[test]
fn takes_all_that_cgproxy_has() {
    let (new, said, found) = checked(
        r#"{"port": 7893, "program_proxy": ["/usr/bin/firefox"],
            "cgroup_noproxy": "/user.slice/user-1000.slice/user@1000.service/app.slice/clash.service",
            "cgroup_proxy": ["/", "/proxy.slice", "/user.slice/user-1000.slice", "/a.b/c"],
            "enable_udp": false, "enable_ipv6": false, "enable_gateway": true, "fwmark": 1}"#,
    );
    assert_eq!(
        new,
        "# Made from a configuration of cgproxy by 'cgtproxy-agent migrate'.
version: 1

tproxies:
  proxy:
    port: 7893
    no-udp: true
    no-ipv6: true

rules:
  # program_proxy
  - app: [firefox, '*.firefox']
    tproxy: proxy
  - unit: [firefox.service, 'firefox@*.service']
    tproxy: proxy
  # cgroup_noproxy
  - unit: clash.service
    direct: true
  # cgroup_proxy
  - slice: proxy
    tproxy: proxy
  - match: '^/user\\.slice/user\\-1000\\.slice(?:/|$)'
    tproxy: proxy
  - match: '^/a\\.b/c(?:/|$)'
    tproxy: proxy
  - match: ''
    tproxy: proxy
"
    );
    assert_eq!(found.len(), 1, "{found:#?}");
    assert!(
        found[0].starts_with("new:24:12: this rule matches nothing below a user's service manager")
    );
    for part in [
        "enable_dns",
        "'enable_gateway' is not carried over",
        "'gateway: {interfaces: [br0], tproxy: proxy}'",
        "'fwmark' is left out",
        "cgtproxy-exec proxy",
    ] {
        assert!(said.iter().any(|line| line.contains(part)), "{said:#?}");
    }
}

#[test]
fn programs_and_control_groups_of_one_name_are_two_things() {
    let (new, _) = migrated(
        r#"{"program_noproxy": ["qemu", "qemu"],
            "cgroup_proxy": ["/user.slice/user-1000.slice/user@1000.service/qemu.slice",
                             "/user.slice/user-1000.slice/user@1000.service/qemu.service"]}"#,
    );
    let rules = "rules:
  # program_noproxy
  - app: [qemu, '*.qemu']
    direct: true
  - unit: [qemu.service, 'qemu@*.service']
    direct: true
  # cgroup_proxy
  - slice: qemu
    tproxy: proxy
";
    assert!(new.ends_with(rules), "{new}");
}

#[test]
fn a_slice_that_is_called_as_a_unit_keeps_its_name() {
    let manager = "/user.slice/user-1000.slice/user@1000.service";
    let groups =
        format!(r#"{{"cgroup_proxy": ["{manager}/a.timer.slice", "{manager}/b.service.slice"]}}"#);
    let (new, _) = migrated(&groups);
    assert!(
        new.contains("slice: [a.timer.slice, b.service.slice]"),
        "{new}"
    );
}

#[test]
fn names_keep_characters_that_no_quotes_keep() {
    let path = "/a\u{1b}[2J/b\nc/\u{2028}\u{9b}\u{feff}\"d'\\e";
    let written = r#"/a\u001b[2J/b\nc/\u2028\u009b\ufeff\"d'\\e"#;
    // There is no such path below a user's service manager, as `check` says.
    let (new, _, _) = checked(&format!(r#"{{"cgroup_proxy": "{written}"}}"#));
    let (config, _) = read::read(Path::new("new"), new.as_bytes(), Scope::User);
    let rules = config.unwrap().rules;
    let [rule] = &rules.rules[..] else {
        panic!("{new}");
    };
    let Selector::Match(pattern) = &rule.selector else {
        panic!("{new}");
    };
    assert!(pattern.matches(path.as_bytes()), "{new}");
}

#[test]
fn what_is_switched_off_is_carried_over() {
    for key in ["tcp", "udp", "ipv4", "ipv6"] {
        let (new, said) = migrated(&format!(r#"{{"port": 1, "enable_{key}": false}}"#));
        let written = format!("    port: 1\n    no-{key}: true\n");
        assert!(new.contains(&written), "{new}{said:#?}");
    }
}

#[test]
fn takes_the_originals_example_with_its_comments() {
    let (new, said, found) = checked(ORIGINAL);
    let expected = ORIGINAL
        .replace("cgroup-root: AUTO # path to cgroupfs v2 mount point\nroute-table: 300\n", "")
        .replace("    mark: 3000\n", "")
        .replace(
            "match: |-\n      \\/user\\.slice\\/user-\\d+\\.slice/user@\\d+\\.service\\/cgtproxy\\.slice\\/cgtproxy-direct\\.slice\\/.*",
            "slice: cgtproxy-direct",
        );
    let parsec = expected.find("match: |-\n      \\/user").unwrap();
    let end = expected[parsec..].find("    direct").unwrap() + parsec - 1;
    let expected = expected.replace(
        &expected[parsec..end],
        "app: [parsecd, com.parsecgaming.parsec]",
    );
    let steam = expected.find("match: '").unwrap();
    let end = expected[steam..].find("', tproxy").unwrap() + steam + 1;
    let expected = expected.replace(&expected[steam..end], "app: steam");
    assert_eq!(new, expected);
    assert_eq!(said.len(), 3, "{said:#?}");
    assert!(said[0].starts_with("old:4:1: 'route-table' is left out"));
    assert_eq!(found.len(), 1, "{found:#?}");
    assert!(found[0].starts_with("new:20:7: this rule is about the machine's own services"));
    assert!(said[1].starts_with("old:12:5: 'mark' is left out"));
    assert!(said[2].starts_with("old:22:5: this rule is about the machine's own services"));
    // What is ours already stays as it is.
    assert_eq!(checked(&new).0, new);
}

#[test]
fn rules_for_the_slices_of_cgtproxy_exec_go_on_deciding() {
    const TEXT: &str = r"version: 1 # of the format
route-table: 300
tproxies:
  first: {port: 7893}
  second: {port: 7894}
rules:
  - {match: '/cgtproxy\.slice/cgtproxy-direct\.slice/', direct: true}
  - match: \/cgtproxy\.slice\/cgtproxy-proxy\.slice\/.*
    tproxy: second
  - match: \/.*
    tproxy: first
";
    let (new, said) = migrated(TEXT);
    assert_eq!(
        new,
        TEXT.replace("route-table: 300", "exec-slices: false")
            .replace(
                r"match: '/cgtproxy\.slice/cgtproxy-direct\.slice/'",
                "slice: cgtproxy-direct"
            )
            .replace(
                r"match: \/cgtproxy\.slice\/cgtproxy-proxy\.slice\/.*",
                "slice: cgtproxy-proxy"
            )
    );
    assert_eq!(
        said[1],
        "old:8:5: 'exec-slices: false' is added; what cgtproxy-exec puts into 'cgtproxy-proxy.slice' goes where rules \
         say, and not to 'first' before them"
    );
    let flow = r"version: 1, rules: [{match: '/cgtproxy-direct\.slice/banned', drop: true}]}";
    let (new, said) = migrated(&format!("{{{flow}"));
    assert_eq!(new, format!("{{exec-slices: false, {flow}"));
    assert_eq!(said.len(), 1, "{said:#?}");
    // In braces over several lines, with nothing after the version.
    let rules = r"rules: [{match: '/cgtproxy-direct\.slice/banned', drop: true}],";
    let (new, said) = migrated(&format!("{{\n  {rules}\n  version: 1\n}}\n"));
    let expected = format!("{{\n  {rules}\n  exec-slices: false, version: 1\n}}\n");
    assert_eq!(new, expected);
    assert_eq!(said.len(), 1, "{said:#?}");
    // Where they say what cgtproxy-exec says, and where somebody has chosen.
    for same in [
        r"{version: 1, rules: [{match: '/cgtproxy-direct\.slice/x', direct: true}]}",
        r"{version: 1, exec-slices: false, rules: [{match: '/cgtproxy-direct\.slice/x', drop: true}]}",
    ] {
        assert_eq!(migrated(same), (same.to_owned(), vec![]));
    }
}

#[test]
fn the_mount_point_is_cut_off() {
    let (new, said) = migrated(
        r"version: 1
rules:
  - match: ^/sys/fs/cgroup/user\.slice/user-1000\.slice/it's-.*
    drop: true
  - match: |-
      \/sys\/fs\/cgroup\/unified\/user\.slice/user-\d+\.slice/user@\d+\.service/app\.slice/app-x-.+\.scope
    direct: true
",
    );
    assert_eq!(
        new,
        r"version: 1
rules:
  - match: '^/user\.slice/user-1000\.slice/it''s-.*'
    drop: true
  - app: x
    direct: true
"
    );
    assert_eq!(
        said,
        [
            "old:3:5: '/sys/fs/cgroup' is left out; a path begins at the control group root",
            "old:5:5: '/sys/fs/cgroup' is left out; a path begins at the control group root",
        ]
    );
}

#[test]
fn services_of_the_system_are_not_taken_for_a_users() {
    const TEXT: &str = r"version: 1
rules:
  - match: \/system\.slice\/clash-meta\.service
    direct: true
";
    let (new, _, found) = checked(TEXT);
    assert_eq!(new, TEXT);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert!(found[0].starts_with("new:3:12: this rule is about the machine's own services"));
}

#[test]
fn what_is_left_out_goes_from_lists_on_one_line_too() {
    for (text, expected) in [
        (
            "version: 1\ntproxies:\n  a: {port: 1, mark: 2}\n  b: {mark: 3, port: 2}\n  c: {\"mark\": 4, \"port\": 3}\n\
             rules: [{match: a, tproxy: a}]\n",
            "version: 1\ntproxies:\n  a: {port: 1}\n  b: {port: 2}\n  c: {\"port\": 3}\n\
             rules: [{match: a, tproxy: a}]\n",
        ),
        (
            "version: 1\ntproxies:\n  a: {\n    mark: 2,\n    port: 1\n  }\n  b: {\n    port: 2,\n    mark: 3\n  }\n",
            "version: 1\ntproxies:\n  a: {\n    \n    port: 1\n  }\n  b: {\n    port: 2,\n  }\n",
        ),
        (
            "{version: 1, rules: [], cgroup-root: AUTO, route-table: 300}\n",
            "{version: 1, rules: [], }\n",
        ),
        (
            "{version: 1, cgroup-root: AUTO, route-table: 300, rules: []}\n",
            "{version: 1, rules: []}\n",
        ),
    ] {
        assert_eq!(migrated(text).0, expected);
    }
    // What stays is not said to be left out.
    for text in [
        "version: 1\ntproxies:\n  a:\n    port: 1\n    ? mark\n    : 2\n",
        "version: 1\ntproxies:\n  a: {port: 1, mark: &number 2}\n  b: {port: *number}\n",
    ] {
        let (new, findings) = migrate(Path::new("old"), text.as_bytes()).unwrap();
        assert_eq!((new.as_str(), findings.list.len()), (text, 0), "{findings}");
    }
}

#[test]
fn says_what_is_wrong_with_a_file() {
    for (text, message) in [
        (
            "",
            "old:1:1: error: this is a configuration neither of cgproxy nor of cgtproxy",
        ),
        ("[]", "old:1:1: error: this is a configuration neither"),
        ("a: 1", "old:1:1: error: this is a configuration neither"),
        ("{\"port\": 0}", "old:1:10: error: '0' is no port"),
        (
            "{\"port\": 1, \"prot\": 1}",
            "old:1:13: error: unknown key 'prot' in the file",
        ),
        (
            "{\"port\": 1, \"enable_udp\": 7}",
            "old:1:27: error: 'enable_udp' is a number",
        ),
        (
            "{\"cgroup_proxy\": [\"x\"]}",
            "old:1:19: error: 'x' is no path of a control group",
        ),
        (
            "{\"cgroup_proxy\": [[]]}",
            "old:1:19: error: an entry of 'cgroup_proxy' is a list",
        ),
        ("{\"port\": 1,", "old:1:"),
        (
            "version: 1\nrules: [{match: a(b, drop: true}]",
            "old:2:18: error: bad regular",
        ),
    ] {
        let findings = migrate(Path::new("old"), text.as_bytes()).unwrap_err();
        assert!(
            findings.to_string().starts_with(message),
            "{text}: {findings}"
        );
    }
}

#[test]
fn takes_json_indented_by_tabs() {
    migrated("{\n\t\"port\": 1,\n\t\"cgroup_proxy\": [\n\t\t\"/\"\n\t]\n}\n");
}

proptest! {
    #[test]
    fn what_it_writes_can_be_read(
        lists in proptest::collection::vec(proptest::collection::vec("(/usr/bin/)?[a-z*.'@/ :#-]{0,8}|/([a-z@-]{1,3}(\\.slice|\\.service)?/?){0,3}", 0..4), 4),
        port in 1u16.., udp: bool,
    ) {
        let old = serde_json::json!({
            "port": port, "enable_udp": udp,
            "program_noproxy": lists[0], "program_proxy": lists[1],
            "cgroup_noproxy": lists[2], "cgroup_proxy": lists[3],
        });
        let old = serde_json::to_string_pretty(&old).unwrap();
        if let Ok((new, _)) = migrate(Path::new("old"), old.as_bytes()) {
            let (config, findings) = read::read(Path::new("new"), new.as_bytes(), Scope::User);
            prop_assert!(config.is_some(), "{findings}\n{new}");
        }
    }

    #[test]
    fn no_text_breaks_it(text in "(version: 1\n|rules:\n|  - |match: |\\|-\n|    |app\\\\\\.slice/|app-x-.\\+\\\\.scope|cgroup-root: |drop: true|\\PC{0,4}|[\\[\\]{}:,&*!?|>\"'%@`# \n-]{0,4}){0,20}") {
        let _ = migrate(Path::new("old"), text.as_bytes());
    }
}
