//! What every user has: policies, limits, and how a change of one becomes a [`Plan`]. No I/O: a change is
//! staged, committed to the kernel by the caller, and applied here only when the kernel took it.

use std::collections::BTreeMap;

use cgtproxy_proto::name::ProxyName;
use cgtproxy_proto::path::ControlGroupPath;

use crate::cgroup::{ControlGroupId, OwnedControlGroup, Top};
use crate::config::Limits;
use crate::mark::{MarkAllocator, MarkRange};
use crate::nft::{
    Before, Bypass, Element, Gateway, Inherited, Known, Layout, LeftBehind, Plan, ProxySettings,
    Stamp, Stamped,
};
use crate::peer::Uid;

mod allot;
mod change;
mod remains;
mod stage;

use change::Census;
pub use remains::Remains;

/// Why a change can't be staged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// There is no policy to change.
    #[error("there is no policy yet")]
    NoPolicy,
    /// Two proxies have this name.
    #[error("two proxies are named '{0}'")]
    ProxyExists(ProxyName),
    /// No proxy has this name.
    #[error("no proxy is named '{0}'")]
    UnknownProxy(ProxyName),
    /// More proxies than a user may have.
    #[error("more than {0} proxies")]
    TooManyProxies(usize),
    /// More bypass entries than a user may have.
    #[error("more than {0} bypass entries")]
    TooManyBypassEntries(usize),
    /// More control groups than a user may have.
    #[error("more than {0} control groups with a verdict of their own")]
    TooManyControlGroups(usize),
    /// Every mark of the range is in use.
    #[error("all marks of the mark range are in use")]
    NoMarksLeft,
}

/// A policy's part that is not about single control groups.
#[derive(Debug)]
pub struct PolicyRequest {
    /// The user's user@UID.service; the control group root for the system's policy.
    pub subtree: Top,
    /// All proxies, by name.
    pub proxies: Vec<(ProxyName, ProxySettings)>,
    /// How many bypass entries were asked for.
    pub bypass_entries: usize,
    /// What they come to.
    pub bypass: Bypass,
    /// What is forwarded.
    pub gateway: Option<Gateway>,
}

/// A user's policy that is in force.
#[derive(Debug, Clone, Copy)]
pub struct InForce<'a> {
    /// Everything but single control groups' verdicts.
    pub layout: &'a Layout,
    /// How many control groups have a verdict of their own.
    pub cgroups: usize,
    /// How often the policy was changed; 0 of what an earlier helper left, or an agent that did not come back.
    pub generation: u64,
}

/// A policy as the kernel has it.
#[derive(Debug, Clone)]
struct User {
    stamped: Stamped,
    cgroups: BTreeMap<ControlGroupPath, (OwnedControlGroup, Element)>,
    census: Census,
    generation: u64,
}

/// What a user has in the kernel, and how much is known of it.
#[derive(Debug, Clone)]
enum Entry {
    /// A policy that an agent has given this helper.
    Policy(User),
    /// What an earlier helper left and a snapshot describes: everything but the paths of control groups.
    Known(Known),
    /// What an earlier helper left and no snapshot describes.
    LeftBehind(LeftBehind),
}

impl Entry {
    /// The layout that the kernel has, if it is known.
    fn stamped(&self) -> Option<&Stamped> {
        match self {
            Self::Policy(user) => Some(&user.stamped),
            Self::Known(known) => Some(&known.stamped),
            Self::LeftBehind(_) => None,
        }
    }

    /// The elements that the kernel has, as far as they are known.
    fn elements(&self) -> impl Iterator<Item = &(OwnedControlGroup, Element)> {
        let (policy, known) = match self {
            Self::Policy(user) => (Some(user.cgroups.values()), None),
            Self::Known(known) => (None, Some(known.elements.iter())),
            Self::LeftBehind(_) => (None, None),
        };
        let known = known.into_iter().flatten();
        policy.into_iter().flatten().chain(known)
    }
}

/// A change that is ready to be committed.
#[derive(Debug)]
pub struct Staged {
    plan: Plan,
    marks: Option<MarkAllocator>,
    effect: Effect,
}

#[derive(Debug)]
enum Effect {
    Replace(User),
    Change {
        stamped: Stamped,
        census: Census,
        cgroups: Vec<(ControlGroupPath, Option<(OwnedControlGroup, Element)>)>,
    },
    Reduce(Known),
    Remove,
}

impl Staged {
    /// What the kernel has to do first.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }
}

/// All users' policies.
#[derive(Debug, Clone)]
pub struct Registry {
    limits: Limits,
    marks: MarkAllocator,
    users: BTreeMap<Uid, Entry>,
}

impl Registry {
    /// No user has anything.
    #[must_use]
    pub fn new(limits: Limits, range: MarkRange) -> Self {
        Self {
            limits,
            marks: MarkAllocator::new(range),
            users: BTreeMap::new(),
        }
    }

