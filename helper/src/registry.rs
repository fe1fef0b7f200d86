//! What every user has: policies, limits, and how a change of one becomes a [`Plan`]. No I/O: a change is
//! staged, committed to the kernel by the caller, and applied here only when the kernel took it.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use cgtproxy_proto::name::ProxyName;
use cgtproxy_proto::path::ControlGroupPath;

use crate::cgroup::{ControlGroupId, OwnedControlGroup, Top};
use crate::config::Limits;
use crate::mark::{MarkAllocator, MarkRange};
use crate::nft::{
    Before, Bypass, BypassList, Delivery, DnsHijack, Element, Exceptions, Fakes, Gateway,
    Inherited, Known, Layout, LeftBehind, Plan, Proxy, Stamp, Stamped, Verdict,
};
use crate::peer::Uid;

mod change;
mod remains;

use change::{Census, Changes};
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

/// A proxy as a policy asks for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyRequest {
    /// Its name.
    pub name: ProxyName,
    /// Where it listens.
    pub delivery: Delivery,
    /// What goes direct.
    pub exceptions: Exceptions,
    /// UDP is refused.
    pub reject_udp: bool,
    /// Where DNS queries go.
    pub dns_hijack: Option<DnsHijack>,
    /// What stands for names.
    pub fakes: Fakes,
}

/// A policy's part that is not about single control groups.
#[derive(Debug)]
pub struct PolicyRequest {
    /// The user's user@UID.service; the control group root for the system's policy.
    pub subtree: Top,
    /// All proxies.
    pub proxies: Vec<ProxyRequest>,
    /// How many bypass entries were asked for.
    pub bypass_entries: usize,
    /// What they come to.
    pub bypass: Bypass,
    /// What is forwarded.
    pub gateway: Option<Gateway>,
}

/// What of a user's is in force.
#[derive(Debug, Clone, Copy)]
pub struct InForce<'a> {
    /// Everything but single control groups' verdicts.
    pub layout: &'a Layout,
    /// How many control groups have a verdict of their own.
    pub cgroups: usize,
    /// How often the policy was changed; 0 of what an earlier helper left, or an agent that did not come back.
    pub generation: u64,
}

/// What a user has in the kernel.
#[derive(Debug, Clone)]
struct User {
    stamped: Stamped,
    cgroups: BTreeMap<ControlGroupPath, (OwnedControlGroup, Element)>,
    census: Census,
    generation: u64,
}

