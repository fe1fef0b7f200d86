//! What the helper makes of a policy, on real packets: every target, protocol and address family.

#![allow(clippy::expect_used, reason = "a panic is a failed test")]

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};

use cgtproxy_tests::sandbox::{
    App, Element, MACHINE_V4, MACHINE_V6, Outcome, PORTS, by, direct, local, proxied, sandbox,
};
use cgtproxy_tests::session::{Session, to_proxy, verdict};
use cgtproxy_tests::wait::wait_until;
use cgtproxy_tests::wire::Transport::{self, Tcp, Udp};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

const APP: &str = "app.slice/app-a.scope";
const TRANSPORTS: [Transport; 2] = [Tcp, Udp];
/// What the first TPROXY server of all is allotted: the divert bit, and the number 1.
const FIRST_MARK: u32 = 0x8100_0000;

fn icmp_dropped(to: IpAddr) -> Outcome {
    // The kernel keeps a lost ICMPv6 echo request to itself.
    if to.is_ipv4() {
        Outcome::Forbidden
    } else {
        Outcome::Silent
    }
}

/// What an app hears when nobody takes its diverted packets.
fn refused(transport: Transport, to: SocketAddr) -> Outcome {
    // Linux does not route an ICMP error whose source, the address that was asked, is not local
    // (ip_route_output_key_hash_rcu, net/ipv4/route.c).
    if transport == Udp && to.is_ipv4() {
        Outcome::Silent
    } else {
        Outcome::Refused
    }
}

#[test]
fn each_control_group_has_its_own_verdict() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let apps = ["direct", "drop", "proxy", "other"]
            .map(|name| user.cgroup(format!("app.slice/app-{name}.scope")).app());
        let mut session = Session::of(&user);
        session.replace(
            json!([{ "name": "mihomo", "port": 7890 }]),
            json!([]),
            json!([
                to_proxy("", "mihomo"),
                verdict("app.slice/app-direct.scope", "direct"),
                verdict("app.slice/app-drop.scope", "drop"),
            ]),
        );
        let [open, dropped, diverted, inherits] = &apps;
        sb.expect(open, direct);
        sb.expect(diverted, by("mihomo"));
        sb.expect(inherits, by("mihomo"));
        for to in sb.destinations() {
            assert_eq!(dropped.tcp(to), Outcome::Silent);
            assert_eq!(dropped.udp(to), Outcome::Forbidden);
            assert_eq!(dropped.ping(to.ip()), icmp_dropped(to.ip()));
            sb.assert_nothing_left_for(to.ip());
            // A proxy takes TCP and UDP only.
            assert_eq!(diverted.ping(to.ip()), direct(to));
        }
        let raw = user.cgroup("app.slice/app-drop.scope").app_as(0);
        for to in sb.destinations() {
            assert_eq!(raw.raw(132, to.ip()), Outcome::Forbidden);
            sb.assert_nothing_left_for(to.ip());
        }
        assert!(proxy.arrivals().iter().all(|a| a.destination.port() == 80));
    });
}

