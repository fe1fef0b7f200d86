//! What the `nftnl` crate lacks, over libnftnl itself: a table with flags, named maps and their elements, and what
//! the expressions of `expression.rs` are made with. All `unsafe` of the helper is in this file and in `sys.rs`.
//!
//! The pattern is libnftnl's own: an object is allocated, its attributes are set (every setter
//! copies what it is given), it is written into a message, and it is freed.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ffi::{CStr, c_int, c_void};
use std::ptr::NonNull;

use nftnl::nftnl_sys::{self as sys, libc};
use nftnl::{MsgType, NlMsg, ProtoFamily, Table};

use crate::peer::Uid;

/// Turns libnftnl's null for "no memory" into an abort, as the standard library and the `nftnl`
/// crate do: these allocations are a few dozen bytes.
fn allocated<T>(pointer: *mut T) -> NonNull<T> {
    NonNull::new(pointer).unwrap_or_else(|| std::process::abort())
}

/// Begins a message of this kind, with these flags, about something in a table.
///
/// # Safety
/// `buffer` has room for a header.
unsafe fn header(
    buffer: *mut c_void,
    table: &Table,
    kind: c_int,
    flags: c_int,
    seq: u32,
) -> *mut libc::nlmsghdr {
    let family = table.get_family() as u16;
    // SAFETY: there is room (see above), and the rest are numbers.
    unsafe { sys::nftnl_nlmsg_build_hdr(buffer.cast(), kind as u16, family, flags as u16, seq) }
}

/// Flags of `enum nft_table_flags` (linux/netfilter/nf_tables.h).
pub(super) mod table_flags {
    /// Only the socket that made the table may change it (Linux 5.12).
    pub(in crate::nft) const OWNER: u32 = 0x2;
    /// An owned table outlives its owner, and the next owner may adopt it (Linux 6.9).
    pub(in crate::nft) const PERSIST: u32 = 0x4;
}

/// `add table` with flags, which `nftnl::Table` cannot say.
pub(super) struct FlaggedTable<'a> {
    pub(super) table: &'a Table,
    pub(super) flags: u32,
}

// SAFETY: `write` puts one table message into `buffer`: a header, two names and a flag word, far
// below the size of the largest message, which the caller of `write` provides.
unsafe impl NlMsg for FlaggedTable<'_> {
    unsafe fn write(&self, buffer: *mut c_void, seq: u32, message: MsgType) {
        let kind = match message {
            MsgType::Add => libc::NFT_MSG_NEWTABLE,
            MsgType::Del => libc::NFT_MSG_DELTABLE,
        };
        // SAFETY: `buffer` has room for the largest message (the trait's contract); the table
        // object is allocated here, given a NUL-terminated name that it copies, and freed here.
        unsafe {
            let table = allocated(sys::nftnl_table_alloc()).as_ptr();
            let name = self.table.get_name().as_ptr();
            sys::nftnl_table_set_str(table, sys::NFTNL_TABLE_NAME as u16, name);
            sys::nftnl_table_set_u32(table, sys::NFTNL_TABLE_FLAGS as u16, self.flags);
            let header = header(buffer, self.table, kind, libc::NLM_F_CREATE, seq);
            sys::nftnl_table_nlmsg_build_payload(header, table);
            sys::nftnl_table_free(table);
        }
    }
}

/// What the keys of a set are. The numbers are nft's own data types (nft's datatype.h): the kernel
/// only stores them, `nft list` shows elements by them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum KeyType {
    /// `ipv4_addr`
    Ipv4,
    /// `ipv6_addr`
    Ipv6,
    /// `mark`
    Mark,
    /// `uid`
    Uid,
    /// `ifname`: padded with NULs
    Interface,
    /// `cgroupsv2`: the 64-bit id of a control group
    ControlGroup,
    /// `inet_service`: a port in network byte order
    Port,
    /// `mark . uid`
    MarkAndUid,
}

impl KeyType {
    fn number(self) -> u32 {
        match self {
            Self::Ipv4 => 7,
            Self::Ipv6 => 8,
            Self::Port => 13,
            Self::Mark => 19,
            Self::Uid => 24,
            Self::Interface => 41,
            Self::ControlGroup => 46,
            // One after the other, six bits for each (TYPE_BITS).
            Self::MarkAndUid => Self::Mark.number() << 6 | Self::Uid.number(),
        }
    }

    /// In bytes.
    fn length(self) -> u32 {
        match self {
            Self::Port => 2,
            Self::Ipv4 | Self::Mark | Self::Uid => 4,
            Self::ControlGroup | Self::MarkAndUid => 8,
            Self::Ipv6 | Self::Interface => 16,
        }
    }

