//! Netlink messages as bytes: what the kernel is asked, what it answers and what it announces. Parsing ends at the
//! first byte that makes no sense, and never panics.

use std::io;

use netlink_packet_core::{
    NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR,
    NlaBuffer, NlasIterator,
};
use netlink_sys::Socket;
use rustix::io::Errno;

/// The length of a message's header (struct nlmsghdr, linux/netlink.h).
pub(crate) const HEADER: usize = 16;

/// `NLMSGERR_ATTR_MSG` (linux/netlink.h): a text that explains an error.
const NLMSGERR_ATTR_MSG: u16 = 1;

/// `MSG_DONTWAIT` (linux/socket.h).
const DONT_WAIT: i32 = 0x40;

/// Room for the largest message that the kernel sends: a page of a dump.
pub(crate) const MESSAGE: usize = 64 * 1024;

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

/// A request of this type, with `body` after its header.
pub(crate) fn request(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let length = HEADER + body.len();
    let mut request = Vec::with_capacity(length);
    request.extend_from_slice(&(length as u32).to_ne_bytes());
    request.extend_from_slice(&kind.to_ne_bytes());
    request.extend_from_slice(&(NLM_F_REQUEST | flags).to_ne_bytes());
    // No sequence number, and no port: the kernel's.
    request.extend_from_slice(&[0; 8]);
    request.extend_from_slice(body);
    request
}

/// A request of this type to a subsystem of netfilter (linux/netfilter/nfnetlink.h).
pub(crate) fn netfilter_request(
    subsystem: u16,
    kind: u16,
    flags: u16,
    family: u8,
    attributes: &[u8],
) -> Vec<u8> {
    // struct nfgenmsg: family, version 0, resource 0
    let body = [&[family, 0, 0, 0], attributes].concat();
    request((subsystem << 8) | kind, flags, &body)
}

/// Adds an attribute (struct nlattr, linux/netlink.h) to a request's body or to the value of a nested attribute.
pub(crate) fn push_attribute(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    bytes.extend_from_slice(&((4 + value.len()) as u16).to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// Reads what is queued for one recvmsg(2) into `buffer`, in place of what is there. Does not wait: that there is
/// nothing is the error [`io::ErrorKind::WouldBlock`].
pub(crate) fn receive(socket: &Socket, buffer: &mut Vec<u8>) -> io::Result<usize> {
    loop {
        buffer.clear();
        match socket.recv(buffer, DONT_WAIT) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            received => return received,
        }
    }
}

/// One netlink message.
pub(crate) struct Message<'a> {
    /// Its type.
    pub(crate) kind: u16,
    /// What follows the header.
    pub(crate) payload: &'a [u8],
    flags: u16,
}

impl<'a> Message<'a> {
    /// The subsystem, the family and the attributes, if it may be a message of netfilter's: these stand in its type and
    /// after struct nfgenmsg.
    pub(crate) fn netfilter(&self) -> Option<(u16, u8, &'a [u8])> {
        let ([family, ..], attributes) = self.payload.split_first_chunk::<4>()?;
        Some((self.kind >> 8, *family, attributes))
    }

    /// Whether this is part of a dump that others changed while it was made.
    pub(crate) fn is_interrupted(&self) -> bool {
        self.kind != NLMSG_ERROR && self.flags & NLM_F_DUMP_INTR != 0
    }

    /// The error that this message reports, if it is one. That of a dump which has begun already is in its last message
    /// (`netlink_dump_done`, net/netlink/af_netlink.c).
    pub(crate) fn refusal(&self) -> Option<Refusal> {
        if !matches!(self.kind, NLMSG_ERROR | NLMSG_DONE) {
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
pub(crate) struct Messages<'a>(pub(crate) &'a [u8]);

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
            payload,
            flags,
        })
    }
}

/// All attributes of a message or of a nested attribute; ends at the first that makes no sense.
pub(crate) fn attributes(bytes: &[u8]) -> impl Iterator<Item = NlaBuffer<&[u8]>> {
    NlasIterator::new(bytes).map_while(Result::ok)
}

/// The values of all attributes.
pub(crate) fn values(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    attributes(bytes).filter_map(value)
}

/// The value of the first attribute of this kind.
pub(crate) fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|a| a.kind() == kind).and_then(value)
}

/// The value of an attribute, which borrows from the buffer and not from the attribute.
fn value(attribute: NlaBuffer<&[u8]>) -> Option<&[u8]> {
    let length = attribute.value_length();
    attribute.into_inner().get(4..4 + length)
}

/// A NUL-terminated string attribute.
pub(crate) fn string(value: &[u8]) -> String {
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

    #[test]
    fn a_dump_that_fails_on_the_way_says_so_at_its_end() {
        let end = |error: i32| {
            let payload = error.to_ne_bytes();
            let message = Message {
                kind: NLMSG_DONE,
                payload: &payload,
                flags: 0,
            };
            message.refusal().map(|refusal| refusal.errno)
        };
        assert_eq!(end(0), None);
        assert_eq!(end(-12), Some(Errno::NOMEM));
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
            let _ = Message { kind: NLMSG_ERROR, payload: &payload, flags }.refusal();
        }
    }
}
