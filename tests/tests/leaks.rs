//! What a proxied application sends does not leave past the proxy, however odd the way that it takes.

#![allow(clippy::expect_used, reason = "a panic is a failed test")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use cgtproxy_tests::sandbox::{
    App, INTERNET_V4, MACHINE_V4, MACHINE_V6, Outcome, Sandbox, Server, UPLINK, User, direct,
    local, proxied, sandbox,
};
use cgtproxy_tests::session::{Session, to_proxy, verdict};
use cgtproxy_tests::wait::wait_until;
use cgtproxy_tests::wire::Transport::{self, Tcp, Udp};
use serde_json::json;

const APP: &str = "app.slice/app-a.scope";
const SERVER: &str = "app.slice/redir.service";
const TRANSPORTS: [Transport; 2] = [Tcp, Udp];

/// A user with an application that goes through a TPROXY server.
fn proxied_app(sb: &Sandbox) -> (User, App, Session, Server) {
    let user = sb.user(1001);
    let app = user.cgroup(APP).app();
    let server = user.cgroup("app.slice/mihomo.service");
    let proxy = sb.tproxy("mihomo").uid(1001).cgroup(&server).port(7890);
    let proxy = proxy.start();
    let mut session = Session::of(&user);
    session.replace(
        json!([{ "name": "mihomo", "port": 7890 }]),
        json!([]),
        json!([
            to_proxy("", "mihomo"),
            verdict("app.slice/mihomo.service", "direct"),
        ]),
    );
    (user, app, session, proxy)
}

/// The same with a server that connections are redirected to.
fn redirected_app(sb: &Sandbox) -> (User, App, Session, Server) {
    let user = sb.user(1001);
    let app = user.cgroup(APP).app();
    let server = user.cgroup(SERVER);
    let server = sb.service("redir").uid(1001).cgroup(&server).port(7892);
    let server = server.start();
    let mut session = Session::of(&user);
    session.replace(
        json!([{ "name": "redir", "port": 7892, "redirect": true }]),
        json!([]),
        json!([to_proxy(APP, "redir")]),
    );
    (user, app, session, server)
}

/// A server on the machine itself that connections to that destination are redirected to.
fn at_home(to: SocketAddr, port: u16) -> SocketAddr {
    let address: IpAddr = match to {
        SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    };
    SocketAddr::new(address, port)
}

/// Whoever sends to the outside of a proxy may be the first to speak: an answer is the first that the application
/// says to it, as with WebRTC and every other protocol among peers.
#[test]
fn answers_to_whom_the_proxy_has_brought_go_to_the_proxy() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let (_user, app, _session, proxy) = proxied_app(sb);
        answers_go_to_the_proxy(sb, &app, &proxy);
    });
}

#[track_caller]
fn answers_go_to_the_proxy(sb: &Sandbox, app: &App, proxy: &Server) {
    for to in sb.destinations() {
        let peer = app.open_udp(to);
        proxy.speak_first(to, peer.local());
        for _ in 0..2 {
            assert_eq!(peer.ask(), proxied("mihomo", to));
            proxy.speak_first(to, peer.local());
        }
        sb.assert_nothing_left_for(to.ip());
    }
}

/// The verdict is the application's at each packet: who is direct answers directly, whoever spoke first.
#[test]
fn answers_go_by_the_verdict_of_who_answers() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let (user, _app, mut session, proxy) = proxied_app(sb);
        let other = user.cgroup("app.slice/app-b.scope").app();
        let own = |target| verdict("app.slice/app-b.scope", target);
        for (verdict, forbidden) in [("direct", false), ("drop", true)] {
            session.assign(json!([own(verdict)]));
            for to in sb.destinations() {
                let peer = other.open_udp(to);
                proxy.speak_first(to, peer.local());
                match forbidden {
                    true => assert!(peer.ask().is_dropped()),
                    false => assert_eq!(peer.ask(), direct(to)),
                }
            }
        }
    });
}

