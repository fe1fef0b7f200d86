//! What is read of a file, and what is said of one that is wrong.

use std::os::unix::fs::symlink;

use super::*;

#[test]
#[cfg_attr(miri, ignore = "reads files")]
fn a_link_to_nowhere_is_not_as_good_as_no_file() {
    let directory = std::env::temp_dir().join(format!("cgtproxy-links-{}", std::process::id()));
    std::fs::create_dir_all(directory.join("etc")).unwrap();
    let at = |path: &str| directory.join(path);
    let file = at("etc/helper.yaml");
    let load = |file: &Path| Config::load_if_there(file).map_err(|error| error.to_string());
    assert!(load(&file).is_ok());
    assert!(load(&at("nothing/helper.yaml")).is_ok());
    assert!(Config::load(Some(&file)).is_err());
    symlink("../srv/helper.yaml", &file).unwrap();
    symlink("srv", at("linked")).unwrap();
    for file in [&file, &at("linked/helper.yaml")] {
        let error = load(file).unwrap_err();
        assert!(error.contains("is a link to '"), "{error}");
        assert!(error.contains("srv"), "{error}");
    }
    std::fs::create_dir(at("srv")).unwrap();
    assert!(load(&file).is_err());
    assert!(load(&at("linked/helper.yaml")).is_ok(), "there is no file");
    std::fs::write(at("srv/helper.yaml"), "grace-seconds: 7").unwrap();
    for file in [&file, &at("linked/helper.yaml")] {
        assert_eq!(load(file).unwrap().grace, Duration::from_secs(7));
    }
    std::fs::remove_dir_all(&directory).unwrap();
}

#[test]
#[cfg_attr(miri, ignore = "reads files")]
fn only_a_file_is_read() {
    let load = |path: &str| Config::load(Some(Path::new(path))).unwrap_err();
    let error = load("/no/such/helper.yaml");
    assert_eq!(error.to_string(), "there is no file '/no/such/helper.yaml'");
    for path in ["/dev/zero", "/"] {
        let source = std::error::Error::source(&load(path)).map(ToString::to_string);
        assert_eq!(
            source.as_deref(),
            Some("it is not a regular file"),
            "{path}"
        );
    }
}

#[test]
fn numbers_and_booleans_are_those_of_yaml() {
    let text = "own-table: off\nlimits: {proxies: 0x10, bypass: 1_000}";
    let config = parse(text).unwrap();
    assert!(!config.own_table);
    assert_eq!((config.limits.proxies, config.limits.bypass), (16, 1000));
}

fn parse(text: &str) -> Result<Config, Error> {
    Config::parse(text, Path::new("helper.yaml"))
}

#[test]
fn an_empty_file_means_the_defaults() {
    for text in ["", "# nothing\n", "---\n", "{}"] {
        let config = parse(text).unwrap();
        assert_eq!(config.marks, MarkRange::default());
        assert_eq!(config.proxy_uids, [0]);
        assert_eq!(config.limits, Limits::default());
        assert_eq!(config.on_agent_loss, OnAgentLoss::Keep);
        assert_eq!(config.udp_verdicts, UdpVerdicts::PerConversation);
    }
}

#[test]
#[cfg_attr(miri, ignore = "asks the user database")]
fn takes_every_key() {
    let config = parse(
        "mark-mask: 0x00f00000\nroute-table: 4000\nrule-priority: 900\ngrace-seconds: 1\n\
         on-agent-loss: drop\nown-table: false\nudp-verdicts: per-datagram\nproxy-users: [daemon, 990, root]\nallow: {users: [daemon, 7], groups: [daemon]}\n\
         deny: {users: [9], groups: [8]}\nlimits: {proxies: 3, control-groups: 10}\n",
    )
    .unwrap();
    assert_eq!(config.marks.mask(), 0x00f0_0000);
    assert_eq!((config.route_table, config.rule_priority), (4000, 900));
    assert_eq!(config.grace, Duration::from_secs(1));
    assert_eq!(config.on_agent_loss, OnAgentLoss::Drop);
    assert!(!config.own_table);
    assert_eq!(config.udp_verdicts, UdpVerdicts::PerDatagram);
    assert_eq!(config.proxy_uids, [0, 1, 990]);
    let allow = config.access.allow.unwrap();
    assert!(allow.uids.contains(&1) && allow.uids.contains(&7) && allow.gids.contains(&1));
    assert!(config.access.deny.gids.contains(&8));
    assert!(config.access.deny.uids.contains(&9));
    assert_eq!(config.limits.proxies, 3);
    assert_eq!(config.limits.bypass, Limits::default().bypass);
}

#[test]
fn takes_every_limit() {
    let all = "limits: {connections: 21, message-bytes: 8388608, calls-per-second: 22, proxies: 23, \
               bypass: 24, control-groups: 25}";
    let limits = Limits {
        connections: 21,
        message_bytes: 8_388_608,
        calls_per_second: 22,
        proxies: 23,
        bypass: 24,
        control_groups: 25,
    };
    assert_eq!(parse(all).unwrap().limits, limits);
}

