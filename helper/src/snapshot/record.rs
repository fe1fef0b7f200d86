//! A record of the snapshot: one user's layout, as it is written down. Reading takes any bytes.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU16;
use std::rc::Rc;

use cgtproxy_proto::limits::MESSAGE_BYTES;
use cgtproxy_proto::name::ProxyName;
use serde::{Deserialize, Serialize};

use crate::cgroup::{ControlGroupId, OwnedControlGroup, Top};
use crate::mark::{Mark, MarkRange};
use crate::nft::{
    Bypass, BypassList, Delivery, DnsHijack, Exceptions, Fakes, Gateway, Hold, Layout, Proxy,
    ProxySettings, Stamp, Verdict,
};
use crate::peer::Uid;

/// More memory than any layout takes: a policy comes in one message.
const LONGEST: usize = 4 * MESSAGE_BYTES;

/// One after the other, as if they were one structure: what comes before the bypass list, and after it.
#[derive(Deserialize)]
struct Record {
    before: Before,
    bypass: Option<BypassRecord>,
    after: After,
}

#[derive(Serialize, Deserialize)]
struct Before {
    uid: u32,
    stamp: u32,
    /// Id and level.
    subtree: (u64, u32),
    proxies: Vec<ProxyRecord>,
}

#[derive(Serialize, Deserialize)]
struct After {
    levels: BTreeSet<u32>,
    holds: Vec<(u32, VerdictRecord)>,
    enforced: bool,
    /// Interfaces, and the proxy.
    gateway: Option<(Vec<String>, String)>,
    holds_back: bool,
}

#[derive(Serialize, Deserialize)]
struct BypassRecord {
    number: u32,
    ipv4: Vec<(Ipv4Addr, Ipv4Addr)>,
    ipv6: Vec<(Ipv6Addr, Ipv6Addr)>,
}

#[derive(Serialize, Deserialize)]
struct ProxyRecord {
    name: String,
    mark: u32,
    delivery: DeliveryRecord,
    /// No TCP, UDP, IPv4, IPv6.
    exceptions: [bool; 4],
    reject_udp: bool,
    dns_hijack: Option<DnsRecord>,
    fakes: FakesRecord,
}

#[derive(Serialize, Deserialize)]
enum DeliveryRecord {
    Tproxy(NonZeroU16),
    Redirect(Option<NonZeroU16>),
}

#[derive(Serialize, Deserialize)]
struct DnsRecord {
    addresses: Vec<IpAddr>,
    port: NonZeroU16,
    tcp: bool,
    loopback: bool,
    own: bool,
}

/// The networks whose addresses stand for names.
#[derive(Serialize, Deserialize)]
struct FakesRecord {
    ipv4: Option<(Ipv4Addr, u8)>,
    ipv6: Option<(Ipv6Addr, u8)>,
}

#[derive(Serialize, Deserialize)]
enum VerdictRecord {
    Direct,
    Drop,
    DropAll,
    Proxy(String),
    Undecided,
    /// It is users' own policies' to say.
    Users,
}

/// A list's bytes within a record.
pub(super) fn encode_list(list: Option<&BypassList>) -> Vec<u8> {
    bytes(&list.map(|list| BypassRecord {
        number: list.number,
        ipv4: list.destinations.ipv4.clone(),
        ipv6: list.destinations.ipv6.clone(),
    }))
}

/// The record's bytes, those of its bypass list among them.
pub(super) fn encode(uid: Uid, stamp: Stamp, layout: &Layout, list: &[u8]) -> Vec<u8> {
    let proxies = layout.proxies.iter().map(|(name, proxy)| ProxyRecord {
        name: name.to_string(),
        mark: proxy.mark.value(),
        delivery: match proxy.settings.delivery {
            Delivery::Tproxy(port) => DeliveryRecord::Tproxy(port),
            Delivery::Redirect(port) => DeliveryRecord::Redirect(port),
        },
        exceptions: [
            proxy.settings.exceptions.no_tcp,
            proxy.settings.exceptions.no_udp,
            proxy.settings.exceptions.no_ipv4,
            proxy.settings.exceptions.no_ipv6,
        ],
        reject_udp: proxy.settings.reject_udp,
        dns_hijack: proxy.settings.dns_hijack.as_ref().map(|hijack| DnsRecord {
            addresses: hijack.addresses.clone(),
            port: hijack.port,
            tcp: hijack.tcp,
            loopback: hijack.loopback,
            own: hijack.own,
        }),
        fakes: FakesRecord {
            ipv4: proxy.settings.fakes.ipv4,
            ipv6: proxy.settings.fakes.ipv6,
        },
    });
    let verdict = |verdict: &Option<Verdict>| match verdict {
        Some(Verdict::Direct) => VerdictRecord::Direct,
        Some(Verdict::Drop) => VerdictRecord::Drop,
        Some(Verdict::DropAll) => VerdictRecord::DropAll,
        Some(Verdict::Proxy(name)) => VerdictRecord::Proxy(name.to_string()),
        Some(Verdict::Undecided) => VerdictRecord::Undecided,
        None => VerdictRecord::Users,
    };
    let before = Before {
        uid: uid.value(),
        stamp: stamp.value(),
        subtree: (
            u64::from_ne_bytes(layout.subtree.id().to_bytes()),
            layout.subtree.level(),
        ),
        proxies: proxies.collect(),
    };
    let after = After {
        levels: layout.levels.clone(),
        holds: layout
            .holds
            .iter()
            .map(|hold| (hold.level, verdict(&hold.verdict)))
            .collect(),
        enforced: layout.enforced,
        gateway: layout.gateway.as_ref().map(|gateway| {
            let interfaces = gateway.interfaces.iter().map(ToString::to_string);
            (interfaces.collect(), gateway.proxy.to_string())
        }),
        holds_back: layout.holds_back,
    };
    [&bytes(&before), list, &bytes(&after)].concat()
}

