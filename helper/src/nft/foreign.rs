//! Rules of other programs that change marks: which bits of packet and conntrack marks they may change.
//!
//! A rule's expressions are followed from register to register. Whether a packet ever gets to a rule is not asked: that
//! the rule is there is reason enough to report it.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use super::dump::{RULE_EXPRESSIONS, RULE_TABLE, expressions};
use super::socket::{Dump, NetfilterSocket};
use super::{Nftables, Refusal, TABLE};
use crate::netlink::{attribute, string};

/// enum nft_meta_attributes, nft_ct_attributes: destination, key, source
const META: (u16, u16, u16) = (1, 2, 3);
const CT: (u16, u16, u16) = (1, 2, 4);
/// `NFT_META_MARK` and `NFT_CT_MARK`, which are the same number.
const MARK: u32 = 3;

/// enum nft_bitwise_attributes, nft_data_attributes
const BITWISE_SOURCE: u16 = 1;
const BITWISE_DESTINATION: u16 = 2;
const BITWISE_MASK: u16 = 4;
const BITWISE_XOR: u16 = 5;
const BITWISE_OPERATION: u16 = 6;
const DATA_VALUE: u16 = 1;

/// enum nft_target_attributes
const TARGET_NAME: u16 = 1;
const TARGET_INFO: u16 = 3;

/// How often a dump is tried while others change what is dumped.
const ATTEMPTS: usize = 3;

/// How long others' rules are looked at: nobody is served meanwhile. The kernel goes through a chain from its first rule
/// on for each part of a dump (`__nf_tables_dump_rules`, net/netfilter/nf_tables_api.c), so that 100,000 rules in one take
/// it many seconds.
const LONGEST_LOOK: Duration = Duration::from_millis(200);

/// Why others' rules were not looked at.
#[derive(Debug, thiserror::Error)]
pub enum Unread {
    /// The kernel does not show them, or others kept changing them meanwhile.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// It would take too long.
    #[error("there are more than can be looked at in {} ms", LONGEST_LOOK.as_millis())]
    TooMany,
}

/// A table whose rules change marks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MarkWriter {
    /// Its family and name, as nft writes them.
    pub table: String,
    /// The bits that its rules may change, of those that were asked for.
    pub bits: u32,
}

/// Where a mark is: in the packet, or in its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Packet,
    Connection,
}

/// A register that holds a mark, in which some bits may be changed.
#[derive(Debug, Clone, Copy)]
struct Register {
    from: Place,
    changed: u32,
}

impl Nftables {
    /// The tables of other programs whose rules change bits of our mask.
    ///
    /// # Errors
    /// If the ruleset can't be read in a short time, or others kept changing it meanwhile.
    pub fn mark_writers(&self) -> Result<Vec<MarkWriter>, Unread> {
        let end = Instant::now() + LONGEST_LOOK;
        let mut attempt = 0;
        loop {
            attempt += 1;
            let mut tables: BTreeMap<String, u32> = BTreeMap::new();
            let mut too_many = false;
            // Of its own, so that what is left of a dump ends with it.
            let socket = NetfilterSocket::open().map_err(Refusal::from)?;
            let dumped = socket.dump_each(Dump::Rules, &[], |family, rule| {
                too_many = Instant::now() > end;
                if too_many {
                    return ControlFlow::Break(());
                }
                let name = attribute(rule, RULE_TABLE).map(string).unwrap_or_default();
                if family_name(family) == "inet" && Some(name.as_str()) == TABLE.to_str().ok() {
                    return ControlFlow::Continue(());
                }
                let expressions = attribute(rule, RULE_EXPRESSIONS).unwrap_or_default();
                let bits = changed_bits(expressions, self.settings.marks.mask());
                if bits != 0 {
                    let table = format!("{} {name}", family_name(family));
                    *tables.entry(table).or_default() |= bits;
                }
                ControlFlow::Continue(())
            });
            match dumped {
                _ if too_many => return Err(Unread::TooMany),
                Ok(()) => {
                    let writer = |(table, bits)| MarkWriter { table, bits };
                    return Ok(tables.into_iter().map(writer).collect());
                }
                Err(refusal) if refusal.errno == rustix::io::Errno::INTR && attempt < ATTEMPTS => {}
                Err(refusal) => return Err(refusal.into()),
            }
        }
    }
}

/// What nft calls a family of linux/netfilter.h.
fn family_name(family: u8) -> &'static str {
    match family {
        1 => "inet",
        2 => "ip",
        3 => "arp",
        5 => "netdev",
        7 => "bridge",
        10 => "ip6",
        _ => "unknown",
    }
}

