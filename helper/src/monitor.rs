//! Notices at once when somebody else takes away what the helper put into the kernel: another program's firewall
//! reload, `nft flush ruleset`, `ip rule flush`, a network manager that removes foreign rules, lo down and up.

use std::io;

use netlink_sys::Socket;
use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use socket2::{SockFilter, SockRef};
use tokio::io::unix::AsyncFd;

use crate::netlink::{self, MESSAGE, Message, Messages, attribute, string};
use crate::nft::{TABLE, TablePort};
use crate::route::LOOPBACK_INDEX;
use crate::sys::watch_netlink;

/// Groups of rtnetlink(7): RTNLGRP_LINK, RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV4_RULE, RTNLGRP_IPV6_IFADDR,
/// RTNLGRP_IPV6_ROUTE and RTNLGRP_IPV6_RULE (linux/rtnetlink.h).
const ROUTE_GROUPS: [u32; 6] = [1, 7, 8, 9, 11, 19];

/// NFNLGRP_NFTABLES (linux/netfilter/nfnetlink.h).
const NFTABLES_GROUP: u32 = 7;

/// Types of messages (linux/rtnetlink.h).
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_DELROUTE: u16 = 25;
const RTM_DELRULE: u16 = 33;

/// RTA_TABLE and FRA_TABLE (linux/rtnetlink.h, linux/fib_rules.h), both after a header of 12 bytes.
const TABLE_NUMBER: u16 = 15;
const ROUTE_HEADER: usize = 12;

/// struct ifinfomsg (linux/rtnetlink.h): the interface's index and flags.
const LINK_INDEX: std::ops::Range<usize> = 4..8;
const LINK_FLAGS: std::ops::Range<usize> = 8..12;

/// struct ifaddrmsg (linux/if_addr.h): the interface's index.
const ADDRESS_LINK: std::ops::Range<usize> = 4..8;

/// IFF_UP (linux/if.h).
const UP: u32 = 1;

/// Where a message has the port of the socket whose request it is about (struct nlmsghdr, linux/netlink.h).
const PORT_OFFSET: u32 = 12;

/// Instructions of a classic BPF filter (linux/bpf_common.h, linux/filter.h): load a word of the packet, jump if it
/// equals the operand, take as many bytes of the packet as the operand says.
const LOAD_WORD: u16 = 0x20;
const JUMP_IF_EQUAL: u16 = 0x15;
const TAKE: u16 = 0x06;

/// The name of the table that a message is about: the first attribute of each kind of object.
const TABLE_NAME: u16 = 1;

/// What somebody else changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Loss {
    /// A rule or route of ours may be gone.
    Routing,
    /// Our nftables table is gone, or not as we made it.
    Table,
    /// What others changed in nftables was not heard: it may have been our table.
    Unheard,
}

/// Listens to the kernel's announcements.
pub struct Monitor {
    routing: AsyncFd<Socket>,
    /// None where the kernel protects the table by itself.
    table: Option<AsyncFd<Socket>>,
    table_number: u32,
}

impl Monitor {
    /// Listens for losses of the rules and routes of this routing table, and of the nftables table
    /// unless the kernel protects it. Changes by our own socket are no loss. To be called within a
    /// runtime.
    ///
    /// # Errors
    /// As socket(2).
    pub fn open(table_number: u32, ours: TablePort, watch_table: bool) -> io::Result<Self> {
        let routing = listen(NETLINK_ROUTE, &ROUTE_GROUPS, None)?;
        let table = match watch_table {
            true => Some(listen(NETLINK_NETFILTER, &[NFTABLES_GROUP], Some(ours))?),
            false => None,
        };
        Ok(Self {
            routing,
            table,
            table_number,
        })
    }

    /// What may be lost while announcements can't be heard.
    #[must_use]
    pub fn all(&self) -> Vec<Loss> {
        let table = self.table.as_ref().map(|_| Loss::Unheard);
        std::iter::once(Loss::Routing).chain(table).collect()
    }

