//! In which order control groups are looked at that were announced. Pure.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;

use cgtproxy_proto::path::ControlGroupPath;

use crate::makers::{Maker, maker};

/// Control groups that are to be looked at, first announced first. Where there are those of several users, the users take
/// turns, after what no user makes.
#[derive(Debug, Default)]
pub(super) struct Pending {
    /// Whether users take turns. In a user's own subtree, that user makes everything.
    shared: bool,
    own: VecDeque<ControlGroupPath>,
    by: BTreeMap<Maker, VecDeque<ControlGroupPath>>,
    /// Who had the last turn.
    last: Maker,
}

impl Pending {
    /// None yet. In a shared subtree users take turns.
    pub(super) fn new(shared: bool) -> Self {
        Self {
            shared,
            ..Self::default()
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.own.is_empty() && self.by.is_empty()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &ControlGroupPath> {
        self.own.iter().chain(self.by.values().flatten())
    }

    pub(super) fn push_back(&mut self, path: ControlGroupPath) {
        let maker = self.shared.then(|| maker(&path)).flatten();
        let paths = match maker {
            Some(maker) => self.by.entry(maker.into()).or_default(),
            None => &mut self.own,
        };
        paths.push_back(path);
    }

    pub(super) fn pop_front(&mut self) -> Option<ControlGroupPath> {
        if let Some(path) = self.own.pop_front() {
            return Some(path);
        }
        let after = (Bound::Excluded(&*self.last), Bound::Unbounded);
        let mut next = self.by.range::<[u8], _>(after).chain(&self.by);
        self.last = next.next()?.0.clone();
        let paths = self.by.get_mut(&self.last)?;
        let path = paths.pop_front();
        if paths.is_empty() {
            self.by.remove(&self.last);
        }
        path
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
}
