//! What the machine forwards, for hosts behind it: the system's `gateway`.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a panic is a failed test"
)]

use std::fs;
use std::net::{IpAddr, SocketAddr};

use cgtproxy_tests::installed::HELPER;
use cgtproxy_tests::sandbox::{
    Connection, Host, MACHINE_V4, MACHINE_V6, Outcome, by, direct, local, proxied, sandbox,
};
use cgtproxy_tests::session::Session;
use cgtproxy_tests::steady::Steady;
use cgtproxy_tests::system::System;
use cgtproxy_tests::wait::wait_until;
use cgtproxy_tests::wire::Transport::{Tcp, Udp};
use serde_json::{Value, json};

fn company() -> Value {
    json!({ "name": "company", "port": 7890 })
}

/// A policy that says something of forwarded packets only.
fn divert(root: &mut Session, interfaces: &[&str], proxy: &Value, bypass: &Value) {
    let policy = json!({
        "proxies": [proxy], "bypass": bypass, "assignments": [],
        "gateway": { "interfaces": interfaces, "proxy": "company" },
    });
    root.call("ReplacePolicy", policy);
}

fn address(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

#[test]
fn what_comes_in_on_a_listed_interface_goes_to_the_proxy() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let proxy = sb.tproxy("company").uid(0).port(7890).start();
        let _own = sb.service("own").port(8080).start();
        let hosts = ["lan0", "lan1", "lan2"].map(|interface| sb.host_behind(interface));
        let apps = hosts.each_ref().map(Host::app);
        for (host, app) in hosts.iter().zip(&apps) {
            sb.expect(app, |to| host.direct(to));
        }
        let bypassed = sb.destinations();
        let mut root = Session::of(&sb.user(0));
        // One of them is not there yet.
        divert(
            &mut root,
            &["lan0", "later", "lan1"],
            &company(),
            &json!(bypassed.map(|to| to.ip())),
        );

        for (host, app) in hosts.iter().zip(&apps).take(2) {
            sb.expect(app, by("company"));
            for to in bypassed {
                assert_eq!(app.tcp(to), host.direct(to));
                assert_eq!(app.udp(to), host.direct(to));
            }
            // A proxy takes TCP and UDP only.
            for to in sb.destinations() {
                assert_eq!(app.ping(to.ip()), host.direct(to));
                assert_eq!(app.raw(132, to.ip()), Outcome::LeftUnanswered);
            }
            // The machine itself.
            for ip in [MACHINE_V4, MACHINE_V6].into_iter().chain(host.gateways()) {
                let at = SocketAddr::new(ip, 8080);
                for transport in [Tcp, Udp] {
                    assert_eq!(app.ask(transport, at), local("own", at), "{transport:?}");
                }
            }
        }
        let sources: Vec<_> = hosts[..2].iter().flat_map(Host::addresses).collect();
        let arrivals = proxy.arrivals();
        for source in &sources {
            assert!(arrivals.iter().any(|a| a.source.ip() == *source));
        }
        assert!(arrivals.iter().all(|a| sources.contains(&a.source.ip())));

        // Neither from an interface that is not listed, nor from the machine.
        sb.expect(&apps[2], |to| hosts[2].direct(to));
        let service = sb.cgroup("system.slice/web.service").app();
        sb.expect(&service, direct);
        // From the moment that an interface has the name.
        let late = sb.host_behind("later");
        sb.expect(&late.app(), by("company"));
    });
}

#[test]
fn a_proxy_on_loopback_addresses_takes_what_is_forwarded() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let _proxy = sb.tproxy("company").uid(0).loopback_port(7890).start();
        let host = sb.host_behind("lan0");
        let app = host.app();
        let mut root = Session::of(&sb.user(0));
        divert(&mut root, &["lan0"], &company(), &json!([]));
        sb.expect(&app, by("company"));
    });
}

#[test]
fn broadcast_and_multicast_are_left_alone() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let proxy = sb.tproxy("company").uid(0).port(7890).start();
        let host = sb.host_behind("lan0");
        let app = host.app();
        let mut root = Session::of(&sb.user(0));
        divert(&mut root, &["lan0"], &company(), &json!([]));
        for to in [
            "10.1.0.255:1900",
            "255.255.255.255:67",
            "224.0.0.251:5353",
            "239.255.255.250:1900",
            "[ff05::1:3]:547",
        ] {
            let to: SocketAddr = to.parse().expect("an address");
            assert_eq!(app.udp(to), Outcome::Silent, "{to}");
        }
        proxy.assert_idle();
        sb.expect(&app, by("company"));
    });
}