/// The kernel forgets connections by itself when they are silent for long, or at a command.
#[test]
fn connections_that_the_kernel_has_forgotten_stay_with_the_proxy() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let (_user, app, _session, proxy) = proxied_app(sb);
        for to in sb.destinations() {
            let udp = app.open_udp(to);
            let tcp = app.open_tcp(to).expect("it opens");
            for connection in [&udp, &tcp] {
                assert_eq!(connection.ask(), proxied("mihomo", to));
            }
            sb.forget_connections();
            // The proxy is the first to say something.
            proxy.speak_first(to, udp.local());
            proxy.speak_up();
            for connection in [&udp, &tcp] {
                assert_eq!(connection.ask(), proxied("mihomo", to));
            }
            sb.assert_nothing_left_for(to.ip());
            // The application is.
            sb.forget_connections();
            for connection in [&udp, &tcp] {
                assert_eq!(connection.ask(), proxied("mihomo", to));
            }
            sb.assert_nothing_left_for(to.ip());
        }
    });
}

/// Once the kernel has forgotten a connection, its end belongs to none (INVALID).
#[test]
fn the_end_of_a_forgotten_connection_does_not_leave() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        for each in [proxied_app, redirected_app] {
            let (_user, app, _session, _server) = each(sb);
            for to in sb.destinations() {
                let connection = app.open_tcp(to).expect("it opens");
                sb.forget_connections();
                drop(connection);
                sb.settle();
                sb.assert_nothing_left_for(to.ip());
            }
        }
    });
}

/// An open connection outlives packets of its own that the kernel takes for those of none.
#[test]
fn a_connection_outlives_what_belongs_to_none() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let (_user, app, _session, _proxy) = proxied_app(sb);
        sb.assert_connections_outlive_what_belongs_to_none(&app, "mihomo");
    });
}

/// What an application has said before it closed its socket, or ended.
#[test]
fn what_a_closed_socket_still_has_to_say_reaches_the_proxy() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let (user, _app, _session, proxy) = proxied_app(sb);
        let pid = proxy.pid().to_string();
        // The test server takes its time with much.
        let little =
            "cd /proc/sys/net/ipv4; for f in tcp_rmem tcp_wmem; do echo 4096 65536 65536 >$f; done";
        sb.run(&["sh", "-ec", little]);
        for to in sb.destinations() {
            let app = user.cgroup(APP).app();
            sb.run(&["kill", "-STOP", &pid]);
            app.hoard(to, 1);
            drop(app);
            let left = || sb.run(&["ss", "-Htn", "state", "fin-wait-1"]);
            wait_until("the application has ended", || !left().is_empty());
            sb.forget_connections();
            // It has room again, and says so first.
            sb.run(&["kill", "-CONT", &pid]);
            wait_until("everything is said", || left().is_empty());
            sb.assert_nothing_left_for(to.ip());
        }
    });
}

/// Another program may have some or all packets not tracked.
#[test]
fn packets_that_are_not_tracked_do_not_leave() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        for each in [proxied_app, redirected_app] {
            let (_user, app, _session, _server) = each(sb);
            sb.nft(
                "table inet raw { chain out { type filter hook output priority raw; notrack; }; }",
            );
            for to in sb.destinations() {
                for transport in TRANSPORTS {
                    let outcome = app.ask(transport, to);
                    let refused = matches!(outcome, Outcome::Refused | Outcome::Silent);
                    assert!(
                        refused || outcome.is_dropped(),
                        "{transport:?} {to} {outcome:?}"
                    );
                    sb.assert_nothing_left_for(to.ip());
                }
            }
            sb.nft("delete table inet raw");
        }
    });
}

/// Whoever gets it, nothing of it is on its way to that destination.
#[track_caller]
fn assert_does_not_leave(sb: &Sandbox, app: &App, transport: Transport, to: SocketAddr) {
    let outcome = app.ask(transport, to);
    assert!(
        !matches!(outcome, Outcome::Direct { .. }),
        "{transport:?} {to} {outcome:?}"
    );
    sb.assert_nothing_left_for(to.ip());
}

