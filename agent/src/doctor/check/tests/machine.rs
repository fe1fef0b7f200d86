//! A machine on which nothing is wrong, and ways to change it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use cgtproxy_proto::agent::{ControlGroup, GetStatus_Reply as AgentStatus};
use cgtproxy_proto::helper::{
    Diagnose_Reply, GetStatus_Reply as HelperStatus, GetStatus_Reply_session,
};
use cgtproxy_proto::relay::{GetStatus_Reply as RelayStatus, UpstreamStatus};

use crate::config::Scope;
use crate::doctor::facts::*;

pub(super) const MANAGER: &str = "/user.slice/user-1000.slice/user@1000.service";

pub(super) fn helper_status() -> HelperStatus {
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

pub(super) fn diagnosis() -> Diagnose_Reply {
    Diagnose_Reply {
        markMask: 0xff00_0000,
        divertBit: 0x8000_0000,
        routeTable: 25447,
        rulePriority: 800,
        missingFeatures: Vec::new(),
        markWriters: Some(Vec::new()),
    }
}

pub(super) fn agent_status() -> AgentStatus {
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

pub(super) fn relay_status() -> RelayStatus {
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

pub(super) fn send_the_proxy_through_itself(facts: &mut Facts) {
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

pub(super) fn relay(facts: &mut Facts) -> &mut RelayStatus {
    facts.relay.as_mut().unwrap().as_mut().unwrap()
}

pub(super) fn proxy() -> Proxy {
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
pub(super) fn redirect(facts: &mut Facts) {
    facts.config = ConfigState::Read(vec![Proxy {
        server: Server::Redirect(7890),
        ..proxy()
    }]);
}

/// The relay carries them on.
pub(super) fn relayed(fake_dns: bool) -> Proxy {
    Proxy {
        server: Server::Relay {
            fake_dns,
            here: None,
            users: Vec::new(),
        },
        dns: None,
        ..proxy()
    }
}

/// They are on this machine.
pub(super) fn relayed_here(ipv4: Option<Ipv4Addr>, ipv6: Option<Ipv6Addr>) -> Proxy {
    Proxy {
        name: "there".into(),
        server: Server::Relay {
            fake_dns: false,
            here: Some(Here {
                ipv4,
                ipv6,
                port: 7890,
            }),
            users: vec![1002],
        },
        ..relayed(false)
    }
}

pub(super) fn listener(transport: Transport, address: impl Into<IpAddr>, port: u16) -> Listener {
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

pub(super) fn our_rule(family: Family) -> Rule {
    Rule {
        family,
        priority: 800,
        mark: Some((0x8000_0000, 0x8000_0000)),
        table: Some(25447),
        ..Rule::default()
    }
}

/// A desktop on which everything is as it should be.
pub(super) fn fine() -> Facts {
    let system_rules = [(0, 255), (32766, 254)].map(|(priority, table)| Rule {
        priority,
        table: Some(table),
        ..Rule::default()
    });
    let mut rules = vec![our_rule(Family::Ipv4), our_rule(Family::Ipv6)];
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
            in_container: false,
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
            tracked: Ok(Some(Tracked {
                count: 60_000,
                max: 65_536,
            })),
        },
        system: System {
            linux: Ok((6, 12)),
            v1_network_controllers: Ok(Vec::new()),
            nsswitch: Ok("passwd: files\nhosts: files myhostname dns\n".into()),
            resolv: Ok("nameserver 192.0.2.53\n".into()),
            resolved: true,
            nscd: false,
            networkd: Ok(true),
            networkd_removes_rules: Ok(false),
            original: Ok(false),
        },
    }
}

/// Changes one thing about the machine.
pub(super) type Break = fn(&mut Facts);

pub(super) fn helper(facts: &mut Facts) -> (&mut HelperStatus, &mut Diagnose_Reply) {
    match &mut facts.helper {
        Helper::Answers(status, Ok(diagnosis)) => (status, diagnosis),
        _ => panic!("it answers"),
    }
}

pub(super) fn agent(facts: &mut Facts) -> &mut AgentStatus {
    match &mut facts.agent {
        Agent::Answers(status) => status,
        _ => panic!("it answers"),
    }
}

pub(super) fn listeners(facts: &mut Facts) -> &mut Vec<Listener> {
    facts.listeners.as_mut().unwrap()
}

pub(super) fn add_rule(facts: &mut Facts, rule: Rule) {
    facts.rules.as_mut().unwrap().push(rule);
}

/// The system policy diverts what comes in over a bridge to the one proxy.
pub(super) fn gateway(facts: &mut Facts) -> &mut Gateway {
    facts.scope = Scope::System;
    facts.gateway.insert(Gateway {
        proxy: proxy().name,
        forwarding_off: Ok(Vec::new()),
        src_valid_mark: Ok(Vec::new()),
        bridges: vec!["br0".into()],
    })
}