#[test]
fn services_behind_the_machine_answer_whom_they_please() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let proxy = sb.tproxy("company").uid(0).port(7890).start();
        let [inner, other] = ["lan0", "lan1"].map(|interface| sb.host_behind(interface));
        let _service = inner.service("inner").port(8080).start();
        let (outside, machine) = (sb.internet_app(), sb.cgroup("system.slice").app());
        let mut root = Session::of(&sb.user(0));
        divert(&mut root, &["lan0"], &company(), &json!([]));
        for ip in inner.addresses() {
            let at = SocketAddr::new(ip, 8080);
            for app in [&outside, &machine, &other.app()] {
                for transport in [Tcp, Udp] {
                    assert_eq!(app.ask(transport, at), local("inner", at), "{transport:?}");
                }
            }
        }
        proxy.assert_idle();
    });
}

#[test]
fn what_the_proxy_does_not_take_goes_direct() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let _proxy = sb.tproxy("company").uid(0).port(7890).start();
        let host = sb.host_behind("lan0");
        let app = host.app();
        let mut root = Session::of(&sb.user(0));
        for bits in 0..16_u8 {
            let [no_tcp, no_udp, no_ipv4, no_ipv6] = [1, 2, 4, 8].map(|bit| bits & bit != 0);
            let proxy = json!({
                "name": "company", "port": 7890,
                "noTcp": no_tcp, "noUdp": no_udp, "noIpv4": no_ipv4, "noIpv6": no_ipv6,
            });
            divert(&mut root, &["lan0"], &proxy, &json!([]));
            sb.expect_each(&app, |transport, to| {
                let left_out = match transport {
                    Tcp => no_tcp,
                    Udp => no_udp,
                } || match to {
                    SocketAddr::V4(_) => no_ipv4,
                    SocketAddr::V6(_) => no_ipv6,
                };
                if left_out {
                    host.direct(to)
                } else {
                    proxied("company", to)
                }
            });
        }
        // UDP that would not come through is refused.
        let proxy = json!({ "name": "company", "port": 7890, "rejectUdp": true });
        divert(&mut root, &["lan0"], &proxy, &json!([]));
        for to in sb.destinations() {
            assert_eq!(app.tcp(to), proxied("company", to));
            assert_eq!(app.udp(to), Outcome::Refused);
            sb.assert_nothing_left_for(to.ip());
        }
    });
}

/// As for what the machine's own applications send.
#[test]
fn only_a_proxy_of_a_trusted_user_gets_it() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let app = sb.host_behind("lan0").app();
        let mut root = Session::of(&sb.user(0));
        divert(&mut root, &["lan0"], &company(), &json!([]));
        let refused = || {
            for to in sb.destinations() {
                assert_eq!(app.tcp(to), Outcome::Refused);
                let outcome = app.udp(to);
                // Linux sends no ICMP error from an IPv4 address that is not its own.
                assert!(
                    matches!(outcome, Outcome::Refused | Outcome::Silent),
                    "{outcome:?}"
                );
                sb.assert_nothing_left_for(to.ip());
            }
        };
        refused();
        let stranger = sb.tproxy("stranger").uid(1001).port(7890).start();
        refused();
        stranger.assert_idle();
        drop(stranger);
        let _proxy = sb.tproxy("company").uid(990).port(7890).start();
        sb.expect(&app, by("company"));
    });
}

#[track_caller]
fn go_on(connections: &[(SocketAddr, Connection)], outcome: impl Fn(SocketAddr) -> Outcome) {
    for (to, connection) in connections {
        assert_eq!(connection.ask(), outcome(*to), "{to}");
    }
}

