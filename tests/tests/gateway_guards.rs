//! Rules about forwarded packets that others stand before: what is left for them to catch.

#![allow(clippy::expect_used, reason = "a panic is a failed test")]

use std::net::SocketAddr;

use cgtproxy_tests::sandbox::{
    App, Connection, Host, Outcome, PORTS, Sandbox, Server, proxied, sandbox,
};
use cgtproxy_tests::session::{Session, to_proxy};
use cgtproxy_tests::wire::Transport::{self, Tcp, Udp};
use serde_json::{Value, json};

const TRANSPORTS: [Transport; 2] = [Tcp, Udp];
const SERVICE: &str = "system.slice/web.service";
/// As wg-quick has it for its own packets.
const RESTORE: &str = "table inet wg-quick-wg0 { chain premangle { \
     type filter hook prerouting priority mangle; meta mark set ct mark; }; }";

/// A host on `lan0` with an application, the system's proxy, and root's session, in which what comes in there goes to it.
fn diverted(sb: &Sandbox, bypass: Value) -> (Host, App, Server, Session) {
    let proxy = sb.tproxy("company").uid(0).port(7890).start();
    let host = sb.host_behind("lan0");
    let app = host.app();
    // It has to be there when it is named.
    sb.cgroup(SERVICE);
    let mut root = Session::of(&sb.user(0));
    let policy = json!({
        "proxies": [{ "name": "company", "port": 7890 }],
        "bypass": bypass,
        "assignments": [to_proxy(SERVICE, "company")],
        "gateway": { "interfaces": ["lan0"], "proxy": "company" },
    });
    root.call("ReplacePolicy", policy);
    (host, app, proxy, root)
}

/// Open connections of a host's to two destinations, by TCP and UDP.
fn open(sb: &Sandbox, app: &App) -> Vec<(Transport, SocketAddr, Connection)> {
    let mut open = Vec::new();
    for to in sb.destinations() {
        open.push((Tcp, to, app.open_tcp(to).expect("it opens")));
        open.push((Udp, to, app.open_udp(to)));
    }
    for (_, to, connection) in &open {
        assert_eq!(connection.ask(), proxied("company", *to));
    }
    open
}

/// Another program may have some or all packets not tracked.
#[test]
fn packets_that_are_not_tracked_do_not_leave() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let (_host, app, proxy, _root) = diverted(sb, json!([]));
        sb.nft(
            "table inet raw { chain pre { \
             type filter hook prerouting priority raw; iifname lan0 notrack; }; }",
        );
        for to in sb.destinations() {
            for transport in TRANSPORTS {
                let outcome = app.ask(transport, to);
                let refused = outcome == Outcome::Refused || outcome.is_dropped();
                assert!(refused, "{transport:?} {to} {outcome:?}");
            }
            sb.assert_nothing_left_for(to.ip());
        }
        proxy.assert_idle();
    });
}

/// The divert bit has a packet delivered on this machine, whoever has set it.
#[test]
fn what_another_program_marks_is_received_by_nobody() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let destinations = sb.destinations();
        let (host, app, proxy, _root) = diverted(sb, json!(destinations.map(|to| to.ip())));
        let wrong = sb.service("wrong").port(PORTS[0]).start();
        for to in destinations {
            assert_eq!(app.tcp(to), host.direct(to));
        }
        // After the table's own rules, which leave these destinations out.
        sb.nft(
            "table inet other { chain pre { type filter hook prerouting priority -100; \
             iifname lan0 meta l4proto { tcp, udp } meta mark set 0x8f000000; }; }",
        );
        for to in destinations {
            for transport in TRANSPORTS {
                assert_eq!(app.ask(transport, to), Outcome::Silent, "{transport:?}");
            }
        }
        wrong.assert_idle();
        proxy.assert_idle();
    });
}

/// A mark that another program restores has a packet delivered on this machine, when its proxy is gone too.
#[test]
fn what_is_restored_to_the_mark_of_a_proxy_that_is_gone_is_received_by_nobody() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let (_host, app, proxy, mut root) = diverted(sb, json!([]));
        let connections = open(sb, &app);
        let wrong = sb.service("wrong").port(PORTS[0]).start();
        root.call("RemovePolicy", json!({}));
        sb.nft(RESTORE);
        let arrivals = proxy.arrivals().len();
        for (_, to, connection) in &connections {
            assert_eq!(connection.ask(), Outcome::Silent, "{to}");
            sb.assert_nothing_left_for(to.ip());
        }
        wrong.assert_idle();
        assert_eq!(proxy.arrivals().len(), arrivals);
    });
}

/// An address may come to be the machine's own.
#[test]
fn a_conversation_whose_proxy_is_gone_does_not_go_on_with_the_machine_itself() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let (_host, app, _proxy, mut root) = diverted(sb, json!([]));
        let connections = open(sb, &app);
        root.call("RemovePolicy", json!({}));
        let wrong = sb.service("wrong").port(PORTS[0]).start();
        for (_, to, connection) in &connections {
            let length = if to.is_ipv4() { 32 } else { 128 };
            sb.add_address(&format!("{}/{length}", to.ip()), "lo");
            let outcome = connection.ask();
            let refused = matches!(outcome, Outcome::Refused | Outcome::Closed);
            assert!(refused, "{to}: {outcome:?}");
        }
        wrong.assert_idle();
    });
}

/// A machine that forwards much looks for no sockets before it routes (`ip_early_demux`,
/// Documentation/networking/ip-sysctl.rst).
#[test]
fn a_connection_whose_proxy_is_gone_ends_where_it_would_be_forwarded() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        sb.run(&["sh", "-c", "echo 0 >/proc/sys/net/ipv4/ip_early_demux"]);
        let (_host, app, _proxy, mut root) = diverted(sb, json!([]));
        let connections = open(sb, &app);
        root.call("RemovePolicy", json!({}));
        for (transport, to, connection) in &connections {
            let outcome = connection.ask();
            // Linux sends no ICMP error from an IPv4 address that is not its own.
            let told = *transport == Tcp || to.is_ipv6();
            let refused = matches!(outcome, Outcome::Refused | Outcome::Closed);
            assert!(
                refused || !told && outcome == Outcome::Silent,
                "{to}: {outcome:?}"
            );
            sb.assert_nothing_left_for(to.ip());
        }
    });
}

/// A host may send with any address. What looks like an answer to one of the machine's own applications goes there.
#[test]
fn what_comes_in_as_an_answer_is_not_diverted() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let (host, app, proxy, _root) = diverted(sb, json!([]));
        let service = sb.cgroup(SERVICE).app();
        for to in sb.destinations() {
            let to = SocketAddr::new(to.ip(), 9999);
            let flow = service.open_udp(to);
            assert_eq!(flow.ask(), proxied("company", to));
            let arrivals = proxy.arrivals().len();
            host.pretend_to_be(to);
            assert_eq!(app.udp(flow.local()), Outcome::Silent);
            assert_eq!(proxy.arrivals().len(), arrivals);
            let sockets = format!("sport = :{}", flow.local().port());
            let socket = sb.run(&["ss", "-Hun", "state", "established", &sockets]);
            let unread = socket.split_whitespace().next().expect("it is open");
            assert_ne!(unread, "0", "{to}");
        }
    });
}
