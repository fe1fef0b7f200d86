//! The kernel's record of connections (conntrack): where a translated one was going.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use netlink_packet_core::NLA_F_NESTED;
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_NETFILTER;
use rustix::io::Errno;

use crate::netlink::{self, MESSAGE, Messages, Refusal, attribute, push_attribute};

/// `NFNL_SUBSYS_CTNETLINK` (linux/netfilter/nfnetlink.h), the upper byte of a message's type.
const SUBSYSTEM: u16 = 1;
/// `IPCTNL_MSG_CT_GET` (linux/netfilter/nfnetlink_conntrack.h).
const GET: u16 = 1;

/// enum ctattr_type (linux/netfilter/nfnetlink_conntrack.h).
const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const MARK: u16 = 8;
/// enum ctattr_tuple (linux/netfilter/nfnetlink_conntrack.h).
const TUPLE_ADDRESSES: u16 = 1;
const TUPLE_PROTOCOL: u16 = 2;
/// enum ctattr_ip (linux/netfilter/nfnetlink_conntrack.h): source and destination of each family.
const IPV4: (u16, u16) = (1, 2);
const IPV6: (u16, u16) = (3, 4);
/// enum ctattr_l4proto (linux/netfilter/nfnetlink_conntrack.h).
const PROTOCOL_NUMBER: u16 = 1;
const PROTOCOL_PORTS: (u16, u16) = (2, 3);

/// IPPROTO_UDP (linux/in.h).
const UDP: u8 = 17;
/// AF_INET and AF_INET6 (linux/socket.h).
const FAMILY_IPV4: u8 = 2;
const FAMILY_IPV6: u8 = 10;

/// What conntrack knows of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Who began it.
    pub(crate) source: SocketAddr,
    /// Where it was going before its destination was changed.
    pub(crate) destination: SocketAddr,
    /// Its mark.
    pub(crate) mark: u32,
}

/// A socket to ctnetlink.
#[derive(Debug)]
pub(crate) struct Conntrack {
    socket: Socket,
}

impl Conntrack {
    /// Opens the socket. Whether the kernel has ctnetlink turns out at the first look-up.
    pub(crate) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        Ok(Self { socket })
    }

    /// The UDP connection whose answers go from one address to another, if there is one.
    pub(crate) fn find_udp(
        &self,
        answers_from: SocketAddr,
        answers_to: SocketAddr,
    ) -> Result<Option<Entry>, Refusal> {
        let Some(request) = request(answers_from, answers_to) else {
            return Ok(None);
        };
        self.socket.send(&request, 0)?;
        // The kernel queues its answer before sendmsg(2) returns.
        let mut buffer: Vec<u8> = Vec::with_capacity(MESSAGE);
        netlink::receive(&self.socket, &mut buffer)?;
        for message in Messages(&buffer) {
            match message.refusal() {
                Some(refusal) if refusal.errno == Errno::NOENT => return Ok(None),
                Some(refusal) => return Err(refusal),
                None => {
                    if let Some((SUBSYSTEM, _, attributes)) = message.netfilter() {
                        return Ok(entry(attributes));
                    }
                }
            }
        }
        Ok(None)
    }
}

/// A request for the entry with this reply tuple; none if the addresses are of different families.
fn request(from: SocketAddr, to: SocketAddr) -> Option<Vec<u8>> {
    let mut addresses = Vec::new();
    let family = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            push_attribute(&mut addresses, IPV4.0, &from.octets());
            push_attribute(&mut addresses, IPV4.1, &to.octets());
            FAMILY_IPV4
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            push_attribute(&mut addresses, IPV6.0, &from.octets());
            push_attribute(&mut addresses, IPV6.1, &to.octets());
            FAMILY_IPV6
        }
        _ => return None,
    };
    let mut protocol = Vec::new();
    push_attribute(&mut protocol, PROTOCOL_NUMBER, &[UDP]);
    push_attribute(&mut protocol, PROTOCOL_PORTS.0, &from.port().to_be_bytes());
    push_attribute(&mut protocol, PROTOCOL_PORTS.1, &to.port().to_be_bytes());
    let mut tuple = Vec::new();
    push_attribute(&mut tuple, TUPLE_ADDRESSES | NLA_F_NESTED, &addresses);
    push_attribute(&mut tuple, TUPLE_PROTOCOL | NLA_F_NESTED, &protocol);
    let mut attributes = Vec::new();
    push_attribute(&mut attributes, TUPLE_REPLY | NLA_F_NESTED, &tuple);
    Some(netlink::netfilter_request(
        SUBSYSTEM,
        GET,
        0,
        family,
        &attributes,
    ))
}

/// Takes what may be an answer apart.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(attributes: &[u8]) {
    let _ = entry(attributes);
}

/// What the attributes of an answer say; none if they make no sense.
fn entry(attributes: &[u8]) -> Option<Entry> {
    let tuple = attribute(attributes, TUPLE_ORIGINAL)?;
    let addresses = attribute(tuple, TUPLE_ADDRESSES)?;
    let protocol = attribute(tuple, TUPLE_PROTOCOL)?;
    let port = |kind| {
        let bytes = attribute(protocol, kind)?;
        Some(u16::from_be_bytes(bytes.try_into().ok()?))
    };
    let (source, destination) = match address(addresses, IPV4.0) {
        Some(source) => (source, address(addresses, IPV4.1)?),
        None => (address(addresses, IPV6.0)?, address(addresses, IPV6.1)?),
    };
    let mark = attribute(attributes, MARK)
        .and_then(|mark| mark.try_into().ok())
        .map_or(0, u32::from_be_bytes);
    Some(Entry {
        source: SocketAddr::new(source, port(PROTOCOL_PORTS.0)?),
        destination: SocketAddr::new(destination, port(PROTOCOL_PORTS.1)?),
        mark,
    })
}

fn address(addresses: &[u8], kind: u16) -> Option<IpAddr> {
    let bytes = attribute(addresses, kind)?;
    if let Ok(octets) = <[u8; 4]>::try_from(bytes) {
        return Some(Ipv4Addr::from(octets).into());
    }
    Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::HEADER;
    use proptest::prelude::*;

    #[test]
    fn reads_the_tuple_it_writes() {
        for (from, to) in [
            ("127.0.0.1:1080", "192.0.2.1:5000"),
            ("[::1]:1080", "[2001:db8::1]:5000"),
        ] {
            let (from, to) = (from.parse().unwrap(), to.parse().unwrap());
            let request = request(from, to).unwrap();
            let mut attributes = request[HEADER + 4..].to_vec();
            // The same tuple, said to be the original one.
            attributes[2] = TUPLE_ORIGINAL as u8;
            push_attribute(&mut attributes, MARK, &0x8100_0000_u32.to_be_bytes());
            let expected = Entry {
                source: from,
                destination: to,
                mark: 0x8100_0000,
            };
            assert_eq!(entry(&attributes), Some(expected));
        }
        let v4 = "127.0.0.1:1".parse().unwrap();
        assert_eq!(request(v4, "[::1]:1".parse().unwrap()), None);
    }

    proptest! {
        #[test]
        fn no_answer_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = entry(&bytes);
        }
    }
}
