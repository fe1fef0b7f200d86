//! Proxies that packets are redirected to: translated, to a server that needs no privilege.

#![allow(clippy::expect_used, reason = "a panic is a failed test")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use cgtproxy_tests::sandbox::{
    Connection, MACHINE_V4, MACHINE_V6, Outcome, Sandbox, Server, User, direct, local, proxied,
    sandbox,
};
use cgtproxy_tests::session::{Session, to_proxy};
use cgtproxy_tests::wait::wait_until;
use cgtproxy_tests::wire::Transport::{Tcp, Udp};
use serde_json::{Value, json};

const APP: &str = "app.slice/app-a.scope";
const SERVER: &str = "app.slice/redir.service";
const PORT: u16 = 7892;

/// Where the server listens, for a destination of that family.
fn server(to: SocketAddr) -> SocketAddr {
    let address: IpAddr = match to {
        SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    };
    SocketAddr::new(address, PORT)
}

fn redirect() -> Value {
    json!([{ "name": "redir", "port": PORT, "redirect": true }])
}

/// Whether the application was told at once that its packets go nowhere: a datagram that is refused
/// on its way out fails as it is sent (EPERM).
fn is_refused(outcome: &Outcome) -> bool {
    matches!(
        outcome,
        Outcome::Refused | Outcome::Closed | Outcome::Forbidden
    )
}

/// One destination of each family, by TCP and UDP.
fn each(sb: &Sandbox) -> Vec<(cgtproxy_tests::wire::Transport, SocketAddr)> {
    let destinations = sb.destinations();
    [Tcp, Udp]
        .into_iter()
        .flat_map(|transport| destinations.map(|to| (transport, to)))
        .collect()
}

/// A redirection server of the user's own.
fn redir(sb: &Sandbox, user: &User) -> Server {
    sb.service("redir")
        .cgroup(&user.cgroup(SERVER))
        .uid(1001)
        .port(PORT)
        .start()
}

#[test]
fn a_server_of_the_users_own_gets_everything() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let _server = redir(sb, &user);
        let app = user.cgroup(APP).app();
        let other = user.cgroup("app.slice/app-b.scope").app();
        let mut session = Session::of(&user);
        session.replace(redirect(), json!([]), json!([to_proxy(APP, "redir")]));
        for (transport, to) in each(sb) {
            assert_eq!(app.ask(transport, to), local("redir", server(to)));
            assert_eq!(app.ping(to.ip()), direct(to));
            sb.settle();
            assert_eq!(other.ask(transport, to), direct(to));
        }
        for to in sb.destinations() {
            assert_eq!(app.tcp(to), local("redir", server(to)));
            assert_eq!(app.udp(to), local("redir", server(to)));
            sb.assert_nothing_left_for(to.ip());
        }
        // Its own port stays what it was for everybody.
        for to in sb.destinations().map(server) {
            assert_eq!(other.tcp(to), local("redir", to));
        }
    });
}

#[test]
fn nobody_else_gets_it() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let mallory = sb.user(1002);
        let app = user.cgroup(APP).app();
        let mut session = Session::of(&user);
        session.replace(redirect(), json!([]), json!([to_proxy(APP, "redir")]));
        // Nobody listens.
        for (transport, to) in each(sb) {
            assert_eq!(app.ask(transport, to), Outcome::Refused, "{to}");
            sb.assert_nothing_left_for(to.ip());
        }
        // Another user has taken the port, one whose uid is the same but whose control group says
        // otherwise, and a system service.
        for (uid, cgroup) in [
            (1002, mallory.cgroup("app.slice/evil.service")),
            (0, sb.cgroup("system.slice/redir.service")),
            (1002, user.service().clone()),
        ] {
            let own = cgroup.directory() == user.service().directory();
            let server = sb
                .service("evil")
                .cgroup(&cgroup)
                .uid(uid)
                .port(PORT)
                .start();
            for (transport, to) in each(sb) {
                if own {
                    // Whom the user lets into the own subtree speaks for the user.
                    assert!(matches!(app.ask(transport, to), Outcome::Local { .. }));
                    continue;
                }
                assert_eq!(app.ask(transport, to), Outcome::Refused, "{to}");
                sb.assert_nothing_left_for(to.ip());
            }
            if !own {
                server.assert_idle();
            }
        }
    });
}

