//! Every check, with facts of a machine on which nothing is wrong and with each thing that can be.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use cgtproxy_proto::HELPER_SOCKET;
use cgtproxy_proto::agent::{Awaited, ControlGroup, GetStatus_Reply as AgentStatus};
use cgtproxy_proto::helper::{
    Diagnose_Reply, GetStatus_Reply as HelperStatus, GetStatus_Reply_session, MarkWriter,
};
use cgtproxy_proto::relay::{GetStatus_Reply as RelayStatus, UpstreamStatus};

use super::all;
use crate::config::Scope;
use crate::doctor::facts::*;
use crate::doctor::{Finding, Group, Severity, report};

const MANAGER: &str = "/user.slice/user-1000.slice/user@1000.service";

fn helper_status() -> HelperStatus {
    HelperStatus {
        version: "1".into(),
        session: GetStatus_Reply_session::active,
        generation: 1,
        proxies: Vec::new(),
        controlGroups: 1,
        ipv6: true,
        tableOwned: true,
        proxyUids: vec![990],
        systemPolicy: Default::default(),
    }
}

fn diagnosis() -> Diagnose_Reply {
    Diagnose_Reply {
        markMask: 0xff00_0000,
        divertBit: 0x8000_0000,
        routeTable: 25447,
        rulePriority: 800,
        missingFeatures: Vec::new(),
        markWriters: Some(Vec::new()),
    }
}

fn agent_status() -> AgentStatus {
    AgentStatus {
        version: "1".into(),
        connected: true,
        problem: None,
        awaits: None,
        generation: 1,
        config: Some("/c".into()),
        configError: None,
        monitors: None,
        monitorProblem: None,
        targets: Vec::new(),
        controlGroups: Vec::new(),
        rules: None,
    }
}

fn relay_status() -> RelayStatus {
    RelayStatus {
        version: "1".into(),
        limit: 100,
        upstreams: vec![UpstreamStatus {
            name: "there".into(),
            port: 40000,
            connections: 1,
            flows: 1,
            total: 7,
            problem: None,
            udpProblem: None,
        }],
    }
}

fn send_the_proxy_through_itself(facts: &mut Facts) {
    agent(facts).controlGroups = vec![ControlGroup {
        path: format!("{MANAGER}/app.slice/mihomo.service"),
        target: "mihomo".into(),
        rule: Some(1),
        inheritedFrom: None,
        execSlice: false,
        inForce: true,
        skipped: None,
        relay: None,
    }];
}

fn relay(facts: &mut Facts) -> &mut RelayStatus {
    facts.relay.as_mut().unwrap().as_mut().unwrap()
}

fn proxy() -> Proxy {
    Proxy {
        name: "mihomo".into(),
        server: Server::Tproxy(7890),
        tcp: true,
        udp: true,
        ipv4: true,
        ipv6: true,
        dns: Some(Dns {
            ipv4: Some(Ipv4Addr::LOCALHOST),
            ipv6: None,
            port: 1053,
            tcp: false,
        }),
    }
}

/// Connections are redirected to the one proxy.
fn redirect(facts: &mut Facts) {
    facts.config = ConfigState::Read(vec![Proxy {
        server: Server::Redirect(7890),
        ..proxy()
    }]);
}

/// The relay carries them on.
fn relayed(fake_dns: bool) -> Proxy {
    Proxy {
        server: Server::Relay {
            fake_dns,
            here: None,
        },
        dns: None,
        ..proxy()
    }
}

/// They are on this machine.
fn relayed_here(ipv4: Option<Ipv4Addr>, ipv6: Option<Ipv6Addr>) -> Proxy {
    Proxy {
        name: "there".into(),
        server: Server::Relay {
            fake_dns: false,
            here: Some(Here {
                ipv4,
                ipv6,
                port: 7890,
            }),
        },
        ..relayed(false)
    }
}

fn listener(transport: Transport, address: impl Into<IpAddr>, port: u16) -> Listener {
    Listener {
        transport,
        address: address.into(),
        port,
        uid: 1000,
        only_v6: false,
        transparent: Some(true),
        control_group: Some(7),
    }
}

fn our_rule(ipv6: bool) -> Rule {
    Rule {
        ipv6,
        priority: 800,
        mark: Some((0x8000_0000, 0x8000_0000)),
        table: Some(25447),
        ..Rule::default()
    }
}

