//! Whose packets are answers is for the kernel's connection tracking to say, and who forges the beginning of a
//! conversation has no say in it.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a panic is a failed test"
)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

use cgtproxy_tests::sandbox::{
    App, MACHINE_V4, MACHINE_V6, Outcome, PORTS, Sandbox, Server, UPLINK, User, direct, local,
    proxied, sandbox,
};
use cgtproxy_tests::session::{Session, to_proxy, verdict};
use cgtproxy_tests::wait::wait_until;
use cgtproxy_tests::wire::Transport::{Tcp, Udp};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

const PROXIED: &str = "app.slice/app-proxied.scope";
const REDIRECTED: &str = "app.slice/app-redirected.scope";
const DROPPED: &str = "app.slice/app-dropped.scope";
const FREE: &str = "app.slice/app-free.scope";
const MINE: u32 = 1001;
const OTHER: u32 = 1002;
/// Where connections of TCP come from, so that others can know it before.
const PORT: u16 = 40_404;
/// Anybody may take this port, and the internet answers there by UDP.
const ANSWERED: u16 = PORTS[3];
/// Nobody listens there.
const UNANSWERED: u16 = 4_444;

/// A user with an application for each verdict.
struct Bed {
    proxied: App,
    redirected: App,
    dropped: App,
    free: App,
    /// Somebody else's, about whom nothing is said.
    hostile: App,
    session: Session,
    _servers: [Server; 2],
}

fn bed(sb: &Sandbox) -> Bed {
    let user = sb.user(MINE);
    let app = |path| user.cgroup(path).app();
    let [proxied, redirected, dropped, free] = [PROXIED, REDIRECTED, DROPPED, FREE].map(app);
    let servers = user.cgroup("app.slice/servers.service");
    let tproxy = sb.tproxy("mihomo").uid(MINE).cgroup(&servers).port(7890);
    let redir = sb.service("redir").uid(MINE).cgroup(&servers).port(7892);
    let servers = [tproxy.start(), redir.start()];
    let mut session = Session::of(&user);
    session.replace(
        json!([
            { "name": "mihomo", "port": 7890 },
            { "name": "redir", "port": 7892, "redirect": true },
        ]),
        json!([]),
        json!([
            to_proxy(PROXIED, "mihomo"),
            to_proxy(REDIRECTED, "redir"),
            verdict(DROPPED, "dropAll"),
        ]),
    );
    Bed {
        proxied,
        redirected,
        dropped,
        free,
        hostile: sb.user(OTHER).cgroup(FREE).app(),
        session,
        _servers: servers,
    }
}

/// Has root's policy divert what comes in on `lan0`.
fn divert(sb: &Sandbox) -> Session {
    let mut root = Session::of(&sb.user(0));
    let policy = json!({
        "proxies": [{ "name": "company", "port": 7890 }], "bypass": [], "assignments": [],
        "gateway": { "interfaces": ["lan0"], "proxy": "company" },
    });
    root.call("ReplacePolicy", policy);
    root
}

/// Fresh destinations of both families, at this port.
fn destinations(sb: &Sandbox, port: u16) -> [SocketAddr; 2] {
    [sb.fresh_v4(), sb.fresh_v6()].map(|address| SocketAddr::new(address, port))
}

fn own_address(to: SocketAddr) -> SocketAddr {
    let address = match to {
        SocketAddr::V4(_) => MACHINE_V4,
        SocketAddr::V6(_) => MACHINE_V6,
    };
    SocketAddr::new(address, PORT)
}

/// Without a privilege, a program can speak over the loopback interface as whoever is not there, in IPv6. What it has
/// spoken to would answer that peer.
#[test]
fn whoever_speaks_as_a_stranger_makes_nobody_answer() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let bed = bed(sb);
        for to in destinations(sb, ANSWERED) {
            let claims = |app: &App| {
                let peer = app.open_udp(to);
                let refused = bed.hostile.claim(Udp, to, peer.local());
                assert!(refused.is_err(), "{to}");
                peer
            };
            assert_eq!(claims(&bed.proxied).ask(), proxied("mihomo", to));
            assert!(matches!(
                claims(&bed.redirected).ask(),
                Outcome::Local { .. }
            ));
            assert!(claims(&bed.dropped).ask().is_dropped());
            sb.assert_nothing_left_for(to.ip());
            // Who has nobody's verdict is not kept from what others may do.
            assert_eq!(claims(&bed.free).ask(), direct(to));
        }
        // Root may, where the kernel lets anybody.
        let [_, to] = destinations(sb, ANSWERED);
        let peer = bed.free.open_udp(to);
        let root = sb.user(OTHER).cgroup(FREE).app_as(0);
        assert_eq!(root.claim(Udp, to, peer.local()), Ok(()));
        // Between addresses that the machine has, anybody speaks.
        for address in [MACHINE_V4, MACHINE_V6] {
            let to = SocketAddr::new(address, PORT);
            let from = SocketAddr::new(address, PORT + 1);
            assert_eq!(bed.hostile.claim(Udp, from, to), Ok(()));
        }
        let link = link_local(sb, UPLINK);
        let to = SocketAddrV6::new(*link.ip(), PORT, 0, link.scope_id());
        assert_eq!(bed.hostile.claim(Udp, link.into(), to.into()), Ok(()));
    });
}

