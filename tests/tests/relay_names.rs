//! Names that the proxy looks up: addresses that stand for them, and nothing asked on the way.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a panic is a failed test"
)]

use std::fs;
use std::net::{IpAddr, SocketAddr};

use cgtproxy_tests::proxies::microsocks;
use cgtproxy_tests::relayed::{Relayed, assert_from_the_internet, config};
use cgtproxy_tests::sandbox::{
    Cgroup, Outcome, PORTS, Program, Sandbox, Service, User, direct, sandbox,
};
use cgtproxy_tests::session::Session;
use cgtproxy_tests::wait::wait_until;

/// What only those on the internet know, with an address of each family.
const V4_NAME: &str = "four.example";
const V6_NAME: &str = "six.example";
/// Who looks names up.
const UPSTREAM: &str = "upstream: 'socks5h://192.0.2.2:1080'";

/// An application whose names a SOCKS5 server looks up.
struct Bed {
    _server: Program,
    _helper: Service,
    relayed: Relayed,
    to: [SocketAddr; 2],
}

impl Bed {
    fn new(sb: &Sandbox) -> Self {
        Self::with(sb, "")
    }

    /// With another line of configuration.
    fn with(sb: &Sandbox, line: &str) -> Self {
        Self::of(sb, "", line)
    }

    /// With more options of the proxy's, and that.
    fn of(sb: &Sandbox, options: &str, line: &str) -> Self {
        let options = format!("{UPSTREAM}{options}");
        sb.count_queries();
        let to = sb.destinations();
        let hosts = format!("{} {V4_NAME}\n{} {V6_NAME}\n", to[0].ip(), to[1].ip());
        fs::write("/run/hosts", hosts).expect("/run is ours");
        sb.run(&["mount", "--bind", "/run/hosts", "/etc/hosts"]);
        let server = microsocks(sb, &[]);
        let helper = sb.helper().start();
        Self {
            _server: server,
            _helper: helper,
            relayed: Relayed::builder(sb).start(&(config(&options) + line)),
            to,
        }
    }

    /// The address that an application is told, by a server that is never asked.
    fn look_up(&self, sb: &Sandbox, name: &str, kind: &str) -> IpAddr {
        let cgroup = self.relayed.user.cgroup("app.slice/app-a.scope/dig");
        let servers = [sb.fresh_v4(), sb.fresh_v6()];
        let mut answers = servers.map(|server| {
            let server = format!("@{server}");
            let argv = ["dig", "+short", "+tries=1", &server, name, kind];
            let answer = self.relayed.user.output(&cgroup, &argv);
            answer.trim().parse::<IpAddr>().expect("one address")
        });
        answers.sort();
        assert_eq!(answers[0], answers[1], "whoever is asked");
        answers[0]
    }

    /// What becomes of a connection there, in the end.
    fn tcp(&self, to: IpAddr) -> Outcome {
        self.relayed.tcp(SocketAddr::new(to, PORTS[0]))
    }

    fn names(&self) -> std::path::PathBuf {
        self.relayed.user.home().join(".local/state/cgtproxy/names")
    }

    /// The relay's ports as the helper knows them, for connections and for queries.
    fn ports(&self) -> (u16, u16) {
        let status = Session::of(&self.relayed.user).status();
        let proxy = &status["proxies"][0];
        let port = |number: &serde_json::Value| number.as_u64().and_then(|n| u16::try_from(n).ok());
        let port_of = |number| port(number).filter(|port| *port > 0).expect("a port");
        (
            port_of(&proxy["port"]),
            port_of(&proxy["dnsHijack"]["port"]),
        )
    }

    /// A relay that has ended is started again. If it has other ports, the kernel learns them by and by.
    fn start_again(&mut self, sb: &Sandbox) {
        self.relayed.relay.start_again();
        let [to, _] = sb.destinations();
        wait_until("the relay to be found again", || {
            self.relayed.tcp(to) != Outcome::Refused
        });
    }
}