/// In every combination, and with DNS queries, which go where they are sent all the same.
#[test]
fn what_a_proxy_leaves_out_really_goes_direct() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let server = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let _dns = sb.service("dns").port(5353).start();
        // What listens here must not get what the proxy does not take (fault D1 of the original).
        let wrong = sb.service("wrong").port(80).start();
        let app = user.cgroup(APP).app();
        let mut session = Session::of(&user);
        for bits in 0..16_u8 {
            let [no_tcp, no_udp, no_ipv4, no_ipv6] = [1, 2, 4, 8].map(|bit| bits & bit != 0);
            let outcome = |transport: Transport, to: SocketAddr| {
                let protocol = if transport == Tcp { no_tcp } else { no_udp };
                let family = if to.is_ipv4() { no_ipv4 } else { no_ipv6 };
                if protocol || family {
                    direct(to)
                } else {
                    proxied("mihomo", to)
                }
            };
            for hijack in [false, true] {
                let mut proxy = json!({
                    "name": "mihomo", "port": 7890,
                    "noTcp": no_tcp, "noUdp": no_udp, "noIpv4": no_ipv4, "noIpv6": no_ipv6,
                });
                if hijack {
                    proxy["dnsHijack"] =
                        json!({ "ipv4": "127.0.0.1", "ipv6": "::1", "port": 5353 });
                }
                session.replace(json!([proxy]), json!([]), json!([to_proxy(APP, "mihomo")]));
                sb.expect_each(&app, outcome);
                for to in sb.destinations() {
                    let to = SocketAddr::new(to.ip(), 53);
                    assert_eq!(app.tcp(to), outcome(Tcp, to), "{bits:04b}");
                    if hijack {
                        let at = if to.is_ipv4() {
                            "127.0.0.1:5353"
                        } else {
                            "[::1]:5353"
                        };
                        let answered = local("dns", at.parse().expect("an address"));
                        assert_eq!(app.udp(to), answered, "{bits:04b}");
                    } else {
                        assert_eq!(app.udp(to), outcome(Udp, to), "{bits:04b}");
                    }
                }
            }
        }
        // An answer to whom the proxy has brought is UDP like any other.
        let proxy = json!({ "name": "mihomo", "port": 7890, "noUdp": true });
        session.replace(json!([proxy]), json!([]), json!([to_proxy(APP, "mihomo")]));
        for to in sb.destinations() {
            let peer = app.open_udp(to);
            server.speak_first(to, peer.local());
            assert_eq!(peer.ask(), direct(to));
        }
        wrong.assert_idle();
    });
}

#[test]
fn a_proxy_leaves_out_what_is_local_and_what_is_bypassed() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let _service = sb.service("own").port(8080).start();
        let app = user.cgroup(APP).app();
        let bypassed = sb.destinations();
        let networks: Vec<_> = bypassed
            .iter()
            .map(|to| format!("{}/{}", to.ip(), if to.is_ipv4() { 32 } else { 128 }))
            .collect();
        let mut session = Session::of(&user);
        session.replace(
            json!([{ "name": "mihomo", "port": 7890 }]),
            json!(networks),
            json!([to_proxy(APP, "mihomo")]),
        );
        for transport in TRANSPORTS {
            for to in bypassed {
                assert_eq!(app.ask(transport, to), direct(to));
            }
            for address in ["127.0.0.1", "::1"]
                .map(|a| a.parse::<IpAddr>().expect("an address"))
                .into_iter()
                .chain([MACHINE_V4, MACHINE_V6])
            {
                let at = SocketAddr::new(address, 8080);
                assert_eq!(app.ask(transport, at), local("own", at), "{transport:?}");
            }
        }
        sb.expect(&app, by("mihomo"));
    });
}

#[test]
fn drop_spares_the_bypass_list_and_drop_all_spares_nothing() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let _service = sb.service("own").port(8080).start();
        let app = user.cgroup(APP).app();
        let bypassed = sb.destinations();
        let mut session = Session::of(&user);
        let mut with = |kind: &str| {
            session.replace(
                json!([]),
                json!([bypassed[0].ip(), bypassed[1].ip(), "127.0.0.0/8"]),
                json!([verdict(APP, kind)]),
            );
        };
        with("drop");
        let at: SocketAddr = "127.0.0.1:8080".parse().expect("an address");
        for to in bypassed {
            sb.expect_each(&app, |transport, _| {
                if transport == Tcp {
                    Outcome::Silent
                } else {
                    Outcome::Forbidden
                }
            });
            assert_eq!(app.tcp(to), direct(to));
            assert_eq!(app.udp(to), direct(to));
            assert_eq!(app.ping(to.ip()), direct(to));
        }
        assert_eq!(app.tcp(at), local("own", at));
        with("dropAll");
        for to in bypassed.into_iter().chain([at]) {
            assert_eq!(app.tcp(to), Outcome::Silent);
            assert_eq!(app.udp(to), Outcome::Forbidden);
        }
    });
}