/// A desktop on which everything is as it should be.
fn fine() -> Facts {
    let system_rules = [(0, 255), (32766, 254)].map(|(priority, table)| Rule {
        priority,
        table: Some(table),
        ..Rule::default()
    });
    let mut rules = vec![our_rule(false), our_rule(true)];
    rules.extend(system_rules);
    Facts {
        scope: Scope::User,
        uid: 1000,
        version: "1",
        helper_socket: "/run/cgtproxy/helper.sock".into(),
        helper: Helper::Answers(Box::new(helper_status()), Ok(diagnosis())),
        agent: Agent::Answers(Box::new(agent_status())),
        relay: Some(Ok(relay_status())),
        config_file: "/home/a/.config/cgtproxy/config.yaml".into(),
        config_named: false,
        config: ConfigState::Read(vec![proxy()]),
        gateway: None,
        hierarchy: Hierarchy::Unified,
        manager: Manager {
            path: MANAGER.into(),
            owner: Ok(Some(1000)),
            groups: Ok(vec![
                (1, MANAGER.into()),
                (7, format!("{MANAGER}/app.slice/mihomo.service")),
                (8, format!("{MANAGER}/app.slice/app-firefox-1.scope")),
            ]),
        },
        session: Session {
            desktop: Some("GNOME".into()),
            graphical: 2,
        },
        inotify: Ok(Inotify {
            watches: 65536,
            instances: 128,
        }),
        listeners: Ok(vec![
            listener(Transport::Tcp, Ipv6Addr::UNSPECIFIED, 7890),
            listener(Transport::Udp, Ipv6Addr::UNSPECIFIED, 7890),
            listener(Transport::Udp, Ipv4Addr::LOCALHOST, 1053),
        ]),
        rules: Ok(rules),
        routing_tables: Ok(vec![(Family::Ipv4, 25447), (Family::Ipv6, 25447)]),
        network: Network {
            ipv4_route: Ok(true),
            ipv6: true,
            ipv6_route: Ok(true),
            ipv6_off_on_lo: Ok(false),
            ipv6_off: Ok(false),
            bridge_filter: false,
        },
        system: System {
            linux: Ok((6, 12)),
            v1_network_controllers: Ok(Vec::new()),
            nsswitch: Ok("passwd: files\nhosts: files myhostname dns\n".into()),
            resolved: true,
            nscd: false,
            networkd: Ok(true),
            networkd_removes_rules: Ok(false),
            original: Ok(false),
        },
    }
}

/// Changes one thing about the machine.
type Break = fn(&mut Facts);

fn helper(facts: &mut Facts) -> (&mut HelperStatus, &mut Diagnose_Reply) {
    match &mut facts.helper {
        Helper::Answers(status, Ok(diagnosis)) => (status, diagnosis),
        _ => panic!("it answers"),
    }
}

fn agent(facts: &mut Facts) -> &mut AgentStatus {
    match &mut facts.agent {
        Agent::Answers(status) => status,
        _ => panic!("it answers"),
    }
}

fn listeners(facts: &mut Facts) -> &mut Vec<Listener> {
    facts.listeners.as_mut().unwrap()
}

fn add_rule(facts: &mut Facts, rule: Rule) {
    facts.rules.as_mut().unwrap().push(rule);
}

/// The system policy diverts what comes in over a bridge to the one proxy.
fn gateway(facts: &mut Facts) -> &mut Gateway {
    facts.scope = Scope::System;
    facts.gateway.insert(Gateway {
        proxy: proxy().name,
        forwarding_off: Ok(Vec::new()),
        src_valid_mark: Ok(Vec::new()),
        bridges: vec!["br0".into()],
    })
}

