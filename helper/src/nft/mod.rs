//! nftables: a [`Plan`] goes in, one transaction comes out.

mod ffi;
mod foreign;
mod gateway;
mod names;
mod plan;
mod probe;
mod proxy;
mod rule;
mod ruleset;
mod socket;
mod transaction;
mod verdicts;

use std::collections::BTreeMap;
use std::ffi::CStr;

use cgtproxy_proto::name::ProxyName;
use nftnl::{ProtoFamily, Table};
use rustix::io::Errno;

pub(crate) use ffi::watch;
pub use foreign::MarkWriter;
pub use plan::{
    Before, Bypass, Delivery, DnsHijack, Element, Exceptions, Gateway, Hold, Layout, LeftBehind,
    Plan, Proxy, Verdict,
};

use crate::cgroup::ControlGroupId;
use crate::mark::{Mark, MarkRange};
pub use crate::netlink::Refusal;
use crate::netlink::{attribute, attributes, string};
use crate::peer::Uid;
use ffi::table_flags::{OWNER, PERSIST};
use socket::{Dump, Failure, NetfilterSocket};
use transaction::Transaction;

/// Takes what may be the answer to a dump apart.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(object: &[u8]) {
    foreign::fuzz(object);
    for found in attributes(object) {
        let name = string(found.value());
        if let Some(uid) = Uid::from_name(&name) {
            assert_eq!(uid.to_string(), name);
        }
        let _ = names::parse_hold(Uid::ROOT, &name);
    }
}

/// The table's name; its family is `inet`.
pub(crate) const TABLE: &CStr = c"cgtproxy";

/// A table of this name is made and deleted in one transaction, to learn what the kernel can do.
const PROBE: &CStr = c"cgtproxy-probe";

