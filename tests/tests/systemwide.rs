//! The system's policy, which is root's: every control group of the machine, what users say besides, and
//! what is enforced.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a panic is a failed test"
)]

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use cgtproxy_tests::sandbox::{Connection, Outcome, by, direct, proxied, sandbox};
use cgtproxy_tests::session::{Session, to_proxy, verdict};
use cgtproxy_tests::wait::wait_until;
use cgtproxy_tests::wire::Transport::{self, Tcp, Udp};
use serde_json::{Value, json};

const SERVICE: &str = "system.slice/web.service";
const APP: &str = "app.slice/app-a.scope";

fn enforced(mut assignment: Value) -> Value {
    assignment["enforce"] = json!(true);
    assignment
}

fn proxies() -> Value {
    json!([{ "name": "company", "port": 7890 }])
}

#[test]
fn root_may_name_every_control_group_of_the_machine() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let _proxy = sb.tproxy("company").uid(0).port(7890).start();
        let alice = sb.user(1001);
        let groups = [
            sb.cgroup(SERVICE).app(),
            sb.cgroup("system.slice/other.service").app_as(990),
            alice.cgroup(APP).app(),
            sb.cgroup("machine.slice/deep/er/and/deeper.scope").app(),
            sb.cgroup("user.slice/user-1001.slice/session-1.scope")
                .app_as(1001),
        ];
        let [service, other, app, deep, login] = &groups;
        let mut root = Session::of(&sb.user(0));
        root.replace(
            proxies(),
            json!([]),
            json!([
                to_proxy("", "company"),
                verdict(SERVICE, "drop"),
                verdict("machine.slice/deep", "direct"),
                verdict("user.slice/user-1001.slice/session-1.scope", "drop"),
            ]),
        );
        sb.expect_all_dropped(service);
        sb.expect_all_dropped(login);
        sb.expect(other, by("company"));
        sb.expect(app, by("company"));
        sb.expect(deep, direct);
        // What is no TCP and no UDP goes direct.
        let [to, _] = sb.destinations();
        assert_eq!(app.ping(to.ip()), direct(to));
        assert_eq!(root.status()["systemPolicy"], json!(true));

        root.call("RemovePolicy", json!({}));
        for app in &groups {
            sb.expect(app, direct);
        }
        assert_eq!(root.status()["systemPolicy"], json!(false));
    });
}

/// Neighbours are asked for their addresses, and groups joined, by sockets of the kernel's own.
#[test]
fn a_machine_that_drops_everything_still_says_what_the_kernel_has_to_say() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let (service, open) = (sb.cgroup(SERVICE).app(), sb.cgroup("open.slice").app());
        let mut root = Session::of(&sb.user(0));
        root.replace(
            json!([]),
            json!([]),
            json!([verdict("", "drop"), verdict("open.slice", "direct")]),
        );
        sb.expect_all_dropped(&service);
        sb.run(&[
            "ip",
            "neighbour",
            "flush",
            "dev",
            "uplink",
            "nud",
            "permanent",
        ]);
        // The bed takes a packet that waits for its neighbour's address for one that was dropped.
        wait_until("the neighbours have been found", || {
            sb.destinations()
                .into_iter()
                .all(|to| open.tcp(to) == direct(to))
        });
        sb.expect(&open, direct);
        // All multicast routers of the link (RFC 3810, 5.2.14).
        let routers = IpAddr::V6(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0x16));
        let said = || -> u64 { sb.deliveries(routers).iter().map(|d| d.packets).sum() };
        let before = said();
        let group = ["address", "add", "ff05::1234", "dev", "uplink", "autojoin"];
        sb.run(&[&["ip", "-6"], &group[..]].concat());
        wait_until("a report of the new group", || said() > before);
    });
}

