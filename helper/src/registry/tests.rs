//! The registry against a model of the kernel.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::num::NonZeroU16;

use proptest::prelude::*;

use super::*;
use crate::config::OnAgentLoss;
use crate::kernel::model::Table;
use crate::mark::Mark;
use crate::nft::{Delivery, Enforced, Exceptions, Fakes, Hold, Verdict};
use crate::snapshot::{Memory, Snapshot};

/// Root's policy is the system's.
const UIDS: [u32; 3] = [1000, 1001, 0];

fn assert_consistent(registry: &Registry, table: &Table) {
    let mut marks = BTreeSet::new();
    for uid in UIDS.map(Uid::for_test) {
        let objects = table.of(uid);
        let user = match (registry.users.get(&uid), objects) {
            (Some(Entry::Policy(user)), Some(_)) => user,
            // What an earlier helper left is known whole, or as far as it can be read.
            (Some(Entry::Known(known)), Some(objects)) => {
                assert_eq!(
                    (&*known.stamped.layout, known.stamped.stamp),
                    (&objects.layout, objects.stamp)
                );
                assert_eq!(told(known.elements.iter()), objects.elements);
                let proxies = &known.stamped.layout.proxies;
                for (_, element) in &known.elements {
                    assert_eq!(stage::known(proxies, &element.verdict), Ok(()));
                }
                for proxy in known.stamped.layout.proxies.values() {
                    assert!(marks.insert(proxy.mark), "two proxies have one mark");
                    assert!(registry.marks.is_used(proxy.mark));
                }
                continue;
            }
            (Some(Entry::LeftBehind(left)), Some(objects)) => {
                objects.assert_read(left);
                for &mark in left.proxies.values() {
                    assert!(marks.insert(mark), "two proxies have one mark");
                    assert!(registry.marks.is_used(mark));
                }
                continue;
            }
            (None, None) => continue,
            (entry, objects) => panic!("{entry:?} is not {objects:?}"),
        };
        let objects = objects.unwrap();
        assert_eq!(objects.layout, *user.stamped.layout);
        let known = told(user.cgroups.values());
        assert_eq!(objects.elements, known);
        let levels: BTreeSet<_> = user.cgroups.values().map(|(c, _)| c.level()).collect();
        assert!(
            user.stamped.layout.levels.is_superset(&levels),
            "a level is there while it is used"
        );
        let holds: BTreeSet<_> = user
            .cgroups
            .values()
            .flat_map(|(c, element)| Hold::all_of(c.level(), element))
            .collect();
        assert_eq!(
            user.stamped.layout.holds, holds,
            "a chain is there while it is used"
        );
        assert!(user.cgroups.len() <= registry.limits.control_groups);
        for element in known.values() {
            let proxies = &user.stamped.layout.proxies;
            assert_eq!(stage::known(proxies, &element.verdict), Ok(()));
        }
        assert_eq!(
            user.stamped.layout.enforced,
            known
                .values()
                .any(|element| element.enforced != Enforced::Nothing),
            "the enforced verdicts are looked up while there are any"
        );
        assert!(
            user.stamped.layout.holds_back || !known.values().any(Element::holds_back),
            "packets of open connections are looked at while anything is dropped"
        );
        if let Some(gateway) = &user.stamped.layout.gateway {
            assert!(user.stamped.layout.proxies.contains_key(&gateway.proxy));
        }
        for proxy in user.stamped.layout.proxies.values() {
            assert!(marks.insert(proxy.mark), "two proxies have one mark");
            assert!(registry.marks.is_used(proxy.mark));
        }
    }
}

/// What the kernel is told of these.
fn told<'a>(
    elements: impl Iterator<Item = &'a (OwnedControlGroup, Element)>,
) -> BTreeMap<ControlGroupId, Element> {
    let told = |(cgroup, element): &'a (OwnedControlGroup, Element)| {
        let hold = Hold::of(cgroup.level(), element).is_some();
        let told = Element {
            hold,
            ..element.clone()
        };
        (cgroup.id(), told)
    };
    elements.map(told).collect()
}

#[derive(Debug, Clone)]
enum Call {
    Replace(Vec<u8>, Vec<(u8, u8, u8)>, Option<u8>),
    Update(Vec<(u8, u8, u8)>, Vec<u8>),
    Remove,
    Lose(OnAgentLoss),
    /// The helper is killed, and the next one is given this much of its snapshot.
    Restart(Fate),
}

/// What becomes of a snapshot.
#[derive(Debug, Clone)]
enum Fate {
    Whole,
    Cut(prop::sample::Index),
    Lost,
}