#[test]
fn without_a_port_connections_are_refused() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let app = user.cgroup(APP).app();
        let mut session = Session::of(&user);
        session.replace(
            json!([{ "name": "redir", "port": 0, "redirect": true }]),
            json!([]),
            json!([to_proxy(APP, "redir")]),
        );
        for (transport, to) in each(sb) {
            let outcome = app.ask(transport, to);
            assert!(is_refused(&outcome), "{to}: {outcome:?}");
            sb.assert_nothing_left_for(to.ip());
        }
        let tproxy = json!([{ "name": "redir", "port": 0 }]);
        let policy = json!({ "proxies": tproxy, "bypass": [], "assignments": [] });
        let (error, parameters) = session.refusal("ReplacePolicy", policy);
        assert_eq!(error, "InvalidParameter");
        assert_eq!(parameters["parameter"], "proxies[0].port");
    });
}

#[test]
fn udp_is_refused_or_direct_on_request() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let _server = redir(sb, &user);
        let app = user.cgroup(APP).app();
        let mut session = Session::of(&user);
        for (option, refused) in [("rejectUdp", true), ("noUdp", false)] {
            let mut proxies = redirect();
            proxies[0][option] = json!(true);
            session.replace(proxies, json!([]), json!([to_proxy(APP, "redir")]));
            for to in sb.destinations() {
                assert_eq!(app.tcp(to), local("redir", server(to)));
                let outcome = app.udp(to);
                assert_eq!(is_refused(&outcome), refused, "{to}: {outcome:?}");
                assert_eq!(outcome == direct(to), !refused, "{to}: {outcome:?}");
            }
        }
    });
}

#[test]
fn what_is_left_out_of_networks_that_stand_for_names_is_refused() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let _server = redir(sb, &user);
        let app = user.cgroup(APP).app();
        let mut session = Session::of(&user);
        for option in ["noTcp", "noUdp", "noIpv4", "noIpv6"] {
            let [v4, v6] = sb.destinations();
            let mut proxies = redirect();
            proxies[0][option] = json!(true);
            proxies[0]["fakeIpv4"] = json!(format!("{}/32", v4.ip()));
            proxies[0]["fakeIpv6"] = json!(format!("{}/128", v6.ip()));
            session.replace(proxies, json!([]), json!([to_proxy(APP, "redir")]));
            for (transport, to) in [(Tcp, v4), (Udp, v4), (Tcp, v6), (Udp, v6)] {
                let left_out = match option {
                    "noTcp" => transport == Tcp,
                    "noUdp" => transport == Udp,
                    "noIpv4" => to.is_ipv4(),
                    _ => to.is_ipv6(),
                };
                let outcome = app.ask(transport, to);
                assert_eq!(is_refused(&outcome), left_out, "{option} {to}: {outcome:?}");
                sb.assert_nothing_left_for(to.ip());
            }
        }
        for (field, wrong) in [
            ("fakeIpv4", "fd00::/8"),
            ("fakeIpv4", "10.0.0.0/33"),
            ("fakeIpv6", "10.0.0.0/8"),
        ] {
            let mut proxies = redirect();
            proxies[0][field] = json!(wrong);
            let policy = json!({ "proxies": proxies, "bypass": [], "assignments": [] });
            let (error, parameters) = session.refusal("ReplacePolicy", policy);
            assert_eq!(error, "InvalidParameter");
            assert_eq!(parameters["parameter"], format!("proxies[0].{field}"));
        }
    });
}

