//! What the state needs of the kernel. The one seam between what is decided and what is done, where tests put
//! a model of the kernel in.

use crate::nft::{self, MarkWriter, Nftables, Plan, Unread};
use crate::route::{self, Ensured, Family, Routing};

#[cfg(any(test, fuzzing))]
pub(crate) mod model;

/// nf_tables and policy routing, as far as the state is concerned.
pub trait Kernel {
    /// Carries a plan out, or nothing of it.
    ///
    /// # Errors
    /// If the kernel refuses; it holds what it held before. After [`nft::Error::Unknown`] it may hold any part of the
    /// plan.
    fn commit(&mut self, plan: &Plan) -> Result<(), nft::Error>;

    /// Makes the table anew with what these plans add to an empty one, in one transaction.
    ///
    /// # Errors
    /// If the kernel refuses; it holds what it held before. After [`nft::Error::Unknown`] it may be either.
    fn rebuild(&mut self, plans: &[Plan]) -> Result<(), nft::Error>;

    /// Whether the table is there, as far as its version tells.
    ///
    /// # Errors
    /// If the kernel does not say.
    fn has_table(&self) -> Result<bool, nft::Error>;

    /// Whether the table is protected from other programs.
    fn owned(&self) -> bool;

    /// Sees to it that a family's rule and route are there, as far as the kernel and lo have the family.
    ///
    /// # Errors
    /// If the kernel refuses for another reason.
    fn ensure_routing(&self, family: Family) -> Result<Ensured, route::Error>;

    /// What the kernel lacks of what proxies need: in nft's words, or `ctnetlink`.
    fn missing_features(&self) -> Vec<&'static str>;

    /// The tables of others that change our bits of marks.
    ///
    /// # Errors
    /// If they can't be read in a short time.
    fn mark_writers(&self) -> Result<Vec<MarkWriter>, Unread>;
}

/// The kernel that this runs on.
pub struct Linux {
    nftables: Nftables,
    routing: Routing,
}

impl Linux {
    /// The kernel behind these sockets.
    #[must_use]
    pub fn new(nftables: Nftables, routing: Routing) -> Self {
        Self { nftables, routing }
    }
}

impl Kernel for Linux {
    fn commit(&mut self, plan: &Plan) -> Result<(), nft::Error> {
        self.nftables.commit(plan)
    }

    fn rebuild(&mut self, plans: &[Plan]) -> Result<(), nft::Error> {
        self.nftables.rebuild(plans)
    }

    fn has_table(&self) -> Result<bool, nft::Error> {
        self.nftables.is_there()
    }

    fn owned(&self) -> bool {
        self.nftables.owned()
    }

    fn ensure_routing(&self, family: Family) -> Result<Ensured, route::Error> {
        self.routing.ensure(family)
    }

    fn missing_features(&self) -> Vec<&'static str> {
        self.nftables.missing_features()
    }

    fn mark_writers(&self) -> Result<Vec<MarkWriter>, Unread> {
        self.nftables.mark_writers()
    }
}
