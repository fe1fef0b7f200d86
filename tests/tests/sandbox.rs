//! The fast sandbox proves itself, with a ruleset written by hand: each outcome that a test may
//! assert is shown to be told apart from all the others.

#![allow(clippy::expect_used, reason = "a panic is a failed test")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use cgtproxy_tests::sandbox::{
    Cgroup, MACHINE_V4, MACHINE_V6, Outcome, Sandbox, direct, local, proxied, sandbox,
};
use cgtproxy_tests::wire::Transport;

const TRANSPORTS: [Transport; 2] = [Transport::Tcp, Transport::Udp];
const LOCALHOSTS: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::LOCALHOST),
    IpAddr::V6(Ipv6Addr::LOCALHOST),
];

/// The policy routing that brings marked packets back in over the loopback device.
fn route_marked(sb: &Sandbox) {
    for family in ["-4", "-6"] {
        sb.run(&["ip", family, "rule", "add", "fwmark", "1", "lookup", "100"]);
        sb.run(&[
            "ip", family, "route", "add", "local", "default", "dev", "lo", "table", "100",
        ]);
    }
}

/// One verdict for one cgroup, five levels deep as an application's is.
fn rule(sb: &Sandbox, cgroup: &Cgroup, verdict: &str) {
    let path = cgroup.path();
    let path = path.to_str().expect("plain ASCII").trim_start_matches('/');
    sb.nft(&format!(
        "table inet cgtproxy {{
             map verdicts {{
                 type cgroupsv2 : verdict
                 counter
             }}
             chain dropped {{
                 drop
             }}
             chain diverted {{
                 meta l4proto {{ tcp, udp }} meta mark set 1 ct mark set 1
             }}
             chain output {{
                 type route hook output priority mangle
                 ct direction reply return
                 socket cgroupv2 level 5 vmap @verdicts
                 # A socket that has been closed says its last words without a control group.
                 ct mark 1 meta mark set 1
             }}
             chain prerouting {{
                 type filter hook prerouting priority mangle
                 iif lo meta mark 1 meta l4proto {{ tcp, udp }} tproxy to :7890
             }}
             chain input {{
                 type filter hook input priority mangle
                 meta mark 1 meta skuid 1002 drop
             }}
         }}
         add element inet cgtproxy verdicts {{ \"{path}\" : {verdict} }}"
    ));
}

#[test]
fn without_rules_everything_is_direct() {
    sandbox(|sb| {
        let app = sb.user(1001).cgroup("app.slice/app-a.scope").app();
        for to in sb.destinations() {
            for transport in TRANSPORTS {
                assert_eq!(app.ask(transport, to), direct(to));
            }
            assert_eq!(app.ping(to.ip()), direct(to));
            let protocols: Vec<_> = sb.deliveries(to.ip()).iter().map(|d| d.protocol).collect();
            assert_eq!(protocols.len(), 3, "TCP, UDP and ICMP: {protocols:?}");
        }
    });
}

#[test]
fn diverted_packets_reach_the_proxy_with_their_destination() {
    sandbox(|sb| {
        route_marked(sb);
        let user = sb.user(1001);
        let cgroup = user.cgroup("app.slice/app-a.scope");
        let proxy = sb.tproxy("clash").uid(1001).port(7890).start();
        rule(sb, &cgroup, "goto diverted");
        let app = cgroup.app();
        let other = user.cgroup("app.slice/app-b.scope").app();
        for to in sb.destinations() {
            for transport in TRANSPORTS {
                assert_eq!(app.ask(transport, to), proxied("clash", to));
            }
            sb.assert_nothing_left_for(to.ip());
            assert!(
                proxy
                    .arrivals()
                    .iter()
                    .all(|arrival| arrival.destination.port() == 80)
            );
            // Only TCP and UDP are diverted, and only this application's.
            assert_eq!(app.ping(to.ip()), direct(to));
            assert_eq!(other.udp(to), direct(to));
        }
    });
}

#[test]
fn dropped_packets_reach_nobody() {
    sandbox(|sb| {
        route_marked(sb);
        let cgroup = sb.user(1001).cgroup("app.slice/app-a.scope");
        let proxy = sb.tproxy("clash").port(7890).start();
        rule(sb, &cgroup, "goto dropped");
        let app = cgroup.app();
        let root = cgroup.app_as(0);
        for to in sb.destinations() {
            assert_eq!(app.tcp(to), Outcome::Silent);
            assert_eq!(app.udp(to), Outcome::Forbidden);
            // The kernel keeps a lost ICMPv6 echo request to itself.
            let lost = if to.is_ipv4() {
                Outcome::Forbidden
            } else {
                Outcome::Silent
            };
            assert_eq!(app.ping(to.ip()), lost);
            assert_eq!(root.raw(132, to.ip()), Outcome::Forbidden);
            sb.assert_nothing_left_for(to.ip());
        }
        proxy.assert_idle();
    });
}

