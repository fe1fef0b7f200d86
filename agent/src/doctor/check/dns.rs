//! Do hijacked queries find a server, and does anything ask past the hijack?

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::proxies::{explain, sent_through, takes};
use super::relay::UNASKED;
use crate::doctor::facts::{Dns, Facts, Family, Listener, Proxy, Server, Transport};
use crate::doctor::{Finding, Group};

/// Where systemd-resolved listens by itself, and answers only who asks from a loopback address
/// (src/resolve/resolved-dns-stub.c, `dns_stub_process_query`).
const STUBS: [Ipv4Addr; 2] = [Ipv4Addr::new(127, 0, 0, 53), Ipv4Addr::new(127, 0, 0, 54)];

pub(super) fn check(facts: &Facts) -> Group {
    let mut group = Group::new("dns");
    let proxies = facts.proxies();
    let hijacks: Vec<(&Proxy, &Dns)> = proxies
        .iter()
        .filter_map(|proxy| Some((proxy, proxy.dns.as_ref()?)))
        .collect();
    // The relay's own answers need no server, but queries have to come by as well.
    let relay = proxies
        .iter()
        .any(|proxy| matches!(proxy.server, Server::Relay { fake_dns: true, .. }));
    let unasked = match &facts.relay {
        Some(Ok(_)) => None,
        Some(Err(_)) => Some("the relay is of no use"),
        None => Some(UNASKED),
    };
    if let Some(why) = unasked.filter(|_| relay) {
        let what = "whether the relay answers hijacked queries";
        group.unseen.push(format!("{what}: {why}"));
    }
    if hijacks.is_empty() && !relay {
        group.summary = "no dns-hijack in the configuration".to_owned();
        return group;
    }
    group.summary = "hijacked queries are answered".to_owned();
    if !hijacks.is_empty()
        && let Some(listeners) = group.see("who listens where", &facts.listeners)
    {
        for (proxy, dns) in &hijacks {
            group.found(silent(facts, proxy, dns, listeners));
            group.found(loops(facts, proxy, dns, listeners));
        }
    }
    for (proxy, dns) in &hijacks {
        group.found(only_from_loopback(facts, proxy, dns));
    }
    let by_resolved = group
        .see("/etc/nsswitch.conf", &facts.system.nsswitch)
        .and_then(|text| nss_resolve(text, facts.system.resolved));
    // Then hardly anybody asks the servers in resolv.conf.
    let asks_servers = by_resolved.is_none();
    group.found(by_resolved);
    let catches_ipv6 = relay || hijacks.iter().any(|(_, dns)| dns.ipv6.is_some());
    if catches_ipv6
        && asks_servers
        && let Some(text) = group.see("/etc/resolv.conf", &facts.system.resolv)
    {
        group.found(only_link_local(text));
    }
    group.found(facts.system.nscd.then(|| {
        Finding::warning("nscd", "nscd answers queries for names of all programs")
            .effect("Names that it looks up are asked for by itself, past dns-hijack and your rules.")
            .command("sudo nscd --invalidate=hosts")
            .advice("have it leave names alone: 'enable-cache hosts no' in /etc/nscd.conf, and restart it")
            .command("sudo systemctl restart nscd")
    }));
    group
}

/// Where on this machine a hijack leads, for each family.
fn servers_here(dns: &Dns) -> impl Iterator<Item = (Family, IpAddr)> {
    let servers = [
        (Family::Ipv4, dns.ipv4.map(IpAddr::from)),
        (Family::Ipv6, dns.ipv6.map(IpAddr::from)),
    ];
    servers
        .into_iter()
        .filter_map(|(family, server)| Some((family, server.filter(IpAddr::is_loopback)?)))
}

/// Whether who listens gets hijacked queries that lead to a server.
fn answers(listener: &Listener, dns: &Dns, family: Family, server: IpAddr) -> bool {
    listener.port == dns.port && takes(listener, family, server)
}

fn silent(facts: &Facts, proxy: &Proxy, dns: &Dns, listeners: &[Listener]) -> Option<Finding> {
    let has_ipv6 = facts.network.has_ipv6();
    let mut missing = Vec::new();
    for (family, server) in servers_here(dns) {
        if family == Family::Ipv6 && !has_ipv6 {
            continue;
        }
        for (transport, wanted) in [(Transport::Udp, true), (Transport::Tcp, dns.tcp)] {
            let answered = listeners.iter().any(|listener| {
                listener.transport == transport && answers(listener, dns, family, server)
            });
            if wanted && !answered {
                missing.push(format!("{transport} over {family} at {server}"));
            }
        }
    }
    (!missing.is_empty()).then(|| {
        Finding::error(
            "dns-not-listening",
            format!(
                "nobody answers the hijacked queries of '{}' on port {}: {}",
                proxy.name,
                dns.port,
                missing.join(", ")
            ),
        )
        .effect("Applications that ask that way find no names.")
        .advice(
            "have the proxy's DNS server listen there, or name in dns-hijack only the 'ip' that it has",
        )
        .command(format!("ss -lntu 'sport = :{}'", dns.port))
    })
}

