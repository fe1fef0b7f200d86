//! DNS queries go where the proxy's `dns-hijack` says, by UDP and TCP, over IPv4 and IPv6.

#![allow(clippy::expect_used, reason = "a panic is a failed test")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

use cgtproxy_tests::sandbox::{
    App, Cgroup, Connection, MACHINE_V4, MACHINE_V6, Outcome, Sandbox, Service, UPLINK, direct,
    local, proxied, sandbox,
};
use cgtproxy_tests::session::{Session, to_proxy};
use cgtproxy_tests::wait::wait_until;
use cgtproxy_tests::wire::Transport::{Tcp, Udp};
use serde_json::{Value, json};

const APP: &str = "app.slice/app-a.scope";
const OTHER: &str = "app.slice/app-b.scope";
const SERVICE: &str = "system.slice/web.service";
const LOCALHOST: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::LOCALHOST),
    IpAddr::V6(Ipv6Addr::LOCALHOST),
];

fn at(address: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(address, port)
}

/// To a server on this machine, with TCP.
fn here(port: u16) -> Value {
    json!({ "ipv4": "127.0.0.1", "ipv6": "::1", "port": port, "tcp": true })
}

/// A policy whose proxy `mihomo` hijacks DNS like this, for one app.
fn hijacking(sb: &Sandbox, hijack: &Value, bypass: &Value) -> (Service, Session, App) {
    let helper = sb.helper().start();
    let user = sb.user(1001);
    let app = user.cgroup(APP).app();
    let mut session = Session::of(&user);
    session.replace(
        json!([{ "name": "mihomo", "port": 7890, "dnsHijack": hijack }]),
        bypass.clone(),
        json!([to_proxy(APP, "mihomo")]),
    );
    (helper, session, app)
}

#[test]
fn a_local_server_answers_for_every_other() {
    sandbox(|sb| {
        let dns = sb.service("dns").port(5353).start();
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let hijack = here(5353);
        // Whatever the bypass list says (fault D3 of the original), and `no-udp` too.
        for bypass in [
            json!([]),
            json!(["0.0.0.0/0", "::/0"]),
            json!(["127.0.0.0/8", "::1"]),
        ] {
            let (mut helper, mut session, app) = hijacking(sb, &hijack, &bypass);
            let [v4, v6] = sb.destinations();
            // A foreign server, one of the LAN's, this machine itself, and the stubs of
            // systemd-resolved.
            for server in [
                v4.ip(),
                v6.ip(),
                "192.0.2.53".parse().expect("an address"),
                "2001:db8::53".parse().expect("an address"),
                MACHINE_V4,
                MACHINE_V6,
                "127.0.0.53".parse().expect("an address"),
                "127.0.0.54".parse().expect("an address"),
                LOCALHOST[0],
                LOCALHOST[1],
            ] {
                let answered = local("dns", at(LOCALHOST[usize::from(server.is_ipv6())], 5353));
                assert_eq!(app.udp(at(server, 53)), answered, "{server} {bypass}");
                assert_eq!(app.tcp(at(server, 53)), answered, "{server} {bypass}");
            }
            for to in [v4, v6] {
                sb.assert_nothing_left_for(to.ip());
            }
            // The server itself can be asked.
            for server in LOCALHOST {
                assert_eq!(app.udp(at(server, 5353)), local("dns", at(server, 5353)));
            }
            session.call("RemovePolicy", json!({}));
            helper.stop();
        }
        drop(dns);
    });
}

/// A router may name its link-local address as that of a DNS server (RFC 8106). The socket that asks it is bound to the
/// interface, so that the query can't be translated.
#[test]
fn a_query_to_a_neighbour_on_the_link_is_refused_at_once() {
    sandbox(|sb| {
        let _dns = sb.service("dns").port(5353).start();
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let hijack = here(5353);
        let (_helper, _session, app) = hijacking(sb, &hijack, &json!(["fe80::/10"]));
        let show = [
            "ip", "-6", "address", "show", "dev", UPLINK, "scope", "link",
        ];
        wait_until("the machine has a link-local address", || {
            let tentative = sb.run(&[&show[..], &["tentative"]].concat());
            !sb.run(&show).is_empty() && tentative.is_empty()
        });
        let index = std::fs::read_to_string(format!("/sys/class/net/{UPLINK}/ifindex"));
        let index = index.expect("an uplink").trim().parse();
        let router: Ipv6Addr = "fe80::ff:fe00:2".parse().expect("an address");
        let server = SocketAddrV6::new(router, 53, 0, index.expect("a number")).into();
        assert_eq!(app.tcp(server), Outcome::Refused);
        assert!(matches!(
            app.udp(server),
            Outcome::Refused | Outcome::Forbidden
        ));
        sb.assert_nothing_left_for(router.into());
    });
}

