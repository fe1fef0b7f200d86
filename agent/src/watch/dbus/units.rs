//! What is known of systemd's units, and what is still to be asked about them. Pure.

use std::collections::{HashMap, HashSet, VecDeque};

use cgtproxy_proto::path::ControlGroupPath;

use super::{Report, interface};
use crate::watch::Hint;

/// How far it is known which control group a unit has.
#[derive(Debug, Default, PartialEq, Eq)]
enum Asked {
    /// What is known is up to date.
    #[default]
    No,
    /// The unit is to be asked about.
    Queued,
    /// The unit has been asked about.
    Sent,
    /// The unit has changed since it was asked about.
    Again,
}

/// A unit of a kind that has a control group.
#[derive(Debug, Default)]
struct Unit {
    object: String,
    group: Option<(ControlGroupPath, Option<u64>)>,
    /// The path that came with the last answer, whose id has not come yet.
    answered: Option<ControlGroupPath>,
    asked: Asked,
    /// Whether it is certainly loaded.
    loaded: bool,
}

/// A unit that is to be asked about.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Question {
    pub(super) name: String,
    pub(super) object: String,
    /// Whether it is certainly loaded.
    pub(super) loaded: bool,
}

/// The units that have control groups.
#[derive(Debug, Default)]
pub(super) struct Units {
    /// By name.
    units: HashMap<String, Unit>,
    queue: VecDeque<String>,
    hints: Vec<Hint>,
    /// Units whose control groups are still to be known before all are reported; none if all were reported.
    missing: Option<HashSet<String>>,
    /// All control groups have been reported.
    reported: bool,
}

impl Units {
    /// All units are asked for.
    pub(super) fn list(&mut self) {
        // Until the list is there, something is missing.
        self.missing = Some(HashSet::from([String::new()]));
    }

    /// Whether all control groups have been reported.
    pub(super) fn were_reported(&self) -> bool {
        self.reported
    }

    /// Whether there is such a unit, as far as is known.
    pub(super) fn contains(&self, name: &str) -> bool {
        self.units.contains_key(name)
    }

    /// The next unit that is to be asked about.
    pub(super) fn next_question(&mut self) -> Option<Question> {
        while let Some(name) = self.queue.pop_front() {
            // Removed since.
            let Some(unit) = self.units.get_mut(&name) else {
                self.missing_no_more(&name);
                continue;
            };
            unit.asked = Asked::Sent;
            let (object, loaded) = (unit.object.clone(), unit.loaded);
            return Some(Question {
                name,
                object,
                loaded,
            });
        }
        None
    }

    /// The report that is due, if one is.
    pub(super) fn take_report(&mut self) -> Option<Report> {
        match &self.missing {
            // Not before all of it is known.
            Some(missing) if !missing.is_empty() => None,
            Some(_) => {
                self.missing = None;
                self.reported = true;
                self.hints.clear();
                let groups = self.units.values().filter_map(|unit| unit.group.clone());
                Some(Report::All(groups.collect()))
            }
            None if self.hints.is_empty() => None,
            None => Some(Report::Hints(std::mem::take(&mut self.hints))),
        }
    }

    /// A unit may have another control group than is known.
    pub(super) fn changed(&mut self, name: &str, object: Option<&str>, loaded: bool) {
        if interface(name).is_none() {
            return;
        }
        let unit = self.units.entry(name.to_owned()).or_default();
        if let Some(object) = object {
            object.clone_into(&mut unit.object);
        }
        unit.loaded = loaded && !unit.object.is_empty();
        match unit.asked {
            Asked::No => {
                unit.asked = Asked::Queued;
                self.queue.push_back(name.to_owned());
            }
            Asked::Sent => unit.asked = Asked::Again,
            Asked::Queued | Asked::Again => {}
        }
    }

    /// systemd has forgotten a unit.
    pub(super) fn removed(&mut self, name: &str) {
        self.missing_no_more(name);
        if let Some(unit) = self.units.remove(name)
            && let Some((path, _)) = unit.group
        {
            self.hints.push(Hint::NoUnit(path));
        }
    }

    fn missing_no_more(&mut self, name: &str) {
        if let Some(missing) = &mut self.missing {
            missing.remove(name);
        }
    }

