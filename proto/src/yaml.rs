//! YAML as a tree that knows where each of its nodes stands, so that what is wrong with a file can be said in its place.

use std::fmt;
use std::ops::Range;

use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::budget::BudgetBreach;
use serde_saphyr::options::DuplicateKeyPolicy;
use serde_saphyr::{Error, Location, Options, Spanned};

use crate::file::LONGEST;

/// A position in a file, counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The line.
    pub line: u64,
    /// The character within the line.
    pub column: u64,
}

/// A value and where it stands.
#[derive(Debug, Clone)]
pub struct Node {
    /// The value.
    pub value: Value,
    /// Where it begins.
    pub place: Place,
    /// Where in the text it stands; none for an alias.
    pub range: Option<Range<usize>>,
}

/// A YAML value.
#[derive(Debug, Clone)]
pub enum Value {
    /// Nothing, or `null`.
    Null,
    /// `true` or `false`, without quotes.
    Bool(bool),
    /// A whole number.
    Integer(i128),
    /// Any other number.
    Float(f64),
    /// A string, with quotes or without.
    Text(String),
    /// The items of a list.
    List(Vec<Node>),
    /// Every entry of a map, keys that are repeated included.
    Map(Vec<(Node, Node)>),
}

/// Fractions end somewhere below: from here on, all numbers of this kind are whole.
const LARGE: f64 = 9_007_199_254_740_992.0;

impl Value {
    /// What it is, for a message.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Null => "nothing",
            Self::Bool(_) => "a boolean",
            Self::Integer(_) => "a number",
            // A whole number that has no room in an integer is read as one of these.
            Self::Float(value) if value.abs() >= LARGE => "too large a number",
            Self::Float(_) => "a fraction",
            Self::Text(_) => "a string",
            Self::List(_) => "a list",
            Self::Map(_) => "a map",
        }
    }

    /// The boolean, in all the ways YAML has had to write one.
    #[must_use]
    pub fn boolean(&self) -> Option<bool> {
        match self {
            Self::Bool(value) => Some(*value),
            Self::Text(text) => match text.to_ascii_lowercase().as_str() {
                "yes" | "on" | "y" => Some(true),
                "no" | "off" | "n" => Some(false),
                _ => None,
            },
            _ => None,
        }
    }

    /// What a string in quotes would be without them, if that is a boolean or a number.
    #[must_use]
    pub fn without_quotes(&self) -> Option<Self> {
        match self {
            Self::Text(text) => match parse(text).ok()?.value {
                value @ (Self::Bool(_) | Self::Integer(_)) => Some(value),
                _ => None,
            },
            _ => None,
        }
    }
}

/// Why a text is not YAML.
#[derive(Debug)]
pub struct SyntaxError {
    /// What is wrong.
    pub message: String,
    /// Where.
    pub place: Option<Place>,
    /// What would be right.
    pub help: Option<&'static str>,
}

/// The text of a file, without a byte order mark.
///
/// # Errors
/// With the place of the first byte that is not UTF-8.
pub fn text(bytes: &[u8]) -> Result<&str, SyntaxError> {
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(text.strip_prefix('\u{feff}').unwrap_or(text)),
        Err(error) => {
            let (valid, _) = bytes.split_at(error.valid_up_to());
            let valid = String::from_utf8_lossy(valid);
            let last = valid.rsplit('\n').next().unwrap_or_default();
            let place = Place {
                line: valid.split('\n').count() as u64,
                column: last.chars().count() as u64 + 1,
            };
            Err(SyntaxError {
                message: "this byte is not UTF-8".to_owned(),
                place: Some(place),
                help: Some(ENCODING),
            })
        }
    }
}

/// Parses one YAML document. Memory and nesting are bounded, whatever the text is.
///
/// # Errors
/// If the text is something else.
pub fn parse(text: &str) -> Result<Node, SyntaxError> {
    let options: Options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: DEPTH,
            max_nodes: 100_000,
            max_events: 200_000,
            max_aliases: 1_000,
            max_anchors: 1_000,
            max_recorded_anchor_events: 100_000,
            max_recorded_anchor_bytes: 4 * LONGEST,
            max_total_scalar_bytes: 4 * LONGEST,
            max_documents: 1,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: 100_000,
            max_replay_stack_depth: 16,
        },
        // Reported by the caller, with both places.
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        // A name or pattern like 'on' stays a string.
        strict_booleans: true,
        with_snippet: false,
        emit_comments: false,
    };
    let spanned: Spanned<Value> = serde_saphyr::from_str_with_options(text, options)
        .map_err(|error| syntax_error(&error, text))?;
    Ok(spanned.into())
}

