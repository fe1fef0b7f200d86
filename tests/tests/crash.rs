//! A helper that is killed, started again, or was there before: what stays in force, and what is
//! left in the end.

#![allow(clippy::expect_used, reason = "a panic is a failed test")]

use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::os::unix::net::UnixStream;

use cgtproxy_helper::cgroup::Root;
use cgtproxy_helper::config::Config;
use cgtproxy_helper::kernel::Linux;
use cgtproxy_helper::nft::{
    Bypass, Delivery, Exceptions, Fakes, Nftables, ProxySettings, Records, Settings, Verdict,
};
use cgtproxy_helper::peer::Peer;
use cgtproxy_helper::registry::PolicyRequest;
use cgtproxy_helper::route::Routing;
use cgtproxy_helper::snapshot::Snapshot;
use cgtproxy_helper::state::{ConnectionId, State};
use cgtproxy_proto::path::ControlGroupPath;
use cgtproxy_tests::injection::Injection;
use cgtproxy_tests::sandbox::{Rule, Sandbox, Service, User, direct, proxied, sandbox};
use cgtproxy_tests::session::{Session, to_proxy, verdict};
use cgtproxy_tests::wait::wait_until;
use cgtproxy_tests::wire::Transport::Udp;
use serde_json::json;

const APP: &str = "app.slice/app-a.scope";
/// With a grace that no test lives to see the end of.
const OWN_TABLE: [&str; 2] = [
    "own-table: true\ngrace-seconds: 600",
    "own-table: false\ngrace-seconds: 600",
];

fn take(session: &mut Session, user: &User) {
    user.cgroup("app.slice/app-drop.scope");
    session.replace(
        json!([{ "name": "other", "port": 7000 }, { "name": "mihomo", "port": 7890 }]),
        json!(["10.0.0.0/8", "fd00::/8"]),
        json!([
            to_proxy("", "mihomo"),
            verdict("app.slice/app-drop.scope", "drop")
        ]),
    );
}

#[track_caller]
fn assert_nothing_left(sb: &Sandbox) {
    assert!(!sb.has_table());
    for family in [4, 6] {
        assert_eq!(sb.mark_rules(family), []);
        assert!(sb.routes(family, "25447").is_empty());
    }
}

#[test]
fn routing_is_set_up_once_and_taken_over() {
    sandbox(|sb| {
        let mut helper = sb.helper().start();
        for _ in 0..3 {
            for family in [4, 6] {
                assert_eq!(
                    sb.mark_rules(family),
                    [Rule {
                        priority: 800,
                        mark: Some("0x80000000/0x80000000".into()),
                        table: "25447".into(),
                        protocol: Some("199".into()),
                    }],
                );
                let routes = sb.routes(family, "25447");
                assert_eq!(routes.len(), 1, "{routes:?}");
                assert!(
                    routes[0].starts_with("local default dev lo proto 199"),
                    "{routes:?}"
                );
            }
            helper.kill();
            helper.start_again();
        }
    });
}

/// What a helper that stops removes is what it has set up, whatever its file says by then.
#[test]
fn what_was_set_up_is_removed_though_the_configuration_is_another_one() {
    sandbox(|sb| {
        let mut helper = sb
            .helper()
            .config("route-table: 4000\nrule-priority: 900")
            .start();
        for (table, later) in [
            (
                "4000",
                "route-table: 4001\nrule-priority: 901\nmark-mask: 0xf0000000",
            ),
            ("4001", "route-tables: 4002"),
        ] {
            for family in [4, 6] {
                assert_eq!(sb.mark_rules(family)[0].table, table);
                assert_eq!(sb.routes(family, table).len(), 1);
            }
            helper.write_config(later);
            assert_eq!(helper.stop().code(), Some(0), "{}", helper.log());
            assert!(!sb.has_table());
            for family in [4, 6] {
                assert_eq!(sb.mark_rules(family), []);
                assert!(sb.routes(family, table).is_empty());
            }
            if table == "4000" {
                helper.start_again();
            }
        }
    });
}

