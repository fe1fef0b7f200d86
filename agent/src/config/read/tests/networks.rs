//! What is bypassed, and addresses that stand for names.

use super::found;

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