    /// All units that there are: each one's name, its object, and whether it is active.
    pub(super) fn listed<'u>(&mut self, units: impl Iterator<Item = (&'u str, &'u str, bool)>) {
        let mut there = HashSet::new();
        for (name, object, active) in units {
            if interface(name).is_none() {
                continue;
            }
            if active || self.units.contains_key(name) {
                self.changed(name, Some(object), active);
                there.insert(name.to_owned());
            }
        }
        let gone = self.units.keys().filter(|name| !there.contains(*name));
        for name in gone.cloned().collect::<Vec<_>>() {
            self.removed(&name);
        }
        self.missing = Some(there);
    }

    /// Notes the path of a unit's control group.
    pub(super) fn answered_path(&mut self, name: &str, path: Option<ControlGroupPath>) {
        if let Some(unit) = self.units.get_mut(name) {
            unit.answered = path;
        }
    }

    /// Notes the id of a unit's control group, which is answered after its path.
    pub(super) fn answered_id(&mut self, name: &str, id: Option<u64>) {
        let Some(unit) = self.units.get_mut(name) else {
            return;
        };
        let group = unit.answered.take().map(|path| (path, id));
        let before = std::mem::replace(&mut unit.group, group.clone());
        let again = unit.asked == Asked::Again;
        unit.asked = match again {
            true => Asked::Queued,
            false => Asked::No,
        };
        if again {
            self.queue.push_back(name.to_owned());
        }
        if let Some((path, _)) = before
            && group.as_ref().map(|(new, _)| new) != Some(&path)
        {
            self.hints.push(Hint::NoUnit(path));
        }
        if let Some((path, id)) = group {
            self.hints.push(Hint::Unit { path, id });
        }
        self.missing_no_more(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> ControlGroupPath {
        ControlGroupPath::from_wire(text).unwrap()
    }

    /// The units that are asked about next.
    fn asked(units: &mut Units) -> Vec<String> {
        std::iter::from_fn(|| units.next_question().map(|question| question.name)).collect()
    }

    fn answer(units: &mut Units, name: &str, group: Option<(&str, u64)>) {
        units.answered_path(name, group.map(|(text, _)| path(text)));
        units.answered_id(name, group.map(|(_, id)| id));
    }

    fn hints(units: &mut Units) -> Vec<Hint> {
        match units.take_report() {
            Some(Report::Hints(hints)) => hints,
            None => Vec::new(),
            other => panic!("{other:?}"),
        }
    }

    fn unit(text: &str, id: u64) -> Hint {
        Hint::Unit {
            path: path(text),
            id: Some(id),
        }
    }

    fn all(units: &mut Units) -> Option<Vec<(ControlGroupPath, Option<u64>)>> {
        match units.take_report()? {
            Report::All(all) => Some(all),
            other => panic!("{other:?}"),
        }
    }

    /// `a.scope` is known and was reported.
    fn known() -> Units {
        let mut units = Units::default();
        units.list();
        assert!(units.take_report().is_none());
        units.listed([("a.scope", "/a", true), ("b.target", "/b", true)].into_iter());
        assert!(units.take_report().is_none());
        assert_eq!(asked(&mut units), ["a.scope"]);
        answer(&mut units, "a.scope", Some(("a", 1)));
        assert_eq!(all(&mut units), Some(vec![(path("a"), Some(1))]));
        assert!(units.were_reported());
        units
    }

    #[test]
    fn one_that_changes_while_it_is_asked_about_is_asked_about_once_more() {
        let mut units = known();
        units.changed("a.scope", None, false);
        units.changed("a.scope", None, false);
        assert_eq!(asked(&mut units), ["a.scope"]);
        for _ in 0..3 {
            units.changed("a.scope", None, false);
        }
        assert_eq!(asked(&mut units), [] as [&str; 0]);
        answer(&mut units, "a.scope", Some(("a", 1)));
        assert_eq!(asked(&mut units), ["a.scope"]);
        answer(&mut units, "a.scope", Some(("a", 2)));
        assert_eq!(asked(&mut units), [] as [&str; 0]);
        assert_eq!(hints(&mut units), [unit("a", 1), unit("a", 2)]);
    }

    #[test]
    fn one_that_is_removed_and_new_again_while_a_question_is_out_ends_up_with_what_it_has() {
        let mut units = known();
        units.changed("a.scope", None, false);
        assert_eq!(asked(&mut units), ["a.scope"]);
        units.removed("a.scope");
        assert!(!units.contains("a.scope"));
        units.changed("a.scope", Some("/a"), false);
        // About the one before.
        answer(&mut units, "a.scope", None);
        assert_eq!(asked(&mut units), ["a.scope"]);
        answer(&mut units, "a.scope", Some(("b", 2)));
        assert_eq!(asked(&mut units), [] as [&str; 0]);
        assert_eq!(hints(&mut units), [Hint::NoUnit(path("a")), unit("b", 2)]);
    }

    #[test]
    fn after_a_reload_all_are_reported_when_all_are_known() {
        let mut units = known();
        units.changed("a.scope", None, false);
        assert_eq!(asked(&mut units), ["a.scope"]);
        units.list();
        // Nothing by halves.
        answer(&mut units, "a.scope", Some(("a", 2)));
        assert!(units.take_report().is_none());
        let listed = [
            ("a.scope", "/a", false),
            ("c.service", "/c", true),
            ("d.service", "/d", false),
        ];
        units.listed(listed.into_iter());
        assert_eq!(asked(&mut units), ["a.scope", "c.service"]);
        units.removed("c.service");
        assert!(units.take_report().is_none());
        answer(&mut units, "a.scope", Some(("a", 3)));
        assert_eq!(all(&mut units), Some(vec![(path("a"), Some(3))]));
        // One that is not in the list is gone.
        units.list();
        units.listed(std::iter::empty());
        assert_eq!(all(&mut units), Some(Vec::new()));
    }
}