/// Takes what may be a rule apart.
#[cfg(any(test, fuzzing))]
pub(super) fn fuzz(rule: &[u8]) {
    let expressions = attribute(rule, RULE_EXPRESSIONS).unwrap_or_default();
    let _ = changed_bits(expressions, u32::MAX);
}

/// The bits of `mask` that a rule's expressions may change in a mark.
fn changed_bits(list: &[u8], mask: u32) -> u32 {
    let mut registers: BTreeMap<u32, Register> = BTreeMap::new();
    let mut bits = 0;
    for (name, data) in expressions(list) {
        match name.as_str() {
            "meta" => bits |= load_or_store(data, META, Place::Packet, &mut registers),
            "ct" => bits |= load_or_store(data, CT, Place::Connection, &mut registers),
            "bitwise" => bitwise(data, &mut registers),
            "target" => bits |= target(data),
            "cmp" | "range" => {}
            // Whatever else fills a register fills it with something that is no mark.
            name => {
                let destination = match name {
                    "lookup" => 3,
                    "byteorder" | "hash" | "socket" | "tunnel" => 2,
                    _ => 1,
                };
                if let Some(register) = number(data, destination) {
                    registers.remove(&canonical(register));
                }
            }
        }
    }
    bits & mask
}

/// `meta mark`, `meta mark set`, `ct mark`, `ct mark set`: the bits that are changed.
fn load_or_store(
    data: &[u8],
    (destination, key, source): (u16, u16, u16),
    place: Place,
    registers: &mut BTreeMap<u32, Register>,
) -> u32 {
    let is_mark = number(data, key) == Some(MARK);
    if let Some(register) = number(data, destination) {
        let mark = Register {
            from: place,
            changed: 0,
        };
        match is_mark {
            true => registers.insert(canonical(register), mark),
            false => registers.remove(&canonical(register)),
        };
        return 0;
    }
    let Some(register) = number(data, source).filter(|_| is_mark) else {
        return 0;
    };
    match (registers.get(&canonical(register)), place) {
        (Some(mark), _) if mark.from == place => mark.changed,
        // The connection's mark has the helper's bits that the packet should have.
        (Some(mark), Place::Packet) => mark.changed,
        // A packet's mark has not: packets of answers have none.
        (Some(_), Place::Connection) | (None, _) => u32::MAX,
    }
}

/// `REGISTER & MASK ^ XOR`
fn bitwise(data: &[u8], registers: &mut BTreeMap<u32, Register>) {
    let Some(destination) = number(data, BITWISE_DESTINATION) else {
        return;
    };
    let source = number(data, BITWISE_SOURCE).unwrap_or_default();
    let operand = |kind| {
        attribute(data, kind)
            .and_then(|operand| attribute(operand, DATA_VALUE))
            .and_then(|value| value.first_chunk().copied())
            .map(u32::from_ne_bytes)
    };
    let boolean = number(data, BITWISE_OPERATION).unwrap_or(0) == 0;
    let operands = (operand(BITWISE_MASK), operand(BITWISE_XOR));
    match (registers.get(&canonical(source)).copied(), operands) {
        (Some(mark), (Some(mask), Some(xor))) if boolean => {
            let changed = mark.changed | !mask | xor;
            registers.insert(canonical(destination), Register { changed, ..mark });
        }
        _ => {
            registers.remove(&canonical(destination));
        }
    }
}

/// The targets MARK and CONNMARK of iptables (linux/netfilter/xt_mark.h, xt_connmark.h).
fn target(data: &[u8]) -> u32 {
    let info = attribute(data, TARGET_INFO).unwrap_or_default();
    let word = |index: usize| {
        let bytes = info.get(4 * index..)?.first_chunk().copied()?;
        Some(u32::from_ne_bytes(bytes))
    };
    match attribute(data, TARGET_NAME).map(string).as_deref() {
        Some("MARK") => word(0).unwrap_or(u32::MAX) | word(1).unwrap_or(u32::MAX),
        Some("CONNMARK") => {
            let (mark, mask, packet) = (word(0), word(1), word(2));
            match (mark, mask, packet, info.get(12)) {
                (Some(mark), Some(mask), _, Some(0)) => mark | mask,
                (_, Some(mask), Some(packet), Some(1)) => mask | packet,
                // Restores what the connection has, but for what it leaves out of that.
                (_, Some(mask), Some(packet), Some(2)) => packet & !mask,
                _ => u32::MAX,
            }
        }
        _ => 0,
    }
}

/// An attribute that is a number, in network byte order.
fn number(data: &[u8], kind: u16) -> Option<u32> {
    let value = attribute(data, kind)?;
    Some(u32::from_be_bytes(value.first_chunk().copied()?))
}

