//! What the helper holds, what it should hold, and the next call that brings the one closer to the
//! other. Pure.
//!
//! A path is *dirty* when what it should have may differ from what the helper has for it. Only dirty
//! paths are looked at, and one that turns out to be right already is not sent.
//!
//! The helper takes no more control groups than the administrator allows, and refuses a call that would
//! make more of them as a whole. How many that is it says then, and from there on what there is no room
//! for *waits*: all else is said, and removals are never kept back.

use std::collections::{BTreeMap, BTreeSet};

use cgtproxy_proto::helper::SkipReason;
use cgtproxy_proto::limits::MESSAGE_BYTES;
use cgtproxy_proto::path::ControlGroupPath;

#[cfg(test)]
use crate::policy::Target;
use crate::policy::{Element, Hold, Tree};

/// How long the control groups of one call may get, in bytes: all of a message but its frame, so that a
/// policy is replaced at once, and not in parts between which some control groups have the verdict of
/// others. Only for names much longer than service managers make them it takes more than one.
const CALL_BYTES: usize = MESSAGE_BYTES - 4096;

/// What the helper has under a path.
#[derive(Debug, Clone)]
struct Held {
    element: Element,
    /// The control group that it is about is gone; another one may have its path.
    stale: bool,
}

/// A call that was sent and not answered yet.
#[derive(Debug, Default)]
struct Flight {
    replace: bool,
    /// With whether another control group has got the path since it was sent.
    assigned: BTreeMap<ControlGroupPath, Held>,
    removed: Vec<ControlGroupPath>,
}

/// A call to the helper.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Call {
    /// Replace everything by this.
    Replace(Vec<(ControlGroupPath, Element)>),
    /// Change this.
    Update {
        /// These get a verdict.
        assign: Vec<(ControlGroupPath, Element)>,
        /// These have none of their own any more.
        remove: Vec<ControlGroupPath>,
    },
}

/// What the helper does with a control group's packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handling<'a> {
    /// What this element says: its own, or that of what it is in.
    By(&'a Element),
    /// They are held, since nothing is said about it yet.
    Hold,
    /// It knows nothing about it: they go direct, or as the machine's policy says.
    Nothing,
}

/// The accounts.
#[derive(Debug)]
pub struct Ledger {
    /// Everything must be sent.
    replace: bool,
    held: BTreeMap<ControlGroupPath, Held>,
    dirty: BTreeSet<ControlGroupPath>,
    flight: Option<Flight>,
    skipped: BTreeMap<ControlGroupPath, SkipReason>,
    /// How many control groups the helper takes; as far as is known, any number.
    most: usize,
    /// What is not said, since there is no room for it.
    waiting: BTreeMap<Option<Maker>, BTreeSet<ControlGroupPath>>,
    /// For whose control groups that was told.
    told: BTreeSet<Option<Maker>>,
    /// How long the control groups of one call may get, in bytes.
    pub(super) limit: usize,
    /// How much of that is taken when everything is replaced, by what is not about single control groups.
    head: usize,
}

impl Default for Ledger {
    fn default() -> Self {
        Self {
            replace: true,
            held: BTreeMap::new(),
            dirty: BTreeSet::new(),
            flight: None,
            skipped: BTreeMap::new(),
            most: usize::MAX,
            waiting: BTreeMap::new(),
            told: BTreeSet::new(),
            limit: CALL_BYTES,
            head: 0,
        }
    }
}

/// The slice of the user who makes a control group: `user-1000.slice`.
type Maker = Box<[u8]>;

/// Which user makes a control group, and as many as they like. What is not below a user's own service manager the
/// system's makes, or a service or machine to which the administrator has delegated that.
fn maker(path: &ControlGroupPath) -> Option<&[u8]> {
    let mut components = path.components();
    let slice = match (components.next(), components.next()) {
        (Some(b"user.slice"), Some(slice)) => slice,
        _ => return None,
    };
    let _user_manager = components.next()?;
    components.next().map(|_| slice)
}

