//! Connections whose ends come one after the other: who has ended what it says still hears the other side out.

#![allow(clippy::expect_used, reason = "a panic is a failed test")]

use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::Duration;

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