#[test]
fn a_remote_server_is_reached() {
    sandbox(|sb| {
        let [v4, v6] = sb.destinations();
        let hijack = json!({ "ipv4": v4.ip(), "ipv6": v6.ip(), "port": 53 });
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let (_helper, _session, app) = hijacking(sb, &hijack, &json!([]));
        for (to, server) in sb.destinations().into_iter().zip([v4, v6]) {
            assert!(sb.deliveries(server.ip()).is_empty());
            assert_eq!(
                app.udp(at(to.ip(), 53)),
                Outcome::Redirected {
                    to: at(server.ip(), 53)
                }
            );
            sb.assert_nothing_left_for(to.ip());
            assert!(!sb.deliveries(server.ip()).is_empty());
            // It does not loop.
            assert_eq!(app.udp(at(server.ip(), 53)), direct(server));
            // DNS over TCP is not asked for: a packet as others.
            assert_eq!(app.tcp(at(to.ip(), 53)), proxied("mihomo", at(to.ip(), 53)));
        }
        // A stub's queries come from 127.0.0.1, with which nothing can leave.
        let stub = sb
            .service("stub")
            .at("127.0.0.53:53".parse().expect("an address"))
            .start();
        let server = "127.0.0.53:53".parse().expect("an address");
        assert_eq!(app.udp(server), local("stub", server));
        drop(stub);
    });
}

#[test]
fn what_is_not_asked_for_is_left_alone() {
    sandbox(|sb| {
        let _dns = sb.service("dns").port(5353).start();
        let _stub = sb
            .service("stub")
            .at("127.0.0.53:53".parse().expect("an address"))
            .start();
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let hijack = json!({ "ipv4": "127.0.0.1", "port": 5353, "loopback": false });
        let (_helper, mut session, app) = hijacking(sb, &hijack, &json!([]));
        let [v4, v6] = sb.destinations().map(|to| at(to.ip(), 53));
        let server = "127.0.0.53:53".parse().expect("an address");
        assert_eq!(app.udp(server), local("stub", server), "loopback: false");
        assert_eq!(app.udp(v4), local("dns", at(LOCALHOST[0], 5353)));
        assert_eq!(app.udp(v6), proxied("mihomo", v6), "no server for IPv6");
        assert_eq!(app.tcp(v4), proxied("mihomo", v4), "no TCP");
        session.replace(
            json!([{ "name": "mihomo", "port": 7890 }]),
            json!([]),
            json!([to_proxy(APP, "mihomo")]),
        );
        for transport in [Udp, Tcp] {
            let to = at(sb.fresh_v4(), 53);
            assert_eq!(app.ask(transport, to), proxied("mihomo", to));
        }
    });
}

