//! What the relay takes, and how long: from applications that send much, and from proxies that mean it ill.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a panic is a failed test"
)]

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use cgtproxy_tests::agent::Agent;
use cgtproxy_tests::relayed::{Relayed, assert_from_the_internet, config};
use cgtproxy_tests::sandbox::{App, INTERNET_V4, Outcome, Program, Sandbox, sandbox};
use cgtproxy_tests::wait::wait_until;
use cgtproxy_tests::wire::{Afterwards, Speech};

/// What docs/how-it-works.md says that the relay's memory stays below, in KiB: without connections, and for each.
const BASE: u64 = 16 * 1024;
const CONNECTION: u64 = 40;
/// And for all datagrams that wait for a proxy.
const WAITING: u64 = 8 * 1024;

/// And for names that have addresses.
const NAMES: u64 = 16 * 1024;

/// What a SOCKS5 server says that does whatever it is asked for.
const GRANTED: [u8; 12] = [5, 0, 5, 0, 0, 1, 0, 0, 0, 0, 0, 0];

/// The relay's own limit.
const CONNECTIONS: u32 = 8192;

fn bed(sb: &Sandbox, upstream: &str, connections: u32) -> Relayed {
    let builder = Relayed::builder(sb).connections(connections);
    builder.start(&config(&format!("upstream: '{upstream}'")))
}

/// Another application, for which the kernel has that proxy.
fn other_app(bed: &Relayed, name: &str, proxy: &str) -> App {
    let cgroup = bed.user.cgroup(format!("app.slice/{name}.scope"));
    Agent::of(&bed.user).wait_for_verdict(&cgroup, proxy);
    cgroup.app()
}

fn assert_memory(bed: &Relayed, bound: u64) {
    let peak = bed.relay.peak_memory();
    assert!(peak < bound, "{peak} KiB, and {bound} are allowed");
}

/// A server on the internet at the port for SOCKS, which says that.
fn speaker(sb: &Sandbox, say: &[u8], then: Afterwards) -> Program {
    let speech = Speech {
        say: say.to_vec(),
        then,
    };
    sb.speaker(SocketAddr::new(INTERNET_V4, 1080), &speech)
}

#[test]
fn datagrams_that_wait_for_a_silent_server_are_bounded() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let _server = speaker(sb, &[], Afterwards::Hold);
        let bed = bed(sb, "socks5://192.0.2.2:1080", CONNECTIONS);
        let [to, _] = sb.destinations();
        // 38 megabytes, more than the bound.
        const FLOWS: u32 = 40;
        bed.app.send_datagrams(to, FLOWS, 16, 60_000);
        assert_memory(&bed, BASE + u64::from(FLOWS) * CONNECTION + WAITING);
        sb.assert_nothing_left_for(to.ip());
    });
}

#[test]
fn a_server_elsewhere_directs_no_datagram_to_this_machine() {
    assert_no_datagram_is_directed_to([127, 0, 0, 1]);
}

#[test]
fn a_server_elsewhere_directs_no_datagram_to_another_address_of_this_machine() {
    assert_no_datagram_is_directed_to([192, 0, 2, 1]);
}

fn assert_no_datagram_is_directed_to(address: [u8; 4]) {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let service = sb.service("service").port(5555).start();
        // It greets, and has datagrams sent to port 5555 there.
        let say = [&[5, 0, 5, 0, 0, 1][..], &address, &[0x15, 0xb3]].concat();
        let _server = speaker(sb, &say, Afterwards::Hold);
        let bed = bed(sb, "socks5://192.0.2.2:1080", CONNECTIONS);
        let [to, _] = sb.destinations();
        bed.app.send_datagrams(to, 1, 1, 100);
        wait_until("the datagram to be passed on", || {
            let sent = sb.deliveries(INTERNET_V4);
            sent.iter().any(|delivery| delivery.protocol == 17) || !service.arrivals().is_empty()
        });
        service.assert_idle();
        sb.assert_nothing_left_for(to.ip());
    });
}

#[test]
fn a_server_that_does_not_greet_is_down() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let _server = speaker(sb, &[], Afterwards::Hold);
        let bed = bed(sb, "socks5://192.0.2.2:1080", CONNECTIONS);
        let [to, _] = sb.destinations();
        assert_eq!(bed.app.end_of_one(to), Outcome::Closed);
        let status = bed.agent("status");
        assert!(status.contains("it does not answer"), "{status}");
        let doctor = bed.agent("doctor");
        assert!(doctor.contains("[upstream-down]"), "{doctor}");
        sb.assert_nothing_left_for(to.ip());
    });
}

