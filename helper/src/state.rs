//! The helper's state, and the one way in which it changes: stage, commit, apply.

use std::collections::BTreeMap;
use std::time::Duration;

use cgtproxy_proto::path::ControlGroupPath;
use rustix::io::Errno;
use tokio::time::Instant;

use crate::access::Gate;
use crate::cgroup::{OwnedControlGroup, Root, Subtree, Unavailable};
use crate::config::Config;
use crate::conntrack::Conntrack;
use crate::freshness;
use crate::kernel::{Kernel, Linux};
use crate::nft::{self, Inherited, MarkWriter};
use crate::peer::{Account, Uid};
use crate::registry::{PolicyRequest, Refused, Registry, Staged};
use crate::route::{self, Ensured, Family};
use crate::said::Said;
use crate::snapshot::Snapshot;

mod holder;
mod redirected;

pub use holder::{GraceId, Holder, Outcome};

/// Tells connections apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ConnectionId(pub u64);

/// Why a change was not made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another connection holds the user's policy.
    #[error("another agent of this user is connected")]
    SessionExists,
    /// This connection holds no policy.
    #[error("this connection has no policy")]
    NoSession,
    /// The change contradicts a limit or itself.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The kernel refused it.
    #[error(transparent)]
    Kernel(#[from] nft::Error),
    /// Control groups can't be opened now, for no fault of theirs.
    #[error(
        "the kernel can't open control groups at the moment: too many open files, or no memory"
    )]
    Later,
    /// No proxy of the user's receives such a connection.
    #[error("no such connection was redirected")]
    NotRedirected,
    /// The kernel can't tell.
    #[error("can't look connections up")]
    Conntrack(#[source] nft::Refusal),
}

/// For how long what was found about the machine is good: at least, and at most if looking takes long.
const DIAGNOSIS_HOLDS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// What may be in the way on this machine.
#[derive(Debug, Clone)]
pub struct Diagnosis {
    /// What the kernel lacks of what proxies need: in nft's words, or `ctnetlink`.
    pub missing_features: Vec<&'static str>,
    /// The tables of others that change our bits of marks; none if they can't be read, or not in a short time.
    pub mark_writers: Option<Vec<MarkWriter>>,
}

/// Everything that the helper knows, shared by all connections of the one thread.
pub struct State<K = Linux> {
    /// What the administrator wants.
    pub config: Config,
    /// Where control groups are looked up.
    pub root: Root,
    ipv6: bool,
    kernel: K,
    registry: Registry,
    /// The kernel may hold something else than the registry says: its answer to a change was lost, or the table was.
    doubtful: bool,
    /// What the next helper is told.
    snapshot: Snapshot,
    /// Open once it has been of use.
    conntrack: Option<Conntrack>,
    holders: BTreeMap<Uid, Holder>,
    /// How many there were.
    graces: u64,
    gate: Gate,
    /// The last one, and until when it is good.
    diagnosis: Option<(Instant, Diagnosis)>,
    /// Why others' rules can't be looked at.
    unreadable: Said,
}

/// A control group that was asked for and can't be had.
pub type Skipped = (ControlGroupPath, Unavailable);

impl<K: Kernel> State<K> {
    /// The state at the start, with what an earlier helper left, whose graces are to be awaited.
    /// Sets policy routing up.
    ///
    /// # Errors
    /// If the kernel refuses that.
    pub fn new(
        config: Config,
        root: Root,
        kernel: K,
        mut snapshot: Snapshot,
        left: BTreeMap<Uid, Inherited>,
    ) -> Result<(Self, Vec<(Uid, GraceId)>), route::Error> {
        let mut registry = Registry::new(config.limits, config.marks);
        let uids: Vec<Uid> = left.keys().copied().collect();
        for (uid, left) in left {
            registry.adopt(uid, left);
        }
        snapshot.renew(config.marks, registry.layouts());
        let gate = Gate::new(config.access.clone(), root.spare());
        let mut this = Self {
            config,
            root,
            ipv6: true,
            kernel,
            registry,
            doubtful: false,
            snapshot,
            conntrack: None,
            holders: BTreeMap::new(),
            graces: 0,
            gate,
            diagnosis: None,
            unreadable: Said::default(),
        };
        this.ensure_routing()?;
        let graces = uids
            .into_iter()
            .map(|uid| (uid, this.begin_grace(uid)))
            .collect();
        Ok((this, graces))
    }