#[test]
fn verdicts_and_open_connections_outlive_a_killed_helper() {
    sandbox(|sb| {
        for config in OWN_TABLE {
            let mut helper = sb.helper().config(config).start();
            let user = sb.user(1001);
            let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
            let app = user.cgroup(APP).app();
            let dropped = user.cgroup("app.slice/app-drop.scope").app();
            let mut session = Session::of(&user);
            take(&mut session, &user);
            let destinations = sb.destinations();
            let connections =
                destinations.map(|to| [app.open_tcp(to).expect("it opens"), app.open_udp(to)]);
            let check = || {
                for (to, connections) in destinations.iter().zip(&connections) {
                    for connection in connections {
                        assert_eq!(connection.ask(), proxied("mihomo", *to));
                    }
                    assert_eq!(app.tcp(*to), proxied("mihomo", *to));
                    assert!(dropped.udp(*to).is_dropped());
                }
            };
            let traffic = destinations.map(|to| app.traffic(Udp, to));
            let marks = sb.run(&["nft", "list", "map", "inet", "cgtproxy", "marks"]);
            check();
            for _ in 0..5 {
                helper.kill();
                check();
                helper.start_again();
                check();
                session = Session::of(&user);
                assert_eq!(session.status()["session"], "grace");
                take(&mut session, &user);
                check();
                assert_eq!(
                    sb.run(&["nft", "list", "map", "inet", "cgtproxy", "marks"]),
                    marks,
                    "a proxy keeps its mark",
                );
            }
            for traffic in traffic {
                traffic.next(1);
                traffic.stop();
            }
            for to in destinations {
                sb.assert_nothing_left_for(to.ip());
            }
            session.call("RemovePolicy", json!({}));
            helper.stop();
            assert_nothing_left(sb);
        }
    });
}

/// What the old one's mark leads to is deleted last, and what the new one's leads to is added first.
#[test]
fn a_proxy_that_is_renamed_after_a_restart_is_another_one() {
    sandbox(|sb| {
        let mut helper = sb.helper().start();
        let user = sb.user(1001);
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let app = user.cgroup(APP).app();
        let mut session = Session::of(&user);
        let named = |session: &mut Session, name: &str| {
            session.replace(
                json!([{ "name": name, "port": 7890 }]),
                json!([]),
                json!([to_proxy("", name)]),
            );
        };
        named(&mut session, "before");
        helper.kill();
        helper.start_again();
        let mut session = Session::of(&user);
        named(&mut session, "before");
        for name in ["after", "before", "after"] {
            named(&mut session, name);
            for to in sb.destinations() {
                assert_eq!(app.tcp(to), proxied("mihomo", to));
            }
        }
    });
}

/// Under another mask the numbers of proxies are others: what a user left there is not to be taken for somebody else's.
#[test]
fn what_was_left_under_another_mask_leads_to_nobody() {
    sandbox(|sb| {
        let (alice, bob) = (sb.user(1001), sb.user(1002));
        let config = "own-table: false\ngrace-seconds: 600\nmark-mask: ";
        let mut helper = sb.helper().config(&format!("{config}0xff000000")).start();
        let proxies: Vec<_> = (1..=9)
            .map(|number| json!({ "name": format!("p{number}"), "port": 7890 }))
            .collect();
        let app = alice.cgroup(APP).app();
        Session::of(&alice).replace(json!(proxies), json!([]), json!([to_proxy("", "p9")]));
        helper.kill();
        std::fs::remove_file(Service::socket()).expect("it was killed");
        let _helper = sb.helper().config(&format!("{config}0x0f000000")).start();
        let _theirs = sb.tproxy("bob's").uid(1002).port(7000).start();
        let theirs = bob.cgroup(APP).app();
        Session::of(&bob).replace(
            json!([{ "name": "p1", "port": 7000 }]),
            json!([]),
            json!([to_proxy("", "p1")]),
        );
        for to in sb.destinations() {
            assert_eq!(theirs.udp(to), proxied("bob's", to));
            assert_eq!(app.udp(to), direct(to));
            assert_eq!(app.tcp(to), direct(to));
        }
    });
}

