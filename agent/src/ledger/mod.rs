//! What the helper holds, what it should hold, and the next call that brings the one closer to the
//! other. Pure.
//!
//! A path is *dirty* when what it should have may differ from what the helper has for it. Only dirty
//! paths are looked at, and one that turns out to be right already is not sent.
//!
//! The helper takes no more control groups than the administrator allows, and refuses a call that would
//! make more of them as a whole. Its refusal says how many it takes. From then on, what there is no room
//! for *waits*: all else is sent, and removals are never kept back.
//!
//! The system policy is about control groups of many users, each of whom may make them without end. So they take turns
//! in what is sent, and a call is short: who has little to say waits for one call, and not for all that others say.

#[cfg(test)]
pub(crate) mod model;
mod room;
#[cfg(test)]
mod tests;
mod turns;

use std::collections::{BTreeMap, BTreeSet};

use cgtproxy_proto::helper::SkipReason;
use cgtproxy_proto::limits::MESSAGE_BYTES;
use cgtproxy_proto::path::ControlGroupPath;

use crate::config::Config;
use crate::makers::Room;
#[cfg(test)]
use crate::policy::Target;
use crate::policy::{Element, Hold, Tree};
use room::Waiting;
use turns::Dirty;

pub(crate) use room::too_many_control_groups;

/// How many bytes the control groups of one call may take: all of a message but its frame, so that a
/// policy is replaced at once, and not in parts between which some control groups have the verdict of
/// others. It takes more than one call only if names are much longer than service managers make them.
const CALL_BYTES: usize = MESSAGE_BYTES - 4096;

/// The same of a call that changes the policy that users share.
const SHARED_CALL_BYTES: usize = 64 * 1024;

/// How long the parameters of `ReplacePolicy` get, at most, but for the assignments, in bytes. A name has at most 64 of
/// them, a network 43, and that of an interface 15.
pub(crate) fn length_of(config: &Config) -> usize {
    let interfaces = config.gateway.as_ref().map_or(0, |g| g.interfaces.len());
    512 * config.proxies.len() + 46 * config.bypass.len() + 18 * interfaces
}

/// What the helper holds for a path.
#[derive(Debug, Clone)]
struct Held {
    element: Element,
    /// The control group that the element is about is gone; another one may have its path.
    stale: bool,
}

/// A call that was sent and not answered yet.
#[derive(Debug, Default)]
struct Flight {
    replace: bool,
    /// What gets an element; it is stale if another control group has got the path since the call was sent.
    assigned: BTreeMap<ControlGroupPath, Held>,
    removed: Vec<ControlGroupPath>,
}

/// A call to the helper.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Call {
    /// Replace the whole policy by these elements.
    Replace(Vec<(ControlGroupPath, Element)>),
    /// Change these elements of the policy.
    Update {
        /// These control groups get an element.
        assign: Vec<(ControlGroupPath, Element)>,
        /// These control groups have none of their own any more.
        remove: Vec<ControlGroupPath>,
    },
}

/// What the helper does with a control group's packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Handling<'a> {
    /// What this element says, which is the control group's own or that of an ancestor.
    By(&'a Element),
    /// They are held, since the helper was told nothing about the control group yet.
    Hold,
    /// It was told nothing about the control group or its ancestors: packets go direct, or as the system policy says.
    Nothing,
}

/// What the helper holds, and what it lacks.
#[derive(Debug)]
pub(crate) struct Ledger {
    /// The whole policy must be sent.
    replace: bool,
    held: BTreeMap<ControlGroupPath, Held>,
    dirty: Dirty,
    flight: Option<Flight>,
    skipped: BTreeMap<ControlGroupPath, SkipReason>,
    /// How many control groups the helper takes (any number until it says otherwise), and who has how many of them.
    room: Room,
    /// Control groups that are not sent, since there is no room for them.
    waiting: Waiting,
    /// How many bytes the control groups of one call may take.
    pub(super) limit: usize,
    /// How many of `limit` proxies, bypass list and gateway take when the whole policy is sent.
    head: usize,
}