/// Registers 1 to 4 of 16 bytes are registers 8 to 23 of 4 bytes (enum nft_registers).
fn canonical(register: u32) -> u32 {
    match register {
        1..=4 => 8 + (register - 1) * 4,
        register => register,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::push_attribute;
    use crate::nft::dump::{EXPRESSION_DATA, EXPRESSION_NAME};
    use proptest::prelude::*;

    fn attr(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        push_attribute(&mut bytes, kind, value);
        bytes
    }

    fn expression(name: &str, data: &[Vec<u8>]) -> Vec<u8> {
        let name = attr(EXPRESSION_NAME, format!("{name}\0").as_bytes());
        attr(1, &[name, attr(EXPRESSION_DATA, &data.concat())].concat())
    }

    fn word(kind: u16, value: u32) -> Vec<u8> {
        attr(kind, &value.to_be_bytes())
    }

    fn value(kind: u16, value: u32) -> Vec<u8> {
        attr(kind, &attr(DATA_VALUE, &value.to_ne_bytes()))
    }

    fn load(name: &str) -> Vec<u8> {
        expression(name, &[word(1, 1), word(2, MARK)])
    }

    fn store(name: &str) -> Vec<u8> {
        let source = if name == "ct" { CT.2 } else { META.2 };
        expression(name, &[word(2, MARK), word(source, 8)])
    }

    fn and_xor(mask: u32, xor: u32) -> Vec<u8> {
        expression(
            "bitwise",
            &[
                word(BITWISE_SOURCE, 1),
                word(BITWISE_DESTINATION, 1),
                value(BITWISE_MASK, mask),
                value(BITWISE_XOR, xor),
            ],
        )
    }

    #[test]
    fn follows_marks_through_registers() {
        let constant = expression("immediate", &[word(1, 1), value(2, 1)]);
        for (what, rule, bits) in [
            ("mark", load("meta"), 0),
            (
                "mark set 1",
                [constant.clone(), store("meta")].concat(),
                0xff00_0000,
            ),
            (
                "ct mark set 1",
                [constant, store("ct")].concat(),
                0xff00_0000,
            ),
            (
                "mark set mark & 0xffffff00 | 1",
                [load("meta"), and_xor(0xffff_ff00, 1), store("meta")].concat(),
                0,
            ),
            (
                "mark set mark | 0x10000000",
                [
                    load("meta"),
                    and_xor(!0x1000_0000, 0x1000_0000),
                    store("meta"),
                ]
                .concat(),
                0x1000_0000,
            ),
            (
                "mark set mark & 0xffff",
                [load("meta"), and_xor(0xffff, 0), store("meta")].concat(),
                0xff00_0000,
            ),
            ("mark set ct mark", [load("ct"), store("meta")].concat(), 0),
            (
                "mark set socket wildcard, where the mark was",
                [
                    load("meta"),
                    expression("socket", &[word(1, 2), word(2, 1)]),
                    store("meta"),
                ]
                .concat(),
                0xff00_0000,
            ),
            (
                "ct mark set mark",
                [load("meta"), store("ct")].concat(),
                0xff00_0000,
            ),
        ] {
            assert_eq!(changed_bits(&rule, 0xff00_0000), bits, "{what}");
        }
    }

    #[test]
    fn knows_the_targets_of_iptables() {
        let target = |name: &str, info: &[u32], mode: Option<u8>| {
            let mut bytes: Vec<u8> = info.iter().flat_map(|word| word.to_ne_bytes()).collect();
            bytes.extend(mode);
            let name = attr(TARGET_NAME, format!("{name}\0").as_bytes());
            let rule = expression("target", &[name, attr(TARGET_INFO, &bytes)]);
            changed_bits(&rule, 0xff00_0000)
        };
        assert_eq!(target("MARK", &[0x4000, 0x4000], None), 0);
        assert_eq!(target("MARK", &[1, u32::MAX], None), 0xff00_0000);
        assert_eq!(target("CONNMARK", &[0, 0xff_0000, 0xff_0000], Some(1)), 0);
        assert_eq!(target("CONNMARK", &[0, !0, !0], Some(1)), 0xff00_0000);
        assert_eq!(target("CONNMARK", &[0, !0, !0], Some(2)), 0);
        assert_eq!(target("CONNMARK", &[0x100_0000, 0, 0], Some(0)), 0x100_0000);
        assert_eq!(target("CONNMARK", &[], None), 0xff00_0000);
        assert_eq!(target("LOG", &[!0], None), 0);
    }

    proptest! {
        #[test]
        fn no_rule_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            changed_bits(&bytes, u32::MAX);
        }
    }
}
