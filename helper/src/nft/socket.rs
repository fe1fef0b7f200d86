//! The netlink socket to nf_tables: transactions with their acknowledgements, and dumps.
//!
//! The kernel carries a batch out within sendmsg(2) and queues every answer before that returns
//! (nfnetlink_rcv_batch, net/netfilter/nfnetlink.c), so answers are read without waiting.

use std::io;

use netlink_packet_core::{NlaBuffer, NlasIterator};
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_NETFILTER;
use nftnl::FinalizedBatch;
use rustix::io::Errno;
use rustix::net::sockopt::{set_socket_recv_buffer_size_force, set_socket_send_buffer_size_force};

/// Room for the largest batch: a policy with all the control groups that a quota allows.
const SEND_BUFFER: usize = 16 * 1024 * 1024;

/// Room for the acknowledgements of a batch: each takes about 1 KiB of this accounting.
const RECEIVE_BUFFER: usize = 4 * 1024 * 1024;

/// The largest message that the kernel sends: a page of a dump.
const MESSAGE: usize = 64 * 1024;

/// `MSG_DONTWAIT` (linux/socket.h).
const DONT_WAIT: i32 = 0x40;

/// Types and flags of netlink messages (linux/netlink.h).
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_ACK_TLVS: u16 = 0x200;
const NLMSGERR_ATTR_MSG: u16 = 1;
const HEADER: usize = 16;

/// `NFNL_SUBSYS_NFTABLES` (linux/netfilter/nfnetlink.h), the upper byte of a message's type.
const SUBSYSTEM: u16 = 10;

/// `NFPROTO_INET` (linux/netfilter.h).
const INET: u8 = 1;

/// What can be dumped (enum nf_tables_msg_types).
#[derive(Debug, Clone, Copy)]
pub(super) enum Dump {
    /// All chains of the `inet` family.
    Chains,
    /// The elements of the set that the attributes name.
    Elements,
}

/// Why the kernel did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[error("{}{}", io::Error::from(*errno), text.as_deref().map(|t| format!(": {t}")).unwrap_or_default())]
pub struct Refusal {
    /// The error number of the first message that was refused.
    pub errno: Errno,
    /// What the kernel added to it (extended acknowledgement).
    pub text: Option<String>,
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self {
            errno: Errno::from_io_error(&error).unwrap_or(Errno::IO),
            text: None,
        }
    }
}

/// A socket to nf_tables. A table with the flag `owner` belongs to the socket that made it.
pub(super) struct NetfilterSocket(Socket);