/// Each goes by what that user bypasses, whoever else bypasses the same, did, or comes to; and the kernel has no list
/// twice, and none that nobody has any more.
#[test]
fn users_who_bypass_the_same_share_one_list() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let users = [(1001, 7001, "one"), (1002, 7002, "two")];
        let [v4, v6] = sb.destinations();
        let mut each = users.map(|(uid, port, name)| {
            let user = sb.user(uid);
            let proxy = sb.tproxy(name).uid(uid).port(port).start();
            let dropped = user.cgroup("app.slice/app-dropped.scope").app();
            let proxied = user.cgroup(APP).app();
            (Session::of(&user), proxy, dropped, proxied)
        });
        let replace = |session: &mut Session, (_, port, name), bypassed: Option<SocketAddr>| {
            let list: Vec<_> = bypassed.iter().map(SocketAddr::ip).collect();
            session.replace(
                json!([{ "name": name, "port": port }]),
                json!(list),
                json!([
                    verdict("app.slice/app-dropped.scope", "drop"),
                    to_proxy(APP, name)
                ]),
            );
        };
        let mut bypassed = [None, None];
        for ((session, ..), user) in each.iter_mut().zip(users) {
            replace(session, user, None);
        }
        // Who changes, to what, and how many lists there are then.
        for (who, to, lists) in [
            (0, Some(v4), 1),
            (1, Some(v4), 1),
            (0, Some(v6), 2),
            (1, None, 1),
            (1, Some(v6), 1),
            (0, Some(v4), 2),
            (0, Some(v6), 1),
            (1, None, 1),
            (0, None, 0),
        ] {
            replace(&mut each[who].0, users[who], to);
            bypassed[who] = to;
            assert_eq!(sb.bypass_lists(), lists);
            // A datagram from the port of an earlier one would go on as that did.
            sb.forget_connections();
            for ((_, _, dropped, to_proxy), (bypassed, (.., name))) in
                each.iter().zip(bypassed.into_iter().zip(users))
            {
                for to in [v4, v6] {
                    if bypassed == Some(to) {
                        assert_eq!(dropped.udp(to), direct(to));
                        assert_eq!(to_proxy.udp(to), direct(to));
                    } else {
                        assert!(dropped.udp(to).is_dropped());
                        assert_eq!(to_proxy.udp(to), proxied(name, to));
                    }
                }
            }
        }
    });
}

#[test]
fn a_changed_rule_leaves_open_connections_as_they_began() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let _one = sb.tproxy("one").uid(1001).port(7891).start();
        let _two = sb.tproxy("two").uid(1001).port(7892).start();
        let app = user.cgroup(APP).app();
        let proxies = json!([{ "name": "one", "port": 7891 }, { "name": "two", "port": 7892 }]);
        let mut session = Session::of(&user);
        session.replace(proxies.clone(), json!([]), json!([]));

        let open = |verdict: &dyn Fn(SocketAddr) -> Outcome| {
            let mut connections = Vec::new();
            for to in sb.destinations() {
                connections.push((app.open_tcp(to).expect("it opens"), verdict(to)));
                connections.push((app.open_udp(to), verdict(to)));
            }
            for (connection, outcome) in &connections {
                assert_eq!(connection.ask(), *outcome);
            }
            connections
        };
        let began_direct = open(&direct);
        session.assign(json!([to_proxy(APP, "one")]));
        let began_one = open(&|to| proxied("one", to));
        session.assign(json!([to_proxy(APP, "two")]));
        let began_two = open(&|to| proxied("two", to));
        session.assign(json!([verdict(APP, "direct")]));
        let all = || began_direct.iter().chain(&began_one).chain(&began_two);
        for (connection, outcome) in all() {
            assert_eq!(connection.ask(), *outcome);
        }
        sb.expect(&app, direct);

        // The whole policy again, without any verdict and with another port for `two`.
        session.replace(proxies, json!([]), json!([]));
        for (connection, outcome) in all() {
            assert_eq!(connection.ask(), *outcome);
        }

        // A drop takes effect at once.
        assert!(!sb.open_connections_are_looked_at());
        session.assign(json!([verdict(APP, "drop")]));
        for (connection, _) in all() {
            let outcome = connection.ask();
            assert!(outcome.is_dropped(), "{outcome:?}");
        }

        // So does the next one, when for two changes nothing has been dropped and no rule looks at open connections.
        session.assign(json!([verdict(APP, "direct")]));
        assert!(sb.open_connections_are_looked_at());
        session.assign(json!([verdict(APP, "direct")]));
        assert!(!sb.open_connections_are_looked_at());
        let began_later = open(&direct);
        session.assign(json!([verdict(APP, "drop")]));
        for (connection, _) in &began_later {
            let outcome = connection.ask();
            assert!(outcome.is_dropped(), "{outcome:?}");
        }
    });
}

