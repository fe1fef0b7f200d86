//! The relay: a proxy of one's own, without a privileged server.

#![allow(clippy::expect_used, reason = "a panic is a failed test")]

use std::net::{IpAddr, SocketAddr};

use cgtproxy_tests::sandbox::{
    App, INTERNET_V4, INTERNET_V6, Outcome, Program, Sandbox, Service, User, direct, sandbox,
};
use cgtproxy_tests::wait::wait_until;

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
    relay: Service,
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
        relay,
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
            let outcome = Outcome::in_the_end(|| bed.app.tcp(to));
            assert!(came_from_the_internet(&outcome, to), "{outcome:?}");
            assert_eq!(other.tcp(to), direct(to));
        }
    });
}

/// A SOCKS5 server with UDP, which asks the internet from `INTERNET_V4` and `INTERNET_V6`.
fn dante(sb: &Sandbox) -> Program {
    let config = "logoutput: stderr\n\
        internal: 192.0.2.2 port = 1080\n\
        external: 192.0.2.2\n\
        external: 2001:db8::2\n\
        external.rotation: same-same\n\
        clientmethod: none\nsocksmethod: none\n\
        user.privileged: root\nuser.unprivileged: root\n\
        client pass { from: 0/0 to: 0/0 }\n\
        socks pass { from: 0/0 to: 0/0 protocol: tcp udp }\n\
        socks pass { from: 0/0 to: ::/0 protocol: tcp udp }\n";
    std::fs::write("/run/danted.conf", config).expect("/run is ours");
    let at = SocketAddr::new(INTERNET_V4, 1080);
    sb.internet_program(&["danted", "-f", "/run/danted.conf"])
        .listening(at)
}

#[test]
fn udp_goes_through_a_socks_server() {
    sandbox(|sb| {
        let _server = dante(sb);
        let bed = bed(sb, "upstream: 'socks5://192.0.2.2:1080'");
        let [to, _] = sb.destinations();
        let outcome = Outcome::in_the_end(|| bed.app.tcp(to));
        assert!(came_from_the_internet(&outcome, to), "{outcome:?}");
        let flow = bed.app.open_udp(to);
        for _ in 0..3 {
            let outcome = Outcome::in_the_end(|| flow.ask());
            assert!(came_from_the_internet(&outcome, to), "{outcome:?}");
        }
    });
}

#[test]
fn nothing_goes_direct_without_an_upstream_or_a_relay() {
    sandbox(|sb| {
        let mut server = microsocks(sb);
        let mut bed = bed(sb, "upstream: 'socks5h://192.0.2.2:1080'");
        let [to, _] = sb.destinations();
        let outcome = Outcome::in_the_end(|| bed.app.tcp(to));
        assert!(came_from_the_internet(&outcome, to), "{outcome:?}");
        server.kill();
        for to in sb.destinations() {
            assert_eq!(Outcome::in_the_end(|| bed.app.tcp(to)), Outcome::Closed);
            sb.assert_nothing_left_for(to.ip());
        }
        let status = bed.user.run("cgtproxy-agent", &["status"]);
        let status = String::from_utf8_lossy(&status.stdout).into_owned();
        assert!(status.contains("Connection refused"), "{status}");
        assert!(doctor(&bed.user).contains("[upstream-down]"));
        let _server = microsocks(sb);
        let [to, _] = sb.destinations();
        let outcome = Outcome::in_the_end(|| bed.app.tcp(to));
        assert!(came_from_the_internet(&outcome, to), "{outcome:?}");
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
        let doctor = doctor(&bed.user);
        assert!(!doctor.contains("[upstream-down]"), "{doctor}");
        assert!(!doctor.contains("[relay-missing]"), "{doctor}");
    });
}