#[test]
fn a_proxy_that_answers_no_request_is_down() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let _http = speaker(sb, &[], Afterwards::Hold);
        let greets = Speech {
            say: vec![5, 0],
            then: Afterwards::Hold,
        };
        let _socks = sb.speaker(SocketAddr::new(INTERNET_V4, 1081), &greets);
        let bed = Relayed::builder(sb).start(
            "version: 1\nproxies:\n  a: {upstream: 'http://192.0.2.2:1080'}\n  \
             b: {upstream: 'socks5://192.0.2.2:1081'}\n\
             rules: [{match: /app-a, proxy: a}, {match: /app-b, proxy: b}]\n",
        );
        let other = other_app(&bed, "app-b", "b");
        let [to, _] = sb.destinations();
        let _open = [&bed.app, &other].map(|app| app.open_tcp(to).expect("the relay is there"));
        // While it goes on waiting, as the destination may be what is slow.
        wait_until("both to be known as down", || {
            bed.agent("status").matches("it does not answer").count() == 2
        });
        sb.assert_nothing_left_for(to.ip());
    });
}

#[test]
fn whoever_talks_nonsense_is_left() {
    let endless = b"HTTP/1.1 200 OK\r\nX-Again: and again\r\n".to_vec();
    let many = [&b"HTTP/1.1 200 OK\r\n"[..], &b"X: y\r\n".repeat(50)].concat();
    let mut cases: Vec<(&str, Vec<u8>, Afterwards)> = vec![
        ("http", endless, Afterwards::Repeat),
        ("http", many, Afterwards::Repeat),
        ("http", vec![b'\n'; 1000], Afterwards::Repeat),
        ("http", vec![b'x'; 1000], Afterwards::Repeat),
        ("http", b"HTTP/1.1 200".to_vec(), Afterwards::Close),
        ("http", GRANTED.to_vec(), Afterwards::Hold),
        (
            "socks5",
            b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(),
            Afterwards::Hold,
        ),
        ("socks5", vec![b'x'; 1000], Afterwards::Repeat),
        ("socks5", vec![5; 1000], Afterwards::Repeat),
        ("socks5", vec![5, 0, 5, 0, 0, 9], Afterwards::Hold),
    ];
    // In the middle of the handshake, wherever that is.
    for length in 0..GRANTED.len() {
        cases.push(("socks5", GRANTED[..length].to_vec(), Afterwards::Close));
    }
    sandbox(|sb| {
        let _helper = sb.helper().config("limits: {proxies: 64}").start();
        let mut config = "version: 1\nproxies:\n".to_owned();
        let mut rules = String::new();
        for (port, (scheme, ..)) in (2000..).zip(&cases) {
            config += &format!("  p{port}: {{upstream: '{scheme}://192.0.2.2:{port}'}}\n");
            rules += &format!("  - {{match: /app-{port}, proxy: p{port}}}\n");
        }
        config += &format!("rules:\n{rules}");
        let mut bed = Relayed::builder(sb).start(&config);
        for (port, (_, say, then)) in (2000..).zip(cases) {
            let speech = Speech { say, then };
            let _server = sb.speaker(SocketAddr::new(INTERNET_V4, port), &speech);
            let app = other_app(&bed, &format!("app-{port}"), &format!("p{port}"));
            for to in sb.destinations() {
                assert_eq!(app.end_of_one(to), Outcome::Closed, "{speech:?}");
                sb.assert_nothing_left_for(to.ip());
            }
            assert!(bed.relay.is_running());
        }
        assert_memory(&bed, BASE);
    });
}

/// How much a socket may hold: enough to tempt the relay, and not a machine's memory for hundreds of connections.
fn small_buffers(sb: &Sandbox) {
    let set = "for f in tcp_rmem tcp_wmem; do echo 4096 65536 131072 > /proc/sys/net/ipv4/$f; done";
    sb.run(&["sh", "-ec", set]);
    sb.run(&["nsenter", "--net=/run/netns/internet", "sh", "-ec", set]);
}