fn fate() -> impl Strategy<Value = Fate> {
    prop_oneof![
        Just(Fate::Whole),
        any::<prop::sample::Index>().prop_map(Fate::Cut),
        Just(Fate::Lost),
    ]
}

fn call() -> impl Strategy<Value = Call> {
    let assignments = || proptest::collection::vec((0u8..8, 0u8..6, 0u8..6), 0..8);
    prop_oneof![
        (
            proptest::collection::vec(0u8..4, 0..4),
            assignments(),
            proptest::option::of(0u8..4)
        )
            .prop_map(|(proxies, cgroups, gateway)| Call::Replace(proxies, cgroups, gateway)),
        (assignments(), proptest::collection::vec(0u8..8, 0..5))
            .prop_map(|(assign, remove)| Call::Update(assign, remove)),
        Just(Call::Remove),
        prop_oneof![
            Just(OnAgentLoss::Keep),
            Just(OnAgentLoss::Direct),
            Just(OnAgentLoss::Drop)
        ]
        .prop_map(Call::Lose),
        fate().prop_map(Call::Restart),
    ]
}

fn path(number: u8) -> ControlGroupPath {
    let depth = usize::from(number % 3) + 1;
    ControlGroupPath::from_wire(&vec![format!("c{number}"); depth].join("/")).unwrap()
}

/// One address; with the number 0 none.
fn bypass(number: u64) -> Bypass {
    let address = Ipv4Addr::from(number as u32);
    Bypass {
        ipv4: [(address, address)]
            .into_iter()
            .take(number.min(1) as usize)
            .collect(),
        ipv6: Vec::new(),
    }
}

/// A policy without a proxy and without a destination that it leaves alone.
fn nothing_of(subtree: Top) -> PolicyRequest {
    PolicyRequest {
        subtree,
        proxies: Vec::new(),
        bypass_entries: 0,
        bypass: Bypass::default(),
        gateway: None,
    }
}

fn name(number: u8) -> ProxyName {
    format!("p{number}").parse().unwrap()
}

fn elements(cgroups: Vec<(u8, u8, u8)>) -> BTreeMap<ControlGroupPath, Element> {
    let verdict = |number| match number {
        0 => Verdict::Direct,
        1 => Verdict::Drop,
        2 => Verdict::DropAll,
        number => Verdict::Proxy(name(number - 3)),
    };
    cgroups
        .into_iter()
        .map(|(cgroup, number, flags)| {
            let element = Element {
                verdict: verdict(number),
                hold: flags & 1 != 0,
                enforced: match flags {
                    2 | 3 => Enforced::All,
                    5 => Enforced::Hold,
                    _ => Enforced::Nothing,
                },
            };
            (path(cgroup), element)
        })
        .collect()
}

