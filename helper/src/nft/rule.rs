//! Rules of nftables: one method for each thing that a rule can ask or do, named after what nft calls it. The comments
//! have it as nft writes it.

use std::ffi::CStr;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use nftnl::expr::ct::States;
use nftnl::expr::{
    Bitwise, Cmp, CmpOp, Conntrack, ConntrackStatus, IcmpCode, Immediate, Ipv4HeaderField,
    Ipv6HeaderField, Meta, Nat, NatType, NetworkHeaderField, Payload, Register, RejectionType,
    Socket, SocketKey, TcpHeaderField, TransportHeaderField, UdpHeaderField, Verdict,
};
use nftnl::{Chain, ProtoFamily, Rule};

use crate::route::{Family, LOOPBACK_INDEX};

use super::expression::{
    AddressType, ConntrackDirection, Found, Lookup, NetworkByteOrder, PacketMeta, TcpFlags, Tproxy,
};

/// Protocol numbers of IPPROTO_TCP and IPPROTO_UDP (linux/in.h).
const TCP: u8 = 6;
const UDP: u8 = 17;

/// SYN and ACK among the flags of TCP (RFC 9293, 3.1).
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

/// `NFPROTO_IPV4` and `NFPROTO_IPV6` (linux/netfilter.h).
const IPV4: u8 = 2;
const IPV6: u8 = 10;

/// `IP_CT_DIR_REPLY` (linux/netfilter/nf_conntrack_tuple_common.h).
const REPLY: u8 = 1;

/// `IP_CT_DIR_ORIGINAL` (linux/netfilter/nf_conntrack_tuple_common.h).
const ORIGINAL: u8 = 0;

/// The kind of a VRF's interface, as a key of `IFNAMSIZ` bytes (drivers/net/vrf.c).
const VRF: [u8; 16] = *b"vrf\0\0\0\0\0\0\0\0\0\0\0\0\0";

/// `confirmed`, `dnat` and `seen-reply` among the bits of `ct status`.
const CONFIRMED: u32 = ConntrackStatus::CONFIRMED.bits();
const DNAT: u32 = ConntrackStatus::DST_NAT.bits();
const SEEN_REPLY: u32 = ConntrackStatus::SEEN_REPLY.bits();

/// The range from `RTN_LOCAL` over `RTN_BROADCAST` and `RTN_ANYCAST` to `RTN_MULTICAST` (linux/rtnetlink.h).
const LOCAL_TO_MULTICAST: (u32, u32) = (2, 5);

/// A layer 4 protocol that a proxy can take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Protocol {
    Tcp,
    Udp,
}

impl Protocol {
    fn number(self) -> u8 {
        match self {
            Self::Tcp => TCP,
            Self::Udp => UDP,
        }
    }
}

/// A rule in the making. Matches come first, then what is done with packets that match them all.
/// Register 1 carries each value from the expression that loads it to the one that looks at it.
pub(super) struct RuleBuilder<'a>(Rule<'a>);

impl<'a> RuleBuilder<'a> {
    /// A rule at the end of `chain`.
    pub(super) fn new(chain: &'a Chain<'a>) -> Self {
        Self(Rule::new(chain))
    }

