//! A snapshot that is written, cut, changed and grown.

use std::collections::BTreeSet;
use std::rc::Rc;

use super::*;
use crate::cgroup::Top;
use crate::nft::{Bypass, BypassList, Exceptions, Hold, Verdict};

/// Every byte; under Miri, which takes a thousand times as long, some.
const STEP: usize = if cfg!(miri) { 11 } else { 1 };

fn range() -> MarkRange {
    MarkRange::new(0xff00_0000).unwrap()
}

/// A layout that is told from others by its level, with something of every kind that is short.
fn layout(level: u32) -> Layout {
    Layout {
        subtree: Top::for_test(7, 3),
        proxies: BTreeMap::new(),
        bypass: Some(BypassList {
            number: 1,
            destinations: Rc::new(Bypass {
                ipv4: vec![([10, 0, 0, 0].into(), [10, 255, 255, 255].into())],
                ipv6: Vec::new(),
            }),
        }),
        levels: BTreeSet::from([level]),
        holds: BTreeSet::from([Hold {
            level: level + 1,
            verdict: Some(Verdict::Drop),
        }]),
        enforced: false,
        holds_back: false,
        gateway: None,
    }
}

fn uid() -> Uid {
    Uid::for_test(1000)
}

fn read_back(memory: &Memory) -> Records {
    Snapshot::in_memory(memory, range()).1.unwrap()
}

#[test]
fn has_what_was_in_force_and_what_was_to_be() {
    let memory = Memory::default();
    let (mut snapshot, nothing) = Snapshot::in_memory(&memory, range());
    assert!(matches!(nothing, Err(Error::Format)));
    let (old, new) = (Stamp::found(1), Stamp::found(2));
    snapshot.renew(range(), [(uid(), old, &layout(4))].into_iter());
    snapshot.add(uid(), new, &layout(5));
    let records = read_back(&memory);
    assert_eq!(records.get(uid(), old), Some(&layout(4)));
    assert_eq!(records.get(uid(), new), Some(&layout(5)));
    assert_eq!(records.get(uid(), Stamp::found(3)), None);
    assert_eq!(records.get(Uid::for_test(1001), old), None);
}

#[test]
fn tells_everything_that_a_layout_has() {
    let memory = Memory::default();
    let (mut snapshot, _) = Snapshot::in_memory(&memory, range());
    let layouts = [false, true].map(crate::nft::tests::layout);
    let uids = [uid(), Uid::ROOT];
    let stamp = Stamp::found(1);
    let in_force = uids.into_iter().zip(&layouts);
    snapshot.renew(range(), in_force.map(|(uid, layout)| (uid, stamp, layout)));
    let mut records = read_back(&memory);
    records.locate(|uid, _| layouts[usize::from(uid == Uid::ROOT)].subtree.slices());
    for (uid, layout) in uids.into_iter().zip(&layouts) {
        assert_eq!(records.get(uid, stamp), Some(layout));
    }
}

#[test]
fn a_list_is_known_by_more_than_its_number() {
    let memory = Memory::default();
    let (mut snapshot, _) = Snapshot::in_memory(&memory, range());
    let lists: Vec<_> = (10..13)
        .map(|first| {
            let addresses = ([first, 0, 0, 0].into(), [first, 0, 0, 9].into());
            Layout {
                bypass: Some(BypassList {
                    number: 1,
                    destinations: Rc::new(Bypass {
                        ipv4: vec![addresses],
                        ipv6: Vec::new(),
                    }),
                }),
                ..layout(4)
            }
        })
        .collect();
    let order = [0, 0, 1, 2, 0, 1, 1];
    snapshot.renew(range(), std::iter::empty());
    for (stamp, list) in (0..).zip(order) {
        snapshot.add(uid(), Stamp::found(stamp), &lists[list]);
    }
    let records = read_back(&memory);
    for (stamp, list) in (0..).zip(order) {
        assert_eq!(records.get(uid(), Stamp::found(stamp)), Some(&lists[list]));
    }
    // What nobody has any more is not kept.
    let in_force = [(uid(), Stamp::found(0), &lists[1])];
    snapshot.renew(range(), in_force.into_iter());
    assert_eq!(snapshot.lists.0.len(), 1);
    drop(lists);
    snapshot.renew(range(), std::iter::empty());
    assert!(snapshot.lists.0.is_empty());
}

#[test]
fn a_helper_that_is_killed_while_it_writes_spoils_nothing() {
    let memory = Memory::default();
    let (mut snapshot, _) = Snapshot::in_memory(&memory, range());
    snapshot.renew(range(), [(uid(), Stamp::found(1), &layout(4))].into_iter());
    let whole = memory.borrow().len();
    snapshot.add(uid(), Stamp::found(2), &layout(5));
    let end = memory.borrow().len();
    for length in (whole..end).step_by(STEP) {
        let cut = Memory::default();
        cut.borrow_mut()
            .extend_from_slice(&memory.borrow()[..length]);
        let (mut next, records) = Snapshot::in_memory(&cut, range());
        let records = records.unwrap();
        assert_eq!(records.get(uid(), Stamp::found(1)), Some(&layout(4)));
        assert_eq!(records.get(uid(), Stamp::found(2)), None);
        // And the next helper writes on.
        next.renew(range(), [(uid(), Stamp::found(1), &layout(4))].into_iter());
        next.add(uid(), Stamp::found(3), &layout(6));
        let records = read_back(&cut);
        assert_eq!(records.get(uid(), Stamp::found(1)), Some(&layout(4)));
        assert_eq!(records.get(uid(), Stamp::found(3)), Some(&layout(6)));
    }
}