/// An application may say by which interface it sends (SO_BINDTODEVICE), since Linux 5.7 without a privilege.
#[test]
fn an_application_that_chooses_its_interface_does_not_get_past_the_proxy() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        for each in [proxied_app, redirected_app] {
            let (_user, app, _session, _server) = each(sb);
            app.device(UPLINK);
            for to in sb.destinations() {
                for transport in TRANSPORTS {
                    assert_does_not_leave(sb, &app, transport, to);
                    // Nor does what was translated, at its new destination.
                    let home = at_home(to, 0).ip();
                    assert_eq!(sb.deliveries(home), [], "{transport:?} {to}");
                }
            }
        }
    });
}

/// An address of each family, with the next hop.
type Network = [(&'static str, &'static str); 2];
const HOME: Network = [
    ("192.0.2.1/24", "192.0.2.2"),
    ("2001:db8::1/64", "2001:db8::2"),
];
const AWAY: Network = [
    ("10.9.8.1/24", "10.9.8.2"),
    ("2001:db8:9999::1/64", "2001:db8:9999::2"),
];

/// Moves the machine from one network to another.
fn change_networks(sb: &Sandbox, from: Network, to: Network) {
    for ((before, _), (after, hop)) in from.into_iter().zip(to) {
        let family = if hop.contains(':') { "-6" } else { "-4" };
        for words in [
            format!("address add {after} dev {UPLINK}"),
            format!("neighbour replace {hop} lladdr 02:00:00:00:00:02 dev {UPLINK} nud permanent"),
            format!("route replace default via {hop}"),
            format!("address del {before} dev {UPLINK}"),
        ] {
            let command = ["ip", family].into_iter().chain(words.split(' '));
            sb.run(&command.collect::<Vec<_>>());
        }
    }
}

/// When the machine has come to another network, the address that an application speaks from has gone. What the proxy
/// still has to say would go there: in plain, and in the name of whom the application has spoken to.
fn nothing_is_brought_to_an_address_that_has_gone(
    sb: &Sandbox,
    app: &App,
    server: &Server,
    expected: impl Fn(SocketAddr) -> Outcome,
    speaks_for_peers: bool,
) {
    let opened = sb.destinations().map(|to| {
        let (tcp, udp) = (app.open_tcp(to).expect("it opens"), app.open_udp(to));
        for connection in [&tcp, &udp] {
            assert_eq!(connection.ask(), expected(to));
        }
        // One that the server has begun.
        let peer = app.open_udp(SocketAddr::new(to.ip(), 443));
        if speaks_for_peers {
            server.speak_first(SocketAddr::new(to.ip(), 443), peer.local());
        }
        (to, tcp, udp, peer)
    });
    change_networks(sb, HOME, AWAY);
    server.speak_up();
    if speaks_for_peers {
        for (to, _, udp, peer) in &opened {
            server.speak_first(*to, udp.local());
            server.speak_first(SocketAddr::new(to.ip(), 443), peer.local());
        }
    }
    change_networks(sb, AWAY, HOME);
    sb.settle();
    for address in [MACHINE_V4, MACHINE_V6] {
        sb.assert_nothing_left_for(address);
    }
    // Back home, they go on.
    for (to, tcp, udp, _peer) in &opened {
        for connection in [tcp, udp] {
            assert_eq!(Outcome::in_the_end(|| connection.ask()), expected(*to));
        }
    }
}

#[test]
fn what_a_proxy_brings_to_an_address_that_has_gone_does_not_leave() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        {
            let (_user, app, _session, proxy) = proxied_app(sb);
            let by_proxy = |to| proxied("mihomo", to);
            nothing_is_brought_to_an_address_that_has_gone(sb, &app, &proxy, by_proxy, true);
        }
        let (_user, app, _session, server) = redirected_app(sb);
        let by_server = |to| local("redir", at_home(to, 7892));
        nothing_is_brought_to_an_address_that_has_gone(sb, &app, &server, by_server, false);
    });
}