#[test]
fn open_connections_go_on_as_they_began() {
    sandbox(|sb| {
        let _helper = sb.helper().config("grace-seconds: 0").start();
        let _proxy = sb.tproxy("company").uid(0).port(7890).start();
        let host = sb.host_behind("lan0");
        let app = host.app();
        let direct = |to| host.direct(to);
        let by_company = |to| proxied("company", to);
        let mut root = Session::of(&sb.user(0));

        let before = sb.open(&app);
        go_on(&before, direct);
        divert(&mut root, &["lan0"], &company(), &json!([]));
        go_on(&before, direct);
        let during = sb.open(&app);
        go_on(&during, by_company);
        // Bypassed only since then.
        divert(
            &mut root,
            &["lan0"],
            &company(),
            &json!(["0.0.0.0/0", "::/0"]),
        );
        go_on(&during, by_company);
        // Another interface in place of this one, then none.
        divert(&mut root, &["lan1"], &company(), &json!([]));
        go_on(&during, by_company);
        sb.expect(&app, |to| host.direct(to));
        root.replace(json!([company()]), json!([]), json!([]));
        go_on(&during, by_company);
        go_on(&before, direct);
        sb.expect(&app, |to| host.direct(to));

        // The proxy is gone: its connections end, and never go on directly.
        root.call("RemovePolicy", json!({}));
        go_on(&before, direct);
        for (to, connection) in &during {
            let outcome = connection.ask();
            assert!(
                matches!(outcome, Outcome::Refused | Outcome::Closed),
                "{to}: {outcome:?}"
            );
            sb.assert_nothing_left_for(to.ip());
        }
    });
}

/// As for the machine's own applications.
#[test]
fn a_forwarded_connection_outlives_what_belongs_to_none() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let _proxy = sb.tproxy("company").uid(0).port(7890).start();
        let app = sb.host_behind("lan0").app();
        let mut root = Session::of(&sb.user(0));
        divert(&mut root, &["lan0"], &company(), &json!([]));
        sb.assert_connections_outlive_what_belongs_to_none(&app, "company");
    });
}

/// As for what the machine's own applications answer.
#[test]
fn answers_to_whom_the_proxy_has_brought_go_to_the_proxy() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let proxy = sb.tproxy("company").uid(0).port(7890).start();
        let app = sb.host_behind("lan0").app();
        let mut root = Session::of(&sb.user(0));
        divert(&mut root, &["lan0"], &company(), &json!([]));
        let answers = |to: SocketAddr| {
            let peer = app.open_udp(to);
            proxy.speak_first(to, peer.local());
            for _ in 0..2 {
                assert_eq!(peer.ask(), proxied("company", to));
                proxy.speak_first(to, peer.local());
            }
            sb.assert_nothing_left_for(to.ip());
        };
        for to in sb.destinations() {
            answers(to);
            let [udp, tcp] = [app.open_udp(to), app.open_tcp(to).expect("it is let out")];
            for connection in [&udp, &tcp] {
                assert_eq!(connection.ask(), proxied("company", to));
            }
            sb.forget_connections();
            proxy.speak_first(to, udp.local());
            proxy.speak_up();
            for connection in [&udp, &tcp] {
                assert_eq!(connection.ask(), proxied("company", to));
            }
            sb.assert_nothing_left_for(to.ip());
        }
        // They do not leave when the interface is not listed any more.
        let to = sb.destinations()[1];
        let peer = app.open_udp(to);
        proxy.speak_first(to, peer.local());
        divert(&mut root, &["lan1"], &company(), &json!([]));
        assert_eq!(peer.ask(), Outcome::Refused);
        sb.assert_nothing_left_for(to.ip());
        // As wg-quick has it.
        divert(&mut root, &["lan0"], &company(), &json!([]));
        sb.nft(
            "table inet wg-quick-wg0 { chain premangle { \
             type filter hook prerouting priority mangle; meta mark set ct mark; }; }",
        );
        for to in sb.destinations() {
            answers(to);
        }
    });
}

/// What comes in on an interface may have routes of its own.
#[test]
fn routes_of_an_interface_lead_nothing_past_the_proxy() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let proxy = sb.tproxy("company").uid(0).port(7890).start();
        let host = sb.host_behind("lan0");
        let app = host.app();
        let mut root = Session::of(&sb.user(0));
        sb.ip6("rule add iif lan0 priority 1000 lookup 100");
        sb.ip6("route add default via 2001:db8::2 dev uplink table 100");
        sb.ip6("route del default via 2001:db8::2 dev uplink");
        sb.expect(&app, |to| host.direct(to));
        divert(&mut root, &["lan0"], &company(), &json!([]));
        let check = || {
            sb.expect(&app, by("company"));
            let [_, to] = sb.destinations();
            let peer = app.open_udp(to);
            proxy.speak_first(to, peer.local());
            assert_eq!(peer.ask(), proxied("company", to));
            sb.assert_nothing_left_for(to.ip());
        };
        check();
        sb.ip6("route add unreachable default");
        check();
    });
}