#[test]
fn a_connection_whose_proxy_is_gone_never_goes_on_directly() {
    sandbox(|sb| {
        let _helper = sb.helper().config("grace-seconds: 0").start();
        let user = sb.user(1001);
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let app = user.cgroup(APP).app();
        let mut session = Session::of(&user);
        let proxies = json!([{ "name": "mihomo", "port": 7890 }]);
        let began = |session: &mut Session| {
            session.replace(proxies.clone(), json!([]), json!([to_proxy(APP, "mihomo")]));
            let mut connections = Vec::new();
            for to in sb.destinations() {
                for connection in [app.open_tcp(to).expect("it opens"), app.open_udp(to)] {
                    assert_eq!(connection.ask(), proxied("mihomo", to));
                    connections.push((connection, to));
                }
            }
            connections
        };
        let ended = |connections: Vec<(cgtproxy_tests::sandbox::Connection, SocketAddr)>| {
            for (connection, to) in connections {
                let outcome = connection.ask();
                // A reset for TCP; send(2) itself fails for UDP.
                assert!(
                    matches!(
                        outcome,
                        Outcome::Refused | Outcome::Closed | Outcome::Forbidden
                    ),
                    "{to}: {outcome:?}"
                );
                sb.assert_nothing_left_for(to.ip());
            }
        };
        // The proxy leaves the policy.
        let connections = began(&mut session);
        session.replace(json!([]), json!([]), json!([]));
        ended(connections);
        // The policy ends.
        let connections = began(&mut session);
        session.call("RemovePolicy", json!({}));
        ended(connections);
        sb.expect(&app, direct);
    });
}

#[test]
fn a_proxy_that_closes_after_the_application_is_heard() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let app = user.cgroup(APP).app();
        let mut session = Session::of(&user);
        session.replace(
            json!([{ "name": "mihomo", "port": 7890 }]),
            json!([]),
            json!([to_proxy(APP, "mihomo")]),
        );
        let signal = |signal| {
            let pid = Pid::from_raw(proxy.pid().cast_signed());
            kill(pid, signal).expect("it is running");
        };
        for to in sb.destinations() {
            let in_state = |state| {
                let to = format!("dst {to}");
                sb.run(&[
                    "ss",
                    "--tcp",
                    "--numeric",
                    "--no-header",
                    "state",
                    state,
                    &to,
                ])
            };
            let connection = app.open_tcp(to).expect("it opens");
            assert_eq!(connection.ask(), proxied("mihomo", to));
            signal(Signal::SIGSTOP);
            drop(connection);
            wait_until("the application's half is closed", || {
                !in_state("fin-wait-2").is_empty()
            });
            signal(Signal::SIGCONT);
            // The last acknowledgement comes from the kernel: the application has no socket any
            // more, and so no control group.
            wait_until("the proxy's half is closed", || {
                let from = format!("src {to}");
                let all = ["ss", "--tcp", "--numeric", "--no-header", "--all", &from];
                sb.run(&all).is_empty()
            });
            assert!(!in_state("time-wait").is_empty());
            sb.assert_nothing_left_for(to.ip());
        }
    });
}

#[test]
fn connections_from_outside_are_never_touched() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let cgroup = user.cgroup(APP);
        let _service = sb
            .service("own")
            .uid(1001)
            .cgroup(&cgroup)
            .port(8080)
            .start();
        let mut session = Session::of(&user);
        let outside = sb.internet_app();
        for change in [
            to_proxy(APP, "mihomo"),
            verdict(APP, "drop"),
            verdict(APP, "dropAll"),
        ] {
            session.replace(
                json!([{ "name": "mihomo", "port": 7890 }]),
                json!([]),
                json!([change]),
            );
            sb.expect_answers(&outside, "own", 8080);
        }
    });
}

