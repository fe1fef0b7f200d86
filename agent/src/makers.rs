//! Who makes control groups, and how much of what there is room for each of them has. Pure.

use std::collections::BTreeMap;

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

/// For how many control groups there is room, with the helper or among inotify's watches, and who has how much of it. Nobody
/// counts where no limit is known.
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
    pub(crate) fn beside<'a>(
        most: usize,
        held: impl Iterator<Item = &'a ControlGroupPath>,
    ) -> Self {
        let mut room = Self::new(most);
        held.for_each(|path| room.count(path));
        room
    }

    /// For how many control groups there is room.
    pub(crate) fn most(&self) -> usize {
        self.most
    }

    pub(crate) fn is_limited(&self) -> bool {
        self.most < usize::MAX
    }

    /// Whether there is room for another control group of this user. One user may not take more room than is left for all
    /// others, so that they always have some, whoever makes control groups without end.
    pub(crate) fn is_for(&self, maker: Option<&[u8]>) -> bool {
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
    pub(crate) fn take(&mut self, path: &ControlGroupPath) -> bool {
        let is = self.is_for(maker(path));
        if is {
            self.count(path);
        }
        is
    }
}