/// Nor anybody behind the machine, whose packets are diverted.
#[test]
fn whoever_speaks_as_a_stranger_makes_no_host_behind_the_machine_answer() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let _proxy = sb.tproxy("company").uid(0).port(7890).start();
        let host = sb.host_behind("lan0");
        let app = host.app();
        let hostile = sb.user(OTHER).cgroup(FREE).app();
        let _root = divert(sb);
        for to in destinations(sb, ANSWERED) {
            let peer = app.open_udp(to);
            let refused = hostile.claim(Udp, to, peer.local());
            assert!(refused.is_err(), "{to}");
            assert_eq!(peer.ask(), proxied("company", to));
            sb.assert_nothing_left_for(to.ip());
        }
        // What the machine has on that link alone, it does have.
        let link = link_local(sb, "lan0");
        for group in ["ff02::1", "ff02::fb"] {
            let to = SocketAddrV6::new(group.parse().expect("a group"), PORT, 0, link.scope_id());
            assert_eq!(hostile.claim(Udp, link.into(), to.into()), Ok(()));
        }
        let [_, of_host] = host.addresses();
        let to = SocketAddr::new(of_host, PORT);
        assert_eq!(hostile.claim(Udp, link.into(), to), Ok(()));
    });
}

/// A link-local address for an interface, with any port.
fn link_local(sb: &Sandbox, interface: &str) -> SocketAddrV6 {
    const ADDRESS: &str = "fe80::4:4";
    sb.add_address(&format!("{ADDRESS}/64"), interface);
    let listing = sb.run(&["ip", "-j", "link", "show", "dev", interface]);
    let listing: Value = serde_json::from_str(&listing).expect("ip prints JSON");
    let index = listing[0]["ifindex"].as_u64().expect("it has a number");
    let index = index.try_into().expect("a small number");
    SocketAddrV6::new(ADDRESS.parse().expect("an address"), 0, 0, index)
}

/// Bound to an interface, it gets past what is local on another one.
#[test]
fn whoever_speaks_as_a_stranger_by_another_interface_makes_nobody_answer() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let bed = bed(sb);
        let pair =
            "ip link add other type veth peer name end; ip link set other up; ip link set end up";
        sb.run(&["sh", "-ec", pair]);
        sb.add_address("2001:db8:9::1/64", "other");
        sb.ip6("route add default dev other metric 4000");
        bed.hostile.device("other");
        let [_, to] = destinations(sb, ANSWERED);
        let peer = bed.proxied.open_udp(to);
        assert_eq!(bed.hostile.claim(Udp, to, peer.local()), Err(Errno::EPERM));
        assert_eq!(peer.ask(), proxied("mihomo", to));
        sb.assert_nothing_left_for(to.ip());
        // With an address of the interface's, anybody may.
        let from = "[2001:db8:9::1]:4040".parse().expect("an address");
        assert_eq!(bed.hostile.claim(Udp, from, peer.local()), Ok(()));
    });
}

