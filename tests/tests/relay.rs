//! The relay: a proxy of one's own, without a privileged server.

#![allow(clippy::expect_used, reason = "a panic is a failed test")]

use std::net::{IpAddr, SocketAddr};

use cgtproxy_tests::sandbox::{
    App, INTERNET_V4, INTERNET_V6, Outcome, Program, Sandbox, Service, User, direct, sandbox,
};

const APP: &str = "app.slice/app-a.scope";

/// A SOCKS5 server out on the internet, which asks it from the inside.
fn microsocks(sb: &Sandbox) -> Program {
    let at = SocketAddr::new(INTERNET_V4, 1080);
    sb.internet_program(&["microsocks", "-i", "0.0.0.0", "-p", "1080"])
        .listening(at)
}

/// Everything of an application's goes through this upstream.
struct Bed {
    _helper: Service,
    _relay: Service,
    _agent: Service,
    user: User,
    app: App,
}

fn bed(sb: &Sandbox, proxy: &str) -> Bed {
    let helper = sb.helper().start();
    let user = sb.user(1001);
    let relay = user.relay().start();
    let app = user.cgroup(APP).app();
    let config = format!(
        "version: 1\nproxies:\n  own: {{{proxy}}}\nrules:\n  - {{match: /app-a, proxy: own}}\n"
    );
    let agent = user.agent(&config).start();
    Bed {
        _helper: helper,
        _relay: relay,
        _agent: agent,
        user,
        app,
    }
}

/// Whether the internet was asked by somebody on the internet.
fn came_from_the_internet(outcome: &Outcome, to: SocketAddr) -> bool {
    let inside: [IpAddr; 3] = [to.ip(), INTERNET_V4, INTERNET_V6];
    matches!(outcome, Outcome::Direct { seen_as } if inside.contains(seen_as))
}

#[test]
fn tcp_goes_through_a_socks_server() {
    sandbox(|sb| {
        let _server = microsocks(sb);
        let bed = bed(sb, "upstream: 'socks5://192.0.2.2:1080'");
        let other = bed.user.cgroup("app.slice/app-b.scope").app();
        for to in sb.destinations() {
            let outcome = bed.app.tcp(to);
            assert!(came_from_the_internet(&outcome, to), "{outcome:?}");
            assert_eq!(other.tcp(to), direct(to));
        }
    });
}