/// What would be right where a file is no text, or in another encoding (UTF-16 has every other byte 0).
const ENCODING: &str = "save the file as text in UTF-8";

/// How deep lists and maps may be nested.
const DEPTH: usize = 32;

const QUOTES: &str = "put the value in single quotes, as in 'VALUE'";
const INDENTATION: &str = "entries of one list or map have the same number of spaces before them, and what is in them has more";

/// What the parser says of a text by a message alone, what is said of it here, and what would be right.
const MESSAGES: [(&str, &str, &str); 14] = [
    (
        "expected alphabetic or numeric character",
        "a value can't begin with '*' or '&'",
        QUOTES,
    ),
    ("unknown anchor", "a value can't begin with '*'", QUOTES),
    (
        "unexpected character",
        "a value can't begin with this character",
        QUOTES,
    ),
    (
        "unknown escape character",
        "in double quotes '\\' begins an escape, and this is none",
        "put the value in single quotes, where '\\' is a character like others",
    ),
    ("recursion limit", NESTED, FEWER),
    (
        "mapping values are not allowed",
        "there is a ':' where none can be",
        "a value with ': ' in it needs single quotes; an entry needs a line of its own, and a space after its ':'",
    ),
    (
        "simple key expected",
        "there is no ':' after this key",
        "write 'KEY: VALUE'",
    ),
    (
        "did not find expected key",
        "there is no key where one is expected",
        INDENTATION,
    ),
    (
        "expected '-' indicator",
        "there is no '-' where one is expected",
        INDENTATION,
    ),
    (
        "invalid indentation",
        "the indentation is wrong",
        INDENTATION,
    ),
    (
        "unclosed bracket",
        "the bracket is not closed",
        "write ']' or '}' where the list or map ends; a text that begins with '[' or '{' needs single quotes",
    ),
    (
        "misplaced bracket",
        "this bracket closes none",
        "a text that begins with ']' or '}' needs single quotes",
    ),
    (
        "unclosed quote",
        "the quotes are not closed",
        "write the same quote at the end of the value",
    ),
    (
        "invalid trailing content",
        "something follows the closing quote",
        "in single quotes ' is written '', in double quotes \" is written \\\"",
    ),
];

const NESTED: &str = "lists and maps are nested too deep";
const FEWER: &str = "there can be 32 of them within each other, and no more";

/// What is wrong with a text, in words of ours.
fn syntax_error(error: &Error, text: &str) -> SyntaxError {
    let found = error.location().map(|location| place(&location));
    let (message, help) = match error.without_snippet() {
        Error::Budget {
            breach: BudgetBreach::Documents { .. },
            ..
        }
        | Error::MultipleDocuments { .. } => (
            "a second document begins".to_owned(),
            Some(
                "the file is one document: there is no second '---' in it, and nothing after '...'",
            ),
        ),
        Error::Budget {
            breach: BudgetBreach::Depth { .. },
            ..
        } => (NESTED.to_owned(), Some(FEWER)),
        Error::Budget { .. }
        | Error::AliasReplayLimitExceeded { .. }
        | Error::AliasExpansionLimitExceeded { .. }
        | Error::AliasReplayStackDepthExceeded { .. } => (
            "there is too much in the file".to_owned(),
            Some(
                "write less, or fewer aliases ('*NAME'), which stand for all that is in their anchors",
            ),
        ),
        Error::RecursiveReferencesRequireWeakTypes { .. } => (
            "an alias ('*NAME') is within what it stands for".to_owned(),
            Some("write what is meant instead"),
        ),
        Error::UnknownAnchor { .. } => ("a value can't begin with '*'".to_owned(), Some(QUOTES)),
        Error::NonFiniteFloat { value, .. } => (
            format!("'{value}' is no number that anything could be"),
            Some(QUOTES),
        ),
        error => message_of(&error.to_string(), found, text),
    };
    let tab = found
        .filter(|_| help == Some(TABS))
        .and_then(|found| first_tab(found, text));
    SyntaxError {
        message,
        place: tab.or(found),
        help,
    }
}

