//! How long the lists of a call are, before anything is made of them: what a message says takes many times the bytes
//! that it is written in once it has been taken apart, and a short list is all that a user may have.

use std::fmt;

use serde::de::{IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// How many bytes of parameters are taken apart without a look at their lists. As many strings as fit into them take some
/// hundred KiB; only calls that name many control groups have more.
pub(super) const LOOKED_AT: usize = 64 * 1024;

/// The length of a list, whatever is in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Length(pub(super) usize);

/// The lists of `ReplacePolicy`.
#[derive(Debug, Deserialize)]
pub(super) struct OfPolicy {
    pub(super) proxies: Length,
    pub(super) bypass: Length,
    pub(super) assignments: Length,
    /// Whether there is any: it has a list, too, and none is anybody's but root's.
    pub(super) gateway: Option<IgnoredAny>,
}

/// The lists of `UpdateAssignments`.
#[derive(Debug, Deserialize)]
pub(super) struct OfUpdate {
    pub(super) assign: Length,
    pub(super) remove: Length,
}

impl<'de> Deserialize<'de> for Length {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Counter;

        impl<'de> Visitor<'de> for Counter {
            type Value = Length;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Length, A::Error> {
                let mut length = 0;
                while list.next_element::<IgnoredAny>()?.is_some() {
                    length += 1;
                }
                Ok(Length(length))
            }
        }

        deserializer.deserialize_seq(Counter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_whatever_there_is() {
        let text = r#"{"proxies": [{"name": [1, 2]}], "bypass": ["a", 1, null], "assignments": [], "x": [1]}"#;
        let lists: OfPolicy = serde_json::from_str(text).unwrap();
        assert_eq!(lists.proxies, Length(1));
        assert_eq!(lists.bypass, Length(3));
        assert_eq!(lists.assignments, Length(0));
        assert!(lists.gateway.is_none());
    }

    /// Or the first one would be taken apart before anybody hears of the second.
    #[test]
    fn takes_no_list_that_is_there_twice() {
        for text in [
            r#"{"assign": [], "remove": ["a"], "remove": []}"#,
            r#"{"assign": {}, "remove": []}"#,
            r#"{"assign": null, "remove": []}"#,
            r#"{"assign": []}"#,
        ] {
            assert!(serde_json::from_str::<OfUpdate>(text).is_err(), "{text}");
        }
    }
}