#[test]
fn what_is_not_ours_is_thrown_away() {
    let memory = Memory::default();
    let (mut snapshot, _) = Snapshot::in_memory(&memory, range());
    snapshot.renew(range(), [(uid(), Stamp::found(1), &layout(4))].into_iter());
    let bytes = memory.borrow().clone();
    let other = MarkRange::new(0x00ff_0000).unwrap();
    assert!(matches!(parse(&bytes, other), Err(Error::Marks)));
    for position in (0..bytes.len()).step_by(STEP) {
        let mut spoilt = bytes.clone();
        spoilt[position] ^= 0x10;
        let found = parse(&spoilt, range());
        let found = found
            .ok()
            .and_then(|records| records.get(uid(), Stamp::found(1)).cloned());
        assert_eq!(found, None, "byte {position}");
    }
}

#[test]
#[cfg_attr(miri, ignore = "needs a file in memory")]
fn it_grows_no_longer_than_it_must() {
    let (mut snapshot, _) = Snapshot::open(None, range());
    snapshot.place = Place::File(memfd_create(c"test", MemfdFlags::CLOEXEC).unwrap().into());
    snapshot.renew(range(), std::iter::empty());
    for number in 0..20_000 {
        snapshot.add(uid(), Stamp::found(number), &layout(number % 200));
        if snapshot.is_long() {
            let present = layout(number % 200);
            let in_force = [(uid(), Stamp::found(number), &present)];
            snapshot.renew(range(), in_force.into_iter());
        }
        assert!(snapshot.end - snapshot.start < 2 * SLACK);
    }
    let Place::File(file) = &snapshot.place else {
        panic!("it is a file");
    };
    let records = read(file, range()).unwrap();
    let last = records.get(uid(), Stamp::found(19_999));
    assert_eq!(last, Some(&layout(19_999 % 200)));
    let used = std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()) * 512;
    assert!(used < 4 * SLACK, "{used} bytes are held");
}

/// What is written next is not written over what the header points to.
#[test]
#[cfg_attr(miri, ignore = "needs a file")]
fn memory_that_is_not_taken_back_spoils_nothing() {
    let (mut snapshot, _) = Snapshot::open(None, range());
    // It takes what is written, and has no holes.
    let file = File::options().write(true).open("/dev/null").unwrap();
    snapshot.place = Place::File(file);
    for number in 1..4 {
        let end = snapshot.end;
        let present = layout(number);
        snapshot.renew(
            range(),
            [(uid(), Stamp::found(number), &present)].into_iter(),
        );
        assert_eq!(snapshot.start, end.max(HEADER));
        assert!(snapshot.end > snapshot.start);
    }
    assert!(snapshot.forget(snapshot.start).is_err());
}

/// What was written before takes no memory, but counts in the file's length.
#[test]
#[cfg_attr(miri, ignore = "needs a file in memory")]
fn a_file_that_was_written_to_for_long_is_gone_on_with() {
    let file: File = memfd_create(c"test", MemfdFlags::CLOEXEC).unwrap().into();
    let (mut snapshot, _) = Snapshot::open(None, range());
    snapshot.place = Place::File(file.try_clone().unwrap());
    snapshot.end = MOST + 1;
    let stamp = Stamp::found(1);
    snapshot.renew(range(), [(uid(), stamp, &layout(4))].into_iter());
    let (next, records) = Snapshot::open(Some(file), range());
    assert_eq!(records.get(uid(), stamp), Some(&layout(4)));
    assert!(matches!(next.place, Place::File(_)));
    assert_eq!(next.end, snapshot.end);
}

/// The service manager has the one before as long as there is nothing in it.
#[test]
#[cfg_attr(miri, ignore = "needs files")]
fn a_new_file_is_handed_over_when_something_is_in_it() {
    let (mut snapshot, _) = Snapshot::open(None, range());
    snapshot.place = Place::File(File::open("/dev/null").unwrap());
    snapshot.new = true;
    snapshot.renew(range(), std::iter::empty());
    assert!(snapshot.failed && snapshot.new);
    snapshot.place = Place::File(memfd_create(c"test", MemfdFlags::CLOEXEC).unwrap().into());
    snapshot.renew(range(), std::iter::empty());
    assert!(!snapshot.new);
}

/// A snapshot of another form has another [`MAGIC`], also if a type that is written as it is has another field, or its
/// fields in another order.
#[test]
fn the_form_of_a_record_is_what_magic_says() {
    let sums = [false, true].map(|system| {
        let mut layout = crate::nft::tests::layout(system);
        // No two fields say the same of all proxies.
        for (number, proxy) in (0..).zip(layout.proxies.values_mut()) {
            proxy.settings.exceptions = Exceptions {
                no_tcp: number == 0,
                no_udp: number == 1,
                no_ipv4: number < 2,
                no_ipv6: number > 0,
            };
        }
        let list = record::encode_list(layout.bypass.as_ref());
        checksum(&record::encode(uid(), Stamp::found(1), &layout, &list))
    });
    let known = [15_577_879_492_643_213_156, 11_833_273_140_808_121_430];
    assert_eq!((MAGIC, sums), (*b"cgtproxy\0\0\x05\0", known));
}