/// What can be wrong, by the finding that says so.
const BROKEN: &[(&str, Severity, Break)] = {
    use Severity::{Error, Note, Warning};
    &[
        ("helper-missing", Error, |f| f.helper = Helper::Missing),
        ("helper-dead", Error, |f| f.helper = Helper::Dead),
        ("helper-forbidden", Error, |f| {
            f.helper = Helper::Forbidden { in_sight: true };
        }),
        ("helper-unreachable", Error, |f| {
            f.helper = Helper::Unreachable("no".into());
        }),
        ("helper-refuses", Error, |f| {
            f.helper = Helper::Refuses("org.cgtproxy.Helper.TooManyConnections".into(), "x".into());
        }),
        ("helper-refuses", Error, |f| {
            f.helper = Helper::Refuses("org.varlink.service.PermissionDenied".into(), "x".into());
        }),
        ("helper-version", Warning, |f| {
            helper(f).0.version = "2".into()
        }),
        ("original-runs", Error, |f| f.system.original = Ok(true)),
        ("agent-not-running", Error, |f| {
            helper(f).0.session = GetStatus_Reply_session::none;
            f.agent = Agent::NotRunning;
        }),
        ("agent-unreachable", Error, |f| f.agent = Agent::NotRunning),
        ("agent-unreachable", Error, |f| {
            f.agent = Agent::Unreachable("no".into());
        }),
        ("agent-unreachable", Error, |f| f.agent = Agent::Full(64)),
        ("agent-version", Warning, |f| agent(f).version = "2".into()),
        ("agent-disconnected", Error, |f| agent(f).connected = false),
        ("agent-refused", Error, |f| {
            agent(f).problem = Some("TooManyProxies".into())
        }),
        ("config-not-in-force", Error, |f| {
            agent(f).configError = Some("c:1:1: what is this".into());
        }),
        ("config-wrong", Error, |f| {
            f.config = ConfigState::Wrong("c:1:1".into())
        }),
        ("config-missing", Note, |f| f.config = ConfigState::Missing),
        ("cgroup-hybrid", Note, |f| f.hierarchy = Hierarchy::Hybrid),
        ("cgroup-missing", Error, |f| f.hierarchy = Hierarchy::None),
        ("manager-missing", Error, |f| f.manager.owner = Ok(None)),
        ("manager-not-yours", Error, |f| {
            f.manager.owner = Ok(Some(0))
        }),
        ("no-app-scopes", Warning, |f| {
            f.manager.groups = Ok(vec![(1, MANAGER.into())]);
        }),
        ("inotify-watches", Warning, |f| {
            f.inotify.as_mut().unwrap().watches = 60
        }),
        ("inotify-instances", Warning, |f| {
            f.inotify.as_mut().unwrap().instances = 2;
        }),
        ("kernel-feature", Error, |f| {
            helper(f).1.missingFeatures = vec!["tproxy".into(), "fib".into(), "dnat".into()];
        }),
        ("kernel-feature", Error, |f| {
            f.config = ConfigState::Read(vec![relayed(false)]);
            helper(f).1.missingFeatures = vec!["ctnetlink".into()];
        }),
        ("net-cls", Warning, |f| {
            f.system.linux = Ok((5, 14));
            f.system.v1_network_controllers = Ok(vec!["net_cls".into()]);
        }),
        ("table-not-protected", Note, |f| {
            helper(f).0.tableOwned = false
        }),
        ("kernel-no-ipv6", Note, |f| {
            helper(f).0.ipv6 = false;
            f.network.ipv6 = false;
        }),
        ("rule-missing", Error, |f| {
            f.rules = Ok(vec![our_rule(true)])
        }),
        ("rule-missing", Error, |f| {
            f.rules = Ok(vec![our_rule(false)])
        }),
        ("route-missing", Error, |f| {
            f.routing_tables = Ok(vec![(Family::Ipv4, 25447), (Family::Ipv6, 254)]);
        }),
        ("rule-before", Error, |f| {
            add_rule(
                f,
                Rule {
                    priority: 100,
                    table: Some(51820),
                    ..Rule::default()
                },
            );
        }),
        ("rule-before", Error, |f| {
            // WireGuard's, but earlier than it puts it.
            let mark = Some((0xca6c, u32::MAX));
            let rule = Rule {
                priority: 100,
                inverted: true,
                mark,
                table: Some(51820),
                ..Rule::default()
            };
            add_rule(f, rule);
        }),
        ("rule-before", Error, |f| {
            // A mask of somebody else's bits, which a diverted packet may have or not.
            let rule = Rule {
                priority: 10,
                inverted: true,
                mark: Some((0x8888, 0xffff)),
                table: Some(1000),
                ..Rule::default()
            };
            add_rule(f, rule);
        }),
        ("ipv6-off-on-lo", Error, |f| {
            f.network.ipv6_off_on_lo = Ok(true)
        }),
        ("ipv6-off", Note, |f| f.network.ipv6_off = Ok(true)),
        ("no-route", Note, |f| f.network.ipv6_route = Ok(false)),
        ("no-route", Note, |f| f.network.ipv4_route = Ok(false)),
        ("networkd-rules", Warning, |f| {
            f.system.networkd_removes_rules = Ok(true)
        }),
        ("bridge-filter", Note, |f| f.network.bridge_filter = true),
        ("gateway-forwarding", Warning, |f| {
            gateway(f).forwarding_off = Ok(vec!["net.ipv4.ip_forward".into()]);
        }),
        ("gateway-forwarding", Warning, |f| {
            gateway(f).forwarding_off = Ok(vec!["net.ipv6.conf.all.forwarding".into()]);
        }),
        ("gateway-src-valid-mark", Error, |f| {
            gateway(f).src_valid_mark = Ok(vec!["net.ipv4.conf.all.src_valid_mark".into()]);
        }),
        ("gateway-bridge", Error, |f| {
            gateway(f);
            f.network.bridge_filter = true;
        }),
        ("marks-changed", Warning, |f| {
            let writer = MarkWriter {
                table: "ip mangle".into(),
                bits: 0xff00_0000,
            };
            helper(f).1.markWriters = Some(vec![writer]);
        }),
        ("marks-in-rule", Warning, |f| {
            let mark = Some((0x8000_0000, 0xff00_0000));
            add_rule(
                f,
                Rule {
                    priority: 5000,
                    mark,
                    table: Some(100),
                    ..Rule::default()
                },
            );
        }),
        ("proxy-not-listening", Error, |f| {
            listeners(f).retain(|l| l.port != 7890)
        }),
        ("proxy-incomplete", Error, |f| {
            listeners(f)[1].address = Ipv4Addr::UNSPECIFIED.into()
        }),
        ("proxy-incomplete", Error, |f| {
            listeners(f)[0].only_v6 = true
        }),
        ("proxy-address", Error, |f| {
            let address: IpAddr = "192.168.1.2".parse().unwrap();
            listeners(f)[0].address = address;
            listeners(f)[1].address = address;
        }),
        ("proxy-user", Error, |f| listeners(f)[0].uid = 991),
        ("proxy-not-transparent", Error, |f| {
            listeners(f)[1].transparent = Some(false)
        }),
        ("proxy-not-listening", Error, |f| {
            redirect(f);
            listeners(f).retain(|l| l.port != 7890)
        }),
        ("proxy-incomplete", Error, |f| {
            redirect(f);
            listeners(f).retain(|l| l.transport != Transport::Udp || l.port != 7890)
        }),
        ("proxy-elsewhere", Error, |f| {
            redirect(f);
            listeners(f)[1].control_group = Some(9);
        }),
        ("dns-not-listening", Error, |f| {
            redirect(f);
            listeners(f).retain(|l| l.port != 1053)
        }),
        ("proxy-loop", Error, send_the_proxy_through_itself),
        ("proxy-loop", Error, |f| {
            f.config = ConfigState::Read(vec![relayed_here(Some(Ipv4Addr::LOCALHOST), None)]);
            send_the_proxy_through_itself(f);
            agent(f).controlGroups[0].target = "there".into();
        }),
        ("upstream-not-listening", Error, |f| {
            f.config = ConfigState::Read(vec![relayed_here(Some(Ipv4Addr::LOCALHOST), None)]);
            // Another transport, and another address.
            listeners(f)[0].address = Ipv6Addr::LOCALHOST.into();
        }),
        ("upstream-not-listening", Error, |f| {
            f.config = ConfigState::Read(vec![relayed_here(None, Some(Ipv6Addr::LOCALHOST))]);
            listeners(f)[0].address = Ipv4Addr::UNSPECIFIED.into();
        }),
        ("relay-missing", Error, |f| {
            f.relay = Some(Err("no relay listens".into()));
        }),
        ("relay-version", Warning, |f| relay(f).version = "0".into()),
        ("relay-full", Warning, |f| {
            relay(f).upstreams[0].connections = 100
        }),
        ("relay-full", Warning, |f| {
            let mut other = relay(f).upstreams[0].clone();
            other.name = "elsewhere".into();
            (other.flows, relay(f).upstreams[0].flows) = (60, 40);
            relay(f).upstreams.push(other);
        }),
        ("upstream-down", Error, |f| {
            relay(f).upstreams[0].problem = Some("Connection refused".into());
        }),
        ("upstream-no-udp", Note, |f| {
            relay(f).upstreams[0].udpProblem = Some("it does not support this command".into());
        }),
        ("dns-not-listening", Error, |f| {
            listeners(f).retain(|l| l.port != 1053)
        }),
        ("nss-resolve", Warning, |f| {
            f.system.nsswitch = Ok("hosts: mymachines resolve [!UNAVAIL=return] files dns".into());
        }),
        ("nss-resolve", Warning, |f| {
            f.config = ConfigState::Read(vec![relayed(true)]);
            f.system.nsswitch = Ok("hosts: resolve dns".into());
        }),
        ("nscd", Warning, |f| f.system.nscd = true),
    ]
};

