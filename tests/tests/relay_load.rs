//! Much of everything through the relay: destinations, connections, bytes.

#![allow(clippy::expect_used, reason = "a panic is a failed test")]

use std::net::{IpAddr, SocketAddr};

use cgtproxy_tests::amount;
use cgtproxy_tests::relayed::Relayed;
use cgtproxy_tests::sandbox::{INTERNET_V4, INTERNET_V6, PORTS, Sandbox, sandbox};
use cgtproxy_tests::wire::Transport::Tcp;

/// How many megabytes go there and back, unless CGTPROXY_TEST_BULK says otherwise.
const MEGABYTES: u64 = 256;

fn bed(sb: &Sandbox, server: IpAddr) -> Relayed {
    let upstream = SocketAddr::new(server, 1080);
    Relayed::through(sb, &format!("socks5://{upstream}"))
}

#[test]
fn two_hundred_destinations_of_one_socket_keep_apart() {
    sandbox(|sb| {
        let _server = sb.socks_server(SocketAddr::new(INTERNET_V4, 1080));
        let _helper = sb.helper().start();
        let bed = bed(sb, INTERNET_V4);
        let at = |ip| SocketAddr::new(ip, PORTS[3]);
        let v4: Vec<_> = (0..200).map(|_| at(sb.fresh_v4())).collect();
        let v6: Vec<_> = (0..200).map(|_| at(sb.fresh_v6())).collect();
        for destinations in [v4, v6] {
            bed.app.ping_pong(destinations, 3);
        }
    });
}

#[test]
fn ten_thousand_short_connections_are_carried_on() {
    sandbox(|sb| {
        let _server = sb.socks_server(SocketAddr::new(INTERNET_V6, 1080));
        let _helper = sb.helper().start();
        let bed = bed(sb, INTERNET_V6);
        let before = bed.relay.open_descriptors();
        let [v4, v6] = sb.destinations();
        std::thread::scope(|scope| {
            for to in [v4, v6, v4, v6] {
                let app = bed.user.cgroup("app.slice/app-a.scope").app();
                scope.spawn(move || {
                    for _ in 0..50 {
                        let tally = app.burst(Tcp, to, 50);
                        assert_eq!((tally.direct, tally.total()), (50, 50), "{tally:?}");
                    }
                });
            }
        });
        // What ended is gone, but for connections that wait for the next one.
        cgtproxy_tests::wait::wait_until("all descriptors to be closed", || {
            bed.relay.open_descriptors() <= before + 4
        });
    });
}

#[test]
fn each_byte_arrives_in_order_and_ends_are_passed_on() {
    let megabytes = amount::given("CGTPROXY_TEST_BULK").unwrap_or(MEGABYTES);
    sandbox(|sb| {
        let _server = sb.socks_server(SocketAddr::new(INTERNET_V4, 1080));
        let _echo = sb.echo_server(7777);
        let _helper = sb.helper().start();
        let bed = bed(sb, INTERNET_V4);
        for to in sb.destinations() {
            bed.app
                .bulk(SocketAddr::new(to.ip(), 7777), megabytes << 19);
        }
    });
}