#[test]
fn open_connections_go_on_as_they_began_or_end() {
    sandbox(|sb| {
        let _helper = sb.helper().config("udp-verdicts: per-conversation").start();
        let user = sb.user(1001);
        let start = |name: &str, port: u16| {
            sb.service(name)
                .cgroup(&user.cgroup(SERVER))
                .uid(1001)
                .port(port)
                .start()
        };
        let (_server, _other) = (start("redir", PORT), start("other", PORT + 1));
        let _tproxy = sb.tproxy("tproxy").uid(1001).port(7890).start();
        let app = user.cgroup(APP).app();
        let mut session = Session::of(&user);
        let open = |to: SocketAddr| -> [Connection; 2] {
            [app.open_tcp(to).expect("it connects"), app.open_udp(to)]
        };
        let destinations = sb.destinations();
        session.replace(redirect(), json!([]), json!([to_proxy(APP, "redir")]));
        let redirected = destinations.map(open);
        let ask = |connections: &[[Connection; 2]; 2]| {
            let asked = connections
                .each_ref()
                .map(|both| both.each_ref().map(Connection::ask));
            asked.into_iter().flatten().collect::<Vec<_>>()
        };
        let all = |outcomes: [Outcome; 2]| {
            let [a, b] = outcomes;
            vec![a.clone(), a, b.clone(), b]
        };
        let to_redir = all(destinations.map(|to| local("redir", server(to))));
        assert_eq!(ask(&redirected), to_redir);
        // Direct, another port, other options.
        session.replace(redirect(), json!([]), json!([]));
        assert_eq!(ask(&redirected), to_redir);
        let moved = json!([{ "name": "redir", "port": PORT + 1, "redirect": true, "noUdp": true }]);
        session.replace(moved, json!([]), json!([to_proxy(APP, "redir")]));
        assert_eq!(ask(&redirected), to_redir);
        let to = destinations[0];
        let at = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), PORT + 1);
        assert_eq!(app.tcp(to), local("other", at));
        // What was direct stays direct.
        session.replace(redirect(), json!([]), json!([]));
        let went_direct = destinations.map(open);
        let to_internet = all(destinations.map(direct));
        assert_eq!(ask(&went_direct), to_internet);
        session.replace(redirect(), json!([]), json!([to_proxy(APP, "redir")]));
        assert_eq!(ask(&went_direct), to_internet);
        // A TPROXY server of the same name: what it has does not go direct when it is none any more.
        let tproxy = json!([{ "name": "redir", "port": 7890 }]);
        session.replace(tproxy, json!([]), json!([to_proxy(APP, "redir")]));
        let diverted = destinations.map(open);
        assert_eq!(
            ask(&diverted),
            all(destinations.map(|to| proxied("tproxy", to)))
        );
        session.replace(redirect(), json!([]), json!([to_proxy(APP, "redir")]));
        sb.settle();
        let before: Vec<_> = destinations.map(|to| sb.deliveries(to.ip())).into();
        for outcome in ask(&diverted) {
            assert!(is_refused(&outcome), "{outcome:?}");
        }
        // The proxy is gone, and so are its connections.
        session.replace(json!([]), json!([]), json!([]));
        for outcome in ask(&redirected) {
            assert!(is_refused(&outcome), "{outcome:?}");
        }
        let after: Vec<_> = destinations.map(|to| sb.deliveries(to.ip())).into();
        assert_eq!(before, after, "nothing went direct");
    });
}

#[test]
fn the_helper_tells_the_owner_where_udp_was_going() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let mallory = sb.user(1002);
        let redir = sb
            .service("redir")
            .cgroup(&user.cgroup(SERVER))
            .uid(1001)
            .port(PORT)
            .start();
        let app = user.cgroup(APP).app();
        let mut session = Session::of(&user);
        session.replace(redirect(), json!([]), json!([to_proxy(APP, "redir")]));
        let destinations = sb.destinations();
        for to in destinations {
            assert_eq!(app.udp(to), local("redir", server(to)));
        }
        let mut other = Session::of(&mallory);
        other.replace(redirect(), json!([]), json!([]));
        let arrivals = redir.arrivals();
        assert_eq!(arrivals.len(), 2);
        for (arrival, to) in arrivals.into_iter().zip(destinations) {
            let question = json!({
                "listener": arrival.destination.to_string(),
                "client": arrival.source.to_string(),
            });
            let reply = session.call("FindRedirected", question.clone());
            assert_eq!(reply["destination"], to.to_string());
            let source: SocketAddr = reply["source"].as_str().expect("it").parse().expect("one");
            assert!([MACHINE_V4, MACHINE_V6].contains(&source.ip()));
            // Another connection of the same user may ask, another user is told nothing.
            assert_eq!(
                Session::of(&user).call("FindRedirected", question.clone()),
                reply
            );
            let (error, _) = other.refusal("FindRedirected", question);
            assert_eq!(error, "NotRedirected");
        }
        // What somebody sends to the port without being redirected, and nonsense.
        let direct = mallory.cgroup(APP).app();
        let at = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), PORT);
        assert_eq!(direct.udp(at), local("redir", at));
        let arrival = redir.arrivals().pop().expect("it arrived");
        for (listener, client, error) in [
            (at.to_string(), arrival.source.to_string(), "NotRedirected"),
            (at.to_string(), "[::1]:1".to_owned(), "NotRedirected"),
            (
                "127.0.0.1:0".to_owned(),
                "127.0.0.1:1".to_owned(),
                "NotRedirected",
            ),
            (
                "192.0.2.1:7892".to_owned(),
                "127.0.0.1:1".to_owned(),
                "NotRedirected",
            ),
            (
                "localhost:1".to_owned(),
                "127.0.0.1:1".to_owned(),
                "InvalidParameter",
            ),
            (at.to_string(), String::new(), "InvalidParameter"),
        ] {
            let question = json!({ "listener": listener, "client": client });
            assert_eq!(session.refusal("FindRedirected", question).0, error);
        }
    });
}