/// What does no harm, though it looks as if it could.
const HARMLESS: &[(&str, Break)] = &[
    ("connections and flows, each below the limit", |f| {
        relay(f).upstreams[0].connections = 99;
        relay(f).upstreams[0].flows = 99;
    }),
    ("a proxy of root's", |f| listeners(f)[0].uid = 0),
    ("a proxy that the administrator allows", |f| {
        listeners(f)[0].uid = 990
    }),
    ("a kernel that does not say what is transparent", |f| {
        listeners(f)[0].transparent = None
    }),
    ("a server for redirected connections", |f| {
        redirect(f);
        for listener in listeners(f) {
            // It need not be transparent, and a user who is not known may have it, as in a namespace of its own.
            listener.transparent = Some(false);
            listener.uid = 991;
        }
    }),
    (
        "a kernel that does not say whose control group it is",
        |f| {
            redirect(f);
            for listener in listeners(f) {
                listener.control_group = None;
            }
        },
    ),
    (
        "a server for all addresses beside the one that is meant",
        |f| {
            redirect(f);
            for transport in [Transport::Tcp, Transport::Udp] {
                let ipv4 = listener(transport, Ipv4Addr::LOCALHOST, 7890);
                let ipv6 = listener(transport, Ipv6Addr::LOCALHOST, 7890);
                listeners(f).extend([ipv4, ipv6]);
            }
            for other in listeners(f) {
                if other.address.is_unspecified() {
                    other.control_group = Some(9);
                }
            }
        },
    ),
    (
        "a server of the machine's own for redirected connections",
        |f| {
            redirect(f);
            f.scope = Scope::System;
            for listener in listeners(f) {
                listener.control_group = Some(9);
            }
        },
    ),
    ("a proxy elsewhere, of which nobody listens here", |f| {
        f.config = ConfigState::Read(vec![relayed(true)]);
        listeners(f).clear();
    }),
    ("a proxy here that goes through another", |f| {
        f.config = ConfigState::Read(vec![relayed_here(Some(Ipv4Addr::LOCALHOST), None)]);
        send_the_proxy_through_itself(f);
    }),
    ("a proxy on one of the addresses of localhost", |f| {
        let (ipv4, ipv6) = (Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST);
        f.config = ConfigState::Read(vec![relayed_here(Some(ipv4), Some(ipv6))]);
        listeners(f)[0].address = ipv6.into();
    }),
    ("nss-resolve where the relay answers no queries", |f| {
        f.config = ConfigState::Read(vec![relayed(false)]);
        f.system.nsswitch = Ok("hosts: resolve dns".into());
        f.system.nscd = true;
    }),
    ("nss-resolve without resolved", |f| {
        f.system.nsswitch = Ok("hosts: resolve dns".into());
        f.system.resolved = false;
    }),
    ("resolve in a comment", |f| {
        f.system.nsswitch = Ok("hosts: dns # resolve".into())
    }),
    ("net_cls on a new kernel", |f| {
        f.system.v1_network_controllers = Ok(vec!["net_cls".into()]);
    }),
    ("networkd that does not run", |f| {
        f.system.networkd = Ok(false);
        f.system.networkd_removes_rules = Ok(true);
    }),
    ("no desktop", |f| {
        f.session.desktop = None;
        f.manager.groups = Ok(vec![(1, MANAGER.into())]);
    }),
    ("WireGuard's rules", |f| {
        let mark = Some((0xca6c, u32::MAX));
        let rule = Rule {
            priority: 32764,
            inverted: true,
            mark,
            table: Some(51820),
            ..Rule::default()
        };
        add_rule(f, rule);
        let main = Rule {
            priority: 100,
            suppressed: true,
            table: Some(254),
            ..Rule::default()
        };
        add_rule(f, main);
    }),
    ("tailscale's rules", |f| {
        let mark = Some((0x8_0000, 0xff_0000));
        add_rule(
            f,
            Rule {
                priority: 5210,
                mark,
                table: Some(254),
                ..Rule::default()
            },
        );
    }),
    ("no ctnetlink where nothing is carried on", |f| {
        helper(f).1.missingFeatures = vec!["ctnetlink".into()];
    }),
    ("no relay where nothing is carried on", |f| f.relay = None),
    ("one connection less than there may be", |f| {
        relay(f).upstreams[0].flows = 99
    }),
    ("a rule for one network", |f| {
        add_rule(
            f,
            Rule {
                priority: 5,
                narrower: true,
                table: Some(9),
                ..Rule::default()
            },
        );
    }),
    (
        "an earlier rule for a mark that no diverted packet has",
        |f| {
            let mark = Some((0xca6c, u32::MAX));
            add_rule(
                f,
                Rule {
                    priority: 5,
                    mark,
                    table: Some(9),
                    ..Rule::default()
                },
            );
        },
    ),
    ("a proxy without IPv6 where there is none", |f| {
        f.config = ConfigState::Read(vec![Proxy {
            ipv6: false,
            ..proxy()
        }]);
        for listener in listeners(f) {
            listener.address = Ipv4Addr::UNSPECIFIED.into();
        }
        f.network.ipv6_route = Ok(false);
        f.network.ipv6_off_on_lo = Ok(true);
    }),
    ("a gateway on a machine that forwards", |f| {
        gateway(f);
    }),
    ("a family that no gateway diverts", |f| {
        f.config = ConfigState::Read(vec![Proxy {
            ipv4: false,
            ..proxy()
        }]);
        let gateway = gateway(f);
        gateway.forwarding_off = Ok(vec!["net.ipv4.ip_forward".into()]);
        gateway.src_valid_mark = Ok(vec!["net.ipv4.conf.br0.src_valid_mark".into()]);
    }),
    ("a DNS server elsewhere", |f| {
        let dns = Some(Dns {
            ipv4: Some(Ipv4Addr::new(192, 168, 1, 1)),
            ipv6: None,
            port: 5353,
            tcp: true,
        });
        f.config = ConfigState::Read(vec![Proxy { dns, ..proxy() }]);
    }),
];

