//! What can be wrong with a machine, and what does no harm.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use cgtproxy_proto::helper::{GetStatus_Reply_session, MarkWriter};

use crate::config::Scope;
use crate::doctor::Severity;
use crate::doctor::facts::*;

use super::machine::{
    Break, MANAGER, add_rule, agent, gateway, helper, listener, listeners, our_rule, proxy,
    redirect, relay, relayed, relayed_here, send_the_proxy_through_itself,
};

/// What can be wrong, by the finding that says so.
pub(super) const BROKEN: &[(&str, Severity, Break)] = {
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
        ("manager-missing", Error, |f| {
            f.manager.owner = Ok(None);
            f.agent = Agent::NotRunning;
        }),
        ("manager-out-of-sight", Error, |f| {
            f.manager.owner = Ok(None)
        }),
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
        ("connections-full", Warning, |f| {
            let tracked = Tracked {
                count: 62_300,
                max: 65_536,
            };
            f.network.tracked = Ok(Some(tracked));
        }),
        ("table-not-protected", Note, |f| {
            helper(f).0.tableOwned = false
        }),
        ("kernel-no-ipv6", Note, |f| {
            helper(f).0.ipv6 = false;
            f.network.ipv6 = false;
        }),
        ("rule-missing", Error, |f| {
            f.rules = Ok(vec![our_rule(Family::Ipv6)])
        }),
        ("rule-missing", Error, |f| {
            f.rules = Ok(vec![our_rule(Family::Ipv4)])
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
        ("upstream-of-another", Error, |f| {
            f.config = ConfigState::Read(vec![relayed_here(Some(Ipv4Addr::LOCALHOST), None)]);
            listeners(f)[0].uid = 1001;
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
        ("dns-loop", Warning, |f| {
            send_the_proxy_through_itself(f);
            agent(f).controlGroups[0].path = format!("{MANAGER}/app.slice/app-firefox-1.scope");
            let dns = listeners(f).iter_mut().filter(|l| l.port == 1053);
            dns.for_each(|l| l.control_group = Some(8));
        }),
        ("dns-stub", Error, |f| {
            let mut proxy = proxy();
            let dns = proxy.dns.as_mut().unwrap();
            dns.ipv4 = Some(Ipv4Addr::new(127, 0, 0, 53));
            dns.port = 53;
            f.config = ConfigState::Read(vec![proxy]);
            let dns = listeners(f).iter_mut().filter(|l| l.port == 1053);
            dns.for_each(|l| (l.address, l.port) = (Ipv4Addr::new(127, 0, 0, 53).into(), 53));
        }),
        ("nss-resolve", Warning, |f| {
            f.system.nsswitch = Ok("hosts: mymachines resolve [!UNAVAIL=return] files dns".into());
        }),
        ("nss-resolve", Warning, |f| {
            f.config = ConfigState::Read(vec![relayed(true)]);
            f.system.nsswitch = Ok("hosts: resolve dns".into());
        }),
        ("link-local-dns", Error, |f| {
            f.config = ConfigState::Read(vec![relayed(true)]);
            f.system.resolv =
                Ok("search lan\nnameserver fe80::1%wlan0\nnameserver\tfe80::2\n".into());
        }),
        ("link-local-dns", Error, |f| {
            f.config = ConfigState::Read(vec![relayed(true)]);
            let four = "nameserver fe80::1%2\n".repeat(3) + "nameserver 192.0.2.53\n";
            f.system.resolv = Ok(four);
        }),
        ("nscd", Warning, |f| f.system.nscd = true),
    ]
};

/// What does no harm, though it looks as if it could.
pub(super) const HARMLESS: &[(&str, Break)] = &[
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
    ("a link-local server before another one", |f| {
        f.config = ConfigState::Read(vec![relayed(true)]);
        let text = "nameserver fe80::1%wlan0\nnameserver 192.0.2.53\n";
        f.system.resolv = Ok(text.into());
    }),
    ("link-local servers where IPv6 is not caught", |f| {
        f.system.resolv = Ok("nameserver fe80::1%wlan0\n".into());
    }),
    ("no server but that at localhost", |f| {
        f.config = ConfigState::Read(vec![relayed(true)]);
        f.system.resolv = Ok("# nameserver fe80::1%wlan0\nsearch lan\n".into());
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
    ("a kernel that tracks no connections", |f| {
        f.network.tracked = Ok(None)
    }),
    ("connections without a limit", |f| {
        f.network.tracked = Ok(Some(Tracked { count: 9, max: 0 }));
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
