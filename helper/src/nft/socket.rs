//! The netlink socket to nf_tables: transactions with the errors in them, and dumps.
//!
//! The kernel carries a batch out within sendmsg(2) and queues every answer before that returns
//! (nfnetlink_rcv_batch, net/netfilter/nfnetlink.c), so answers are read without waiting. It is asked for errors alone:
//! acknowledgements of all that is in a large batch would not fit into any buffer, and one that is lost leaves it open
//! what has become of the batch.

use std::cell::Cell;
use std::io;
use std::ops::ControlFlow;

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLMSG_DONE};
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_NETFILTER;
use nftnl::FinalizedBatch;
use nftnl::nftnl_sys::libc;
use rustix::io::Errno;
use rustix::net::sockopt::{
    set_socket_recv_buffer_size, set_socket_recv_buffer_size_force, set_socket_send_buffer_size,
    set_socket_send_buffer_size_force,
};

use crate::netlink::{self, HEADER, MESSAGE, Message, Messages, Refusal};

/// Room for the largest batch of one user: a policy with all the control groups that a quota allows. A larger one, as
/// that of all users at once, has room made for it.
const SEND_BUFFER: usize = 16 * 1024 * 1024;

/// Room for the errors of a batch, of which the first one says enough: each takes about 1 KiB of this accounting.
const RECEIVE_BUFFER: usize = 4 * 1024 * 1024;

/// `NFNL_SUBSYS_NFTABLES` (linux/netfilter/nfnetlink.h), the upper byte of a message's type.
const SUBSYSTEM: u16 = 10;

/// `NFPROTO_UNSPEC` and `NFPROTO_INET` (linux/netfilter.h).
const UNSPECIFIED: u8 = 0;
const INET: u8 = 1;

/// What can be dumped (enum nf_tables_msg_types).
#[derive(Debug, Clone, Copy)]
pub(super) enum Dump {
    /// All chains of the `inet` family.
    Chains,
    /// The elements of the set that the attributes name.
    Elements,
    /// The rules of the table that the attributes name, or all of all families.
    Rules,
}

/// Why a batch can't be said to have been carried out.
#[derive(Debug)]
pub(super) enum Failure {
    /// The kernel has done nothing of it.
    Refused(Refusal),
    /// An answer was lost: the kernel has done all of it or nothing.
    Unknown(Refusal),
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Refused(refusal) | Failure::Unknown(refusal) => refusal,
        }
    }
}

/// A socket to nf_tables. A table with the flag `owner` belongs to the socket that made it.
pub(super) struct NetfilterSocket {
    socket: Socket,
    port: u32,
    /// The largest batch that there is room for.
    room: Cell<usize>,
}

