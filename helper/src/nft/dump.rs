//! What the table has, as the kernel tells it, and what a rule looks like there (linux/netfilter/nf_tables.h).

use std::collections::BTreeSet;
use std::ffi::CStr;

use rustix::io::Errno;

use super::ffi::Comment;
use super::socket::Dump;
use super::{Error, Nftables, TABLE};
use crate::cgroup::ControlGroupId;
use crate::netlink::{Refusal, attribute, push_attribute, string, values};
use crate::peer::Uid;

/// How often a dump is tried while others change what is dumped.
const ATTEMPTS: usize = 8;

/// enum nft_rule_attributes
pub(super) const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
pub(super) const RULE_EXPRESSIONS: u16 = 4;

/// enum nft_expr_attributes
pub(super) const EXPRESSION_NAME: u16 = 1;
pub(super) const EXPRESSION_DATA: u16 = 2;

/// What an element of a map has beside its key.
pub(super) enum Value {
    Chain(String),
    Data(Vec<u8>),
    /// A verdict without a chain, or nothing.
    Other,
}

impl Value {
    pub(super) fn number(&self) -> Option<u32> {
        match self {
            Self::Data(data) => Some(u32::from_ne_bytes(*data.first_chunk()?)),
            Self::Chain(_) | Self::Other => None,
        }
    }

    pub(super) fn chain(&self) -> Option<&str> {
        match self {
            Self::Chain(chain) => Some(chain),
            Self::Data(_) | Self::Other => None,
        }
    }
}

/// An element as it is dumped.
pub(super) struct Found {
    pub(super) key: Vec<u8>,
    pub(super) value: Value,
    /// Whose it is, if that is noted.
    pub(super) whose: Option<Uid>,
}

impl Found {
    pub(super) fn id(&self) -> Option<ControlGroupId> {
        self.key
            .first_chunk()
            .copied()
            .map(ControlGroupId::from_bytes)
    }

    /// The first four bytes of the key.
    pub(super) fn number(&self) -> Option<u32> {
        Some(u32::from_ne_bytes(*self.key.first_chunk()?))
    }
}

impl Nftables {
    /// The levels that the rules of these chains look at, for each group of them.
    pub(super) fn levels_of<const N: usize>(
        &self,
        groups: [[&CStr; 2]; N],
    ) -> Result<[BTreeSet<u32>; N], Error> {
        /// enum nft_socket_attributes
        const SOCKET_LEVEL: u16 = 3;
        let is =
            |value: Option<&[u8]>, name: &CStr| value.map(string).as_deref() == name.to_str().ok();
        let mut levels = [const { BTreeSet::new() }; N];
        // Only the rules of this table: a firewall may have many.
        for rule in self.read(Dump::Rules, &names(&[(RULE_TABLE, TABLE)]))? {
            if !is(attribute(&rule, RULE_TABLE), TABLE) {
                continue;
            }
            let chain = attribute(&rule, RULE_CHAIN);
            let mut each = groups.iter().zip(&mut levels);
            let wanted = each.find(|(group, _)| group.iter().any(|name| is(chain, name)));
            let Some((_, levels)) = wanted else {
                continue;
            };
            let list = attribute(&rule, RULE_EXPRESSIONS).unwrap_or_default();
            for (name, data) in expressions(list) {
                let level = attribute(data, SOCKET_LEVEL).and_then(<[u8]>::first_chunk);
                if let ("socket", Some(level)) = (name.as_str(), level) {
                    levels.insert(u32::from_be_bytes(*level));
                }
            }
        }
        Ok(levels)
    }

    /// The names of the table's chains.
    pub(super) fn chains(&self) -> Result<BTreeSet<String>, Error> {
        /// enum nft_chain_attributes
        const TABLE_NAME: u16 = 1;
        const NAME: u16 = 3;
        let chains = self.read(Dump::Chains, &[])?;
        let ours = chains.iter().filter(|chain| {
            attribute(chain, TABLE_NAME).map(string).as_deref() == TABLE.to_str().ok()
        });
        Ok(ours
            .filter_map(|chain| attribute(chain, NAME).map(string))
            .collect())
    }

    /// The elements of a map. A map that is not there has none.
    pub(super) fn elements(&self, map: &CStr) -> Result<Vec<Found>, Error> {
        // enum nft_set_elem_list_attributes, nft_list_attributes, nft_set_elem_attributes,
        // nft_data_attributes, nft_verdict_attributes
        const LIST_TABLE: u16 = 1;
        const LIST_SET: u16 = 2;
        const LIST_ELEMENTS: u16 = 3;
        const ELEMENT_KEY: u16 = 1;
        const ELEMENT_DATA: u16 = 2;
        const ELEMENT_USER_DATA: u16 = 6;
        const DATA_VALUE: u16 = 1;
        const DATA_VERDICT: u16 = 2;
        const VERDICT_CHAIN: u16 = 2;
        let request = names(&[(LIST_TABLE, TABLE), (LIST_SET, map)]);
        let pages = match self.read(Dump::Elements, &request) {
            Err(Error::Dump(refusal)) if refusal.errno == Errno::NOENT => return Ok(Vec::new()),
            pages => pages?,
        };
        let mut elements = Vec::new();
        for page in pages {
            let list = attribute(&page, LIST_ELEMENTS).unwrap_or_default();
            for element in values(list) {
                let key =
                    attribute(element, ELEMENT_KEY).and_then(|key| attribute(key, DATA_VALUE));
                let data = attribute(element, ELEMENT_DATA).unwrap_or_default();
                let chain = attribute(data, DATA_VERDICT)
                    .and_then(|verdict| attribute(verdict, VERDICT_CHAIN));
                let value = match (chain, attribute(data, DATA_VALUE)) {
                    (Some(chain), _) => Value::Chain(string(chain)),
                    (None, Some(data)) => Value::Data(data.to_vec()),
                    (None, None) => Value::Other,
                };
                let whose = attribute(element, ELEMENT_USER_DATA).and_then(Comment::parse);
                elements.extend(key.map(|key| Found {
                    key: key.to_vec(),
                    value,
                    whose,
                }));
            }
        }
        Ok(elements)
    }

    /// Dumps, and does so again if others changed something meanwhile.
    fn read(&self, what: Dump, request: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        let mut attempt = 0;
        loop {
            attempt += 1;
            match self.socket.dump(what, request) {
                Err(Refusal { errno, .. }) if errno == Errno::INTR && attempt < ATTEMPTS => {}
                objects => return objects.map_err(Error::Dump),
            }
        }
    }
}

/// The name and the attributes of each expression in a rule's list of them.
pub(super) fn expressions(list: &[u8]) -> impl Iterator<Item = (String, &[u8])> {
    values(list).filter_map(|expression| {
        let name = attribute(expression, EXPRESSION_NAME).map(string)?;
        let data = attribute(expression, EXPRESSION_DATA).unwrap_or_default();
        Some((name, data))
    })
}

/// Attributes with names, by which a dump is told what is wanted.
fn names(names: &[(u16, &CStr)]) -> Vec<u8> {
    let mut request = Vec::new();
    for (kind, name) in names {
        push_attribute(&mut request, *kind, name.to_bytes_with_nul());
    }
    request
}