#[test]
fn addresses_of_both_families_stand_for_a_name_and_no_query_leaves() {
    sandbox(|sb| {
        let bed = Bed::new(sb);
        // Which of its two addresses an application takes is its own choice.
        for (name, to) in [(V4_NAME, bed.to[0]), (V6_NAME, bed.to[1])] {
            let v4 = bed.look_up(sb, name, "A");
            let v6 = bed.look_up(sb, name, "AAAA");
            assert!(v4.to_string().starts_with("198.1"), "{v4}");
            assert!(v6.to_string().starts_with("2001:2:"), "{v6}");
            for fake in [v4, v6] {
                assert_eq!(bed.tcp(fake), Outcome::Redirected { to });
                sb.assert_nothing_left_for(fake);
            }
        }
        // There is nothing else of a name, of whatever type: whoever asks for that is not left waiting.
        let cgroup = bed.relayed.user.cgroup("app.slice/app-a.scope/dig");
        for kind in ["MX", "SSHFP", "URI"] {
            let server = format!("@{}", sb.fresh_v4());
            let argv = [
                "dig",
                "+tries=1",
                "+noall",
                "+comments",
                &server,
                V4_NAME,
                kind,
            ];
            let answer = bed.relayed.user.output(&cgroup, &argv);
            assert!(answer.contains("status: NOERROR"), "{kind}: {answer}");
            assert!(answer.contains("QUERY: 1, ANSWER: 0"), "{kind}: {answer}");
        }
        assert_eq!(sb.queries_left(), 0);
        // The counter counts: another application's query does leave.
        let other = bed.relayed.user.cgroup("app.slice/app-b.scope").app();
        let server = SocketAddr::new(sb.fresh_v4(), 53);
        assert_eq!(other.udp(server), direct(server));
        assert_eq!(sb.queries_left(), 1);
    });
}

/// With this option, a name has no address of one kind, and one of the other; without it, of both. It is the same whether
/// the relay has had it from the beginning or after a reload.
fn left_out(option: &str, none: &str, some: &str) {
    sandbox(|sb| {
        let option = format!(", {option}: true");
        let bed = Bed::of(sb, &option, "");
        let cgroup = bed.relayed.user.cgroup("app.slice/app-a.scope/dig");
        let servers = [sb.fresh_v4(), sb.fresh_v6()].map(|server| format!("@{server}"));
        let answers = || {
            servers.each_ref().map(|server| {
                let argv = ["dig", "+short", "+tries=1", server, V4_NAME, none];
                !bed.relayed.user.output(&cgroup, &argv).is_empty()
            })
        };
        let reload = |options: &str, expected| {
            let options = format!("{UPSTREAM}{options}");
            bed.relayed.agent.write_config(&config(&options));
            wait_until("the reload", || answers() == [expected; 2]);
        };
        assert_eq!(answers(), [false; 2]);
        reload("", true);
        reload(&option, false);
        let fake = bed.look_up(sb, V4_NAME, some);
        assert_eq!(bed.tcp(fake), Outcome::Redirected { to: bed.to[0] });
    });
}

#[test]
fn with_ipv4_left_out_no_address_of_it_stands_for_a_name() {
    left_out("no-ipv4", "A", "AAAA");
}

#[test]
fn with_ipv6_left_out_no_address_of_it_stands_for_a_name() {
    left_out("no-ipv6", "AAAA", "A");
}

#[test]
fn what_the_proxy_leaves_out_does_not_leave_for_an_address_that_stands_for_a_name() {
    sandbox(|sb| {
        let fake_addresses = "fake-addresses: [10.99.0.0/16, 'fd00:99::/64']\n";
        let bed = Bed::of(sb, ", no-udp: true", fake_addresses);
        for kind in ["A", "AAAA"] {
            let fake = bed.look_up(sb, V4_NAME, kind);
            // A datagram that is refused on its way out fails as it is sent.
            let to = SocketAddr::new(fake, PORTS[0]);
            let outcome = bed.relayed.app.udp(to);
            let told = matches!(outcome, Outcome::Refused | Outcome::Forbidden);
            assert!(told, "{fake}: {outcome:?}");
            bed.relayed.app.ping(fake);
            assert_eq!(bed.tcp(fake), Outcome::Redirected { to: bed.to[0] });
            sb.assert_nothing_left_for(fake);
        }
        // What goes to an address as it is goes direct.
        for to in sb.destinations() {
            assert_eq!(bed.relayed.app.udp(to), direct(to));
        }
    });
}

