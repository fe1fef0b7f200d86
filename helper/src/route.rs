//! Policy routing: packets with the divert bit are looked up in a table whose only route delivers them to this
//! machine, so that they come in again over lo.
//!
//! ```text
//! ip rule add priority 800 fwmark 0x80000000/0x80000000 lookup 25447 protocol 199
//! ip route add local default dev lo table 25447 proto 199
//! ```
//!
//! The rule is recognised by its priority and the route by its table; both carry a protocol number
//! of our own. Adding what is there already changes nothing, so that a helper that starts after a
//! crash simply adopts them.

use std::fmt;
use std::io;
use std::net::IpAddr;

use netlink_packet_core::{Emitable, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;
use rustix::io::Errno;

use crate::mark::MarkRange;
use crate::netlink::{self, MESSAGE, Messages};

/// Types of requests (linux/rtnetlink.h). `RouteNetlinkMessage` knows these, and so much besides that the helper would
/// be larger by a sixth.
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_NEWRULE: u16 = 32;
const RTM_DELRULE: u16 = 33;

/// Our routing protocol number: one that /etc/iproute2/rt_protos gives to nobody.
const PROTOCOL: u8 = 199;

/// The index of lo, the same in every network namespace: `LOOPBACK_IFINDEX` (net/flow.h).
pub(crate) const LOOPBACK_INDEX: u32 = 1;

/// The table number when it does not fit the message's byte: `RT_TABLE_UNSPEC` (linux/rtnetlink.h).
const TABLE_UNSPEC: u8 = 0;

/// An address family that can be diverted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
}

impl Family {
    /// The family of an address.
    pub(crate) fn of(address: &IpAddr) -> Self {
        if address.is_ipv4() {
            Self::Ipv4
        } else {
            Self::Ipv6
        }
    }

    fn address_family(self) -> AddressFamily {
        match self {
            Self::Ipv4 => AddressFamily::Inet,
            Self::Ipv6 => AddressFamily::Inet6,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ipv4 => "IPv4",
            Self::Ipv6 => "IPv6",
        })
    }
}