impl NetfilterSocket {
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        // Errors need not carry the refused message back, but may say more than a number.
        socket.set_cap_ack(true)?;
        socket.set_ext_ack(true)?;
        set_socket_send_buffer_size_force(&socket, SEND_BUFFER)?;
        set_socket_recv_buffer_size_force(&socket, RECEIVE_BUFFER)?;
        Ok(Self(socket))
    }

    /// Sends a batch, which the kernel takes whole or not at all.
    pub(super) fn transact(&self, batch: &FinalizedBatch) -> Result<(), Refusal> {
        // One sendmsg(2) for all pages: the kernel looks for the end of a batch in the same datagram.
        let bytes: Vec<u8> = batch.iter().flatten().copied().collect();
        self.0.send(&bytes, 0)?;
        let mut refused = None;
        self.receive(|message| {
            if let Some(refusal) = message.refusal() {
                refused.get_or_insert(refusal);
            }
            false
        })?;
        refused.map_or(Ok(()), Err)
    }

    /// Asks for a dump; returns the attributes of each object.
    pub(super) fn dump(&self, what: Dump, attributes: &[u8]) -> Result<Vec<Vec<u8>>, Refusal> {
        let kind: u16 = match what {
            Dump::Chains => 4,
            Dump::Elements => 13,
        };
        let length = (HEADER + 4 + attributes.len()) as u32;
        let mut request = Vec::with_capacity(length as usize);
        request.extend_from_slice(&length.to_ne_bytes());
        request.extend_from_slice(&((SUBSYSTEM << 8) | kind).to_ne_bytes());
        request.extend_from_slice(&(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
        request.extend_from_slice(&[0; 8]);
        // struct nfgenmsg: family, version 0, resource 0
        request.extend_from_slice(&[INET, 0, 0, 0]);
        request.extend_from_slice(attributes);
        self.0.send(&request, 0)?;
        let mut objects = Vec::new();
        let mut refused = None;
        self.receive(|message| {
            if let Some(refusal) = message.refusal() {
                refused.get_or_insert(refusal);
            } else if message.kind >> 8 == SUBSYSTEM {
                objects.push(message.payload.get(4..).unwrap_or_default().to_vec());
            }
            message.kind == NLMSG_DONE
        })?;
        refused.map_or(Ok(objects), Err)
    }

    /// Hands every message that is queued to `each`, until there is none or it returns true.
    fn receive(&self, mut each: impl FnMut(&Message<'_>) -> bool) -> Result<(), Refusal> {
        let mut buffer: Vec<u8> = Vec::with_capacity(MESSAGE);
        let mut lost = None;
        loop {
            buffer.clear();
            match self.0.recv(&mut buffer, DONT_WAIT) {
                Ok(0) => break,
                Ok(_) => {
                    for message in Messages(&buffer) {
                        if each(&message) {
                            return lost.map_or(Ok(()), Err);
                        }
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Answers were lost (ENOBUFS): whether the batch was taken is not known. Read what
                // is left, so that the next call does not, and report it.
                Err(error) if lost.is_none() => lost = Some(Refusal::from(error)),
                Err(error) => return Err(error.into()),
            }
        }
        lost.map_or(Ok(()), Err)
    }
}

/// One netlink message.
pub(crate) struct Message<'a> {
    kind: u16,
    flags: u16,
    payload: &'a [u8],
}

impl Message<'_> {
    /// The error that this message reports, if it is one.
    fn refusal(&self) -> Option<Refusal> {
        if self.kind != NLMSG_ERROR {
            return None;
        }
        let error = i32::from_ne_bytes(self.payload.first_chunk().copied()?);
        if error == 0 {
            return None;
        }
        // Error numbers end at MAX_ERRNO (linux/err.h).
        let errno = match error {
            -4095..0 => Errno::from_raw_os_error(-error),
            _ => Errno::IO,
        };
        let mut text = None;
        if self.flags & NLM_F_ACK_TLVS != 0 && self.flags & NLM_F_CAPPED != 0 {
            let attributes = self.payload.get(4 + HEADER..).unwrap_or_default();
            text = attribute(attributes, NLMSGERR_ATTR_MSG).map(string);
        }
        Some(Refusal { errno, text })
    }
}

/// Splits what one recvmsg(2) returned into messages; ends at the first that makes no sense.
struct Messages<'a>(&'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Message<'a>> {
        let length = u32::from_ne_bytes(self.0.first_chunk().copied()?) as usize;
        let message = self.0.get(..length)?;
        let kind = u16::from_ne_bytes(message.get(4..6)?.try_into().ok()?);
        let flags = u16::from_ne_bytes(message.get(6..8)?.try_into().ok()?);
        let payload = message.get(HEADER..)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Message {
            kind,
            flags,
            payload,
        })
    }
}

/// All attributes of a message or of a nested attribute; ends at the first that makes no sense.
pub(super) fn attributes(bytes: &[u8]) -> impl Iterator<Item = NlaBuffer<&[u8]>> {
    NlasIterator::new(bytes).map_while(Result::ok)
}

/// The value of the first attribute of this kind.
pub(super) fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    let found = attributes(bytes).find(|a| a.kind() == kind)?;
    let length = found.value_length();
    // The value borrows from the buffer, not from `found`.
    found.into_inner().get(4..4 + length)
}

/// A NUL-terminated string attribute.
pub(super) fn string(value: &[u8]) -> String {
    let value = value.split(|&b| b == 0).next().unwrap_or_default();
    String::from_utf8_lossy(value).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_an_extended_acknowledgement() {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&48u32.to_ne_bytes());
        bytes.extend_from_slice(&NLMSG_ERROR.to_ne_bytes());
        bytes.extend_from_slice(&(NLM_F_CAPPED | NLM_F_ACK_TLVS).to_ne_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(&(-16i32).to_ne_bytes());
        bytes.extend_from_slice(&[0; 16]);
        bytes.extend_from_slice(&8u16.to_ne_bytes());
        bytes.extend_from_slice(&NLMSGERR_ATTR_MSG.to_ne_bytes());
        bytes.extend_from_slice(b"no!\0");
        bytes.extend_from_slice(&[0; 4]);
        let refusal = Messages(&bytes).next().unwrap().refusal().unwrap();
        assert_eq!(
            (refusal.errno, refusal.text.as_deref()),
            (Errno::BUSY, Some("no!"))
        );
    }

    proptest! {
        #[test]
        fn no_answer_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            for message in Messages(&bytes) {
                let _ = message.refusal();
            }
            for found in attributes(&bytes) {
                let _ = (found.kind(), found.value());
            }
            let _ = attribute(&bytes, 1).map(string);
        }

        #[test]
        fn no_error_message_panics(
            error: i32, flags: u16, rest in proptest::collection::vec(any::<u8>(), 0..64)
        ) {
            let mut payload = error.to_ne_bytes().to_vec();
            payload.extend(rest);
            let _ = Message { kind: NLMSG_ERROR, flags, payload: &payload }.refusal();
        }
    }
}
