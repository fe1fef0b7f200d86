//! Rules, and what they do together.

use super::{found, found_in_systems, read_text};

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
    let system = found_in_systems(text);
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

/// Root's configuration has no slices of cgtproxy-exec, but it may have a gateway.
#[test]
fn warns_of_proxies_that_nothing_uses() {
    let text = "version: 1\ntproxies:\n  unused: {port: 1}\n  forwarded: {port: 2}\n  ruled: {port: 3}\n\
                rules: [{match: x, tproxy: ruled}]\ngateway: {interfaces: [br0], tproxy: forwarded}\n";
    let found = found_in_systems(text);
    assert_eq!(found, ["warning 3:3: nothing uses the proxy 'unused'"]);
}

/// Users choose the names of their units, and with that whom a rule of root's file is about.
#[test]
fn warns_of_names_by_which_users_get_out_of_what_root_enforces() {
    let rule = |rule: &str| format!("  - {{{rule}}}\n");
    let file = |rules: &[&str]| {
        let rules: String = rules.iter().map(|text| rule(text)).collect();
        let text = format!("version: 1\nrules:\n{rules}");
        found_in_systems(&text)
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
        found_in_systems(&text)
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
