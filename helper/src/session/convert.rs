//! From what a message says to what the state is given, and back.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU16;

use cgtproxy_proto::helper::{self as wire, Assignment, SkipReason};
use cgtproxy_proto::name::ProxyName;
use cgtproxy_proto::network::Network;
use cgtproxy_proto::path::ControlGroupPath;

use super::Error;
use crate::cgroup::Unavailable;
use crate::nft::{
    Delivery, DnsHijack, Element, Enforced, Exceptions, Fakes, Gateway, ProxySettings, Verdict,
};
use crate::peer::Uid;
use crate::state::Skipped;

/// A proxy; the name of the field that is wrong otherwise.
pub(super) fn proxy(
    uid: Uid,
    proxy: wire::Proxy,
) -> Result<(ProxyName, ProxySettings), &'static str> {
    let port = u16::try_from(proxy.port).map_err(|_| "port")?;
    let port = NonZeroU16::new(port);
    let name = proxy.name.parse().map_err(|_| "name")?;
    let settings = ProxySettings {
        delivery: match (proxy.redirect.unwrap_or(false), port) {
            // What is translated reaches only the caller's own sockets, and all are root's.
            (true, _) if uid == Uid::ROOT => return Err("redirect"),
            (true, port) => Delivery::Redirect(port),
            (false, Some(port)) => Delivery::Tproxy(port),
            (false, None) => return Err("port"),
        },
        exceptions: Exceptions {
            no_tcp: proxy.noTcp.unwrap_or(false),
            no_udp: proxy.noUdp.unwrap_or(false),
            no_ipv4: proxy.noIpv4.unwrap_or(false),
            no_ipv6: proxy.noIpv6.unwrap_or(false),
        },
        reject_udp: proxy.rejectUdp.unwrap_or(false),
        dns_hijack: proxy.dnsHijack.map(dns_hijack).transpose()?,
        fakes: fakes(proxy.fakeIpv4.as_deref(), proxy.fakeIpv6.as_deref())?,
    };
    Ok((name, settings))
}

/// A proxy, for a status.
pub(super) fn proxy_reply(name: &ProxyName, settings: &ProxySettings) -> wire::Proxy {
    let fakes = &settings.fakes;
    wire::Proxy {
        name: name.to_string(),
        port: settings.delivery.port().into(),
        redirect: Some(matches!(settings.delivery, Delivery::Redirect(_))),
        noTcp: Some(settings.exceptions.no_tcp),
        noUdp: Some(settings.exceptions.no_udp),
        rejectUdp: Some(settings.reject_udp),
        noIpv4: Some(settings.exceptions.no_ipv4),
        noIpv6: Some(settings.exceptions.no_ipv6),
        dnsHijack: settings.dns_hijack.as_ref().map(dns_hijack_reply),
        fakeIpv4: fakes.ipv4.map(|(ip, prefix)| format!("{ip}/{prefix}")),
        fakeIpv6: fakes.ipv6.map(|(ip, prefix)| format!("{ip}/{prefix}")),
    }
}

/// What is forwarded, which root alone may say.
pub(super) fn gateway(uid: Uid, gateway: wire::Gateway) -> Result<Gateway, Error> {
    if uid != Uid::ROOT {
        return Err(Error::Parameter("gateway".to_owned()));
    }
    let mut interfaces = BTreeSet::new();
    for (index, name) in gateway.interfaces.iter().enumerate() {
        let name = name
            .parse()
            .map_err(|_| Error::Parameter(format!("gateway.interfaces[{index}]")))?;
        interfaces.insert(name);
    }
    let proxy = gateway.proxy.parse();
    Ok(Gateway {
        interfaces,
        proxy: proxy.map_err(|_| Error::Parameter("gateway.proxy".to_owned()))?,
    })
}