#[test]
fn two_users_see_nothing_of_each_other() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let (alice, bob) = (sb.user(1001), sb.user(1002));
        let alices = sb.tproxy("alices").uid(1001).port(7891).start();
        let bobs = sb.tproxy("bobs").uid(1002).port(7892).start();
        let apps = [&alice, &bob].map(|user| user.cgroup(APP).app());
        let mut sessions = [&alice, &bob].map(Session::of);
        // The same names on both sides.
        for (session, port) in sessions.iter_mut().zip([7891, 7892]) {
            session.replace(
                json!([{ "name": "p", "port": port }]),
                json!([]),
                json!([to_proxy(APP, "p")]),
            );
        }
        sb.expect(&apps[0], by("alices"));
        sb.expect(&apps[1], by("bobs"));
        for status in sessions
            .each_mut()
            .map(|session| session.call("GetStatus", json!({})))
        {
            assert_eq!(status["controlGroups"], 1);
            assert_eq!(status["proxies"].as_array().map(Vec::len), Some(1));
        }
        let [first, second] = &mut sessions;
        first.replace(json!([]), json!([]), json!([verdict(APP, "drop")]));
        sb.expect(&apps[1], by("bobs"));
        second.call("RemovePolicy", json!({}));
        sb.expect(&apps[1], direct);
        assert!(apps[0].udp(sb.destinations()[0]).is_dropped());
        for (proxy, asked) in [(&alices, 2), (&bobs, 4)] {
            let destinations: BTreeSet<_> = proxy
                .arrivals()
                .iter()
                .map(|arrival| arrival.destination)
                .collect();
            assert_eq!(destinations.len(), asked);
        }
    });
}

#[test]
fn packets_reach_only_proxies_of_the_same_user_root_and_allowed_uids() {
    sandbox(|sb| {
        let _helper = sb.helper().config("proxy-users: [991]").start();
        let user = sb.user(1001);
        let app = user.cgroup(APP).app();
        let mut session = Session::of(&user);
        for (uid, allowed) in [
            (1001, true),
            (0, true),
            (991, true),
            (1002, false),
            (992, false),
        ] {
            let port = 7000 + u16::try_from(uid % 1000).expect("small");
            let name = format!("of-{uid}");
            let proxy = sb.tproxy(&name).uid(uid).port(port).start();
            session.replace(
                json!([{ "name": name, "port": port }]),
                json!([]),
                json!([to_proxy(APP, &name)]),
            );
            if allowed {
                sb.expect(&app, by(&name));
            } else {
                for to in sb.destinations() {
                    for transport in TRANSPORTS {
                        assert_eq!(app.ask(transport, to), refused(transport, to), "{uid}");
                    }
                    sb.assert_nothing_left_for(to.ip());
                }
                proxy.assert_idle();
            }
        }
    });
}

#[test]
fn without_a_listener_a_proxied_app_is_refused_at_once() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let app = user.cgroup(APP).app();
        // Somebody listens at the destination's own port: that is not who was asked.
        let wrong = sb.service("wrong").uid(1001).port(80).start();
        let mut session = Session::of(&user);
        session.replace(
            json!([{ "name": "mihomo", "port": 7890 }]),
            json!([]),
            json!([to_proxy("", "mihomo")]),
        );
        for to in sb.destinations() {
            for transport in TRANSPORTS {
                assert_eq!(
                    app.ask(transport, to),
                    refused(transport, to),
                    "{transport:?} {to}"
                );
            }
            sb.assert_nothing_left_for(to.ip());
        }
        wrong.assert_idle();
    });
}

/// As machines have them that announce addresses of their own by a routing protocol, or serve anycast ones.
#[test]
fn other_addresses_of_lo_hide_no_proxy() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let app = user.cgroup(APP).app();
        let _proxy = sb.tproxy("mihomo").uid(1001).loopback_port(7890).start();
        let mut session = Session::of(&user);
        session.replace(
            json!([{ "name": "mihomo", "port": 7890 }]),
            json!([]),
            json!([to_proxy("", "mihomo")]),
        );
        sb.expect(&app, by("mihomo"));
        for address in ["192.0.2.53/32", "2001:db8::53/128"] {
            sb.run(&["ip", "address", "add", address, "dev", "lo"]);
        }
        sb.expect(&app, by("mihomo"));
    });
}

