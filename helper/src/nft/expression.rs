//! Expressions that the `nftnl` crate lacks.

use std::ffi::CStr;
use std::ptr::NonNull;

use nftnl::expr::{Expression, Register};
use nftnl::nftnl_sys::{self as sys, libc};
use nftnl::{ProtoFamily, Rule};

use super::ffi::{Kind, expression, lookup};

/// What a look-up finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// That the key is there: `@set`.
    Key,
    /// A verdict, which is then taken: `vmap @set`.
    Verdict,
    /// A value, which takes the key's place in register 1: `map @set`.
    Value,
}

/// Looks register 1 up in a named set or map. Without such a key, the rule does not match.
pub(super) struct Lookup<'a> {
    /// The set's or map's name.
    pub(super) set: &'a CStr,
    /// What is in it.
    pub(super) found: Found,
}

impl Expression for Lookup<'_> {
    fn to_expr(&self, _: &Rule<'_>) -> NonNull<sys::nftnl_expr> {
        let to = match self.found {
            Found::Key => None,
            Found::Verdict => Some(libc::NFT_REG_VERDICT as u32),
            Found::Value => Some(Register::Reg1.to_raw()),
        };
        lookup(self.set, Register::Reg1.to_raw(), to)
    }
}

/// `NFT_META_OIFKIND` (linux/netfilter/nf_tables.h), which libc lacks.
const META_OIFKIND: i32 = 27;

/// What of `meta` the crate can't say: other keys, and other registers than the first.
pub(super) enum PacketMeta {
    /// `meta mark`: loads the packet's mark into this register.
    LoadMark(Register),
    /// `meta mark set`: stores this register there.
    StoreMark(Register),
    /// `meta priority`: loads the packet's priority for queueing (`skb->priority`).
    LoadPriority,
    /// `meta priority set`: stores the register there.
    StorePriority,
    /// `meta skuid`: loads the packet's owner into the second four bytes of register 1 (`NFT_REG32_01`).
    LoadOwnerBehind,
    /// `meta oifkind`: loads what kind of interface the packet leaves by, in 16 bytes.
    LoadInterfaceKind,
}

impl Expression for PacketMeta {
    fn to_expr(&self, _: &Rule<'_>) -> NonNull<sys::nftnl_expr> {
        let first = Register::Reg1.to_raw();
        let (key, attribute, register) = match self {
            Self::LoadMark(to) => (libc::NFT_META_MARK, sys::NFTNL_EXPR_META_DREG, to.to_raw()),
            Self::StoreMark(from) => (
                libc::NFT_META_MARK,
                sys::NFTNL_EXPR_META_SREG,
                from.to_raw(),
            ),
            Self::LoadPriority => (libc::NFT_META_PRIORITY, sys::NFTNL_EXPR_META_DREG, first),
            Self::StorePriority => (libc::NFT_META_PRIORITY, sys::NFTNL_EXPR_META_SREG, first),
            Self::LoadOwnerBehind => {
                let second = libc::NFT_REG32_01 as u32;
                (libc::NFT_META_SKUID, sys::NFTNL_EXPR_META_DREG, second)
            }
            Self::LoadInterfaceKind => (META_OIFKIND, sys::NFTNL_EXPR_META_DREG, first),
        };
        let key = (sys::NFTNL_EXPR_META_KEY, key as u32);
        expression(Kind::Meta, &[key, (attribute, register)])
    }
}

/// `tcp flags`: loads the byte of them (RFC 9293, 3.1).
pub(super) struct TcpFlags;

impl Expression for TcpFlags {
    fn to_expr(&self, _: &Rule<'_>) -> NonNull<sys::nftnl_expr> {
        expression(
            Kind::Payload,
            &[
                (sys::NFTNL_EXPR_PAYLOAD_DREG, Register::Reg1.to_raw()),
                (
                    sys::NFTNL_EXPR_PAYLOAD_BASE,
                    libc::NFT_PAYLOAD_TRANSPORT_HEADER as u32,
                ),
                (sys::NFTNL_EXPR_PAYLOAD_OFFSET, 13),
                (sys::NFTNL_EXPR_PAYLOAD_LEN, 1),
            ],
        )
    }
}

