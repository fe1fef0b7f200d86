//! Addresses that stand for names, so that nobody but the proxy has to look a name up.
//!
//! A name gets a number at random, and the addresses with that number in the two networks: whoever asks for
//! names can't tell from the answers which ones were asked for before. What is in use stays for a day,
//! over restarts of the relay too.

mod file;
mod networks;

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::target::Target;

pub(crate) use networks::{LeftOut, Networks};

/// How many names there may be, if the networks are twice as large.
const NAMES: u32 = 65536;

/// How many bytes they may have all in all: twice what so many have that people use.
const BYTES: usize = 4 << 20;

/// How long a name keeps its addresses that nobody asks for or uses, in seconds.
const EXPIRY: u64 = 24 * 60 * 60;

/// How long it keeps them whoever else wants to have one, in seconds: longer than an application may keep an answer.
const KEPT: u64 = 30;

/// How long after its last use an address stands for no other name, in seconds.
const HELD: u64 = 60;

/// How much later a name's last use may be than the file says, in seconds.
const WRITTEN: u64 = 60 * 60;

/// The longest name (RFC 1035, 2.3.4, without the last dot).
const NAME_BYTES: usize = 253;

#[derive(Debug)]
struct Entry {
    name: Rc<str>,
    /// When somebody asked for it or used it last, in seconds since 1970.
    used: u64,
    /// What the file says of that.
    written: u64,
}

/// Which address stands for which name.
#[derive(Debug)]
pub(crate) struct Fakes {
    networks: Networks,
    numbers: HashMap<Rc<str>, u32>,
    entries: HashMap<u32, Entry>,
    /// How many bytes the names have.
    bytes: usize,
    /// Numbers whose names have made room, the oldest first, and when they were last used: whoever still has such an
    /// address is not to be sent to the host of another name.
    freed: VecDeque<(u32, u64)>,
    /// The same, to be found soon.
    is_freed: HashSet<u32>,
    /// When there was no room, in seconds since 1970.
    full: u64,
    /// Where this is written down.
    file: Option<PathBuf>,
    /// The file was read, if there was one.
    loaded: bool,
    changed: bool,
}

impl Fakes {
    /// No name has an address yet. What is in `file` comes back with the networks.
    pub(crate) fn new(file: Option<PathBuf>) -> Self {
        Self {
            networks: Networks::default(),
            numbers: HashMap::new(),
            entries: HashMap::new(),
            bytes: 0,
            freed: VecDeque::new(),
            is_freed: HashSet::new(),
            full: 0,
            file,
            loaded: false,
            changed: false,
        }
    }

    /// Takes addresses from these networks from now on.
    pub(crate) fn set_networks(&mut self, networks: Networks) {
        if self.networks != networks {
            self.networks = networks;
            self.numbers.clear();
            self.entries.clear();
            self.bytes = 0;
            self.freed.clear();
            self.is_freed.clear();
            self.full = 0;
            self.changed = true;
        }
        if !std::mem::replace(&mut self.loaded, true)
            && let Some(file) = self.file.clone()
        {
            self.restore(&file);
        }
    }

    /// The number of a name, which it gets now if it has none. None if it is no name of a host, or there is no room.
    pub(crate) fn number(&mut self, name: &str) -> Option<u32> {
        self.number_at(name, now())
    }

    fn number_at(&mut self, name: &str, now: u64) -> Option<u32> {
        if !is_host(name) {
            return None;
        }
        let name: Rc<str> = name.to_ascii_lowercase().into();
        if let Some(&number) = self.numbers.get(&name) {
            self.touch(number, now);
            return Some(number);
        }
        let size = self.networks.size();
        // Half of them stay free, and half of these were not freed lately, so that one is found at random soon.
        while self.is_full(&name) {
            if !self.make_room(now) {
                return None;
            }
        }
        let number = loop {
            // Neither the first nor the last: in IPv4 these are not for hosts.
            let number = random()? % (size - 2) + 1;
            if !self.entries.contains_key(&number) && !self.is_freed.contains(&number) {
                break number;
            }
        };
        self.insert(number, name, now);
        self.changed = true;
        Some(number)
    }

    /// The addresses with a number.
    pub(crate) fn addresses(&self, number: u32) -> (Ipv4Addr, Ipv6Addr) {
        (self.networks.ipv4(number), self.networks.ipv6(number))
    }

