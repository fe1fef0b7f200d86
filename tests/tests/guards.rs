//! Rules that others stand before: what is left for them to catch. Those of a gateway are in `gateway_guards.rs`.

#![allow(clippy::expect_used, reason = "a panic is a failed test")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use cgtproxy_tests::sandbox::{
    App, INTERNET_V4, MACHINE_V4, Outcome, PORTS, Sandbox, Server, User, direct, local, proxied,
    sandbox,
};
use cgtproxy_tests::session::{Session, to_proxy};
use cgtproxy_tests::wait::wait_until;
use cgtproxy_tests::wire::Transport::{self, Tcp, Udp};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

const APP: &str = "app.slice/app-a.scope";
const TRANSPORTS: [Transport; 2] = [Tcp, Udp];
const LOCALHOST: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::LOCALHOST),
    IpAddr::V6(Ipv6Addr::LOCALHOST),
];
/// What the first proxy of all is allotted: the divert bit, and the number 1.
const FIRST_MARK: u32 = 0x8100_0000;

/// A user with an application, and a session in which it goes through a TPROXY server.
fn proxied_app(sb: &Sandbox) -> (User, App, Session, Server) {
    let user = sb.user(1001);
    let app = user.cgroup(APP).app();
    let proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
    let session = with_proxy(&user, &json!({ "name": "mihomo", "port": 7890 }));
    (user, app, session, proxy)
}

/// A user with an application, and a session in which connections are redirected to a server.
fn redirected_app(sb: &Sandbox) -> (User, App, Session, Server) {
    let user = sb.user(1001);
    let app = user.cgroup(APP).app();
    let session = with_proxy(
        &user,
        &json!({ "name": "redir", "port": 7892, "redirect": true }),
    );
    let server = redirection_server(sb, &user);
    (user, app, session, server)
}

fn redirection_server(sb: &Sandbox, user: &User) -> Server {
    let cgroup = user.cgroup("app.slice/redir.service");
    let server = sb.service("redir").uid(1001).cgroup(&cgroup);
    server.port(7892).start()
}

fn with_proxy(user: &User, proxy: &Value) -> Session {
    let mut session = Session::of(user);
    let name = proxy["name"].as_str().expect("a name");
    session.replace(json!([proxy]), json!([]), json!([to_proxy(APP, name)]));
    session
}

/// The loopback address of that destination's family, at another port.
fn at_home(to: SocketAddr, port: u16) -> SocketAddr {
    let [v4, v6] = LOCALHOST;
    SocketAddr::new(if to.is_ipv4() { v4 } else { v6 }, port)
}

/// A query that is not tracked can't be translated.
#[test]
fn queries_that_are_not_tracked_do_not_leave() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let app = user.cgroup(APP).app();
        let hijack = json!({ "ipv4": "127.0.0.1", "ipv6": "::1", "port": 5353, "tcp": true });
        for proxy in [
            json!({ "name": "mihomo", "port": 7890, "dnsHijack": hijack }),
            json!({ "name": "redir", "port": 7892, "redirect": true, "dnsHijack": hijack }),
        ] {
            let _session = with_proxy(&user, &proxy);
            sb.nft(
                "table inet raw { chain out { type filter hook output priority raw; notrack; }; }",
            );
            for to in sb.destinations().map(|to| SocketAddr::new(to.ip(), 53)) {
                for transport in TRANSPORTS {
                    let outcome = app.ask(transport, to);
                    let refused = outcome == Outcome::Refused || outcome.is_dropped();
                    assert!(refused, "{transport:?} {to} {outcome:?}");
                    sb.assert_nothing_left_for(to.ip());
                }
            }
            sb.nft("delete table inet raw");
        }
    });
}

/// Should an element ever be wrong, it leads nobody into another user's proxy.
#[test]
fn an_element_that_is_wrong_leads_into_no_other_users_proxy() {
    sandbox(|sb| {
        let mut helper = sb.helper().config("own-table: false").start();
        let (_user, app, _session, proxy) = proxied_app(sb);
        let cgroup = sb.user(1002).cgroup(APP);
        let others = cgroup.app();
        // Nobody puts right what follows.
        helper.kill();
        let elements = sb.map_elements("cgroups");
        let number = &elements.first().expect("there is one").verdict;
        let path = cgroup.path();
        let path = path.strip_prefix("/").expect("it is absolute").display();
        sb.nft(&format!(
            "add element inet cgtproxy cgroups {{ \"{path}\" : {number} }}"
        ));
        for to in sb.destinations() {
            for transport in TRANSPORTS {
                assert_eq!(others.ask(transport, to), direct(to), "{transport:?}");
            }
        }
        proxy.assert_idle();
        for to in sb.destinations() {
            assert_eq!(app.tcp(to), proxied("mihomo", to));
        }
    });
}

/// A program with CAP_NET_RAW may set any mark. While there is no TPROXY server, nothing is delivered by marks.
#[test]
fn a_mark_that_an_application_sets_leads_to_no_service() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let (_user, _app, _session, server) = redirected_app(sb);
        let wrong = sb.service("wrong").port(PORTS[0]).start();
        let app = sb.user(1002).cgroup(APP).app_with(&["net_raw"]);
        app.mark(FIRST_MARK);
        for to in sb.destinations() {
            for transport in TRANSPORTS {
                let outcome = app.ask(transport, to);
                assert!(outcome.is_dropped(), "{transport:?} {to} {outcome:?}");
            }
            sb.assert_nothing_left_for(to.ip());
        }
        wrong.assert_idle();
        server.assert_idle();
    });
}