    /// The rule as it is now.
    pub(super) fn finish(self) -> Rule<'a> {
        self.0
    }

    fn with(mut self, expression: &impl nftnl::expr::Expression) -> Self {
        self.0.add_expr(expression);
        self
    }

    fn compare(self, operation: CmpOp, value: impl nftnl::expr::ToSlice) -> Self {
        self.with(&Cmp::new(operation, value))
    }

    /// `@SET`: register 1 is a key of the set.
    fn in_set(self, set: &CStr) -> Self {
        let found = Found::Key;
        self.with(&Lookup { set, found })
    }

    /// `map @MAP`: loads the value of the key in register 1.
    fn value_of(self, map: &CStr) -> Self {
        let (set, found) = (map, Found::Value);
        self.with(&Lookup { set, found })
    }

    /// `vmap @MAP`: the verdict of the key in register 1.
    fn vmap(self, map: &CStr) -> Self {
        let (set, found) = (map, Found::Verdict);
        self.with(&Lookup { set, found })
    }

    /// `ct mark & MASK`: loads these bits of the connection's mark. What is not tracked has none.
    fn ct_mark(self, mask: u32) -> Self {
        self.with(&Conntrack::Mark { set: false })
            .with(&Bitwise::new(mask, 0u32))
    }

    /// `meta mark & MASK`: loads these bits of the packet's mark.
    fn meta_mark(self, mask: u32) -> Self {
        self.with(&Meta::Mark { set: false })
            .with(&Bitwise::new(mask, 0u32))
    }

    /// `ct status & MASK == VALUE`, or another comparison.
    fn ct_status(self, mask: u32, operation: CmpOp, value: u32) -> Self {
        self.with(&Conntrack::Status)
            .with(&Bitwise::new(mask, 0u32))
            .compare(operation, value)
    }

    /// `ct direction reply`
    pub(super) fn ct_direction_reply(self) -> Self {
        self.with(&ConntrackDirection).compare(CmpOp::Eq, REPLY)
    }

    /// `ct status confirmed`: the connection is known, this is not its first packet.
    pub(super) fn ct_confirmed(self) -> Self {
        self.ct_status(CONFIRMED, CmpOp::Neq, 0)
    }

    /// `ct status ! confirmed`: this is the first packet of a connection.
    pub(super) fn ct_unconfirmed(self) -> Self {
        self.ct_status(CONFIRMED, CmpOp::Eq, 0)
    }

    /// `ct status seen-reply`: somebody has answered.
    pub(super) fn ct_seen_reply(self) -> Self {
        self.ct_status(SEEN_REPLY, CmpOp::Neq, 0)
    }

    /// `ct status dnat`: the connection's destination was changed.
    pub(super) fn ct_dnat(self) -> Self {
        self.ct_status(DNAT, CmpOp::Neq, 0)
    }

    /// `ct status & (confirmed | dnat) == confirmed`: the connection is known, and its destination was not changed.
    pub(super) fn ct_confirmed_without_dnat(self) -> Self {
        self.ct_status(CONFIRMED | DNAT, CmpOp::Eq, CONFIRMED)
    }

    /// `ct status & (confirmed | dnat) == confirmed | dnat`: the connection is known, and its destination was
    /// changed.
    pub(super) fn ct_confirmed_dnat(self) -> Self {
        self.ct_status(CONFIRMED | DNAT, CmpOp::Eq, CONFIRMED | DNAT)
    }

    /// `ct state != new`
    pub(super) fn ct_state_not_new(self) -> Self {
        self.with(&Conntrack::State)
            .with(&Bitwise::new(States::NEW.bits(), 0u32))
            .compare(CmpOp::Eq, 0u32)
    }

    /// `ct direction original`
    pub(super) fn ct_direction_original(self) -> Self {
        self.with(&ConntrackDirection).compare(CmpOp::Eq, ORIGINAL)
    }

    /// `socket cgroupv2 level LEVEL`: loads the id of the control group at that level which the socket is in or below.
    fn load_cgroupv2(self, level: u32) -> Self {
        self.with(&Socket::new(SocketKey::CgroupV2, level))
    }

    /// `socket cgroupv2 level LEVEL ID`. On the way out that is the sender's socket, on the way in the one that the
    /// packet would reach.
    pub(super) fn socket_cgroupv2(self, level: u32, id: &[u8]) -> Self {
        self.load_cgroupv2(level).compare(CmpOp::Eq, id)
    }

    /// `socket cgroupv2 level LEVEL != ID`: there is a socket that deep, in another control group.
    pub(super) fn socket_cgroupv2_not(self, level: u32, id: &[u8]) -> Self {
        self.load_cgroupv2(level).compare(CmpOp::Neq, id)
    }

    /// `socket wildcard` or `socket transparent`: loads 0 or 1, if there is a socket.
    fn load_socket(self, key: SocketKey) -> Self {
        self.with(&Socket::new(key, 0))
    }

    /// `socket wildcard { 0, 1 }`: there is a socket, which is not the rest of a closed connection.
    pub(super) fn socket_wildcard_any(self) -> Self {
        self.load_socket(SocketKey::Wildcard)
            .compare(CmpOp::Lte, 1u8)
    }

    /// `socket wildcard 0`: the sender's socket is connected or bound to an address. Those by which the kernel itself
    /// sends resets and the like are neither.
    pub(super) fn socket_wildcard_0(self) -> Self {
        self.load_socket(SocketKey::Wildcard)
            .compare(CmpOp::Eq, 0u8)
    }

    /// `socket transparent { 0, 1 }`: there is a socket of whatever kind.
    pub(super) fn socket_transparent_any(self) -> Self {
        self.load_socket(SocketKey::Transparent)
            .compare(CmpOp::Lte, 1u8)
    }

    /// `socket transparent 1`: the sender's socket is transparent, which takes CAP_NET_ADMIN or CAP_NET_RAW.
    pub(super) fn socket_is_transparent(self) -> Self {
        self.load_socket(SocketKey::Transparent)
            .compare(CmpOp::Eq, 1u8)
    }

    /// `socket transparent 0`: the sender's socket is not transparent.
    pub(super) fn socket_is_not_transparent(self) -> Self {
        self.load_socket(SocketKey::Transparent)
            .compare(CmpOp::Eq, 0u8)
    }

    /// `socket cgroupv2 level LEVEL vmap @MAP`
    pub(super) fn socket_cgroupv2_vmap(self, level: u32, map: &CStr) -> Self {
        self.load_cgroupv2(level).vmap(map)
    }

    /// `socket cgroupv2 level LEVEL map @MAP vmap @CHOICES`
    ///
    /// Up to version 1.0.9, nft aborts when it lists a look-up of what a look-up has found. So the number goes by way
    /// of the packet's mark, which has its old value again before the verdict is taken. nft shows `meta mark set socket
    /// cgroupv2 level LEVEL map @MAP meta mark set meta mark meta mark vmap @CHOICES`.
    pub(super) fn socket_cgroupv2_map_vmap(self, level: u32, map: &CStr, choices: &CStr) -> Self {
        self.load_cgroupv2(level)
            .value_of(map)
            .with(&PacketMeta::LoadMark(Register::Reg2))
            .with(&PacketMeta::StoreMark(Register::Reg1))
            .with(&PacketMeta::LoadMark(Register::Reg1))
            .with(&PacketMeta::StoreMark(Register::Reg2))
            .vmap(choices)
    }

    /// `socket cgroupv2 level LEVEL != 0`: the socket's control group is that deep, or deeper. No control group has the
    /// id 0.
    pub(super) fn socket_level_exists(self, level: u32) -> Self {
        self.socket_cgroupv2_not(level, &[0; 8])
    }

    /// `ct mark & MASK vmap @MAP`
    pub(super) fn ct_mark_vmap(self, mask: u32, map: &CStr) -> Self {
        self.ct_mark(mask).vmap(map)
    }

    /// `ct mark & MASK == MARK`
    pub(super) fn ct_mark_is(self, mask: u32, mark: u32) -> Self {
        self.ct_mark(mask).compare(CmpOp::Eq, mark)
    }

    /// `ct mark & MASK != MARK`
    pub(super) fn ct_mark_is_not(self, mask: u32, mark: u32) -> Self {
        self.ct_mark(mask).compare(CmpOp::Neq, mark)
    }

    /// `meta priority . meta skuid @SET`
    pub(super) fn priority_and_skuid_in(self, set: &CStr) -> Self {
        self.with(&PacketMeta::LoadPriority)
            .with(&PacketMeta::LoadOwnerBehind)
            .in_set(set)
    }

    /// `ct mark & MASK . meta skuid @SET`
    pub(super) fn ct_mark_and_skuid_in(self, mask: u32, set: &CStr) -> Self {
        self.ct_mark(mask)
            .with(&PacketMeta::LoadOwnerBehind)
            .in_set(set)
    }

    /// `meta mark & MASK vmap @MAP`
    pub(super) fn meta_mark_vmap(self, mask: u32, map: &CStr) -> Self {
        self.meta_mark(mask).vmap(map)
    }

    /// `meta priority vmap @MAP`
    pub(super) fn priority_vmap(self, map: &CStr) -> Self {
        self.with(&PacketMeta::LoadPriority).vmap(map)
    }

    /// `ct mark & BITS != 0`. What is not tracked has no mark: neither this matches then nor its opposite.
    pub(super) fn ct_mark_has(self, bits: u32) -> Self {
        self.ct_mark(bits).compare(CmpOp::Neq, 0u32)
    }

    /// `ct mark & BITS == 0`. What is not tracked has no mark: neither this matches then nor its opposite.
    pub(super) fn ct_mark_lacks(self, bits: u32) -> Self {
        self.ct_mark(bits).compare(CmpOp::Eq, 0u32)
    }

    /// `meta mark & BITS != 0`
    pub(super) fn meta_mark_has(self, bits: u32) -> Self {
        self.meta_mark(bits).compare(CmpOp::Neq, 0u32)
    }

    /// `meta mark & BITS == 0`
    pub(super) fn meta_mark_lacks(self, bits: u32) -> Self {
        self.meta_mark(bits).compare(CmpOp::Eq, 0u32)
    }

    /// `ct mark set ct mark & ~MASK | MARK`
    pub(super) fn ct_mark_set(self, mask: u32, mark: u32) -> Self {
        self.with(&Conntrack::Mark { set: false })
            .with(&Bitwise::new(!mask, mark))
            .with(&Conntrack::Mark { set: true })
    }

    /// `meta mark set meta mark & ~MASK | MARK`
    pub(super) fn meta_mark_set(self, mask: u32, mark: u32) -> Self {
        self.with(&Meta::Mark { set: false })
            .with(&Bitwise::new(!mask, mark))
            .with(&Meta::Mark { set: true })
    }

    /// `meta priority set PRIORITY`
    pub(super) fn priority_set(self, priority: u32) -> Self {
        self.with(&Immediate::new(priority, Register::Reg1))
            .with(&PacketMeta::StorePriority)
    }

    /// `iif lo`
    pub(super) fn iif_lo(self) -> Self {
        self.with(&Meta::Iif).compare(CmpOp::Eq, LOOPBACK_INDEX)
    }

    /// `oif lo`
    pub(super) fn oif_lo(self) -> Self {
        self.with(&Meta::Oif).compare(CmpOp::Eq, LOOPBACK_INDEX)
    }

    /// `oif != lo`
    pub(super) fn oif_not_lo(self) -> Self {
        self.with(&Meta::Oif).compare(CmpOp::Neq, LOOPBACK_INDEX)
    }

    /// `iif != lo`
    pub(super) fn iif_not_lo(self) -> Self {
        self.with(&Meta::Iif).compare(CmpOp::Neq, LOOPBACK_INDEX)
    }

    /// `iifname @SET`
    pub(super) fn iifname_in(self, set: &CStr) -> Self {
        self.with(&Meta::IifName).in_set(set)
    }

    /// `oifname @SET`
    pub(super) fn oifname_in(self, set: &CStr) -> Self {
        self.with(&Meta::OifName).in_set(set)
    }

    /// `meta l4proto PROTOCOL`
    pub(super) fn l4proto(self, protocol: Protocol) -> Self {
        self.with(&Meta::L4Proto)
            .compare(CmpOp::Eq, protocol.number())
    }

    /// `meta l4proto != PROTOCOL`
    pub(super) fn l4proto_not(self, protocol: Protocol) -> Self {
        self.with(&Meta::L4Proto)
            .compare(CmpOp::Neq, protocol.number())
    }

    /// `tcp flags & FLAGS`: loads these flags of packets of TCP.
    fn tcp_flags(self, flags: u8) -> Self {
        self.l4proto(Protocol::Tcp)
            .with(&TcpFlags)
            .with(&Bitwise::new(flags, 0u8))
    }

    /// `tcp flags ! syn`: in the middle of a connection.
    pub(super) fn tcp_without_syn(self) -> Self {
        self.tcp_flags(SYN).compare(CmpOp::Eq, 0u8)
    }

    /// `tcp flags & (syn | ack) == syn`: the first packet of a connection.
    pub(super) fn tcp_syn(self) -> Self {
        self.tcp_flags(SYN | ACK).compare(CmpOp::Eq, SYN)
    }

    /// `tcp flags & (syn | ack) != syn`: any packet of a connection but the first one.
    pub(super) fn tcp_but_syn(self) -> Self {
        self.tcp_flags(SYN | ACK).compare(CmpOp::Neq, SYN)
    }

    /// `meta nfproto FAMILY`
    pub(super) fn nfproto(self, family: Family) -> Self {
        let number = match family {
            Family::Ipv4 => IPV4,
            Family::Ipv6 => IPV6,
        };
        self.with(&Meta::NfProto).compare(CmpOp::Eq, number)
    }

    /// `ip daddr` or `ip6 daddr`: loads the destination of packets of this family.
    fn load_daddr(self, family: Family) -> Self {
        let field = match family {
            Family::Ipv4 => NetworkHeaderField::Ipv4(Ipv4HeaderField::Daddr),
            Family::Ipv6 => NetworkHeaderField::Ipv6(Ipv6HeaderField::Daddr),
        };
        self.nfproto(family).with(&Payload::Network(field))
    }

    /// `ip daddr @SET` or `ip6 daddr @SET`
    pub(super) fn daddr_in(self, family: Family, set: &CStr) -> Self {
        self.load_daddr(family).in_set(set)
    }

    /// `ip daddr ADDRESS` or `ip6 daddr ADDRESS`
    pub(super) fn daddr(self, address: IpAddr) -> Self {
        self.load_daddr(Family::of(&address))
            .compare(CmpOp::Eq, address)
    }

    /// `ip daddr 127.0.0.0/8` or `ip6 daddr ::1`
    pub(super) fn daddr_loopback(self, family: Family) -> Self {
        match family {
            Family::Ipv4 => self.daddr_within(Ipv4Addr::new(127, 0, 0, 0).into(), 8),
            Family::Ipv6 => self.daddr(Ipv6Addr::LOCALHOST.into()),
        }
    }

    /// `tcp dport PORT` or `udp dport PORT`
    pub(super) fn dport(self, protocol: Protocol, port: u16) -> Self {
        let field = match protocol {
            Protocol::Tcp => TransportHeaderField::Tcp(TcpHeaderField::Dport),
            Protocol::Udp => TransportHeaderField::Udp(UdpHeaderField::Dport),
        };
        let port = port.to_be_bytes();
        self.l4proto(protocol)
            .with(&Payload::Transport(field))
            .compare(CmpOp::Eq, &port[..])
    }

    /// `dnat ip to ADDRESS:PORT` or `dnat ip6 to [ADDRESS]:PORT`
    pub(super) fn dnat(self, address: IpAddr, port: u16) -> Self {
        let port = Immediate::new(port.to_be_bytes(), Register::Reg2);
        let family = Family::of(&address);
        self.nfproto(family)
            .address(address, Register::Reg1)
            .with(&port)
            .with(&Nat {
                nat_type: NatType::DNat,
                family: proto_family(family),
                ip_register: Register::Reg1,
                port_register: Some(Register::Reg2),
            })
    }

    /// Loads an address, as packets have it.
    fn address(self, address: IpAddr, register: Register) -> Self {
        match address {
            IpAddr::V4(address) => self.with(&Immediate::new(address.octets(), register)),
            IpAddr::V6(address) => self.with(&Immediate::new(address.octets(), register)),
        }
    }

    /// `ip6 daddr fe80::/10`
    pub(super) fn daddr_link_local(self) -> Self {
        self.daddr_within(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0).into(), 10)
    }

    /// `ip6 daddr ff00::/8`
    pub(super) fn daddr_multicast6(self) -> Self {
        self.daddr_within(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0).into(), 8)
    }

    /// `ip daddr ADDRESS/PREFIX` or `ip6 daddr ADDRESS/PREFIX`, which has no bits beyond the prefix
    pub(super) fn daddr_within(self, address: IpAddr, prefix: u8) -> Self {
        let prefix = u32::from(prefix);
        match address {
            IpAddr::V4(address) => {
                let mask = !u32::MAX.checked_shr(prefix).unwrap_or(0);
                self.daddr_network(Family::Ipv4, address.octets(), mask.to_be_bytes())
            }
            IpAddr::V6(address) => {
                let mask = !u128::MAX.checked_shr(prefix).unwrap_or(0);
                self.daddr_network(Family::Ipv6, address.octets(), mask.to_be_bytes())
            }
        }
    }

    /// `ip daddr NETWORK` or `ip6 daddr NETWORK`
    fn daddr_network<const N: usize>(
        self,
        family: Family,
        network: [u8; N],
        mask: [u8; N],
    ) -> Self {
        self.load_daddr(family)
            .with(&Bitwise::new(&mask[..], &[0_u8; N][..]))
            .compare(CmpOp::Eq, &network[..])
    }

    /// `fib daddr type 2-5`: local, broadcast, anycast or multicast.
    ///
    /// `fib daddr type != unicast` would match too much. For IPv6 the kernel looks for a route without the packet's
    /// interfaces, mark and owner (__nft_fib6_eval_type, net/ipv6/netfilter/nft_fib_ipv6.c): where routing rules go by
    /// these, it finds none and says unreachable.
    pub(super) fn daddr_local_or_many(self) -> Self {
        let (first, last) = LOCAL_TO_MULTICAST;
        self.with(&AddressType::Destination).within(first, last)
    }

    /// `fib saddr type local`: the machine has the address that the packet is from. No address of a VRF is found so.
    pub(super) fn saddr_is_local(self) -> Self {
        self.with(&AddressType::Source)
            .compare(CmpOp::Eq, LOCAL_TO_MULTICAST.0)
    }

    /// `fib saddr . oif type local`: the interface that the packet leaves by has the address that it is from.
    pub(super) fn saddr_is_of_oif(self) -> Self {
        self.with(&AddressType::SourceOnInterface)
            .compare(CmpOp::Eq, LOCAL_TO_MULTICAST.0)
    }

    /// `meta oifkind "vrf"`
    pub(super) fn oif_is_vrf(self) -> Self {
        self.with(&PacketMeta::LoadInterfaceKind)
            .compare(CmpOp::Eq, &VRF[..])
    }

    /// `meta skuid >= 0`: there is a socket, and somebody has it open.
    pub(super) fn skuid_known(self) -> Self {
        self.with(&Meta::SkUid).compare(CmpOp::Gte, 0u32)
    }

    /// `meta skuid FIRST-LAST`
    pub(super) fn skuid_from_to(self, first: u32, last: u32) -> Self {
        self.with(&Meta::SkUid).within(first, last)
    }

    /// `FIRST-LAST`, of the word in register 1. The kernel compares byte by byte, so that it has to be in network byte
    /// order.
    fn within(self, first: u32, last: u32) -> Self {
        self.with(&NetworkByteOrder)
            .compare(CmpOp::Gte, &first.to_be_bytes()[..])
            .compare(CmpOp::Lte, &last.to_be_bytes()[..])
    }

    /// `meta skuid @SET`
    pub(super) fn skuid_in(self, set: &CStr) -> Self {
        self.with(&Meta::SkUid).in_set(set)
    }

    /// `tproxy ip to 127.0.0.1:PORT` or `tproxy ip6 to [::1]:PORT`. Without a listener the rule does not match.
    pub(super) fn tproxy(self, family: Family, port: u16) -> Self {
        self.with(&Immediate::new(port.to_be_bytes(), Register::Reg1))
            .tproxy_to_loopback(family)
    }

    /// `tproxy ip to 127.0.0.1:(ct mark & MASK map @PORTS)`, or for IPv6. Without a listener the rule does not match.
    ///
    /// nft shows it without the port: it prints a port that is written there, and no other (tproxy_stmt_print).
    pub(super) fn tproxy_by_ct_mark(self, family: Family, mask: u32, ports: &CStr) -> Self {
        self.ct_mark(mask)
            .value_of(ports)
            .tproxy_to_loopback(family)
    }

    /// `tproxy ip to 127.0.0.1:(meta priority map @PORTS)`, or for IPv6. Without a listener the rule does not match. nft
    /// shows it without the port.
    pub(super) fn tproxy_by_priority(self, family: Family, ports: &CStr) -> Self {
        self.with(&PacketMeta::LoadPriority)
            .value_of(ports)
            .tproxy_to_loopback(family)
    }

    /// To the port in register 1. Without an address the kernel takes the first one of the interface that the packet
    /// came in on (nf_tproxy_laddr4, nf_tproxy_laddr6), which on lo need not be ::1 and elsewhere never is: it would
    /// find no listener on a loopback address. With this one it finds those on all addresses, too.
    fn tproxy_to_loopback(self, family: Family) -> Self {
        let address = match family {
            Family::Ipv4 => Ipv4Addr::LOCALHOST.into(),
            Family::Ipv6 => Ipv6Addr::LOCALHOST.into(),
        };
        self.address(address, Register::Reg2)
            .with(&Tproxy(proto_family(family)))
    }

    /// `jump CHAIN`
    pub(super) fn jump(self, chain: &CStr) -> Self {
        self.with(&Verdict::Jump {
            chain: chain.to_owned(),
        })
    }

    /// `goto CHAIN`
    pub(super) fn goto(self, chain: &CStr) -> Self {
        self.with(&Verdict::Goto {
            chain: chain.to_owned(),
        })
    }

    /// `accept`: from here on cgtproxy leaves the packet alone.
    pub(super) fn accept(self) -> Self {
        self.with(&Verdict::Accept)
    }

    /// `return`
    pub(super) fn return_(self) -> Self {
        self.with(&Verdict::Return)
    }

    /// `drop`
    pub(super) fn drop(self) -> Self {
        self.with(&Verdict::Drop)
    }

    /// `reject with tcp reset`. The rule has to match TCP before it.
    pub(super) fn reject_with_tcp_reset(self) -> Self {
        self.with(&Verdict::Reject(RejectionType::TcpRst))
    }

    /// `reject with icmpx port-unreachable`
    pub(super) fn reject(self) -> Self {
        self.with(&Verdict::Reject(RejectionType::Icmp(IcmpCode::PortUnreach)))
    }
}

/// A family as nftnl's expressions have it.
fn proto_family(family: Family) -> ProtoFamily {
    match family {
        Family::Ipv4 => ProtoFamily::Ipv4,
        Family::Ipv6 => ProtoFamily::Ipv6,
    }
}
