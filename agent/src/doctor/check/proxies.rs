//! Is each proxy where diverted packets are delivered, and may it have them?

use std::net::IpAddr;

use cgtproxy_proto::{is_common, is_of_system};

use super::count;
use crate::config::Scope;
use crate::doctor::facts::{Agent, Facts, Family, Here, Listener, Proxy, Server, Transport};
use crate::doctor::{Finding, Group};
use crate::text::quoted;

pub(super) fn check(facts: &Facts) -> Group {
    let mut group = Group::new("proxies");
    let proxies = facts.proxies();
    let servers: Vec<(&Proxy, u16)> = proxies
        .iter()
        .filter_map(|proxy| Some((proxy, proxy.server.port()?)))
        .collect();
    if let Some(listeners) = group.see("who listens where", &facts.listeners) {
        let relayed: Vec<(&Proxy, Here)> = proxies.iter().filter_map(of_relay).collect();
        group.summary = match servers.len() + relayed.len() {
            0 => "none on this machine in the configuration".to_owned(),
            number => format!("{} ready", count(number, "proxy")),
        };
        for (proxy, port) in servers {
            group.found(one(facts, proxy, port, listeners));
        }
        for (proxy, here) in relayed {
            let found = at(here, listeners);
            if found.is_empty() {
                group.found([unreached(proxy, here)]);
            }
            group.found(anothers(facts, proxy, here, &found));
            group.found(loops(facts, proxy, &found));
        }
    }
    group
}

/// A proxy on this machine that the relay carries connections on to, and where it is.
fn of_relay(proxy: &Proxy) -> Option<(&Proxy, Here)> {
    match proxy.server {
        Server::Relay { here, .. } => Some((proxy, here?)),
        Server::Tproxy(_) | Server::Redirect(_) => None,
    }
}

/// Whether nobody listens where the relay would reach a proxy on this machine, or somebody whom it does not take for one.
pub(super) fn is_unreached(facts: &Facts, name: &str) -> bool {
    let (proxies, Ok(listeners)) = (facts.proxies(), &facts.listeners) else {
        return false;
    };
    let mut relayed = proxies.iter().filter_map(of_relay);
    relayed.any(|(proxy, here)| {
        let found = at(here, listeners);
        proxy.name == name
            && (found.is_empty() || found.iter().all(|of| is_strangers(facts, proxy, of)))
    })
}

/// Who takes TCP connections there.
fn at(here: Here, listeners: &[Listener]) -> Vec<&Listener> {
    let ways: [(Family, Option<IpAddr>); 2] = [
        (Family::Ipv4, here.ipv4.map(Into::into)),
        (Family::Ipv6, here.ipv6.map(Into::into)),
    ];
    let takes_any = |listener: &&Listener| {
        let mut ways = ways.iter();
        ways.any(|(family, address)| address.is_some_and(|at| takes(listener, *family, at)))
    };
    let mut found: Vec<&Listener> = listeners
        .iter()
        .filter(|listener| listener.transport == Transport::Tcp && listener.port == here.port)
        .filter(takes_any)
        .collect();
    keep_nearest(&mut found);
    found
}

/// Who listens on the very address comes before who listens on all.
fn keep_nearest(takers: &mut Vec<&Listener>) {
    if takers.iter().any(|taker| !taker.address.is_unspecified()) {
        takers.retain(|taker| !taker.address.is_unspecified());
    }
}

fn unreached(proxy: &Proxy, here: Here) -> Finding {
    let port = here.port;
    let addresses = [here.ipv4.map(IpAddr::from), here.ipv6.map(IpAddr::from)];
    let addresses: Vec<_> = addresses.into_iter().flatten().collect();
    let names: Vec<_> = addresses.iter().map(ToString::to_string).collect();
    Finding::error(
        "upstream-not-listening",
        format!(
            "nobody listens on port {port} of {}, which is the 'upstream' of the proxy '{}'",
            names.join(" or "),
            proxy.name
        ),
    )
    .effect("Connections that go through it are reset; none goes direct.")
    .advice("start the proxy, or correct 'upstream' in the configuration")
    .command(format!("ss -lnt 'sport = :{port}'"))
}

/// Whether the relay does not take it for the proxy: it is somebody else's.
fn is_strangers(facts: &Facts, proxy: &Proxy, listener: &Listener) -> bool {
    let users = match &proxy.server {
        Server::Relay { users, .. } => users.as_slice(),
        Server::Tproxy(_) | Server::Redirect(_) => &[],
    };
    let uid = listener.uid;
    uid != facts.uid && !is_common(uid) && !users.contains(&uid)
}