#[test]
fn addresses_come_from_networks_of_ones_own_choice() {
    sandbox(|sb| {
        let bed = Bed::with(sb, "fake-addresses: [10.99.0.0/16, 'fd00:99::/64']\n");
        let v4 = bed.look_up(sb, V4_NAME, "A");
        let v6 = bed.look_up(sb, V4_NAME, "AAAA");
        assert!(v4.to_string().starts_with("10.99."), "{v4}");
        assert!(v6.to_string().starts_with("fd00:99:"), "{v6}");
        for fake in [v4, v6] {
            assert_eq!(bed.tcp(fake), Outcome::Redirected { to: bed.to[0] });
            sb.assert_nothing_left_for(fake);
        }
        // What was in the networks that there are otherwise is an address like any other.
        let [to, _] = sb.destinations();
        assert_from_the_internet(&bed.relayed.tcp(to), to);
    });
}

#[test]
fn a_name_keeps_its_addresses_over_restarts_until_they_expire() {
    sandbox(|sb| {
        let mut bed = Bed::new(sb);
        let fake = bed.look_up(sb, V4_NAME, "A");
        let to = bed.to[0];
        // Told to end, it writes the names down; killed, it has done so some seconds before.
        bed.relayed.relay.stop();
        bed.start_again(sb);
        assert_eq!(bed.tcp(fake), Outcome::Redirected { to });
        assert_eq!(bed.look_up(sb, V4_NAME, "A"), fake);
        let second = bed.look_up(sb, V6_NAME, "A");
        wait_until("the name to be written down", || {
            fs::read_to_string(bed.names()).is_ok_and(|text| text.contains(V6_NAME))
        });
        bed.relayed.relay.kill();
        bed.start_again(sb);
        assert_eq!(bed.look_up(sb, V6_NAME, "A"), second);
        assert_eq!(bed.tcp(second), Outcome::Redirected { to: bed.to[1] });
        // A day later nobody knows what the first stood for, and nothing goes there.
        bed.relayed.relay.stop();
        let text = fs::read_to_string(bed.names()).expect("it was written");
        let day = 24 * 60 * 60;
        let aged: Vec<String> = text
            .lines()
            .map(|line| match line.split(' ').collect::<Vec<_>>()[..] {
                [number, used, name] if name == V4_NAME => {
                    let used: u64 = used.parse().expect("seconds");
                    format!("{number} {} {name}\n", used - day)
                }
                _ => format!("{line}\n"),
            })
            .collect();
        fs::write(bed.names(), aged.concat()).expect("root may");
        bed.start_again(sb);
        // Whether the reset comes before connect(2) returns or after it.
        let outcome = bed.tcp(fake);
        assert!(
            matches!(outcome, Outcome::Refused | Outcome::Closed),
            "{outcome:?}"
        );
        sb.assert_nothing_left_for(fake);
        assert_eq!(bed.tcp(second), Outcome::Redirected { to: bed.to[1] });
        assert_eq!(sb.queries_left(), 0);
    });
}

/// So the kernel need not learn of others first.
#[test]
fn a_relay_that_was_killed_listens_where_it_did_before() {
    sandbox(|sb| {
        let mut bed = Bed::new(sb);
        let fake = bed.look_up(sb, V4_NAME, "A");
        let there = SocketAddr::new(fake, PORTS[0]);
        let open = bed.relayed.app.open_tcp(there);
        let open = open.expect("the relay is there");
        let to = bed.to[0];
        assert_eq!(
            Outcome::in_the_end(|| open.ask()),
            Outcome::Redirected { to }
        );
        let ports = bed.ports();
        bed.relayed.relay.kill();
        bed.start_again(sb);
        bed.look_up(sb, V6_NAME, "A");
        assert_eq!(bed.ports(), ports);
    });
}