#[test]
fn open_connections_that_are_dropped_stay_so_whoever_comes_after_the_helper() {
    sandbox(|sb| {
        for config in OWN_TABLE {
            let mut helper = sb.helper().config(config).start();
            let user = sb.user(1001);
            let app = user.cgroup(APP).app();
            let none = || json!([]);
            let mut session = Session::of(&user);
            session.replace(none(), none(), none());
            let open = sb.destinations().map(|to| (app.open_udp(to), to));
            let are_direct = || {
                for (connection, to) in &open {
                    assert_eq!(connection.ask(), direct(*to));
                }
            };
            let are_dropped = || {
                for (connection, _) in &open {
                    assert!(connection.ask().is_dropped());
                }
            };
            are_direct();
            let dropped = json!([verdict(APP, "drop")]);
            session.assign(dropped.clone());
            for _ in 0..2 {
                helper.kill();
                are_dropped();
                helper.start_again();
                are_dropped();
                session = Session::of(&user);
                session.replace(none(), none(), dropped.clone());
                are_dropped();
            }
            session.replace(none(), none(), none());
            assert!(!sb.open_connections_are_looked_at());
            are_direct();
            helper.kill();
            helper.start_again();
            are_direct();
            session = Session::of(&user);
            session.replace(none(), none(), dropped);
            are_dropped();
            session.call("RemovePolicy", json!({}));
            are_direct();
            helper.stop();
        }
    });
}

#[test]
fn what_a_helper_with_another_mask_left_is_taken_over_whole() {
    sandbox(|sb| {
        let mut helper = sb.helper().config("mark-mask: 0xff000000").start();
        let user = sb.user(1001);
        let app = user.cgroup(APP).app();
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let hijack = json!({ "ipv4": "192.0.2.53", "port": 53 });
        let proxies = json!([
            { "name": "mihomo", "port": 7890, "dnsHijack": hijack },
            { "name": "other", "port": 7000, "redirect": true, "dnsHijack": hijack },
        ]);
        let replace = || {
            let mut session = Session::of(&user);
            session.replace(proxies.clone(), json!([]), json!([to_proxy(APP, "mihomo")]));
            session
        };
        drop(replace());
        for mask in ["0x00ff0000", "0x00000700", "0xff000000"] {
            helper.kill();
            helper.write_config(&format!("mark-mask: {mask}"));
            helper.start_again();
            let mut session = replace();
            for to in sb.destinations() {
                assert_eq!(app.tcp(to), proxied("mihomo", to));
                assert_eq!(app.udp(to), proxied("mihomo", to));
            }
            if mask == "0xff000000" {
                session.call("RemovePolicy", json!({}));
            }
        }
        for map in ["marks", "deliver", "ports", "guard", "resolve", "receive"] {
            assert_eq!(sb.map_elements(map), [], "{map}");
        }
        assert!(sb.objects_of(1001).is_empty());
    });
}

#[test]
fn what_a_killed_helper_left_goes_when_no_agent_comes_back() {
    sandbox(|sb| {
        for config in OWN_TABLE {
            // Long enough to see that it was taken over.
            let config = config.replace("600", "3") + "\non-agent-loss: direct";
            let mut helper = sb.helper().config(&config).start();
            let user = sb.user(1001);
            let app = user.cgroup(APP).app();
            let mut session = Session::of(&user);
            take(&mut session, &user);
            helper.kill();
            drop(session);
            helper.start_again();
            assert!(sb.run(&["nft", "list", "chains"]).contains("proxy-1001-"));
            wait_until("the grace is over", || sb.map_elements("users").is_empty());
            assert!(!sb.run(&["nft", "list", "ruleset"]).contains("1001"));
            assert_eq!(sb.bypass_lists(), 0);
            for to in sb.destinations() {
                assert_eq!(app.udp(to), direct(to));
            }
            helper.stop();
        }
    });
}