/// What is said about control groups, from the list that is the parameter of this name.
pub(crate) fn assignments(
    uid: Uid,
    parameter: &str,
    assignments: Vec<Assignment>,
) -> Result<BTreeMap<ControlGroupPath, Element>, Error> {
    let element = |(index, assignment): (usize, Assignment)| {
        let invalid = |field: &str| Error::Parameter(format!("{parameter}[{index}].{field}"));
        let path = ControlGroupPath::from_wire(&assignment.controlGroup)
            .map_err(|_| invalid("controlGroup"))?;
        let proxy = assignment.proxy.map(|name| name.parse::<ProxyName>());
        let undecided = assignment.undecided.unwrap_or(false);
        if undecided && assignment.verdict != wire::Verdict::direct {
            return Err(invalid("undecided"));
        }
        let verdict = match (assignment.verdict, proxy) {
            (wire::Verdict::direct, None) if undecided => Verdict::Undecided,
            (wire::Verdict::direct, None) => Verdict::Direct,
            (wire::Verdict::drop, None) => Verdict::Drop,
            (wire::Verdict::dropAll, None) => Verdict::DropAll,
            (wire::Verdict::proxy, Some(Ok(name))) => Verdict::Proxy(name),
            _ => return Err(invalid("proxy")),
        };
        let hold = assignment.hold.unwrap_or(false);
        let enforced = match (assignment.enforce, assignment.enforceHold) {
            (Some(true), _) if uid != Uid::ROOT => return Err(invalid("enforce")),
            (_, Some(true)) if uid != Uid::ROOT => return Err(invalid("enforceHold")),
            (Some(true), _) => Enforced::All,
            (_, Some(true)) if hold => Enforced::Hold,
            (_, Some(true)) => return Err(invalid("enforceHold")),
            _ => Enforced::Nothing,
        };
        let element = Element {
            verdict,
            hold,
            enforced,
        };
        Ok((path, element))
    };
    let said: Result<Vec<_>, Error> = assignments.into_iter().enumerate().map(element).collect();
    let said = said?;
    let paths: Vec<_> = said.iter().map(|(path, _)| path.clone()).collect();
    // Collected at once: they are mostly sorted, which is faster than inserting one by one.
    let elements: BTreeMap<_, _> = said.into_iter().collect();
    // Which one is meant is nobody's to guess.
    if elements.len() < paths.len() {
        let mut seen = BTreeSet::new();
        let again = paths.iter().position(|path| !seen.insert(path));
        let index = again.unwrap_or_default();
        return Err(Error::Parameter(format!(
            "{parameter}[{index}].controlGroup"
        )));
    }
    Ok(elements)
}

/// Control groups that have no verdict of their own any more, from `remove`; none of them is assigned one as well.
pub(super) fn removals(
    remove: &[String],
    assign: &BTreeMap<ControlGroupPath, Element>,
) -> Result<BTreeSet<ControlGroupPath>, Error> {
    let invalid = |index: usize| Error::Parameter(format!("remove[{index}]"));
    let mut paths = BTreeSet::new();
    for (index, path) in remove.iter().enumerate() {
        let path = ControlGroupPath::from_wire(path).map_err(|_| invalid(index))?;
        if assign.contains_key(&path) || !paths.insert(path) {
            return Err(invalid(index));
        }
    }
    Ok(paths)
}

/// Networks of addresses that stand for names; the name of the field that is wrong otherwise.
fn fakes(ipv4: Option<&str>, ipv6: Option<&str>) -> Result<Fakes, &'static str> {
    let network = |text: &str| text.parse::<Network>().ok();
    let ipv4 = ipv4.map(|text| network(text).and_then(Network::ipv4).ok_or("fakeIpv4"));
    let ipv6 = ipv6.map(|text| network(text).and_then(Network::ipv6).ok_or("fakeIpv6"));
    Ok(Fakes {
        ipv4: ipv4.transpose()?,
        ipv6: ipv6.transpose()?,
    })
}

/// A hijack of DNS queries, each address of its family; the name of the field that is wrong otherwise.
fn dns_hijack(hijack: wire::DnsHijack) -> Result<DnsHijack, &'static str> {
    let mut addresses = Vec::new();
    if let Some(address) = hijack.ipv4 {
        let address: Ipv4Addr = address.parse().map_err(|_| "dnsHijack.ipv4")?;
        addresses.push(address.into());
    }
    if let Some(address) = hijack.ipv6 {
        let address: Ipv6Addr = address.parse().map_err(|_| "dnsHijack.ipv6")?;
        addresses.push(address.into());
    }
    if addresses.is_empty() {
        return Err("dnsHijack");
    }
    let port = u16::try_from(hijack.port).ok().and_then(NonZeroU16::new);
    Ok(DnsHijack {
        addresses,
        port: port.ok_or("dnsHijack.port")?,
        tcp: hijack.tcp.unwrap_or(false),
        loopback: hijack.loopback.unwrap_or(true),
        own: hijack.own.unwrap_or(false),
    })
}

/// A hijack of DNS queries, for a status.
fn dns_hijack_reply(hijack: &DnsHijack) -> wire::DnsHijack {
    let of = |ipv4| {
        hijack
            .addresses
            .iter()
            .find(|a| a.is_ipv4() == ipv4)
            .map(IpAddr::to_string)
    };
    wire::DnsHijack {
        ipv4: of(true),
        ipv6: of(false),
        port: hijack.port.get().into(),
        tcp: Some(hijack.tcp),
        loopback: Some(hijack.loopback),
        own: Some(hijack.own),
    }
}

/// The control groups that can't be had.
pub(super) fn skipped_reply(skipped: Vec<Skipped>) -> Vec<wire::Skipped> {
    let reply = |(path, why): Skipped| wire::Skipped {
        controlGroup: path.to_wire(),
        reason: match why {
            Unavailable::Missing => SkipReason::missing,
            Unavailable::NotOwned => SkipReason::notOwned,
            Unavailable::NotControlGroup => SkipReason::notControlGroup,
            // A call that met the latter is refused as a whole.
            Unavailable::Unreadable | Unavailable::Later => SkipReason::unreadable,
            Unavailable::TooDeep => SkipReason::tooDeep,
        },
    };
    skipped.into_iter().map(reply).collect()
}

/// Varlink's integers are signed.
pub(super) fn number(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