/// With a verdict for each datagram, what an application sends does not go where somebody else's conversation between the
/// same ports goes.
#[test]
fn a_conversation_of_datagrams_is_nobody_elses() {
    sandbox(|sb| {
        let _helper = sb.helper().config("udp-verdicts: per-datagram").start();
        let mut bed = bed(sb);
        let mut from = PORT;
        // While something is dropped, and while nothing is.
        for target in ["dropAll", "direct"] {
            bed.session.assign(json!([verdict(DROPPED, target)]));
            // Where somebody answers, and where nobody does.
            for (port, app) in [ANSWERED, UNANSWERED]
                .into_iter()
                .flat_map(|port| [&bed.proxied, &bed.redirected, &bed.free].map(|app| (port, app)))
            {
                for to in destinations(sb, port) {
                    from += 1;
                    sb.use_one_port(from);
                    bed.hostile.udp(to);
                    let before = sb.deliveries(to.ip());
                    let outcome = app.udp(to);
                    let has_left = sb.deliveries(to.ip()) != before;
                    let meant = match app.pid() {
                        pid if pid == bed.proxied.pid() => proxied("mihomo", to),
                        pid if pid == bed.redirected.pid() => Outcome::Forbidden,
                        _ if port == ANSWERED => direct(to),
                        // By the internet.
                        _ => Outcome::Refused,
                    };
                    assert_eq!(outcome, meant, "{target}, {to}");
                    assert_eq!(has_left, app.pid() == bed.free.pid(), "{target}, {to}");
                }
            }
        }
    });
}

/// So what is open already goes to the proxy from the next datagram on. What went there goes on as it began.
#[test]
fn an_open_conversation_of_datagrams_follows_the_verdict_to_a_proxy() {
    sandbox(|sb| {
        let _helper = sb.helper().config("udp-verdicts: per-datagram").start();
        let mut bed = bed(sb);
        // While something is dropped, and while nothing is.
        let targets = ["dropAll", "direct"].into_iter();
        let each = targets.flat_map(|target| destinations(sb, ANSWERED).map(|to| (target, to)));
        for (target, to) in each {
            bed.session
                .assign(json!([verdict(DROPPED, target), verdict(FREE, "direct")]));
            let [first, second] = [(); 2].map(|()| bed.free.open_udp(to));
            for conversation in [&first, &second] {
                assert_eq!(conversation.ask(), direct(to));
            }
            bed.session.assign(json!([to_proxy(FREE, "mihomo")]));
            assert_eq!(first.ask(), proxied("mihomo", to));
            // The kernel translates only what begins.
            bed.session.assign(json!([to_proxy(FREE, "redir")]));
            let before = sb.deliveries(to.ip());
            assert_eq!(second.ask(), Outcome::Forbidden);
            assert_eq!(sb.deliveries(to.ip()), before);
            assert_eq!(first.ask(), proxied("mihomo", to));
            bed.session.assign(json!([verdict(FREE, "direct")]));
            assert_eq!(first.ask(), proxied("mihomo", to));
        }
    });
}

/// Nor does it go where another user has had a conversation between the same ports go, which the kernel may translate.
#[test]
fn where_a_conversation_of_datagrams_goes_is_for_nobody_else_to_choose() {
    sandbox(|sb| {
        let _helper = sb.helper().config("udp-verdicts: per-datagram").start();
        let mut bed = bed(sb);
        let user = sb.user(OTHER);
        let [diverted, translated] = ["a", "b"].map(|name| {
            let path = format!("app.slice/app-{name}.scope");
            (user.cgroup(&path).app(), path)
        });
        let servers = user.cgroup("app.slice/servers.service");
        let service = |name| sb.service(name).uid(OTHER).cgroup(&servers);
        let tproxy = sb.tproxy("theirs").uid(OTHER).cgroup(&servers).port(7893);
        let _servers = [tproxy.start(), service("evil").port(7894).start()];
        let mut session = Session::of(&user);
        session.replace(
            json!([
                { "name": "theirs", "port": 7893 },
                { "name": "evil", "port": 7894, "redirect": true },
            ]),
            json!([]),
            json!([
                to_proxy(&diverted.1, "theirs"),
                to_proxy(&translated.1, "evil")
            ]),
        );
        let mut from = PORT;
        // While something is dropped, and while nothing is.
        for target in ["dropAll", "direct"] {
            bed.session.assign(json!([verdict(DROPPED, target)]));
            for hostile in [&diverted.0, &translated.0] {
                for to in destinations(sb, ANSWERED) {
                    from += 1;
                    sb.use_one_port(from);
                    assert!(!matches!(hostile.udp(to), Outcome::Direct { .. }));
                    assert_eq!(bed.proxied.udp(to), Outcome::Forbidden, "{target}, {to}");
                    sb.assert_nothing_left_for(to.ip());
                }
            }
        }
    });
}