fn ids(facts: &Facts) -> Vec<&'static str> {
    let groups = all(facts);
    groups
        .iter()
        .flat_map(|g| &g.findings)
        .map(|f| f.id)
        .collect()
}

#[test]
fn nothing_is_wrong_with_a_machine_that_is_fine() {
    let groups = all(&fine());
    for group in &groups {
        assert_eq!(group.findings, [], "{}", group.name);
        assert_eq!(group.unseen, Vec::<String>::new(), "{}", group.name);
    }
    let mut text = String::new();
    report::render(&mut text, &groups, false).unwrap();
    assert!(text.ends_with("\nnothing is wrong\n"), "{text}");
}

#[test]
fn what_is_wrong_is_found_and_said() {
    for (id, severity, wreck) in BROKEN {
        let mut facts = fine();
        wreck(&mut facts);
        let groups = all(&facts);
        let found = groups
            .iter()
            .flat_map(|g| &g.findings)
            .find(|f| f.id == *id);
        let found = found.unwrap_or_else(|| panic!("{id}: {:?}", ids(&facts)));
        assert_eq!(found.severity, *severity, "{id}");
        assert!(
            !found.problem.is_empty() && !found.effect.is_empty(),
            "{id}"
        );
        // Whoever is told of something that does not work is told how to mend it.
        if *severity != Severity::Note {
            assert!(found.advice.is_some() || !found.commands.is_empty(), "{id}");
        }
        let mut text = String::new();
        report::render(&mut text, &groups, false).unwrap();
        assert!(text.contains(&format!("[{id}]")), "{text}");
        assert!(!text.contains("nothing is wrong"), "{text}");
    }
}

#[test]
fn what_does_no_harm_is_not_found() {
    for (what, change) in HARMLESS {
        let mut facts = fine();
        change(&mut facts);
        assert_eq!(ids(&facts), Vec::<&str>::new(), "{what}");
    }
}

#[test]
fn nobody_is_blamed_for_a_proxy_while_the_helper_can_not_be_asked_about_it() {
    let mut facts = fine();
    facts.helper = Helper::Unreachable("no answer".into());
    listeners(&mut facts)[0].uid = 991;
    assert_eq!(ids(&facts), ["helper-unreachable"]);
}

