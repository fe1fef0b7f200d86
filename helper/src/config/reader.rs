//! Takes a located YAML tree apart, up to the first thing that is wrong.

use cgtproxy_proto::nearest::nearest;
use cgtproxy_proto::yaml::{Node, Place, SyntaxError, Value};

use super::Problem;

/// What is wrong in a file, what would be right, and where.
#[derive(Debug)]
pub(super) struct Wrong {
    pub(super) place: Place,
    pub(super) message: String,
}

impl Wrong {
    pub(super) fn new(node: &Node, message: impl Into<String>) -> Self {
        Self {
            place: node.place,
            message: message.into(),
        }
    }

    /// A value is of a wrong kind.
    fn kind(node: &Node, key: &str, wanted: &str) -> Self {
        Self::new(
            node,
            format!("'{key}' is {}; write {wanted}", node.value.kind()),
        )
    }
}

impl From<SyntaxError> for Wrong {
    fn from(error: SyntaxError) -> Self {
        let mut message = error.message;
        if let Some(help) = error.help {
            message = format!("{message}; {help}");
        }
        let place = error.place.unwrap_or(Place { line: 1, column: 1 });
        Self { place, message }
    }
}

/// A key, and what sets what it is about to its value.
pub(super) type Entry<T> = (&'static str, fn(&mut T, &Node, &str) -> Result<(), Problem>);

/// Sets whatever a map has an entry for; `key` is the map's own.
pub(super) fn set_all<T>(
    what: &mut T,
    node: &Node,
    key: Option<&str>,
    known: &[Entry<T>],
) -> Result<(), Problem> {
    for (name, set, node) in entries(node, key, known)? {
        match key {
            Some(key) => set(what, node, &format!("{key}.{name}"))?,
            None => set(what, node, name)?,
        }
    }
    Ok(())
}

/// The entries of a map, each of whose keys is known and is there once; `key` is the map's own.
fn entries<'n, T: Copy>(
    node: &'n Node,
    key: Option<&str>,
    known: &[(&'static str, T)],
) -> Result<Vec<(&'static str, T, &'n Node)>, Wrong> {
    let names = || known.iter().map(|(name, _)| *name);
    let list = || quoted(names());
    let Value::Map(map) = &node.value else {
        let wanted = format!("a map with keys among {}", list());
        return Err(match key {
            Some(key) => Wrong::kind(node, key, &wanted),
            None => Wrong::new(
                node,
                format!("the file is {}; write {wanted}", node.value.kind()),
            ),
        });
    };
    let within = key.map_or_else(String::new, |key| format!(" in '{key}'"));
    let mut found = Vec::new();
    let mut lines = Vec::new();
    for (name, node) in map {
        let Value::Text(text) = &name.value else {
            let message = format!(
                "a key{within} is {}; known are {}",
                name.value.kind(),
                list()
            );
            return Err(Wrong::new(name, message));
        };
        let Some(&(known, value)) = known.iter().find(|(known, _)| known == text) else {
            let help = match nearest(text, names()) {
                Some(near) => format!("did you mean '{near}'?"),
                None => format!("known are {}", list()),
            };
            let message = format!("unknown key '{text}'{within}; {help}");
            return Err(Wrong::new(name, message));
        };
        if let Some((_, line)) = lines.iter().find(|(key, _)| *key == known) {
            let message = format!(
                "key '{known}'{within} is there twice, first in line {line}; keep one of them"
            );
            return Err(Wrong::new(name, message));
        }
        found.push((known, value, node));
        lines.push((known, name.place.line));
    }
    Ok(found)
}

/// Names for a sentence.
fn quoted(names: impl Iterator<Item = &'static str>) -> String {
    let names: Vec<_> = names.map(|name| format!("'{name}'")).collect();
    names.join(", ")
}

/// A value as it stands in a message.
pub(super) fn shown(node: &Node) -> String {
    match &node.value {
        Value::Text(text) => format!("'{text}'"),
        Value::Integer(number) => number.to_string(),
        Value::Bool(boolean) => boolean.to_string(),
        other => other.kind().to_owned(),
    }
}

pub(super) fn wrong_value(node: &Node, key: &str, wanted: &str) -> Wrong {
    Wrong::new(node, format!("'{key}' is {}; write {wanted}", shown(node)))
}

/// What a value is, which `wanted` describes. Quotes make a string of it.
fn scalar<T>(
    node: &Node,
    key: &str,
    wanted: &str,
    of: impl Fn(&Value) -> Option<T>,
) -> Result<T, Wrong> {
    of(&node.value).ok_or_else(|| {
        let unquoted = node.value.without_quotes();
        match (&node.value, unquoted.as_ref().and_then(of)) {
            (Value::Text(text), Some(_)) => {
                let message = format!("'{key}' is a string; write {text} without the quotes");
                Wrong::new(node, message)
            }
            _ => wrong_value(node, key, wanted),
        }
    })
}

/// A number that its type and `allowed` admit, both of which `wanted` describes.
pub(super) fn number<T: TryFrom<i128>>(
    node: &Node,
    key: &str,
    wanted: &str,
    allowed: impl Fn(&T) -> bool,
) -> Result<T, Wrong> {
    scalar(node, key, wanted, |value| match value {
        Value::Integer(number) => T::try_from(*number).ok().filter(&allowed),
        _ => None,
    })
}

pub(super) fn boolean(node: &Node, key: &str) -> Result<bool, Wrong> {
    scalar(node, key, "'true' or 'false'", Value::boolean)
}
