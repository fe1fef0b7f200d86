//! The rules, and which of them nothing ever reaches.

use crate::config::Scope;
use crate::config::finding::Place;
use crate::config::reader::{Entries, Reader, list, nearest};
use crate::config::yaml::{Node, Value};
use crate::policy::{ExecSlices, Outside, Rule, Selector, Target};
use crate::text::printable;

use super::proxies::Proxies;

const RULE_KEYS: &[&str] = &[
    "app", "unit", "slice", "match", "tproxy", "proxy", "drop", "direct", "enforce",
];

impl Reader<'_> {
    pub(super) fn rules(
        &mut self,
        node: &Node,
        proxies: &Proxies,
        slices: Option<&ExecSlices>,
        used: &mut Vec<String>,
        scope: Scope,
    ) -> Vec<Rule> {
        let Value::List(items) = &node.value else {
            self.wrong_kind(node, "'rules'", "a list of rules");
            return Vec::new();
        };
        let mut rules: Vec<Rule> = Vec::new();
        let mut numbers: Vec<usize> = Vec::new();
        let mut places: Vec<Place> = Vec::new();
        for (item, number) in items.iter().zip(1usize..) {
            let Some(rule) = self.rule(item, proxies, used, scope) else {
                continue;
            };
            self.warn_if_unreachable(item.place, &rule, slices, numbers.iter().zip(&rules));
            numbers.push(number);
            places.push(item.place);
            rules.push(rule);
        }
        self.warn_of_ways_out(&rules, &numbers, &places);
        rules
    }

    /// Warns of rules that let go what users may call their own units, before one that is enforced on users.
    fn warn_of_ways_out(&mut self, rules: &[Rule], numbers: &[usize], places: &[Place]) {
        let is_enforced = |(rule, _): &(&Rule, &usize)| {
            let of_users = match &rule.selector {
                Selector::Match(pattern) => pattern.is_about_users(),
                Selector::App(_) | Selector::Unit(_) | Selector::Slice(_) => true,
            };
            rule.enforce && rule.target != Target::Direct && of_users
        };
        let mut enforced = rules.iter().zip(numbers).enumerate();
        let Some((last, (enforced, number))) = enforced.rfind(|(_, rule)| is_enforced(rule)) else {
            return;
        };
        let drops = !matches!(enforced.target, Target::Proxy(_));
        for (rule, place) in rules.iter().zip(places).take(last) {
            let is_way_out = match &rule.selector {
                // Of one that names a user's manager, or nothing at all, somebody has thought.
                Selector::Match(pattern) => {
                    pattern.outside() == Some(Outside::Services) && pattern.is_about_users()
                }
                Selector::App(_) | Selector::Unit(_) | Selector::Slice(_) => true,
            };
            let lets_out = match rule.target {
                Target::Direct => true,
                Target::Proxy(_) => drops,
                _ => false,
            };
            if is_way_out && lets_out {
                let message = format!(
                    "users name their own units, and so get out of rule {number}, which is enforced"
                );
                self.warning(*place, message).help = Some(
                    "write 'match' with the whole path, as in 'match: ^/system\\.slice/NAME\\.service$'"
                        .into(),
                );
            }
        }
    }

    pub(super) fn warn_of_unused(&mut self, proxies: &Proxies, used: &[String]) {
        for proxy in &proxies.list {
            let name = proxy.name.as_str();
            if !used.iter().any(|used| used == name)
                && let Some(place) = proxies.places.get(name)
            {
                self.warning(*place, format!("nothing uses the proxy '{name}'"));
            }
        }
    }

    /// `earlier`: the rules before this one, with their numbers.
    fn warn_if_unreachable<'r>(
        &mut self,
        place: Place,
        rule: &Rule,
        slices: Option<&ExecSlices>,
        mut earlier: impl Iterator<Item = (&'r usize, &'r Rule)>,
    ) {
        let hider = earlier.find_map(|(number, other)| {
            if other.selector.is_catch_all() {
                Some((other.line, number, "matches everything"))
            } else if other.selector.covers(&rule.selector) {
                Some((other.line, number, "matches the same"))
            } else {
                None
            }
        });
        if let Some((line, number, why)) = hider {
            self.warning(place, "this rule is never reached").help = Some(format!(
                "rule {number} in line {line} comes first and {why}"
            ));
        } else if let Some((slice, target)) = slices.and_then(|slices| slices.overrules(rule)) {
            let message = format!("this rule decides about nothing in '{slice}'");
            self.warning(place, message).help = Some(format!(
                "the slices of cgtproxy-exec come before rules, and the target of this one is '{target}': write \
                 'exec-slices: false', or take the rule out"
            ));
        }
    }

    fn rule(
        &mut self,
        node: &Node,
        proxies: &Proxies,
        used: &mut Vec<String>,
        scope: Scope,
    ) -> Option<Rule> {
        let entries = self.entries(node, "a rule", RULE_KEYS)?;
        let selector = self.selector(node, &entries);
        if let (Scope::User, Some(Selector::Match(pattern)), Some(node)) =
            (scope, &selector, entries.get("match"))
        {
            self.warn_if_outside(node.place, pattern);
        }
        let targets = self.targets(&entries, proxies, used);
        let enforce = entries
            .get("enforce")
            .and_then(|node| self.enforce(node, scope))
            .unwrap_or(false);
        let names: Vec<&str> = targets.iter().map(|(name, _)| *name).collect();
        match targets.as_slice() {
            [(_, target)] => Some(Rule {
                selector: selector?,
                target: target.clone()?,
                enforce,
                line: node.place.line,
            }),
            [] => {
                self.error(node.place, "this rule has no target").help = Some(
                    "write one of 'tproxy: NAME', 'proxy: NAME', 'drop: true', 'direct: true'"
                        .into(),
                );
                None
            }
            _ => {
                let message = format!("this rule has {} targets: {}", names.len(), list(&names));
                self.error(node.place, message).help = Some("keep one of them".into());
                None
            }
        }
    }

    /// The targets of a rule by their keys; none in the place of a wrong one. What is switched off is no target.
    fn targets(
        &mut self,
        entries: &Entries<'_>,
        proxies: &Proxies,
        used: &mut Vec<String>,
    ) -> Vec<(&'static str, Option<Target>)> {
        let mut targets = Vec::new();
        for key in ["tproxy", "proxy"] {
            if let Some(name) = entries.get(key) {
                let target = self.reference(name, key, proxies, used);
                targets.push((key, target));
            }
        }
        if let Some(drop) = entries.get("drop") {
            let wanted = "'true', or 'all' to drop bypassed destinations too";
            match &drop.value {
                Value::Text(text) if text == "all" => {
                    targets.push(("drop", Some(Target::DropAll)));
                }
                _ => match self.switch(drop, "'drop'", wanted) {
                    Some(false) => {}
                    on => targets.push(("drop", on.map(|_| Target::Drop))),
                },
            }
        }
        if let Some(direct) = entries.get("direct") {
            match self.boolean(direct, "'direct'") {
                Some(false) => {}
                on => targets.push(("direct", on.map(|_| Target::Direct))),
            }
        }
        targets
    }

    fn enforce(&mut self, node: &Node, scope: Scope) -> Option<bool> {
        if scope == Scope::User {
            self.error(
                node.place,
                "only the system configuration can enforce a rule",
            )
            .help = Some(
                "your own rules hold for your own applications already; the line can go".into(),
            );
            return None;
        }
        self.boolean(node, "'enforce'")
    }

    /// The proxy that a rule or the gateway names.
    pub(super) fn reference(
        &mut self,
        node: &Node,
        key: &str,
        proxies: &Proxies,
        used: &mut Vec<String>,
    ) -> Option<Target> {
        let name = self.text(node, &format!("'{key}'"))?;
        if proxies.places.contains_key(&name) {
            used.push(name.clone());
            // Known, but wrong itself: that has been said where it stands.
            let proxy = proxies.list.iter().find(|p| p.name.as_str() == name)?;
            return Some(Target::Proxy(proxy.name.clone()));
        }
        let mut names: Vec<&str> = proxies.places.keys().map(String::as_str).collect();
        names.sort_unstable();
        let help = match name.as_str() {
            "direct" => "write 'direct: true'".to_owned(),
            "drop" | "drop-all" => "write 'drop: true' or 'drop: all'".to_owned(),
            _ => match nearest(&name, names.iter().copied()) {
                Some(near) => format!("did you mean '{near}'?"),
                None if names.is_empty() => "the file names no proxy".to_owned(),
                None => format!("known are {}", list(&names)),
            },
        };
        let message = format!("there is no {key} '{}'", printable(&name));
        self.error(node.place, message).help = Some(help);
        None
    }
}
