//! What the kernel tells everybody over netlink: routing rules and tables (rtnetlink(7)), and sockets (sock_diag(7)).

use std::io;
use std::net::IpAddr;

use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable,
    NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable, Nla as _, Parseable,
};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{RouteAttribute, RouteMessage};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP, IPPROTO_UDP};
use netlink_packet_sock_diag::inet::nlas::Nla;
use netlink_packet_sock_diag::inet::{
    ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags,
};
use netlink_sys::protocols::{NETLINK_ROUTE, NETLINK_SOCK_DIAG};
use netlink_sys::{Socket, SocketAddr};

use super::{Family, Listener, Rule, Transport};
use crate::doctor::Look;

/// `INET_DIAG_CGROUP_ID` and `INET_DIAG_SOCKOPT` (linux/inet_diag.h).
const CONTROL_GROUP: u16 = 21;
const SOCKET_OPTIONS: u16 = 22;

/// The bit `transparent` in the first byte of struct inet_diag_sockopt (linux/inet_diag.h).
const TRANSPARENT: u8 = if cfg!(target_endian = "little") {
    1 << 5
} else {
    1 << 2
};

/// `TCP_CLOSE` and `TCP_LISTEN` (net/tcp_states.h): a UDP socket that is not connected, and a TCP socket
/// that takes connections.
const UNCONNECTED: u32 = 1 << 7;
const LISTENING: u32 = 1 << 10;

/// What is asked for (linux/rtnetlink.h).
const RTM_GETROUTE: u16 = 26;
const RTM_GETRULE: u16 = 34;

/// What rtnetlink is asked about.
const FAMILIES: [(AddressFamily, Family); 2] = [
    (AddressFamily::Inet, Family::Ipv4),
    (AddressFamily::Inet6, Family::Ipv6),
];

/// A message of rtnetlink that asks for a dump, or is part of one. `RouteNetlinkMessage` would do, and bring what takes
/// links, queues and neighbours apart into every agent.
struct Dumped<M, const GET: u16>(M);

impl<M: Emitable, const GET: u16> NetlinkSerializable for Dumped<M, GET> {
    fn message_type(&self) -> u16 {
        GET
    }

    fn buffer_len(&self) -> usize {
        self.0.buffer_len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        self.0.emit(buffer);
    }
}

/// Nothing but what was asked for is in a dump.
impl<M: Parseable<[u8]>, const GET: u16> NetlinkDeserializable for Dumped<M, GET> {
    type Error = DecodeError;

    fn deserialize(_: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        M::parse(payload).map(Self)
    }
}

/// Asks for a dump and hands each object of it to `each`.
fn dump<M>(protocol: isize, request: M, mut each: impl FnMut(M)) -> io::Result<()>
where
    M: NetlinkSerializable + NetlinkDeserializable,
{
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut message = NetlinkMessage::new(
        NetlinkHeader::default(),
        NetlinkPayload::InnerMessage(request),
    );
    message.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    loop {
        let (bytes, _) = socket.recv_from_full()?;
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let message = NetlinkMessage::<M>::deserialize(rest)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
            let length = (message.header.length as usize).next_multiple_of(4).max(4);
            rest = rest.get(length..).unwrap_or_default();
            match message.payload {
                NetlinkPayload::InnerMessage(object) => each(object),
                NetlinkPayload::Done(_) => return Ok(()),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                _ => {}
            }
        }
    }
}

/// The routing rules of both families.
///
/// # Errors
/// If the kernel does not tell.
pub(crate) fn rules() -> Look<Vec<Rule>> {
    let mut rules = Vec::new();
    for (family, kind) in FAMILIES {
        let mut request = RuleMessage::default();
        request.header.family = family;
        let request = Dumped::<_, RTM_GETRULE>(request);
        let dumped = dump(NETLINK_ROUTE, request, |Dumped(message)| {
            rules.push(rule(kind, &message));
        });
        match dumped {
            // A kernel without IPv6.
            Err(error) if kind == Family::Ipv6 && no_family(&error) => {}
            dumped => dumped.map_err(|error| error.to_string())?,
        }
    }
    Ok(rules)
}

fn no_family(error: &io::Error) -> bool {
    use rustix::io::Errno;
    matches!(
        Errno::from_io_error(error),
        Some(Errno::AFNOSUPPORT | Errno::OPNOTSUPP | Errno::NOENT)
    )
}