#[test]
fn a_listener_that_the_kernel_guards_hears_nothing() {
    sandbox(|sb| {
        route_marked(sb);
        let cgroup = sb.user(1001).cgroup("app.slice/app-a.scope");
        let proxy = sb.tproxy("somebody else's").uid(1002).port(7890).start();
        rule(sb, &cgroup, "goto diverted");
        let app = cgroup.app();
        for to in sb.destinations() {
            for transport in TRANSPORTS {
                assert_eq!(app.ask(transport, to), Outcome::Silent);
            }
            sb.assert_nothing_left_for(to.ip());
        }
        proxy.assert_idle();
    });
}

#[test]
fn refusals_are_told_apart_from_silence() {
    sandbox(|sb| {
        let app = sb.user(1001).cgroup("app.slice/app-a.scope").app();
        for to in sb.destinations() {
            let closed = SocketAddr::new(to.ip(), 1);
            for transport in TRANSPORTS {
                assert_eq!(app.ask(transport, closed), Outcome::Refused);
            }
        }
    });
}

#[test]
fn raw_packets_are_seen_to_leave() {
    sandbox(|sb| {
        let app = sb.user(1001).cgroup("app.slice/app-a.scope").app_as(0);
        for to in sb.destinations() {
            assert_eq!(app.raw(132, to.ip()), Outcome::LeftUnanswered);
            assert_eq!(sb.deliveries(to.ip())[0].protocol, 132);
        }
    });
}

#[test]
fn an_answer_that_does_not_come_back_is_told_apart_from_silence() {
    sandbox(|sb| {
        sb.nft(
            "table inet filter {
                 chain input {
                     type filter hook input priority 0
                     iif uplink tcp flags & (syn|ack) == ack drop
                     iif uplink meta l4proto udp drop
                 }
             }",
        );
        let app = sb.user(1001).cgroup("app.slice/app-a.scope").app();
        for to in sb.destinations() {
            for transport in TRANSPORTS {
                assert_eq!(app.ask(transport, to), Outcome::AnswerLost);
            }
        }
    });
}

#[test]
fn open_connections_are_used_step_by_step() {
    sandbox(|sb| {
        let user = sb.user(1001);
        let cgroup = user.cgroup("app.slice/app-a.scope");
        let app = cgroup.app();
        for to in sb.destinations() {
            let tcp = app.open_tcp(to).unwrap();
            let udp = app.open_udp(to);
            assert_eq!(tcp.ask(), direct(to));
            assert_eq!(udp.ask(), direct(to));
            rule(sb, &cgroup, "goto dropped");
            assert!(tcp.ask().is_dropped());
            assert_eq!(udp.ask(), Outcome::Forbidden);
            sb.nft("flush map inet cgtproxy verdicts");
            assert_eq!(udp.ask(), direct(to));
        }
    });
}

#[test]
fn services_of_the_machine_answer_in_their_own_name() {
    sandbox(|sb| {
        let cgroup = sb.user(1001).cgroup("app.slice/app-server.service");
        let service = sb
            .service("web")
            .uid(1001)
            .cgroup(&cgroup)
            .port(8080)
            .start();
        let app = sb.user(1001).cgroup("app.slice/app-a.scope").app();
        let caller = sb.internet_app();
        for transport in TRANSPORTS {
            for ip in LOCALHOSTS {
                let at = SocketAddr::new(ip, 8080);
                assert_eq!(app.ask(transport, at), local("web", at));
            }
            for ip in [MACHINE_V4, MACHINE_V6] {
                let at = SocketAddr::new(ip, 8080);
                assert_eq!(caller.ask(transport, at), local("web", at));
            }
        }
        assert_eq!(
            service
                .arrivals()
                .iter()
                .filter(|a| a.token.is_some())
                .count(),
            8
        );
    });
}

/// What comes in for an address of IPv6 that the kernel has no local route for yet is nobody's.
#[test]
fn addresses_are_there_when_a_host_is() {
    sandbox(|sb| {
        let own = |listing: String, address: IpAddr| {
            let route = format!("local {address} ");
            assert!(
                listing.lines().any(|line| line.starts_with(&route)),
                "{address} is not in:\n{listing}"
            );
        };
        for n in 1..=8 {
            let host = sb.host_behind(&format!("lan{n}"));
            let routes = ["ip", "-6", "route", "show", "table", "local"];
            let host_routes = [
                &["ip", "netns", "exec", &format!("behind-{n}-2")],
                &routes[..],
            ];
            own(sb.run(&host_routes.concat()), host.addresses()[1]);
            own(sb.run(&routes), host.gateways()[1]);
            let address = format!("2001:db8:9::{n}");
            sb.add_address(&format!("{address}/128"), "lo");
            own(sb.run(&routes), address.parse().expect("an address"));
        }
    });
}

#[test]
fn traffic_goes_on_while_rules_change() {
    sandbox(|sb| {
        route_marked(sb);
        let cgroup = sb.user(1001).cgroup("app.slice/app-a.scope");
        let _proxy = sb.tproxy("clash").port(7890).start();
        let app = cgroup.app();
        let [v4, v6] = sb.destinations();
        let traffic = [
            app.traffic(Transport::Tcp, v4),
            app.traffic(Transport::Udp, v6),
        ];
        for traffic in &traffic {
            let tally = traffic.next(20);
            assert_eq!(tally.direct, tally.total(), "{tally:?}");
        }
        rule(sb, &cgroup, "goto diverted");
        for traffic in &traffic {
            let tally = traffic.next(20);
            assert_eq!(tally.proxied["clash"], tally.total(), "{tally:?}");
        }
        for traffic in traffic {
            assert_eq!(traffic.stop().silent, 0);
        }
    });
}

