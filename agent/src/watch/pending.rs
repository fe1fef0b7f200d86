//! In which order control groups are looked at that were announced. Pure.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Bound;

use cgtproxy_proto::path::ControlGroupPath;

use crate::makers::{Maker, maker};

/// Control groups that are to be looked at, first announced first, and each once. Where there are those of several users,
/// the users take turns, after what no user makes.
#[derive(Debug, Default)]
pub(super) struct Pending {
    /// Whether users take turns. In a user's own subtree, that user makes everything.
    shared: bool,
    own: Queue,
    by: BTreeMap<Maker, Queue>,
    /// The place of each in its queue.
    places: BTreeMap<ControlGroupPath, u64>,
    /// The next place.
    next: u64,
    /// Who had the last turn.
    last: Maker,
}

/// By their places. One that is gone leaves its place: otherwise who makes and removes control groups faster than they are
/// looked at would have more and more wait.
type Queue = BTreeMap<u64, ControlGroupPath>;

impl Pending {
    /// None yet. In a shared subtree users take turns.
    pub(super) fn new(shared: bool) -> Self {
        Self {
            shared,
            ..Self::default()
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &ControlGroupPath> {
        self.places.keys()
    }

    pub(super) fn push_back(&mut self, path: ControlGroupPath) {
        let Entry::Vacant(place) = self.places.entry(path.clone()) else {
            return;
        };
        place.insert(self.next);
        let paths = match self.shared.then(|| maker(&path)).flatten() {
            Some(maker) => self.by.entry(maker.into()).or_default(),
            None => &mut self.own,
        };
        paths.insert(self.next, path);
        self.next += 1;
    }

    /// Takes one out of turn, if it waits.
    pub(super) fn remove(&mut self, path: &ControlGroupPath) {
        let Some(place) = self.places.remove(path) else {
            return;
        };
        let Some(maker) = self.shared.then(|| maker(path)).flatten() else {
            self.own.remove(&place);
            return;
        };
        if let Some(paths) = self.by.get_mut(maker) {
            paths.remove(&place);
            if paths.is_empty() {
                self.by.remove(maker);
            }
        }
    }

    pub(super) fn pop_front(&mut self) -> Option<ControlGroupPath> {
        let path = match self.own.pop_first() {
            Some((_, path)) => path,
            None => {
                let after = (Bound::Excluded(&*self.last), Bound::Unbounded);
                let mut next = self.by.range::<[u8], _>(after).chain(&self.by);
                self.last = next.next()?.0.clone();
                let paths = self.by.get_mut(&self.last)?;
                let (_, path) = paths.pop_first()?;
                if paths.is_empty() {
                    self.by.remove(&self.last);
                }
                path
            }
        };
        self.places.remove(&path);
        Some(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_take_turns() {
        let of =
            |uid: u32, name: &str| format!("user.slice/user-{uid}.slice/user@{uid}.service/{name}");
        let all = [of(1, "b"), of(1, "a"), of(1, "c"), of(2, "b"), of(2, "a")];
        let own = ["user.slice/user-2.slice/user@2.service", "a.slice"].map(str::to_owned);
        let looked_at = |shared: bool| {
            let mut pending = Pending::new(shared);
            for path in all.iter().chain(&own) {
                pending.push_back(ControlGroupPath::from_wire(path).unwrap());
            }
            let order = std::iter::from_fn(|| pending.pop_front());
            let order = Vec::from_iter(order.map(|path| path.to_wire()));
            assert!(pending.is_empty());
            order
        };
        let in_turns = [
            &own[0], &own[1], &all[0], &all[3], &all[1], &all[4], &all[2],
        ];
        assert_eq!(looked_at(true), in_turns.map(Clone::clone));
        assert_eq!(looked_at(false), [&all[..], &own[..]].concat());
    }

    #[test]
    fn each_waits_once_and_not_when_it_is_gone() {
        for shared in [true, false] {
            let paths = ["a", "user.slice/user-1.slice/user@1.service/a"];
            let paths = paths.map(|path| ControlGroupPath::from_wire(path).unwrap());
            let mut pending = Pending::new(shared);
            for path in paths.iter().chain(&paths) {
                pending.push_back(path.clone());
            }
            assert_eq!(pending.pop_front().as_ref(), Some(&paths[0]));
            pending.remove(&paths[1]);
            assert!(pending.is_empty() && pending.pop_front().is_none());
            pending.push_back(paths[1].clone());
            assert_eq!(pending.pop_front().as_ref(), Some(&paths[1]));
            assert!(pending.is_empty() && pending.pop_front().is_none());
        }
    }
}