fn rule(family: Family, message: &RuleMessage) -> Rule {
    let header = &message.header;
    let mut rule = Rule {
        family,
        inverted: header.flags.contains(RuleFlags::Invert),
        narrower: header.dst_len != 0 || header.src_len != 0 || header.tos != 0,
        table: (header.action == RuleAction::ToTable).then_some(header.table.into()),
        ..Rule::default()
    };
    let (mut mark, mut mask) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(priority) => rule.priority = *priority,
            RuleAttribute::FwMark(value) => mark = Some(*value),
            RuleAttribute::FwMask(value) => mask = Some(*value),
            RuleAttribute::Table(table) if rule.table.is_some() => rule.table = Some(*table),
            RuleAttribute::SuppressPrefixLen(length) => rule.suppressed = *length != u32::MAX,
            RuleAttribute::SuppressIfGroup(group) => rule.suppressed |= *group != u32::MAX,
            RuleAttribute::Iifname(_)
            | RuleAttribute::Oifname(_)
            | RuleAttribute::L3MDev(true)
            | RuleAttribute::UidRange(_)
            | RuleAttribute::IpProtocol(_)
            | RuleAttribute::TunId(_)
            | RuleAttribute::SourcePortRange(_)
            | RuleAttribute::DestinationPortRange(_) => rule.narrower = true,
            _ => {}
        }
    }
    // The kernel leaves out a mark of zero that has a mask (fib_nl_fill_rule, net/core/fib_rules.c).
    let mark = mark.or(mask.map(|_| 0));
    rule.mark = mark.map(|mark| (mark, mask.unwrap_or(u32::MAX)));
    rule
}

/// The routing tables that have a route to deliver everything to this machine, with their families.
///
/// # Errors
/// If the kernel does not tell.
pub(crate) fn routing_tables() -> Look<Vec<(Family, u32)>> {
    use netlink_packet_route::route::RouteType;
    let mut tables = Vec::new();
    for (family, kind) in FAMILIES {
        let mut request = RouteMessage::default();
        request.header.address_family = family;
        let request = Dumped::<_, RTM_GETROUTE>(request);
        let dumped = dump(NETLINK_ROUTE, request, |Dumped(route)| {
            let everything = route.header.destination_prefix_length == 0;
            if everything && route.header.kind == RouteType::Local {
                let mut attributes = route.attributes.iter();
                let long = attributes.find_map(|attribute| match attribute {
                    RouteAttribute::Table(table) => Some(*table),
                    _ => None,
                });
                tables.push((kind, long.unwrap_or(route.header.table.into())));
            }
        });
        match dumped {
            Err(error) if kind == Family::Ipv6 && no_family(&error) => {}
            dumped => dumped.map_err(|error| error.to_string())?,
        }
    }
    Ok(tables)
}

/// Who listens on TCP ports, and who takes datagrams from everybody.
///
/// # Errors
/// If the kernel does not tell.
pub(crate) fn listeners() -> Look<Vec<Listener>> {
    let mut listeners = Vec::new();
    for (transport, protocol, states) in [
        (Transport::Tcp, IPPROTO_TCP, LISTENING),
        (Transport::Udp, IPPROTO_UDP, UNCONNECTED),
    ] {
        for (family, socket_id) in [
            (AF_INET, SocketId::new_v4()),
            (AF_INET6, SocketId::new_v6()),
        ] {
            let request = InetRequest {
                family,
                protocol,
                extensions: ExtensionFlags::empty(),
                states: StateFlags::from_bits_truncate(states),
                socket_id,
            };
            dump(
                NETLINK_SOCK_DIAG,
                SockDiagMessage::InetRequest(request),
                |message| {
                    if let SockDiagMessage::InetResponse(response) = message {
                        listeners.push(listener(transport, &response));
                    }
                },
            )
            .map_err(|error| error.to_string())?;
        }
    }
    Ok(listeners)
}

fn listener(transport: Transport, response: &InetResponse) -> Listener {
    let mut listener = Listener {
        transport,
        address: unmapped(response.header.socket_id.source_address),
        port: response.header.socket_id.source_port,
        uid: response.header.uid,
        only_v6: false,
        transparent: None,
        control_group: None,
    };
    for attribute in &response.nlas {
        match attribute {
            Nla::SkV6Only(only) => listener.only_v6 = *only,
            Nla::Other(other) if other.kind() == SOCKET_OPTIONS => {
                let options = value(other).first().copied().unwrap_or_default();
                listener.transparent = Some(options & TRANSPARENT != 0);
            }
            Nla::Other(other) if other.kind() == CONTROL_GROUP => {
                let id = value(other).first_chunk().copied();
                listener.control_group = id.map(u64::from_ne_bytes);
            }
            _ => {}
        }
    }
    listener
}

fn value(attribute: &DefaultNla) -> Vec<u8> {
    let mut bytes = vec![0; attribute.value_len()];
    attribute.emit_value(&mut bytes);
    bytes
}

/// An IPv4 address that a socket of IPv6 has, as one of IPv4.
fn unmapped(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(address, IpAddr::V4),
        IpAddr::V4(_) => address,
    }
}