fn anothers(facts: &Facts, proxy: &Proxy, here: Here, found: &[&Listener]) -> Option<Finding> {
    let mut found = found.iter();
    let stranger = found.find(|listener| is_strangers(facts, proxy, listener))?;
    let (port, uid) = (here.port, stranger.uid);
    Some(
        Finding::error(
            "upstream-of-another",
            format!(
                "what listens on port {port}, the 'upstream' of the proxy '{}', is another user's (uid {uid})",
                proxy.name
            ),
        )
        .effect("The relay tells it nothing. Connections that would go through it are reset; none goes direct.")
        .advice(format!(
            "start your proxy when that port is free, or have it listen on another one; if you mean that user's, \
             write 'upstream-user: {uid}'"
        ))
        .command(format!("ss -lntpe 'sport = :{port}'")),
    )
}

/// Whether what is sent to this address, or is diverted and delivered there, finds this socket.
pub(super) fn takes(listener: &Listener, family: Family, at: IpAddr) -> bool {
    match (listener.address, family) {
        (IpAddr::V4(address), Family::Ipv4) => address.is_unspecified() || at == address,
        (IpAddr::V6(address), Family::Ipv6) => address.is_unspecified() || at == address,
        (IpAddr::V6(address), Family::Ipv4) => address.is_unspecified() && !listener.only_v6,
        (IpAddr::V4(_), Family::Ipv6) => false,
    }
}

fn loopback(family: Family) -> IpAddr {
    match family {
        Family::Ipv4 => std::net::Ipv4Addr::LOCALHOST.into(),
        Family::Ipv6 => std::net::Ipv6Addr::LOCALHOST.into(),
    }
}

fn one(facts: &Facts, proxy: &Proxy, port: u16, listeners: &[Listener]) -> Vec<Finding> {
    let ipv6 = proxy.ipv6 && facts.network.has_ipv6();
    let wanted = [
        (Transport::Tcp, Family::Ipv4, proxy.tcp && proxy.ipv4),
        (Transport::Tcp, Family::Ipv6, proxy.tcp && ipv6),
        (Transport::Udp, Family::Ipv4, proxy.udp && proxy.ipv4),
        (Transport::Udp, Family::Ipv6, proxy.udp && ipv6),
    ];
    let on_port: Vec<_> = listeners
        .iter()
        .filter(|listener| listener.port == port)
        .collect();
    let mut missing = Vec::new();
    let mut found: Vec<&Listener> = Vec::new();
    for (transport, family, wanted) in wanted {
        if !wanted {
            continue;
        }
        let mut takers = on_port.clone();
        takers.retain(|listener| {
            listener.transport == transport && takes(listener, family, loopback(family))
        });
        keep_nearest(&mut takers);
        if takers.is_empty() {
            missing.push((transport, family));
        }
        found.extend(takers);
    }
    let mut findings = Vec::new();
    findings.extend(not_listening(proxy, port, &on_port, &found, &missing));
    found.dedup();
    match proxy.server {
        Server::Tproxy(_) => {
            findings.extend(wrong_uid(facts, proxy, port, &found));
            findings.extend(not_transparent(proxy, port, &found));
        }
        Server::Redirect(_) => findings.extend(elsewhere(facts, proxy, port, &found)),
        Server::Relay { .. } => {}
    }
    findings.extend(loops(facts, proxy, &found));
    findings
}

fn not_listening(
    proxy: &Proxy,
    port: u16,
    on_port: &[&Listener],
    found: &[&Listener],
    missing: &[(Transport, Family)],
) -> Option<Finding> {
    if missing.is_empty() {
        return None;
    }
    let name = &proxy.name;
    let ways: Vec<_> = missing
        .iter()
        .map(|(t, f)| format!("{t} over {f}"))
        .collect();
    let ways = ways.join(", ");
    if !found.is_empty() {
        return Some(
            Finding::error(
                "proxy-incomplete",
                format!("the proxy '{name}' does not take {ways} on port {port}"),
            )
            .effect("What applications send that way is refused.")
            .advice(
                "have it listen on all addresses of both families, TCP and UDP; or say no-udp: true or \
                 no-ipv6: true in the configuration, and that goes direct",
            )
            .command(format!("ss -lntu 'sport = :{port}'")),
        );
    }
    if let Some(other) = on_port.first() {
        return Some(
            Finding::error(
                "proxy-address",
                format!(
                    "port {port} of the proxy '{name}' is open on {} only; connections come to \
                     127.0.0.1 and ::1",
                    other.address
                ),
            )
            .effect("Applications that go through it have no network.")
            .advice("have it listen on 127.0.0.1 and ::1, or on all addresses")
            .command(format!("ss -lntu 'sport = :{port}'")),
        );
    }
    Some(
        Finding::error(
            "proxy-not-listening",
            format!("nobody listens on port {port}, which is the proxy '{name}'"),
        )
        .effect("Applications that go through it have no network.")
        .advice("start the proxy, or correct the port in the configuration")
        .command(format!("ss -lntu 'sport = :{port}'")),
    )
}