impl Default for Ledger {
    fn default() -> Self {
        Self {
            replace: true,
            held: BTreeMap::new(),
            dirty: Dirty::default(),
            flight: None,
            skipped: BTreeMap::new(),
            room: Room::new(usize::MAX),
            waiting: Waiting::default(),
            limit: CALL_BYTES,
            head: 0,
        }
    }
}

impl Ledger {
    /// What the helper holds of the system policy: nothing yet.
    pub(crate) fn of_machine() -> Self {
        Self {
            dirty: Dirty::shared(),
            ..Self::default()
        }
    }

    /// Marks a control group as dirty.
    pub(crate) fn touch(&mut self, path: &ControlGroupPath) {
        // A whole policy has every control group in it, touched or not.
        if !self.replace {
            self.dirty.insert(path.clone());
        }
    }

    /// Notes that the control group at this path is gone; another one may be there already.
    pub(crate) fn renew(&mut self, path: &ControlGroupPath) {
        self.skipped.remove(path);
        self.waiting.remove(path);
        if let Some(held) = self.held.get_mut(path) {
            held.stale = true;
            self.dirty.insert(path.clone());
        }
        if let Some(sent) = self.flight.as_mut().and_then(|f| f.assigned.get_mut(path)) {
            sent.stale = true;
            self.dirty.insert(path.clone());
        }
    }

    /// Has the whole policy sent again.
    pub(crate) fn replace_all(&mut self) {
        self.replace = true;
    }

    /// Has the whole policy sent again, since any control group may be another one than before.
    pub(crate) fn doubt_all(&mut self) {
        let sent = self.flight.iter_mut().flat_map(|f| f.assigned.values_mut());
        for held in self.held.values_mut().chain(sent) {
            held.stale = true;
        }
        self.replace = true;
    }

    /// Forgets what the helper holds: it holds nothing, or nobody knows what.
    pub(crate) fn lost(&mut self) {
        *self = Self {
            dirty: self.dirty.anew(),
            limit: self.limit,
            head: self.head,
            ..Self::default()
        };
    }

    /// Sets how many bytes a whole policy takes beside the control groups.
    pub(crate) fn make_room_for(&mut self, head: usize) {
        self.head = head;
    }

    /// Notes that the helper takes no more than `most` control groups, for which it has refused the call under way.
    /// Returns whether that was not known: then the next call keeps to it.
    pub(crate) fn bound(&mut self, most: usize) -> bool {
        if most >= self.room.most() {
            return false;
        }
        self.room = Room::beside(most, self.held.keys());
        self.refuse();
        // While the limit was not known, one user may have taken all of the room.
        self.replace_all();
        true
    }

    /// Whether a control group is not sent, since there is no room for it.
    pub(crate) fn is_waiting(&self, path: &ControlGroupPath) -> bool {
        self.waiting.contains(path)
    }

    /// For how many control groups there is no room, one of them, and how many there may be.
    pub(crate) fn shortage(&self) -> Option<(usize, &ControlGroupPath, usize)> {
        let first = self.waiting.first()?;
        Some((self.waiting.len(), first, self.room.most()))
    }

    /// Control groups for which there is no room: one of each user about whose control groups this was not told before,
    /// and likewise one of those that no user makes.
    pub(crate) fn news_of_shortage(&mut self) -> Vec<ControlGroupPath> {
        self.waiting.news()
    }

    /// Whether nothing is left to be sent or to be answered.
    pub(crate) fn is_settled(&self) -> bool {
        !self.replace && self.dirty.is_empty() && self.flight.is_none()
    }

    /// Whether the whole policy is still to be sent, or not answered yet.
    pub(crate) fn is_replacing(&self) -> bool {
        self.replace || self.flight.as_ref().is_some_and(|flight| flight.replace)
    }