/// Nobody knows what is in them, nor whose they are: they go with the last user who may have one.
#[test]
fn bypass_lists_that_a_killed_helper_left_go_once_nobody_can_have_them() {
    sandbox(|sb| {
        let mut helper = sb.helper().start();
        let users = [sb.user(1001), sb.user(1002), sb.user(1003)];
        let [v4, v6] = sb.destinations();
        let apps = users.each_ref().map(|user| user.cgroup(APP).app());
        let replace = |user, bypass: SocketAddr| {
            let mut session = Session::of(user);
            let list = json!([bypass.ip()]);
            session.replace(json!([]), list, json!([verdict(APP, "drop")]));
            session
        };
        let sessions = [(0, v4), (1, v4), (2, v6)].map(|(n, list)| replace(&users[n], list));
        assert_eq!(sb.bypass_lists(), 2);
        helper.kill();
        drop(sessions);
        helper.start_again();
        let mut sessions = Vec::new();
        // Each comes back with the same, with another one, and with none of what was left.
        for (n, list, lists) in [(0, v4, 3), (2, v4, 3), (1, v6, 2)] {
            sessions.push(replace(&users[n], list));
            assert_eq!(sb.bypass_lists(), lists);
            for to in [v4, v6] {
                match to == list {
                    true => assert_eq!(apps[n].udp(to), direct(to)),
                    false => assert!(apps[n].udp(to).is_dropped()),
                }
            }
        }
        for (session, lists) in sessions.iter_mut().zip([2, 1, 0]) {
            session.call("RemovePolicy", json!({}));
            assert_eq!(sb.bypass_lists(), lists);
        }
    });
}

#[test]
fn a_table_of_another_layout_is_replaced() {
    sandbox(|sb| {
        for config in OWN_TABLE {
            sb.nft(
                "table inet cgtproxy {
                     set users { type ipv4_addr; }
                     chain user-1001 { type filter hook output priority 0; policy drop; }
                 }",
            );
            let mut helper = sb.helper().config(config).start();
            // It is nobody's loss only if a helper has made it.
            helper.wait_log("another program's table 'inet cgtproxy'");
            let user = sb.user(1001);
            let app = user.cgroup(APP).app();
            for to in sb.destinations() {
                assert_eq!(app.udp(to), direct(to));
            }
            take(&mut Session::of(&user), &user);
            helper.stop();
            assert_nothing_left(sb);
            sb.nft(
                "table inet cgtproxy {
                     chain version-1-ff000000 { }
                     chain proxy-1001-mihomo { }
                 }",
            );
            let mut helper = sb.helper().config(config).start();
            let log = helper.log();
            assert!(!log.contains("another program"), "{log}");
            let gone =
                "that of 1 user is not in a snapshot: it is removed until their agents are back";
            assert!(log.contains(gone), "{log}");
            assert!(sb.objects_of(1001).is_empty());
            helper.stop();
        }
    });
}

#[test]
fn remove_leaves_nothing_of_a_killed_helper() {
    sandbox(|sb| {
        for config in OWN_TABLE {
            let mut helper = sb.helper().config(config).start();
            let user = sb.user(1001);
            let mut session = Session::of(&user);
            take(&mut session, &user);
            helper.kill();
            assert!(sb.has_table());
            for _ in 0..2 {
                let mut remove = sb.helper().config(config).argument("--remove").spawn();
                assert!(remove.wait().success());
                assert_nothing_left(sb);
            }
        }
    });
}

#[test]
fn remove_leaves_nothing_even_if_the_configuration_is_wrong() {
    sandbox(|sb| {
        let mut helper = sb.helper().start();
        let user = sb.user(1001);
        let mut session = Session::of(&user);
        take(&mut session, &user);
        helper.kill();
        let wrong = sb.helper().config("grace-second: 5");
        let mut remove = wrong.argument("--remove").spawn();
        // And it is said, as at any other time.
        assert_eq!(remove.wait().code(), Some(78));
        remove.wait_log(":1:1: unknown key");
        assert_nothing_left(sb);
    });
}

#[test]
fn a_helper_that_is_told_to_stop_leaves_nothing() {
    sandbox(|sb| {
        let mut helper = sb.helper().start();
        let user = sb.user(1001);
        let mut session = Session::of(&user);
        take(&mut session, &user);
        assert!(helper.stop().success());
        assert_nothing_left(sb);
    });
}