#[test]
fn what_could_not_be_looked_at_does_not_pass_for_good() {
    let mut facts = fine();
    facts.rules = Err("no rights".into());
    facts.listeners = Err("no rights".into());
    facts.system.nsswitch = Err("no rights".into());
    facts.helper = Helper::Answers(Box::new(helper_status()), Err("too old".into()));
    let groups = all(&facts);
    let mut text = String::new();
    report::render(&mut text, &groups, false).unwrap();
    for name in ["kernel", "routing", "marks", "proxies", "dns"] {
        let group = groups.iter().find(|group| group.name == name).unwrap();
        assert!(!group.unseen.is_empty(), "{name}");
        assert!(text.contains(&format!("unknown  {name}\n")), "{text}");
    }
    assert!(text.contains("could not be looked at: "), "{text}");
    assert!(
        text.ends_with("nothing is wrong with what could be looked at\n"),
        "{text}"
    );
    assert_eq!(report::count(&groups, Severity::Error), 0);
}

/// Nor does what would need something that is missing.
#[test]
fn a_relay_that_nobody_could_ask_does_not_pass_for_good() {
    let said = |facts: &Facts| {
        let groups = all(facts);
        let mut text = String::new();
        report::render(&mut text, &groups, false).unwrap();
        text
    };
    let mut facts = fine();
    facts.config = ConfigState::Read(vec![relayed(true)]);
    facts.agent = Agent::NotRunning;
    facts.relay = None;
    let text = said(&facts);
    assert!(text.contains("unknown  relay\n"), "{text}");
    assert!(text.contains("unknown  dns\n"), "{text}");
    facts.agent = fine().agent;
    facts.relay = Some(Err("no relay listens".into()));
    let text = said(&facts);
    assert!(text.contains("error    relay\n"), "{text}");
    assert!(text.contains("unknown  dns\n"), "{text}");
}

#[test]
fn what_is_wrong_has_no_summary_that_says_it_is_right() {
    for (id, _, wreck) in BROKEN {
        let mut facts = fine();
        wreck(&mut facts);
        for group in all(&facts) {
            let worst = group.findings.iter().map(|finding| finding.severity).max();
            let wrong = worst.is_some_and(|worst| worst > Severity::Note);
            assert!(!wrong || group.summary.is_empty(), "{id}: {group:?}");
        }
    }
}

#[test]
fn as_many_watches_are_advised_as_are_needed() {
    let mut facts = fine();
    let advised = |facts: &Facts| {
        let found = only(facts, super::control_groups::check);
        format!("{found:?}")
    };
    facts.inotify.as_mut().unwrap().watches = 60;
    assert!(advised(&facts).contains("max_user_watches=65536"));
    facts.manager.groups = Ok(vec![(1, format!("{MANAGER}/app-a.scope")); 70_000]);
    facts.inotify.as_mut().unwrap().watches = 70_000;
    assert!(advised(&facts).contains("max_user_watches=131072"));
}

#[test]
fn what_is_kept_of_an_agent_that_is_gone_does_not_pass_for_direct() {
    let mut facts = fine();
    facts.agent = Agent::NotRunning;
    let effect = |facts: &Facts| {
        let findings = super::agent::check(facts).findings;
        findings[0].effect.clone()
    };
    let status = &mut helper(&mut facts).0;
    (status.session, status.systemPolicy) = (GetStatus_Reply_session::none, Some(false));
    assert_eq!(effect(&facts), "Everything of yours goes direct.");
    helper(&mut facts).0.systemPolicy = Some(true);
    assert_eq!(
        effect(&facts),
        "Everything of yours goes as the system policy says."
    );
    helper(&mut facts).0.session = GetStatus_Reply_session::kept;
    assert!(effect(&facts).contains("still dropped"));
    // Nor while there is an agent that has nothing in force.
    facts.agent = fine().agent;
    let status = agent(&mut facts);
    (status.connected, status.problem) = (false, Some("no helper listens".into()));
    assert!(effect(&facts).contains("still dropped"));
    helper(&mut facts).0.session = GetStatus_Reply_session::none;
    assert_eq!(effect(&facts), "None of your rules is in force.");
}

#[test]
fn each_of_several_variables_is_0() {
    let mut facts = fine();
    let problem = |facts: &mut Facts, off: &[&str]| {
        gateway(facts).forwarding_off = Ok(off.iter().map(|&name| name.to_owned()).collect());
        only(facts, super::routing::check).problem
    };
    let (v4, v6) = ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding");
    assert!(problem(&mut facts, &[v4]).ends_with(": net.ipv4.ip_forward is 0"));
    assert!(problem(&mut facts, &[v4, v6]).ends_with(" and net.ipv6.conf.all.forwarding are 0"));
}

/// Whoever knows that nobody listens need not be told that the relay has found nobody.
#[test]
fn a_proxy_that_nobody_is_is_said_once() {
    let mut facts = fine();
    facts.config = ConfigState::Read(vec![relayed_here(Some(Ipv4Addr::LOCALHOST), None)]);
    relay(&mut facts).upstreams[0].problem = Some("Connection refused".into());
    assert_eq!(ids(&facts), ["upstream-down"]);
    listeners(&mut facts).clear();
    assert_eq!(ids(&facts), ["upstream-not-listening"]);
}

