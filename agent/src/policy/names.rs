//! Names with `*` in them.

use std::fmt;

/// A list of names in which `*` stands for any text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Names(Vec<String>);

impl Names {
    /// Any of these.
    pub(crate) fn new(globs: Vec<String>) -> Self {
        Self(globs)
    }

    /// Whether one of them is this name.
    pub(crate) fn matches(&self, name: &[u8]) -> bool {
        self.0.iter().any(|glob| matches(glob.as_bytes(), name))
    }

    /// Whether one of them is written like this.
    pub(crate) fn contains(&self, name: &str) -> bool {
        self.0.iter().any(|glob| glob == name)
    }

    /// Whether it surely matches all that other names do.
    pub(crate) fn covers(&self, other: &Self) -> bool {
        other.0.iter().all(|glob| match glob.contains('*') {
            true => self.0.contains(glob),
            false => self.matches(glob.as_bytes()),
        })
    }
}

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(", "))
    }
}

/// In time linear in the name's length for each part between two stars.
fn matches(glob: &[u8], name: &[u8]) -> bool {
    let mut parts = glob.split(|&b| b == b'*');
    let first = parts.next().unwrap_or_default();
    let Some(last) = parts.next_back() else {
        return first == name;
    };
    let inner = name
        .strip_prefix(first)
        .and_then(|rest| rest.strip_suffix(last));
    let Some(mut rest) = inner else {
        return false;
    };
    // The leftmost place for each part leaves most room for those after it.
    for part in parts.filter(|part| !part.is_empty()) {
        let Some(at) = rest.windows(part.len()).position(|window| window == part) else {
            return false;
        };
        rest = rest.get(at + part.len()..).unwrap_or_default();
    }
    true
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn matches_as_the_regular_expression_does(glob in "[ab*]{0,8}", name in "[ab]{0,10}") {
            let pattern = format!("^{}$", glob.replace('*', ".*"));
            let regex = regex::Regex::new(&pattern).unwrap();
            prop_assert_eq!(matches(glob.as_bytes(), name.as_bytes()), regex.is_match(&name));
        }

        #[test]
        fn what_is_covered_matches(a in "[ab*]{0,5}", b in "[ab*]{0,5}", name in "[ab]{0,6}") {
            let (a, b) = (Names::new(vec![a]), Names::new(vec![b]));
            if a.covers(&b) && b.matches(name.as_bytes()) {
                prop_assert!(a.matches(name.as_bytes()));
            }
        }
    }
}