/// Whether the server's own queries are hijacked too. They come back to it unless it asks others by TLS or HTTPS.
fn loops(facts: &Facts, proxy: &Proxy, dns: &Dns, listeners: &[Listener]) -> Option<Finding> {
    let is_server = |listener: &&Listener| {
        servers_here(dns).any(|(family, server)| answers(listener, dns, family, server))
    };
    // Of one that is the proxy as well something else is said.
    let is_the_proxy = |server: &&Listener| {
        let mut of_proxy = listeners
            .iter()
            .filter(|l| Some(l.port) == proxy.server.port());
        of_proxy.any(|listener| listener.control_group == server.control_group)
    };
    let found: Vec<&Listener> = listeners
        .iter()
        .filter(is_server)
        .filter(|server| !is_the_proxy(server))
        .collect();
    let path = sent_through(facts, proxy, &found)?;
    Some(
        Finding::warning(
            "dns-loop",
            format!(
                "the server for the hijacked queries of '{}' is sent through '{}' itself: it runs in {path}",
                proxy.name, proxy.name
            ),
        )
        .effect("What it asks other servers by DNS comes back to it, so that names are not found.")
        .advice("write a rule with direct: true for its unit, before the rule that catches it")
        .command(explain(facts, path)),
    )
}

/// Whether it is systemd-resolved, where that drops what has been sent from another address.
fn only_from_loopback(facts: &Facts, proxy: &Proxy, dns: &Dns) -> Option<Finding> {
    let stub = dns
        .ipv4
        .filter(|server| dns.port == 53 && STUBS.contains(server))?;
    facts.system.resolved.then(|| {
        Finding::error(
            "dns-stub",
            format!(
                "the hijacked queries of '{}' go to systemd-resolved at {stub}, which answers none from the \
                 machine's other addresses",
                proxy.name
            ),
        )
        .effect("Applications find no names, unless they ask a server at a loopback address.")
        .advice("have it listen at another address as well, and name 127.0.0.1 and port 1053 in dns-hijack")
        .command("sudo mkdir -p /etc/systemd/resolved.conf.d")
        .command(
            r"printf '[Resolve]\nDNSStubListenerExtra=127.0.0.1:1053\nDNSStubListenerExtra=[::1]:1053\n' | sudo tee /etc/systemd/resolved.conf.d/hijack.conf",
        )
        .command("sudo systemctl restart systemd-resolved")
    })
}

/// Whether names are looked up by nss-resolve, which speaks to systemd-resolved over a socket of its own
/// and not by DNS.
fn nss_resolve(text: &str, resolved: bool) -> Option<Finding> {
    let hosts = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("hosts:"))?;
    let hosts = hosts.split('#').next().unwrap_or_default();
    let asks = hosts
        .split_ascii_whitespace()
        .any(|service| service == "resolve");
    (asks && resolved).then(|| {
        Finding::warning(
            "nss-resolve",
            "names are looked up by systemd-resolved (resolve in the line hosts: of /etc/nsswitch.conf)",
        )
        .effect(
            "It asks the servers itself, from a control group of the system: past dns-hijack and your rules.",
        )
        .advice("without it, names are asked for by DNS, which dns-hijack catches")
        .command(r"sudo sed -i -E '/^ *hosts:/s/\<resolve\>( *\[[^]]*\])?//' /etc/nsswitch.conf")
    })
}

/// Whether the C library knows no server but such as are at link-local addresses, to which queries are refused: it
/// asks the next one then. It uses the first three (resolv.conf(5), MAXNS).
fn only_link_local(text: &str) -> Option<Finding> {
    let servers: Vec<&str> = text
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix("nameserver"))
        .filter_map(|rest| rest.split_ascii_whitespace().next())
        .take(3)
        .collect();
    let is_link_local = |server: &&str| {
        let address = server.split('%').next().unwrap_or_default();
        address
            .parse::<Ipv6Addr>()
            .is_ok_and(|address| address.is_unicast_link_local())
    };
    (!servers.is_empty() && servers.iter().all(is_link_local)).then(|| {
        Finding::error(
            "link-local-dns",
            format!(
                "all servers in /etc/resolv.conf are at link-local addresses: {}",
                servers.join(", ")
            ),
        )
        .effect("Hijacked queries to those are refused, so that applications find no names.")
        .advice(
            "have another server in /etc/resolv.conf; any will do, as queries to it are hijacked",
        )
        .command("resolvectl dns || nmcli device show | grep DNS")
    })
}
