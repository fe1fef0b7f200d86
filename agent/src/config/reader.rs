//! Takes a located YAML tree apart and keeps what was found wrong on the way.

use std::num::NonZeroU16;

use super::finding::{Finding, Findings, Place, Severity};
use super::yaml::{Node, Value};
use crate::policy::PatternCompiler;
use crate::text::printable;

/// Collects findings.
#[derive(Debug)]
pub(crate) struct Reader<'t> {
    pub(crate) text: &'t str,
    pub(crate) patterns: PatternCompiler,
    findings: Findings,
    /// The newest finding, to which something may still be added.
    last: Option<Finding>,
}

/// The entries of a map whose keys are known, each at most once.
#[derive(Debug)]
pub(crate) struct Entries<'n>(Vec<(&'static str, &'n Node)>);

impl<'n> Entries<'n> {
    /// The value of a key, if it is there and not empty.
    pub(crate) fn get(&self, key: &str) -> Option<&'n Node> {
        self.0
            .iter()
            .find(|(name, _)| *name == key)
            .map(|(_, node)| *node)
            .filter(|node| !matches!(node.value, Value::Null))
    }
}

impl<'t> Reader<'t> {
    pub(crate) fn new(text: &'t str, findings: Findings) -> Self {
        Self {
            text,
            patterns: PatternCompiler::default(),
            findings,
            last: None,
        }
    }

    /// All that was found, in the order of the file.
    pub(crate) fn finish(self) -> Findings {
        let mut findings = self.findings;
        findings.list.extend(self.last);
        findings.list.sort_by_key(|f| f.place);
        findings
    }

    pub(crate) fn error(&mut self, place: Place, message: impl Into<String>) -> &mut Finding {
        self.add(Finding::new(Severity::Error, place, message))
    }

    pub(crate) fn warning(&mut self, place: Place, message: impl Into<String>) -> &mut Finding {
        self.add(Finding::new(Severity::Warning, place, message))
    }

    fn add(&mut self, finding: Finding) -> &mut Finding {
        self.findings.list.extend(self.last.take());
        self.last.insert(finding)
    }

    /// Complains about a value of a wrong kind.
    pub(crate) fn wrong_kind(&mut self, node: &Node, what: &str, wanted: &str) {
        let kind = node.value.kind();
        self.error(node.place, format!("{what} is {kind}, not {wanted}"));
    }

    /// Complains about a boolean or a number in quotes, which make a string of it.
    pub(crate) fn quoted(&mut self, node: &Node, what: &str, text: &str) {
        self.error(node.place, format!("{what} is a string")).help =
            Some(format!("write {} without the quotes", printable(text)));
    }

    /// The number of a port.
    pub(crate) fn port(&mut self, node: &Node) -> Option<NonZeroU16> {
        let port = |value: &Value| match value {
            Value::Integer(number) => u16::try_from(*number).ok().and_then(NonZeroU16::new),
            _ => None,
        };
        if let Some(port) = port(&node.value) {
            return Some(port);
        }
        let written = self.written(node);
        if node
            .value
            .without_quotes()
            .as_ref()
            .and_then(port)
            .is_some()
        {
            self.quoted(node, "'port'", &written);
            return None;
        }
        let message = format!("'{}' is no port", printable(&written));
        self.error(node.place, message).help = Some("a port is a number from 1 to 65535".into());
        None
    }

    /// The map's entries; `what` names the map in messages. Unknown and repeated keys are errors.
    pub(crate) fn entries<'n>(
        &mut self,
        node: &'n Node,
        what: &str,
        known: &[&'static str],
    ) -> Option<Entries<'n>> {
        let Value::Map(map) = &node.value else {
            self.wrong_kind(node, what, &format!("a map with the keys {}", list(known)));
            return None;
        };
        let mut entries: Vec<(&'static str, &Node)> = Vec::new();
        let mut places: Vec<Place> = Vec::new();
        let mut listed = false;
        for (key, value) in map {
            let name = self.written(key);
            match known.iter().find(|k| **k == name) {
                None => {
                    let finding = self.error(
                        key.place,
                        format!("unknown key '{}' in {what}", printable(&name)),
                    );
                    finding.help = match nearest(&name, known.iter().copied()) {
                        Some(near) => Some(format!("did you mean '{near}'?")),
                        // Of another program's file, none of the keys may be known.
                        None if listed => None,
                        None => {
                            listed = true;
                            Some(format!("known are {}", list(known)))
                        }
                    };
                }
                Some(known) => {
                    let first = entries.iter().position(|(k, _)| k == known);
                    match first.and_then(|at| places.get(at)).copied() {
                        Some(first) => self.repeated(key.place, first, &format!("key '{known}'")),
                        None => {
                            entries.push((known, value));
                            places.push(key.place);
                        }
                    }
                }
            }
        }
        Some(Entries(entries))
    }

