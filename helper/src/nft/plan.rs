//! What a transaction is to bring about: the one thing that can be committed.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::rc::Rc;

use cgtproxy_proto::name::ProxyName;

use super::names::Names;
use super::policy::{BypassList, Element, Gateway, Hold, Proxy};
use super::shared::Shared;
use crate::cgroup::{ControlGroupId, OwnedControlGroup, Slices, Top};
use crate::mark::Mark;
use crate::peer::Uid;

/// A random number that tells one layout from any other: the user's value in the map `stamps`, which changes with the
/// layout in one transaction. That two layouts have the same one has a chance of one in 2^32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stamp(u32);

impl Stamp {
    /// A new one. Helpers know nothing of each other, so it is drawn, not counted.
    #[must_use]
    pub fn draw() -> Self {
        Self(RandomState::new().build_hasher().finish() as u32)
    }

    /// One that was found.
    pub(crate) fn found(value: u32) -> Self {
        Self(value)
    }

    /// Its number.
    #[must_use]
    pub fn value(self) -> u32 {
        self.0
    }
}

/// A layout and its stamp.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stamped {
    /// The layout.
    pub layout: Rc<Layout>,
    /// Its stamp.
    pub stamp: Stamp,
}

impl Stamped {
    /// A layout that comes after `before`: with its stamp if it is the same, with a new one otherwise.
    #[must_use]
    pub fn after(before: Option<&Self>, layout: Rc<Layout>) -> Self {
        let stamp = match before {
            Some(before) if before.layout == layout => before.stamp,
            _ => Stamp::draw(),
        };
        Self { layout, stamp }
    }
}

/// A user's chains and sets, but for the verdicts of single control groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The control group below which everything else is: the user's user@UID.service, or for the system's
    /// policy the root.
    pub subtree: Top,
    /// The policy's proxies.
    pub proxies: BTreeMap<ProxyName, Proxy>,
    /// The policy's bypass list, unless it is empty.
    pub bypass: Option<BypassList>,
    /// At which depths below the control group root a control group has a verdict of its own.
    pub levels: BTreeSet<u32>,
    /// The chains for control groups below which everything is held.
    pub holds: BTreeSet<Hold>,
    /// Whether the element of any control group is enforced.
    pub enforced: bool,
    /// Whether anything is dropped or held, or was when it last changed: then packets of open connections are looked
    /// at too.
    pub holds_back: bool,
    /// What is forwarded.
    pub gateway: Option<Gateway>,
}

/// What the rules of the output hook look up for a layout.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Looks<'a> {
    /// The levels of `socket cgroupv2` that are looked up in the map of control groups.
    pub(super) levels: Cow<'a, BTreeSet<u32>>,
    /// The map `enforced` is looked up too, in the chain of that name, before users' own verdicts.
    pub(super) enforced: bool,
    /// Packets of open connections are looked up too, in the chain `open`.
    pub(super) holds_back: bool,
}

impl Layout {
    pub(super) fn looks(&self) -> Looks<'_> {
        Looks {
            levels: Cow::Borrowed(&self.levels),
            enforced: self.enforced,
            holds_back: self.holds_back,
        }
    }

    /// What the rules look up to find what either of two layouts has.
    pub(super) fn looks_of_both(&self, other: &Self) -> Looks<'_> {
        Looks {
            levels: match other.levels.is_subset(&self.levels) {
                true => Cow::Borrowed(&self.levels),
                false => Cow::Owned(self.levels.union(&other.levels).copied().collect()),
            },
            enforced: self.enforced || other.enforced,
            holds_back: self.holds_back || other.holds_back,
        }
    }

    /// What is here of each proxy that a later layout has too, and what is there.
    pub(super) fn proxies_that_stay<'a>(
        &'a self,
        after: &'a Self,
    ) -> impl Iterator<Item = (&'a ProxyName, &'a Proxy, &'a Proxy)> {
        let proxies = after.proxies.iter();
        proxies.filter_map(|(name, new)| Some((name, self.proxies.get(name)?, new)))
    }

    /// Whether what proxies' rules say besides what their proxies are is another thing in a later layout.
    pub(super) fn proxies_surroundings_change(&self, after: &Self) -> bool {
        self.subtree != after.subtree || self.bypass != after.bypass
    }

    /// Whether the rules for what is forwarded are others in a later layout.
    pub(super) fn gateway_changes(&self, after: &Self) -> bool {
        let around = self.proxies != after.proxies || self.proxies_surroundings_change(after);
        self.gateway != after.gateway || (after.gateway.is_some() && around)
    }
}

