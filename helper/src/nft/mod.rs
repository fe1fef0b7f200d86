//! nftables: a [`Plan`] goes in, one transaction comes out.
//!
//! `policy` is what users and root say of control groups, `plan` what the kernel is to have of it, `change` what that
//! changes, and `take_over` what of an earlier helper's it replaces, which `inherit` has read back. In the table,
//! `ruleset`, `output` and `delivery` are nobody's, `shared` and `bypass` are all users', `user`, `proxy`, `dns`,
//! `verdicts` and `map_elements` are one user's, and `gateway` is root's; `common_rules` are in chains of several of
//! these. They are written as commands (`transaction`), with rules (`rule`, of `expression`s) and names (`names`), and
//! sent by `socket`, over `ffi`. `probe` and `foreign` look at what the kernel can do and at what other programs do to
//! marks; `attributes` has what rules look like where they are dumped.

mod attributes;
mod bypass;
mod change;
mod common_rules;
mod delivery;
mod dns;
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
mod take_over;
#[cfg(test)]
pub(crate) mod tests;
mod transaction;
mod user;
mod verdicts;

use std::collections::BTreeMap;
use std::ffi::CStr;

use nftnl::{ProtoFamily, Table};
use rustix::io::Errno;

pub use foreign::{MarkWriter, Unread};
pub use plan::{Before, Inherited, Known, Layout, LeftBehind, Plan, Records, Stamp, Stamped};
pub use policy::{
    Bypass, BypassList, Delivery, DnsHijack, Element, Enforced, Exceptions, Fakes, Gateway, Hold,
    Proxy, ProxySettings, UdpVerdicts, Verdict,
};

use crate::mark::MarkRange;
pub use crate::netlink::Refusal;
#[cfg(any(test, fuzzing))]
use crate::netlink::{attributes, string};
use crate::peer::Uid;
use ffi::table_flags::{OWNER, PERSIST};
use plan::{ElementChanges, Step};
use ruleset::Base;
use shared::Shared;
use socket::{Failure, NetfilterSocket};
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
        let _ = names::owner(&name);
    }
}