    /// Complains about something that is there twice.
    pub(crate) fn repeated(&mut self, place: Place, first: Place, what: &str) {
        let line = first.line;
        self.error(
            place,
            format!("{what} is there twice, first in line {line}"),
        )
        .help = Some("keep one of them".into());
    }

    /// A scalar as it is written, so that a name like `1e3` or `on` is not taken for something else.
    pub(crate) fn written(&self, node: &Node) -> String {
        match &node.value {
            Value::Text(text) => text.clone(),
            Value::List(_) | Value::Map(_) => node.value.kind().to_owned(),
            other => {
                let source = node.range.clone().and_then(|range| self.text.get(range));
                match (source, other) {
                    (Some(source), _) => source.trim().to_owned(),
                    (None, Value::Bool(b)) => b.to_string(),
                    (None, Value::Integer(i)) => i.to_string(),
                    (None, Value::Float(f)) => f.to_string(),
                    (None, _) => String::new(),
                }
            }
        }
    }

    /// A string.
    pub(crate) fn text(&mut self, node: &Node, what: &str) -> Option<String> {
        match &node.value {
            Value::List(_) | Value::Map(_) | Value::Null => {
                let colon = self.ends_in_colon(node);
                self.wrong_kind(node, what, "a string");
                if let Some(text) = colon
                    && let Some(last) = &mut self.last
                {
                    last.help = Some(format!(
                        "a text with a ':' at its end needs quotes: '{}'",
                        printable(&text)
                    ));
                }
                None
            }
            _ => Some(self.written(node)),
        }
    }

    /// The text with a colon at its end that YAML takes for a map of one key without a value, like `fc00::` in a list.
    fn ends_in_colon(&self, node: &Node) -> Option<String> {
        match &node.value {
            Value::Map(map) => match map.as_slice() {
                [(key, value)] if matches!(value.value, Value::Null) => {
                    Some(format!("{}:", self.written(key)))
                }
                _ => None,
            },
            _ => None,
        }
    }

    /// One of a few words.
    pub(crate) fn one_of<T: Copy>(
        &mut self,
        node: &Node,
        what: &str,
        known: &[(&str, T)],
    ) -> Option<T> {
        let word = self.text(node, what)?;
        if let Some((_, value)) = known.iter().find(|(name, _)| *name == word) {
            return Some(*value);
        }
        let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
        let message = format!("{what} is '{}'", printable(&word));
        self.error(node.place, message).help = Some(match nearest(&word, names.iter().copied()) {
            Some(near) => format!("did you mean '{near}'?"),
            None => format!("write one of {}", list(&names)),
        });
        None
    }

    /// A boolean, in all the ways YAML has had to write one.
    pub(crate) fn boolean(&mut self, node: &Node, what: &str) -> Option<bool> {
        self.switch(node, what, "'true' or 'false'")
    }

    /// The boolean of a key, which need not be there.
    pub(crate) fn flag(&mut self, entries: &Entries<'_>, key: &str, default: bool) -> bool {
        let value = entries.get(key);
        let value = value.and_then(|node| self.boolean(node, &format!("'{key}'")));
        value.unwrap_or(default)
    }

    /// A boolean where something else is possible too; `wanted` names all that is.
    pub(crate) fn switch(&mut self, node: &Node, what: &str, wanted: &str) -> Option<bool> {
        match &node.value {
            value if value.boolean().is_some() => return value.boolean(),
            Value::Text(text) => {
                if let Some(Value::Bool(_)) = node.value.without_quotes() {
                    self.quoted(node, what, text);
                    return None;
                }
                let message = format!("{what} is '{}'", printable(text));
                self.error(node.place, message).help = Some(format!("write {wanted}"));
            }
            _ => self.wrong_kind(node, what, wanted),
        }
        None
    }
}

/// What is listed where one that stands for itself need not be in a list.
pub(crate) fn one_or_more(node: &Node) -> &[Node] {
    match &node.value {
        Value::List(items) => items,
        _ => std::slice::from_ref(node),
    }
}

/// A list for a sentence. The names may be a file's.
pub(crate) fn list(names: &[impl AsRef<str>]) -> String {
    names
        .iter()
        .map(|name| format!("'{}'", printable(name.as_ref())))
        .collect::<Vec<_>>()
        .join(", ")
}

/// The name that somebody who wrote another one may have meant, for a sentence.
pub(crate) fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    cgtproxy_proto::nearest::nearest(name, known).map(printable)
}