/// A closed TCP socket has no owner any more, and still sends what was said before.
#[test]
fn a_machine_that_drops_everything_drops_what_closed_sockets_have_to_say() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        // The kernel soon gives up what nobody hears.
        sb.run(&["sh", "-ec", "echo 2 >/proc/sys/net/ipv4/tcp_orphan_retries"]);
        let drop_all = verdict("", "drop");
        for assignment in [drop_all.clone(), enforced(drop_all)] {
            for to in sb.destinations() {
                let service = sb.cgroup(SERVICE).app();
                let connection = service.open_tcp(to).expect("it opens");
                assert_eq!(connection.ask(), direct(to));
                sb.nft(&format!(
                    "table netdev deaf {{ chain in {{
                         type filter hook ingress device uplink priority 0;
                         {} saddr {} drop; }}; }}",
                    if to.is_ipv4() { "ip" } else { "ip6" },
                    to.ip(),
                ));
                connection.say("last words");
                let unheard = || {
                    let list = sb.run(&["ss", "-Htan", "dst", &to.to_string()]);
                    let bytes = list.split_whitespace().nth(2).map(str::to_owned);
                    bytes.is_some_and(|bytes| bytes != "0")
                };
                wait_until("it is said", unheard);
                let mut root = Session::of(&sb.user(0));
                root.replace(json!([]), json!([]), json!([assignment]));
                let before = sb.deliveries(to.ip());
                drop(connection);
                drop(service);
                wait_until("the kernel has given it up", || !unheard());
                sb.settle();
                assert_eq!(sb.deliveries(to.ip()), before, "{to}");
                // Not earlier: to what still comes for the socket when that is gone, the kernel itself says that there is none.
                sb.nft("delete table netdev deaf");
                root.call("RemovePolicy", json!({}));
            }
        }
    });
}

/// As users' own are, whatever users say of the same control groups.
#[test]
fn verdicts_are_found_however_deep_control_groups_are() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let alice = sb.user(1001);
        // user@1001.service is at level 3.
        let at = |level: usize| vec!["x"; level - 3].join("/");
        let in_system =
            |level| format!("user.slice/user-1001.slice/user@1001.service/{}", at(level));
        let apps = [5, 8, 9, 12, 20, 21].map(|level| (level, alice.cgroup(at(level)).app()));
        let service = sb.cgroup(SERVICE).app();
        let mut root = Session::of(&sb.user(0));
        let mut session = Session::of(&alice);
        let everybody = |root: &mut Session, verdicts: &[(usize, &str)], enforce: bool| {
            let mut all = vec![verdict("", "drop")];
            all.extend(
                verdicts
                    .iter()
                    .map(|(l, what)| verdict(&in_system(*l), what)),
            );
            if enforce {
                all = all.into_iter().map(enforced).collect();
            }
            root.replace(json!([]), json!([]), json!(all));
        };
        let dropped = |levels: &[usize]| {
            sb.expect_all_dropped(&service);
            for (level, app) in &apps {
                for to in sb.destinations() {
                    match levels.contains(level) {
                        true => assert!(app.udp(to).is_dropped(), "{level}"),
                        false => assert_eq!(app.udp(to), direct(to), "{level}"),
                    }
                }
            }
        };
        for enforce in [false, true] {
            if enforce {
                let own = [5, 9, 20].map(|level| verdict(&at(level), "direct"));
                session.replace(json!([]), json!([]), json!(own));
            }
            everybody(&mut root, &[(8, "direct"), (12, "drop")], enforce);
            dropped(&[5, 12, 20, 21]);
            everybody(&mut root, &[(20, "direct")], enforce);
            dropped(&[5, 8, 9, 12]);
            everybody(&mut root, &[(5, "direct"), (8, "drop")], enforce);
            dropped(&[8, 9, 12, 20, 21]);
        }
        // What is not enforced is for users to say.
        everybody(&mut root, &[(8, "drop")], false);
        dropped(&[]);
    });
}