/// How many control groups the helper takes, and who has how many of them.
struct Room {
    most: usize,
    taken: usize,
    by: BTreeMap<Maker, usize>,
}

impl Room {
    fn new(most: usize) -> Self {
        Self {
            most,
            taken: 0,
            by: BTreeMap::new(),
        }
    }

    /// What these leave of it.
    fn beside<'a>(most: usize, held: impl Iterator<Item = &'a ControlGroupPath>) -> Self {
        let mut room = Self::new(most);
        if most < usize::MAX {
            held.for_each(|path| room.count(maker(path)));
        }
        room
    }

    /// Whether there is room for another one. One user may not take more of it than is left for all others: so there
    /// always is for these, whoever makes control groups without end.
    fn is_for(&self, maker: Option<&[u8]>) -> bool {
        let left = self.most.saturating_sub(self.taken);
        let has = maker.and_then(|maker| self.by.get(maker));
        left > 0 && has.is_none_or(|has| *has < left)
    }

    fn count(&mut self, maker: Option<&[u8]>) {
        self.taken += 1;
        if let Some(maker) = maker {
            match self.by.get_mut(maker) {
                Some(count) => *count += 1,
                None => _ = self.by.insert(maker.into(), 1),
            }
        }
    }

    /// Takes room for a control group. False if there is none.
    fn take(&mut self, path: &ControlGroupPath) -> bool {
        let maker = maker(path);
        let is = self.is_for(maker);
        if is {
            self.count(maker);
        }
        is
    }
}

impl Ledger {
    /// What a control group should have may have changed.
    pub fn touch(&mut self, path: &ControlGroupPath) {
        // Whoever sends everything looks at everything.
        if !self.replace {
            self.dirty.insert(path.clone());
        }
    }

    /// The control group at this path is gone; another one may be there already.
    pub fn renew(&mut self, path: &ControlGroupPath) {
        self.skipped.remove(path);
        self.wait_no_more(path);
        if let Some(held) = self.held.get_mut(path) {
            held.stale = true;
            self.dirty.insert(path.clone());
        }
        if let Some(sent) = self.flight.as_mut().and_then(|f| f.assigned.get_mut(path)) {
            sent.stale = true;
            self.dirty.insert(path.clone());
        }
    }

    /// Everything must be sent again.
    pub fn replace_all(&mut self) {
        self.replace = true;
    }

    /// The helper has nothing of ours, or nobody knows what.
    pub fn lost(&mut self) {
        *self = Self {
            limit: self.limit,
            head: self.head,
            ..Self::default()
        };
    }

    /// Replacing everything takes so many bytes beside the control groups.
    pub fn make_room_for(&mut self, head: usize) {
        self.head = head;
    }

    /// The call under way was refused, for the helper takes no more control groups than these. Returns whether that is
    /// news: what is said next keeps to it.
    pub fn bound(&mut self, most: usize) -> bool {
        if most >= self.most {
            return false;
        }
        self.most = most;
        self.refuse();
        // One user may have taken all of it by now, while nobody knew how much there is.
        self.replace_all();
        true
    }

    fn wait(&mut self, path: ControlGroupPath) {
        let maker = maker(&path).map(Maker::from);
        self.waiting.entry(maker).or_default().insert(path);
    }

    fn wait_no_more(&mut self, path: &ControlGroupPath) {
        if self.waiting.is_empty() {
            return;
        }
        let maker = maker(path).map(Maker::from);
        if let Some(paths) = self.waiting.get_mut(&maker) {
            paths.remove(path);
            if paths.is_empty() {
                self.waiting.remove(&maker);
            }
        }
    }

    /// One that has waited and for which there is room.
    fn pop_waiting(&mut self, room: &Room) -> Option<ControlGroupPath> {
        let mut waiting = self.waiting.iter();
        let (_, paths) = waiting.find(|(maker, _)| room.is_for(maker.as_deref()))?;
        let path = paths.first()?.clone();
        self.wait_no_more(&path);
        Some(path)
    }

