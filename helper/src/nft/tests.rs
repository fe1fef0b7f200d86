//! Every kind of message that goes to nf_tables, taken apart again. That is also what looks at the memory that
//! `ffi.rs` and libnftnl use: [`nothing_is_used_that_is_not_ours`] runs these tests under valgrind.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::ffi::CStr;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU16;
use std::process::Command;
use std::rc::Rc;

use cgtproxy_proto::name::ProxyName;
use nftnl::{FinalizedBatch, MsgType, ProtoFamily, Table, nft_nlmsg_maxsize};

use super::ffi::table_flags::{OWNER, PERSIST};
use super::ffi::{Comment, Content, Element, KeyType};
use super::names::Names;
use super::plan::{Before, Layout, Plan, Stamp, Stamped};
use super::policy::{
    self, Bypass, BypassList, Delivery, DnsHijack, Enforced, Exceptions, Fakes, Gateway, Hold,
    Proxy, ProxySettings, UdpVerdicts, Verdict,
};
use super::ruleset::Base;
use super::shared::{Remnants, Shared};
use super::transaction::Transaction;
use super::{PROBE, TABLE, probe};
use crate::cgroup::{OwnedControlGroup, Slices, Top};
use crate::mark::{MarkAllocator, MarkRange};
use crate::netlink::{Messages, attribute, attributes};
use crate::peer::Uid;

/// `NLA_F_NESTED` (linux/netlink.h).
const NESTED: u16 = 0x8000;
/// `struct nfgenmsg` (linux/netfilter/nfnetlink.h).
const FAMILY_HEADER: usize = 4;
/// `NFNL_SUBSYS_NFTABLES << 8`, and messages of it (linux/netfilter/nf_tables.h).
const NFTABLES: u16 = 10 << 8;
const NEW_SET_ELEMENTS: u16 = NFTABLES | 12;
const DELETE_SET_ELEMENTS: u16 = NFTABLES | 14;
/// `NFNL_MSG_BATCH_BEGIN` and `NFNL_MSG_BATCH_END` (linux/netfilter/nfnetlink.h).
const BATCH: [u16; 2] = [16, 17];

/// What was found in the messages of a transaction.
#[derive(Default)]
struct Found {
    kinds: Vec<u16>,
    strings: BTreeSet<String>,
    /// The keys of elements, by the type of the message that has them.
    keys: BTreeMap<u16, Vec<Vec<u8>>>,
    /// How many bytes have an odd number of bits.
    odd: usize,
}

impl Found {
    /// Takes a transaction apart to the last byte.
    fn of(batch: &FinalizedBatch) -> Self {
        let mut found = Self::default();
        for page in batch {
            let mut length = 0;
            for message in Messages(page) {
                let whole = crate::netlink::HEADER + message.payload.len();
                assert!(whole <= nft_nlmsg_maxsize() as usize);
                length += whole.next_multiple_of(4);
                let (family, attributes) = message.payload.split_at(FAMILY_HEADER);
                found.look_at(family);
                found.kinds.push(message.kind);
                if !BATCH.contains(&message.kind) {
                    found.attributes(attributes);
                    found.elements(message.kind, attributes);
                }
            }
            assert_eq!(
                length,
                page.len(),
                "the lengths of a page's messages add up"
            );
        }
        assert_eq!(found.kinds.first(), Some(&BATCH[0]));
        assert_eq!(found.kinds.last(), Some(&BATCH[1]));
        found
    }

    /// Decides something by every byte, so that valgrind complains of one that was never written.
    fn look_at(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if byte.count_ones() % 2 == 1 {
                self.odd += 1;
            }
        }
    }

    fn attributes(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let length = usize::from(u16::from_ne_bytes([bytes[0], bytes[1]]));
            let kind = u16::from_ne_bytes([bytes[2], bytes[3]]);
            let value = &bytes[4..length];
            self.look_at(&bytes[..4]);
            if kind & NESTED != 0 {
                self.attributes(value);
                bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
                continue;
            }
            self.look_at(value);
            if let Some(text) = CStr::from_bytes_with_nul(value)
                .ok()
                .and_then(|text| text.to_str().ok())
            {
                self.strings.insert(text.to_owned());
            }
            bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }

    fn elements(&mut self, kind: u16, bytes: &[u8]) {
        if ![NEW_SET_ELEMENTS, DELETE_SET_ELEMENTS].contains(&kind) {
            return;
        }
        // A message that has none flushes the set.
        let list = attribute(bytes, 3).unwrap_or_default();
        for element in attributes(list) {
            let key = attribute(element.value(), 1).and_then(|key| attribute(key, 1));
            let keys = self.keys.entry(kind).or_default();
            keys.push(key.expect("an element has a key").to_vec());
        }
    }

    #[track_caller]
    fn has(&self, names: &[&str]) {
        for name in names {
            assert!(
                self.strings.contains(*name),
                "no {name}: {:?}",
                self.strings
            );
        }
    }
}