/// What an application begins is not what somebody else has begun between the same ports, and given up.
#[test]
fn a_connection_that_somebody_else_has_given_up_is_not_an_open_one() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let mut bed = bed(sb);
        let mut from = PORT;
        // While something is dropped, and while nothing is.
        for target in ["dropAll", "direct"] {
            bed.session.assign(json!([verdict(DROPPED, target)]));
            for (app, expected) in [
                (&bed.proxied, Some("mihomo")),
                (&bed.redirected, None),
                (&bed.free, Some("")),
            ] {
                for to in destinations(sb, ANSWERED) {
                    deafen(sb, to);
                    // Those before are remembered for a while.
                    from += 1;
                    sb.use_one_port(from);
                    let own = SocketAddr::new(own_address(to).ip(), from);
                    bed.hostile.begin_in_vain(own, to);
                    let before = sb.deliveries(to.ip());
                    let outcome = app.tcp(to);
                    let has_left = sb.deliveries(to.ip()) != before;
                    sb.nft("delete table netdev deaf");
                    let meant = match expected {
                        Some("") => Outcome::LeftUnanswered,
                        Some(proxy) => proxied(proxy, to),
                        None => Outcome::Refused,
                    };
                    assert_eq!(outcome, meant, "{target}");
                    assert_eq!(has_left, expected == Some(""), "{target}, {to}");
                }
            }
        }
    });
}

/// Nor if there were answers: the delivery guard looks at new connections, and would let this one in.
#[test]
fn a_connection_that_somebody_else_has_left_open_is_not_an_open_one() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let bed = bed(sb);
        // The kernel soon gives up a connection that nobody has any more, and remembers it for longer.
        sb.run(&["sh", "-ec", "echo 1 >/proc/sys/net/ipv4/tcp_orphan_retries"]);
        let mut from = PORT;
        for app in [&bed.proxied, &bed.redirected] {
            for to in destinations(sb, ANSWERED) {
                from += 1;
                sb.use_one_port(from);
                let connection = bed.hostile.open_tcp(to).expect("it opens");
                assert_eq!(connection.ask(), direct(to));
                deafen(sb, to);
                drop(connection);
                wait_until("the port is free", || {
                    let filter = format!("sport = :{from}");
                    sb.run(&["ss", "-Htan", &filter]).is_empty()
                });
                let before = sb.deliveries(to.ip());
                assert_eq!(app.tcp(to), Outcome::Refused, "{to}");
                assert_eq!(sb.deliveries(to.ip()), before);
                sb.nft("delete table netdev deaf");
            }
        }
    });
}

/// The same of what is forwarded: where somebody in another network has pretended to be the host, and has given up a
/// connection or left it open, and where somebody elsewhere has begun one with the host.
#[test]
fn a_forwarded_connection_is_not_one_that_somebody_else_has_begun() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let _proxy = sb.tproxy("company").uid(0).port(7890).start();
        let [host, other] = ["lan0", "lan1"].map(|interface| sb.host_behind(interface));
        let _root = divert(sb);
        let (app, hostile) = (host.app(), other.app());
        let own = |to: SocketAddr| {
            let address = host.addresses()[usize::from(to.is_ipv6())];
            SocketAddr::new(address, PORT)
        };
        host.use_one_port(PORT);
        for to in destinations(sb, ANSWERED) {
            other.pretend_to_be(own(to));
            deafen(sb, to);
            hostile.begin_in_vain(own(to), to);
            let before = sb.deliveries(to.ip());
            assert_eq!(app.tcp(to), proxied("company", to));
            assert_eq!(sb.deliveries(to.ip()), before);
            sb.nft("delete table netdev deaf");
        }
        // Somebody in between has the answers led there.
        for to in destinations(sb, ANSWERED) {
            let gateway = other.addresses()[usize::from(to.is_ipv6())];
            let route = format!("{} via {gateway} dev lan1", own(to).ip());
            sb.run(&["sh", "-ec", &format!("ip route add {route}")]);
            let open = hostile.open_tcp(to).expect("it opens");
            assert_eq!(open.ask(), host.direct(to));
            sb.run(&["sh", "-ec", &format!("ip route del {route}")]);
            let before = sb.deliveries(to.ip());
            assert_eq!(app.tcp(to), Outcome::Refused, "{to}");
            assert_eq!(sb.deliveries(to.ip()), before);
        }
        // The host's answer would end it.
        sb.nft(
            "add table inet quiet
             add chain inet quiet in { type filter hook prerouting priority raw; }
             add rule inet quiet in iifname lan0 tcp flags rst drop",
        );
        let outside = sb.internet_app();
        for to in destinations(sb, UNANSWERED) {
            assert_eq!(outside.claim(Tcp, to, own(to)), Ok(()));
            sb.settle();
            assert!(app.tcp(to).is_dropped(), "{to}");
            sb.assert_nothing_left_for(to.ip());
        }
    });
}

