//! The table `inet cgtproxy`, for as long as this process changes it: made or taken over, changed, and removed.

use std::collections::BTreeMap;

use nftnl::{ProtoFamily, Table};
use rustix::io::Errno;

use super::ffi::table_flags::{OWNER, PERSIST};
use super::plan::{Before, ElementChanges, Inherited, Plan, Records, Step};
use super::policy::UdpVerdicts;
use super::ruleset::{self, Base};
use super::shared::Shared;
use super::socket::{Failure, NetfilterSocket};
use super::transaction::Transaction;
use super::{Error, PROBE, TABLE};
use crate::mark::MarkRange;
use crate::netlink::Refusal;
use crate::peer::Uid;

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
    pub(super) socket: NetfilterSocket,
    table: Table,
    pub(super) settings: Settings,
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
        let mut this = Self::new(settings)?;
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
            let made = this.make_anew(&plans, true).map_err(Refusal::from);
            made.map_err(|refusal| match refusal.errno {
                Errno::PERM => Error::Owned(refusal),
                _ => Error::Base(refusal),
            })?;
            if !chains.is_empty() && !chains.iter().any(|chain| ruleset::is_version(chain)) {
                tracing::warn!(
                    "replaced another program's table 'inet cgtproxy': if the original cgtproxy runs, \
                     'systemctl disable --now cgtproxy.service' ends it"
                );
            }
        }
        Ok((this, inherited))
    }

    fn new(settings: Settings) -> Result<Self, Error> {
        Ok(Self {
            socket: NetfilterSocket::open().map_err(Error::Socket)?,
            table: Table::new(TABLE, ProtoFamily::Inet),
            settings,
            has_fib: false,
            owned: false,
            shared: Shared::default(),
        })
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
        Ok(self.make_anew(plans, false)?)
    }

    /// As [`Self::rebuild`]. A table that is there may have other flags than ours, with which it can't be added.
    fn make_anew(&mut self, plans: &[Plan], is_there: bool) -> Result<(), Failure> {
        let mut transaction = self.transaction_on(&self.table);
        if !is_there {
            // There must be a table to delete.
            transaction.add_table(self.flags());
        }
        transaction.delete_table();
        transaction.add_table(self.flags());
        let mut shared = Shared::default();
        transaction.base(&self.base(), &shared, true);
        for plan in plans {
            transaction.plan(plan, &shared);
            shared.carried_out(plan);
        }
        shared.looked_at = transaction.looked_at.clone();
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
                taken_back.map_err(|failure| Error::Unknown(failure.into()))?;
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
        let this = Self::new(Settings {
            marks,
            proxy_uids: Vec::new(),
            own: true,
            udp_verdicts: UdpVerdicts::default(),
        })?;
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
    pub(super) fn transaction_on<'t>(&self, table: &'t Table) -> Transaction<'t> {
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

/// Whether the kernel does not know these flags of a table, or can't change the table's to them (`nf_tables_newtable` and
/// `nf_tables_updtable`, net/netfilter/nf_tables_api.c).
fn is_unsupported(refusal: &Refusal) -> bool {
    matches!(refusal.errno, Errno::OPNOTSUPP | Errno::INVAL)
}