#[test]
fn it_outlives_the_helper_is_restored_and_ends_with_the_session() {
    sandbox(|sb| {
        let helper = |grace: u8| {
            let config = format!("own-table: false\ngrace-seconds: {grace}");
            sb.helper().config(&config).start()
        };
        let mut patient = helper(100);
        let _proxy = sb.tproxy("company").uid(0).port(7890).start();
        let host = sb.host_behind("lan0");
        let app = host.app();
        let mut root = Session::of(&sb.user(0));
        divert(&mut root, &["lan0"], &company(), &json!([]));
        let connections = sb.open(&app);
        let check = || {
            sb.expect(&app, by("company"));
            go_on(&connections, |to| proxied("company", to));
        };
        check();
        sb.nft("flush ruleset");
        wait_until("the table to be back", || sb.has_table());
        check();
        patient.kill();
        check();
        patient.start_again();
        check();
        let mut root = Session::of(&sb.user(0));
        divert(&mut root, &["lan0"], &company(), &json!([]));
        check();
        drop(root);
        patient.kill();
        let _impatient = helper(1);
        wait_until("the policy's end", || {
            !sb.chains().iter().any(|chain| chain == "divert-0-company")
        });
        sb.expect(&app, |to| host.direct(to));
    });
}

#[test]
fn a_strict_reverse_path_filter_lets_it_in() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let _proxy = sb.tproxy("company").uid(0).port(7890).start();
        let app = sb.host_behind("lan0").app();
        let mut root = Session::of(&sb.user(0));
        divert(&mut root, &["lan0"], &company(), &json!([]));
        let set = |file: &str, value: u8| {
            let script =
                format!("for c in /proc/sys/net/ipv4/conf/*; do echo {value} > $c/{file}; done");
            sb.run(&["sh", "-ec", &script]);
        };
        set("rp_filter", 1);
        sb.expect(&app, by("company"));
        // With which wg-quick has the mark looked at on the way back as well: the kernel finds the sender
        // of an IPv4 packet on this machine then, and drops it as impossible. Nothing goes out.
        set("src_valid_mark", 1);
        let [v4, v6] = sb.destinations();
        assert_eq!(app.tcp(v6), proxied("company", v6));
        assert_eq!(app.tcp(v4), Outcome::Silent);
        sb.assert_nothing_left_for(v4.ip());
    });
}

/// As docs/configuration.md has it.
#[test]
fn a_firewall_lets_in_what_has_the_divert_bit() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let _proxy = sb.tproxy("company").uid(0).port(7890).start();
        let app = sb.host_behind("lan0").app();
        let mut root = Session::of(&sb.user(0));
        divert(&mut root, &["lan0"], &company(), &json!([]));
        sb.nft(
            "table inet firewall {
                 chain input {
                     type filter hook input priority filter; policy drop;
                     iif lo accept
                     meta l4proto { icmp, icmpv6 } accept
                 }
             }",
        );
        for to in sb.destinations() {
            assert_eq!(app.tcp(to), Outcome::Silent);
            assert_eq!(app.udp(to), Outcome::Silent);
            sb.assert_nothing_left_for(to.ip());
        }
        sb.nft("add rule inet firewall input meta mark & 0x80000000 != 0 accept");
        sb.expect(&app, by("company"));
    });
}