    /// In which order `nft list` takes the bytes: 1 for the host's, 2 for the network's, 0 where each part has its own.
    fn byte_order(self) -> u32 {
        match self {
            Self::MarkAndUid => 0,
            Self::Mark | Self::Uid | Self::Interface | Self::ControlGroup => 1,
            Self::Ipv4 | Self::Ipv6 | Self::Port => 2,
        }
    }
}

/// What a set holds beside its keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// Nothing.
    Keys,
    /// Ranges: an element begins one, an element marked as an end is the first address after it.
    Intervals,
    /// A verdict for each key.
    Verdicts,
    /// A value of this type for each key.
    Values(KeyType),
}

/// A named set or map, and elements to add to it or to delete from it.
pub(super) struct Set<'a> {
    set: NonNull<sys::nftnl_set>,
    table: &'a Table,
}

/// What an element says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Element<'a> {
    /// The key alone.
    Key,
    /// The first address after an interval.
    IntervalEnd,
    /// `key : goto chain`
    Goto(&'a CStr),
    /// `key : drop`
    Drop,
    /// `key : return`
    Return,
    /// `key : value`
    Value(&'a [u8]),
}

/// Whose an element is, which nft shows as its comment.
pub(super) struct Comment(Vec<u8>);

impl Comment {
    /// As libnftnl's `struct nftnl_udata` is laid out: the type, which is 0 for a comment
    /// (`NFTNL_UDATA_SET_ELEM_COMMENT`), the length, and a string that ends with a NUL.
    pub(super) fn new(uid: Uid) -> Self {
        let text = uid.to_string();
        // A uid has at most ten digits.
        let length = text.len() as u8 + 1;
        Self([&[0, length], text.as_bytes(), &[0]].concat())
    }

    /// Who is named in an element's user data.
    pub(super) fn parse(data: &[u8]) -> Option<Uid> {
        let [0, length, text @ ..] = data else {
            return None;
        };
        let text = text.get(..usize::from(*length))?.strip_suffix(&[0])?;
        Uid::from_name(str::from_utf8(text).ok()?)
    }
}

impl<'a> Set<'a> {
    /// A set of `table`, by its name. `id` tells it apart within the transaction that creates it.
    pub(super) fn new(
        table: &'a Table,
        name: &CStr,
        id: u32,
        key: KeyType,
        content: Content,
    ) -> Self {
        // User data that tells nft the byte order: type 0 (`NFTNL_UDATA_SET_KEYBYTEORDER`) or 1
        // (`NFTNL_UDATA_SET_DATABYTEORDER`), the length, then the order.
        let mut order = [&[0, 4][..], &key.byte_order().to_ne_bytes()].concat();
        if let Content::Values(value) = content {
            order.extend([1, 4]);
            order.extend(value.byte_order().to_ne_bytes());
        }
        let flags = match content {
            Content::Keys => 0,
            Content::Intervals => libc::NFT_SET_INTERVAL,
            Content::Verdicts | Content::Values(_) => libc::NFT_SET_MAP,
        };
        // SAFETY: the set is fresh from the allocator; names are NUL-terminated, `order` is valid
        // for its own length, and the setters copy all of them.
        let set = unsafe {
            let set = allocated(sys::nftnl_set_alloc());
            let raw = set.as_ptr();
            let number = |attribute: u32, number: u32| {
                sys::nftnl_set_set_u32(raw, attribute as u16, number);
            };
            number(sys::NFTNL_SET_FAMILY, ProtoFamily::Inet as u32);
            sys::nftnl_set_set_str(raw, sys::NFTNL_SET_TABLE as u16, table.get_name().as_ptr());
            sys::nftnl_set_set_str(raw, sys::NFTNL_SET_NAME as u16, name.as_ptr());
            number(sys::NFTNL_SET_ID, id);
            number(sys::NFTNL_SET_KEY_TYPE, key.number());
            number(sys::NFTNL_SET_KEY_LEN, key.length());
            sys::nftnl_set_set_data(
                raw,
                sys::NFTNL_SET_USERDATA as u16,
                order.as_ptr().cast(),
                order.len() as u32,
            );
            number(sys::NFTNL_SET_FLAGS, flags as u32);
            match content {
                Content::Keys | Content::Intervals => {}
                Content::Verdicts => number(sys::NFTNL_SET_DATA_TYPE, libc::NFT_DATA_VERDICT),
                Content::Values(value) => {
                    number(sys::NFTNL_SET_DATA_TYPE, value.number());
                    number(sys::NFTNL_SET_DATA_LEN, value.length());
                }
            }
            set
        };
        Self { set, table }
    }

    /// Adds an element to those that [`Self::elements`] writes. `key` has the length of the set's keys.
    pub(super) fn push(&mut self, key: &[u8], element: Element<'_>) {
        self.push_with(key, element, None);
    }

    /// Adds an element, perhaps with a comment.
    pub(super) fn push_with(
        &mut self,
        key: &[u8],
        element: Element<'_>,
        comment: Option<&Comment>,
    ) {
        // SAFETY: the element is fresh from the allocator; `key`, a value and a comment are valid for their own
        // lengths, and chain names are NUL-terminated; all are copied. The set takes the element over and
        // frees it with itself.
        unsafe {
            let raw = allocated(sys::nftnl_set_elem_alloc()).as_ptr();
            let number = |attribute: u32, number: c_int| {
                sys::nftnl_set_elem_set_u32(raw, attribute as u16, number as u32);
            };
            let bytes = |attribute: u32, bytes: &[u8]| {
                let (start, length) = (bytes.as_ptr().cast(), bytes.len() as u32);
                sys::nftnl_set_elem_set(raw, attribute as u16, start, length);
            };
            bytes(sys::NFTNL_SET_ELEM_KEY, key);
            match element {
                Element::Key => {}
                Element::IntervalEnd => {
                    number(sys::NFTNL_SET_ELEM_FLAGS, libc::NFT_SET_ELEM_INTERVAL_END);
                }
                Element::Goto(chain) => {
                    number(sys::NFTNL_SET_ELEM_VERDICT, libc::NFT_GOTO);
                    let attribute = sys::NFTNL_SET_ELEM_CHAIN as u16;
                    sys::nftnl_set_elem_set_str(raw, attribute, chain.as_ptr());
                }
                Element::Drop => number(sys::NFTNL_SET_ELEM_VERDICT, libc::NF_DROP),
                Element::Return => number(sys::NFTNL_SET_ELEM_VERDICT, libc::NFT_RETURN),
                Element::Value(value) => bytes(sys::NFTNL_SET_ELEM_DATA, value),
            }
            if let Some(Comment(data)) = comment {
                bytes(sys::NFTNL_SET_ELEM_USERDATA, data);
            }
            sys::nftnl_set_elem_add(self.set.as_ptr(), raw);
        }
    }

    /// Writes the elements as messages, as many to a message as its 64 KiB hold.
    pub(super) fn elements(&self) -> ElementMessages<'_> {
        // SAFETY: the set outlives the iterator, which borrows it.
        let iter = allocated(unsafe { sys::nftnl_set_elems_iter_create(self.set.as_ptr()) });
        // SAFETY: the iterator is alive. It has no current element if the set has none at all.
        let empty = unsafe { sys::nftnl_set_elems_iter_cur(iter.as_ptr()).is_null() };
        ElementMessages {
            set: self,
            iter,
            finished: Cell::new(empty),
        }
    }
}