/// The relay asks the helper about a socket, and not about each of its queries.
#[test]
fn who_takes_the_port_of_an_application_that_has_asked_gets_nothing() {
    sandbox(|sb| {
        let bed = Bed::new(sb);
        let (_, dns) = bed.ports();
        let cgroup = bed.relayed.user.cgroup("app.slice/app-a.scope/dig");
        let stranger = sb.user(1002);
        let elsewhere = stranger.cgroup("app.slice/app-a.scope");
        let ask = |user: &User, cgroup: &Cgroup, from: &str, to: &str| {
            let dig = format!("dig +tries=1 -b {from} {to} {V4_NAME} A 2>&1 || true");
            user.output(cgroup, &["sh", "-c", &dig])
        };
        for (own, server, relay) in [
            ("192.0.2.1", "203.0.113.7", "127.0.0.1"),
            ("127.0.0.1", "127.0.0.53", "127.0.0.1"),
            ("2001:db8::1", "2001:db8:7::7", "::1"),
            ("::1", "::1", "::1"),
        ] {
            let from = format!("{own}#41000");
            let direct = format!("@{relay} -p {dns} +time=1");
            let assert_answered = || {
                let said = ask(&bed.relayed.user, &cgroup, &from, &format!("@{server}"));
                assert!(said.contains("ANSWER: 1"), "{from}: {said}");
            };
            assert_answered();
            let said = ask(&stranger, &elsewhere, &from, &direct);
            assert!(said.contains("timed out"), "{from}: {said}");
            // The application still has it.
            assert_answered();
        }
    });
}

/// Whoever finds the relay's ports can connect to them: other users, and this one's own applications.
#[test]
fn who_asks_the_relays_ports_directly_gets_nothing() {
    sandbox(|sb| {
        const NAME: &str = "unasked.example";
        let bed = Bed::new(sb);
        // By now the relay is at work, with a name of its own.
        let fake = bed.look_up(sb, V4_NAME, "A");
        assert_eq!(bed.tcp(fake), Outcome::Redirected { to: bed.to[0] });
        let (carried, dns) = bed.ports();
        // Whoever came through to the proxy with that for a destination would be answered there.
        let _trap = sb.echo_server(carried);
        let strangers = [
            (sb.user(1002), "app.slice/app-a.scope"),
            (bed.relayed.user.clone(), "app.slice/app-b.scope"),
        ];
        for (user, name) in strangers {
            let cgroup = user.cgroup(name);
            let app = cgroup.app();
            for address in ["127.0.0.1", "::1"] {
                let at = |port| SocketAddr::new(address.parse().expect("an address"), port);
                for port in [carried, dns] {
                    let outcome = app.tcp(at(port));
                    assert!(
                        matches!(outcome, Outcome::Refused | Outcome::Closed),
                        "{port}: {outcome:?}"
                    );
                }
                assert_eq!(app.udp(at(carried)), Outcome::Silent);
                for transport in ["+notcp", "+tcp"] {
                    let dig = format!(
                        "dig +tries=1 +time=1 {transport} @{address} -p {dns} {NAME} A 2>&1 || true"
                    );
                    let said = user.output(&cgroup, &["sh", "-c", &dig]);
                    assert!(!said.contains("ANSWER"), "{transport}: {said}");
                }
            }
        }
        // Names are written down together: one that had been kept would be there with the next.
        bed.look_up(sb, V6_NAME, "A");
        wait_until("the next name to be written down", || {
            fs::read_to_string(bed.names()).is_ok_and(|text| text.contains(V6_NAME))
        });
        let text = fs::read_to_string(bed.names()).expect("it was written");
        assert!(!text.contains(NAME), "{text}");
    });
}