#[test]
fn queries_go_to_a_server_that_is_not_on_the_loopback_interface() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let _proxy = sb.tproxy("company").uid(0).port(7890).start();
        let _dns = sb.service("dns").port(5353).start();
        let host = sb.host_behind("lan0");
        let app = host.app();
        let mut root = Session::of(&sb.user(0));
        let mut hijack = |v4: IpAddr, v6: IpAddr, port: u16| {
            let proxy = json!({
                "name": "company", "port": 7890, "noUdp": true,
                "dnsHijack": { "ipv4": v4, "ipv6": v6, "port": port, "tcp": true },
            });
            divert(&mut root, &["lan0"], &proxy, &json!(["0.0.0.0/0", "::/0"]));
        };
        let queries = |answered: &dyn Fn(SocketAddr) -> Outcome| {
            for to in sb.destinations() {
                let to = SocketAddr::new(to.ip(), 53);
                for transport in [Tcp, Udp] {
                    assert_eq!(app.ask(transport, to), answered(to), "{transport:?} {to}");
                }
            }
        };
        // On this machine.
        let [v4, v6] = host.gateways();
        hijack(v4, v6, 5353);
        let here = |to: SocketAddr| {
            let ip = if to.is_ipv4() { v4 } else { v6 };
            local("dns", SocketAddr::new(ip, 5353))
        };
        queries(&here);
        // What is asked of this machine itself is not forwarded.
        for ip in host.gateways() {
            let to = SocketAddr::new(ip, 53);
            let _stub = sb.service("stub").at(to).start();
            for transport in [Tcp, Udp] {
                assert_eq!(app.ask(transport, to), local("stub", to), "{transport:?}");
            }
        }
        sb.expect(&app, |to| host.direct(to));
        // Elsewhere.
        let [v4, v6] = sb.destinations().map(|to| to.ip());
        hijack(v4, v6, 9999);
        queries(&|to| Outcome::Redirected {
            to: SocketAddr::new(if to.is_ipv4() { v4 } else { v6 }, 9999),
        });
        // Nothing from elsewhere gets to a loopback address: queries are packets like others.
        hijack(address("127.0.0.1"), address("::1"), 5353);
        queries(&|to| host.direct(to));
    });
}

/// Its port is anybody's then, as for queries of the machine's own.
#[test]
fn a_conversation_with_a_server_ends_with_its_hijack() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let _proxy = sb.tproxy("company").uid(0).port(7890).start();
        let dns = sb.service("dns").port(5353).start();
        let host = sb.host_behind("lan0");
        let app = host.app();
        let [v4, v6] = host.gateways();
        let mut root = Session::of(&sb.user(0));
        let mut hijack = |port: u16| {
            let hijack = json!({ "ipv4": v4, "ipv6": v6, "port": port });
            let proxy = json!({ "name": "company", "port": 7890, "dnsHijack": hijack });
            divert(&mut root, &["lan0"], &proxy, &json!([]));
        };
        hijack(5353);
        let flows = sb.destinations().map(|to| {
            let flow = app.open_udp(SocketAddr::new(to.ip(), 53));
            let server = SocketAddr::new(if to.is_ipv4() { v4 } else { v6 }, 5353);
            assert_eq!(flow.ask(), local("dns", server));
            flow
        });
        hijack(5354);
        drop(dns);
        let user = sb.user(1002);
        let evil = sb.service("evil").uid(1002);
        let evil = evil
            .cgroup(&user.cgroup("app.slice/evil.service"))
            .port(5353)
            .start();
        for flow in &flows {
            assert_eq!(flow.ask(), Outcome::Refused);
        }
        evil.assert_idle();
    });
}

/// As container engines make them.
#[test]
fn hosts_on_a_bridge_speak_to_each_other_undisturbed() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let proxy = sb.tproxy("company").uid(0).port(7890).start();
        let hosts: [Host; 2] = sb.hosts_on_bridge("br0");
        let apps = hosts.each_ref().map(Host::app);
        let _peer = hosts[1].service("peer").port(8080).start();
        let call = |value: u8| {
            let script = format!(
                "cd /proc/sys/net/bridge; for f in ip ip6; do \
                 echo {value} > bridge-nf-call-${{f}}tables; done"
            );
            sb.run(&["sh", "-ec", &script]);
        };
        let peers = || {
            for ip in hosts[1].addresses() {
                let at = SocketAddr::new(ip, 8080);
                for transport in [Tcp, Udp] {
                    assert_eq!(
                        apps[0].ask(transport, at),
                        local("peer", at),
                        "{transport:?}"
                    );
                }
            }
        };
        let mut root = Session::of(&sb.user(0));
        divert(&mut root, &["br0"], &company(), &json!([]));
        call(0);
        peers();
        proxy.assert_idle();
        for app in &apps {
            sb.expect(app, by("company"));
        }
        // br_netfilter has bridged packets pass rules for routed ones, and a packet that was there loses the
        // socket it was given before it is routed. Bypassed packets are left alone, others get nowhere.
        call(1);
        divert(
            &mut root,
            &["br0"],
            &company(),
            &json!(["10.0.0.0/8", "2001:db8:ff::/48"]),
        );
        peers();
        let before = proxy.arrivals().len();
        for to in sb.destinations() {
            assert_eq!(apps[0].tcp(to), Outcome::Refused);
            sb.assert_nothing_left_for(to.ip());
        }
        assert_eq!(proxy.arrivals().len(), before);
        call(0);
        sb.expect(&apps[0], by("company"));
    });
}