/// The port may be anybody's, if it is above 1023 and the user's own server does not listen.
#[test]
fn no_query_goes_to_a_server_in_another_users_session() {
    sandbox(|sb| {
        let mut helper = sb.helper().config("grace-seconds: 600").start();
        let (user, mallory) = (sb.user(1001), sb.user(1002));
        let app = user.cgroup(APP).app();
        let hijack = here(1053);
        let take = || {
            let mut session = Session::of(&user);
            session.replace(
                json!([
                    { "name": "mihomo", "port": 7890, "dnsHijack": hijack },
                    { "name": "redir", "port": 7892, "redirect": true, "dnsHijack": hijack },
                ]),
                json!([]),
                json!([to_proxy(APP, "mihomo"), to_proxy(OTHER, "redir")]),
            );
            session
        };
        let other = user.cgroup(OTHER).app();
        let session_of = |uid| sb.cgroup(format!("user.slice/user-{uid}.slice/session-1.scope"));
        let servers = [
            (1002, Some(mallory.cgroup("app.slice/dns.service")), false),
            (1002, Some(session_of(1002)), false),
            // As sudo makes them.
            (0, Some(session_of(1002)), false),
            (1001, Some(user.cgroup("app.slice/dns.service")), true),
            (1001, Some(session_of(1001)), true),
            (0, Some(session_of(1001)), true),
            (990, Some(sb.cgroup("system.slice/dns.service")), true),
            (0, Some(sb.cgroup("machine.slice/container.scope")), true),
            (0, Some(sb.cgroup("dns")), true),
            (0, None, true),
        ];
        let check = |when: &str| {
            for app in [&app, &other] {
                let server = |to: SocketAddr| at(LOCALHOST[usize::from(to.is_ipv6())], 1053);
                let ask = |expected: &dyn Fn(SocketAddr) -> Outcome, what: &str| {
                    for to in sb.destinations().map(|to| at(to.ip(), 53)) {
                        for transport in [Udp, Tcp] {
                            let outcome = app.ask(transport, to);
                            assert_eq!(outcome, expected(to), "{transport:?} {to} {what} {when}");
                        }
                        sb.assert_nothing_left_for(to.ip());
                    }
                };
                ask(&|_| Outcome::Refused, "nobody");
                for (uid, cgroup, served) in &servers {
                    let mut dns = sb.service("dns").uid(*uid).port(1053);
                    if let Some(cgroup) = cgroup {
                        dns = dns.cgroup(cgroup);
                    }
                    let dns = dns.start();
                    let what = format!("{uid} {:?}", cgroup.as_ref().map(Cgroup::directory));
                    if *served {
                        ask(&|to| local("dns", server(to)), &what);
                    } else {
                        ask(&|_| Outcome::Refused, &what);
                        dns.assert_idle();
                    }
                }
            }
        };
        let session = take();
        check("at first");
        helper.kill();
        drop(session);
        check("without a helper");
        helper.start_again();
        check("with another helper");
        let _session = take();
        check("with another session");
    });
}

/// A connection that is open is not looked at again, nor are answers.
#[test]
fn what_has_begun_with_a_server_goes_on() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let (user, mallory) = (sb.user(1001), sb.user(1002));
        let app = user.cgroup(APP).app();
        let own = user.cgroup("app.slice/dns.service");
        let dns = sb.service("dns").uid(1001).cgroup(&own).port(1053).start();
        let hijack = here(1053);
        let mut session = Session::of(&user);
        session.replace(
            json!([{ "name": "mihomo", "port": 7890, "dnsHijack": hijack }]),
            json!([]),
            json!([to_proxy(APP, "mihomo")]),
        );
        let destinations = sb.destinations().map(|to| at(to.ip(), 53));
        let open = destinations.map(|to| app.open_tcp(to).expect("it is answered"));
        let flows = destinations.map(|to| app.open_udp(to));
        for _ in 0..3 {
            for (connection, to) in open.iter().chain(&flows).zip(destinations.iter().cycle()) {
                let server = at(LOCALHOST[usize::from(to.is_ipv6())], 1053);
                assert_eq!(connection.ask(), local("dns", server));
            }
        }
        // Each datagram may come to another socket than the one before it.
        drop(dns);
        let evil = mallory.cgroup("app.slice/evil.service");
        let evil = sb
            .service("evil")
            .uid(1002)
            .cgroup(&evil)
            .listen(Udp, at(LOCALHOST[0], 1053));
        let evil = evil.listen(Udp, at(LOCALHOST[1], 1053)).start();
        for flow in &flows {
            assert_eq!(flow.ask(), Outcome::Refused);
        }
        evil.assert_idle();
    });
}

/// What ends a hijack.
type End<'a> = &'a dyn Fn(&mut Session);

