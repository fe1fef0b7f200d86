//! Connections whose ends come one after the other: who has ended what it says still hears the other side out.

#![allow(clippy::expect_used, reason = "a panic is a failed test")]

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::thread;
use std::time::Duration;

use cgtproxy_tests::relayed::{Relayed, config};
use cgtproxy_tests::sandbox::{INTERNET_V4, INTERNET_V6, Program, Sandbox, sandbox};
use cgtproxy_tests::wait::wait_until;
use cgtproxy_tests::wire::{Afterwards, Speech};

/// Through proxies at each of the internet's addresses, to destinations of both families.
fn through(scheme: &str, start: impl Fn(&Sandbox, SocketAddr) -> Program) {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let ips: [IpAddr; 2] = [INTERNET_V4, INTERNET_V6];
        for (uid, ip) in (1001..).zip(ips) {
            let at = SocketAddr::new(ip, 1080);
            let _proxy = start(sb, at);
            let options = format!("upstream: '{scheme}://{at}'");
            let relayed = Relayed::builder(sb).uid(uid).start(&config(&options));
            relayed.assert_ends_are_passed_on(sb);
        }
    });
}

#[test]
fn either_side_may_end_first_through_a_socks_server() {
    through("socks5", Sandbox::socks_server);
}

#[test]
fn either_side_may_end_first_through_an_http_proxy() {
    through("http", Sandbox::http_proxy);
}

/// How long the kernel remembers a silent connection of which one side has ended, instead of a minute.
const CLOSE_WAIT: Duration = Duration::from_secs(4);

#[test]
fn who_has_ended_hears_an_answer_however_late() {
    sandbox(|sb| {
        let seconds = CLOSE_WAIT.as_secs();
        let close_wait = "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait";
        std::fs::write(close_wait, seconds.to_string()).expect("the network is ours");
        // Twice: one question in time is not enough.
        let silence = 2 * CLOSE_WAIT + Duration::from_secs(1);
        let _server = sb.late_server(7777, silence);
        let _proxy = sb.socks_server(SocketAddr::new(INTERNET_V4, 1080));
        let _helper = sb.helper().start();
        let bed = Relayed::through(sb, &format!("socks5://{INTERNET_V4}:1080"));
        let apps = [(); 2].map(|()| bed.user.cgroup("app.slice/app-a.scope").app());
        thread::scope(|scope| {
            for (to, app) in sb.destinations().into_iter().zip(&apps) {
                scope.spawn(move || app.bulk(SocketAddr::new(to.ip(), 7777), 1));
            }
        });
    });
}

/// What a SOCKS5 server says that does whatever it is asked for, and the beginning of an answer.
const ANSWER: &[u8] = b"\x05\x00\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00the first half";

/// What it hears: that greeting, the request for an address of IPv4, and a line.
const HEARD: &str = "heard 32 bytes";

/// What is ended here ends in the middle, for either side.
fn broken_off(ended_by: impl Fn(&mut Relayed)) {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let speech = Speech {
            say: ANSWER.to_vec(),
            then: Afterwards::Hear,
        };
        let server = sb.speaker(SocketAddr::new(INTERNET_V4, 1080), &speech);
        let mut bed = Relayed::through(sb, "socks5://192.0.2.2:1080");
        let [to, _] = sb.destinations();
        let connection = bed.app.open_tcp(to).expect("the relay is there");
        connection.say("the first half too");
        let heard = |how: &str| {
            let line = format!("{HEARD}{how}\n");
            wait_until(&line, || server.log().contains(&line));
        };
        heard("");
        ended_by(&mut bed);
        assert!(connection.ends_by_reset());
        heard(" and then: connection reset");
        sb.assert_nothing_left_for(to.ip());
    });
}

#[test]
fn a_relay_that_stops_ends_nothing_in_order() {
    broken_off(|bed| assert!(bed.relay.stop().success()));
}

#[test]
fn a_relay_that_is_killed_ends_nothing_in_order() {
    broken_off(|bed| bed.relay.kill());
}

#[test]
fn a_proxy_that_is_not_configured_any_more_ends_nothing_in_order() {
    broken_off(|bed| {
        let other = config("upstream: 'socks5://192.0.2.2:1081'").replace("own", "other");
        bed.agent.write_config(&other);
    });
}

#[test]
fn a_relay_that_looks_up_a_name_in_vain_stops_at_once() {
    sandbox(|sb| {
        // Longer than a test waits for a program to end.
        let files = "echo 'nameserver 127.0.0.1\noptions timeout:30 attempts:5' > /run/resolv.conf
             echo 'hosts: files dns' > /run/nsswitch.conf
             mount --bind /run/resolv.conf \"$(readlink -f /etc/resolv.conf)\"
             mount --bind /run/nsswitch.conf /etc/nsswitch.conf";
        sb.run(&["sh", "-euc", files]);
        let server = UdpSocket::bind("127.0.0.1:53").expect("the network is ours");
        let _helper = sb.helper().start();
        let mut bed = Relayed::through(sb, "socks5://proxy.example:1080");
        let [to, _] = sb.destinations();
        let _waits = bed.app.open_tcp(to).expect("the relay is there");
        server.recv(&mut [0; 512]).expect("a query");
        assert!(bed.relay.stop().success());
    });
}
