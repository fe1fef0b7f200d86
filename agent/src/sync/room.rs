//! Who has how much of what the helper takes, and what waits since there is no room for it. Pure.

use std::collections::{BTreeMap, BTreeSet};

use cgtproxy_proto::path::ControlGroupPath;

/// The slice of the user who makes a control group: `user-1000.slice`.
pub(crate) type Maker = Box<[u8]>;

/// The user who makes a control group, and can make as many as they like; none if it is not below a user's service
/// manager: then the system's service manager makes it, or a service or machine to which that is delegated.
pub(crate) fn maker(path: &ControlGroupPath) -> Option<&[u8]> {
    let mut components = path.components();
    let slice = match (components.next(), components.next()) {
        (Some(b"user.slice"), Some(slice)) => slice,
        _ => return None,
    };
    let _user_manager = components.next()?;
    components.next().map(|_| slice)
}

/// How many control groups the helper takes, and who has how many of them. Nobody counts where no limit is known.
#[derive(Debug, Clone)]
pub(crate) struct Room {
    most: usize,
    taken: usize,
    by: BTreeMap<Maker, usize>,
}

impl Room {
    pub(crate) fn new(most: usize) -> Self {
        Self {
            most,
            taken: 0,
            by: BTreeMap::new(),
        }
    }

    /// What is left of the room for `most` control groups beside those that are held.
    pub(super) fn beside<'a>(
        most: usize,
        held: impl Iterator<Item = &'a ControlGroupPath>,
    ) -> Self {
        let mut room = Self::new(most);
        held.for_each(|path| room.count(path));
        room
    }

    /// How many control groups the helper takes.
    pub(super) fn most(&self) -> usize {
        self.most
    }

    pub(super) fn is_limited(&self) -> bool {
        self.most < usize::MAX
    }

    /// Whether there is room for another control group of this user. One user may not take more room than is left for all
    /// others, so that they always have some, whoever makes control groups without end.
    fn is_for(&self, maker: Option<&[u8]>) -> bool {
        let left = self.most.saturating_sub(self.taken);
        let has = maker.and_then(|maker| self.by.get(maker));
        left > 0 && has.is_none_or(|has| *has < left)
    }

    /// Whether there is room for another control group of who makes this one; there always is for the system's own.
    pub(crate) fn is_for_maker_of(&self, path: &ControlGroupPath) -> bool {
        maker(path).is_none_or(|maker| self.is_for(Some(maker)))
    }

    /// Changes for how many control groups there is room.
    pub(crate) fn resize(&mut self, most: usize) {
        self.most = most;
    }

    /// Counts a control group that is held, whether there was room for it or not.
    pub(crate) fn count(&mut self, path: &ControlGroupPath) {
        if !self.is_limited() {
            return;
        }
        self.taken += 1;
        if let Some(maker) = maker(path) {
            match self.by.get_mut(maker) {
                Some(count) => *count += 1,
                None => _ = self.by.insert(maker.into(), 1),
            }
        }
    }

    /// Counts a control group no more.
    pub(crate) fn give_back(&mut self, path: &ControlGroupPath) {
        if !self.is_limited() {
            return;
        }
        self.taken = self.taken.saturating_sub(1);
        if let Some(maker) = maker(path)
            && let Some(count) = self.by.get_mut(maker)
        {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.by.remove(maker);
            }
        }
    }

    /// Takes room for a control group. False if there is none.
    pub(super) fn take(&mut self, path: &ControlGroupPath) -> bool {
        let is = self.is_for(maker(path));
        if is {
            self.count(path);
        }
        is
    }
}

/// Control groups for which there is no room, by who makes them.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    paths: BTreeMap<Option<Maker>, BTreeSet<ControlGroupPath>>,
    /// The users about whose control groups it was told.
    told: BTreeSet<Option<Maker>>,
}

impl Waiting {
    pub(super) fn add(&mut self, path: ControlGroupPath) {
        let maker = maker(&path).map(Maker::from);
        self.paths.entry(maker).or_default().insert(path);
    }

    pub(super) fn remove(&mut self, path: &ControlGroupPath) {
        if self.paths.is_empty() {
            return;
        }
        let maker = maker(path).map(Maker::from);
        if let Some(paths) = self.paths.get_mut(&maker) {
            paths.remove(path);
            if paths.is_empty() {
                self.paths.remove(&maker);
            }
        }
    }

    /// Removes all control groups. What was told stays told.
    pub(super) fn clear(&mut self) {
        self.paths.clear();
    }

    /// Takes out one control group of each user for whom there is room now.
    pub(super) fn first_of_each(&mut self, room: &Room) -> Vec<ControlGroupPath> {
        let waiting = self.paths.iter();
        let with_room = waiting.filter(|(maker, _)| room.is_for(maker.as_deref()));
        let first = with_room.filter_map(|(_, paths)| paths.first().cloned());
        let first = Vec::from_iter(first);
        first.iter().for_each(|path| self.remove(path));
        first
    }

    /// Takes out a control group for which there is room now.
    pub(super) fn pop(&mut self, room: &Room) -> Option<ControlGroupPath> {
        let mut paths = self.paths.iter();
        let (_, paths) = paths.find(|(maker, _)| room.is_for(maker.as_deref()))?;
        let path = paths.first()?.clone();
        self.remove(&path);
        Some(path)
    }

    pub(super) fn contains(&self, path: &ControlGroupPath) -> bool {
        if self.paths.is_empty() {
            return false;
        }
        let paths = self.paths.get(&maker(path).map(Maker::from));
        paths.is_some_and(|paths| paths.contains(path))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.paths.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.paths.values().map(BTreeSet::len).sum()
    }

    pub(super) fn first(&self) -> Option<&ControlGroupPath> {
        self.paths.values().find_map(BTreeSet::first)
    }

    /// One control group of each user about whose control groups this was not told before.
    pub(super) fn news(&mut self) -> Vec<ControlGroupPath> {
        let mut news = Vec::new();
        for (maker, paths) in &self.paths {
            if !self.told.contains(maker) {
                self.told.insert(maker.clone());
                news.extend(paths.first().cloned());
            }
        }
        news
    }
}
