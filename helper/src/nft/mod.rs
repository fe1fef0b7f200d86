//! nftables: a [`Plan`] goes in, one transaction comes out.
//!
//! `policy` is what users and root say of control groups, `plan` what the kernel is to have of it, `change` what that
//! changes, and `take_over` what of an earlier helper's it replaces, which `inherit` has read back. In the table,
//! `ruleset`, `output` and `delivery` are nobody's, `shared` and `bypass` are all users', `user`, `proxy`, `dns`,
//! `verdicts` and `map_elements` are one user's, and `gateway` is root's; `common_rules` are in chains of several of
//! these. They are written as commands (`transaction`), with rules (`rule`, of `expression`s) and names (`names`).
//! `table` sends them by `socket`, over `ffi`, and `dump` reads what is there. `probe` and `foreign` look at what the
//! kernel can do and at what other programs do to marks.

mod bypass;
mod change;
mod common_rules;
mod delivery;
mod dns;
mod dump;
mod expression;
mod ffi;
mod foreign;
mod gateway;
mod inherit;
mod map_elements;
mod names;
mod output;
mod plan;
mod policy;
mod probe;
mod proxy;
mod rule;
mod ruleset;
mod shared;
mod socket;
mod table;
mod take_over;
#[cfg(test)]
pub(crate) mod tests;
mod transaction;
mod user;
mod verdicts;

use std::ffi::CStr;

pub use foreign::{MarkWriter, Unread};
pub use plan::{Before, Inherited, Known, Layout, LeftBehind, Plan, Records, Stamp, Stamped};
pub use policy::{
    Bypass, BypassList, Delivery, DnsHijack, Element, Enforced, Exceptions, Fakes, Gateway, Hold,
    Proxy, ProxySettings, UdpVerdicts, Verdict,
};
pub use table::{Nftables, Settings, TablePort};

pub use crate::netlink::Refusal;
use socket::Failure;

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
        "the kernel refuses the table 'inet cgtproxy' (it needs nf_tables with socket, reject and conntrack, Linux 5.13)"
    )]
    Base(#[source] Refusal),
    /// What is there can't be read.
    #[error("can't read the table 'inet cgtproxy' back")]
    Dump(#[source] Refusal),
    /// A user's change was refused; nothing has changed.
    #[error("the kernel refuses the change")]
    Refused(#[source] Refusal),
    /// Nobody knows whether the change was made, or part of it could not be taken back.
    #[error("the kernel has perhaps a part of the change")]
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

/// Takes what may be the answer to a dump apart.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(object: &[u8]) {
    foreign::fuzz(object);
    for found in crate::netlink::attributes(object) {
        let name = crate::netlink::string(found.value());
        if let Some(uid) = crate::peer::Uid::from_name(&name) {
            assert_eq!(uid.to_string(), name);
        }
        let _ = names::owner(&name);
    }
}

/// Builds the batch of a plan.
#[cfg(any(test, fuzzing))]
pub(crate) fn batch(plan: &Plan, marks: crate::mark::MarkRange) -> nftnl::FinalizedBatch {
    let table = nftnl::Table::new(TABLE, nftnl::ProtoFamily::Inet);
    let mut transaction = transaction::Transaction::new(&table, marks, UdpVerdicts::default());
    transaction.plan(plan, &shared::Shared::default());
    transaction.finish()
}