proptest! {
    /// Whatever is called in whatever order, whatever vanishes or is made anew meanwhile, whatever the kernel
    /// refuses, and whenever the helper is killed, with its snapshot or without: what the registry knows is what
    /// the kernel has.
    #[test]
    #[cfg_attr(miri, ignore = "minutes for a single case")]
    fn knows_what_the_kernel_has(
        calls in proptest::collection::vec((0usize..3, call(), any::<bool>(), any::<u64>()), 1..40)
    ) {
        let limits = Limits { proxies: 3, bypass: 1, control_groups: 5, ..Limits::default() };
        let range = MarkRange::new(0x0000_0f00).unwrap();
        let mut registry = Registry::new(limits, range);
        let mut table = Table::default();
        let memory = Memory::default();
        let (mut snapshot, _) = Snapshot::in_memory(&memory, range);
        snapshot.renew(range, registry.layouts());
        for (user, call, refused, seed) in calls {
            let uid = Uid::for_test(UIDS[user]);
            let subtree = Top::for_test(u64::from(UIDS[user]) + seed % 2, 3);
            // Some control groups are gone, some have a new id since the last call.
            let open = |path: &ControlGroupPath| {
                let number = u64::from(path.as_bytes()[1] - b'0');
                let fate = seed >> (number * 2) & 3;
                (fate != 0).then(|| {
                    let id = number * 4 + fate.min(2) + UIDS[user] as u64 * 1000;
                    OwnedControlGroup::for_test(id, 3 + path.depth() as u32)
                })
            };
            let staged = match call {
                Call::Replace(proxies, cgroups, gateway) => {
                    let proxies = proxies.into_iter().map(|number| (name(number), ProxySettings {
                        delivery: match seed >> 8 & 3 {
                            0 => Delivery::Redirect(None),
                            1 => Delivery::Redirect(Some(NonZeroU16::MIN)),
                            _ => Delivery::Tproxy(NonZeroU16::MIN),
                        },
                        reject_udp: seed & 2 != 0,
                        exceptions: Exceptions { no_udp: seed & 1 != 0, ..Exceptions::default() },
                        dns_hijack: None,
                        fakes: Fakes {
                            ipv4: (seed & 4 != 0).then(|| ([198, 18, 0, 0].into(), 15)),
                            ipv6: None,
                        },
                    }));
                    let policy = PolicyRequest {
                        subtree,
                        proxies: proxies.collect(),
                        bypass_entries: 1,
                        bypass: bypass(seed >> 10 & 3),
                        gateway: gateway.map(|number| Gateway {
                            interfaces: [format!("br{number}").parse().unwrap()].into(),
                            proxy: name(number),
                        }),
                    };
                    registry.replace(uid, policy, elements(cgroups), open)
                }
                Call::Update(assign, remove) => {
                    let remove = remove.into_iter().map(path).collect();
                    registry.update(uid, subtree, elements(assign), remove, open)
                }
                Call::Remove => Ok(registry.remove(uid)),
                Call::Lose(loss) => match registry.remains(uid, loss) {
                    Remains::Nothing => Ok(registry.remove(uid)),
                    Remains::Part(staged) => {
                        let after = &staged.plan().after.as_ref().unwrap().layout;
                        assert!(after.proxies.is_empty() && after.gateway.is_none());
                        Ok(*staged)
                    }
                    Remains::All => continue,
                },
                Call::Restart(fate) => {
                    match fate {
                        Fate::Whole => {}
                        Fate::Cut(place) => {
                            let length = place.index(memory.borrow().len() + 1);
                            memory.borrow_mut().truncate(length);
                        }
                        Fate::Lost => memory.borrow_mut().clear(),
                    }
                    let (next, records) = Snapshot::in_memory(&memory, range);
                    snapshot = next;
                    registry = Registry::new(limits, range);
                    for (uid, left) in table.inherited(&records.unwrap_or_default()) {
                        registry.adopt(uid, left);
                    }
                    snapshot.renew(range, registry.layouts());
                    assert_consistent(&registry, &table);
                    continue;
                }
            };
            let Ok(staged) = staged else {
                assert_consistent(&registry, &table);
                continue;
            };
            // As the state does it: what is coming is written down before the kernel is told.
            if let Some((uid, stamp, layout)) = staged.plan().coming() {
                snapshot.add(uid, stamp, layout);
            }
            // A kernel that refuses does nothing, and then nothing is applied either.
            if !refused {
                table.carry_out(staged.plan());
                registry.apply(staged);
                if snapshot.is_long() {
                    snapshot.renew(range, registry.layouts());
                }
            }
            assert_consistent(&registry, &table);
        }
    }
}

#[test]
fn what_was_left_behind_keeps_its_marks() {
    let range = MarkRange::new(0xff00_0000).unwrap();
    let limits = Limits::default();
    let mut registry = Registry::new(limits, range);
    let uid = Uid::for_test(1000);
    let left = LeftBehind {
        subtree: None,
        proxies: [
            (name(1), Mark::adopted(0x8500_0000)),
            (name(2), Mark::adopted(0x8100_0000)),
        ]
        .into(),
        holds_back: false,
        stamp: None,
        lists: BTreeSet::new(),
    };
    registry.adopt(uid, Inherited::LeftBehind(left));
    let settings = || ProxySettings {
        delivery: Delivery::Tproxy(NonZeroU16::MIN),
        exceptions: Exceptions::default(),
        reject_udp: false,
        dns_hijack: None,
        fakes: Fakes::default(),
    };
    let request = |number| (name(number), settings());
    let policy = PolicyRequest {
        proxies: vec![request(1), request(3)],
        ..nothing_of(Top::for_test(1, 3))
    };
    let staged = registry
        .replace(uid, policy, BTreeMap::new(), |_| None)
        .unwrap();
    let marks: Vec<_> = staged
        .plan()
        .after
        .as_ref()
        .unwrap()
        .layout
        .proxies
        .values()
        .map(|proxy| proxy.mark.value())
        .collect();
    assert_eq!(marks, [0x8500_0000, 0x8600_0000]);
}

