//! The control groups that exist, their effective verdicts, and the minimal cover: the few that must
//! be in the kernel so that all the others inherit what is meant for them.

use std::collections::BTreeMap;
use std::rc::Rc;

use cgtproxy_proto::path::ControlGroupPath;

use super::{Choice, Element, Hold, Rules, Start, Verdict};
use crate::subtree::descendants;

/// One control group.
#[derive(Debug, Clone)]
struct Group {
    own: Option<Choice>,
    /// The effective verdict, and what becomes of what is below.
    decided: Element,
    /// Whether it must be in the kernel: the parent hands down something else, or nothing at all.
    mapped: bool,
}

/// The control groups of one subtree.
#[derive(Debug)]
pub(crate) struct Tree {
    /// The path of the subtree's root, from the control group root; see [`Rules::choose`].
    prefix: Vec<u8>,
    rules: Rc<Rules>,
    /// In the order of the paths, parents come before their children.
    groups: BTreeMap<ControlGroupPath, Group>,
}

impl Tree {
    /// An empty tree, in which nothing exists, not even the root.
    pub(crate) fn new(prefix: Vec<u8>, rules: Rc<Rules>) -> Self {
        Self {
            prefix,
            rules,
            groups: BTreeMap::new(),
        }
    }

    /// The rules in force.
    pub(crate) fn rules(&self) -> &Rc<Rules> {
        &self.rules
    }

    /// Whether a control group is known.
    pub(crate) fn contains(&self, path: &ControlGroupPath) -> bool {
        self.groups.contains_key(path)
    }

    /// The effective verdict of a control group; none if it is not known.
    pub(crate) fn get(&self, path: &ControlGroupPath) -> Option<&Verdict> {
        self.groups.get(path).map(|group| &group.decided.verdict)
    }

    /// All control groups, parents before children.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &ControlGroupPath> {
        self.groups.keys()
    }

    /// How many control groups there are.
    pub(crate) fn len(&self) -> usize {
        self.groups.len()
    }

    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// What the kernel must hold for this very control group; none if it inherits what is right.
    pub(crate) fn element(&self, path: &ControlGroupPath) -> Option<&Element> {
        self.groups
            .get(path)
            .filter(|g| g.mapped)
            .map(|g| &g.decided)
    }

    /// The minimal cover, parents before children.
    pub(crate) fn cover(&self) -> impl Iterator<Item = (&ControlGroupPath, &Element)> {
        self.groups
            .iter()
            .filter(|(_, group)| group.mapped)
            .map(|(path, group)| (path, &group.decided))
    }

    /// The control group whose own verdict `path` has: itself or an ancestor; none if none of them
    /// has one.
    pub(crate) fn giver(&self, path: &ControlGroupPath) -> Option<(ControlGroupPath, &Choice)> {
        let mut at = path.clone();
        loop {
            if let Some(choice) = self.groups.get(&at).and_then(|g| g.own.as_ref()) {
                return Some((at, choice));
            }
            at = at.parent()?;
        }
    }

    /// As [`Self::take_in`], or none if it was known.
    #[cfg(test)]
    pub(crate) fn add(&mut self, path: ControlGroupPath) -> Option<ControlGroupPath> {
        let mut added = None;
        self.take_in(path, &mut |path, _| added = Some(path.clone()));
        added
    }

    /// A control group has come. Returns the path as it is kept. Ancestors that were not known are taken in as well,
    /// for a control group is never without them. `new` is told of each that was not known, parents first, and
    /// whether it is part of the cover.
    pub(crate) fn take_in(
        &mut self,
        path: ControlGroupPath,
        new: &mut dyn FnMut(&ControlGroupPath, bool),
    ) -> ControlGroupPath {
        if let Some((path, _)) = self.groups.get_key_value(&path) {
            return path.clone();
        }
        let parent = path.split_last().map(|(parent, _)| parent);
        let group = loop {
            let above = parent.map(|parent| self.groups.get(parent));
            if let Some(None) = above
                && let Some(parent) = path.parent()
            {
                self.take_in(parent, new);
                continue;
            }
            break judge(&self.rules, &self.prefix, &path, above.flatten());
        };
        new(&path, group.mapped);
        self.groups.insert(path.clone(), group);
        path
    }

    /// A control group has gone, and with it everything below. Returns all that were known.
    pub(crate) fn remove(&mut self, path: &ControlGroupPath) -> Vec<ControlGroupPath> {
        let removed: Vec<ControlGroupPath> = self.below(path).cloned().collect();
        for path in &removed {
            self.groups.remove(path);
        }
        removed
    }

    /// A control group and all below it, parents before children.
    pub(crate) fn below<'a>(
        &'a self,
        path: &'a ControlGroupPath,
    ) -> impl Iterator<Item = &'a ControlGroupPath> + 'a {
        let this = self.groups.get_key_value(path).map(|(path, _)| path);
        this.into_iter().chain(descendants(&self.groups, path))
    }

    /// Judges every control group anew.
    pub(crate) fn replace_rules(&mut self, rules: Rc<Rules>) {
        self.rules = rules;
        for (path, _) in std::mem::take(&mut self.groups) {
            let parent = path.split_last().map(|(parent, _)| parent);
            let above = parent.and_then(|parent| self.groups.get(parent));
            let group = judge(&self.rules, &self.prefix, &path, above);
            self.groups.insert(path, group);
        }
    }
}