#[test]
fn a_second_helper_is_told_so() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let mut second = sb.helper().spawn();
        assert!(!second.wait().success());
        second.wait_log("another helper listens on /run/cgtproxy/helper.sock");
        let mut elsewhere = sb.helper().argument("--remove").spawn();
        assert!(!elsewhere.wait().success());
        elsewhere.wait_log("belongs to another process");
        assert!(sb.has_table());
    });
}

#[test]
fn a_wrong_configuration_is_said_once_and_not_tried_again() {
    sandbox(|sb| {
        let mut helper = sb.helper().config("grace-second: 5").spawn();
        // The status for which the unit has RestartPreventExitStatus=.
        assert_eq!(helper.wait().code(), Some(78));
        helper.wait_log(":1:1: unknown key");
        assert!(!sb.has_table());
    });
}

#[test]
fn other_programs_leave_an_owned_table_alone() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let app = user.cgroup(APP).app();
        let mut session = Session::of(&user);
        session.replace(json!([]), json!([]), json!([verdict("", "drop")]));
        assert_eq!(session.status()["tableOwned"], true);
        sb.nft("flush ruleset");
        for to in sb.destinations() {
            assert!(app.udp(to).is_dropped());
        }
    });
}

/// The helper's state by itself, without the monitor that would mend what the test breaks.
#[test]
fn a_refused_transaction_changes_neither_the_kernel_nor_what_the_helper_knows() {
    sandbox(|sb| {
        let config = "/run/helper.yaml";
        std::fs::write(config, "own-table: false").expect("/run is ours");
        let config = Config::load(Some(config.as_ref())).expect("a configuration");
        let root = Root::open(None).expect("a control group root");
        sb.cgroup("a");
        let (_ours, theirs) = UnixStream::pair().expect("a socket pair");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .expect("a runtime");
        let _guard = runtime.enter();
        theirs.set_nonblocking(true).expect("a socket");
        let theirs = tokio::net::UnixStream::from_std(theirs).expect("a socket");
        let peer = Peer::of(&theirs).expect("a peer");
        let subtree = root.subtree(&peer).expect("a subtree");
        let routing = Routing::open(config.marks, config.route_table, config.rule_priority)
            .expect("a socket");
        let settings = Settings {
            marks: config.marks,
            proxy_uids: config.proxy_uids.clone(),
            own: false,
            udp_verdicts: config.udp_verdicts,
        };
        let (nftables, left) = Nftables::open(settings, &Records::default()).expect("a table");
        let (mut state, _) = State::new(
            config,
            root,
            Linux::new(nftables, routing),
            Snapshot::nowhere(),
            left,
        )
        .expect("routing");

        let policy = |proxies: &[&str]| PolicyRequest {
            subtree: subtree.top(),
            proxies: proxies
                .iter()
                .map(|name| {
                    let settings = ProxySettings {
                        delivery: Delivery::Tproxy(NonZeroU16::MIN),
                        exceptions: Exceptions::default(),
                        fakes: Fakes::default(),
                        reject_udp: false,
                        dns_hijack: None,
                    };
                    (name.parse().expect("a name"), settings)
                })
                .collect(),
            bypass_entries: 0,
            bypass: Bypass::default(),
            gateway: None,
        };
        let assign = |proxy: &str| {
            let path = ControlGroupPath::from_wire("a").expect("a path");
            [(path, Verdict::Proxy(proxy.parse().expect("a name")).into())].into()
        };
        let uid = peer.uid();
        let id = ConnectionId(1);
        state
            .replace(uid, id, &subtree, policy(&["old"]), assign("old"))
            .expect("it is taken");
        // Somebody takes a chain away that goes with the old proxy.
        sb.nft("flush map inet cgtproxy divert; delete chain inet cgtproxy divert-0-old");
        let kernel = sb.run(&["nft", "list", "ruleset"]);
        let known = format!("{:?}", state.registry());
        // A new proxy, which comes first in the transaction, then the end of the old one.
        let refused = state.replace(uid, id, &subtree, policy(&["new"]), [].into());
        assert!(
            matches!(refused, Err(cgtproxy_helper::state::Error::Kernel(_))),
            "{refused:?}"
        );
        assert_eq!(format!("{:?}", state.registry()), known);
        assert_eq!(sb.run(&["nft", "list", "ruleset"]), kernel);
        // And what the helper knows is enough to make it all again.
        state.rebuild_table().expect("it is taken");
        state
            .replace(uid, id, &subtree, policy(&["new"]), assign("new"))
            .expect("it is taken");
    });
}