/// Its port is anybody's then, and the kernel goes on translating for as long as somebody asks.
#[test]
fn a_conversation_with_a_server_ends_with_its_hijack() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let (user, mallory) = (sb.user(1001), sb.user(1002));
        let app = user.cgroup(APP).app();
        let own = user.cgroup("app.slice/dns.service");
        let others = mallory.cgroup("app.slice/evil.service");
        let hijack = here(1053);
        let mut session = Session::of(&user);
        let policy = |session: &mut Session, name: &str, hijack: &Value| {
            session.replace(
                json!([{ "name": name, "port": 7890, "dnsHijack": hijack }]),
                json!([]),
                json!([to_proxy(APP, name)]),
            );
        };
        let ends: [(&str, End<'_>); 4] = [
            ("another name", &|session| policy(session, "other", &hijack)),
            ("no hijack", &|session| {
                policy(session, "mihomo", &Value::Null)
            }),
            ("no proxy", &|session| {
                session.replace(json!([]), json!([]), json!([]))
            }),
            ("no policy", &|session| {
                session.call("RemovePolicy", json!({}));
            }),
        ];
        for (what, end) in ends {
            let dns = sb.service("dns").uid(1001).cgroup(&own).port(1053).start();
            policy(&mut session, "mihomo", &hijack);
            let destinations = sb.destinations().map(|to| at(to.ip(), 53));
            let open = destinations.map(|to| app.open_tcp(to).expect("it is answered"));
            let flows = destinations.map(|to| app.open_udp(to));
            let answered = |connections: &[Connection]| {
                for (connection, to) in connections.iter().zip(destinations) {
                    let server = at(LOCALHOST[usize::from(to.is_ipv6())], 1053);
                    assert_eq!(connection.ask(), local("dns", server), "{what}");
                }
            };
            answered(&flows);
            answered(&open);
            end(&mut session);
            // A connection is with the server that has accepted it, and with no other.
            answered(&open);
            drop(dns);
            let evil = sb.service("evil").uid(1002).cgroup(&others).port(1053);
            let evil = evil.start();
            for flow in &flows {
                assert_eq!(flow.ask(), Outcome::Refused, "{what}");
            }
            evil.assert_idle();
        }
    });
}

/// The number of the proxy may be another user's by then.
#[test]
fn a_conversation_with_a_server_does_not_come_to_be_another_users() {
    sandbox(|sb| {
        // One bit for numbers: one proxy on the whole machine.
        let _helper = sb.helper().config("mark-mask: 0x03000000").start();
        let take = |uid, path: &str, port: u16| {
            let mut session = Session::of(&sb.user(uid));
            let hijack = json!({ "ipv4": "127.0.0.1", "ipv6": "::1", "port": port });
            session.replace(
                json!([{ "name": "mihomo", "port": 7890, "dnsHijack": hijack }]),
                json!([]),
                json!([to_proxy(path, "mihomo")]),
            );
            session
        };
        let app = sb.user(1001).cgroup(APP).app();
        let others = sb.user(1002).cgroup(APP).app();
        let service = sb.cgroup(SERVICE).app();
        let evil = sb.user(1002).cgroup("app.slice/evil.service");
        for (whose, next) in [
            ((1001, APP, &app, 1053), (1002, APP, &others, 1053)),
            ((0, SERVICE, &service, 1053), (1002, APP, &others, 1053)),
            ((1001, APP, &app, 1053), (0, SERVICE, &service, 1054)),
        ] {
            let (uid, path, asks, port) = whose;
            let dns = sb.service("dns").port(port).start();
            let mut session = take(uid, path, port);
            let flows = sb.destinations().map(|to| asks.open_udp(at(to.ip(), 53)));
            for (flow, address) in flows.iter().zip(LOCALHOST) {
                assert_eq!(flow.ask(), local("dns", at(address, port)), "{uid}");
            }
            session.call("RemovePolicy", json!({}));
            drop(dns);
            let evil = sb.service("evil").uid(1002).cgroup(&evil).port(port);
            let evil = evil.start();
            let (uid, path, asks, port) = next;
            let mut session = take(uid, path, port);
            for flow in &flows {
                let outcome = flow.ask();
                let refused = outcome == Outcome::Refused || outcome.is_dropped();
                assert!(refused, "{uid}: {outcome:?}");
            }
            evil.assert_idle();
            // Those of who has the number now go on.
            drop(evil);
            let dns = sb.service("dns").port(port).start();
            let flows = sb.destinations().map(|to| asks.open_udp(at(to.ip(), 53)));
            for flow in flows.iter().chain(&flows) {
                assert!(matches!(flow.ask(), Outcome::Local { .. }), "{uid}");
            }
            session.call("RemovePolicy", json!({}));
            drop(dns);
        }
    });
}