/// Each step has a time of its own: see docs/configuration.md.
#[test]
fn a_proxy_that_is_down_has_no_time_limit_that_is_another() {
    let mut facts = fine();
    relay(&mut facts).upstreams[0].problem = Some("Connection refused".into());
    let effect = only(&facts, super::relay::check).effect;
    assert!(!effect.contains("minute"), "{effect}");
    assert!(
        effect.contains("at once, or when their time is over"),
        "{effect}"
    );
}

/// The system's agent is well, and a restart would change nothing.
#[test]
fn nobody_but_root_is_told_to_mend_the_systems_agent() {
    let mut facts = fine();
    facts.scope = Scope::System;
    facts.agent = Agent::Roots;
    let group = super::agent::check(&facts);
    assert_eq!(group.findings, []);
    assert_eq!(
        group.unseen,
        [
            "the system's cgtproxy-agent: only root may ask it, with 'sudo cgtproxy-agent --system doctor'"
        ]
    );
    // cgtproxy-exec does not ask it.
    facts.agent = Agent::Unreachable("reset".into());
    let finding = only(&facts, super::agent::check);
    assert!(!finding.effect.contains("cgtproxy-exec"), "{finding:?}");
}

#[test]
fn commands_that_are_offered_can_be_pasted() {
    let mut facts = fine();
    send_the_proxy_through_itself(&mut facts);
    let path = format!(r"{MANAGER}/app.slice/app-clash\x2dmeta.service");
    agent(&mut facts).controlGroups[0].path = path.clone();
    facts.manager.groups = Ok(vec![(7, path)]);
    assert_eq!(
        only(&facts, super::proxies::check).commands,
        [r"cgtproxy-agent explain 'app-clash\x2dmeta.service'"]
    );
}

/// Whoever has lost it is not helped by what starts a program that does not run.
#[test]
fn a_socket_that_is_gone_is_told_from_a_program_that_does_not_run() {
    let mut facts = fine();
    facts.helper = Helper::Missing;
    let finding = only(&facts, super::helper::check);
    assert_eq!(
        finding.commands,
        ["sudo systemctl restart cgtproxy-helper.socket"]
    );
    let enable = "sudo systemctl enable --now cgtproxy-helper.socket";
    facts.helper_socket = "/run/other.sock".into();
    assert_eq!(only(&facts, super::helper::check).commands, [enable]);
    facts.helper_socket = HELPER_SOCKET.into();
    agent(&mut facts).connected = false;
    assert_eq!(only(&facts, super::helper::check).commands, [enable]);
    let mut facts = fine();
    facts.agent = Agent::NotRunning;
    let finding = only(&facts, super::agent::check);
    assert_eq!(
        finding.commands,
        ["systemctl --user restart cgtproxy-agent"]
    );
}

/// The one finding of a check.
fn only(facts: &Facts, check: fn(&Facts) -> Group) -> Finding {
    let findings = check(facts).findings;
    assert_eq!(findings.len(), 1, "{findings:?}");
    findings[0].clone()
}

#[test]
fn nobody_is_told_to_restart_an_agent_that_would_have_it_no_better() {
    let mut facts = fine();
    agent(&mut facts).problem = Some("too many control groups".into());
    let refused = only(&facts, super::agent::check);
    assert_eq!((refused.id, refused.commands.len()), ("agent-refused", 0));
    agent(&mut facts).connected = false;
    let finding = only(&facts, super::agent::check);
    assert_eq!(
        (finding.id, finding.commands.len()),
        ("agent-disconnected", 0)
    );
}

/// A user's manager that nobody has told goes on with the units that it has read.
#[test]
fn what_is_restarted_after_an_upgrade_has_its_new_unit() {
    let mut facts = fine();
    agent(&mut facts).version = "0".into();
    relay(&mut facts).version = "0".into();
    for (check, unit) in [
        (super::agent::check as fn(&Facts) -> Group, "cgtproxy-agent"),
        (super::relay::check, "cgtproxy-relay.service"),
    ] {
        let restart = format!("systemctl --user restart {unit}");
        assert_eq!(
            only(&facts, check).commands,
            ["systemctl --user daemon-reload", &restart]
        );
    }
    // A package has told the system's.
    facts.scope = Scope::System;
    let commands = only(&facts, super::agent::check).commands;
    assert_eq!(commands, ["systemctl restart cgtproxy-agent-system"]);
}

#[test]
fn what_the_helper_refuses_is_no_mistake_in_the_file() {
    let mut facts = fine();
    agent(&mut facts).configError = Some("no more than 3 proxies".into());
    let refused = only(&facts, super::agent::check);
    assert_eq!(refused.id, "config-not-in-force");
    assert!(!refused.problem.contains("mistake"), "{refused:?}");
    let advice = refused.advice.unwrap();
    assert!(advice.contains("the file has no mistake"), "{advice}");
    assert!(
        refused.commands[0].contains("reload"),
        "{:?}",
        refused.commands
    );

    facts.config = ConfigState::Wrong("c:1:1".into());
    let wrong = only(&facts, super::agent::check);
    assert!(wrong.problem.contains("mistake"), "{wrong:?}");
    assert!(wrong.commands[0].contains("check"), "{wrong:?}");
    // Without the helper the one before it waits for that, and not for the file.
    let waits = |facts: &Facts| {
        let findings = super::agent::check(facts).findings;
        let found = findings.iter().find(|f| f.id == "config-not-in-force");
        let disconnected = findings.iter().any(|f| f.id == "agent-disconnected");
        let waits = found.unwrap().effect.contains("to be fixed");
        assert_ne!(waits, disconnected, "{findings:?}");
        waits
    };
    agent(&mut facts).connected = false;
    agent(&mut facts).problem = Some("no helper listens".into());
    assert!(!waits(&facts));
    agent(&mut facts).problem = Some("waiting".into());
    agent(&mut facts).awaits = Some(Awaited::configuration);
    assert!(waits(&facts));
}