    /// What a destination means; none if its address stands for a name that is not known any more.
    pub(crate) fn target(&mut self, destination: SocketAddr) -> Option<Target> {
        let Some(number) = self.networks.number(destination.ip()) else {
            return Some(Target::Address(destination));
        };
        let name = self.touch(number, now())?;
        Some(Target::Name(name, destination.port()))
    }

    /// Notes that a number is in use, to be written down now and then; returns its name.
    fn touch(&mut self, number: u32, now: u64) -> Option<Rc<str>> {
        let entry = self.entries.get_mut(&number)?;
        self.changed |= now > entry.written.saturating_add(WRITTEN);
        entry.used = now;
        Some(entry.name.clone())
    }

    fn insert(&mut self, number: u32, name: Rc<str>, used: u64) {
        self.numbers.insert(name.clone(), number);
        self.bytes += name.len();
        let written = used;
        let entry = Entry {
            name,
            used,
            written,
        };
        self.entries.insert(number, entry);
    }

    /// How many names there are.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// How many names there may be.
    fn most(&self) -> usize {
        NAMES.min(self.networks.size() / 2) as usize
    }

    /// Whether there is no room for that name.
    fn is_full(&self, name: &str) -> bool {
        self.entries.len() >= self.most() || self.bytes + name.len() > BYTES
    }

    /// How many numbers may be out of use because of the names that they had.
    fn most_freed(&self) -> usize {
        // With four addresses, there would be none left for the next name.
        match self.most() {
            0..=2 => 0,
            names => names / 2,
        }
    }

    /// Forgets the names that were not used for the longest time, an eighth of all, or as many as may be forgotten. Says
    /// whether there is room now.
    fn make_room(&mut self, now: u64) -> bool {
        // Whoever floods this does not have all of them looked at each time.
        if self.full == now {
            return false;
        }
        let mut times: Vec<u64> = self.entries.values().map(|entry| entry.used).collect();
        let eighth = times.len() / 8;
        let (_, &mut oldest, _) = times.select_nth_unstable(eighth);
        let most = self.most_freed();
        let is_held = |used| is_within(HELD, used, now);
        let is_kept = |used| is_within(KEPT, used, now);
        let mut left = eighth + 1;
        let freed = &mut self.freed;
        let mut excess = (freed.len() + left).saturating_sub(most);
        freed.retain(|(_, used)| {
            let keep = excess == 0 || is_held(*used);
            if !keep {
                excess -= 1;
            }
            keep
        });
        let before = self.entries.len();
        let bytes = &mut self.bytes;
        self.entries.retain(|number, entry| {
            let used = entry.used;
            let has_place = freed.len() < most;
            let keep = used > oldest || left == 0 || is_kept(used) || is_held(used) && !has_place;
            if !keep {
                left -= 1;
                *bytes = bytes.saturating_sub(entry.name.len());
                if has_place {
                    freed.push_back((*number, used));
                }
            }
            keep
        });
        self.is_freed = self.freed.iter().map(|(number, _)| *number).collect();
        let entries = &self.entries;
        self.numbers
            .retain(|_, number| entries.contains_key(number));
        let has_room = self.entries.len() < before;
        if !has_room {
            self.full = now;
        }
        has_room
    }
}

/// Whether so little time has passed since then. What lies ahead was written by a clock that was set back.
fn is_within(seconds: u64, then: u64, now: u64) -> bool {
    (then..then.saturating_add(seconds)).contains(&now)
}

/// Whether it can be the name of a host: nothing in it means anything to a proxy's protocol.
pub(crate) fn is_host(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= NAME_BYTES
        && name.split('.').all(|label| {
            let allowed = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
            !label.is_empty() && label.len() <= 63 && label.bytes().all(allowed)
        })
}

fn random() -> Option<u32> {
    getrandom::u32().ok()
}