/// `above` is the parent; none for the root.
fn judge(rules: &Rules, prefix: &[u8], path: &ControlGroupPath, above: Option<&Group>) -> Group {
    let own = rules.choose(prefix, path);
    let above = above.map(|above| &above.decided);
    let inherited = above.map_or_else(|| rules.undecided(), |above| above.verdict.clone());
    let verdict = match &own {
        Some(choice) => Verdict::by_rule(choice.target.clone(), choice.enforce),
        None => inherited.clone(),
    };
    let held = above.is_some_and(|above| above.hold != Hold::None);
    // Where nothing can differ from the parent, nothing can differ from its child.
    let hold = match rules.start == Start::Closed && (held || above.is_none()) {
        true => rules.hold_below(prefix, path, &verdict),
        false => Hold::None,
    };
    let mapped = held || hold != Hold::None || verdict != inherited;
    Group {
        own,
        decided: Element { verdict, hold },
        mapped,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::policy::{ExecSlices, Pattern, Rule, Selector, Target};

    const PREFIX: &[u8] = b"/user.slice/user-1000.slice/user@1000.service";

    fn path(text: &str) -> ControlGroupPath {
        ControlGroupPath::from_wire(text).unwrap()
    }

    fn rules(list: &[(&str, Target)]) -> Rc<Rules> {
        Rc::new(Rules {
            start: Start::Open,
            users: true,
            exec_slices: None,
            rules: list
                .iter()
                .map(|(pattern, target)| Rule {
                    selector: Selector::Match(Pattern::new(pattern).unwrap()),
                    target: target.clone(),
                    enforce: false,
                    line: 1,
                })
                .collect(),
        })
    }

    fn cover(tree: &Tree) -> Vec<(String, String)> {
        tree.cover()
            .map(|(p, e)| (p.to_wire(), e.to_string()))
            .collect()
    }

    #[test]
    fn a_catch_all_is_one_element() {
        let mut tree = Tree::new(PREFIX.into(), rules(&[(".*", Target::Drop)]));
        for p in ["", "app.slice", "app.slice/a.scope", "session.slice"] {
            tree.add(path(p));
        }
        assert_eq!(cover(&tree), [(String::new(), "drop".into())]);
    }

    #[test]
    fn only_differences_are_elements() {
        let rules = rules(&[
            ("/b\\.scope$", Target::Direct),
            ("/app\\.slice", Target::Drop),
        ]);
        let mut tree = Tree::new(PREFIX.into(), rules);
        for p in [
            "app.slice/a.scope",
            "app.slice/b.scope",
            "app.slice/b.scope/c",
            "b.scope",
        ] {
            tree.add(path(p));
        }
        let expected = [
            ("app.slice", "drop"),
            ("app.slice/b.scope", "direct"),
            ("app.slice/b.scope/c", "drop"),
            // Said by a rule, for the system's policy has a say where none does.
            ("b.scope", "direct"),
        ];
        assert_eq!(
            cover(&tree),
            expected.map(|(p, t)| (p.to_owned(), t.to_owned()))
        );
    }

    #[test]
    fn other_rules_are_inherited_past_siblings_that_come_between() {
        let mut tree = Tree::new(PREFIX.into(), Rc::default());
        for p in ["a", "a-b", "a/x"] {
            tree.add(path(p));
        }
        tree.replace_rules(rules(&[("/a$", Target::Drop)]));
        assert_eq!(cover(&tree), [("a".to_owned(), "drop".to_owned())]);
    }

    #[test]
    fn removes_what_is_below_and_nothing_beside() {
        let mut tree = Tree::new(PREFIX.into(), Rc::default());
        for p in ["a", "a-b", "a-b/x", "a/x", "a/x/y", "a0", "b"] {
            tree.add(path(p));
        }
        let removed: Vec<_> = tree
            .remove(&path("a"))
            .iter()
            .map(|p| p.to_wire())
            .collect();
        assert_eq!(removed, ["a", "a/x", "a/x/y"]);
        assert_eq!(tree.len(), 5, "the root and what is beside: {tree:?}");
        assert!(tree.remove(&path("a")).is_empty());
    }

    fn target(number: u8) -> Target {
        match number % 5 {
            0 => Target::Direct,
            1 => Target::Drop,
            2 => Target::DropAll,
            n => Target::Proxy(Rc::new(["a", "b"][usize::from(n) - 3].parse().unwrap())),
        }
    }

    prop_compose! {
        fn any_rules()(
            patterns in proptest::collection::vec(("[ab/.^$-]{0,4}|cgtproxy|slice\\$|\\.\\*", 0u8..10), 0..6),
            users in any::<bool>(),
            exec in any::<bool>(),
            closed in any::<bool>(),
        ) -> Rc<Rules> {
            let proxies = [Rc::new("a".parse().unwrap()), Rc::new("b".parse().unwrap())];
            Rc::new(Rules {
                start: if closed { Start::Closed } else { Start::Open },
                users,
                exec_slices: (users && exec).then(|| ExecSlices::new(&proxies)),
                rules: patterns
                    .into_iter()
                    .filter_map(|(pattern, number)| Some(Rule {
                        selector: Selector::Match(Pattern::new(&pattern).ok()?),
                        target: target(number),
                        enforce: !users && number >= 5,
                        line: 1,
                    }))
                    .collect(),
            })
        }
    }

    #[derive(Debug, Clone)]
    enum Event {
        Add(String),
        Remove(String),
        Replace(Rc<Rules>),
    }

    fn any_path() -> impl Strategy<Value = String> {
        let name = prop_oneof!["[ab-]{1,2}", "cgtproxy-(a|b|direct|drop|proxy)\\.slice"];
        proptest::collection::vec(name, 0..5).prop_map(|names| names.join("/"))
    }

    fn any_event() -> impl Strategy<Value = Event> {
        prop_oneof![
            6 => any_path().prop_map(Event::Add),
            3 => any_path().prop_map(Event::Remove),
            1 => any_rules().prop_map(Event::Replace),
        ]
    }

    /// The rules as a person would read them.
    fn plain_reading(rules: &Rules, path: &ControlGroupPath) -> Verdict {
        match (rules.choose(PREFIX, path), path.parent()) {
            (Some(choice), _) => Verdict::by_rule(choice.target, choice.enforce),
            (None, Some(parent)) => plain_reading(rules, &parent),
            (None, None) => rules.undecided(),
        }
    }

    /// What the kernel does with a cover: the deepest element decides.
    fn kernel(
        rules: &Rules,
        cover: &BTreeMap<ControlGroupPath, Element>,
        path: &ControlGroupPath,
    ) -> Element {
        let mut at = path.clone();
        loop {
            if let Some(element) = cover.get(&at) {
                let mut element = element.clone();
                if at == *path {
                    element.hold = Hold::None;
                }
                return element;
            }
            match at.parent() {
                Some(parent) => at = parent,
                None => {
                    return Element {
                        verdict: rules.undecided(),
                        hold: Hold::None,
                    };
                }
            }
        }
    }

    proptest! {
        #[test]
        fn the_cover_says_what_the_rules_say(
            first in any_rules(),
            events in proptest::collection::vec(any_event(), 0..60),
            more in proptest::collection::vec(any_path(), 0..8),
        ) {
            let mut rules = first.clone();
            let mut tree = Tree::new(PREFIX.into(), first);
            let mut exist: BTreeSet<ControlGroupPath> = BTreeSet::new();
            for event in events {
                match event {
                    Event::Add(p) => {
                        let p = path(&p);
                        tree.add(p.clone());
                        let mut at = Some(p);
                        while let Some(p) = at {
                            at = p.parent();
                            exist.insert(p);
                        }
                    }
                    Event::Remove(p) => {
                        let p = path(&p);
                        tree.remove(&p);
                        exist.retain(|other| !other.is_within(&p));
                    }
                    Event::Replace(new) => {
                        rules = new.clone();
                        tree.replace_rules(new);
                    }
                }
            }
            let known: BTreeSet<_> = tree.iter().cloned().collect();
            prop_assert_eq!(&known, &exist);
            let cover: BTreeMap<_, _> = tree.cover().map(|(p, t)| (p.clone(), t.clone())).collect();
            for p in &exist {
                let meant = plain_reading(&rules, p);
                let has = kernel(&rules, &cover, p);
                prop_assert_eq!(&has.verdict, &meant, "{:?}", p);
                prop_assert_eq!(has.hold, Hold::None, "{:?}", p);
                prop_assert_eq!(tree.get(p).unwrap(), &meant);
                let given = tree.giver(p).map(|(_, c)| Verdict::by_rule(c.target.clone(), c.enforce));
                prop_assert_eq!(given.unwrap_or_else(|| rules.undecided()), meant);
                if rules.start == Start::Open && let Some(element) = cover.get(p) {
                    // Minimal: what the parent hands down is never said again.
                    let above = p.parent().map(|up| kernel(&rules, &cover, &up).verdict);
                    prop_assert_ne!(&element.verdict, &above.unwrap_or_else(|| rules.undecided()));
                    prop_assert_eq!(element.hold, Hold::None);
                }
                // What is not there yet has the right verdict already, or is held until it has it: as well against users'
                // own policies if either is enforced.
                for more in &more {
                    let whole = [p.as_bytes(), more.as_bytes()].join(&b'/');
                    let Ok(new) = ControlGroupPath::from_bytes(whole.trim_ascii_start()) else { continue };
                    if rules.start == Start::Closed && !exist.contains(&new) {
                        let meant = plain_reading(&rules, &new);
                        let has = kernel(&rules, &cover, &new);
                        prop_assert!(has.hold >= has.verdict.hold_for(&meant), "{:?}: {} for {:?}", new, has, meant);
                    }
                }
            }
        }
    }
}