#[test]
fn connections_at_the_limit_whose_reader_is_stuck_stay_within_the_bound() {
    const LIMIT: u32 = 300;
    sandbox(|sb| {
        small_buffers(sb);
        // It grants everything, and then reads nothing.
        let _helper = sb.helper().start();
        let _server = speaker(sb, &GRANTED, Afterwards::Hold);
        let mut bed = bed(sb, "socks5://192.0.2.2:1080", LIMIT);
        let [to, other] = sb.destinations();
        bed.app.hoard(to, LIMIT);
        wait_until("bytes of each connection to have got there", || {
            sb.unread_connections(1080) >= LIMIT as usize
        });
        assert_memory(&bed, BASE + u64::from(LIMIT) * CONNECTION);
        for to in [to, other] {
            let outcome = bed.app.end_of_one(to);
            assert_eq!(outcome, Outcome::Closed, "one more than there may be");
        }
        assert!(bed.relay.is_running());
        let ips: [IpAddr; 2] = [to.ip(), other.ip()];
        for ip in ips {
            sb.assert_nothing_left_for(ip);
        }
    });
}

#[test]
fn who_sends_to_the_relay_unasked_takes_neither_flows_nor_names_away() {
    const LIMIT: u32 = 200;
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let _server = sb.socks_server(SocketAddr::new(INTERNET_V4, 1080));
        let bed = bed(sb, "socks5h://192.0.2.2:1080", LIMIT);
        let [to, other] = sb.destinations();
        let socket = bed.app.open_udp(to);
        assert_from_the_internet(&Outcome::in_the_end(|| socket.ask()), to);
        let port = bed.upstream()["port"].as_u64();
        let port = port.and_then(|port| u16::try_from(port).ok());
        // Another user, from more sockets than there may be flows.
        let stranger = sb.user(1002).cgroup("app.slice/app-c.scope").app();
        let relay = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port.expect("a port"));
        stranger.send_datagrams(relay, 300, 1, 16);
        let asked = bed.app.open_udp(other);
        assert_from_the_internet(&Outcome::in_the_end(|| asked.ask()), other);
        let server = format!("@{}", sb.fresh_v4());
        let argv = ["dig", "+short", &server, "192-0-2-7.example", "A"];
        let cgroup = bed.user.cgroup("app.slice/app-a.scope/dig");
        let answer = bed.user.output(&cgroup, &argv);
        assert!(answer.trim().parse::<IpAddr>().is_ok(), "{answer}");
    });
}

#[test]
fn whoever_gives_up_before_the_proxy_answers_leaves_nothing_behind() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        // It greets, and answers no request.
        let _server = speaker(sb, &[5, 0], Afterwards::Hold);
        let bed = bed(sb, "socks5://192.0.2.2:1080", CONNECTIONS);
        for to in sb.destinations() {
            let connection = bed.app.open_tcp(to).expect("the relay is there");
            wait_until("it to be on its way", || bed.upstream()["connections"] == 1);
            connection.reset();
            wait_until("it to be over", || bed.upstream()["connections"] == 0);
            sb.assert_nothing_left_for(to.ip());
        }
    });
}

#[test]
fn names_stay_within_the_bound() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let mut bed = Relayed::through(sb, "socks5h://192.0.2.2:1080");
        // More than there may be, and as long as can be (RFC 1035, 2.3.4).
        let rest = [&*"x".repeat(59); 4].join(".");
        let names: String = (0..66_000).map(|n| format!("{n:013}.{rest}\n")).collect();
        fs::write("/run/names", names).expect("/run is ours");
        let server = format!("@{}", sb.fresh_v4());
        let cgroup = bed.user.cgroup("app.slice/app-a.scope/dig");
        let options = "+tcp +keepopen +tries=1 +noall -f /run/names".split(' ');
        let argv: Vec<_> = ["dig", &server].into_iter().chain(options).collect();
        bed.user.output(&cgroup, &argv);
        assert_memory(&bed, BASE + NAMES);
        // So many names were given addresses, which it writes down at its end.
        bed.relay.stop();
        let file = bed.user.home().join(".local/state/cgtproxy/names");
        let text = fs::read_to_string(file).expect("it was written");
        let stored = text.lines().filter(|line| line.ends_with(&rest)).count();
        // There is room for 16,578. When the queries take so long that the first names may be forgotten, an eighth of all
        // may just have been.
        assert!(stored > 14_500, "{stored}");
    });
}