/// `tproxy ip to ADDRESS:PORT` or `tproxy ip6 to [ADDRESS]:PORT`, with the port in register 1 and the address in register
/// 2, in network byte order. A packet of the other family does not match.
pub(super) struct Tproxy(pub(super) ProtoFamily);

impl Expression for Tproxy {
    fn to_expr(&self, _: &Rule<'_>) -> NonNull<sys::nftnl_expr> {
        expression(
            Kind::Tproxy,
            &[
                (sys::NFTNL_EXPR_TPROXY_FAMILY, self.0 as u32),
                (sys::NFTNL_EXPR_TPROXY_REG_ADDR, Register::Reg2.to_raw()),
                (sys::NFTNL_EXPR_TPROXY_REG_PORT, Register::Reg1.to_raw()),
            ],
        )
    }
}

/// `NFT_FIB_RESULT_ADDRTYPE`, `NFTA_FIB_F_SADDR`, `NFTA_FIB_F_DADDR` and `NFTA_FIB_F_OIF` (linux/netfilter/nf_tables.h),
/// which libc lacks.
const FIB_RESULT_ADDRTYPE: u32 = 3;
const FIB_F_SADDR: u32 = 1 << 0;
const FIB_F_DADDR: u32 = 1 << 1;
const FIB_F_OIF: u32 = 1 << 4;

/// `fib saddr type`, `fib saddr . oif type` and `fib daddr type`: loads how the routing tables know an address
/// (RTN_UNICAST, RTN_LOCAL, …).
#[derive(Clone, Copy)]
pub(super) enum AddressType {
    /// Of who sends the packet.
    Source,
    /// Of who sends the packet, on the interface that it leaves by.
    SourceOnInterface,
    /// Of where it goes.
    Destination,
}

impl Expression for AddressType {
    fn to_expr(&self, _: &Rule<'_>) -> NonNull<sys::nftnl_expr> {
        let address = match self {
            Self::Source => FIB_F_SADDR,
            Self::SourceOnInterface => FIB_F_SADDR | FIB_F_OIF,
            Self::Destination => FIB_F_DADDR,
        };
        expression(
            Kind::Fib,
            &[
                (sys::NFTNL_EXPR_FIB_DREG, Register::Reg1.to_raw()),
                (sys::NFTNL_EXPR_FIB_RESULT, FIB_RESULT_ADDRTYPE),
                (sys::NFTNL_EXPR_FIB_FLAGS, address),
            ],
        )
    }
}

/// Turns the word in register 1 from the host's byte order into the network's, in which the bytes of a number
/// compare as the number does.
pub(super) struct NetworkByteOrder;

impl Expression for NetworkByteOrder {
    fn to_expr(&self, _: &Rule<'_>) -> NonNull<sys::nftnl_expr> {
        let word = size_of::<u32>() as u32;
        expression(
            Kind::ByteOrder,
            &[
                (sys::NFTNL_EXPR_BYTEORDER_SREG, Register::Reg1.to_raw()),
                (sys::NFTNL_EXPR_BYTEORDER_DREG, Register::Reg1.to_raw()),
                (
                    sys::NFTNL_EXPR_BYTEORDER_OP,
                    libc::NFT_BYTEORDER_HTON as u32,
                ),
                (sys::NFTNL_EXPR_BYTEORDER_LEN, word),
                (sys::NFTNL_EXPR_BYTEORDER_SIZE, word),
            ],
        )
    }
}

/// `ct direction`: loads one byte, 0 for the side that opened the connection, 1 for replies to it.
pub(super) struct ConntrackDirection;

impl Expression for ConntrackDirection {
    fn to_expr(&self, _: &Rule<'_>) -> NonNull<sys::nftnl_expr> {
        expression(
            Kind::Conntrack,
            &[
                (sys::NFTNL_EXPR_CT_DREG, Register::Reg1.to_raw()),
                (sys::NFTNL_EXPR_CT_KEY, libc::NFT_CT_DIRECTION as u32),
            ],
        )
    }
}