fn marks() -> MarkRange {
    MarkRange::new(0xff00_0000).unwrap()
}

/// What a transaction on the table says.
fn transaction(fill: impl FnOnce(&mut Transaction<'_>)) -> Found {
    let table = Table::new(TABLE, ProtoFamily::Inet);
    let mut transaction = Transaction::new(&table, marks(), UdpVerdicts::default());
    fill(&mut transaction);
    Found::of(&transaction.finish())
}

fn name(name: &str) -> ProxyName {
    name.parse().unwrap()
}

fn hijack(addresses: &[IpAddr], port: u16) -> DnsHijack {
    DnsHijack {
        addresses: addresses.to_vec(),
        port: NonZeroU16::new(port).unwrap(),
        tcp: true,
        loopback: false,
        own: port != 53,
    }
}

fn list(number: u32) -> BypassList {
    let destinations = Bypass {
        ipv4: vec![
            (Ipv4Addr::new(10, 0, 0, 0), Ipv4Addr::new(10, 255, 255, 255)),
            (Ipv4Addr::new(240, 0, 0, 0), Ipv4Addr::BROADCAST),
        ],
        ipv6: vec![(Ipv6Addr::LOCALHOST, Ipv6Addr::from_bits(u128::MAX))],
    };
    BypassList {
        number,
        destinations: Rc::new(destinations),
    }
}

/// A layout with a proxy of each kind, and chains for what is held below each verdict.
pub(crate) fn layout(system: bool) -> Layout {
    let (v4, v6) = (
        Ipv4Addr::new(192, 0, 2, 53),
        "2001:db8::53".parse().unwrap(),
    );
    let port = NonZeroU16::new(7890);
    let deliveries = [
        (
            "tproxy",
            Delivery::Tproxy(port.unwrap()),
            Some(hijack(&[v4.into(), v6], 53)),
        ),
        (
            "redirect",
            Delivery::Redirect(port),
            Some(hijack(&[Ipv4Addr::LOCALHOST.into()], 5353)),
        ),
        ("nobody", Delivery::Redirect(None), None),
    ];
    let mut allocator = MarkAllocator::new(marks());
    let mut proxies = BTreeMap::new();
    for (number, (proxy, delivery, dns_hijack)) in (0..).zip(deliveries) {
        let all = number == 1;
        let proxy_of = Proxy {
            mark: allocator.allocate(Uid::ROOT).unwrap(),
            settings: ProxySettings {
                delivery,
                exceptions: Exceptions {
                    no_tcp: all,
                    no_udp: all,
                    no_ipv4: all,
                    no_ipv6: all,
                },
                reject_udp: number == 0,
                dns_hijack,
                fakes: Fakes {
                    ipv4: Some(([198, 18, 0, 0].into(), 15)),
                    ipv6: all.then(|| ("2001:2::".parse().unwrap(), 48)),
                },
            },
        };
        proxies.insert(name(proxy), proxy_of);
    }
    let verdicts = [
        Verdict::Direct,
        Verdict::Drop,
        Verdict::DropAll,
        Verdict::Proxy(name("tproxy")),
        Verdict::Undecided,
    ];
    let slices = Slices {
        users: OwnedControlGroup::for_test(1, 1).id(),
        own: OwnedControlGroup::for_test(2, 2).id(),
    };
    Layout {
        subtree: match system {
            true => Top::for_test(3, 0),
            false => Top::for_test(3, 3).within(Some(slices)),
        },
        proxies,
        bypass: Some(list(1)),
        levels: [0, 4, 5].into(),
        holds: verdicts
            .into_iter()
            .map(Some)
            .chain(system.then_some(None))
            .map(|verdict| Hold { level: 5, verdict })
            .collect(),
        enforced: system,
        holds_back: true,
        gateway: system.then(|| Gateway {
            interfaces: ["br0", "a-name-of-15-ch"]
                .into_iter()
                .map(|interface| interface.parse().unwrap())
                .collect(),
            proxy: name("tproxy"),
        }),
    }
}

/// Control groups with every verdict, held below and not, enforced and not.
fn elements(count: u64) -> Vec<(OwnedControlGroup, policy::Element)> {
    let verdict = |id| match id % 5 {
        0 => Verdict::Direct,
        1 => Verdict::Drop,
        2 => Verdict::DropAll,
        3 => Verdict::Undecided,
        _ => Verdict::Proxy(name("tproxy")),
    };
    (0..count)
        .map(|id| {
            let element = policy::Element {
                verdict: verdict(id),
                hold: id % 8 < 4,
                enforced: match id % 3 {
                    0 => Enforced::All,
                    1 => Enforced::Hold,
                    _ => Enforced::Nothing,
                },
            };
            (OwnedControlGroup::for_test(1000 + id, 4), element)
        })
        .collect()
}

/// What a helper finds that knows nothing of a life's first layout.
fn left(uid: Uid) -> Shared {
    let names = Names::of(uid);
    let layout = layout(uid == Uid::ROOT);
    let elements = |(name, proxy)| names.proxy_elements(marks(), name, proxy);
    let common = |hold: &&Hold| hold.is_common() && uid != Uid::ROOT;
    let holds = layout.holds.iter().filter(common).filter_map(|hold| {
        let (key, _) = names.hold_elements(marks(), &layout, hold).pop_first()?;
        Some((hold.clone(), key))
    });
    let holds: BTreeMap<_, _> = holds.collect();
    let mut chains = names.chains(&layout);
    chains.retain(|chain| holds.keys().all(|hold| names.hold(hold) != *chain));
    let remnants = Remnants {
        chains,
        map_keys: layout
            .proxies
            .iter()
            .flat_map(elements)
            .map(|(key, _)| key)
            .collect(),
        cgroups: (10..20)
            .map(|id| OwnedControlGroup::for_test(id, 4).id())
            .collect(),
        levels: layout.levels,
        lists: [1, 2].into(),
        holds,
    };
    Shared::found(BTreeMap::new(), [(uid, remnants)].into())
}

/// What becomes of a policy, from nothing to nothing.
fn life(uid: Uid, count: u64) -> Vec<Plan> {
    let stamped = |layout| Stamped::after(None, Rc::new(layout));
    let layout = layout(uid == Uid::ROOT);
    let mut changed = layout.clone();
    changed.subtree = Top::for_test(4, layout.subtree.level());
    changed.proxies.remove(&name("nobody"));
    changed
        .proxies
        .get_mut(&name("redirect"))
        .unwrap()
        .settings
        .delivery = Delivery::Redirect(None);
    changed.bypass = Some(list(2));
    changed.levels.remove(&5);
    changed.holds.clear();
    changed.enforced = false;
    changed.holds_back = false;
    let changed = stamped(changed);
    let elements = elements(count);
    let delete = elements.iter().map(|(cgroup, _)| cgroup.id()).collect();
    let lists = [1, 2].into();
    let left = layout.left_behind(Stamp::draw(), elements.iter().map(|(_, e)| e), lists);
    let layout = stamped(layout);
    let plan = |before, after, delete, add| Plan {
        uid,
        before,
        after,
        delete,
        add,
    };
    let is = |stamped: &Stamped| Before::Layout(stamped.clone());
    vec![
        plan(Before::Nothing, Some(layout.clone()), vec![], elements),
        plan(is(&layout), Some(changed.clone()), delete, vec![]),
        plan(is(&changed), Some(layout.clone()), vec![], vec![]),
        plan(
            Before::LeftBehind(left),
            Some(layout.clone()),
            vec![],
            vec![],
        ),
        plan(is(&layout), None, vec![], vec![]),
    ]
}

#[test]
fn a_table_and_its_base() {
    let base = Base {
        proxy_uids: &[0, 990, 1000],
        has_fib: true,
    };
    for flags in [0, OWNER | PERSIST] {
        for (fresh, system) in [(true, false), (false, false), (false, true)] {
            let found = transaction(|transaction| {
                transaction.add_table(flags);
                transaction.delete_table();
                transaction.add_table(flags);
                let mut shared = Shared::default();
                if system {
                    shared.carried_out(&life(Uid::ROOT, 0)[0]);
                }
                transaction.base(&base, &shared, fresh);
            });
            found.has(&[
                "cgtproxy",
                "version-18-ff000000",
                "output",
                "forward",
                "proxy-uids",
            ]);
            assert_eq!(found.strings.contains("delivery"), !fresh);
            let keys = &found.keys[&NEW_SET_ELEMENTS];
            let uids = [0_u32, 990, 1000].map(|uid| uid.to_ne_bytes().to_vec());
            assert!(keys.starts_with(&uids), "{keys:?}");
        }
    }
}

#[test]
fn a_probe() {
    let table = Table::new(PROBE, ProtoFamily::Inet);
    for (_, rule) in probe::FEATURES {
        let mut transaction = Transaction::new(&table, marks(), UdpVerdicts::default());
        transaction.add_table(0);
        transaction.add_rules(PROBE, [&rule]);
        Found::of(&transaction.finish()).has(&["cgtproxy-probe"]);
    }
}

#[test]
fn whole_lives_of_policies() {
    // As many control groups as fill several messages.
    const COUNT: u64 = 3000;
    for uid in [Uid::ROOT, Uid::for_test(1000)] {
        let mut strings = BTreeSet::new();
        let mut shared = Shared::default();
        for plan in life(uid, COUNT) {
            if let Before::LeftBehind(_) = plan.before {
                shared = left(uid);
            }
            let elements = plan.element_changes(&shared);
            let table = Table::new(TABLE, ProtoFamily::Inet);
            let idle = Transaction::new(&table, marks(), UdpVerdicts::default());
            assert_eq!(idle.left_out(&plan, &elements, &shared), 0);
            let found = transaction(|transaction| transaction.plan(&plan, &shared));
            shared.carried_out(&plan);
            let maps = if uid == Uid::ROOT { 2 } else { 1 };
            for (kind, count) in [
                (NEW_SET_ELEMENTS, plan.add.len()),
                (DELETE_SET_ELEMENTS, plan.delete.len()),
            ] {
                let keys = found.keys.get(&kind).map_or(&[][..], Vec::as_slice);
                // Of the others, none has an id that large.
                let ids = keys
                    .iter()
                    .filter_map(|key| key.as_slice().try_into().ok().map(u64::from_ne_bytes))
                    .filter(|id| (1000..1000 + COUNT).contains(id));
                assert_eq!(ids.count(), maps * count);
            }
            strings.extend(found.strings);
        }
        let found = Found {
            strings,
            ..Found::default()
        };
        let system = uid == Uid::ROOT;
        found.has(&match system {
            true => ["drop-system", "cgroups-0", "choices-0", "enforced"],
            false => ["drop", "cgroups", "choices", "drops"],
        });
        found.has(&["users", "stamps", "marks", "ports", "resolve", "receive"]);
        for prefix in ["bypass4", "bypass6", "drop"] {
            for number in [1, 2] {
                found.has(&[&format!("{prefix}-{number}")]);
            }
        }
        for proxy in ["tproxy", "redirect", "nobody"] {
            found.has(&[&format!("proxy-{uid}-{proxy}")]);
            let divert = format!("divert-{uid}-{proxy}");
            assert_eq!(found.strings.contains(&divert), system);
        }
        for proxy in ["tproxy", "redirect"] {
            found.has(&[&format!("dns-{uid}-{proxy}")]);
            found.has(&[&format!("resolve-{uid}-{proxy}")]);
        }
        found.has(&[&format!("redirect-{uid}-redirect")]);
        for proxy in ["redirect", "nobody"] {
            found.has(&[&format!("receive-{uid}-{proxy}")]);
        }
        found.has(&[&format!("hold-{uid}-5-tproxy")]);
        for verdict in ["direct", "drop", "drop-all", "_undecided"] {
            let whose = if system { "0-" } else { "" };
            found.has(&[&format!("hold-{whose}5-{verdict}")]);
        }
        assert_eq!(found.strings.contains("hold-0-5-_users"), system);
        // Every kind of expression.
        found.has(&[
            "bitwise",
            "cmp",
            "ct",
            "fib",
            "immediate",
            "lookup",
            "meta",
            "nat",
            "payload",
            "reject",
            "socket",
        ]);
    }
}

#[test]
fn elements_of_every_kind() {
    const COUNT: u32 = 5000;
    let contents = [
        Content::Keys,
        Content::Intervals,
        Content::Verdicts,
        Content::Values(KeyType::Mark),
    ];
    for (key, length) in [
        (KeyType::Ipv4, 4),
        (KeyType::Ipv6, 16),
        (KeyType::Mark, 4),
        (KeyType::Uid, 4),
        (KeyType::Interface, 16),
        (KeyType::ControlGroup, 8),
        (KeyType::Port, 2),
        (KeyType::MarkAndUid, 8),
    ] {
        for content in contents {
            let keys = (0..COUNT).map(|number| {
                let number = number.to_be_bytes();
                let mut key = number.last_chunk::<2>().unwrap().to_vec();
                key.extend_from_slice(&number[..2]);
                key.resize(length, 0xff);
                key
            });
            let found = transaction(|transaction| {
                transaction.add_set(c"some-set", key, content);
                let mut set = transaction.set(c"some-set", key, content);
                let whose = Comment::new(Uid::for_test(u32::MAX));
                for (number, key) in (0..).zip(keys.clone()) {
                    let value = u32::to_ne_bytes(number);
                    let element = match content {
                        Content::Keys => Element::Key,
                        Content::Intervals if number % 2 == 0 => Element::Key,
                        Content::Intervals => Element::IntervalEnd,
                        Content::Verdicts if number % 3 == 0 => Element::Drop,
                        Content::Verdicts if number % 3 == 1 => Element::Return,
                        Content::Verdicts => Element::Goto(c"some-chain"),
                        Content::Values(_) => Element::Value(&value),
                    };
                    let comment = (number % 2 == 0).then_some(&whose);
                    set.push_with(&key, element, comment);
                }
                transaction.write_elements(&set, MsgType::Add);
                transaction.write_elements(&set, MsgType::Del);
                // One without elements writes nothing.
                let empty = transaction.set(c"some-set", key, content);
                transaction.write_elements(&empty, MsgType::Add);
                transaction.flush_set(c"some-set");
                transaction.delete_set(c"some-set");
            });
            found.has(&["cgtproxy", "some-set"]);
            let keys: Vec<_> = keys.collect();
            for kind in [NEW_SET_ELEMENTS, DELETE_SET_ELEMENTS] {
                assert!(found.keys[&kind] == keys, "{key:?} {content:?}");
                let messages = found.kinds.iter().filter(|other| **other == kind).count();
                assert!(messages > 1, "{messages} messages for {key:?} {content:?}");
            }
        }
    }
}

/// Runs the others again under valgrind: an access to memory that is not there or not ours, an object that nobody
/// freed, or a byte of a message that was never written is a failure. Not looked at is what stands between attributes
/// so that the next one begins at a multiple of four: libmnl 1.0.4 leaves it as it was in the page that libnftnl has
/// allocated (`nftnl_batch_alloc`), and the kernel never reads it.
#[test]
fn nothing_is_used_that_is_not_ours() {
    let others = [
        "a_table_and_its_base",
        "a_probe",
        "whole_lives_of_policies",
        "elements_of_every_kind",
    ];
    let output = Command::new("valgrind")
        .args(["--quiet", "--error-exitcode=1", "--leak-check=full"])
        .arg("--errors-for-leak-kinds=definite")
        .arg(env::current_exe().unwrap())
        .args(["--exact", "--test-threads=1"])
        .args(others.map(|test| format!("nft::tests::{test}")))
        .output()
        .expect("this needs valgrind");
    let text = [&output.stdout[..], &output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    assert!(output.status.success(), "{text}");
    let passed = format!("{} passed", others.len());
    assert!(text.contains(&passed), "not all of them ran: {text}");
}
