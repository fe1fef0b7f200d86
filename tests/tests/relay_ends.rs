//! Connections whose ends come one after the other: who has ended what it says still hears the other side out.

use std::net::{IpAddr, SocketAddr};

use cgtproxy_tests::relayed::{Relayed, config};
use cgtproxy_tests::sandbox::{INTERNET_V4, INTERNET_V6, Program, Sandbox, sandbox};

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
