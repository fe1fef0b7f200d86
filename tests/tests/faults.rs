//! Others take away what the helper put into the kernel, while traffic flows: it is back at once.

#![allow(clippy::expect_used, reason = "a panic is a failed test")]

use cgtproxy_tests::sandbox::{Sandbox, Service, User, proxied, sandbox};
use cgtproxy_tests::session::{Session, to_proxy, verdict};
use cgtproxy_tests::wait::wait_until;
use serde_json::json;

const APP: &str = "app.slice/app-a.scope";

/// A helper on a kernel that does not protect tables, and a policy.
fn with_policy(sb: &Sandbox, config: &str) -> (Service, User, Session) {
    let helper = sb.helper().config(config).start();
    let user = sb.user(1001);
    user.cgroup("app.slice/app-drop.scope");
    let mut session = Session::of(&user);
    session.replace(
        json!([{ "name": "mihomo", "port": 7890 }]),
        json!(["10.0.0.0/8"]),
        json!([
            to_proxy("", "mihomo"),
            verdict("app.slice/app-drop.scope", "drop")
        ]),
    );
    (helper, user, session)
}

#[test]
fn a_flushed_ruleset_is_restored_with_every_policy() {
    sandbox(|sb| {
        let (_helper, user, mut session) = with_policy(sb, "own-table: false");
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let app = user.cgroup(APP).app();
        let dropped = user.cgroup("app.slice/app-drop.scope").app();
        let before = sb.run(&["nft", "list", "table", "inet", "cgtproxy"]);
        let [v4, _] = sb.destinations();
        let open = app.open_tcp(v4).expect("it opens");
        assert_eq!(open.ask(), proxied("mihomo", v4));
        for wreck in [
            "flush ruleset",
            "delete table inet cgtproxy",
            "flush chain inet cgtproxy output",
            "flush table inet cgtproxy",
            "insert rule inet cgtproxy output accept",
            "flush map inet cgtproxy users",
        ] {
            sb.nft(wreck);
            wait_until(wreck, || {
                sb.has_table() && sb.run(&["nft", "list", "table", "inet", "cgtproxy"]) == before
            });
            for to in sb.destinations() {
                assert_eq!(app.tcp(to), proxied("mihomo", to), "{wreck}");
                assert!(dropped.udp(to).is_dropped(), "{wreck}");
            }
            assert_eq!(open.ask(), proxied("mihomo", v4), "{wreck}");
        }
        // What the session does next fits what is there.
        session.assign(json!([verdict("app.slice/app-drop.scope", "direct")]));
    });
}

#[test]
fn flushed_rules_and_routes_are_restored() {
    sandbox(|sb| {
        let (_helper, user, _session) = with_policy(sb, "");
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let app = user.cgroup(APP).app();
        let wrecks: [&[&str]; 5] = [
            &["ip", "rule", "del", "priority", "800"],
            &["ip", "-6", "rule", "del", "priority", "800"],
            &["ip", "route", "flush", "table", "25447"],
            &["ip", "-6", "route", "flush", "table", "25447"],
            &["sh", "-c", "ip link set lo down; ip link set lo up"],
        ];
        for wreck in wrecks {
            sb.run(wreck);
            wait_until(&wreck.join(" "), || {
                [4, 6].into_iter().all(|family| {
                    sb.mark_rules(family).len() == 1 && sb.routes(family, "25447").len() == 1
                })
            });
            for to in sb.destinations() {
                assert_eq!(app.tcp(to), proxied("mihomo", to), "{wreck:?}");
                assert_eq!(app.udp(to), proxied("mihomo", to), "{wreck:?}");
            }
        }
        // All rules of a family, the machine's own included, which are not ours to restore.
        sb.run(&["ip", "rule", "flush"]);
        sb.run(&["ip", "rule", "add", "priority", "32766", "lookup", "main"]);
        wait_until("ip rule flush", || sb.mark_rules(4).len() == 1);
    });
}