/// What a user's own verdict, the system's and an enforced one come to.
#[test]
fn users_have_their_own_way_but_for_what_is_enforced() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let _company = sb.tproxy("company").uid(0).port(7890).start();
        let alice = sb.user(1001);
        let _own = sb.tproxy("own").uid(1001).port(7891).start();
        let app = alice.cgroup(APP).app();
        let bob = sb.user(1002).cgroup(APP).app();
        let in_system = format!("user.slice/user-1001.slice/user@1001.service/{APP}");
        let mut root = Session::of(&sb.user(0));
        let mut session = Session::of(&alice);

        let assignment = |path: &str, target: &str| match target {
            "company" | "own" => to_proxy(path, target),
            target => verdict(path, target),
        };
        let check = |target: &str| match target {
            "drop" => sb.expect_all_dropped(&app),
            "direct" => sb.expect(&app, direct),
            proxy => sb.expect(&app, by(proxy)),
        };
        for system in [None, Some("direct"), Some("drop"), Some("company")] {
            for enforce in [false, true] {
                // On the application itself, and on what it is in.
                for path in [in_system.as_str(), ""] {
                    let mut list = Vec::new();
                    if let Some(system) = system {
                        let assignment = assignment(path, system);
                        list.push(if enforce {
                            enforced(assignment)
                        } else {
                            assignment
                        });
                    }
                    root.replace(proxies(), json!([]), json!(list));
                    for user in [None, Some("direct"), Some("drop"), Some("own")] {
                        let list: Vec<_> =
                            user.map(|user| assignment(APP, user)).into_iter().collect();
                        session.replace(
                            json!([{ "name": "own", "port": 7891 }]),
                            json!([]),
                            json!(list),
                        );
                        let decided = match (system, user) {
                            (Some(system), _) if enforce => system,
                            (_, Some(user)) => user,
                            (Some(system), None) => system,
                            (None, None) => "direct",
                        };
                        check(decided);
                    }
                }
            }
        }
        // A catch-all of the user's own covers everything in the user's subtree and nothing else.
        root.replace(proxies(), json!([]), json!([to_proxy("", "company")]));
        session.replace(json!([]), json!([]), json!([verdict("", "direct")]));
        sb.expect(&app, direct);
        sb.expect(&bob, by("company"));
        // In what is enforced there are exceptions, for which users' own verdicts hold again.
        root.replace(
            proxies(),
            json!([]),
            json!([
                enforced(verdict("", "drop")),
                to_proxy(&in_system, "company"),
                verdict("system.slice", "direct"),
            ]),
        );
        sb.expect(&app, direct);
        sb.expect_all_dropped(&bob);
        sb.expect(&sb.cgroup(SERVICE).app(), direct);
        session.call("RemovePolicy", json!({}));
        sb.expect(&app, by("company"));
    });
}

#[test]
fn one_verdict_more_or_less_is_enforced_at_once() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let alice = sb.user(1001);
        let app = alice.cgroup(APP).app();
        let mut session = Session::of(&alice);
        session.replace(json!([]), json!([]), json!([verdict("", "direct")]));
        let mut root = Session::of(&sb.user(0));
        root.replace(json!([]), json!([]), json!([verdict("user.slice", "drop")]));
        sb.expect(&app, direct);
        root.assign(json!([enforced(verdict("user.slice", "drop"))]));
        sb.expect_all_dropped(&app);
        root.assign(json!([verdict("user.slice", "drop")]));
        sb.expect(&app, direct);
        root.assign(json!([enforced(verdict(
            "user.slice/user-1001.slice",
            "drop"
        ))]));
        sb.expect_all_dropped(&app);
        root.call(
            "UpdateAssignments",
            json!({ "assign": [], "remove": ["user.slice/user-1001.slice"] }),
        );
        sb.expect(&app, direct);
    });
}

#[test]
fn open_connections_go_on_as_they_began_whoever_began_them() {
    sandbox(|sb| {
        let _helper = sb.helper().config("udp-verdicts: per-conversation").start();
        let _company = sb.tproxy("company").uid(0).port(7890).start();
        let alice = sb.user(1001);
        let _own = sb.tproxy("own").uid(1001).port(7891).start();
        let app = alice.cgroup(APP).app();
        let mut root = Session::of(&sb.user(0));
        let mut session = Session::of(&alice);
        let own = || json!([{ "name": "own", "port": 7891 }]);
        let all = |connections: &[(SocketAddr, Connection)],
                   outcome: &dyn Fn(SocketAddr) -> Outcome| {
            for (to, connection) in connections {
                assert_eq!(connection.ask(), outcome(*to), "{to}");
            }
        };
        let by_company = |to| proxied("company", to);
        let by_own = |to| proxied("own", to);

        let directly = sb.open(&app);
        root.replace(proxies(), json!([]), json!([to_proxy("", "company")]));
        all(&directly, &direct);
        let company = sb.open(&app);
        // The user's own verdict, and one of the user's that has nothing to say.
        session.replace(own(), json!([]), json!([to_proxy("", "own")]));
        all(&company, &by_company);
        let users = sb.open(&app);
        all(&users, &by_own);
        session.replace(own(), json!([]), json!([verdict("", "direct")]));
        all(&company, &by_company);
        all(&users, &by_own);
        session.replace(own(), json!([]), json!([]));
        all(&company, &by_company);
        all(&users, &by_own);
        all(&directly, &direct);
        // Enforced, and in the system's other verdicts.
        root.assign(json!([enforced(verdict("user.slice", "direct"))]));
        all(&company, &by_company);
        all(&users, &by_own);
        root.replace(proxies(), json!([]), json!([]));
        all(&company, &by_company);
        all(&users, &by_own);
        // The user's proxy is gone: the connection ends, rather than going on to anybody else.
        session.call("RemovePolicy", json!({}));
        all(&company, &by_company);
        for (to, connection) in &users {
            let outcome = connection.ask();
            assert!(
                !matches!(outcome, Outcome::Direct { .. } | Outcome::Proxied { .. }),
                "{to}: {outcome:?}"
            );
        }
        session.replace(own(), json!([]), json!([to_proxy("", "own")]));
        root.call("RemovePolicy", json!({}));
        for (to, connection) in &company {
            let outcome = connection.ask();
            assert!(
                !matches!(outcome, Outcome::Direct { .. } | Outcome::Proxied { .. }),
                "{to}: {outcome:?}"
            );
        }
        all(&directly, &direct);
        drop(company);
        sb.expect(&app, by_own);
    });
}