/// What doctor prints for a user.
fn doctor(user: &User) -> String {
    let output = user.run("cgtproxy-agent", &["doctor"]);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_socks_server_wants_the_right_password() {
    sandbox(|sb| {
        let at = SocketAddr::new(INTERNET_V4, 1080);
        let argv = [
            "microsocks",
            "-i",
            "0.0.0.0",
            "-p",
            "1080",
            "-u",
            "me",
            "-P",
            "p@ss",
        ];
        let _server = sb.internet_program(&argv).listening(at);
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
        let config =
            "Port 3128\nListen 192.0.2.2\nTimeout 60\nMaxClients 50\nBasicAuth me secret\n";
        std::fs::write("/run/tinyproxy.conf", config).expect("/run is ours");
        let at = SocketAddr::new(INTERNET_V4, 3128);
        let _server = sb
            .internet_program(&["tinyproxy", "-d", "-c", "/run/tinyproxy.conf"])
            .listening(at);
        passwords(
            sb,
            "http://me:secret@192.0.2.2:3128",
            "http://me:no@192.0.2.2:3128",
        );
    });
}

/// With the right password an upstream carries connections on; with another nothing leaves, and doctor says why.
fn passwords(sb: &Sandbox, right: &str, wrong: &str) {
    let bed = bed(sb, &format!("upstream: '{right}'"));
    for to in sb.destinations() {
        let outcome = Outcome::in_the_end(|| bed.app.tcp(to));
        assert!(came_from_the_internet(&outcome, to), "{outcome:?}");
    }
    let config = format!(
        "version: 1\nproxies:\n  own: {{upstream: '{wrong}'}}\nrules:\n  - {{match: /app-a, proxy: own}}\n"
    );
    bed._agent.write_config(&config);
    wait_until("the wrong password to be in use", || {
        let [to, _] = sb.destinations();
        bed.app.tcp(to) == Outcome::Closed
    });
    for to in sb.destinations() {
        assert_eq!(Outcome::in_the_end(|| bed.app.tcp(to)), Outcome::Closed);
        sb.assert_nothing_left_for(to.ip());
    }
    let doctor = doctor(&bed.user);
    assert!(
        doctor.contains("it refuses this user and password"),
        "{doctor}"
    );
}

#[test]
fn an_http_proxy_carries_tcp_and_refuses_udp() {
    sandbox(|sb| {
        let config = "Port 3128\nListen 192.0.2.2\nTimeout 60\nMaxClients 50\n";
        std::fs::write("/run/tinyproxy.conf", config).expect("/run is ours");
        let at = SocketAddr::new(INTERNET_V4, 3128);
        let _server = sb
            .internet_program(&["tinyproxy", "-d", "-c", "/run/tinyproxy.conf"])
            .listening(at);
        let bed = bed(sb, "upstream: 'http://192.0.2.2:3128'");
        for to in sb.destinations() {
            let outcome = Outcome::in_the_end(|| bed.app.tcp(to));
            assert!(came_from_the_internet(&outcome, to), "{outcome:?}");
            assert_eq!(bed.app.udp(to), Outcome::Forbidden);
            sb.assert_nothing_left_for(to.ip());
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
        let _server = microsocks(sb);
        let bed = bed(sb, "upstream: 'socks5h://192.0.2.2:1080'");
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
            let outcome = Outcome::in_the_end(|| bed.app.tcp(fake));
            assert_eq!(outcome, Outcome::Redirected { to });
        }
        sb.assert_nothing_left_for(server);
    });
}

#[test]
fn there_are_no_more_connections_than_allowed() {
    sandbox(|sb| {
        let _server = microsocks(sb);
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let _relay = user.relay().argument("--connections").argument("3").start();
        let app = user.cgroup(APP).app();
        let config = "version: 1\nproxies: {own: {upstream: 'socks5://192.0.2.2:1080'}}\n\
             rules: [{match: /app-a, proxy: own}]\n";
        let _agent = user.agent(config).start();
        let [to, _] = sb.destinations();
        let mut open: Vec<_> = (0..3)
            .map(|_| app.open_tcp(to).expect("it connects"))
            .collect();
        for connection in &open {
            let outcome = Outcome::in_the_end(|| connection.ask());
            assert!(came_from_the_internet(&outcome, to), "{outcome:?}");
        }
        assert_eq!(Outcome::in_the_end(|| app.tcp(to)), Outcome::Closed);
        // One that ends makes room for another.
        open.pop();
        wait_until("room for another connection", || {
            came_from_the_internet(&app.tcp(to), to)
        });
    });
}