/// Nor is anybody told who has the mark by now that another user's proxy had.
#[test]
fn nobody_is_told_where_udp_was_going_by_another_users_former_proxy() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let server_of_user = sb.service("redir").cgroup(&user.cgroup(SERVER)).uid(1001);
        let redir = server_of_user.port(PORT).start();
        let app = user.cgroup(APP).app();
        let mut session = Session::of(&user);
        session.replace(redirect(), json!([]), json!([to_proxy(APP, "redir")]));
        for to in sb.destinations() {
            assert_eq!(app.udp(to), local("redir", server(to)));
        }
        session.call("RemovePolicy", json!({}));
        let questions: Vec<Value> = redir
            .arrivals()
            .iter()
            .map(|arrival| {
                json!({
                    "listener": arrival.destination.to_string(),
                    "client": arrival.source.to_string(),
                })
            })
            .collect();
        assert_eq!(questions.len(), 2);
        let mut mallory = Session::of(&sb.user(1002));
        // All the marks that there are, and more.
        for round in 0..16 {
            let proxies: Vec<Value> = (0..16)
                .map(|n| json!({ "name": format!("p{round}-{n}"), "port": PORT, "redirect": true }))
                .collect();
            mallory.replace(json!(proxies), json!([]), json!([]));
            for question in &questions {
                let (error, _) = mallory.refusal("FindRedirected", question.clone());
                assert_eq!(error, "NotRedirected");
            }
        }
    });
}

#[test]
fn dns_of_the_users_own_is_asked_only_at_an_own_server() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let app = user.cgroup(APP).app();
        let mut session = Session::of(&user);
        let mut proxies = redirect();
        proxies[0]["dnsHijack"] = json!({
            "ipv4": "127.0.0.1", "ipv6": "::1", "port": PORT + 1, "tcp": true, "own": true,
        });
        session.replace(proxies, json!([]), json!([to_proxy(APP, "redir")]));
        for (cgroup, uid) in [
            (sb.user(1002).cgroup("app.slice/evil.service"), 1002),
            (user.cgroup(SERVER), 1001),
        ] {
            let dns = sb
                .service("dns")
                .cgroup(&cgroup)
                .uid(uid)
                .port(PORT + 1)
                .start();
            for to in sb.destinations() {
                let to = SocketAddr::new(to.ip(), 53);
                for transport in [Tcp, Udp] {
                    let answered = app.ask(transport, to);
                    let at = SocketAddr::new(server(to).ip(), PORT + 1);
                    match uid {
                        1001 => assert_eq!(answered, local("dns", at)),
                        _ => assert_eq!(answered, Outcome::Refused),
                    }
                }
                sb.assert_nothing_left_for(to.ip());
            }
            if uid != 1001 {
                dns.assert_idle();
            }
        }
    });
}

#[test]
fn a_configuration_names_a_redirection_server() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let _server = redir(sb, &user);
        let app = user.cgroup(APP).app();
        let config = |options: &str| {
            format!(
                "version: 1\nredirects: {{redir: {{port: {PORT}{options}}}}}\n\
                 rules: [{{match: /app-a, proxy: redir}}]\n"
            )
        };
        let agent = user.agent(&config("")).start();
        for (transport, to) in each(sb) {
            assert_eq!(app.ask(transport, to), local("redir", server(to)));
            sb.assert_nothing_left_for(to.ip());
        }
        // As most of them are used: they know no UDP.
        agent.write_config(&config(", no-udp: true"));
        wait_until("UDP to go direct", || {
            let [to, _] = sb.destinations();
            app.udp(to) == direct(to)
        });
        for to in sb.destinations() {
            assert_eq!(app.tcp(to), local("redir", server(to)));
            assert_eq!(app.udp(to), direct(to));
        }
    });
}