#[cfg(any(test, fuzzing))]
impl Layout {
    /// What a helper that does not know this layout can read of it, and of a table that has these bypass lists.
    pub(crate) fn left_behind<'a>(
        &self,
        stamp: Stamp,
        elements: impl IntoIterator<Item = &'a Element>,
        lists: BTreeSet<u32>,
    ) -> LeftBehind {
        let proxies = self.proxies.iter();
        LeftBehind {
            subtree: Some(self.subtree.id()),
            proxies: proxies
                .map(|(name, proxy)| (name.clone(), proxy.mark))
                .collect(),
            holds_back: elements.into_iter().any(Element::holds_back),
            stamp: Some(stamp),
            lists,
        }
    }
}

/// The layouts that an earlier helper has written down.
#[derive(Debug, Default)]
pub struct Records(BTreeMap<(u32, Stamp), Layout>);

impl Records {
    /// Adds one.
    pub(crate) fn insert(&mut self, uid: u32, stamp: Stamp, layout: Layout) {
        self.0.insert((uid, stamp), layout);
    }

    /// The layout that this stamp of a user's is the name of, if it is known.
    #[must_use]
    pub fn get(&self, uid: Uid, stamp: Stamp) -> Option<&Layout> {
        self.0.get(&(uid.value(), stamp))
    }

    /// Adds what a control group tells by itself, and a file need not: what it is in.
    pub fn locate(&mut self, slices: impl Fn(Uid, ControlGroupId) -> Option<Slices>) {
        for ((uid, _), layout) in &mut self.0 {
            let top = layout.subtree;
            layout.subtree = top.within(slices(Uid::found(*uid), top.id()));
        }
    }
}

/// A user's objects that a helper before this one left in the kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LeftBehind {
    /// The control group that everything was in, if it is known.
    pub subtree: Option<ControlGroupId>,
    /// The proxies that have chains, with their marks.
    pub proxies: BTreeMap<ProxyName, Mark>,
    /// Whether anything is dropped or held.
    pub holds_back: bool,
    /// Their stamp, if they have one.
    pub stamp: Option<Stamp>,
    /// The numbers of the bypass lists that the table had, one of which may be this user's.
    pub lists: BTreeSet<u32>,
}

/// A user's objects that a helper before this one left in the kernel, and that a snapshot describes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    /// What they are; the kernel has the stamp as well.
    pub stamped: Stamped,
    /// The verdicts of control groups. A level is known only of control groups below which something is held.
    pub elements: Vec<(OwnedControlGroup, Element)>,
}

impl Known {
    /// What an empty table needs to have it.
    #[must_use]
    pub fn plan(&self, uid: Uid) -> Plan {
        Plan::from_nothing(uid, self.stamped.clone(), self.elements.clone())
    }
}

/// What a helper before this one left of a user's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Inherited {
    /// All of it is known.
    Known(Known),
    /// What can be read back.
    LeftBehind(LeftBehind),
}

/// What the kernel holds for a user before a transaction.
#[derive(Debug, Clone)]
pub enum Before {
    /// Nothing.
    Nothing,
    /// This layout.
    Layout(Stamped),
    /// Objects of an earlier helper, to be replaced whole.
    LeftBehind(LeftBehind),
}

impl Before {
    /// The proxies that the kernel has, with their marks.
    pub(crate) fn marks(&self) -> Vec<(&ProxyName, Mark)> {
        match self {
            Self::Nothing => Vec::new(),
            Self::Layout(stamped) => stamped
                .layout
                .proxies
                .iter()
                .map(|(name, proxy)| (name, proxy.mark))
                .collect(),
            Self::LeftBehind(left) => left
                .proxies
                .iter()
                .map(|(name, &mark)| (name, mark))
                .collect(),
        }
    }

    /// The stamp that the kernel has, if it has one.
    pub(crate) fn stamp(&self) -> Option<Stamp> {
        match self {
            Self::Nothing => None,
            Self::Layout(stamped) => Some(stamped.stamp),
            Self::LeftBehind(left) => left.stamp,
        }
    }
}

/// One user's change. It names that user's objects only, and its control groups were opened on
/// behalf of that user.
#[derive(Debug, Clone)]
pub struct Plan {
    pub(crate) uid: Uid,
    pub(crate) before: Before,
    /// What the kernel holds afterwards; none: nothing of this user.
    pub(crate) after: Option<Stamped>,
    /// Elements to delete, all of which the kernel has.
    pub(crate) delete: Vec<ControlGroupId>,
    /// Elements to add, none of which the kernel has once `delete` is done.
    pub(crate) add: Vec<(OwnedControlGroup, Element)>,
}