    /// The next call, if there is something to send and no call is under way.
    pub(crate) fn next(&mut self, tree: &Tree) -> Option<Call> {
        if self.flight.is_some() {
            return None;
        }
        if self.replace {
            return Some(self.next_replace(tree));
        }
        if self.dirty.is_empty() && self.waiting.is_empty() {
            return None;
        }
        let mut flight = Flight::default();
        let mut assign = Vec::new();
        let mut bytes = 0;
        // What is removed makes room for the next call: in this one, the helper may know less of it.
        let mut room = self.room.clone();
        let limit = match self.dirty.is_shared() {
            true => self.limit.min(SHARED_CALL_BYTES),
            false => self.limit,
        };
        // Who waits has a turn as well, lest they wait for those who always have something to say.
        self.dirty.extend(self.waiting.first_of_each(&room));
        loop {
            let path = self.dirty.pop();
            let Some(path) = path.or_else(|| self.waiting.pop(&room)) else {
                break;
            };
            let wanted = tree.element(&path);
            match (wanted, self.held.get(&path)) {
                (None, None) => continue,
                (Some(wanted), Some(held)) if !held.stale && held.element == *wanted => continue,
                (Some(_), None) if !room.take(&path) => {
                    self.waiting.add(path);
                    continue;
                }
                _ => {}
            }
            let length = encoded(&path, wanted);
            bytes += length;
            if bytes > limit && bytes > length {
                self.dirty.insert(path);
                break;
            }
            match wanted {
                Some(element) => {
                    assign.push((path.clone(), element.clone()));
                    flight.assigned.insert(path, fresh(element));
                }
                None => flight.removed.push(path),
            }
        }
        if assign.is_empty() && flight.removed.is_empty() {
            return None;
        }
        let remove = flight.removed.clone();
        self.flight = Some(flight);
        Some(Call::Update { assign, remove })
    }

    fn next_replace(&mut self, tree: &Tree) -> Call {
        self.replace = false;
        self.dirty = self.dirty.anew();
        self.waiting.clear();
        let mut flight = Flight {
            replace: true,
            ..Flight::default()
        };
        let left_out = self.leave_out(tree);
        let mut assign = Vec::new();
        let mut bytes = self.head;
        for (path, element) in tree.cover() {
            if left_out.contains(path) {
                self.waiting.add(path.clone());
                continue;
            }
            bytes += encoded(path, Some(element));
            assign.push((path.clone(), element.clone()));
        }
        if bytes > self.limit {
            // Parents go first, so what comes later only narrows down what was said, or releases it.
            self.dirty.extend(assign.drain(..).map(|(path, _)| path));
            bytes = self.head;
            while let Some(path) = self.dirty.pop() {
                let Some(element) = tree.element(&path) else {
                    continue;
                };
                bytes += encoded(&path, Some(element));
                if bytes > self.limit {
                    self.dirty.insert(path);
                    break;
                }
                assign.push((path, element.clone()));
            }
        }
        // All at once, which takes next to nothing where they are in order.
        let sent = assign.iter().map(|(p, e)| (p.clone(), fresh(e)));
        flight.assigned = sent.collect();
        self.flight = Some(flight);
        Call::Replace(assign)
    }