    /// Whether there is no room for a control group.
    #[must_use]
    pub fn is_waiting(&self, path: &ControlGroupPath) -> bool {
        self.waiting.values().any(|paths| paths.contains(path))
    }

    /// For how many control groups there is no room, one of them, and how many there may be.
    #[must_use]
    pub fn shortage(&self) -> Option<(usize, &ControlGroupPath, usize)> {
        let count = self.waiting.values().map(BTreeSet::len).sum();
        let first = self.waiting.values().find_map(BTreeSet::first)?;
        Some((count, first, self.most))
    }

    /// One control group of each user's for which there is no room, unless that was told of that user's before, and
    /// likewise one of all others.
    pub fn news_of_shortage(&mut self) -> Vec<ControlGroupPath> {
        let mut news = Vec::new();
        for (maker, paths) in &self.waiting {
            if !self.told.contains(maker) {
                self.told.insert(maker.clone());
                news.extend(paths.first().cloned());
            }
        }
        news
    }

    /// Nothing is left to be said or to be answered.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        !self.replace && self.dirty.is_empty() && self.flight.is_none()
    }

    /// The next call, if there is something to say and no call is under way.
    pub fn next(&mut self, tree: &Tree) -> Option<Call> {
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
        let mut room = Room::beside(self.most, self.held.keys());
        loop {
            let path = self.dirty.pop_first();
            let Some(path) = path.or_else(|| self.pop_waiting(&room)) else {
                break;
            };
            let wanted = tree.element(&path);
            match (wanted, self.held.get(&path)) {
                (None, None) => continue,
                (Some(wanted), Some(held)) if !held.stale && held.element == *wanted => continue,
                (Some(_), None) if !room.take(&path) => {
                    self.wait(path);
                    continue;
                }
                _ => {}
            }
            let length = encoded(&path, wanted);
            bytes += length;
            if bytes > self.limit && bytes > length {
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
        self.dirty.clear();
        self.waiting.clear();
        let mut flight = Flight {
            replace: true,
            ..Flight::default()
        };
        let mut cover: Vec<_> = tree.cover().collect();
        if self.most < usize::MAX {
            // More inherit from those that are less deep; and nobody loses what they have to those that come later.
            cover.sort_by_key(|(path, _)| (path.depth(), !self.held.contains_key(*path)));
        }
        let mut assign = Vec::new();
        let mut bytes = self.head;
        let mut room = Room::new(self.most);
        for (path, element) in cover {
            if !room.take(path) {
                self.wait(path.clone());
                continue;
            }
            bytes += encoded(path, Some(element));
            if bytes > self.limit {
                // Parents go first, so what comes later only narrows down what was said, or releases it.
                self.dirty.insert(path.clone());
            } else {
                assign.push((path.clone(), element.clone()));
            }
        }
        // All at once, which takes next to nothing where they are in order: where no limit is known.
        let sent = assign.iter().map(|(p, e)| (p.clone(), fresh(e)));
        flight.assigned = sent.collect();
        self.flight = Some(flight);
        Call::Replace(assign)
    }

    /// The call under way was carried out, but for these. Returns those that were not skipped for
    /// the same reason before.
    pub fn acknowledge(
        &mut self,
        skipped: Vec<(ControlGroupPath, SkipReason)>,
    ) -> Vec<(ControlGroupPath, SkipReason)> {
        let Some(mut flight) = self.flight.take() else {
            return Vec::new();
        };
        if flight.replace {
            self.held.clear();
        }
        for path in &flight.removed {
            self.held.remove(path);
        }
        let mut news = Vec::new();
        let mut still = BTreeMap::new();
        for (path, reason) in skipped {
            let Some(sent) = flight.assigned.remove(&path) else {
                continue;
            };
            // What the helper had under this path it has no more.
            self.held.remove(&path);
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

    /// The call under way was refused, and nothing has changed: what it said is still to be said.
    pub fn refuse(&mut self) {
        if let Some(flight) = self.flight.take() {
            self.replace |= flight.replace;
            self.dirty.extend(flight.assigned.into_keys());
            self.dirty.extend(flight.removed);
        }
    }

    /// What the helper does with a control group's packets.
    #[must_use]
    pub fn handling(&self, path: &ControlGroupPath) -> Handling<'_> {
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
    #[must_use]
    pub fn skipped(&self, path: &ControlGroupPath) -> Option<&SkipReason> {
        self.skipped.get(path)
    }
}

fn fresh(element: &Element) -> Held {
    Held {
        element: element.clone(),
        stale: false,
    }
}

/// How long an assignment of this path gets in a message, at most, or its removal.
fn encoded(path: &ControlGroupPath, element: Option<&Element>) -> usize {
    let escaped = |b: &u8| !matches!(b, b' '..=b'~') || matches!(b, b'"' | b'\\' | b'%');
    let bytes = path.as_bytes();
    let path = bytes.len() + 5 * bytes.iter().filter(|b| escaped(b)).count();
    // Names of fields and all that is between them.
    path + element.map_or(3, |element| 100 + element.verdict.target.name().len())
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use proptest::prelude::*;

    use super::*;
    use crate::policy::{Pattern, Rule, Rules, Selector, Start, Verdict};

    fn path(text: &str) -> ControlGroupPath {
        ControlGroupPath::from_wire(text).unwrap()
    }

    /// Groups named `d…` are dropped, `x…` direct.
    fn tree() -> Tree {
        let rule = |pattern: &str, target| Rule {
            selector: Selector::Match(Pattern::new(pattern).unwrap()),
            target,
            enforce: false,
        };
        let rules = Rules {
            start: Start::Open,
            users: true,
            exec_slices: None,
            rules: vec![
                rule("/d[^/]*$", Target::Drop),
                rule("/x[^/]*$", Target::Direct),
            ],
        };
        Tree::new(b"/u".to_vec(), Rc::new(rules))
    }

    fn add(tree: &mut Tree, ledger: &mut Ledger, text: &str) {
        if let Some(path) = tree.add(path(text))
            && tree.element(&path).is_some()
        {
            ledger.touch(&path);
        }
    }

    fn remove(tree: &mut Tree, ledger: &mut Ledger, text: &str) {
        for path in tree.remove(&path(text)) {
            ledger.renew(&path);
        }
    }

    fn shown(call: Option<Call>) -> String {
        let assigned = |list: Vec<(ControlGroupPath, Element)>| {
            let list: Vec<_> = list
                .iter()
                .map(|(p, t)| format!("{}={t}", p.to_wire()))
                .collect();
            list.join(" ")
        };
        match call {
            None => "-".into(),
            Some(Call::Replace(list)) => format!("all {}", assigned(list)),
            Some(Call::Update { assign, remove }) => {
                let remove: Vec<_> = remove.iter().map(|p| format!("-{}", p.to_wire())).collect();
                format!("{} {}", assigned(assign), remove.join(" "))
            }
        }
    }

    #[test]
    fn merges_what_happens_during_a_call() {
        let (mut tree, mut ledger) = (tree(), Ledger::default());
        add(&mut tree, &mut ledger, "d1");
        assert_eq!(shown(ledger.next(&tree)), "all d1=drop");
        add(&mut tree, &mut ledger, "d2");
        add(&mut tree, &mut ledger, "d3");
        remove(&mut tree, &mut ledger, "d2");
        assert_eq!(shown(ledger.next(&tree)), "-", "one call at a time");
        ledger.acknowledge(Vec::new());
        assert_eq!(shown(ledger.next(&tree)), "d3=drop ");
        ledger.acknowledge(Vec::new());
        assert!(ledger.is_settled());
        assert_eq!(shown(ledger.next(&tree)), "-");
    }

    #[test]
    fn a_path_that_another_control_group_got_is_assigned_again() {
        let (mut tree, mut ledger) = (tree(), Ledger::default());
        add(&mut tree, &mut ledger, "d");
        ledger.next(&tree);
        ledger.acknowledge(Vec::new());
        remove(&mut tree, &mut ledger, "d");
        add(&mut tree, &mut ledger, "d");
        assert_eq!(ledger.held_target(&path("d")), Some(Target::Direct));
        assert_eq!(shown(ledger.next(&tree)), "d=drop ");
        // And again while that is under way.
        remove(&mut tree, &mut ledger, "d");
        add(&mut tree, &mut ledger, "d");
        ledger.acknowledge(Vec::new());
        assert_eq!(shown(ledger.next(&tree)), "d=drop ");
        remove(&mut tree, &mut ledger, "d");
        ledger.acknowledge(Vec::new());
        assert_eq!(shown(ledger.next(&tree)), " -d");
        ledger.acknowledge(Vec::new());
        assert_eq!(shown(ledger.next(&tree)), "-");
    }

    #[test]
    fn what_was_skipped_is_tried_when_it_comes_back() {
        let (mut tree, mut ledger) = (tree(), Ledger::default());
        add(&mut tree, &mut ledger, "d");
        ledger.next(&tree);
        let skipped = vec![(path("d"), SkipReason::missing)];
        assert_eq!(ledger.acknowledge(skipped).len(), 1);
        assert_eq!(ledger.skipped(&path("d")), Some(&SkipReason::missing));
        assert_eq!(shown(ledger.next(&tree)), "-");
        remove(&mut tree, &mut ledger, "d");
        assert_eq!(
            shown(ledger.next(&tree)),
            "-",
            "the helper has nothing of it"
        );
        add(&mut tree, &mut ledger, "d");
        assert_eq!(ledger.skipped(&path("d")), None);
        assert_eq!(shown(ledger.next(&tree)), "d=drop ");
        ledger.acknowledge(Vec::new());
        assert_eq!(ledger.held_target(&path("d/e")), Some(Target::Drop));
    }

    #[test]
    fn no_call_gets_too_long() {
        let (mut tree, mut ledger) = (tree(), Ledger::default());
        ledger.limit = 230;
        for name in ["d", "d/x", "d/x/d", "d/x/d/x", "d2"] {
            add(&mut tree, &mut ledger, name);
        }
        assert_eq!(shown(ledger.next(&tree)), "all d=drop d/x=direct");
        ledger.acknowledge(Vec::new());
        assert!(!ledger.is_settled());
        assert_eq!(shown(ledger.next(&tree)), "d/x/d=drop d/x/d/x=direct ");
        ledger.acknowledge(Vec::new());
        assert_eq!(shown(ledger.next(&tree)), "d2=drop ");
        ledger.acknowledge(Vec::new());
        assert!(ledger.is_settled());
    }

    #[test]
    fn what_else_is_said_takes_room_of_a_call_that_replaces_everything() {
        let (mut tree, mut ledger) = (tree(), Ledger::default());
        ledger.limit = 220;
        ledger.make_room_for(100);
        for name in ["d1", "d2", "d3"] {
            add(&mut tree, &mut ledger, name);
        }
        assert_eq!(shown(ledger.next(&tree)), "all d1=drop");
        ledger.acknowledge(Vec::new());
        assert_eq!(shown(ledger.next(&tree)), "d2=drop d3=drop ");
        // Also in the next session.
        ledger.lost();
        assert_eq!(shown(ledger.next(&tree)), "all d1=drop");
    }

    /// So many as one user may have fit into one message, with paths as service managers make them.
    #[test]
    fn a_whole_policy_is_one_call() {
        let (mut tree, mut ledger) = (tree(), Ledger::default());
        ledger.make_room_for(100_000);
        let application = "user.slice/user-60000.slice/user@60000.service/app.slice/\
                           d-gnome-org.example.an-application-with-a-long-name";
        for number in 0..16384 {
            tree.add(path(&format!("{application}-{number}.scope")));
        }
        let call = ledger.next(&tree);
        assert!(matches!(call, Some(Call::Replace(all)) if all.len() == 16384));
        ledger.acknowledge(Vec::new());
        assert_eq!(shown(ledger.next(&tree)), "-");
    }

    #[test]
    fn no_assignment_is_longer_than_is_counted() {
        for bytes in [&b""[..], b"a.slice/b", b"%\"\\\x01\x7f\xff/\xc3\xa9"] {
            let path = ControlGroupPath::from_bytes(bytes).unwrap();
            for target in [
                Target::Direct,
                Target::DropAll,
                Target::Proxy(Rc::new("p".repeat(64).parse().unwrap())),
            ] {
                // A user's own can be undecided, and no other thing besides.
                let element = Element {
                    verdict: Verdict {
                        target,
                        enforce: true,
                        undecided: false,
                    },
                    hold: Hold::Enforced,
                };
                let counted = encoded(&path, Some(&element));
                let said = [(path.clone(), element)];
                let said = crate::sync::wire::assignments(&said);
                // With brackets in place of the comma after it.
                let length = serde_json::to_string(&said).unwrap().len() - 1;
                assert!(length <= counted, "{length} > {counted}");
            }
            let removed = serde_json::to_string(&[path.as_wire()]).unwrap();
            assert!(removed.len() - 1 <= encoded(&path, None));
        }
    }

    /// Makes the one refusal of a call that there is no room for.
    fn bound(tree: &Tree, ledger: &mut Ledger, most: usize) {
        assert!(ledger.next(tree).is_some());
        assert!(ledger.bound(most));
    }

    #[test]
    fn what_there_is_no_room_for_waits_and_removals_do_not() {
        let (mut tree, mut ledger) = (tree(), Ledger::default());
        for name in ["a/d1", "b/d2", "d3"] {
            add(&mut tree, &mut ledger, name);
        }
        bound(&tree, &mut ledger, 2);
        // Those first that are less deep.
        assert_eq!(shown(ledger.next(&tree)), "all d3=drop a/d1=drop");
        ledger.acknowledge(Vec::new());
        assert_eq!(shown(ledger.next(&tree)), "-");
        assert!(ledger.is_settled());
        assert_eq!(ledger.shortage(), Some((1, &path("b/d2"), 2)));
        assert!(ledger.is_waiting(&path("b/d2")));
        assert_eq!(ledger.news_of_shortage(), [path("b/d2")]);
        // Nobody asks in vain.
        add(&mut tree, &mut ledger, "d4");
        assert_eq!(shown(ledger.next(&tree)), "-");
        assert!(ledger.news_of_shortage().is_empty(), "once");
        assert_eq!(ledger.shortage(), Some((2, &path("b/d2"), 2)));
        assert!(!ledger.bound(2));
        remove(&mut tree, &mut ledger, "d3");
        assert_eq!(shown(ledger.next(&tree)), " -d3");
        ledger.acknowledge(Vec::new());
        assert_eq!(shown(ledger.next(&tree)), "b/d2=drop ");
        ledger.acknowledge(Vec::new());
        // What has waited may be gone.
        remove(&mut tree, &mut ledger, "d4");
        assert_eq!(ledger.shortage(), None);
        assert_eq!(shown(ledger.next(&tree)), "-");
        // Another helper may take more.
        add(&mut tree, &mut ledger, "d5");
        ledger.lost();
        assert_eq!(shown(ledger.next(&tree)), "all a/d1=drop b/d2=drop d5=drop");
    }

    #[test]
    fn what_was_passed_over_takes_no_room() {
        let (mut tree, mut ledger) = (tree(), Ledger::default());
        for name in ["d1", "d2", "d3"] {
            add(&mut tree, &mut ledger, name);
        }
        bound(&tree, &mut ledger, 2);
        assert_eq!(shown(ledger.next(&tree)), "all d1=drop d2=drop");
        ledger.acknowledge(vec![(path("d1"), SkipReason::missing)]);
        assert_eq!(shown(ledger.next(&tree)), "d3=drop ");
        ledger.acknowledge(Vec::new());
        assert_eq!(ledger.shortage(), None);
    }

    #[test]
    fn one_users_control_groups_leave_room_for_others() {
        let (mut tree, mut ledger) = (tree(), Ledger::default());
        let mine = |uid: u32, name: &str| {
            format!("user.slice/user-{uid}.slice/user@{uid}.service/app.slice/{name}")
        };
        let count = |call: Option<Call>| match call {
            Some(Call::Replace(assign) | Call::Update { assign, .. }) => assign.len(),
            None => 0,
        };
        for number in 0..100 {
            tree.add(path(&mine(1, &format!("d{number}"))));
        }
        bound(&tree, &mut ledger, 12);
        assert_eq!(count(ledger.next(&tree)), 6);
        ledger.acknowledge(Vec::new());
        // The next one who does the same, and what the system's service manager makes.
        for number in 0..100 {
            add(&mut tree, &mut ledger, &mine(2, &format!("d{number}")));
        }
        assert_eq!(count(ledger.next(&tree)), 3);
        ledger.acknowledge(Vec::new());
        for name in [
            "d",
            "system.slice/d.service",
            "user.slice/user-1.slice/d.scope",
        ] {
            add(&mut tree, &mut ledger, name);
        }
        assert_eq!(count(ledger.next(&tree)), 3);
        ledger.acknowledge(Vec::new());
        assert_eq!(ledger.news_of_shortage().len(), 2, "once for each");
        assert_eq!(ledger.shortage().map(|(count, ..)| count), Some(191));
        // What one of them gives back is there for others.
        remove(&mut tree, &mut ledger, &mine(1, "d0"));
        assert_eq!(shown(ledger.next(&tree)), format!(" -{}", mine(1, "d0")));
        ledger.acknowledge(Vec::new());
        add(&mut tree, &mut ledger, "d.service");
        assert_eq!(shown(ledger.next(&tree)), "d.service=drop ");
        ledger.acknowledge(Vec::new());
        assert_eq!(shown(ledger.next(&tree)), "-");
    }

    /// A helper that holds control groups by identity, as the kernel does.
    #[derive(Default)]
    struct Helper {
        session: bool,
        /// Path to the identity it had, and the target.
        held: BTreeMap<ControlGroupPath, (u64, Element)>,
    }

    /// The file system: path to identity.
    type Disk = BTreeMap<ControlGroupPath, u64>;

    impl Helper {
        fn carry_out(&mut self, call: &Call, disk: &Disk) -> Vec<(ControlGroupPath, SkipReason)> {
            let (assign, remove) = match call {
                Call::Replace(assign) => {
                    self.session = true;
                    self.held.clear();
                    (assign, &Vec::new())
                }
                Call::Update { assign, remove } => {
                    assert!(self.session);
                    (assign, remove)
                }
            };
            for path in remove {
                self.held.remove(path);
            }
            let mut skipped = Vec::new();
            for (path, target) in assign {
                match disk.get(path) {
                    Some(id) => {
                        self.held.insert(path.clone(), (*id, target.clone()));
                    }
                    None => {
                        self.held.remove(path);
                        skipped.push((path.clone(), SkipReason::missing));
                    }
                }
            }
            skipped
        }

        fn has_room(&self, call: &Call, most: usize) -> bool {
            let after = match call {
                Call::Replace(assign) => assign.len(),
                Call::Update { assign, remove } => {
                    let new = assign
                        .iter()
                        .filter(|(path, _)| !self.held.contains_key(path));
                    let gone = remove.iter().filter(|path| self.held.contains_key(path));
                    self.held.len() + new.count() - gone.count()
                }
            };
            after <= most
        }

        fn target(&self, path: &ControlGroupPath, disk: &Disk) -> Target {
            match (self.held.get(path), disk.get(path), path.parent()) {
                (Some((held, element)), Some(id), _) if held == id => {
                    element.verdict.target.clone()
                }
                (_, _, Some(parent)) => self.target(&parent, disk),
                (_, _, None) => Target::Direct,
            }
        }
    }

    #[derive(Debug, Clone)]
    enum Event {
        /// On disk; the agent hears of it later.
        Make(String),
        Unmake(String),
        /// The agent hears of the next so many events.
        Hear(usize),
        Send,
        Receive,
        Refuse,
        Lose,
    }

    fn any_event() -> impl Strategy<Value = Event> {
        let any_path = || proptest::collection::vec("[dxn][12]?", 1..4).prop_map(|n| n.join("/"));
        prop_oneof![
            6 => any_path().prop_map(Event::Make),
            3 => any_path().prop_map(Event::Unmake),
            6 => (1usize..5).prop_map(Event::Hear),
            4 => Just(Event::Send),
            4 => Just(Event::Receive),
            1 => Just(Event::Refuse),
            1 => Just(Event::Lose),
        ]
    }

    proptest! {
        #[test]
        fn the_helper_ends_up_with_the_cover(
            events in proptest::collection::vec(any_event(), 0..80),
            limit in 100usize..1000,
            most in prop_oneof![Just(1000), 0usize..10],
        ) {
            let (mut tree, mut ledger, mut helper) = (tree(), Ledger::default(), Helper::default());
            ledger.limit = limit;
            let mut disk = Disk::from([(ControlGroupPath::root(), 0)]);
            tree.add(ControlGroupPath::root());
            let mut identity = 0;
            let mut unheard: std::collections::VecDeque<(bool, String)> = Default::default();
            let mut reply = None;
            let settle = [Event::Receive, Event::Hear(1000), Event::Send, Event::Receive];
            let rounds = std::iter::repeat_n(settle, 100).flatten();
            for event in events.into_iter().chain(rounds) {
                match event {
                    Event::Make(text) => {
                        let p = path(&text);
                        if disk.contains_key(&p.parent().unwrap()) && !disk.contains_key(&p) {
                            identity += 1;
                            disk.insert(p, identity);
                            unheard.push_back((true, text));
                        }
                    }
                    Event::Unmake(text) => {
                        let p = path(&text);
                        let gone: Vec<_> = disk.keys().filter(|o| o.is_within(&p)).cloned().collect();
                        for p in gone.into_iter().rev() {
                            disk.remove(&p);
                            unheard.push_back((false, p.to_wire()));
                        }
                    }
                    Event::Hear(count) => {
                        for _ in 0..count {
                            match unheard.pop_front() {
                                Some((true, text)) => add(&mut tree, &mut ledger, &text),
                                Some((false, text)) => remove(&mut tree, &mut ledger, &text),
                                None => {}
                            }
                        }
                    }
                    Event::Send => {
                        if let Some(call) = ledger.next(&tree) {
                            if !helper.has_room(&call, most) {
                                // Nobody says too much twice.
                                assert!(ledger.bound(most));
                                continue;
                            }
                            reply = Some(helper.carry_out(&call, &disk));
                        }
                    }
                    Event::Receive => {
                        if let Some(skipped) = reply.take() {
                            ledger.acknowledge(skipped);
                        }
                    }
                    Event::Refuse => {
                        // Refused before anything was done.
                        if reply.is_none() && ledger.next(&tree).is_some() {
                            ledger.refuse();
                        }
                    }
                    Event::Lose => {
                        helper = Helper::default();
                        reply = None;
                        ledger.lost();
                    }
                }
            }
            prop_assert!(ledger.is_settled());
            // Nothing is left of what is gone.
            for path in helper.held.keys() {
                prop_assert!(disk.contains_key(path), "{:?}", path);
            }
            let waiting = ledger.shortage().map_or(0, |(count, ..)| count);
            prop_assert_eq!(waiting, tree.cover().count().saturating_sub(most));
            prop_assert_eq!(helper.held.len() + waiting, tree.cover().count());
            if waiting > 0 {
                return Ok(());
            }
            for path in disk.keys() {
                let meant = tree.get(path).unwrap().verdict.target.clone();
                prop_assert_eq!(helper.target(path, &disk), meant.clone(), "{:?}", path);
                prop_assert_eq!(ledger.held_target(path), Some(meant));
            }
        }
    }
}