/// Each transaction of a change is refused in turn, as by a kernel that lacks memory. Those before it are taken back, and
/// what the rules look at then is noted: the same change is in force once it is taken.
#[test]
fn what_came_before_a_refused_transaction_is_taken_back() {
    sandbox(|sb| {
        const BELOW: &str = "app.slice/app-a.scope/a/b";
        let helper = sb.helper().config("own-table: false").start();
        let user = sb.user(1001);
        let app = user.cgroup(BELOW).app();
        let mihomo = json!({ "name": "mihomo", "port": 7890 });
        let change = json!({
            "proxies": [mihomo, { "name": "other", "port": 7000 }],
            "bypass": [],
            "assignments": [to_proxy(APP, "other"), verdict(BELOW, "dropAll")],
        });
        let mut session = Session::of(&user);
        for message in 1.. {
            session.replace(json!([mihomo]), json!([]), json!([verdict(APP, "direct")]));
            let before = sb.run(&["nft", "list", "ruleset"]);
            let answer = {
                let when = format!("error=ENOMEM:when={message}");
                let _refused = Injection::of(&helper, "sendto", &when);
                session.0.send(&json!({
                    "method": "org.cgtproxy.Helper.ReplacePolicy",
                    "parameters": change,
                }));
                session.0.receive()
            };
            // The answer itself did not get through.
            let Some(answer) = answer else {
                assert!(message > 3, "it took {} transactions", message - 1);
                break;
            };
            assert_eq!(answer["error"], "org.cgtproxy.Helper.KernelRefused");
            assert_eq!(sb.run(&["nft", "list", "ruleset"]), before, "{message}");
            for to in sb.destinations() {
                assert_eq!(app.udp(to), direct(to));
            }
            session.call("ReplacePolicy", change.clone());
            sb.expect_dropped(&app);
            session.call("RemovePolicy", json!({}));
        }
    });
}

/// The system's policy comes and goes in several transactions.
#[test]
fn users_verdicts_outlive_a_helper_that_is_killed_within_a_change_of_the_systems_policy() {
    sandbox(|sb| {
        const SERVICE: &str = "system.slice/web.service";
        let mut helper = sb.helper().config("grace-seconds: 600").start();
        let user = sb.user(1001);
        let dropped = user.cgroup(APP).app();
        sb.cgroup(SERVICE);
        let policy =
            json!({ "proxies": [], "bypass": [], "assignments": [verdict(SERVICE, "drop")] });
        let changes = [
            ("ReplacePolicy", policy.clone()),
            ("RemovePolicy", json!({})),
        ];
        for (method, parameters) in changes {
            // Until it is not killed before it has answered.
            for message in 1.. {
                let mut session = Session::of(&user);
                session.replace(json!([]), json!([]), json!([verdict(APP, "dropAll")]));
                let mut system = Session::of(&sb.user(0));
                system.call("ReplacePolicy", policy.clone());
                if method == "ReplacePolicy" {
                    system.call("RemovePolicy", json!({}));
                }
                let answer = {
                    let when = format!("signal=SIGKILL:when={message}");
                    let _killed = Injection::of(&helper, "sendto", &when);
                    system.0.send(&json!({
                        "method": format!("org.cgtproxy.Helper.{method}"),
                        "parameters": parameters,
                    }));
                    system.0.receive()
                };
                if answer.is_some() {
                    assert!(message > 2, "{method} took one transaction");
                    break;
                }
                helper.wait();
                helper.start_again();
                sb.expect_dropped(&dropped);
                let mut session = Session::of(&user);
                session.replace(json!([]), json!([]), json!([verdict(APP, "dropAll")]));
                sb.expect_dropped(&dropped);
            }
        }
    });
}
