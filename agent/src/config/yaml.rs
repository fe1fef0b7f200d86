//! YAML as a tree that knows where each of its nodes stands, so that everything that is wrong with a
//! file can be said at once and in its place.

use std::fmt;
use std::ops::Range;

use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::options::DuplicateKeyPolicy;
use serde_saphyr::{Location, Options, Spanned};

use super::finding::Place;

/// The largest file that is read, in bytes: a configuration is written by hand.
pub(crate) const FILE_BYTES: usize = 1 << 20;

/// A value and where it stands.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) value: Value,
    pub(crate) place: Place,
    /// Where in the text it stands; none for an alias.
    pub(crate) range: Option<Range<usize>>,
}

/// A YAML value.
#[derive(Debug, Clone)]
pub(crate) enum Value {
    Null,
    Bool(bool),
    Integer(i128),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    /// Every entry of the file, keys that are repeated included.
    Map(Vec<(Node, Node)>),
}

impl Value {
    /// What it is, for a message.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Null => "nothing",
            Self::Bool(_) => "a boolean",
            Self::Integer(_) => "a number",
            Self::Float(_) => "a fraction",
            Self::Text(_) => "a string",
            Self::List(_) => "a list",
            Self::Map(_) => "a map",
        }
    }
}

/// Why a text is not YAML.
#[derive(Debug)]
pub(crate) struct SyntaxError {
    pub(crate) message: String,
    pub(crate) place: Option<Place>,
}

/// Parses one YAML document. Memory and nesting are bounded, whatever the text is.
pub(crate) fn parse(text: &str) -> Result<Node, SyntaxError> {
    let options: Options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: 32,
            max_nodes: 100_000,
            max_events: 200_000,
            max_aliases: 1_000,
            max_anchors: 1_000,
            max_recorded_anchor_events: 100_000,
            max_recorded_anchor_bytes: 4 * FILE_BYTES,
            max_total_scalar_bytes: 4 * FILE_BYTES,
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
    let spanned: Spanned<Value> =
        serde_saphyr::from_str_with_options(text, options).map_err(|error| SyntaxError {
            place: error.location().map(|l| place(&l)),
            message: plain_message(&error),
        })?;
    Ok(spanned.into())
}

/// The error without its own mention of line and column, which come in front here.
fn plain_message(error: &serde_saphyr::Error) -> String {
    let text = error.without_snippet().to_string();
    let first = text.lines().next().unwrap_or_default();
    let end = first.find(" at line ").unwrap_or(first.len());
    let message = first.get(..end).unwrap_or(first);
    let message = message.strip_suffix(',').unwrap_or(message);
    if message.is_empty() {
        text
    } else {
        message.to_owned()
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