/// The transactions that a change of what a user has takes, one after the other, if they have something to do. After
/// each of them, every socket has the verdict that it had before or the one that it is to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Chains that elements will lead to.
    Chains,
    /// Control groups that had no element. For a user who had nothing, all that leads to the chains.
    Additions,
    /// Those that have another verdict, and the rest.
    Changes,
    /// Control groups that have no element any more, and chains that nothing leads to now.
    Deletions,
}

impl Step {
    pub(super) const ALL: [Self; 4] = [
        Self::Chains,
        Self::Additions,
        Self::Changes,
        Self::Deletions,
    ];

    /// Whether the kernel has to do anything in this step.
    pub(super) fn has_work(self, plan: &Plan, elements: &ElementChanges<'_>) -> bool {
        let (before, after) = match (&plan.before, &plan.after) {
            (Before::Nothing, Some(_)) => return matches!(self, Self::Chains | Self::Additions),
            (Before::Layout(before), Some(after)) => (&before.layout, &after.layout),
            (Before::LeftBehind(_), Some(_)) => return true,
            (_, None) => return false,
        };
        let lacks = |one: &Layout, other: &Layout| {
            let names = Names::of(plan.uid);
            !Rc::ptr_eq(before, after) && !names.chains(one).is_superset(&names.chains(other))
        };
        match self {
            Self::Chains => {
                lacks(before, after) || (after.bypass.is_some() && before.bypass != after.bypass)
            }
            Self::Additions => {
                !elements.added.is_empty()
                    || (after.enforced && !before.enforced)
                    || (after.holds_back && !before.holds_back)
            }
            Self::Changes => {
                !elements.changed.is_empty()
                    || before
                        .proxies_that_stay(after)
                        .any(|(_, old, new)| old != new)
                    || before.bypass != after.bypass
                    || before.gateway_changes(after)
                    || before.subtree != after.subtree
            }
            Self::Deletions => {
                let levels = before.levels.union(&after.levels);
                !elements.deleted.is_empty()
                    || levels.count() > after.levels.len()
                    || before.enforced != after.enforced
                    || (before.holds_back && !after.holds_back)
                    || lacks(after, before)
                    || (before.bypass.is_some() && before.bypass != after.bypass)
            }
        }
    }
}

/// What a plan does to single elements.
pub(super) struct ElementChanges<'p> {
    /// What has had none.
    pub(super) added: Vec<&'p (OwnedControlGroup, Element)>,
    /// What has one and gets another.
    pub(super) changed: Vec<&'p (OwnedControlGroup, Element)>,
    /// What has one and will have none.
    pub(super) deleted: Vec<ControlGroupId>,
}

impl Plan {
    /// What brings a layout with these elements about for a user who has nothing.
    pub(crate) fn from_nothing(
        uid: Uid,
        stamped: Stamped,
        elements: Vec<(OwnedControlGroup, Element)>,
    ) -> Self {
        Self {
            uid,
            before: Before::Nothing,
            after: Some(stamped),
            delete: Vec::new(),
            add: elements,
        }
    }

    /// What this does to single elements.
    pub(super) fn element_changes(&self, shared: &Shared) -> ElementChanges<'_> {
        let had: BTreeSet<_> = match self.before {
            Before::LeftBehind(_) => shared.left(self.uid).cgroups.iter().collect(),
            Before::Nothing | Before::Layout(_) => self.delete.iter().collect(),
        };
        let (changed, added): (Vec<&(OwnedControlGroup, Element)>, _) =
            self.add.iter().partition(|(c, _)| had.contains(&c.id()));
        let kept: BTreeSet<_> = changed.iter().map(|(cgroup, _)| cgroup.id()).collect();
        let gone = had.into_iter().filter(|id| !kept.contains(id));
        ElementChanges {
            deleted: gone.copied().collect(),
            added,
            changed,
        }
    }

    /// Whether the kernel holds all of it already.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.keeps_layout() && self.delete.is_empty() && self.add.is_empty()
    }

    /// Whether the layout, or that there is none, stays as it is, and the stamp with it.
    #[must_use]
    pub fn keeps_layout(&self) -> bool {
        match (&self.before, &self.after) {
            (Before::Nothing, None) => true,
            (Before::Layout(before), Some(after)) => before.layout == after.layout,
            _ => false,
        }
    }

    /// The layout that this brings about, if it is another one, and whose it is.
    #[must_use]
    pub fn coming(&self) -> Option<(Uid, Stamp, &Layout)> {
        let after = self.after.as_ref().filter(|_| !self.keeps_layout())?;
        Some((self.uid, after.stamp, &after.layout))
    }
}