/// A conversation keeps the mark of its proxy for as long as it goes on, and that may be a user's proxy's by then.
#[test]
fn a_mark_that_is_a_users_by_now_brings_that_user_nothing() {
    sandbox(|sb| {
        // One bit for numbers: one proxy on the whole machine.
        let _helper = sb.helper().config("mark-mask: 0x03000000").start();
        let _company = sb.tproxy("company").uid(0).port(7890).start();
        let alice = sb.user(1001);
        let own = sb.tproxy("own").uid(1001).port(7891).start();
        let cgroup = alice.cgroup(APP);
        let apps = [
            sb.cgroup("").app(),
            sb.cgroup("daemon").app(),
            sb.cgroup(SERVICE).app(),
            sb.cgroup("machine.slice/deep/er/and/deeper.scope").app(),
            sb.user(1002).cgroup(APP).app(),
        ];
        let mut root = Session::of(&sb.user(0));
        root.replace(proxies(), json!([]), json!([to_proxy("", "company")]));
        let mut flows = Vec::new();
        for app in &apps {
            for to in sb.destinations() {
                for flow in [app.open_tcp(to).expect("it opens"), app.open_udp(to)] {
                    for _ in 0..2 {
                        assert_eq!(flow.ask(), proxied("company", to));
                    }
                    flows.push((to, flow));
                }
            }
        }
        root.call("RemovePolicy", json!({}));
        let mut session = Session::of(&alice);
        let policy = json!([{ "name": "own", "port": 7891 }]);
        session.replace(policy, json!([]), json!([to_proxy(APP, "own")]));
        for (to, flow) in &flows {
            let outcome = flow.ask();
            let refused = matches!(outcome, Outcome::Refused | Outcome::Closed);
            assert!(refused || outcome.is_dropped(), "{to}: {outcome:?}");
            sb.assert_nothing_left_for(to.ip());
        }
        own.assert_idle();
        // What is the user's own goes there.
        sb.expect(&cgroup.app(), by("own"));
    });
}

/// It takes a packet that is among the rules at the very moment in which a user gets chains: so there is always
/// one.
#[test]
fn nothing_leaves_while_a_user_comes_to_have_a_policy_and_loses_it() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let alice = sb.user(1001);
        let app = alice.cgroup(APP).app();
        let mut root = Session::of(&sb.user(0));
        root.replace(json!([]), json!([]), json!([verdict("", "drop")]));
        let mut session = Session::of(&alice);
        let to = sb.destinations();
        for to in to {
            app.pour(to);
        }
        wait_until("it pours", || app.poured() > 1_000);
        for _ in 0..300 {
            session.replace(json!([]), json!([]), json!([verdict(APP, "drop")]));
            session.call("RemovePolicy", json!({}));
        }
        drop(app);
        for to in to {
            sb.assert_nothing_left_for(to.ip());
        }
    });
}