/// What is open to a redirection server is received while its mark leads to that server's chain.
#[test]
fn an_open_connection_is_not_received_without_its_mark() {
    sandbox(|sb| {
        let mut helper = sb.helper().config("own-table: false").start();
        let (_user, app, _session, server) = redirected_app(sb);
        let destinations = sb.destinations();
        let open = destinations.map(|to| {
            let connection = app.open_tcp(to).expect("it opens");
            assert_eq!(connection.ask(), local("redir", at_home(to, 7892)));
            connection
        });
        // Nobody puts right what follows.
        helper.kill();
        sb.nft(&format!(
            "delete element inet cgtproxy receive {{ {FIRST_MARK} : goto receive-1001-redir }}"
        ));
        let arrivals = server.arrivals().len();
        for connection in &open {
            assert_eq!(connection.ask(), Outcome::Silent);
        }
        assert_eq!(server.arrivals().len(), arrivals);
    });
}

/// The kernel remembers an earlier connection for a minute (TIME-WAIT), and lets the next one from its port in.
#[test]
fn a_connection_from_the_port_of_an_earlier_one_is_received() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let (user, app, _session, mut server) = redirected_app(sb);
        let in_state = |state, own: SocketAddr| {
            let family = if own.is_ipv4() { "-4" } else { "-6" };
            let filter = format!("sport = :{}", own.port());
            !sb.run(&["ss", family, "-Htn", "state", state, &filter])
                .is_empty()
        };
        for to in sb.destinations() {
            let at = at_home(to, 7892);
            let connection = app.open_tcp(to).expect("it opens");
            assert_eq!(connection.ask(), local("redir", at));
            let own = connection.local();
            // The server is the first to close.
            drop(server);
            wait_until("the server's half is closed", || {
                in_state("close-wait", own)
            });
            drop(connection);
            wait_until("the kernel remembers it", || in_state("time-wait", at));
            server = redirection_server(sb, &user);
            let range = sb.use_one_port(own.port());
            let again = app.open_tcp(to).expect("it opens");
            assert_eq!(again.local(), own);
            assert_eq!(again.ask(), local("redir", at));
            sb.use_ports(&range);
        }
    });
}

/// The last acknowledgement of a connection comes from the kernel, when the application has no socket any more.
#[test]
fn what_the_kernel_says_to_a_proxy_that_is_gone_does_not_leave() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let (_user, app, mut session, proxy) = proxied_app(sb);
        let mihomo = json!([{ "name": "mihomo", "port": 7890 }]);
        let signal = |signal| {
            let pid = Pid::from_raw(proxy.pid().cast_signed());
            kill(pid, signal).expect("it is running");
        };
        for to in sb.destinations() {
            session.replace(mihomo.clone(), json!([]), json!([to_proxy(APP, "mihomo")]));
            let in_state = |state, filter: &str| {
                let filter = format!("{filter} {to}");
                !sb.run(&["ss", "-Htn", "state", state, &filter]).is_empty()
            };
            let connection = app.open_tcp(to).expect("it opens");
            assert_eq!(connection.ask(), proxied("mihomo", to));
            signal(Signal::SIGSTOP);
            drop(connection);
            wait_until("the application's half is closed", || {
                in_state("fin-wait-2", "dst")
            });
            session.replace(json!([]), json!([]), json!([]));
            signal(Signal::SIGCONT);
            // It waits for the acknowledgement in vain.
            wait_until("the proxy closes", || in_state("last-ack", "src"));
            sb.assert_nothing_left_for(to.ip());
            assert!(in_state("time-wait", "dst"));
        }
    });
}

/// Whoever is direct answers directly, also where rules of other programs restore the marks of connections.
#[test]
fn a_mark_that_is_restored_diverts_no_answer_of_who_is_direct() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let (user, _app, _session, proxy) = proxied_app(sb);
        let other = user.cgroup("app.slice/app-b.scope").app();
        sb.nft(
            "table inet uplinks { chain out { \
             type route hook output priority -151; meta mark set ct mark; }; }",
        );
        for to in sb.destinations() {
            let peer = other.open_udp(to);
            proxy.speak_first(to, peer.local());
            assert_eq!(peer.ask(), direct(to));
        }
    });
}

/// A TPROXY server may speak for an address of the machine's own: what answers it is for whoever has the port.
#[test]
fn answers_to_the_machine_itself_are_not_diverted() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let (_user, app, _session, proxy) = proxied_app(sb);
        let _own = sb.service("own").port(8080).start();
        for ip in LOCALHOST {
            let at = SocketAddr::new(ip, 8080);
            let peer = app.open_udp(at);
            proxy.speak_first(at, peer.local());
            assert_eq!(peer.ask(), local("own", at));
        }
        proxy.assert_idle();
    });
}

/// A socket of the kernel's own, as that of a tunnel, belongs to nobody: what it says to a peer goes there, whoever has
/// spoken for that peer.
#[test]
fn what_a_tunnel_answers_to_whom_a_proxy_has_brought_goes_there() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let (_user, _app, _session, proxy) = proxied_app(sb);
        proxy.speak_first(
            SocketAddr::new(INTERNET_V4, 4789),
            SocketAddr::new(MACHINE_V4, 5000),
        );
        sb.build_tunnel();
        let left = || {
            let deliveries = sb.deliveries(INTERNET_V4);
            let datagrams = deliveries.iter().filter(|d| d.protocol == Udp.protocol());
            datagrams.map(|d| d.packets).sum::<u64>()
        };
        let before = left();
        // The kernel asks who has that address, with no socket (arp_solicit, net/ipv4/arp.c).
        let other = sb.cgroup("system.slice/web.service").app();
        other.ping(IpAddr::from([10, 99, 0, 100]));
        assert!(left() > before);
        proxy.assert_idle();
    });
}