/// Has nobody hear what comes from there, as if what is sent there had died on the way.
fn deafen(sb: &Sandbox, to: SocketAddr) {
    let family = if to.is_ipv4() { "ip" } else { "ip6" };
    sb.nft(&format!(
        "add table netdev deaf
         add chain netdev deaf in {{ type filter hook ingress device {UPLINK} priority 0; }}
         add rule netdev deaf in {family} saddr {} drop",
        to.ip(),
    ));
}

/// The same from elsewhere: a beginning of TCP that nobody has answered, since a packet filter or an odd option has
/// seen to that. The application's own beginning counts as an answer to it.
#[test]
fn a_connection_that_somebody_else_has_begun_does_not_leave() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let mut bed = bed(sb);
        let outside = sb.internet_app();
        sb.nft(
            "add table inet quiet
             add chain inet quiet out { type filter hook output priority raw; }
             add rule inet quiet out tcp flags rst drop",
        );
        sb.use_one_port(PORT);
        let all = [&bed.proxied, &bed.redirected, &bed.dropped];
        // While something is dropped, and while nothing is.
        for (target, apps) in [("dropAll", &all[..]), ("direct", &all[..2])] {
            bed.session.assign(json!([verdict(DROPPED, target)]));
            let apps = apps.iter();
            let each = apps.flat_map(|app| destinations(sb, UNANSWERED).map(|to| (app, to)));
            for (app, to) in each {
                assert_eq!(outside.claim(Tcp, to, own_address(to)), Ok(()));
                sb.settle();
                let outcome = app.tcp(to);
                assert!(
                    outcome.is_dropped() || outcome == Outcome::Refused,
                    "{to}: {outcome:?}"
                );
                sb.assert_nothing_left_for(to.ip());
            }
        }
    });
}

/// Nor is a server that somebody else has at the same port by now the one that the connection was made to.
#[test]
fn a_connection_that_a_server_has_broken_off_leads_to_no_other_users_server() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let [mine, other] = [MINE, OTHER].map(|uid| sb.user(uid));
        let app = other.cgroup(FREE).app();
        let servers = |user: &User| user.cgroup("app.slice/servers.service");
        let mut session = Session::of(&other);
        let mut from = PORT;
        for redirect in [false, true] {
            let proxy = json!([{ "name": "own", "port": 7893, "redirect": redirect }]);
            session.replace(proxy, json!([]), json!([to_proxy(FREE, "own")]));
            let start = |user: &User| {
                let server = match redirect {
                    false => sb.tproxy("server"),
                    true => sb.service("server"),
                };
                let server = server.uid(user.uid()).cgroup(&servers(user));
                server.port(7893).start()
            };
            for to in destinations(sb, ANSWERED) {
                from += 1;
                sb.use_one_port(from);
                let own = start(&other);
                let connection = app.open_tcp(to).expect("it opens");
                let at_home = |ip: IpAddr| local("server", SocketAddr::new(ip, 7893));
                let meant = match (redirect, to) {
                    (false, _) => proxied("server", to),
                    (true, SocketAddr::V4(_)) => at_home(Ipv4Addr::LOCALHOST.into()),
                    (true, SocketAddr::V6(_)) => at_home(Ipv6Addr::LOCALHOST.into()),
                };
                assert_eq!(connection.ask(), meant);
                // A server that ends without having read everything resets the connection.
                let pid = Pid::from_raw(own.pid().cast_signed());
                kill(pid, Signal::SIGSTOP).expect("it is running");
                connection.say("{}");
                wait_until("it has something to read", || {
                    let filter = format!("dport = :{from}");
                    let shown = sb.run(&["ss", "-Htn", "state", "established", &filter]);
                    shown
                        .split_ascii_whitespace()
                        .next()
                        .is_some_and(|queue| queue != "0")
                });
                kill(pid, Signal::SIGKILL).expect("it is there");
                drop(own);
                assert!(connection.ends_by_reset());
                drop(connection);
                wait_until("the port is free", || {
                    let filter = format!("sport = :{from}");
                    sb.run(&["ss", "-Htan", &filter]).is_empty()
                });
                let others = start(&mine);
                assert_eq!(app.tcp(to), Outcome::Refused, "{redirect}, {to}");
                others.assert_idle();
            }
        }
    });
}
