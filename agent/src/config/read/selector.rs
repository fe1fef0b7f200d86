//! What says which control groups a rule is about.

use unicode_width::UnicodeWidthStr;

use crate::config::finding::{Excerpt, Place};
use crate::config::mount_point::{self, MOUNT_POINT};
use crate::config::reader::{Entries, Reader, list, one_or_more};
use crate::config::yaml::Node;
use crate::policy::{Names, Outside, Pattern, PatternError, Selector, application_ids, unescape};
use crate::text::printable;

/// The keys that say which control groups a rule is about.
const SELECTORS: [&str; 4] = ["app", "unit", "slice", "match"];

/// What the names of units end in, if they can have a control group.
const UNIT_SUFFIXES: [&str; 6] = [".service", ".scope", ".slice", ".socket", ".mount", ".swap"];

/// What the names of all others end in: what such a unit is, and the suffix of the one that has the processes.
const OTHER_SUFFIXES: [(&str, &str, Option<&str>); 5] = [
    (".timer", "a timer", Some(".service")),
    (".path", "a path", Some(".service")),
    (".automount", "an automount", Some(".mount")),
    (".target", "a target", None),
    (".device", "a device", None),
];

impl Reader<'_> {
    /// What a rule says it is about. `entries` are those of `node`.
    pub(super) fn selector(&mut self, node: &Node, entries: &Entries<'_>) -> Option<Selector> {
        let given: Vec<(&str, &Node)> = SELECTORS
            .iter()
            .filter_map(|key| Some((*key, entries.get(key)?)))
            .collect();
        // All of them are looked at, so that everything is found at once.
        let mut read: Vec<Option<Selector>> = given
            .iter()
            .map(|(key, node)| match *key {
                "app" => self.names(node, key, Self::app).map(Selector::App),
                "unit" => self.names(node, key, Self::unit).map(Selector::Unit),
                "slice" => self.names(node, key, Self::slice).map(Selector::Slice),
                _ => self.pattern(node).map(Selector::Match),
            })
            .collect();
        match given.as_slice() {
            [_] => read.pop().flatten(),
            [] => {
                self.error(node.place, "this rule does not say what it is about")
                    .help = Some(
                    "write one of 'app: ID', 'unit: NAME', 'slice: NAME', 'match: REGEX'; 'match: \"\"' \
                     is everything"
                        .into(),
                );
                None
            }
            several => {
                let names: Vec<&str> = several.iter().map(|(key, _)| *key).collect();
                let count = names.len();
                let message = format!("this rule has {count} selectors: {}", list(&names));
                self.error(node.place, message).help =
                    Some("keep one of them, or write a rule for each".into());
                None
            }
        }
    }

    /// A name or a list of names, each of which `read` checks and completes.
    fn names(
        &mut self,
        node: &Node,
        key: &str,
        read: fn(&mut Self, &Node, String) -> Option<String>,
    ) -> Option<Names> {
        let items = one_or_more(node);
        if items.is_empty() {
            self.error(node.place, format!("'{key}' is an empty list"))
                .help = Some("write at least one name".into());
            return None;
        }
        let mut names = Vec::new();
        for item in items {
            let Some(text) = self.text(item, &format!("'{key}'")) else {
                continue;
            };
            let trouble = match text.as_str() {
                "" => Some("is empty".to_owned()),
                text if text.contains('/') => {
                    Some(format!("is a path, '{}', not a name", printable(text)))
                }
                _ => None,
            };
            match trouble {
                Some(trouble) => {
                    self.error(item.place, format!("'{key}' {trouble}")).help = Some(
                        "write a name, in which '*' stands for any text; 'match' takes paths"
                            .into(),
                    );
                }
                None => names.extend(read(self, item, text)),
            }
        }
        (names.len() == items.len()).then(|| Names::new(names))
    }

    fn app(&mut self, node: &Node, name: String) -> Option<String> {
        if !UNIT_SUFFIXES.iter().any(|suffix| name.ends_with(suffix)) {
            return Some(unescape(&name));
        }
        let id = application_ids(name.as_bytes()).into_iter().next();
        let name = printable(&name);
        let message = format!("'{name}' is the name of a unit, not of an application");
        self.error(node.place, message).help = Some(match id {
            Some(id) => format!("write 'app: {}' or 'unit: {name}'", printable(&id)),
            None => format!("write 'unit: {name}'"),
        });
        None
    }

    fn unit(&mut self, node: &Node, name: String) -> Option<String> {
        for (suffix, what, of_processes) in OTHER_SUFFIXES {
            let Some(stem) = name.strip_suffix(suffix) else {
                continue;
            };
            let message = format!("'{}' is {what}, and has no control group", printable(&name));
            self.error(node.place, message).help = Some(match of_processes {
                Some(".mount") => format!("write 'unit: {}.mount'", printable(stem)),
                Some(other) => {
                    let other = printable(&format!("{stem}{other}"));
                    format!("write 'unit: {other}' if that is what it starts")
                }
                None => "write the names of units that have processes".into(),
            });
            return None;
        }
        if let Some((template, instance)) = name.split_once('@')
            && (instance.is_empty() || instance.starts_with('.'))
        {
            let message = format!("'{}' is a template, and no unit", printable(&name));
            let all = printable(&format!("{template}@*{instance}"));
            self.error(node.place, message).help = Some(format!("write '{all}' for all its units"));
            return None;
        }
        let complete =
            name.ends_with('*') || UNIT_SUFFIXES.iter().any(|suffix| name.ends_with(suffix));
        Some(match complete {
            true => name,
            // As systemctl(1) has it.
            false => format!("{name}.service"),
        })
    }

    fn slice(&mut self, node: &Node, name: String) -> Option<String> {
        if name.ends_with(".slice") {
            return Some(name);
        }
        let ends_with = |suffix: &str| name.ends_with(suffix);
        let has_group = UNIT_SUFFIXES.into_iter().any(ends_with);
        if !has_group && !OTHER_SUFFIXES.iter().any(|(suffix, ..)| ends_with(suffix)) {
            return Some(format!("{name}.slice"));
        }
        let name = printable(&name);
        self.error(node.place, format!("'{name}' is no slice")).help = Some(match has_group {
            true => format!("write 'unit: {name}'"),
            false => "write the name of a slice".into(),
        });
        None
    }

    fn pattern(&mut self, node: &Node) -> Option<Pattern> {
        let text = self.text(node, "'match'")?;
        match self.patterns.compile(&text) {
            Ok(pattern) => Some(self.without_mount_point(node, &text).unwrap_or(pattern)),
            Err(PatternError { message, span }) => {
                let span = span.unwrap_or(0..text.len());
                let before = text.get(..span.start).unwrap_or_default();
                let place = self.place_within(node, &text, before);
                let finding = self.error(place, format!("bad regular expression: {message}"));
                // One line of it: a pattern may span several.
                let line_before = before.rsplit('\n').next().unwrap_or_default();
                let rest = text.get(span.start..).unwrap_or_default();
                let part = text.get(span).unwrap_or_default();
                let part = part.split('\n').next().unwrap_or_default();
                finding.excerpt = Some(Excerpt {
                    line: format!(
                        "{line_before}{}",
                        rest.split('\n').next().unwrap_or_default()
                    ),
                    before: printable(line_before).width(),
                    length: printable(part).width(),
                });
                None
            }
        }
    }

    /// Warns of a pattern that selects nothing of a user's.
    pub(in crate::config) fn warn_if_outside(&mut self, place: Place, pattern: &Pattern) {
        let what = match pattern.outside() {
            None => return,
            Some(Outside::Services) => "the machine's own services",
            Some(Outside::Sessions) => "login sessions",
            Some(Outside::Elsewhere) => {
                let message = "this rule matches nothing below a user's service manager";
                self.warning(place, message).help = Some(
                    "paths there begin with '/user.slice/user-UID.slice/user@UID.service', and others are for \
                     /etc/cgtproxy/config.yaml, with 'cgtproxy-agent --system'"
                        .into(),
                );
                return;
            }
        };
        self.warning(place, format!("this rule is about {what}"))
            .help = Some(
            "no user's agent can decide about them: it has an effect in /etc/cgtproxy/config.yaml, with \
             'cgtproxy-agent --system', only"
                .into(),
        );
    }

    /// What an expression means that begins with the mount point, where no path begins here.
    fn without_mount_point(&mut self, node: &Node, text: &str) -> Option<Pattern> {
        let cut = mount_point::without(text)?;
        let pattern = self.patterns.compile(&cut).ok()?;
        let message =
            format!("a path begins at the control group root, and not with '{MOUNT_POINT}'");
        self.warning(node.place, message).help =
            Some(format!("it is taken as '{}'", printable(&cut)));
        Some(pattern)
    }

    /// Where in the file the part of a scalar after `before` stands, if it is written there as it is.
    fn place_within(&self, node: &Node, value: &str, before: &str) -> Place {
        let source = node.range.clone().and_then(|range| self.text.get(range));
        let shift = match source {
            Some(source) if source == value => 0,
            Some(source)
                if source
                    .strip_prefix(['"', '\''])
                    .and_then(|s| s.strip_suffix(['"', '\'']))
                    == Some(value) =>
            {
                1
            }
            _ => return node.place,
        };
        if before.contains('\n') {
            return node.place;
        }
        Place {
            column: node.place.column + shift + before.chars().count() as u64,
            ..node.place
        }
    }
}
