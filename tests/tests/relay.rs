//! The relay: a proxy of one's own, without a privileged server.

#![allow(clippy::expect_used, reason = "a panic is a failed test")]

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use cgtproxy_tests::proxies::{dante, microsocks, tinyproxy};
use cgtproxy_tests::relayed::{Relayed, assert_from_the_internet, came_from_the_internet, config};
use cgtproxy_tests::sandbox::{INTERNET_V4, INTERNET_V6, Outcome, Sandbox, direct, sandbox};
use cgtproxy_tests::wait::wait_until;

#[test]
fn tcp_goes_through_a_socks_server() {
    sandbox(|sb| {
        let _server = microsocks(sb, &[]);
        let _helper = sb.helper().start();
        let bed = Relayed::through(sb, "socks5://192.0.2.2:1080");
        let other = bed.user.cgroup("app.slice/app-b.scope").app();
        for to in sb.destinations() {
            assert_from_the_internet(&bed.tcp(to), to);
            assert_eq!(other.tcp(to), direct(to));
        }
    });
}

#[test]
fn udp_goes_through_a_socks_server() {
    sandbox(|sb| {
        let _server = dante(sb, INTERNET_V4);
        let _helper = sb.helper().start();
        let bed = Relayed::through(sb, "socks5://192.0.2.2:1080");
        let [to, _] = sb.destinations();
        assert_from_the_internet(&bed.tcp(to), to);
        let flow = bed.app.open_udp(to);
        for _ in 0..3 {
            assert_from_the_internet(&Outcome::in_the_end(|| flow.ask()), to);
        }
    });
}

/// Of the whole network: three seconds for the relay.
fn short_flows(sb: &Sandbox) {
    let short = "echo 5 > /proc/sys/net/netfilter/nf_conntrack_udp_timeout";
    sb.run(&["sh", "-ec", short]);
}

/// How many flows of UDP the relay has, by what the agent says.
fn flows_of(bed: &Relayed) -> Option<u64> {
    bed.upstream().get("flows")?.as_u64()
}

#[test]
fn a_flow_that_failed_begins_anew_while_the_application_goes_on() {
    sandbox(|sb| {
        short_flows(sb);
        let _helper = sb.helper().start();
        let bed = Relayed::through(sb, "socks5://192.0.2.2:1080");
        let [to, _] = sb.destinations();
        let socket = bed.app.open_udp(to);
        wait_until("the proxy to be known as down", || {
            assert!(!came_from_the_internet(&socket.ask(), to));
            bed.agent("status").contains("Connection refused")
        });
        let _server = dante(sb, INTERNET_V4);
        assert_from_the_internet(&Outcome::in_the_end(|| socket.ask()), to);
    });
}

/// An application with one socket, such as a tunnel's, begins no other flow.
#[test]
fn an_open_flow_goes_on_soon_after_its_proxy_was_away() {
    sandbox(|sb| {
        let at = SocketAddr::new(INTERNET_V4, 1080);
        let mut server = sb.socks_server(at);
        let _helper = sb.helper().start();
        let bed = Relayed::through(sb, "socks5://192.0.2.2:1080");
        let [to, _] = sb.destinations();
        let socket = bed.app.open_udp(to);
        assert_from_the_internet(&Outcome::in_the_end(|| socket.ask()), to);
        server.kill();
        wait_until("the proxy to be known as down", || {
            assert!(!came_from_the_internet(&socket.ask(), to));
            bed.agent("status").contains("Connection refused")
        });
        let _server = sb.socks_server(at);
        let began = Instant::now();
        assert_from_the_internet(&Outcome::in_the_end(|| socket.ask()), to);
        // The kernel's, for a flow without answers.
        assert!(began.elapsed() < Duration::from_secs(30 / 2));
    });
}