/// Runs this where only packets that this rule is about have a route to the IPv6 internet and to groups. For others there
/// is none at first, and one that leads nowhere then.
fn with_routes_for(sb: &Sandbox, rule: &str, check: impl Fn()) {
    let script = format!(
        "rule add {rule} priority 1000 lookup 100\n\
         route add default via 2001:db8::2 dev {UPLINK} table 100\n\
         route del default via 2001:db8::2 dev {UPLINK}\n\
         route add multicast ff00::/8 dev {UPLINK} table 100\n\
         route del multicast ff00::/8 dev {UPLINK} table local\n"
    );
    for script in [script.as_str(), "route add unreachable default\n"] {
        for line in script.lines() {
            sb.ip6(line);
        }
        check();
    }
}

/// An interface may have routes of its own, as one of several uplinks has, or one in a VRF.
#[test]
fn routes_of_an_interface_lead_nothing_past_the_proxy() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        with_routes_for(sb, &format!("oif {UPLINK}"), || {
            for each in [proxied_app, redirected_app] {
                let (_user, app, _session, _server) = each(sb);
                app.device(UPLINK);
                let [_, to] = sb.destinations();
                for transport in TRANSPORTS {
                    assert_does_not_leave(sb, &app, transport, to);
                }
                // What nobody can take for others is left alone.
                let group: SocketAddr = "[ff05::1:3]:547".parse().expect("an address");
                assert_eq!(app.udp(group), Outcome::LeftUnanswered);
            }
        });
    });
}

/// So may a user, as one for whom there is a VPN.
#[test]
fn routes_of_a_user_lead_nothing_past_the_proxy() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        with_routes_for(sb, "uidrange 1001-1001", || {
            {
                let (_user, app, _session, proxy) = proxied_app(sb);
                let [_, to] = sb.destinations();
                for transport in TRANSPORTS {
                    assert_eq!(app.ask(transport, to), proxied("mihomo", to));
                }
                answers_go_to_the_proxy(sb, &app, &proxy);
            }
            let (_user, app, _session, _server) = redirected_app(sb);
            let [_, to] = sb.destinations();
            for transport in TRANSPORTS {
                let at = at_home(to, 7892);
                assert_eq!(app.ask(transport, to), local("redir", at), "{transport:?}");
            }
        });
    });
}

/// As wg-quick has them for its own packets (`premangle`), and others for several uplinks.
#[test]
fn rules_that_restore_marks_do_no_harm() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        sb.nft(
            "table inet wg-quick-wg0 { chain premangle { \
             type filter hook prerouting priority mangle; meta mark set ct mark; }; }",
        );
        {
            let (_user, app, _session, proxy) = proxied_app(sb);
            for to in sb.destinations() {
                for transport in TRANSPORTS {
                    assert_eq!(app.ask(transport, to), proxied("mihomo", to));
                }
            }
            answers_go_to_the_proxy(sb, &app, &proxy);
            // As CONNMARK does it, where they come after ours and before.
            for order in ["-151", "-149"] {
                sb.nft(&format!(
                    "table inet uplinks {{ chain out {{ \
                     type route hook output priority {order}; meta mark set ct mark; }}; }}"
                ));
                answers_go_to_the_proxy(sb, &app, &proxy);
                sb.nft("delete table inet uplinks");
            }
        }
        let (_user, app, _session, _server) = redirected_app(sb);
        for to in sb.destinations() {
            for transport in TRANSPORTS {
                let at = at_home(to, 7892);
                assert_eq!(app.ask(transport, to), local("redir", at), "{transport:?}");
            }
        }
    });
}

/// Whoever administers the machine may come so.
#[test]
fn a_mark_of_others_on_connections_from_outside_does_no_harm() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let (user, _app, _session, _proxy) = proxied_app(sb);
        let service = sb.service("web").uid(user.uid()).port(8080);
        let service = service.cgroup(&user.cgroup("app.slice/web.service"));
        let _service = service.start();
        sb.nft(&format!(
            "table inet foreign {{ chain in {{ type filter hook prerouting priority -10; \
             iifname {UPLINK} ct state new ct mark set 0x81000000; }}; }}"
        ));
        sb.expect_answers(&sb.internet_app(), "web", 8080);
    });
}