#[test]
fn bursts_are_counted_to_the_last_packet() {
    sandbox(|sb| {
        route_marked(sb);
        let cgroup = sb.user(1001).cgroup("app.slice/app-a.scope");
        let _proxy = sb.tproxy("clash").port(7890).start();
        let app = cgroup.app();
        for to in sb.destinations() {
            for transport in TRANSPORTS {
                assert_eq!(app.burst(transport, to, 300).direct, 300);
            }
        }
        rule(sb, &cgroup, "goto diverted");
        for to in sb.destinations() {
            for transport in TRANSPORTS {
                assert_eq!(app.burst(transport, to, 300).proxied["clash"], 300);
            }
            sb.assert_nothing_left_for(to.ip());
        }
    });
}

#[test]
fn elements_are_read_back() {
    sandbox(|sb| {
        let cgroup = sb.user(1001).cgroup("app.slice/app-a.scope");
        rule(sb, &cgroup, "goto dropped");
        let elements = sb.map_elements("verdicts");
        assert_eq!(elements.len(), 1);
        assert_eq!(
            elements[0].key,
            "user.slice/user-1001.slice/user@1001.service/app.slice/app-a.scope"
        );
        assert_eq!(elements[0].verdict, "goto dropped");
        assert!(sb.has_table() && sb.chains().contains(&"diverted".to_owned()));
        assert!(sb.map_elements("no such map").is_empty());
        route_marked(sb);
        assert_eq!(sb.mark_rules(6)[0].mark.as_deref(), Some("0x1"));
        assert_eq!(sb.routes(4, "100"), ["local default dev lo scope host"]);
    });
}

#[test]
fn users_own_their_subtree_and_nothing_above() {
    sandbox(|sb| {
        use std::os::unix::fs::MetadataExt;
        let user = sb.user(1001);
        let cgroup = user.cgroup("app.slice/with space/\"quoted\" \\x2d");
        let owner = |path: std::path::PathBuf| std::fs::metadata(path).unwrap().uid();
        assert_eq!(owner(cgroup.directory()), 1001);
        assert_eq!(owner(cgroup.directory().join("cgroup.procs")), 1001);
        assert_eq!(owner(user.service().directory()), 1001);
        assert_eq!(owner(user.service().directory().join("..")), 0);
        drop(cgroup.app());
        cgroup.remove();
        assert!(!cgroup.directory().exists());
    });
}

#[test]
fn a_varlink_client_is_its_user_and_may_be_rude() {
    sandbox(|sb| {
        use std::io::{Read, Write};
        let path = "/run/service.sock";
        let listener = std::os::unix::net::UnixListener::bind(path).expect("/run is ours");
        let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o666);
        std::fs::set_permissions(path, permissions).expect("our own socket");
        let mut client = sb.user(1001).varlink(path);
        let (mut service, _) = listener.accept().expect("a client");
        let peer =
            nix::sys::socket::getsockopt(&service, nix::sys::socket::sockopt::PeerCredentials);
        assert_eq!(peer.map(|peer| peer.uid()), Ok(1001));
        client.send_bytes(b"half a mess");
        let mut half = [0; 11];
        service.read_exact(&mut half).expect("what was sent");
        assert_eq!(&half, b"half a mess");
        client.finish();
        assert_eq!(service.read(&mut half).expect("the end"), 0);
        service
            .write_all(b"{\"parameters\":{\"x\":1}}\0")
            .expect("the client still listens");
        assert_eq!(client.receive().expect("a message")["parameters"]["x"], 1);
        drop(service);
        assert_eq!(client.receive(), None);
    });
}

#[test]
fn sandboxes_are_alone() {
    sandbox(|sb| {
        let mut names: Vec<_> = std::fs::read_dir("/sys/fs/cgroup")
            .unwrap()
            .flatten()
            .filter(|entry| entry.file_type().unwrap().is_dir())
            .collect();
        assert!(names.pop().is_none(), "a fresh cgroup root is empty");
        assert_eq!(
            std::fs::read_to_string("/proc/self/cgroup")
                .unwrap()
                .lines()
                .last(),
            Some("0::/")
        );
        assert!(!sb.has_table());
    });
}

#[test]
#[should_panic(expected = "was sent")]
fn a_packet_that_left_is_found_out() {
    sandbox(|sb| {
        let to = sb.fresh_v6();
        let app = sb.user(1001).cgroup("app.slice/app-a.scope").app_as(0);
        app.raw(132, to);
        sb.assert_nothing_left_for(to);
    });
}

#[test]
#[should_panic(expected = "failed in its sandbox")]
fn a_failure_inside_is_a_failure_outside() {
    sandbox(|_| panic!("on purpose"));
}