    /// The control groups to leave out of a whole policy, since there is no room for them. Those that the helper holds
    /// go first, so that nobody loses an element to a newer one; then those that are less deep, from which more inherit.
    fn leave_out<'t>(&self, tree: &'t Tree) -> BTreeSet<&'t ControlGroupPath> {
        let mut room = Room::new(self.room.most());
        if !room.is_limited() {
            return BTreeSet::new();
        }
        let mut cover: Vec<_> = tree.cover().map(|(path, _)| path).collect();
        cover.sort_by_key(|path| (!self.held.contains_key(*path), path.depth()));
        cover.into_iter().filter(|path| !room.take(path)).collect()
    }

    /// Notes that the call under way was carried out, but for what was skipped. Returns what was not skipped for
    /// the same reason before.
    pub(crate) fn acknowledge(
        &mut self,
        skipped: Vec<(ControlGroupPath, SkipReason)>,
    ) -> Vec<(ControlGroupPath, SkipReason)> {
        let Some(mut flight) = self.flight.take() else {
            return Vec::new();
        };
        if flight.replace {
            self.held.clear();
            self.room = Room::new(self.room.most());
        }
        for path in &flight.removed {
            self.let_go(path);
        }
        let mut news = Vec::new();
        let mut still = BTreeMap::new();
        for (path, reason) in skipped {
            let Some(sent) = flight.assigned.remove(&path) else {
                continue;
            };
            // The helper no longer has anything under this path.
            self.let_go(&path);
            if sent.stale {
                continue;
            }
            if self.skipped.get(&path) != Some(&reason) {
                news.push((path.clone(), reason.clone()));
            }
            still.insert(path, reason);
        }
        for path in flight.assigned.keys() {
            self.skipped.remove(path);
            if self.room.is_limited() && !self.held.contains_key(path) {
                self.room.count(path);
            }
        }
        if flight.replace {
            self.skipped.clear();
        }
        self.skipped.append(&mut still);
        // Appending to a map makes all of it anew, which is as it should be only for a whole policy.
        if self.held.is_empty() {
            self.held = flight.assigned;
        } else {
            self.held.extend(flight.assigned);
        }
        news
    }

    /// Notes that the helper holds nothing for this path.
    fn let_go(&mut self, path: &ControlGroupPath) {
        if self.held.remove(path).is_some() {
            self.room.give_back(path);
        }
    }

    /// Notes that the call under way was refused and has changed nothing: what it said is still to be sent.
    pub(crate) fn refuse(&mut self) {
        if let Some(flight) = self.flight.take() {
            self.replace |= flight.replace;
            self.dirty.extend(flight.assigned.into_keys());
            self.dirty.extend(flight.removed);
        }
    }

    /// What the helper does with a control group's packets.
    pub(crate) fn handling(&self, path: &ControlGroupPath) -> Handling<'_> {
        let mut at = path.clone();
        loop {
            if let Some(held) = self.held.get(&at).filter(|h| !h.stale) {
                return match held.element.hold != Hold::None && at != *path {
                    true => Handling::Hold,
                    false => Handling::By(&held.element),
                };
            }
            match at.parent() {
                Some(parent) => at = parent,
                None => return Handling::Nothing,
            }
        }
    }

    /// The verdict of a control group's packets; none if they are held.
    #[cfg(test)]
    pub(super) fn held_target(&self, path: &ControlGroupPath) -> Option<Target> {
        match self.handling(path) {
            Handling::By(element) => Some(element.verdict.target.clone()),
            Handling::Hold => None,
            Handling::Nothing => Some(Target::Direct),
        }
    }

    /// Why the helper passed over a control group, if it did.
    pub(crate) fn skipped(&self, path: &ControlGroupPath) -> Option<&SkipReason> {
        self.skipped.get(path)
    }
}

fn fresh(element: &Element) -> Held {
    Held {
        element: element.clone(),
        stale: false,
    }
}

/// How many bytes of a message an assignment to this path takes at most; without an element, its removal.
pub(crate) fn encoded(path: &ControlGroupPath, element: Option<&Element>) -> usize {
    let escaped = |b: &u8| !matches!(b, b' '..=b'~') || matches!(b, b'"' | b'\\' | b'%');
    let bytes = path.as_bytes();
    let path = bytes.len() + 5 * bytes.iter().filter(|b| escaped(b)).count();
    // Names of fields and all that is between them.
    path + element.map_or(3, |element| 100 + element.verdict.target.name().len())
}