/// A user's state, or what an earlier helper left of one.
#[derive(Debug, Clone)]
enum Entry {
    Policy(User),
    /// It is known what that is, but not by which paths.
    Known(Known),
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
            self.marks.adopt(mark);
        }
    }

    /// Stages a whole new policy. `cgroups` are opened only after the limits have been checked.
    ///
    /// # Errors
    /// If it breaks a limit or contradicts itself.
    pub fn replace(
        &self,
        uid: Uid,
        policy: PolicyRequest,
        assignments: BTreeMap<ControlGroupPath, Element>,
        mut open: impl FnMut(&ControlGroupPath) -> Option<OwnedControlGroup>,
    ) -> Result<Staged, Refused> {
        self.admit(
            policy.proxies.len(),
            policy.bypass_entries,
            assignments.len(),
        )?;
        let before = self.before(uid);
        let (proxies, marks) = self.assign_marks(&before, policy.proxies)?;
        for element in assignments.values() {
            known(&proxies, &element.verdict)?;
        }
        if let Some(gateway) = &policy.gateway {
            known(&proxies, &Verdict::Proxy(gateway.proxy.clone()))?;
        }
        let mut census = Census::default();
        let opened = assignments.into_iter().filter_map(|(path, element)| {
            let cgroup = open(&path)?;
            census.add(cgroup, &element);
            Some((path, (cgroup, element)))
        });
        let cgroups: BTreeMap<_, _> = opened.collect();
        let layout = Rc::new(Layout {
            subtree: policy.subtree,
            proxies,
            bypass: self.list_of(policy.bypass),
            levels: census.levels(),
            holds: census.holds(),
            enforced: census.enforced(),
            holds_back: census.holds_back(),
            gateway: policy.gateway,
        });
        let entry = self.users.get(&uid);
        let stamped = Stamped::after(entry.and_then(Entry::stamped), layout);
        let generation = match entry {
            Some(Entry::Policy(user)) => user.generation,
            Some(Entry::Known(_) | Entry::LeftBehind(_)) | None => 0,
        };
        let mut changes = Changes::default();
        for (cgroup, element) in entry.into_iter().flat_map(Entry::elements) {
            changes.had(*cgroup, element);
        }
        for (cgroup, element) in cgroups.values() {
            changes.has(*cgroup, element);
        }
        let (delete, add) = changes.finish();
        Ok(Staged {
            plan: Plan {
                uid,
                before,
                after: Some(stamped.clone()),
                delete,
                add,
            },
            marks: Some(marks),
            effect: Effect::Replace(User {
                stamped,
                cgroups,
                census,
                generation,
            }),
        })
    }

    /// Stages a change of some control groups' verdicts.
    ///
    /// # Errors
    /// If it breaks a limit or names a proxy that the policy has not.
    pub fn update(
        &self,
        uid: Uid,
        subtree: Top,
        assign: BTreeMap<ControlGroupPath, Element>,
        remove: BTreeSet<ControlGroupPath>,
        mut open: impl FnMut(&ControlGroupPath) -> Option<OwnedControlGroup>,
    ) -> Result<Staged, Refused> {
        let Some(Entry::Policy(user)) = self.users.get(&uid) else {
            return Err(Refused::NoPolicy);
        };
        let old_layout = &user.stamped.layout;
        // Each is looked up once.
        let removed: Vec<_> = remove
            .into_iter()
            .filter(|path| !assign.contains_key(path))
            .filter_map(|path| user.cgroups.get(&path).map(|old| (path, old)))
            .collect();
        let assigned: Vec<_> = assign
            .into_iter()
            .map(|(path, element)| (user.cgroups.get(&path), path, element))
            .collect();
        let added = assigned.iter().filter(|(old, ..)| old.is_none()).count();
        self.admit(0, 0, user.cgroups.len() + added - removed.len())?;
        for (_, _, element) in &assigned {
            known(&old_layout.proxies, &element.verdict)?;
        }

        let mut before = Vec::with_capacity(removed.len() + assigned.len());
        let mut cgroups = Vec::with_capacity(removed.len() + assigned.len());
        for (path, old) in removed {
            before.push(old);
            cgroups.push((path, None));
        }
        for (old, path, element) in assigned {
            let opened = open(&path).map(|cgroup| (cgroup, element));
            before.extend(old);
            // If the control group is gone, the verdict goes as well that an earlier one of this name had.
            if opened.is_some() || old.is_some() {
                cgroups.push((path, opened));
            }
        }
        let mut census = user.census.clone();
        let mut changes = Changes::default();
        for (cgroup, element) in before {
            changes.had(*cgroup, element);
            census.remove(*cgroup, element);
        }
        for (cgroup, element) in cgroups.iter().filter_map(|(_, new)| new.as_ref()) {
            changes.has(*cgroup, element);
            census.add(*cgroup, element);
        }
        // A level that no control group needs any more is left out one change later: what starts next is often what has
        // just ended, and writing another layout takes longer than everything else that a new control group needs.
        let holds_back = census.holds_back() || user.census.holds_back();
        let same = census.is_of(old_layout)
            && census.levels_are(&user.census, &old_layout.levels)
            && holds_back == old_layout.holds_back
            && subtree == old_layout.subtree;
        let layout = if same {
            Rc::clone(old_layout)
        } else {
            Rc::new(Layout {
                subtree,
                levels: &census.levels() | &user.census.levels(),
                holds: census.holds(),
                enforced: census.enforced(),
                holds_back,
                ..Layout::clone(old_layout)
            })
        };
        let stamped = Stamped::after(Some(&user.stamped), layout);
        let (delete, add) = changes.finish();
        Ok(Staged {
            plan: Plan {
                uid,
                before: Before::Layout(user.stamped.clone()),
                after: Some(stamped.clone()),
                delete,
                add,
            },
            marks: None,
            effect: Effect::Change {
                stamped,
                census,
                cgroups,
            },
        })
    }

    /// Stages the removal of everything that a user has.
    #[must_use]
    pub fn remove(&self, uid: Uid) -> Staged {
        let before = self.before(uid);
        let elements = self.users.get(&uid).into_iter().flat_map(Entry::elements);
        let mut marks = self.marks.clone();
        for (_, mark) in before.marks() {
            marks.free(mark);
        }
        Staged {
            plan: Plan {
                uid,
                before,
                after: None,
                delete: elements.map(|(cgroup, _)| cgroup.id()).collect(),
                add: Vec::new(),
            },
            marks: Some(marks),
            effect: Effect::Remove,
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
                self.marks.free(mark);
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

    /// The list of these destinations: the one that the table has already, or another one.
    fn list_of(&self, destinations: Bypass) -> Option<BypassList> {
        if destinations.is_empty() {
            return None;
        }
        let lists = || {
            self.layouts()
                .filter_map(|(.., layout)| layout.bypass.as_ref())
        };
        if let Some(list) = lists().find(|list| *list.destinations == destinations) {
            return Some(list.clone());
        }
        let mut used: BTreeSet<u32> = lists().map(|list| list.number).collect();
        for entry in self.users.values() {
            if let Entry::LeftBehind(left) = entry {
                used.extend(&left.lists);
            }
        }
        let number = (1..=u32::MAX).find(|number| !used.contains(number))?;
        Some(BypassList {
            number,
            destinations: Rc::new(destinations),
        })
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

    /// Gives each proxy a mark: the one that a proxy of this name has already, or a new one.
    fn assign_marks(
        &self,
        before: &Before,
        requests: Vec<ProxyRequest>,
    ) -> Result<(BTreeMap<ProxyName, Proxy>, MarkAllocator), Refused> {
        let mut marks = self.marks.clone();
        let mut kept = BTreeMap::new();
        let names: BTreeSet<_> = requests
            .iter()
            .map(|request| request.name.clone())
            .collect();
        // The first step of a change adds what marks lead to, and the last one deletes what they led to. So a mark that
        // becomes free in a change is not given to another proxy in the same one.
        let mut freed = Vec::new();
        for (name, mark) in before.marks() {
            if names.contains(name) && marks.is_used(mark) {
                kept.insert(name.clone(), mark);
            } else {
                freed.push(mark);
            }
        }
        let mut proxies = BTreeMap::new();
        for request in requests {
            let ProxyRequest {
                name,
                delivery,
                exceptions,
                reject_udp,
                dns_hijack,
                fakes,
            } = request;
            let mark = match kept.get(&name) {
                Some(&mark) => mark,
                None => marks.allocate().ok_or(Refused::NoMarksLeft)?,
            };
            if proxies
                .insert(
                    name.clone(),
                    Proxy {
                        mark,
                        delivery,
                        exceptions,
                        reject_udp,
                        dns_hijack,
                        fakes,
                    },
                )
                .is_some()
            {
                return Err(Refused::ProxyExists(name));
            }
        }
        for mark in freed {
            marks.free(mark);
        }
        Ok((proxies, marks))
    }
}

fn known(proxies: &BTreeMap<ProxyName, Proxy>, verdict: &Verdict) -> Result<(), Refused> {
    match verdict {
        Verdict::Proxy(name) if !proxies.contains_key(name) => {
            Err(Refused::UnknownProxy(name.clone()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