/// Whoever comes later to a hook comes first among those of one priority.
#[test]
fn rules_that_translate_for_everybody_come_afterwards() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let (_user, app, _session, _server) = redirected_app(sb);
        let elsewhere = sb.destinations();
        sb.nft(&format!(
            "table inet pihole {{ chain out {{ type nat hook output priority -100; \
             meta nfproto ipv4 dnat ip to {}; meta nfproto ipv6 dnat ip6 to {}; }}; }}",
            elsewhere[0].ip(),
            elsewhere[1].ip()
        ));
        for to in sb.destinations() {
            for transport in TRANSPORTS {
                let at = at_home(to, 7892);
                assert_eq!(app.ask(transport, to), local("redir", at), "{transport:?}");
            }
        }
    });
}

/// A tunnel's own packets have the socket of who sends something through it (skb_scrub_packet, net/core/skbuff.c), so an
/// application whose proxy leaves out what is behind the tunnel may have the proxy take the tunnel itself.
#[test]
fn a_tunnel_is_the_kernels_again_when_the_kernel_speaks_through_it() {
    sandbox(|sb| {
        let _helper = sb.helper().config("udp-verdicts: per-conversation").start();
        sb.build_tunnel();
        let behind = |host: u8| IpAddr::from([10, 99, 0, host]);
        let left = || left_through_tunnel(sb);
        let app = sb.user(1001).cgroup(APP).app();
        let other = sb.cgroup("system.slice/web.service").app();
        let mut unknown = 100..;
        let mut speak = || {
            let before = left();
            // Nobody knows that host: the kernel asks for it, with no socket (arp_solicit, net/ipv4/arp.c).
            other.ping(behind(unknown.next().expect("there are more")));
            assert!(left() > before, "what the kernel says does not leave");
        };
        let to = SocketAddr::new(behind(2), 80);
        for (uid, path) in [(1001, APP), (0, "user.slice")] {
            let proxy = sb.tproxy("mihomo").uid(uid).port(7890).start();
            let mut session = Session::of(&sb.user(uid));
            let mut take = || {
                session.replace(
                    json!([{ "name": "mihomo", "port": 7890 }]),
                    json!(["10.99.0.0/24"]),
                    json!([to_proxy(path, "mihomo")]),
                );
                sb.forget_connections();
                let (before, reached) = (left(), proxy.arrivals().len());
                app.udp(to);
                assert_eq!(left(), before, "{uid}");
                assert_eq!(proxy.arrivals().len(), reached + 1, "{uid}");
            };
            take();
            let reached = proxy.arrivals().len();
            speak();
            for sender in [&other, &app] {
                let before = left();
                sender.udp(to);
                assert_eq!(left(), before + 1, "{uid}");
            }
            assert_eq!(proxy.arrivals().len(), reached, "{uid}");
            // The proxy may be gone by then.
            take();
            session.call("RemovePolicy", json!({}));
            speak();
        }
    });
}

/// What is translated can't be taken back.
#[test]
fn what_the_kernel_says_through_a_tunnel_goes_to_no_users_server() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        sb.build_tunnel();
        let user = sb.user(1001);
        let app = user.cgroup(APP).app();
        let other = sb.cgroup("system.slice/web.service").app();
        let server = user.cgroup(SERVER);
        let server = sb.service("redir").uid(1001).cgroup(&server).port(7892);
        let server = server.start();
        let mut session = Session::of(&user);
        session.replace(
            json!([{ "name": "redir", "port": 7892, "redirect": true }]),
            json!(["10.99.0.0/24"]),
            json!([to_proxy(APP, "redir")]),
        );
        sb.forget_connections();
        app.udp(SocketAddr::from(([10, 99, 0, 2], 80)));
        assert_eq!(server.arrivals().len(), 1);
        other.udp(SocketAddr::from(([10, 99, 0, 2], 80)));
        other.ping(IpAddr::from([10, 99, 0, 100]));
        assert_eq!(server.arrivals().len(), 1);
        assert_eq!(left_through_tunnel(sb), 0);
    });
}

/// How many datagrams of the tunnel's have left.
fn left_through_tunnel(sb: &Sandbox) -> u64 {
    let deliveries = sb.deliveries(INTERNET_V4);
    let datagrams = deliveries.iter().filter(|d| d.protocol == Udp.protocol());
    datagrams.map(|d| d.packets).sum()
}