/// The time in seconds, as the file has it, which outlives a boot.
///
/// Where the clock jumps, names that nobody uses are forgotten too early or too late, and nothing else.
#[expect(
    clippy::disallowed_methods,
    reason = "no other clock goes on from one boot to the next"
)]
fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::IpAddr;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_name_keeps_its_addresses() {
        let mut fakes = Fakes::new(None);
        let number = fakes.number("Example.org").unwrap();
        assert_eq!(fakes.number("example.ORG"), Some(number));
        assert_ne!(fakes.number("example.net"), Some(number));
        let (v4, v6) = fakes.addresses(number);
        assert!(v4.octets().starts_with(&[198]) && v6.segments().starts_with(&[0x2001, 2, 0]));
        for address in [IpAddr::from(v4), IpAddr::from(v6)] {
            let target = fakes.target(SocketAddr::new(address, 443));
            assert_eq!(target, Some(Target::Name("example.org".into(), 443)));
        }
        let unknown = "198.19.255.255:1".parse().unwrap();
        assert_eq!(fakes.target(unknown), None);
        let other = "192.0.2.1:1".parse().unwrap();
        assert_eq!(fakes.target(other), Some(Target::Address(other)));
        let far = "[2001:2:0:1::1]:1".parse().unwrap();
        assert_eq!(fakes.target(far), None);
    }

    #[test]
    fn what_is_no_host_has_no_address() {
        let mut fakes = Fakes::new(None);
        let long = format!("{}.org", "a".repeat(64));
        let longer = vec!["a".repeat(60); 5].join(".");
        for name in [
            "", ".", "a b", "a\r\nb", "a..b", "a.", "ä.org", "a:1", &long, &longer,
        ] {
            assert_eq!(fakes.number(name), None, "{name}");
        }
        assert!(fakes.number("_dmarc.xn--bcher-kva.example").is_some());
    }

    #[test]
    fn survives_a_restart_but_not_other_networks() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("state/names");
        let mut fakes = Fakes::new(Some(file.clone()));
        fakes.set_networks(Networks::default());
        let number = fakes.number("example.org");
        fakes.save();
        // It tells where its owner goes.
        let mode = file.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let mut fakes = Fakes::new(Some(file.clone()));
        fakes.set_networks(Networks::default());
        assert_eq!(fakes.number("example.org"), number);
        let networks = Networks::parse(Some("10.0.0.0/24"), Some("fd00::/64")).unwrap();
        let mut fakes = Fakes::new(Some(file));
        fakes.set_networks(networks);
        assert!(fakes.entries.is_empty());
        let number = fakes.number("example.org").unwrap();
        assert!((1..255).contains(&number));
        for wrong in ["10.0.0.0/31", "10.0.0.0", "10.0.0.0/+15", "x/1", "::/1"] {
            assert_eq!(Networks::parse(Some(wrong), None), Err("fakeIpv4"));
        }
    }

    #[test]
    fn what_is_in_use_is_written_down_again() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("names");
        let mut fakes = Fakes::new(Some(file.clone()));
        fakes.set_networks(Networks::default());
        let (now, hours) = (now(), 3600);
        let number = fakes.number_at("example.org", now - 5 * hours).unwrap();
        fakes.save();
        // An application that has the address connects, and asks for the name no more.
        let (address, _) = fakes.addresses(number);
        let to = SocketAddr::new(address.into(), 1);
        assert!(fakes.target(to).is_some());
        fakes.save();
        let text = std::fs::read_to_string(&file).unwrap();
        let used = text.lines().last().unwrap().split(' ').nth(1).unwrap();
        assert!(used.parse::<u64>().unwrap() >= now);
        // That is enough for some time.
        assert!(fakes.target(to).is_some() && !fakes.changed);
    }

    #[test]
    #[cfg_attr(miri, ignore = "a minute, for what the others do as well")]
    fn the_oldest_names_make_room() {
        let mut fakes = Fakes::new(None);
        fakes.set_networks(Networks::parse(Some("10.0.0.0/26"), None).unwrap());
        for n in 0..200 {
            let name = format!("host-{n}");
            assert!(fakes.number_at(&name, 1000 + HELD * n).is_some());
            assert!(fakes.entries.len() <= 32);
            assert_eq!(fakes.numbers.len(), fakes.entries.len());
            assert!(fakes.numbers.contains_key(name.as_str()));
        }
        assert!(!fakes.numbers.contains_key("host-0"));
        // An expired name is not written down.
        let last = 1000 + HELD * 200;
        assert_eq!(fakes.text(last + EXPIRY).lines().count(), 1);
        assert!(fakes.text(last).lines().count() > 20);
    }

    /// Whoever keeps an address for longer than it was told to is not sent to another host.
    #[test]
    #[cfg_attr(miri, ignore = "a minute, for what the others do as well")]
    fn an_address_that_was_freed_stands_for_nothing_for_a_while() {
        // Of the first, five are freed at a time.
        for (prefix, last) in [(26, 15), (29, 2), (30, 0)] {
            let mut fakes = Fakes::new(None);
            let network = format!("10.0.0.0/{prefix}");
            fakes.set_networks(Networks::parse(Some(&network), None).unwrap());
            let (mut freed, mut known) = (Vec::new(), Vec::new());
            for n in 0..1000 {
                let number = fakes.number_at(&format!("host-{n}"), HELD * n).unwrap();
                known.retain(|number| {
                    let keep = fakes.entries.contains_key(number);
                    if !keep {
                        freed.push(*number);
                    }
                    keep
                });
                known.push(number);
                let recent = freed.iter().rev().take(last);
                assert!(!recent.copied().any(|f| f == number), "{prefix}: {number}");
            }
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "a minute, for what the others do as well")]
    fn no_address_changes_hands_within_a_minute() {
        for (prefix, pause) in [(26, 0), (26, 1), (28, 5), (30, 20), (26, 100)] {
            let mut fakes = Fakes::new(None);
            let network = format!("10.0.0.0/{prefix}");
            fakes.set_networks(Networks::parse(Some(&network), None).unwrap());
            let mut last = HashMap::new();
            let mut given = 0;
            for n in 0..1000 {
                let now = 1000 + n * pause + n / 8;
                if let Some(number) = fakes.number_at(&format!("host-{n}"), now) {
                    given += 1;
                    if let Some(before) = last.insert(number, now) {
                        assert!(before + 60 <= now, "{prefix}: {before} and {now}");
                    }
                }
            }
            // Whoever asks so many times in a minute has no answer each time.
            assert!(given > 1 << (32 - prefix), "{prefix}: {given}");
            assert!(pause < 100 || given == 1000, "{prefix}: {given}");
        }
    }

    #[test]
    fn an_address_that_was_freed_stands_for_nothing_after_a_restart_either() {
        let networks = Networks::parse(Some("10.0.0.0/26"), None).unwrap();
        let mut fakes = Fakes::new(None);
        fakes.set_networks(networks);
        let first: Vec<u32> = (0..32)
            .map(|n| fakes.number_at(&format!("first-{n}"), 1000).unwrap())
            .collect();
        for n in 0..5 {
            fakes.number_at(&format!("second-{n}"), 1030).unwrap();
        }
        let text = fakes.text(1031);
        let mut fakes = Fakes::new(None);
        fakes.set_networks(networks);
        fakes.load(&text, 1032);
        assert_eq!((fakes.entries.len(), fakes.freed.len()), (32, 5));
        for n in 0..11 {
            let number = fakes.number_at(&format!("third-{n}"), 1033).unwrap();
            assert!(!first.contains(&number));
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "a minute, for what the others do as well")]
    fn names_have_no_more_bytes_than_there_is_room_for() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("names");
        let mut fakes = Fakes::new(Some(file.clone()));
        fakes.set_networks(Networks::default());
        let bytes = |fakes: &Fakes| -> usize { fakes.numbers.keys().map(|name| name.len()).sum() };
        let now = now();
        for n in 0..70_000 {
            let long = "a".repeat(60);
            let name = format!("{n:09}.{long}.{long}.{long}.{long}");
            fakes.number_at(&name, now - 70_000 + n);
            fakes.number_at("example.org", now - 70_000 + n).unwrap();
        }
        assert!(
            (3 << 20..=4 << 20).contains(&bytes(&fakes)),
            "{}",
            bytes(&fakes)
        );
        let before = fakes.entries.len();
        fakes.save();
        let mut fakes = Fakes::new(Some(file));
        fakes.set_networks(Networks::default());
        assert_eq!(fakes.entries.len(), before);
        assert!(bytes(&fakes) <= 4 << 20);
    }

    proptest! {
        #[test]
        #[cfg_attr(miri, ignore = "texts that are made of a pattern take minutes")]
        fn no_file_panics(text in "(\\PC{0,20}|[0-9]{1,5} [0-9]{1,5} [a-bA-B.]{1,3}|\n){0,20}") {
            let mut fakes = Fakes::new(None);
            let header = fakes.header();
            fakes.load(&format!("{header}\n{text}"), 5);
            prop_assert_eq!(fakes.entries.len(), fakes.numbers.len());
        }
    }
}