fn bytes(part: &impl Serialize) -> Vec<u8> {
    // Nothing in it is of a kind that can't be written.
    bincode::serde::encode_to_vec(part, bincode::config::standard()).unwrap_or_default()
}

/// What a record says; none if it makes no sense.
pub(super) fn decode(bytes: &[u8], range: MarkRange) -> Option<(u32, Stamp, Layout)> {
    // A list's length is believed only as far as there are bytes for it (serde's size hints are cautious), but room is
    // made for a string before it is read.
    let format = bincode::config::standard().with_limit::<LONGEST>();
    let (record, read): (Record, usize) = bincode::serde::decode_from_slice(bytes, format).ok()?;
    if read != bytes.len() {
        return None;
    }
    let Record {
        before,
        bypass,
        after,
    } = record;
    let (id, level) = before.subtree;
    let subtree = OwnedControlGroup::found(ControlGroupId::from_bytes(id.to_ne_bytes()), level);
    let mut layout = Layout {
        subtree: Top::new(subtree),
        proxies: before
            .proxies
            .into_iter()
            .map(|proxy| self::proxy(proxy, range))
            .collect::<Option<_>>()?,
        bypass: bypass.map(|list| BypassList {
            number: list.number,
            destinations: Rc::new(Bypass {
                ipv4: list.ipv4,
                ipv6: list.ipv6,
            }),
        }),
        levels: after.levels,
        holds: BTreeSet::new(),
        enforced: after.enforced,
        holds_back: after.holds_back,
        gateway: None,
    };
    let known = |name: String| {
        let name: ProxyName = name.parse().ok()?;
        layout.proxies.contains_key(&name).then_some(name)
    };
    let mut holds = BTreeSet::new();
    for (level, verdict) in after.holds {
        let verdict = match verdict {
            VerdictRecord::Direct => Some(Verdict::Direct),
            VerdictRecord::Drop => Some(Verdict::Drop),
            VerdictRecord::DropAll => Some(Verdict::DropAll),
            VerdictRecord::Proxy(name) => Some(Verdict::Proxy(known(name)?)),
            VerdictRecord::Undecided => Some(Verdict::Undecided),
            VerdictRecord::Users => None,
        };
        holds.insert(Hold { level, verdict });
    }
    let gateway = match after.gateway {
        Some((interfaces, proxy)) => Some(Gateway {
            interfaces: interfaces
                .into_iter()
                .map(|name| name.parse().ok())
                .collect::<Option<_>>()?,
            proxy: known(proxy)?,
        }),
        None => None,
    };
    layout.holds = holds;
    layout.gateway = gateway;
    Some((before.uid, Stamp::found(before.stamp), layout))
}

fn proxy(record: ProxyRecord, range: MarkRange) -> Option<(ProxyName, Proxy)> {
    let mark = Mark::adopted(record.mark);
    if !range.has(mark) {
        return None;
    }
    let [no_tcp, no_udp, no_ipv4, no_ipv6] = record.exceptions;
    let FakesRecord { ipv4, ipv6 } = record.fakes;
    let settings = ProxySettings {
        delivery: match record.delivery {
            DeliveryRecord::Tproxy(port) => Delivery::Tproxy(port),
            DeliveryRecord::Redirect(port) => Delivery::Redirect(port),
        },
        exceptions: Exceptions {
            no_tcp,
            no_udp,
            no_ipv4,
            no_ipv6,
        },
        reject_udp: record.reject_udp,
        dns_hijack: record.dns_hijack.map(|hijack| DnsHijack {
            addresses: hijack.addresses,
            port: hijack.port,
            tcp: hijack.tcp,
            loopback: hijack.loopback,
            own: hijack.own,
        }),
        fakes: Fakes { ipv4, ipv6 },
    };
    Some((record.name.parse().ok()?, Proxy { mark, settings }))
}