impl NetfilterSocket {
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        let port = socket.bind_auto()?.port_number();
        // Errors need not carry the refused message back, but may say more than a number.
        socket.set_cap_ack(true)?;
        socket.set_ext_ack(true)?;
        send_buffer(&socket, SEND_BUFFER)?;
        receive_buffer(&socket, RECEIVE_BUFFER)?;
        let room = Cell::new(SEND_BUFFER);
        Ok(Self { socket, port, room })
    }

    /// The socket's netlink port, by which the kernel tells it from others.
    pub(super) fn port(&self) -> u32 {
        self.port
    }

    /// Sends a batch whose caller does not ask whether a failure left it undone or unknown.
    pub(super) fn transact(&self, batch: &FinalizedBatch) -> Result<(), Refusal> {
        Ok(self.carry_out(batch)?)
    }

    /// Sends a batch, which the kernel takes whole or not at all.
    pub(super) fn carry_out(&self, batch: &FinalizedBatch) -> Result<(), Failure> {
        // One sendmsg(2) for all pages: the kernel looks for the end of a batch in the same datagram.
        let mut bytes = batch.iter().collect::<Vec<_>>().concat();
        ask_for_errors_alone(&mut bytes);
        self.make_room(bytes.len())
            .map_err(|error| Failure::Refused(error.into()))?;
        self.socket
            .send(&bytes, 0)
            .map_err(|error| Failure::Refused(error.into()))?;
        let mut refused = None;
        let received = self.receive(|message| {
            if let Some(refusal) = message.refusal() {
                refused.get_or_insert(refusal);
            }
            false
        });
        match (refused, received) {
            (Some(refusal), _) => Err(Failure::Refused(refusal)),
            (None, Err(lost)) => Err(Failure::Unknown(lost)),
            (None, Ok(())) => Ok(()),
        }
    }

    /// Makes the socket's buffer as large as the batch, which is one datagram (netlink_sendmsg,
    /// net/netlink/af_netlink.c).
    fn make_room(&self, length: usize) -> io::Result<()> {
        if length > self.room.get() {
            send_buffer(&self.socket, length)?;
            self.room.set(length);
        }
        Ok(())
    }

    /// Asks for a dump; returns the attributes of each object.
    pub(super) fn dump(&self, what: Dump, attributes: &[u8]) -> Result<Vec<Vec<u8>>, Refusal> {
        let mut objects = Vec::new();
        self.dump_each(what, attributes, |_, object| {
            objects.push(object.to_vec());
            ControlFlow::Continue(())
        })?;
        Ok(objects)
    }

    /// Asks for a dump; hands the family and the attributes of each object to `each` until that breaks off. After
    /// that the socket is of no more use: the rest of the dump is still to come.
    pub(super) fn dump_each(
        &self,
        what: Dump,
        attributes: &[u8],
        mut each: impl FnMut(u8, &[u8]) -> ControlFlow<()>,
    ) -> Result<(), Refusal> {
        let (kind, family) = match what {
            Dump::Chains => (libc::NFT_MSG_GETCHAIN, INET),
            Dump::Elements => (libc::NFT_MSG_GETSETELEM, INET),
            Dump::Rules => (libc::NFT_MSG_GETRULE, UNSPECIFIED),
        };
        let request =
            netlink::netfilter_request(SUBSYSTEM, kind as u16, NLM_F_DUMP, family, attributes);
        self.socket.send(&request, 0)?;
        let mut refused = None;
        self.receive(|message| {
            if let Some(refusal) = message.refusal() {
                refused.get_or_insert(refusal);
            } else if message.is_interrupted() {
                refused.get_or_insert(Refusal::from(io::Error::from(io::ErrorKind::Interrupted)));
            } else if let Some((SUBSYSTEM, family, object)) = message.netfilter() {
                return each(family, object).is_break();
            }
            message.kind == NLMSG_DONE
        })?;
        refused.map_or(Ok(()), Err)
    }

    /// Hands every message that is queued to `each`, until there is none or it returns true.
    fn receive(&self, mut each: impl FnMut(&Message<'_>) -> bool) -> Result<(), Refusal> {
        let mut buffer: Vec<u8> = Vec::with_capacity(MESSAGE);
        let mut lost = None;
        loop {
            match netlink::receive(&self.socket, &mut buffer) {
                Ok(0) => break,
                Ok(_) => {
                    for message in Messages(&buffer) {
                        if each(&message) {
                            return lost.map_or(Ok(()), Err);
                        }
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // Answers were lost (ENOBUFS): whether the batch was taken is not known. Read what
                // is left, so that the next call does not, and report it.
                Err(error) if lost.is_none() => lost = Some(Refusal::from(error)),
                Err(error) => return Err(error.into()),
            }
        }
        lost.map_or(Ok(()), Err)
    }
}

/// Makes room for what is sent. Beyond what the machine allows everybody (net.core.wmem_max) takes a capability in the
/// first user namespace, which a container does not have; it has the room that there is.
fn send_buffer(socket: &Socket, length: usize) -> Result<(), Errno> {
    match set_socket_send_buffer_size_force(socket, length) {
        Err(Errno::PERM) => set_socket_send_buffer_size(socket, length),
        set => set,
    }
}

/// Makes room for what is received (net.core.rmem_max).
fn receive_buffer(socket: &Socket, length: usize) -> Result<(), Errno> {
    match set_socket_recv_buffer_size_force(socket, length) {
        Err(Errno::PERM) => set_socket_recv_buffer_size(socket, length),
        set => set,
    }
}

/// Clears the flag for an acknowledgement (`NLM_F_ACK`) in all messages: the crate sets it in those about chains and
/// rules.
fn ask_for_errors_alone(mut batch: &mut [u8]) {
    while let Some(&[a, b, c, d, _, _, flags @ ..]) = batch.first_chunk::<8>() {
        let flags = u16::from_ne_bytes(flags) & !NLM_F_ACK;
        let length = (u32::from_ne_bytes([a, b, c, d]) as usize).next_multiple_of(4);
        if let Some(place) = batch.get_mut(6..8) {
            place.copy_from_slice(&flags.to_ne_bytes());
        }
        batch = match batch.get_mut(length.max(HEADER)..) {
            Some(next) => next,
            None => return,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::sockopt::socket_send_buffer_size;

    /// Makes as much room as this process may have.
    #[test]
    #[cfg_attr(miri, ignore = "needs a netlink socket")]
    fn room_is_made_for_a_batch_of_any_size() {
        let socket = NetfilterSocket::open().unwrap();
        let room = || socket_send_buffer_size(&socket.socket).unwrap();
        let before = room();
        socket.make_room(SEND_BUFFER).unwrap();
        assert_eq!(room(), before);
        let length = 100 * 1024 * 1024;
        socket.make_room(length).unwrap();
        let other = Socket::new(NETLINK_NETFILTER).unwrap();
        let may = set_socket_send_buffer_size_force(&other, length).is_ok();
        assert!(room() >= length || !may);
    }

    #[test]
    fn no_message_asks_for_more_than_errors() {
        let message = |length: u32, flags: u16| {
            let mut bytes = [
                &length.to_ne_bytes()[..],
                &[7, 0],
                &flags.to_ne_bytes(),
                &[9; 8],
            ]
            .concat();
            bytes.resize((length as usize).next_multiple_of(4), 5);
            bytes
        };
        let mut batch = [message(16, 0x1), message(21, 0x405), message(20, 0xffff)].concat();
        ask_for_errors_alone(&mut batch);
        let meant = [message(16, 0x1), message(21, 0x401), message(20, 0xfffb)].concat();
        assert_eq!(batch, meant);
        // A batch that is cut off, or none at all.
        for length in 0..meant.len() {
            ask_for_errors_alone(&mut batch[..length]);
            ask_for_errors_alone(&mut vec![0xff; length]);
            ask_for_errors_alone(&mut vec![0; length]);
        }
        assert_eq!(batch, meant);
    }
}