/// Builds the batch of a plan.
#[cfg(any(test, fuzzing))]
pub(crate) fn batch(plan: &Plan, marks: MarkRange) -> nftnl::FinalizedBatch {
    let table = Table::new(TABLE, ProtoFamily::Inet);
    let mut transaction = Transaction::new(&table, marks, UdpVerdicts::default());
    transaction.plan(plan, &Shared::default());
    transaction.finish()
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

/// Whether the kernel does not know these flags of a table, or can't change the table's to them (`nf_tables_newtable` and
/// `nf_tables_updtable`, net/netfilter/nf_tables_api.c).
fn is_unsupported(refusal: &Refusal) -> bool {
    matches!(refusal.errno, Errno::OPNOTSUPP | Errno::INVAL)
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

/// What the administrator says of the table.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The bits of packet and connection marks that are ours.
    pub marks: MarkRange,
    /// Whose proxies may receive diverted packets of every user.
    pub proxy_uids: Vec<u32>,
    /// Whether the table is to be protected from other programs, if the kernel can do that.
    pub own: bool,
    /// What UDP goes by.
    pub udp_verdicts: UdpVerdicts,
}

/// The table `inet cgtproxy`, for as long as this process changes it.
pub struct Nftables {
    socket: NetfilterSocket,
    table: Table,
    settings: Settings,
    has_fib: bool,
    owned: bool,
    /// What the table holds, as far as users have it together.
    shared: Shared,
}

impl Nftables {
    /// Takes the table over or makes it, with its base chains. Returns what an earlier helper left
    /// in it: users' objects stay in force until a plan replaces or removes them.
    ///
    /// A table of another layout, for other settings, or with another owner, can't be taken over: it is made
    /// anew in one transaction, with those users' objects of which the snapshot knows everything.
    ///
    /// # Errors
    /// Without CAP_NET_ADMIN, on a kernel that lacks what the table needs, or when another process
    /// owns the table.
    pub fn open(
        settings: Settings,
        snapshot: &Records,
    ) -> Result<(Self, BTreeMap<Uid, Inherited>), Error> {
        let socket = NetfilterSocket::open().map_err(Error::Socket)?;
        let table = Table::new(TABLE, ProtoFamily::Inet);
        let mut this = Self {
            socket,
            table,
            settings,
            has_fib: false,
            owned: false,
            shared: Shared::default(),
        };
        this.owned = this.kernel_keeps_owned_tables()? && this.settings.own;
        this.has_fib = this.has_fib().map_err(Error::Refused)?;
        let adopted = this.adopt()?;
        let (mut inherited, shared) = this.inherited(snapshot, adopted)?;
        if adopted {
            this.shared = shared;
            let mut base = this.transaction();
            base.base(&this.base(), &this.shared, false);
            this.socket.transact(&base.finish()).map_err(Error::Base)?;
        } else {
            // Policies that are not fully known go with the old table.
            inherited.retain(|_, left| matches!(left, Inherited::Known(_)));
            let plan = |(&uid, left): (&Uid, &Inherited)| match left {
                Inherited::Known(known) => Some(known.plan(uid)),
                Inherited::LeftBehind(_) => None,
            };
            let plans: Vec<Plan> = inherited.iter().filter_map(plan).collect();
            let chains = this.chains()?;
            this.recreate(&plans)?;
            if !chains.is_empty() && !chains.iter().any(|chain| ruleset::is_version(chain)) {
                tracing::warn!(
                    "replaced another program's table 'inet cgtproxy': if the original cgtproxy runs, \
                     'systemctl disable --now cgtproxy.service' ends it"
                );
            }
        }
        Ok((this, inherited))
    }

    /// Whether the table is protected from other programs.
    #[must_use]
    pub fn owned(&self) -> bool {
        self.owned
    }

    /// Whether the table is there, with this layout and for these settings.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn is_there(&self) -> Result<bool, Error> {
        let version = ruleset::version(self.settings.marks, self.settings.udp_verdicts);
        let chains = self.chains()?;
        Ok(chains
            .iter()
            .any(|chain| chain.as_bytes() == version.to_bytes()))
    }

    /// The port that the kernel's announcements of our own changes name.
    #[must_use]
    pub fn port(&self) -> TablePort {
        TablePort(self.socket.port())
    }

    /// Makes the table anew, whatever is left of it, with what these plans add to an empty one: all
    /// in one transaction.
    ///
    /// # Errors
    /// If the kernel refuses; it holds what it held before. After [`Error::Unknown`] it may be either.
    pub fn rebuild(&mut self, plans: &[Plan]) -> Result<(), Error> {
        let mut transaction = self.transaction_on(&self.table);
        // There must be a table to delete.
        transaction.add_table(self.flags());
        transaction.delete_table();
        let shared = self.add_all(&mut transaction, plans);
        self.socket.carry_out(&transaction.finish())?;
        self.shared = shared;
        Ok(())
    }

    /// Carries a plan out, or nothing of it. A user's first policy, and what changes one that is in force, takes as
    /// many transactions as it has steps; if one is refused, the ones before it are taken back.
    ///
    /// # Errors
    /// If the kernel refuses; it holds what it held before. After [`Error::Unknown`] it may hold any part of the plan.
    pub fn commit(&mut self, plan: &Plan) -> Result<(), Error> {
        if plan.is_empty() {
            return Ok(());
        }
        let elements = plan.element_changes(&self.shared);
        let left_out = || self.transaction().left_out(plan, &elements, &self.shared);
        debug_assert_eq!(left_out(), 0, "a step that is left out has work");
        let has_work = |step: &Step| step.has_work(plan, &elements);
        let steps: Vec<Step> = Step::ALL.into_iter().filter(has_work).collect();
        if steps.is_empty() {
            self.carry_out(|transaction, shared| transaction.plan(plan, shared))?;
        } else {
            self.commit_steps(plan, &elements, &steps)?;
        }
        self.shared.carried_out(plan);
        Ok(())
    }

    /// Carries out one transaction, and notes what the rules look at after it.
    fn carry_out(
        &mut self,
        fill: impl FnOnce(&mut Transaction<'_>, &Shared),
    ) -> Result<(), Failure> {
        let mut transaction = self.transaction();
        fill(&mut transaction, &self.shared);
        let looked_at = std::mem::take(&mut transaction.looked_at);
        self.socket.carry_out(&transaction.finish())?;
        self.shared.looked_at = looked_at;
        Ok(())
    }

    /// Carries out several transactions. In between, what the user has is neither the one layout nor the other, and has
    /// no stamp: a helper that is started then takes it over as it takes over what no snapshot knows.
    fn commit_steps(
        &mut self,
        plan: &Plan,
        elements: &ElementChanges<'_>,
        steps: &[Step],
    ) -> Result<(), Error> {
        let mut done = Vec::new();
        for &step in steps {
            let carried_out = self.carry_out(|transaction, shared| {
                if done.is_empty() {
                    transaction.unstamp(plan);
                }
                transaction.step(plan, elements, step, shared);
                if steps.last() == Some(&step) {
                    transaction.stamp(plan);
                }
            });
            let refusal = match carried_out {
                Ok(()) => {
                    done.push(step);
                    continue;
                }
                Err(Failure::Refused(refusal)) => refusal,
                Err(unknown) => return Err(unknown.into()),
            };
            // The verdicts that were replaced can't be put back from here: only the policy has them and, if an earlier
            // helper made them, nothing has.
            let unknown = matches!(plan.before, Before::LeftBehind(_)) && !done.is_empty();
            if done.contains(&Step::Changes) || unknown {
                return Err(Error::Unknown(refusal));
            }
            if !done.is_empty() {
                let taken_back = self.carry_out(|transaction, shared| {
                    transaction.take_back(plan, elements, &done, shared);
                });
                match taken_back {
                    Ok(()) => {}
                    Err(Failure::Refused(refusal) | Failure::Unknown(refusal)) => {
                        return Err(Error::Unknown(refusal));
                    }
                }
            }
            return Err(Error::Refused(refusal));
        }
        Ok(())
    }

    /// Removes the table with everything in it. No table is no error.
    ///
    /// # Errors
    /// Without CAP_NET_ADMIN, or if another process owns it.
    pub fn remove(marks: MarkRange) -> Result<(), Error> {
        let socket = NetfilterSocket::open().map_err(Error::Socket)?;
        let table = Table::new(TABLE, ProtoFamily::Inet);
        let this = Self {
            socket,
            table,
            settings: Settings {
                marks,
                proxy_uids: Vec::new(),
                own: true,
                udp_verdicts: UdpVerdicts::default(),
            },
            has_fib: false,
            owned: false,
            shared: Shared::default(),
        };
        let mut transaction = this.transaction();
        transaction.delete_table();
        match this.socket.transact(&transaction.finish()) {
            Ok(()) => Ok(()),
            Err(refusal) if refusal.errno == Errno::NOENT => Ok(()),
            // An owned table, left by a helper that is gone, has to be adopted first.
            Err(refusal) if refusal.errno == Errno::PERM => {
                this.kernel_keeps_owned_tables()?;
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

    /// A transaction on the table as it is.
    fn transaction(&self) -> Transaction<'_> {
        let mut transaction = self.transaction_on(&self.table);
        transaction.looked_at.clone_from(&self.shared.looked_at);
        transaction
    }

    /// A transaction on a table that has nothing yet, or is made anew.
    fn transaction_on<'t>(&self, table: &'t Table) -> Transaction<'t> {
        Transaction::new(table, self.settings.marks, self.settings.udp_verdicts)
    }

    fn base(&self) -> Base<'_> {
        Base {
            proxy_uids: &self.settings.proxy_uids,
            has_fib: self.has_fib,
        }
    }

    fn flags(&self) -> u32 {
        if self.owned { OWNER | PERSIST } else { 0 }
    }

    /// Linux 6.9 added `persist`. With `owner` alone the table would go with this process, and every
    /// connection's proxy with it.
    fn kernel_keeps_owned_tables(&self) -> Result<bool, Error> {
        let probe = Table::new(PROBE, ProtoFamily::Inet);
        let mut transaction = self.transaction_on(&probe);
        transaction.add_table(OWNER | PERSIST);
        transaction.delete_table();
        match self.socket.transact(&transaction.finish()) {
            Ok(()) => Ok(true),
            Err(refusal) if refusal.errno == Errno::PERM => Err(Error::NotCapable(refusal)),
            Err(refusal) if is_unsupported(&refusal) => Ok(false),
            // Without protection it would be another table, without what is in force.
            Err(refusal) => Err(Error::Refused(refusal)),
        }
    }

    /// Makes the table anew in place of one of another layout.
    fn recreate(&mut self, plans: &[Plan]) -> Result<(), Error> {
        let mut transaction = self.transaction_on(&self.table);
        transaction.delete_table();
        let shared = self.add_all(&mut transaction, plans);
        match self.socket.transact(&transaction.finish()) {
            Err(refusal) if refusal.errno == Errno::PERM => return Err(Error::Owned(refusal)),
            result => result.map_err(Error::Base)?,
        }
        self.shared = shared;
        Ok(())
    }

    /// Adds the whole table, which is not there.
    fn add_all(&self, transaction: &mut Transaction<'_>, plans: &[Plan]) -> Shared {
        let mut shared = Shared::default();
        transaction.add_table(self.flags());
        transaction.base(&self.base(), &shared, true);
        for plan in plans {
            transaction.plan(plan, &shared);
            shared.carried_out(plan);
        }
        shared.looked_at = transaction.looked_at.clone();
        shared
    }

    /// Makes the table, or takes over the one that is there; false if that has another layout or goes by other marks.
    fn adopt(&self) -> Result<bool, Error> {
        let mut transaction = self.transaction();
        transaction.add_table(self.flags());
        match self.socket.transact(&transaction.finish()) {
            Ok(()) => {}
            Err(refusal) if refusal.errno == Errno::PERM => return Err(Error::Owned(refusal)),
            // The table has other flags than ours.
            Err(refusal) if is_unsupported(&refusal) => return Ok(false),
            Err(refusal) => return Err(Error::Refused(refusal)),
        }
        self.is_there()
    }
}