/// As long as nothing was dropped, nobody looks at what is open; and not for one that comes and goes do the rules change
/// each time.
#[test]
fn open_connections_are_looked_at_for_drops_and_one_change_longer() {
    let mut registry = Registry::new(Limits::default(), MarkRange::new(0xff00_0000).unwrap());
    let uid = Uid::for_test(1000);
    let subtree = Top::for_test(1, 3);
    let open = |path: &ControlGroupPath| {
        let number = u64::from(path.as_bytes()[1]);
        Some(OwnedControlGroup::for_test(number, 4))
    };
    let policy = nothing_of(subtree);
    let staged = registry.replace(uid, policy, elements(vec![(0, 0, 0)]), open);
    registry.apply(staged.unwrap());
    let (direct, dropped, held) = (0, 1, 1);
    for (assigned, removed, looked_at) in [
        (vec![(1, direct, 0)], vec![], false),
        (vec![(2, dropped, 0)], vec![], true),
        (vec![], vec![2], true),
        (vec![(2, direct, held)], vec![], true),
        (vec![], vec![2], true),
        (vec![], vec![1], false),
    ] {
        let removed = removed.into_iter().map(path).collect();
        let staged = registry.update(uid, subtree, elements(assigned), removed, open);
        registry.apply(staged.unwrap());
        let layout = registry.policy(uid).unwrap().layout;
        assert_eq!(layout.holds_back, looked_at);
    }
}

/// The only control group at its level comes and goes: it is an element, and nothing else.
#[test]
fn a_level_is_looked_at_for_one_change_longer() {
    let mut registry = Registry::new(Limits::default(), MarkRange::new(0xff00_0000).unwrap());
    let uid = Uid::for_test(1000);
    let subtree = Top::for_test(1, 3);
    let open = |path: &ControlGroupPath| {
        let number = u64::from(path.as_bytes()[1]);
        Some(OwnedControlGroup::for_test(number, 3 + path.depth() as u32))
    };
    let policy = nothing_of(subtree);
    // At level 5; those of `path` are at 4, 5 and 6.
    let lone = || elements(vec![(1, 0, 0)]);
    let staged = registry.replace(uid, policy, lone(), open);
    registry.apply(staged.unwrap());
    let stamp = registry.before(uid).stamp();
    for _ in 0..3 {
        for (assigned, removed) in [
            (BTreeMap::new(), BTreeSet::from([path(1)])),
            (lone(), BTreeSet::new()),
        ] {
            let staged = registry.update(uid, subtree, assigned, removed, open);
            let staged = staged.unwrap();
            assert!(staged.plan().keeps_layout());
            registry.apply(staged);
            assert_eq!(registry.before(uid).stamp(), stamp);
        }
    }
    let elsewhere = registry.update(
        uid,
        subtree,
        elements(vec![(2, 0, 0)]),
        [path(1)].into(),
        open,
    );
    registry.apply(elsewhere.unwrap());
    let levels = |registry: &Registry| registry.policy(uid).unwrap().layout.levels.clone();
    assert_eq!(levels(&registry), [5, 6].into());
    let again = registry.update(
        uid,
        subtree,
        elements(vec![(5, 0, 0)]),
        BTreeSet::new(),
        open,
    );
    registry.apply(again.unwrap());
    assert_eq!(levels(&registry), [6].into());
}

/// One list for all who bypass the same, another one for whoever does not, and none of those that are there and that
/// nobody knows.
#[test]
fn users_who_bypass_the_same_have_one_list() {
    let mut registry = Registry::new(Limits::default(), MarkRange::new(0xff00_0000).unwrap());
    let [one, two, stranger] = UIDS.map(Uid::for_test);
    let left = LeftBehind {
        lists: [1, 3].into(),
        ..LeftBehind::default()
    };
    registry.adopt(stranger, Inherited::LeftBehind(left));
    let mut number_of = |uid, bypassed| {
        let policy = PolicyRequest {
            bypass_entries: 1,
            bypass: bypass(bypassed),
            ..nothing_of(Top::for_test(1, 3))
        };
        let staged = registry.replace(uid, policy, BTreeMap::new(), |_| None);
        registry.apply(staged.unwrap());
        let layout = registry.policy(uid).unwrap().layout;
        layout.bypass.as_ref().map(|list| list.number)
    };
    assert_eq!(number_of(one, 7), Some(2));
    assert_eq!(number_of(two, 7), Some(2));
    assert_eq!(number_of(one, 8), Some(4));
    assert_eq!(number_of(two, 0), None);
    assert_eq!(number_of(two, 9), Some(2));
    assert_eq!(number_of(one, 9), Some(2));
    // Its own are there until it has this one.
    assert_eq!(number_of(stranger, 8), Some(4));
    assert_eq!(number_of(one, 7), Some(1));
}