impl Drop for Set<'_> {
    fn drop(&mut self) {
        // SAFETY: allocated by `new`, and nothing else frees it.
        unsafe { sys::nftnl_set_free(self.set.as_ptr()) }
    }
}

// SAFETY: `write` puts one set message into `buffer`: a header, two names and a few words.
unsafe impl NlMsg for Set<'_> {
    unsafe fn write(&self, buffer: *mut c_void, seq: u32, message: MsgType) {
        let (kind, flags) = match message {
            MsgType::Add => (libc::NFT_MSG_NEWSET, libc::NLM_F_CREATE),
            MsgType::Del => (libc::NFT_MSG_DELSET, 0),
        };
        // SAFETY: `buffer` has room for the largest message (the trait's contract), the set is alive.
        unsafe {
            let header = header(buffer, self.table, kind, flags, seq);
            sys::nftnl_set_nlmsg_build_payload(header, self.set.as_ptr());
        }
    }
}

/// The messages that carry a set's elements.
pub(super) struct ElementMessages<'a> {
    set: &'a Set<'a>,
    iter: NonNull<sys::nftnl_set_elems_iter>,
    /// The iterator itself starts over after its last element.
    finished: Cell<bool>,
}

impl ElementMessages<'_> {
    /// The next message to write; none when all elements have been written.
    pub(super) fn next(&mut self) -> Option<ElementMessage<'_>> {
        (!self.finished.get()).then_some(ElementMessage(self))
    }
}