    /// Takes over what an earlier helper left in the kernel. Its marks stay with its proxies, so
    /// that open connections keep theirs.
    pub fn adopt(&mut self, uid: Uid, left: Inherited) {
        let entry = match left {
            Inherited::Known(known) => Entry::Known(known),
            Inherited::LeftBehind(left) => Entry::LeftBehind(left),
        };
        self.users.insert(uid, entry);
        for (_, mark) in self.before(uid).marks() {
            if !self.marks.adopt(mark) {
                tracing::warn!(
                    uid = uid.value(),
                    "an earlier helper left a proxy with the mark {:#010x}, which is another one's, or none of ours",
                    mark.value()
                );
            }
        }
    }

    /// Makes a change true that the kernel has carried out. Returns the user's generation.
    pub fn apply(&mut self, staged: Staged) -> u64 {
        let uid = staged.plan.uid;
        if let Some(marks) = staged.marks {
            self.marks = marks;
        }
        match staged.effect {
            Effect::Replace(mut user) => {
                user.generation += 1;
                let generation = user.generation;
                self.users.insert(uid, Entry::Policy(user));
                generation
            }
            Effect::Change {
                stamped,
                census,
                cgroups,
            } => {
                let Some(Entry::Policy(user)) = self.users.get_mut(&uid) else {
                    return 0;
                };
                user.stamped = stamped;
                user.census = census;
                for (path, cgroup) in cgroups {
                    match cgroup {
                        Some(cgroup) => user.cgroups.insert(path, cgroup),
                        None => user.cgroups.remove(&path),
                    };
                }
                user.generation += 1;
                user.generation
            }
            Effect::Reduce(known) => {
                self.users.insert(uid, Entry::Known(known));
                0
            }
            Effect::Remove => {
                self.users.remove(&uid);
                0
            }
        }
    }

    /// What an empty table needs to be as it was.
    #[must_use]
    pub fn rebuild(&self) -> Vec<Plan> {
        // What no snapshot describes is known to the table alone.
        let plan = |(&uid, entry): (&Uid, &Entry)| {
            let elements = entry.elements().cloned();
            let stamped = entry.stamped()?.clone();
            Some(Plan::from_nothing(uid, stamped, elements.collect()))
        };
        self.users.iter().filter_map(plan).collect()
    }

    /// The table is as [`Self::rebuild`] said, and has nothing else.
    pub fn rebuilt(&mut self) {
        let left: Vec<Uid> = self
            .users
            .iter()
            .filter(|(_, entry)| matches!(entry, Entry::LeftBehind(_)))
            .map(|(&uid, _)| uid)
            .collect();
        for uid in left {
            for (_, mark) in self.before(uid).marks() {
                self.marks.free(uid, mark);
            }
            self.users.remove(&uid);
        }
    }

    /// What a user has, as far as it is known.
    #[must_use]
    pub fn policy(&self, uid: Uid) -> Option<InForce<'_>> {
        let entry = self.users.get(&uid)?;
        let layout = &entry.stamped()?.layout;
        let (cgroups, generation) = match entry {
            Entry::Policy(user) => (user.cgroups.len(), user.generation),
            Entry::Known(known) => (known.elements.len(), 0),
            Entry::LeftBehind(_) => return None,
        };
        Some(InForce {
            layout,
            cgroups,
            generation,
        })
    }

    /// All layouts that are known, by the names that the kernel has for them.
    pub fn layouts(&self) -> impl Iterator<Item = (Uid, Stamp, &Layout)> {
        self.users.iter().filter_map(|(&uid, entry)| {
            let stamped = entry.stamped()?;
            Some((uid, stamped.stamp, &*stamped.layout))
        })
    }

    /// Whether a user has anything in the kernel.
    #[must_use]
    pub fn has(&self, uid: Uid) -> bool {
        self.users.contains_key(&uid)
    }

    /// The one place where limits are checked: what a user would have against what one may have.
    ///
    /// # Errors
    /// With the first limit that it breaks.
    pub fn admit(&self, proxies: usize, bypass: usize, cgroups: usize) -> Result<(), Refused> {
        if proxies > self.limits.proxies {
            return Err(Refused::TooManyProxies(self.limits.proxies));
        }
        if bypass > self.limits.bypass {
            return Err(Refused::TooManyBypassEntries(self.limits.bypass));
        }
        if cgroups > self.limits.control_groups {
            return Err(Refused::TooManyControlGroups(self.limits.control_groups));
        }
        Ok(())
    }

    /// The control group that leads to what a user has, if it is known.
    #[must_use]
    pub fn subtree(&self, uid: Uid) -> Option<ControlGroupId> {
        match self.users.get(&uid)? {
            Entry::LeftBehind(left) => left.subtree,
            entry => Some(entry.stamped()?.layout.subtree.id()),
        }
    }

    fn before(&self, uid: Uid) -> Before {
        match self.users.get(&uid) {
            None => Before::Nothing,
            Some(Entry::Policy(User { stamped, .. }) | Entry::Known(Known { stamped, .. })) => {
                Before::Layout(stamped.clone())
            }
            Some(Entry::LeftBehind(left)) => Before::LeftBehind(left.clone()),
        }
    }
}

#[cfg(test)]
mod tests;
