//! What waits since there is no room for it in what the helper takes. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;

use cgtproxy_proto::path::ControlGroupPath;

use crate::makers::{Maker, Room, maker};

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

/// That a user has more control groups with a verdict of their own than one may have, for a person.
pub(crate) fn too_many_control_groups(limit: impl Display, closed: bool) -> String {
    match closed {
        true => format!(
            "the administrator allows no more than {limit} control groups with a verdict of their \
             own per user, and with 'start: closed' each has one that rules could decide otherwise \
             than its slice: those that are too many stay without network; tie rules to slices \
             with '^', or let packets leave at once with 'start: open'"
        ),
        false => format!(
            "the administrator allows no more than {limit} control groups with a verdict of their \
             own per user: let rules match slices rather than everything in them"
        ),
    }
}