impl Drop for ElementMessages<'_> {
    fn drop(&mut self) {
        // SAFETY: allocated by `elements`, and nothing else frees it.
        unsafe { sys::nftnl_set_elems_iter_destroy(self.iter.as_ptr()) }
    }
}

/// One message with elements. Writing it moves the iterator that it comes from on.
pub(super) struct ElementMessage<'a>(&'a ElementMessages<'a>);

// SAFETY: libnftnl ends the message where the list attribute would pass 65,535 bytes, and that
// with a header is the largest message there is.
unsafe impl NlMsg for ElementMessage<'_> {
    unsafe fn write(&self, buffer: *mut c_void, seq: u32, message: MsgType) {
        let (kind, flags) = match message {
            MsgType::Add => (libc::NFT_MSG_NEWSETELEM, libc::NLM_F_CREATE),
            MsgType::Del => (libc::NFT_MSG_DELSETELEM, 0),
        };
        let ElementMessages {
            set,
            iter,
            finished,
        } = self.0;
        // SAFETY: `buffer` has room for the largest message (the trait's contract); the iterator
        // and the set that it walks are borrowed, so both are alive.
        let more = unsafe {
            let header = header(buffer, set.table, kind, flags, seq);
            sys::nftnl_set_elems_nlmsg_build_payload_iter(header, iter.as_ptr())
        };
        finished.set(more <= 0);
    }
}

/// `flush set`: a deletion that names no element deletes all (nf_tables_delsetelem, Linux 4.10).
pub(super) struct FlushSet<'a>(pub(super) &'a Set<'a>);

// SAFETY: `write` puts one set message into `buffer`: a header and two names.
unsafe impl NlMsg for FlushSet<'_> {
    unsafe fn write(&self, buffer: *mut c_void, seq: u32, _: MsgType) {
        // SAFETY: `buffer` has room for the largest message (the trait's contract); the set is
        // fresh from the allocator, copies the names of the other, which is alive, and is freed.
        unsafe {
            let of = self.0.set.as_ptr();
            let set = allocated(sys::nftnl_set_alloc()).as_ptr();
            for attribute in [sys::NFTNL_SET_TABLE as u16, sys::NFTNL_SET_NAME as u16] {
                sys::nftnl_set_set_str(set, attribute, sys::nftnl_set_get_str(of, attribute));
            }
            let header = header(buffer, self.0.table, libc::NFT_MSG_DELSETELEM, 0, seq);
            sys::nftnl_set_elems_nlmsg_build_payload(header, set);
            sys::nftnl_set_free(set);
        }
    }
}

/// Kinds of expressions of which every attribute has room for a word (libnftnl's src/expr).
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    ByteOrder,
    Conntrack,
    Fib,
    Meta,
    Payload,
    Tproxy,
}

impl Kind {
    /// Its name in nf_tables.
    fn name(self) -> &'static CStr {
        match self {
            Self::ByteOrder => c"byteorder",
            Self::Conntrack => c"ct",
            Self::Fib => c"fib",
            Self::Meta => c"meta",
            Self::Payload => c"payload",
            Self::Tproxy => c"tproxy",
        }
    }
}

/// An expression of this kind with these attributes.
pub(super) fn expression(kind: Kind, attributes: &[(u32, u32)]) -> NonNull<sys::nftnl_expr> {
    // SAFETY: the name is NUL-terminated, the expression fresh from the allocator. A setter copies a word at most, for
    // which the attribute has room, and passes over attributes that the kind does not have.
    unsafe {
        let expression = allocated(sys::nftnl_expr_alloc(kind.name().as_ptr()));
        for &(attribute, value) in attributes {
            sys::nftnl_expr_set_u32(expression.as_ptr(), attribute as u16, value);
        }
        expression
    }
}

/// An expression that looks a register up in a named set or map, and puts what is found into another, if any.
pub(super) fn lookup(set: &CStr, from: u32, to: Option<u32>) -> NonNull<sys::nftnl_expr> {
    // SAFETY: both names are NUL-terminated, and that of the set is copied; the expression is fresh from the allocator,
    // and registers are words.
    unsafe {
        let expression = allocated(sys::nftnl_expr_alloc(c"lookup".as_ptr()));
        let raw = expression.as_ptr();
        sys::nftnl_expr_set_u32(raw, sys::NFTNL_EXPR_LOOKUP_SREG as u16, from);
        sys::nftnl_expr_set_str(raw, sys::NFTNL_EXPR_LOOKUP_SET as u16, set.as_ptr());
        if let Some(to) = to {
            sys::nftnl_expr_set_u32(raw, sys::NFTNL_EXPR_LOOKUP_DREG as u16, to);
        }
        expression
    }
}