#[test]
fn numbers_have_their_bounds() {
    for (key, good, bad) in [
        ("mark-mask", 3, 2),
        ("route-table", 1, 0),
        ("route-table", 252, 253),
        ("route-table", 256, 255),
        ("route-table", u32::MAX.into(), 1 << 32),
        ("rule-priority", 1, 0),
        ("rule-priority", 32_765, 32_766),
        ("grace-seconds", u32::MAX.into(), 1 << 32),
        ("message-bytes", 4_259_840, 4_259_839),
        ("calls-per-second", 1, 0),
        ("calls-per-second", 1_000_000, 1_000_001_u64),
    ] {
        let with = |value: u64| {
            parse(&match key {
                "message-bytes" | "calls-per-second" => format!("limits: {{{key}: {value}}}"),
                _ => format!("{key}: {value}"),
            })
        };
        assert!(with(good).is_ok(), "{key}: {good}");
        let message = with(bad).unwrap_err().to_string();
        assert!(message.contains(key), "{key}: {bad}: {message}");
    }
}

#[test]
#[cfg_attr(miri, ignore = "asks the user database")]
fn says_what_is_wrong() {
    for (text, part) in [
        ("mark-mask: 1", "at least two bits"),
        ("route-table: 254", "system's own"),
        ("rule-priority: 0", "1 to 32765"),
        (
            "proxy-users: [1,\n no-such-user-here]",
            "helper.yaml:2:2: 'proxy-users' has 'no-such-user-here', and there is no such user; 'getent passwd' lists",
        ),
        ("allow: {groups: [no-such-group-here]}", "allow.groups"),
        ("deny: {users: [no-such-user-here]}", "deny.users"),
        ("deny: [daemon]", "helper.yaml:1:7: "),
        ("limits: {calls-per-second: 0}", "calls-per-second"),
        ("limits: {message-bytes: 100}", "message-bytes"),
        (
            "\ngrace: 5",
            "helper.yaml:2:1: unknown key 'grace'; known are 'mark-mask', 'route-table', ",
        ),
        (
            "mark-msk: 5",
            "helper.yaml:1:1: unknown key 'mark-msk'; did you mean 'mark-mask'?",
        ),
        (
            "own-table: on\nown-table: off",
            "helper.yaml:2:1: key 'own-table' is there twice, first in line 1; keep one of them",
        ),
        (
            "\non-agent-loss: kept",
            "helper.yaml:2:16: 'on-agent-loss' is 'kept'; write 'keep', 'direct' or 'drop'",
        ),
        (
            "limits: {proxys: 5}",
            "helper.yaml:1:10: unknown key 'proxys' in 'limits'; did you mean 'proxies'?",
        ),
        ("[", "helper.yaml:1:1: the bracket is not closed; "),
        (
            "x",
            "helper.yaml:1:1: the file is a string; write a map with keys among 'mark-mask', ",
        ),
        (
            "proxy-users: [1, {}]",
            "helper.yaml:1:18: 'proxy-users' has a map; write names or numbers of users",
        ),
        (
            "proxy-users: ['7']",
            "and there is no such user; a user's number has no quotes",
        ),
        (
            "proxy-users: mihomo",
            "helper.yaml:1:14: 'proxy-users' is 'mihomo'; write a list of users, as in '[NAME, NUMBER]'",
        ),
        (
            "allow: [alice]",
            "helper.yaml:1:8: 'allow' is a list; write a map with keys among 'users', 'groups'",
        ),
        (
            "mark-mask: 256M",
            "helper.yaml:1:12: 'mark-mask' is '256M'; write a number from 0 to 4294967295",
        ),
        (
            "mark-mask: 0x00000000",
            "helper.yaml:1:12: 'mark-mask' is 0x00000000: the mark mask needs at least two bits",
        ),
        (
            "own-table: maybe",
            "helper.yaml:1:12: 'own-table' is 'maybe'; write 'true' or 'false'",
        ),
        (
            "udp-verdicts: all",
            "helper.yaml:1:15: 'udp-verdicts' is 'all'; write 'per-conversation' or 'per-datagram'",
        ),
        (
            "grace-seconds: -1",
            "helper.yaml:1:16: 'grace-seconds' is -1; write a number from 0 to ",
        ),
        (
            "limits: {proxies: 0.5}",
            "helper.yaml:1:19: 'limits.proxies' is a fraction; write a number that is not negative",
        ),
        ("---\n---\n", "a second document begins"),
        (
            "limits: {connections: 18446744073709551616}",
            "helper.yaml:1:23: 'limits.connections' is too large a number; write a number that is not negative",
        ),
        (
            "limits: {connections: 1e3}",
            "helper.yaml:1:23: 'limits.connections' is a fraction; write a number that is not negative",
        ),
        ("allow:\n", "'allow' is nothing; write a map"),
        ("deny:\n", "'deny' is nothing; write a map"),
        (
            "grace-seconds: '7'",
            "helper.yaml:1:16: 'grace-seconds' is a string; write 7 without the quotes",
        ),
        (
            "own-table: \"false\"",
            "helper.yaml:1:12: 'own-table' is a string; write false without the quotes",
        ),
        (
            "grace-seconds: '-1'",
            "'grace-seconds' is '-1'; write a number from 0 to 4294967295",
        ),
        (
            "grace-seconds: 'true'",
            "'grace-seconds' is 'true'; write a number from 0 to 4294967295",
        ),
    ] {
        let error = parse(text).unwrap_err();
        let message = error.to_string();
        assert!(message.contains(part), "{text:?}: {message}");
        assert!(message.contains("helper.yaml"), "{text:?}: {message}");
    }
}