    /// The next loss. Announcements that are there already are read first, so that a burst of them
    /// is one loss.
    ///
    /// # Errors
    /// If the kernel does not let a socket be read.
    pub async fn next(&self) -> io::Result<Loss> {
        let table = async {
            match &self.table {
                Some(socket) => announced(socket, is_about_table).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            heard = table => heard.map(|heard| match heard {
                Heard::Wanted => Loss::Table,
                Heard::TooMuch => Loss::Unheard,
            }),
            heard = announced(&self.routing, |message| self.is_about_routing(message)) => {
                heard.map(|_| Loss::Routing)
            }
        }
    }

    /// Whether a message tells of a loss of routing, or that what was lost can be put back.
    fn is_about_routing(&self, message: &Message<'_>) -> bool {
        let word = |bytes: Option<&[u8]>| {
            bytes
                .and_then(|bytes| bytes.try_into().ok())
                .map(u32::from_ne_bytes)
        };
        match message.kind {
            RTM_DELROUTE | RTM_DELRULE => {
                let attributes = message.payload.get(ROUTE_HEADER..).unwrap_or_default();
                word(attribute(attributes, TABLE_NUMBER)) == Some(self.table_number)
            }
            // With lo, IPv4 routes over it go unannounced (fib_disable_ip, net/ipv4/fib_frontend.c).
            RTM_NEWLINK => {
                word(message.payload.get(LINK_INDEX)) == Some(LOOPBACK_INDEX)
                    && word(message.payload.get(LINK_FLAGS)).is_some_and(|flags| flags & UP != 0)
            }
            // Switched off on lo, IPv6 takes its routes along; switched on again, it brings ::1 only.
            RTM_NEWADDR => word(message.payload.get(ADDRESS_LINK)) == Some(LOOPBACK_INDEX),
            _ => false,
        }
    }
}

/// Whether a message is about our nftables table.
fn is_about_table(message: &Message<'_>) -> bool {
    let name = message
        .netfilter()
        .and_then(|(_, _, attributes)| attribute(attributes, TABLE_NAME));
    name.map(string).as_deref() == TABLE.to_str().ok()
}

/// Listens to these multicast groups, but not to what our own socket changes.
fn listen(protocol: isize, groups: &[u32], ours: Option<TablePort>) -> io::Result<AsyncFd<Socket>> {
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    socket.set_non_blocking(true)?;
    if let Some(ours) = ours {
        leave_out(&socket, ours)?;
    }
    for &group in groups {
        socket.add_membership(group)?;
    }
    watch_netlink(socket)
}

/// Has the kernel filter out what this port changes, before it comes into the socket's buffer: there may be more of it
/// than there is room for, a lost message counts as a loss, and to mend that would change still more. A packet has
/// messages about one transaction (nft_commit_notify, net/netfilter/nf_tables_api.c), so that the first one tells.
fn leave_out(socket: &Socket, ours: TablePort) -> io::Result<()> {
    // A filter reads words in network byte order.
    let port = u32::from_be_bytes(ours.0.to_ne_bytes());
    let filter = [
        SockFilter::new(LOAD_WORD, 0, 0, PORT_OFFSET),
        SockFilter::new(JUMP_IF_EQUAL, 0, 1, port),
        SockFilter::new(TAKE, 0, 0, 0),
        SockFilter::new(TAKE, 0, 0, u32::MAX),
    ];
    SockRef::from(socket).attach_filter(&filter)
}

/// What was heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Heard {
    /// What is wanted.
    Wanted,
    /// Nothing that is wanted, but announcements were lost (ENOBUFS), and it may have been among them.
    TooMuch,
}

/// Waits until a message has come that is `wanted`, or may have been lost, and there are no more to read.
async fn announced(
    socket: &AsyncFd<Socket>,
    wanted: impl Fn(&Message<'_>) -> bool,
) -> io::Result<Heard> {
    let mut found = None;
    loop {
        let mut ready = socket.readable().await?;
        // While nothing comes, no buffer is kept.
        let mut buffer: Vec<u8> = Vec::with_capacity(MESSAGE);
        loop {
            match netlink::receive(socket.get_ref(), &mut buffer) {
                Ok(0) => break,
                Ok(_) => {
                    if Messages(&buffer).any(|message| wanted(&message)) {
                        found = Some(Heard::Wanted);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error)
                    if error.raw_os_error() == Some(rustix::io::Errno::NOBUFS.raw_os_error()) =>
                {
                    found = found.or(Some(Heard::TooMuch));
                }
                Err(error) => return Err(error),
            }
        }
        ready.clear_ready();
        if let Some(found) = found {
            return Ok(found);
        }
    }
}