/// Root's agent and the helper as their units run them, with nothing but the machine's file to go by.
#[test]
fn the_machines_file_says_what_is_diverted() {
    const FILE: &str = "/etc/cgtproxy/config.yaml";
    const AGENT: &str = "cgtproxy-agent-system.service";
    sandbox(|sb| {
        let config = |interfaces: &str, port: u16| {
            format!(
                "version: 1\ntproxies: {{company: {{port: {port}}}}}\nrules: []\n\
                 gateway: {{interfaces: [{interfaces}], tproxy: company}}\n"
            )
        };
        let system = System::builder(sb)
            .install_project()
            .install(|root| {
                let file = root.join(&FILE[1..]);
                fs::create_dir_all(file.parent().expect("a file")).expect("the overlay is ours");
                fs::write(file, config("lan0", 7890)).expect("the overlay is ours");
            })
            .boot();
        let write = |text: &str| {
            let script = "printf %s \"$1\" >\"$2.new\" && mv \"$2.new\" \"$2\"";
            system.run(&["sh", "-c", script, "sh", text, FILE]);
        };
        let _first = sb.tproxy("company").uid(0).port(7890).start();
        let _second = sb.tproxy("other").uid(0).port(7891).start();
        let hosts = ["lan0", "lan1"].map(|interface| sb.host_behind(interface));
        let [lan0, lan1] = hosts.each_ref().map(Host::app);
        sb.expect(&lan0, |to| hosts[0].direct(to));
        system.run(&[
            "systemctl",
            "enable",
            "--now",
            "cgtproxy-helper.socket",
            AGENT,
        ]);

        sb.expect(&lan0, by("company"));
        sb.expect(&lan1, |to| hosts[1].direct(to));
        let service = system.app(&["systemd-run", "--quiet", "--collect", "--pipe", "--wait"]);
        sb.expect(&service, direct);
        // Both daemons anew, one after the other: no packet of a host's goes direct.
        let open = sb.open(&lan0);
        let traffic = Steady::start(sb, &lan0);
        for unit in [AGENT, HELPER] {
            for disrupt in [&["restart"][..], &["kill", "--signal=KILL"]] {
                let main = || system.property(unit, "MainPID");
                let before = main();
                let disruption = [&["systemctl"], disrupt, &[unit]].concat();
                system.run(&disruption);
                sb.expect(&lan0, by("company"));
                wait_until("another process has taken its place", || {
                    let now = main();
                    now != before && now != "0"
                });
                sb.expect(&lan0, by("company"));
                go_on(&open, |to| proxied("company", to));
                traffic.assert_proxied("company");
                traffic.assert_none_strayed(sb, &["company"]);
            }
        }
        drop(traffic);
        // The file edited: the other interface, and another port.
        write(&config("lan1", 7891));
        system.run(&["systemctl", "reload", AGENT]);
        let interfaces = || sb.run(&["nft", "list", "set", "inet", "cgtproxy", "interfaces"]);
        wait_until("the other interface", || interfaces().contains("lan1"));
        sb.expect(&lan0, |to| hosts[0].direct(to));
        sb.expect(&lan1, by("other"));
        // A file that is wrong changes nothing, and is said to be.
        write(&config("lan0, lan0/1", 7890));
        wait_until("it says what is wrong", || {
            system.journal(AGENT).contains("config.yaml:4:")
        });
        sb.expect(&lan0, |to| hosts[0].direct(to));
        sb.expect(&lan1, by("other"));
        system.run(&["systemctl", "stop", AGENT]);
        sb.expect(&lan1, |to| hosts[1].direct(to));
    });
}
