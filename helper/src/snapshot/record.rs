//! A record of the snapshot: one user's layout, as it is written down. Reading takes any bytes.

use std::collections::BTreeSet;
use std::rc::Rc;

use cgtproxy_proto::limits::MESSAGE_BYTES;
use cgtproxy_proto::name::ProxyName;
use serde::{Deserialize, Serialize};

use crate::cgroup::{ControlGroupId, OwnedControlGroup, Top};
use crate::mark::{Mark, MarkRange};
use crate::nft::{Bypass, BypassList, Gateway, Hold, Layout, Proxy, ProxySettings, Stamp, Verdict};
use crate::peer::Uid;

/// More memory than any layout takes: a policy comes in one message.
const LONGEST: usize = 4 * MESSAGE_BYTES;

/// One after the other, as if they were one structure: what comes before the bypass list, and after it.
#[derive(Deserialize)]
struct Record {
    before: Before,
    /// The list's number, and what is in it.
    bypass: Option<(u32, Bypass)>,
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
struct ProxyRecord {
    name: String,
    mark: u32,
    settings: ProxySettings,
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
    bytes(&list.map(|list| (list.number, &*list.destinations)))
}

/// The record's bytes, those of its bypass list among them.
pub(super) fn encode(uid: Uid, stamp: Stamp, layout: &Layout, list: &[u8]) -> Vec<u8> {
    let proxies = layout.proxies.iter().map(|(name, proxy)| ProxyRecord {
        name: name.to_string(),
        mark: proxy.mark.value(),
        settings: proxy.settings.clone(),
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
        bypass: bypass.map(|(number, destinations)| BypassList {
            number,
            destinations: Rc::new(destinations),
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
    let settings = record.settings;
    Some((record.name.parse().ok()?, Proxy { mark, settings }))
}