/// Why policy routing can't be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no netlink socket.
    #[error("can't open a netlink socket to the routing tables")]
    Socket(#[source] io::Error),
    /// The kernel refuses the rule or the route.
    #[error("the kernel refuses the {family} {what}")]
    Refused {
        /// For which family.
        family: Family,
        /// `rule` or `route`.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// What was found where a family's rule and route belong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ensured {
    /// The kernel does not have the family at all (`ipv6.disable=1`), or lo does not have it now
    /// (`net.ipv6.conf.lo.disable_ipv6`): then nothing that is diverted could come in, until an address of the family
    /// appears on lo.
    NoFamily,
    /// There was something in both places. What is there now is ours.
    AsItWas,
    /// One of them was not, and is now.
    Restored,
}

/// The rules and routes for diverted packets.
pub struct Routing {
    socket: Socket,
    marks: MarkRange,
    table: u32,
    priority: u32,
}

impl Routing {
    /// Opens a socket to the kernel's routing tables; changes nothing yet.
    ///
    /// # Errors
    /// As socket(2).
    pub fn open(marks: MarkRange, table: u32, priority: u32) -> Result<Self, Error> {
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(Error::Socket)?;
        socket.bind_auto().map_err(Error::Socket)?;
        socket.set_cap_ack(true).map_err(Error::Socket)?;
        Ok(Self {
            socket,
            marks,
            table,
            priority,
        })
    }

    /// Sees to it that the family's route and rule are there.
    ///
    /// # Errors
    /// If the kernel refuses for another reason.
    pub fn ensure(&self, family: Family) -> Result<Ensured, Error> {
        let (create, replace) = (NLM_F_CREATE | NLM_F_EXCL, NLM_F_CREATE | NLM_F_REPLACE);
        let route = self.route(family);
        let mut ensured = Ensured::Restored;
        let mut result = self.request(RTM_NEWROUTE, &route, create);
        if already_there(&result) {
            ensured = Ensured::AsItWas;
            // Whatever is there becomes ours.
            result = self.request(RTM_NEWROUTE, &route, replace);
        }
        match result {
            Err(error) if not_supported(&error) || not_on_lo(family, &error) => {
                return Ok(Ensured::NoFamily);
            }
            result => result.map_err(refused(family, "route"))?,
        }
        match self.request(RTM_NEWRULE, &self.rule(family), create) {
            Err(error) if not_supported(&error) => Ok(Ensured::NoFamily),
            result if already_there(&result) => Ok(ensured),
            result => result
                .map(|()| Ensured::Restored)
                .map_err(refused(family, "rule")),
        }
    }

    /// Removes the family's rule and route. What is not there is no error.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn remove(&self, family: Family) -> Result<(), Error> {
        let gone = |error: &io::Error| {
            let errno = Errno::from_io_error(error);
            not_supported(error) || matches!(errno, Some(Errno::NOENT | Errno::SRCH))
        };
        for (what, result) in [
            ("rule", self.request(RTM_DELRULE, &self.rule(family), 0)),
            ("route", self.request(RTM_DELROUTE, &self.route(family), 0)),
        ] {
            match result {
                Err(error) if gone(&error) => {}
                result => result.map_err(refused(family, what))?,
            }
        }
        Ok(())
    }

    /// `fwmark DIVERT/DIVERT lookup TABLE`
    fn rule(&self, family: Family) -> RuleMessage {
        let mut rule = RuleMessage::default();
        rule.header.family = family.address_family();
        rule.header.table = TABLE_UNSPEC;
        rule.header.action = RuleAction::ToTable;
        rule.attributes = vec![
            RuleAttribute::Priority(self.priority),
            RuleAttribute::FwMark(self.marks.divert()),
            RuleAttribute::FwMask(self.marks.divert()),
            RuleAttribute::Table(self.table),
            RuleAttribute::Protocol(RouteProtocol::Other(PROTOCOL)),
        ];
        rule
    }

    /// `local default dev lo table TABLE`
    fn route(&self, family: Family) -> RouteMessage {
        let mut route = RouteMessage::default();
        route.header.address_family = family.address_family();
        route.header.table = TABLE_UNSPEC;
        route.header.protocol = RouteProtocol::Other(PROTOCOL);
        route.header.scope = RouteScope::Host;
        route.header.kind = RouteType::Local;
        let everything = match family {
            Family::Ipv4 => RouteAddress::Inet(std::net::Ipv4Addr::UNSPECIFIED),
            Family::Ipv6 => RouteAddress::Inet6(std::net::Ipv6Addr::UNSPECIFIED),
        };
        route.attributes = vec![
            RouteAttribute::Destination(everything),
            RouteAttribute::Oif(LOOPBACK_INDEX),
            RouteAttribute::Table(self.table),
        ];
        route
    }

    /// Sends one request and reads its acknowledgement, which the kernel queues before send(2) returns.
    fn request(&self, kind: u16, message: &impl Emitable, flags: u16) -> io::Result<()> {
        let mut body = vec![0; message.buffer_len()];
        message.emit(&mut body);
        self.socket
            .send(&netlink::request(kind, NLM_F_ACK | flags, &body), 0)?;
        let mut answer = Vec::with_capacity(MESSAGE);
        netlink::receive(&self.socket, &mut answer)?;
        match Messages(&answer).find_map(|message| message.refusal()) {
            Some(refusal) => Err(refusal.errno.into()),
            None => Ok(()),
        }
    }
}

/// What is said of a rule or route that the kernel refuses.
fn refused(family: Family, what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Refused {
        family,
        what,
        source,
    }
}

/// Whether what was to be made is there already.
fn already_there(result: &io::Result<()>) -> bool {
    matches!(result, Err(error) if error.kind() == io::ErrorKind::AlreadyExists)
}

/// Whether the kernel does not have the family.
fn not_supported(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::AFNOSUPPORT | Errno::OPNOTSUPP)
    )
}

/// Whether the kernel refuses the route since IPv6 is switched off on lo, or lo's MTU is too small for it
/// (`fib6_nh_init`, net/ipv6/route.c). Without a capability it says EPERM.
fn not_on_lo(family: Family, error: &io::Error) -> bool {
    family == Family::Ipv6
        && matches!(
            Errno::from_io_error(error),
            Some(Errno::ACCESS | Errno::NODEV)
        )
}
