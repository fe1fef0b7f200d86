//! Who holds each user's policy, and what becomes of it when its agent is gone.

use super::{ConnectionId, Error, State};
use crate::kernel::Kernel;
use crate::nft;
use crate::peer::Uid;
use crate::registry::Remains;

/// Tells graces apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct GraceId(u64);

/// Whose a user's policy is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holder {
    /// Nobody's: there is none.
    None,
    /// This connection's.
    Connection(ConnectionId),
    /// The agent is gone, and what `on-agent-loss` says becomes of the policy when this grace period ends,
    /// unless another agent takes it over.
    Grace(GraceId),
    /// The grace was over without an agent. What is left of the policy stays until one comes, or until the user's
    /// service manager is gone.
    Kept(GraceId),
}

/// What became of a policy without an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It has one again.
    TakenOver,
    /// It is gone.
    Removed,
    /// What the configuration says is kept of it.
    Kept,
}

impl<K: Kernel> State<K> {
    /// Who holds a user's policy.
    #[must_use]
    pub fn holder(&self, uid: Uid) -> Holder {
        self.holders.get(&uid).copied().unwrap_or(Holder::None)
    }

    /// Checks that this connection holds the user's policy.
    ///
    /// # Errors
    /// If it does not.
    pub fn holds(&self, uid: Uid, connection: ConnectionId) -> Result<(), Error> {
        match self.holder(uid) == Holder::Connection(connection) {
            true => Ok(()),
            false => Err(Error::NoSession),
        }
    }

    /// Checks that no other connection holds the user's policy.
    ///
    /// # Errors
    /// If one does.
    pub fn may_replace(&self, uid: Uid, connection: ConnectionId) -> Result<(), Error> {
        match self.holder(uid) {
            Holder::Connection(holder) if holder != connection => Err(Error::SessionExists),
            _ => Ok(()),
        }
    }

    /// A connection has ended. If it held a policy, returns the grace period that begins now.
    pub fn disconnected(&mut self, uid: Uid, connection: ConnectionId) -> Option<GraceId> {
        (self.holder(uid) == Holder::Connection(connection)).then(|| self.begin_grace(uid))
    }

    /// A grace period is over: what becomes of the policy is the configuration's decision, unless a connection
    /// has taken it over.
    ///
    /// # Errors
    /// If the kernel refuses; the policy is what it was then.
    pub fn grace_is_over(&mut self, uid: Uid, grace: GraceId) -> Result<Outcome, nft::Error> {
        if self.holder(uid) != Holder::Grace(grace) {
            return Ok(Outcome::TakenOver);
        }
        self.rebuild_if_doubtful()?;
        let remains = match self.may_keep(uid) {
            true => self.registry.remains(uid, self.config.on_agent_loss),
            false => Remains::Nothing,
        };
        match remains {
            Remains::Nothing => {
                self.remove_policy(uid)?;
                return Ok(Outcome::Removed);
            }
            Remains::Part(staged) => {
                self.commit(*staged)?;
            }
            Remains::All => {}
        }
        self.holders.insert(uid, Holder::Kept(grace));
        Ok(Outcome::Kept)
    }

    /// Removes what is kept of a user's policy once nobody can be there any more for whom it is kept. It is
    /// kept since that grace.
    ///
    /// # Errors
    /// If the kernel refuses; it is still there then.
    pub fn look_after_kept(&mut self, uid: Uid, grace: GraceId) -> Result<Outcome, nft::Error> {
        if self.holder(uid) != Holder::Kept(grace) {
            return Ok(Outcome::TakenOver);
        }
        // It may also have been lost with the table, if no snapshot knew it.
        if self.registry.has(uid) && self.may_keep(uid) {
            return Ok(Outcome::Kept);
        }
        self.remove_policy(uid)?;
        Ok(Outcome::Removed)
    }

    /// Whether there is still somebody who may come for it: the user's service manager runs, and it is the same.
    /// What can't be told at the moment is no reason to let go of a drop.
    fn may_keep(&mut self, uid: Uid) -> bool {
        let subtree = self.registry.subtree(uid);
        subtree.is_none_or(|subtree| self.root.has_subtree(uid, subtree)) && self.gate.may_keep(uid)
    }

    /// Nobody holds the policy any more, and this grace begins.
    pub(super) fn begin_grace(&mut self, uid: Uid) -> GraceId {
        self.graces += 1;
        let grace = GraceId(self.graces);
        self.holders.insert(uid, Holder::Grace(grace));
        grace
    }
}