const TABS: &str = "use spaces, not tabs";

/// What the parser's own message says about the text around a place, and what would be right.
fn message_of(message: &str, place: Option<Place>, text: &str) -> (String, Option<&'static str>) {
    if message.contains("tabs disallowed")
        || message.contains("a tab")
        || message.contains("tab cannot")
    {
        return (
            "there is a tab where only spaces can be".to_owned(),
            Some(TABS),
        );
    }
    if place.is_some_and(|place| char_at(place, text).is_some_and(char::is_control))
        && message.contains("unexpected character")
    {
        return (
            "this character can't be in the file".to_owned(),
            Some(ENCODING),
        );
    }
    let special = place.is_some_and(|place| begins_specially(line_at(place, text)));
    let known = MESSAGES.iter().find(|(part, ..)| message.contains(part));
    match known {
        // A pattern like '[^/]*foo': there is a list, and something after it.
        Some((_, message, help)) if !special || *help != INDENTATION => {
            ((*message).to_owned(), Some(help))
        }
        _ if special => ("this does not go on as it began".to_owned(), Some(QUOTES)),
        _ => (plain_message(message), None),
    }
}

fn line_at(place: Place, text: &str) -> &str {
    let before = usize::try_from(place.line.saturating_sub(1)).unwrap_or(usize::MAX);
    text.lines().nth(before).unwrap_or_default()
}

fn char_at(place: Place, text: &str) -> Option<char> {
    let before = usize::try_from(place.column.saturating_sub(1)).ok()?;
    line_at(place, text).chars().nth(before)
}

/// Whether the value in a line begins with a character that means something else than itself.
fn begins_specially(line: &str) -> bool {
    let value = match line.split_once(": ") {
        Some((_, value)) => value,
        None => line.trim_start().trim_start_matches("- "),
    };
    value
        .trim_start()
        .starts_with(['[', '{', '*', '&', '!', '%', '@', '`', '"', '\'', '|', '>'])
}

/// The place of the first tab in the line of another place, or in a line after that.
fn first_tab(place: Place, text: &str) -> Option<Place> {
    let before = usize::try_from(place.line.saturating_sub(1)).ok()?;
    let tabs = text.lines().zip(1..).skip(before);
    let mut tabs = tabs.filter_map(|(line, number)| {
        let before = line.chars().position(|character| character == '\t')?;
        Some((number, before))
    });
    let (line, before) = tabs.next()?;
    let column = u64::try_from(before).ok()? + 1;
    Some(Place { line, column })
}

/// A message of the parser's without its own mention of line and column, which come in front here.
fn plain_message(text: &str) -> String {
    let first = text.lines().next().unwrap_or_default();
    let end = first.find(" at line ").unwrap_or(first.len());
    let message = first.get(..end).unwrap_or(first);
    let message = message.strip_suffix(',').unwrap_or(message);
    match message.is_empty() {
        true => text.to_owned(),
        false => message.to_owned(),
    }
}

fn place(location: &Location) -> Place {
    Place {
        line: location.line(),
        column: location.column(),
    }
}

impl From<Spanned<Value>> for Node {
    fn from(spanned: Spanned<Value>) -> Self {
        let span = spanned.referenced.span();
        let direct = spanned.referenced == spanned.defined;
        let range = span
            .byte_offset()
            .zip(span.byte_len())
            .and_then(|(at, len)| {
                let start = usize::try_from(at).ok()?;
                let end = start.checked_add(usize::try_from(len).ok()?)?;
                direct.then_some(start..end)
            });
        Self {
            place: place(&spanned.referenced),
            value: spanned.value,
            range,
        }
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AnyValue;

        impl<'de> Visitor<'de> for AnyValue {
            type Value = Value;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a YAML value")
            }

            fn visit_unit<E: de::Error>(self) -> Result<Value, E> {
                Ok(Value::Null)
            }

            fn visit_none<E: de::Error>(self) -> Result<Value, E> {
                Ok(Value::Null)
            }

            fn visit_bool<E: de::Error>(self, value: bool) -> Result<Value, E> {
                Ok(Value::Bool(value))
            }

            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Value, E> {
                Ok(Value::Integer(value.into()))
            }

            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Value, E> {
                Ok(Value::Integer(value.into()))
            }

            fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
                Ok(Value::Float(value))
            }

