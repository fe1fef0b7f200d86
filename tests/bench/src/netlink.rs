//! Just enough of nf_tables' netlink for the floor and for counting: elements of a map from control groups to
//! verdicts. Numbers are those of linux/netfilter/nf_tables.h and linux/netfilter/nfnetlink.h.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, connect, recv,
    send, setsockopt, socket, sockopt,
};

const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
const SUBSYSTEM: u16 = 10;
const NEW_ELEMENTS: u16 = SUBSYSTEM << 8 | 12;
const GET_ELEMENTS: u16 = SUBSYSTEM << 8 | 13;
const DELETE_ELEMENTS: u16 = SUBSYSTEM << 8 | 14;

const REQUEST: u16 = 0x1;
const ACKNOWLEDGE: u16 = 0x4;
const DUMP: u16 = 0x300;
const CREATE: u16 = 0x400;

const INET: u8 = 1;
const NESTED: u16 = 0x8000;
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// A netlink header and a `struct nfgenmsg`.
const HEADER: usize = 20;

/// A message in the making, and where its open attributes begin.
#[derive(Default)]
struct Message {
    bytes: Vec<u8>,
    open: Vec<usize>,
}

impl Message {
    fn new(kind: u16, flags: u16, family: u8, resource: u16) -> Self {
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend((REQUEST | flags).to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend([family, 0]);
        bytes.extend(resource.to_be_bytes());
        Self {
            bytes,
            open: Vec::new(),
        }
    }

    fn begin(mut self, kind: u16) -> Self {
        self.open.push(self.bytes.len());
        self.bytes.extend([0; 2]);
        self.bytes.extend(kind.to_ne_bytes());
        self
    }

    fn end(mut self) -> Self {
        let start = self.open.pop().expect("an attribute was begun");
        let length = u16::try_from(self.bytes.len() - start).expect("a short attribute");
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }

    fn attribute(self, kind: u16, value: &[u8]) -> Self {
        let mut this = self.begin(kind);
        this.bytes.extend(value);
        this.end()
    }

    fn finish(mut self) -> Vec<u8> {
        let length = u32::try_from(self.bytes.len()).expect("a short message");
        self.bytes[..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes
    }
}

/// A change of one element that is there before it is needed: only the key is put in.
struct Template {
    bytes: Vec<u8>,
    key: usize,
}

impl Template {
    fn new(kind: u16, table: &str, map: &str) -> Self {
        let nul = |name: &str| [name.as_bytes(), &[0]].concat();
        let mut message = Message::new(kind, CREATE, INET, 0)
            .attribute(1, &nul(table))
            .attribute(2, &nul(map))
            .begin(3 | NESTED)
            .begin(1 | NESTED)
            .begin(1 | NESTED)
            .attribute(1, &[0; 8])
            .end();
        let key = message.bytes.len() - 8;
        if kind == NEW_ELEMENTS {
            // drop, which is 0: what needs no chain is the least that can be said.
            message = message
                .begin(2 | NESTED)
                .begin(2 | NESTED)
                .attribute(1, &0_u32.to_be_bytes())
                .end()
                .end();
        }
        Self {
            bytes: message.end().end().finish(),
            key,
        }
    }
}

/// Adds and deletes elements `ID : drop`, as quickly as nf_tables can be told.
pub(crate) struct Writer {
    socket: OwnedFd,
    add: Template,
    delete: Template,
    begin: Vec<u8>,
    end: Vec<u8>,
    batch: Vec<u8>,
}

impl Writer {
    /// Writes to a map of a table of the inet family.
    pub(crate) fn new(table: &str, map: &str) -> io::Result<Self> {
        Ok(Self {
            socket: open()?,
            add: Template::new(NEW_ELEMENTS, table, map),
            delete: Template::new(DELETE_ELEMENTS, table, map),
            begin: Message::new(BATCH_BEGIN, 0, 0, SUBSYSTEM).finish(),
            end: Message::new(BATCH_END, 0, 0, SUBSYSTEM).finish(),
            batch: Vec::new(),
        })
    }

    /// One transaction: these come and those go. Returns when it is in force.
    pub(crate) fn change(&mut self, add: &[u64], delete: &[u64]) -> io::Result<()> {
        self.batch.clear();
        self.batch.extend(&self.begin);
        for (template, ids) in [(&self.delete, delete), (&self.add, add)] {
            for id in ids {
                let start = self.batch.len();
                self.batch.extend(&template.bytes);
                let key = start + template.key;
                self.batch[key..key + 8].copy_from_slice(&id.to_ne_bytes());
            }
        }
        // One acknowledgement, by the last message: flags are at the sixth byte.
        let last = if add.is_empty() {
            &self.delete
        } else {
            &self.add
        };
        let flags = self.batch.len() - last.bytes.len() + 6;
        self.batch[flags] |= ACKNOWLEDGE as u8;
        self.batch.extend(&self.end);
        send(self.socket.as_raw_fd(), &self.batch, MsgFlags::empty())?;
        let mut answer = [0; 4096];
        let length = recv(self.socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        match i32::from_ne_bytes(answer[16..20].try_into().expect("four bytes")) {
            _ if length < 20 => Err(io::ErrorKind::UnexpectedEof.into()),
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(-error)),
        }
    }
}

/// Counts the elements of a map.
pub(crate) struct Counter {
    socket: OwnedFd,
    request: Vec<u8>,
}

impl Counter {
    /// Counts in a map of a table of the inet family.
    pub(crate) fn new(table: &str, map: &str) -> io::Result<Self> {
        let nul = |name: &str| [name.as_bytes(), &[0]].concat();
        Ok(Self {
            socket: open()?,
            request: Message::new(GET_ELEMENTS, DUMP, INET, 0)
                .attribute(1, &nul(table))
                .attribute(2, &nul(map))
                .finish(),
        })
    }

    /// How many there are now. A map that grows while it is listed has some listed twice (rhashtable_walk_start(),
    /// lib/rhashtable.c), so that what counts is how many different ones there are.
    pub(crate) fn count(&self) -> io::Result<usize> {
        send(self.socket.as_raw_fd(), &self.request, MsgFlags::empty())?;
        let mut buffer = vec![0; 1 << 16];
        let mut keys = HashSet::new();
        loop {
            let length = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            let mut rest = &buffer[..length];
            while rest.len() >= 16 {
                let word =
                    |at: usize| u32::from_ne_bytes(rest[at..at + 4].try_into().expect("four"));
                let (length, kind) = (word(0) as usize, word(4) as u16);
                match kind {
                    DONE => return Ok(keys.len()),
                    ERROR => {
                        let error = word(16).cast_signed();
                        return Err(io::Error::from_raw_os_error(-error));
                    }
                    _ => keys.extend(elements(&rest[HEADER..length])),
                }
                rest = &rest[length.next_multiple_of(4).min(rest.len())..];
            }
        }
    }
}

/// The keys of the elements that a message lists: ids of control groups.
fn elements(attributes: &[u8]) -> impl Iterator<Item = u64> {
    let lists = each(attributes).filter(|(kind, _)| *kind == 3);
    let elements = lists.flat_map(|(_, list)| each(list));
    elements.map(|(_, element)| {
        let within = |value, wanted| each(value).find(|(kind, _)| *kind == wanted);
        let key = within(element, 1).and_then(|(_, key)| within(key, 1));
        let id = key.and_then(|(_, id)| id.try_into().ok());
        u64::from_ne_bytes(id.expect("an element has a key of eight bytes"))
    })
}

fn each(mut attributes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let half = |at: usize| {
            attributes
                .get(at..at + 2)
                .map(|b| u16::from_ne_bytes([b[0], b[1]]))
        };
        let (length, kind) = (usize::from(half(0)?), half(2)? & !NESTED);
        let value = attributes.get(4..length)?;
        attributes = &attributes[length.next_multiple_of(4).min(attributes.len())..];
        Some((kind, value))
    })
}

fn open() -> io::Result<OwnedFd> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    connect(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    // As much as a burst of thousands of elements takes.
    setsockopt(&socket, sockopt::SndBufForce, &(16 << 20))?;
    setsockopt(&socket, sockopt::RcvBufForce, &(16 << 20))?;
    Ok(socket)
}