/// The delivery guard lets packets reach sockets of the user, of root and of `proxy-users`; the machine's also
/// those of system users.
fn wrong_uid(facts: &Facts, proxy: &Proxy, port: u16, found: &[&Listener]) -> Option<Finding> {
    // Without the helper nobody knows whom the administrator allows.
    let allowed = &facts.helper_status()?.proxyUids;
    let stranger = found.iter().find(|listener| {
        let uid = listener.uid;
        uid != facts.uid
            && uid != 0
            && (facts.scope == Scope::User || !is_of_system(uid))
            && !allowed.contains(&i64::from(uid))
    })?;
    let uid = stranger.uid;
    let (whose, who) = match facts.scope {
        Scope::User => ("your", "run it as yourself"),
        Scope::System => ("the machine's", "run it as a system user"),
    };
    Some(
        Finding::error(
            "proxy-user",
            format!(
                "the proxy '{}' on port {port} runs as uid {uid}, which may not have {whose} packets",
                proxy.name
            ),
        )
        .effect("The delivery guard refuses every connection that is diverted to it.")
        .advice(format!(
            "{who}, or have the administrator add {uid} to proxy-users in /etc/cgtproxy/helper.yaml and \
             restart the helper"
        ))
        .command("sudo systemctl restart cgtproxy-helper.service"),
    )
}

fn not_transparent(proxy: &Proxy, port: u16, found: &[&Listener]) -> Option<Finding> {
    let plain = found
        .iter()
        .find(|listener| listener.transparent == Some(false))?;
    Some(
        Finding::error(
            "proxy-not-transparent",
            format!(
                "the {} socket of the proxy '{}' on port {port} is not transparent (IP_TRANSPARENT)",
                plain.transport, proxy.name
            ),
        )
        .effect("The kernel delivers no diverted packet to it.")
        .advice(
            "choose the proxy's tproxy kind of listener: listeners of type tproxy in mihomo, an inbound of type \
             tproxy in sing-box, sockopt.tproxy in xray; it needs CAP_NET_ADMIN for that",
        ),
    )
}

/// What is redirected reaches only sockets that were made below the user's own service manager.
fn elsewhere(facts: &Facts, proxy: &Proxy, port: u16, found: &[&Listener]) -> Option<Finding> {
    // The machine's own is everywhere.
    if facts.scope == Scope::System {
        return None;
    }
    let groups = facts.manager.groups.as_ref().ok()?;
    found.iter().find(|listener| {
        let outside = |id| groups.iter().all(|(group, _)| *group != id);
        listener.control_group.is_some_and(outside)
    })?;
    Some(
        Finding::error(
            "proxy-elsewhere",
            format!(
                "the server of '{}' on port {port} does not run below your service manager",
                proxy.name
            ),
        )
        .effect("Every connection that is redirected to it is refused.")
        .advice("run it as a service of yours, below user@UID.service")
        .command("systemd-run --user --unit=NAME COMMAND"),
    )
}

/// The control group of one of these listeners, if what runs there goes through the proxy.
pub(super) fn sent_through<'a>(
    facts: &'a Facts,
    proxy: &Proxy,
    listeners: &[&Listener],
) -> Option<&'a str> {
    let Agent::Answers(status) = &facts.agent else {
        return None;
    };
    let groups = facts.manager.groups.as_ref().ok()?;
    let ids = listeners
        .iter()
        .filter_map(|listener| listener.control_group);
    let mut paths = ids.filter_map(|id| groups.iter().find(|(group, _)| *group == id));
    paths.find_map(|(_, path)| {
        let verdict = status.controlGroups.iter().find(|g| g.path == *path)?;
        (verdict.target == proxy.name).then_some(path.as_str())
    })
}

/// A rule for a control group would mend it: what says which one decides now.
pub(super) fn explain(facts: &Facts, path: &str) -> String {
    facts.command(&format!(
        "explain {}",
        quoted(path.rsplit('/').next().unwrap_or(path))
    ))
}

/// A proxy whose own control group goes through itself.
fn loops(facts: &Facts, proxy: &Proxy, found: &[&Listener]) -> Option<Finding> {
    let path = sent_through(facts, proxy, found)?;
    Some(
        Finding::error(
            "proxy-loop",
            format!(
                "the proxy '{}' is sent through itself: it runs in {path}",
                proxy.name
            ),
        )
        .effect("What it sends to the internet comes back to it, again and again.")
        .advice("write a rule with direct: true for its unit, before the rule that catches it")
        .command(explain(facts, path)),
    )
}