    /// All policies.
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Whether IPv6 is diverted: false if the kernel has none, or it is switched off on lo.
    #[must_use]
    pub fn ipv6(&self) -> bool {
        self.ipv6
    }

    /// Sees to it that the rules and routes are there, IPv6's as far as it is there itself; [`Self::ipv6`] says so then.
    /// Returns whether one of them was missing.
    ///
    /// # Errors
    /// If the kernel refuses them.
    pub fn ensure_routing(&mut self) -> Result<bool, route::Error> {
        let ipv4 = self.kernel.ensure_routing(Family::Ipv4)?;
        let ipv6 = self.kernel.ensure_routing(Family::Ipv6)?;
        self.ipv6 = ipv6 != Ensured::NoFamily;
        Ok([ipv4, ipv6].contains(&Ensured::Restored))
    }

    /// Makes the table anew as it should be, in one transaction.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn rebuild_table(&mut self) -> Result<(), nft::Error> {
        self.kernel
            .rebuild(&self.registry.rebuild())
            .inspect_err(|error| self.doubtful |= matches!(error, nft::Error::Unknown(_)))?;
        self.registry.rebuilt();
        self.doubtful = false;
        Ok(())
    }

    /// Makes the table anew if it is gone, and returns whether it was. What others do to it before somebody listens to
    /// the kernel's announcements is announced to nobody.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn restore_lost_table(&mut self) -> Result<bool, nft::Error> {
        if self.kernel.has_table()? {
            return Ok(false);
        }
        self.rebuild_table()?;
        Ok(true)
    }

    /// Looks at the machine, unless that was done a moment ago.
    pub fn diagnose(&mut self) -> Diagnosis {
        let start = Instant::now();
        if let Some((until, diagnosis)) = &self.diagnosis
            && start < *until
        {
            return diagnosis.clone();
        }
        // It takes sockets of its own.
        let spare = self.root.spare();
        let _room = spare.make_room();
        let mark_writers = self.kernel.mark_writers();
        match &mark_writers {
            Ok(_) => {
                self.unreadable.works();
            }
            // Whoever asks, and however often.
            Err(error) if self.unreadable.is_news(&error.to_string()) => {
                tracing::warn!("can't look at other programs' nftables rules: {error}");
            }
            Err(_) => {}
        }
        let diagnosis = Diagnosis {
            missing_features: self.kernel.missing_features(),
            mark_writers: mark_writers.ok(),
        };
        let end = Instant::now();
        let holds = freshness::holds(end - start, DIAGNOSIS_HOLDS.0, DIAGNOSIS_HOLDS.1);
        self.diagnosis = Some((end + holds, diagnosis.clone()));
        diagnosis
    }

    /// Whether the kernel protects the table.
    #[must_use]
    pub fn table_owned(&self) -> bool {
        self.kernel.owned()
    }

    /// Replaces the policy of a user on behalf of a connection, which holds it from then on.
    ///
    /// # Errors
    /// If another connection holds it, or the change is refused; nothing has changed then.
    pub fn replace(
        &mut self,
        uid: Uid,
        connection: ConnectionId,
        subtree: &Subtree,
        policy: PolicyRequest,
        assignments: BTreeMap<ControlGroupPath, nft::Element>,
    ) -> Result<(u64, Vec<Skipped>), Error> {
        self.may_replace(uid, connection)?;
        self.rebuild_if_doubtful()?;
        let mut skipped = Vec::new();
        let open = opener(subtree, &mut skipped);
        let staged = self.registry.replace(uid, policy, assignments, open)?;
        all_seen(&skipped)?;
        let generation = self.commit(staged)?;
        self.holders.insert(uid, Holder::Connection(connection));
        Ok((generation, skipped))
    }

    /// Changes single verdicts of the policy that a connection holds.
    ///
    /// # Errors
    /// If it holds none, or the change is refused; nothing has changed then.
    pub fn update(
        &mut self,
        uid: Uid,
        connection: ConnectionId,
        subtree: &Subtree,
        assign: BTreeMap<ControlGroupPath, nft::Element>,
        remove: std::collections::BTreeSet<ControlGroupPath>,
    ) -> Result<(u64, Vec<Skipped>), Error> {
        self.holds(uid, connection)?;
        self.rebuild_if_doubtful()?;
        let mut skipped = Vec::new();
        let open = opener(subtree, &mut skipped);
        let staged = self
            .registry
            .update(uid, subtree.top(), assign, remove, open)?;
        all_seen(&skipped)?;
        let generation = self.commit(staged)?;
        Ok((generation, skipped))
    }

    /// Whether a user may connect.
    pub fn allows(&mut self, account: Account, uid: Uid) -> bool {
        self.gate.allows(account, uid)
    }

    /// Removes the policy that a connection holds.
    ///
    /// # Errors
    /// If it holds none, or the kernel refuses.
    pub fn remove(&mut self, uid: Uid, connection: ConnectionId) -> Result<(), Error> {
        self.holds(uid, connection)?;
        self.remove_policy(uid)?;
        Ok(())
    }

    fn remove_policy(&mut self, uid: Uid) -> Result<(), nft::Error> {
        self.rebuild_if_doubtful()?;
        let staged = self.registry.remove(uid);
        self.commit(staged)?;
        self.holders.remove(&uid);
        Ok(())
    }

    fn commit(&mut self, staged: Staged) -> Result<u64, nft::Error> {
        if let Some((uid, stamp, layout)) = staged.plan().coming() {
            self.snapshot.add(uid, stamp, layout);
        }
        if let Err(error) = self.kernel.commit(staged.plan()) {
            let doubtful = match &error {
                nft::Error::Unknown(_) => true,
                // What it was to change is not there; perhaps nothing is. The kernel also says so of what it can't do.
                nft::Error::Refused(refusal) if refusal.errno == Errno::NOENT => {
                    !self.kernel.has_table().unwrap_or(true)
                }
                _ => false,
            };
            if doubtful {
                self.doubtful = true;
                self.rebuild_if_doubtful()?;
            }
            // What was refused stays written down, and may be refused any number of times.
            self.shorten_snapshot();
            return Err(match error {
                // What it may have changed is as it was.
                nft::Error::Unknown(refusal) => nft::Error::Refused(refusal),
                error => error,
            });
        }
        let generation = self.registry.apply(staged);
        self.shorten_snapshot();
        Ok(generation)
    }

    fn shorten_snapshot(&mut self) {
        if self.snapshot.is_long() {
            self.snapshot
                .renew(self.config.marks, self.registry.layouts());
        }
    }

    /// Makes the table what the registry says, if it may be something else. A change whose outcome nobody
    /// knows has not happened then, and what is staged next fits what is there.
    fn rebuild_if_doubtful(&mut self) -> Result<(), nft::Error> {
        match self.doubtful {
            true => self.rebuild_table(),
            false => Ok(()),
        }
    }
}

/// Checks that what was skipped was skipped for good: nobody would ask for it again.
fn all_seen(skipped: &[Skipped]) -> Result<(), Error> {
    match skipped.iter().any(|(_, why)| *why == Unavailable::Later) {
        true => Err(Error::Later),
        false => Ok(()),
    }
}

/// Opens control groups below a subtree, and notes those that can't be had.
fn opener<'a>(
    subtree: &'a Subtree,
    skipped: &'a mut Vec<Skipped>,
) -> impl FnMut(&ControlGroupPath) -> Option<OwnedControlGroup> + 'a {
    |path| match subtree.open(path) {
        Ok(cgroup) => Some(cgroup),
        Err(why) => {
            skipped.push((path.clone(), why));
            None
        }
    }
}

#[cfg(test)]
mod tests;