#[test]
fn advice_is_about_the_file_that_was_looked_at() {
    let mut facts = fine();
    facts.config = ConfigState::Wrong("c:1:1".into());
    let commands = |facts: &Facts| only(facts, super::agent::check).commands;
    assert_eq!(commands(&facts), ["cgtproxy-agent check"]);
    facts.config_named = true;
    facts.config_file = "/tmp/it's.yaml".into();
    assert_eq!(
        commands(&facts),
        [r"cgtproxy-agent --config '/tmp/it'\''s.yaml' check"]
    );
    // An agent is asked about its own file, and refuses another.
    let mut facts = fine();
    facts.config_named = true;
    send_the_proxy_through_itself(&mut facts);
    assert_eq!(
        only(&facts, super::proxies::check).commands,
        ["cgtproxy-agent explain mihomo.service"]
    );
}

#[test]
fn a_file_that_was_removed_has_no_mistake() {
    let mut facts = fine();
    facts.config = ConfigState::Missing;
    agent(&mut facts).configError = Some("there is no file /c".into());
    let removed = only(&facts, super::agent::check);
    assert_eq!(removed.id, "config-not-in-force");
    assert!(!removed.problem.contains("mistake"), "{removed:?}");
    assert!(removed.effect.contains("still in force"), "{removed:?}");
    assert!(removed.commands[0].contains("restart"), "{removed:?}");
    // Of one that it started with there is nothing to keep.
    agent(&mut facts).connected = false;
    agent(&mut facts).awaits = Some(Awaited::configuration);
    let removed = only(&facts, super::agent::check);
    assert!(removed.effect.contains("waits for the file"), "{removed:?}");
}

#[test]
fn the_socket_is_not_blamed_for_the_directory_that_it_is_in() {
    let mut facts = fine();
    facts.helper = Helper::Forbidden { in_sight: true };
    let socket = only(&facts, super::helper::check);
    assert_eq!(
        socket.commands,
        ["sudo chmod 666 /run/cgtproxy/helper.sock"]
    );
    facts.helper = Helper::Forbidden { in_sight: false };
    let directory = only(&facts, super::helper::check);
    assert_eq!(directory.commands, ["namei -l /run/cgtproxy/helper.sock"]);
}

#[test]
fn without_the_configuration_the_policy_in_force_counts() {
    let mut facts = fine();
    facts.config = ConfigState::Missing;
    helper(&mut facts).0.proxies = vec![cgtproxy_proto::helper::Proxy {
        name: "other".into(),
        port: 1,
        redirect: None,
        noTcp: None,
        noUdp: None,
        rejectUdp: None,
        noIpv4: None,
        noIpv6: None,
        dnsHijack: None,
        fakeIpv4: None,
        fakeIpv6: None,
    }];
    assert_eq!(ids(&facts), ["config-missing", "proxy-not-listening"]);
}

#[test]
fn names_of_others_reach_the_terminal_harmlessly() {
    let mut facts = fine();
    let writer = MarkWriter {
        table: "ip \x1b[2J\u{202e}".into(),
        bits: 1,
    };
    helper(&mut facts).1.markWriters = Some(vec![writer]);
    let mut text = String::new();
    report::render(&mut text, &all(&facts), false).unwrap();
    assert!(text.contains("ip \\u{1b}[2J\\u{202e}"), "{text}");
    assert!(!text.contains('\x1b') && !text.contains('\u{202e}'));
}

/// Every id that a check can give, as its source has it.
fn ids_in_source() -> BTreeSet<String> {
    let sources = [
        include_str!("agent.rs"),
        include_str!("control_groups.rs"),
        include_str!("dns.rs"),
        include_str!("gateway.rs"),
        include_str!("helper.rs"),
        include_str!("kernel.rs"),
        include_str!("marks.rs"),
        include_str!("proxies.rs"),
        include_str!("relay.rs"),
        include_str!("routing.rs"),
    ];
    let mut ids = BTreeSet::new();
    for source in sources {
        for severity in ["Finding::error(", "Finding::warning(", "Finding::note("] {
            for rest in source.split(severity).skip(1) {
                let id = rest.trim_start().strip_prefix('"').unwrap();
                ids.insert(id.split('"').next().unwrap().to_owned());
            }
        }
    }
    ids
}

#[test]
fn every_finding_is_tested_and_in_the_documentation() {
    let documentation = include_str!("../../../../docs/troubleshooting.md");
    let tested: BTreeSet<String> = BROKEN.iter().map(|(id, ..)| (*id).to_owned()).collect();
    assert_eq!(ids_in_source(), tested);
    for id in tested {
        assert!(
            documentation.contains(&format!("`{id}`")),
            "{id} is not in docs/troubleshooting.md"
        );
    }
}