#[test]
fn only_root_may_enforce_and_forward() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let alice = sb.user(1001);
        let mut session = Session::of(&alice);
        let refused = |session: &mut Session, parameters: Value, parameter: &str| {
            assert_eq!(
                session.refusal("ReplacePolicy", parameters),
                (
                    "InvalidParameter".to_owned(),
                    json!({ "parameter": parameter })
                ),
            );
        };
        let assignment = enforced(verdict("", "drop"));
        refused(
            &mut session,
            json!({ "proxies": [], "bypass": [], "assignments": [assignment] }),
            "assignments[0].enforce",
        );
        let gateway = |interfaces: Value, proxy: &str| {
            json!({
                "proxies": proxies(), "bypass": [], "assignments": [],
                "gateway": { "interfaces": interfaces, "proxy": proxy },
            })
        };
        refused(&mut session, gateway(json!(["br0"]), "company"), "gateway");
        session.replace(json!([]), json!([]), json!([]));
        assert_eq!(
            session.refusal(
                "UpdateAssignments",
                json!({ "assign": [assignment], "remove": [] })
            ),
            (
                "InvalidParameter".to_owned(),
                json!({ "parameter": "assign[0].enforce" })
            ),
        );
        let mut root = Session::of(&sb.user(0));
        for bad in ["", "lo", "a/b", "br 0", "sixteen-bytes-xx"] {
            refused(
                &mut root,
                gateway(json!(["br0", bad]), "company"),
                "gateway.interfaces[1]",
            );
        }
        refused(&mut root, gateway(json!([]), "no proxy"), "gateway.proxy");
        // What is translated reaches only sockets of the caller's, and root's are the system's.
        let redirect = json!([{ "name": "redir", "port": 7892, "redirect": true }]);
        refused(
            &mut root,
            json!({ "proxies": redirect, "bypass": [], "assignments": [] }),
            "proxies[0].redirect",
        );
        assert_eq!(
            root.refusal("ReplacePolicy", gateway(json!(["br0"]), "other")),
            ("UnknownProxy".to_owned(), json!({ "name": "other" })),
        );
        root.call("ReplacePolicy", gateway(json!(["br0", "br0"]), "company"));
    });
}

/// Existing configurations name services that have users of their own.
#[test]
fn the_systems_proxies_belong_to_root_or_to_a_system_user() {
    sandbox(|sb| {
        let _helper = sb.helper().config("proxy-users: [1005]").start();
        let service = sb.cgroup(SERVICE).app();
        let mut root = Session::of(&sb.user(0));
        let serves = [0, 1, 990, 999, 61184, 65519, 1005];
        let does_not = [1000, 1001, 61183, 65520, 65534, 200_000];
        for (uid, port) in serves.into_iter().chain(does_not).zip(7900..) {
            let _proxy = sb.tproxy("company").uid(uid).port(port).start();
            root.replace(
                json!([{ "name": "company", "port": port }]),
                json!([]),
                json!([to_proxy(SERVICE, "company")]),
            );
            for to in sb.destinations() {
                for transport in [Tcp, Udp] {
                    let outcome = service.ask(transport, to);
                    if serves.contains(&uid) {
                        assert_eq!(outcome, proxied("company", to), "{uid} {transport:?}");
                    } else {
                        assert!(refused(&outcome, transport, to), "{uid} {outcome:?}");
                    }
                }
            }
        }
    });
}

fn refused(outcome: &Outcome, transport: Transport, to: SocketAddr) -> bool {
    match outcome {
        Outcome::Refused => true,
        // Linux sends no ICMP error from an address that is not its own.
        Outcome::Silent => transport == Udp && to.is_ipv4(),
        _ => false,
    }
}

#[test]
fn what_the_system_says_outlives_the_helper_and_is_restored() {
    sandbox(|sb| {
        let mut helper = sb
            .helper()
            .config("own-table: false\non-agent-loss: direct")
            .start();
        let _company = sb.tproxy("company").uid(0).port(7890).start();
        let alice = sb.user(1001);
        let app = alice.cgroup(APP).app();
        let service = sb.cgroup(SERVICE).app();
        let assignments = || {
            json!([
                to_proxy("", "company"),
                enforced(verdict("user.slice/user-1001.slice", "drop")),
            ])
        };
        let mut session = Session::of(&alice);
        session.replace(json!([]), json!([]), json!([verdict("", "direct")]));
        let mut root = Session::of(&sb.user(0));
        root.replace(proxies(), json!([]), assignments());
        let check = || {
            sb.expect(&service, by("company"));
            sb.expect_all_dropped(&app);
        };
        let connections = sb.open(&service);
        check();
        sb.nft("flush ruleset");
        wait_until("the table to be back", || sb.has_table());
        check();
        helper.kill();
        check();
        helper.start_again();
        check();
        let mut root = Session::of(&sb.user(0));
        root.replace(proxies(), json!([]), assignments());
        check();
        for (to, connection) in &connections {
            assert_eq!(connection.ask(), proxied("company", *to));
        }
        drop(root);
        // A grace later it is gone, and nothing of it is left.
        wait_until("the policy's end", || {
            !sb.chains().iter().any(|chain| chain.contains("-0-"))
        });
        sb.expect(&service, direct);
        assert!(
            !sb.maps()
                .iter()
                .any(|map| map == "enforced" || map.ends_with("-0"))
        );
        helper.stop();
        assert!(!sb.has_table());
    });
}