/// Why the table can't be set up or changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no socket to nf_tables.
    #[error("can't open a netlink socket to nf_tables")]
    Socket(#[source] std::io::Error),
    /// No capability.
    #[error("changing nftables needs CAP_NET_ADMIN")]
    NotCapable(#[source] Refusal),
    /// Another process holds the table.
    #[error("the table 'inet cgtproxy' belongs to another process: does a second helper run?")]
    Owned(#[source] Refusal),
    /// The base chains are refused.
    #[error(
        "the kernel refuses the table 'inet cgtproxy' (it needs nf_tables with socket, tproxy, fib, reject and conntrack, Linux 5.13)"
    )]
    Base(#[source] Refusal),
    /// What is there can't be read.
    #[error("can't read the table 'inet cgtproxy' back")]
    Dump(#[source] Refusal),
    /// A user's change was refused; nothing has changed.
    #[error("the kernel refuses the change: {0}")]
    Refused(#[source] Refusal),
    /// Nobody knows whether the change was made.
    #[error("the kernel's answer to the change was lost: {0}")]
    Unknown(#[source] Refusal),
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Refused(refusal) => Self::Refused(refusal),
            Failure::Unknown(refusal) => Self::Unknown(refusal),
        }
    }
}

/// The netlink port of the socket that changes the table: what it does is announced with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TablePort(pub(crate) u32);

/// The table `inet cgtproxy`, for as long as this process changes it.
pub struct Nftables {
    socket: NetfilterSocket,
    table: Table,
    marks: MarkRange,
    proxy_uids: Vec<u32>,
    owned: bool,
}

impl Nftables {
    /// Takes the table over or makes it, with its base chains. Returns what an earlier helper left
    /// in it: users' objects stay in force until a plan replaces or removes them. With `own`, the
    /// table is protected from other programs if the kernel can do that.
    ///
    /// # Errors
    /// Without CAP_NET_ADMIN, on a kernel that lacks what the table needs, or when another process
    /// owns the table.
    pub fn open(
        marks: MarkRange,
        proxy_uids: &[u32],
        own: bool,
    ) -> Result<(Self, BTreeMap<Uid, LeftBehind>), Error> {
        let socket = NetfilterSocket::open().map_err(Error::Socket)?;
        let table = Table::new(TABLE, ProtoFamily::Inet);
        let mut this = Self {
            socket,
            table,
            marks,
            proxy_uids: proxy_uids.to_vec(),
            owned: false,
        };
        this.owned = this.kernel_keeps_owned_tables()? && own;
        let adopted = this.adopt()?;
        if !adopted {
            this.recreate()?;
        }
        let mut base = this.transaction();
        base.base(&this.proxy_uids, !adopted);
        this.socket.transact(&base.finish()).map_err(Error::Base)?;
        let left = if adopted {
            this.left_behind()?
        } else {
            BTreeMap::new()
        };
        Ok((this, left))
    }

    /// Whether the table is protected from other programs.
    #[must_use]
    pub fn owned(&self) -> bool {
        self.owned
    }

    /// Who announces our own changes.
    #[must_use]
    pub fn port(&self) -> TablePort {
        TablePort(self.socket.port())
    }

    /// Makes the table anew, whatever is left of it, with what these plans add to an empty one: all
    /// in one transaction.
    ///
    /// # Errors
    /// If the kernel refuses; it holds what it held before.
    pub fn rebuild(&mut self, plans: &[Plan]) -> Result<(), Error> {
        let mut transaction = self.transaction();
        // There must be a table to delete.
        transaction.add_table(self.flags());
        transaction.delete_table();
        transaction.add_table(self.flags());
        transaction.base(&self.proxy_uids, true);
        for plan in plans {
            transaction.plan(plan);
        }
        Ok(self.socket.carry_out(&transaction.finish())?)
    }

    /// Carries a plan out in one transaction, or nothing of it.
    ///
    /// # Errors
    /// If the kernel refuses; it holds what it held before.
    pub fn commit(&mut self, plan: &Plan) -> Result<(), Error> {
        if plan.is_empty() {
            return Ok(());
        }
        let mut transaction = self.transaction();
        transaction.plan(plan);
        Ok(self.socket.carry_out(&transaction.finish())?)
    }

    /// Removes the table with everything in it. No table is no error.
    ///
    /// # Errors
    /// If another process owns it.
    pub fn remove(marks: MarkRange) -> Result<(), Error> {
        let socket = NetfilterSocket::open().map_err(Error::Socket)?;
        let table = Table::new(TABLE, ProtoFamily::Inet);
        let this = Self {
            socket,
            table,
            marks,
            proxy_uids: Vec::new(),
            owned: false,
        };
        let mut transaction = this.transaction();
        transaction.delete_table();
        match this.socket.transact(&transaction.finish()) {
            Ok(()) => Ok(()),
            Err(refusal) if refusal.errno == Errno::NOENT => Ok(()),
            // An owned table, left by a helper that is gone, has to be adopted first.
            Err(refusal) if refusal.errno == Errno::PERM => {
                let mut transaction = this.transaction();
                transaction.add_table(OWNER | PERSIST);
                transaction.delete_table();
                this.socket
                    .transact(&transaction.finish())
                    .map_err(Error::Owned)
            }
            Err(refusal) => Err(Error::Refused(refusal)),
        }
    }

    fn transaction(&self) -> Transaction<'_> {
        Transaction::new(&self.table, self.marks)
    }

    fn flags(&self) -> u32 {
        if self.owned { OWNER | PERSIST } else { 0 }
    }

    /// Linux 6.9 added `persist`. With `owner` alone the table would go with this process, and every
    /// connection's proxy with it.
    fn kernel_keeps_owned_tables(&self) -> Result<bool, Error> {
        let probe = Table::new(PROBE, ProtoFamily::Inet);
        let mut transaction = Transaction::new(&probe, self.marks);
        transaction.add_table(OWNER | PERSIST);
        transaction.delete_table();
        match self.socket.transact(&transaction.finish()) {
            Ok(()) => Ok(true),
            Err(refusal) if refusal.errno == Errno::PERM => Err(Error::NotCapable(refusal)),
            Err(_) => Ok(false),
        }
    }

    /// Makes the table, or takes over the one that is there; false if that has another layout.
    fn adopt(&self) -> Result<bool, Error> {
        let mut transaction = self.transaction();
        transaction.add_table(self.flags());
        match self.socket.transact(&transaction.finish()) {
            Ok(()) => {}
            Err(refusal) if refusal.errno == Errno::PERM => return Err(Error::Owned(refusal)),
            // The table has other flags than ours.
            Err(_) => return Ok(false),
        }
        Ok(self
            .chains()?
            .iter()
            .any(|chain| chain.as_bytes() == ruleset::VERSION.to_bytes()))
    }

    /// Makes the table anew in place of one of another layout.
    fn recreate(&self) -> Result<(), Error> {
        let mut transaction = self.transaction();
        transaction.delete_table();
        transaction.add_table(self.flags());
        match self.socket.transact(&transaction.finish()) {
            Err(refusal) if refusal.errno == Errno::PERM => Err(Error::Owned(refusal)),
            result => result.map_err(Error::Base),
        }
    }

    /// The names of the table's chains.
    fn chains(&self) -> Result<Vec<String>, Error> {
        /// enum nft_chain_attributes
        const TABLE_NAME: u16 = 1;
        const NAME: u16 = 3;
        let chains = self.socket.dump(Dump::Chains, &[]).map_err(Error::Dump)?;
        let ours = chains.iter().filter(|chain| {
            attribute(chain, TABLE_NAME).map(string).as_deref() == TABLE.to_str().ok()
        });
        Ok(ours
            .filter_map(|chain| attribute(chain, NAME).map(string))
            .collect())
    }

    /// A map's keys and the chains that they lead to.
    fn elements(&self, map: &CStr) -> Result<Vec<(Vec<u8>, String)>, Error> {
        // enum nft_set_elem_list_attributes, nft_list_attributes, nft_set_elem_attributes,
        // nft_data_attributes, nft_verdict_attributes
        const LIST_TABLE: u16 = 1;
        const LIST_SET: u16 = 2;
        const LIST_ELEMENTS: u16 = 3;
        const ELEMENT_KEY: u16 = 1;
        const ELEMENT_DATA: u16 = 2;
        const DATA_VALUE: u16 = 1;
        const DATA_VERDICT: u16 = 2;
        const VERDICT_CHAIN: u16 = 2;
        let mut request = Vec::new();
        for (kind, value) in [(LIST_TABLE, TABLE), (LIST_SET, map)] {
            let value = value.to_bytes_with_nul();
            request.extend_from_slice(&((4 + value.len()) as u16).to_ne_bytes());
            request.extend_from_slice(&kind.to_ne_bytes());
            request.extend_from_slice(value);
            request.resize(request.len().next_multiple_of(4), 0);
        }
        let mut elements = Vec::new();
        for page in self
            .socket
            .dump(Dump::Elements, &request)
            .map_err(Error::Dump)?
        {
            let list = attribute(&page, LIST_ELEMENTS).unwrap_or_default();
            for element in attributes(list) {
                let element = element.value();
                let key =
                    attribute(element, ELEMENT_KEY).and_then(|key| attribute(key, DATA_VALUE));
                let chain = attribute(element, ELEMENT_DATA)
                    .and_then(|data| attribute(data, DATA_VERDICT))
                    .and_then(|verdict| attribute(verdict, VERDICT_CHAIN));
                if let (Some(key), Some(chain)) = (key, chain) {
                    elements.push((key.to_vec(), string(chain)));
                }
            }
        }
        Ok(elements)
    }

    /// The users whose objects an earlier helper left. A transaction makes or deletes all of a
    /// user's objects, so one chain stands for the rest.
    fn left_behind(&self) -> Result<BTreeMap<Uid, LeftBehind>, Error> {
        let mut left: BTreeMap<Uid, LeftBehind> = BTreeMap::new();
        let chains = self.chains()?;
        for chain in &chains {
            if let Some(uid) = chain
                .strip_prefix(names::DROP_PREFIX)
                .and_then(Uid::from_name)
            {
                left.entry(uid).or_default();
            }
        }
        for (key, chain) in self.elements(ruleset::USERS)? {
            let uid = chain
                .strip_prefix(names::USER_PREFIX)
                .and_then(Uid::from_name);
            if let (Some(left), Ok(id)) = (
                uid.and_then(|uid| left.get_mut(&uid)),
                key.as_slice().try_into(),
            ) {
                left.subtree = Some(ControlGroupId::from_bytes(id));
            }
        }
        for (&uid, left) in &mut left {
            left.holds = chains
                .iter()
                .filter_map(|chain| names::parse_hold(uid, chain))
                .collect();
            let prefix = format!("{}{uid}-", names::DIVERT_PREFIX);
            for (key, chain) in self.elements(&names::marks(uid))? {
                let name = chain
                    .strip_prefix(&prefix)
                    .and_then(|n| n.parse::<ProxyName>().ok());
                let mark = key.as_slice().try_into().ok().map(u32::from_ne_bytes);
                if let (Some(name), Some(mark)) = (name, mark) {
                    left.proxies.insert(name, Mark::adopted(mark));
                }
            }
        }
        Ok(left)
    }
}