#[test]
fn a_neighbour_on_the_link_is_never_proxied() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let app = user.cgroup(APP).app();
        let mut session = Session::of(&user);
        session.replace(
            json!([{ "name": "mihomo", "port": 7890 }]),
            json!([]),
            json!([to_proxy(APP, "mihomo")]),
        );
        // The uplink's own address of the kind is fe80::ff:fe00:1, the internet's fe80::ff:fe00:2.
        let index = std::fs::read_to_string("/sys/class/net/uplink/ifindex").expect("an uplink");
        let neighbour: Ipv6Addr = "fe80::ff:fe00:2".parse().expect("an address");
        let to = SocketAddrV6::new(neighbour, 80, 0, index.trim().parse().expect("a number"));
        // Until duplicate address detection is over the machine has no such address to send from.
        wait_until("the machine has a link-local address", || {
            let addresses = |more: &[&str]| {
                let show = [
                    "ip", "-6", "address", "show", "dev", "uplink", "scope", "link",
                ];
                sb.run(&[&show[..], more].concat())
            };
            !addresses(&[]).is_empty() && addresses(&["tentative"]).is_empty()
        });
        let lladdr = "02:00:00:00:00:02";
        sb.run(&[
            "ip",
            "neighbour",
            "add",
            "fe80::ff:fe00:2",
            "lladdr",
            lladdr,
            "dev",
            "uplink",
        ]);
        for transport in TRANSPORTS {
            let outcome = app.ask(transport, to.into());
            assert!(!matches!(outcome, Outcome::Proxied { .. }), "{outcome:?}");
            // Whether the internet of the sandbox answers, or takes the asker's address for its own
            // too, is up to it.
            let deliveries = sb.deliveries(neighbour.into());
            let protocol = transport.protocol();
            assert!(
                deliveries.iter().any(|d| d.protocol == protocol),
                "{deliveries:?}"
            );
        }
    });
}

/// A program with CAP_NET_RAW, like ping with file capabilities, may set any mark (sock_setsockopt, net/core/sock.c).
#[test]
fn a_mark_that_an_application_sets_leads_into_nobodys_proxy() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let (alice, mallory) = (sb.user(1001), sb.user(1002));
        let proxy = sb.tproxy("alice").uid(1001).port(7890).start();
        let _own = sb.tproxy("mallory").uid(1002).port(7891).start();
        let app = alice.cgroup(APP).app();
        let mut session = Session::of(&alice);
        session.replace(
            json!([{ "name": "mihomo", "port": 7890 }]),
            json!([]),
            json!([to_proxy("", "mihomo")]),
        );
        sb.expect(&app, by("alice"));
        let arrivals = proxy.arrivals().len();
        // It is a mark that leads somewhere.
        let mark = FIRST_MARK;
        let marks = sb.map_elements("marks");
        let leads =
            |e: &Element| e.key == mark.to_string() && e.verdict == "goto proxy-1001-mihomo";
        assert!(marks.iter().any(leads), "{marks:?}");
        let strange = |app: &App, what: &str| {
            app.mark(mark);
            for to in sb.destinations() {
                for transport in TRANSPORTS {
                    let outcome = app.ask(transport, to);
                    assert!(
                        outcome.is_dropped(),
                        "{what}: {transport:?} {to} {outcome:?}"
                    );
                }
            }
            let IpAddr::V4(v4) = sb.fresh_v4() else {
                unreachable!("it is of IPv4")
            };
            let to = SocketAddrV4::new(v4, PORTS[0]);
            assert!(
                !app.inject(mark, to),
                "{what}: a packet on lo was delivered"
            );
            assert_eq!(proxy.arrivals().len(), arrivals, "{what}");
        };
        let raw = |name: &str| mallory.cgroup(name).app_with(&["net_raw"]);
        strange(&raw("app.slice/app-none.scope"), "no policy");
        let mut session = Session::of(&mallory);
        mallory.cgroup("app.slice/app-drop.scope");
        mallory.cgroup("app.slice/app-own.scope");
        session.replace(
            json!([{ "name": "own", "port": 7891 }]),
            json!([]),
            json!([
                verdict("app.slice/app-drop.scope", "drop"),
                to_proxy("app.slice/app-own.scope", "own"),
            ]),
        );
        strange(&raw("app.slice/app-direct.scope"), "direct");
        strange(&raw("app.slice/app-drop.scope"), "dropped");
        // What is diverted has the mark of its own proxy, whatever it had before.
        let diverted = raw("app.slice/app-own.scope");
        diverted.mark(mark);
        sb.expect(&diverted, by("mallory"));
        assert_eq!(proxy.arrivals().len(), arrivals);
        // Alice has noticed nothing.
        sb.expect(&app, by("alice"));
    });
}