#[test]
fn a_flow_is_forgotten_before_the_kernel_forgets_it() {
    sandbox(|sb| {
        short_flows(sb);
        let _server = dante(sb, INTERNET_V4);
        let _helper = sb.helper().start();
        let bed = Relayed::through(sb, "socks5://192.0.2.2:1080");
        let [to, _] = sb.destinations();
        let socket = bed.app.open_udp(to);
        // The same socket begins another one afterwards.
        for _ in 0..2 {
            assert_from_the_internet(&Outcome::in_the_end(|| socket.ask()), to);
            assert_eq!(flows_of(&bed), Some(1));
            wait_until("the flow to be over", || flows_of(&bed) == Some(0));
        }
    });
}

#[test]
fn nothing_goes_direct_without_an_upstream_or_a_relay() {
    sandbox(|sb| {
        let mut server = microsocks(sb, &[]);
        let _helper = sb.helper().start();
        let mut bed = Relayed::through(sb, "socks5h://192.0.2.2:1080");
        let [to, _] = sb.destinations();
        assert_from_the_internet(&bed.tcp(to), to);
        server.kill();
        for to in sb.destinations() {
            assert_eq!(bed.tcp(to), Outcome::Closed);
            sb.assert_nothing_left_for(to.ip());
        }
        let status = bed.agent("status");
        assert!(status.contains("Connection refused"), "{status}");
        assert!(bed.agent("doctor").contains("[upstream-down]"));
        let _server = microsocks(sb, &[]);
        let [to, _] = sb.destinations();
        assert_from_the_internet(&bed.tcp(to), to);
        bed.relay.kill();
        for to in sb.destinations() {
            assert_eq!(bed.app.tcp(to), Outcome::Refused);
            sb.assert_nothing_left_for(to.ip());
        }
        bed.relay.start_again();
        wait_until("the relay to be found again", || {
            let [to, _] = sb.destinations();
            came_from_the_internet(&bed.app.tcp(to), to)
        });
        let doctor = bed.agent("doctor");
        assert!(!doctor.contains("[upstream-down]"), "{doctor}");
        assert!(!doctor.contains("[relay-missing]"), "{doctor}");
    });
}

#[test]
fn a_reload_leads_what_begins_then_to_another_proxy() {
    sandbox(|sb| {
        let mut server = sb.socks_server(SocketAddr::new(INTERNET_V4, 1080));
        let _helper = sb.helper().start();
        let bed = Relayed::through(sb, "socks5h://192.0.2.2:1080");
        let [to, _] = sb.destinations();
        assert_from_the_internet(&bed.tcp(to), to);
        // At another address, at another port, and another one there that knows names as well.
        for (scheme, port) in [("socks5h", 1080), ("socks5h", 1081), ("http", 1081)] {
            server.kill();
            let at = SocketAddr::new(INTERNET_V6, port);
            server = match scheme {
                "http" => sb.http_proxy(at),
                _ => sb.socks_server(at),
            };
            let upstream = format!("{scheme}://{at}");
            bed.agent
                .write_config(&config(&format!("upstream: '{upstream}'")));
            wait_until(&upstream, || came_from_the_internet(&bed.app.tcp(to), to));
        }
    });
}

#[test]
fn a_socks_server_wants_the_right_password() {
    sandbox(|sb| {
        let _server = microsocks(sb, &["-u", "me", "-P", "p@ss"]);
        passwords(
            sb,
            "socks5://me:p%40ss@192.0.2.2:1080",
            "socks5://me:no@192.0.2.2:1080",
        );
    });
}

#[test]
fn an_http_proxy_wants_the_right_password() {
    sandbox(|sb| {
        let _server = tinyproxy(sb, "BasicAuth me secret");
        passwords(
            sb,
            "http://me:secret@192.0.2.2:3128",
            "http://me:no@192.0.2.2:3128",
        );
    });
}

/// With the right password an upstream carries connections on; with another nothing leaves, and doctor says why.
fn passwords(sb: &Sandbox, right: &str, wrong: &str) {
    let _helper = sb.helper().start();
    let bed = Relayed::through(sb, right);
    for to in sb.destinations() {
        assert_from_the_internet(&bed.tcp(to), to);
    }
    bed.agent
        .write_config(&config(&format!("upstream: '{wrong}'")));
    wait_until("the wrong password to be in use", || {
        let [to, _] = sb.destinations();
        bed.app.tcp(to) == Outcome::Closed
    });
    for to in sb.destinations() {
        assert_eq!(bed.tcp(to), Outcome::Closed);
        sb.assert_nothing_left_for(to.ip());
    }
    let doctor = bed.agent("doctor");
    assert!(
        doctor.contains("it refuses this user and password"),
        "{doctor}"
    );
}