            fn visit_str<E: de::Error>(self, value: &str) -> Result<Value, E> {
                Ok(Value::Text(value.to_owned()))
            }

            fn visit_string<E: de::Error>(self, value: String) -> Result<Value, E> {
                Ok(Value::Text(value))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
                let mut list = Vec::new();
                while let Some(item) = items.next_element::<Spanned<Value>>()? {
                    list.push(item.into());
                }
                Ok(Value::List(list))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
                let mut map = Vec::new();
                while let Some(key) = entries.next_key::<Spanned<Value>>()? {
                    let value = entries.next_value::<Spanned<Value>>()?;
                    map.push((key.into(), value.into()));
                }
                Ok(Value::Map(map))
            }
        }

        deserializer.deserialize_any(AnyValue)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(node: &Node) -> &str {
        match &node.value {
            Value::Text(text) => text,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_no_text_is_not_to_be_put_in_quotes() {
        for (text, column) in [("version: 1\0", 11), ("\0v\0e\0r", 1), ("a: \x1b", 4)] {
            let error = parse(text).unwrap_err();
            assert_eq!(
                error.message, "this character can't be in the file",
                "{text:?}"
            );
            assert_eq!(error.place.unwrap().column, column, "{text:?}");
            assert_eq!(error.help, Some(ENCODING), "{text:?}");
        }
        assert_eq!(parse("a: @b").unwrap_err().help, Some(QUOTES));
    }

    #[test]
    fn says_how_deep_a_file_may_be() {
        assert!(FEWER.contains(&format!(" {DEPTH} ")), "{FEWER}");
    }

    #[test]
    fn knows_where_keys_and_values_stand() {
        let source = "a: 1\nb:\n  - ä: x\n  - \"y\"\na: on\n";
        let Value::Map(map) = parse(source).unwrap().value else {
            panic!()
        };
        let keys: Vec<_> = map
            .iter()
            .map(|(k, _)| (text(k), k.place.line, k.place.column))
            .collect();
        assert_eq!(keys, [("a", 1, 1), ("b", 2, 1), ("a", 5, 1)]);
        assert_eq!(text(&map[2].1), "on");
        let Value::List(list) = &map[1].1.value else {
            panic!()
        };
        let Value::Map(inner) = &list[0].value else {
            panic!()
        };
        let value = &inner[0].1;
        assert_eq!((value.place.line, value.place.column), (3, 8));
        assert_eq!(&source[value.range.clone().unwrap()], "x");
        assert_eq!(&source[list[1].range.clone().unwrap()], "\"y\"");
    }

    #[test]
    #[cfg_attr(miri, ignore = "texts of 100,000 characters")]
    fn survives_hostile_texts() {
        let mut bomb = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x]\n");
        for n in 1..20 {
            let inner = vec![format!("*a{}", n - 1); 9].join(",");
            bomb.push_str(&format!("a{n}: &a{n} [{inner}]\n"));
        }
        let itself = "a: &a [*a]\n".to_owned();
        for hostile in [
            bomb,
            itself,
            "[".repeat(100_000),
            "{a: ".repeat(10_000),
            "- ".repeat(100_000),
            "? ".repeat(10_000),
            "a:\n".repeat(10_000) + "\tb",
            "&a ".repeat(1000),
            "---\n".repeat(10_000),
            "!!int x".to_owned(),
            "\u{feff}: \u{0}".to_owned(),
            "*unknown".to_owned(),
        ] {
            let short: String = hostile.chars().take(30).collect();
            let error = parse(&hostile).err().unwrap_or_else(|| panic!("{short}"));
            assert!(!error.message.is_empty(), "{short}");
        }
    }
}
