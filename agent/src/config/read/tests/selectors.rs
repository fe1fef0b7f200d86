//! What rules are about.

use super::{found, found_in_systems, read_text};

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
        let system = found_in_systems(&file(pattern));
        assert!(system[0].starts_with(warning), "{pattern}");
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
        let system = found_in_systems(&file(pattern));
        assert_eq!(system, [""; 0], "{pattern}");
    }
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