#[test]
fn an_http_proxy_carries_tcp_and_refuses_udp_or_leaves_it_alone() {
    sandbox(|sb| {
        let _server = tinyproxy(sb, "");
        let _helper = sb.helper().start();
        let bed = Relayed::through(sb, "http://192.0.2.2:3128");
        for to in sb.destinations() {
            assert_from_the_internet(&bed.tcp(to), to);
            assert_eq!(bed.app.udp(to), Outcome::Forbidden);
            sb.assert_nothing_left_for(to.ip());
        }
        // If it is to be left alone, it goes direct, and TCP goes on as before.
        bed.agent
            .write_config(&config("upstream: 'http://192.0.2.2:3128', no-udp: true"));
        let [to, _] = sb.destinations();
        wait_until("UDP to go direct", || bed.app.udp(to) == direct(to));
        for to in sb.destinations() {
            assert_eq!(bed.app.udp(to), direct(to));
            assert_from_the_internet(&bed.tcp(to), to);
        }
    });
}

#[test]
fn names_are_left_to_the_proxy() {
    sandbox(|sb| {
        // Only who is out there knows the name.
        let [to, _] = sb.destinations();
        let hosts = format!("{} secret.example\n", to.ip());
        std::fs::write("/run/hosts", hosts).expect("/run is ours");
        sb.run(&["mount", "--bind", "/run/hosts", "/etc/hosts"]);
        let _server = microsocks(sb, &[]);
        let _helper = sb.helper().start();
        let bed = Relayed::through(sb, "socks5h://192.0.2.2:1080");
        let cgroup = bed.user.cgroup("app.slice/app-a.scope/dig");
        let server = sb.fresh_v4();
        for transport in ["+notcp", "+tcp"] {
            let server = format!("@{server}");
            let argv = [
                "dig",
                "+short",
                "+tries=1",
                transport,
                &server,
                "secret.example",
            ];
            let answer = bed.user.output(&cgroup, &argv);
            let address: IpAddr = answer.trim().parse().expect("an address");
            assert!(address.to_string().starts_with("198.1"), "{answer}");
            let fake = SocketAddr::new(address, to.port());
            let outcome = bed.tcp(fake);
            assert_eq!(outcome, Outcome::Redirected { to });
        }
        sb.assert_nothing_left_for(server);
    });
}

#[test]
fn there_are_no_more_connections_than_allowed() {
    sandbox(|sb| {
        let _server = sb.socks_server(SocketAddr::new(INTERNET_V4, 1080));
        let _helper = sb.helper().start();
        let bed = Relayed::builder(sb)
            .connections(3)
            .start(&config("upstream: 'socks5://192.0.2.2:1080'"));
        let [to, _] = sb.destinations();
        let mut open: Vec<_> = (0..3)
            .map(|_| bed.app.open_tcp(to).expect("it connects"))
            .collect();
        for connection in &open {
            let outcome = Outcome::in_the_end(|| connection.ask());
            assert!(came_from_the_internet(&outcome, to), "{outcome:?}");
        }
        assert_eq!(Outcome::in_the_end(|| bed.app.tcp(to)), Outcome::Closed);
        // One that ends makes room for another.
        open.pop();
        wait_until("room for another connection", || {
            came_from_the_internet(&bed.app.tcp(to), to)
        });
        // Nor flows of UDP. The relay has had the datagram of the last one when it answers one of the others.
        let flows: Vec<_> = (0..3).map(|_| bed.app.open_udp(to)).collect();
        for flow in &flows {
            assert_from_the_internet(&Outcome::in_the_end(|| flow.ask()), to);
        }
        assert_eq!(bed.app.udp(to), Outcome::Silent);
        assert_from_the_internet(&Outcome::in_the_end(|| flows[0].ask()), to);
        assert_eq!(flows_of(&bed), Some(3));
    });
}
