//! Regular expressions that control groups' paths are matched with.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use regex_syntax::hir::Hir;

use super::Below;
use super::automaton::{Automaton, Compiler};
use super::below::Outlook;
use super::outside::{self, Outside};

/// What all that is users' is below.
const USERS: &[u8] = b"/user.slice";

/// An unanchored regular expression in RE2's syntax.
#[derive(Debug, Clone)]
pub(crate) struct Pattern {
    pub(super) text: String,
    pub(super) catch_all: bool,
    outlook: Outlook,
    named: Option<Outside>,
    automaton: Box<Automaton>,
}

/// Why a pattern is not a regular expression.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct PatternError {
    /// What is wrong.
    pub message: String,
    /// Where, in bytes of the pattern; none if it is about all of it.
    pub span: Option<Range<usize>>,
}

/// Compiles patterns. One for many of them takes less time than one for each.
#[derive(Debug, Default)]
pub(crate) struct PatternCompiler(Compiler);

impl PatternCompiler {
    /// Compiles a pattern.
    ///
    /// # Errors
    /// If it is not a regular expression or too large a one.
    pub(crate) fn compile(&self, pattern: &str) -> Result<Pattern, PatternError> {
        let expanded = expand_quotes(pattern);
        let hir = regex_syntax::ParserBuilder::new()
            .utf8(false)
            .build()
            .parse(&expanded)
            .map_err(|error| syntax_error(&error, matches!(expanded, Cow::Borrowed(_))))?;
        let automaton = self.0.compile(&hir).map_err(|error| PatternError {
            message: match error.size_limit() {
                Some(limit) => {
                    format!("the regular expression needs more than {limit} bytes of memory")
                }
                None => error.to_string(),
            },
            span: None,
        })?;
        Ok(Pattern {
            catch_all: is_catch_all(pattern, &hir),
            outlook: Outlook::new(&hir),
            named: outside::named(&hir),
            automaton: Box::new(automaton),
            text: expanded.into_owned(),
        })
    }
}

impl Pattern {
    /// Compiles one pattern.
    ///
    /// # Errors
    /// As [`PatternCompiler::compile`].
    #[cfg(any(test, fuzzing))]
    pub(crate) fn new(pattern: &str) -> Result<Self, PatternError> {
        PatternCompiler::default().compile(pattern)
    }

    /// Which paths it matches that begin with `path` and a slash.
    pub(crate) fn below(&self, path: &[u8]) -> Below {
        match self.catch_all {
            true => Below::Everything,
            false => self.outlook.below(path, &self.automaton),
        }
    }

    /// What it is about, if it selects nothing below a user's service manager, as far as that can be told.
    pub(crate) fn outside(&self) -> Option<Outside> {
        let others = || (!self.is_about_users()).then_some(Outside::Elsewhere);
        self.named.or_else(others)
    }

    /// Whether it may match something of a user's.
    pub(crate) fn is_about_users(&self) -> bool {
        self.below(USERS) != Below::Nothing
    }

    /// Whether the name of this slice is written in it, and not that of one in it after it. A bare dot stands for
    /// itself: that is how people write names.
    pub(super) fn names_slice(&self, name: &str) -> bool {
        let plain = self.text.replace('\\', "");
        let inner = format!("/{}-", name.strip_suffix(".slice").unwrap_or(name));
        plain.match_indices(name).any(|(at, _)| {
            let (before, rest) = plain.split_at(at);
            let after = rest.strip_prefix(name).unwrap_or_default();
            (before.is_empty() || before.ends_with('/')) && !after.starts_with(&inner)
        })
    }

    /// Whether it matches somewhere in `path`.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn matches(&self, path: &[u8]) -> bool {
        self.matches_either(path, super::subject::lossy(path).as_deref())
    }

    /// Whether it matches somewhere in `path`, or in what that is with characters in the place of bytes that are not
    /// UTF-8, if it has any.
    pub(super) fn matches_either(&self, path: &[u8], lossy: Option<&str>) -> bool {
        // A byte that is not UTF-8 counts as one unknown character, as in RE2: '.' matches it.
        // Otherwise a file name with such a byte would slip by a rule that ends in '.*$'.
        self.automaton.matches(path)
            || lossy.is_some_and(|lossy| self.automaton.matches(lossy.as_bytes()))
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// `located`: whether positions in the error are positions in the pattern.
fn syntax_error(error: &regex_syntax::Error, located: bool) -> PatternError {
    let (message, span) = match error {
        regex_syntax::Error::Parse(error) => (error.kind().to_string(), Some(error.span())),
        regex_syntax::Error::Translate(error) => (error.kind().to_string(), Some(error.span())),
        other => (other.to_string(), None),
    };
    PatternError {
        message,
        span: span
            .filter(|_| located)
            .map(|s| s.start.offset..s.end.offset),
    }
}

/// Whether an expression surely matches every path; a path begins with a slash and is more than
/// that. Says no when in doubt.
fn is_catch_all(pattern: &str, hir: &Hir) -> bool {
    let properties = hir.properties();
    if properties.minimum_len() == Some(0) && properties.look_set().is_empty() {
        return true;
    }
    let plain = pattern.replace(r"\/", "/");
    let (anchored, rest) = match plain.strip_prefix('^') {
        Some(rest) => (true, rest),
        None => (false, plain.as_str()),
    };
    let (ended, rest) = match rest.strip_suffix('$') {
        Some(rest) => (true, rest),
        None => (false, rest),
    };
    match rest {
        ".*" | ".+" | "/.*" | "/.+" => true,
        "/" | "." => !ended,
        "" => !(anchored && ended),
        _ => false,
    }
}

/// Writes RE2's `\Q…\E` (what is between is meant literally), which the regex crate lacks, in other
/// words.
fn expand_quotes(pattern: &str) -> Cow<'_, str> {
    if !pattern.contains(r"\Q") {
        return Cow::Borrowed(pattern);
    }
    let mut expanded = String::with_capacity(pattern.len());
    let mut rest = pattern;
    while let Some(at) = rest.find('\\') {
        let (before, escape) = rest.split_at(at);
        expanded.push_str(before);
        if let Some(quoted) = escape.strip_prefix(r"\Q") {
            let (literal, after) = quoted.split_once(r"\E").unwrap_or((quoted, ""));
            expanded.push_str(&regex_syntax::escape(literal));
            rest = after;
        } else {
            let end = 1 + escape.chars().nth(1).map_or(0, char::len_utf8);
            let (escape, after) = escape.split_at(end);
            expanded.push_str(escape);
            rest = after;
        }
    }
    expanded.push_str(rest);
    Cow::Owned(expanded)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn matches(pattern: &str, path: &[u8]) -> bool {
        Pattern::new(pattern).unwrap().matches(path)
    }

    #[test]
    fn reads_what_the_original_reads() {
        let app = b"/user.slice/user-1000.slice/user@1000.service/app.slice/app-a\\x2db.scope";
        assert!(matches(r"user\.slice\/user-\d+\.slice\/", app));
        assert!(matches(r"^\/user\.slice", app));
        assert!(matches(r"app-a\\x2db\.scope$", app));
        assert!(matches(r"/app-a\Q\x2d\Eb", app));
        assert!(!matches(r"\Qapp.\Eslicf", app));
        assert!(!matches(r"^app\.slice", app));
        assert!(matches(
            r"\/app(?:-(?:gnome|DDE|flatpak))?-a(?:.+\.scope|(?:@.+)?\.service)$",
            app
        ));
    }

    #[test]
    fn names_that_are_not_utf_8_do_not_slip_by() {
        assert!(matches(r"^/x/.*$", b"/x/a\xffb"));
        assert!(matches(r"^/x/a.b$", b"/x/a\xffb"));
        assert!(matches(r"(?-u:\xff)", b"/x/a\xffb"));
        assert!(!matches(r"^/y", b"/x/a\xffb"));
    }

    proptest! {
        /// The regex crate is made of the same automata, and of others.
        #[test]
        #[cfg_attr(miri, ignore = "minutes for a few patterns")]
        fn matches_what_regex_does(
            pattern in r"\^?(/|a|b|\.|\[\^/\]\+|\[ab\]|\.\*\??|a\{2,3\}|\(a\|b/\)|\\d|\\w\+|\\b|\\B|\$|\(\?i\)|\(\?m:\^\)|\(\?-u:\\xff\)|x\?|é){0,6}\$?",
            path in proptest::collection::vec(
                prop_oneof![3 => Just(b'/'), 6 => b'a'..b'd', 2 => b'0'..b'3', 1 => any::<u8>()],
                0..12,
            ),
        ) {
            let Ok(ours) = Pattern::new(&pattern) else { return Ok(()) };
            let theirs = regex::bytes::Regex::new(&pattern).unwrap();
            let lossy = String::from_utf8_lossy(&path);
            let expected = theirs.is_match(&path) || theirs.is_match(lossy.as_bytes());
            prop_assert_eq!(ours.matches(&path), expected);
        }
    }

    #[test]
    fn says_where_an_error_is() {
        let error = Pattern::new("foo(bar").unwrap_err();
        assert_eq!(
            (error.message.as_str(), error.span),
            ("unclosed group", Some(3..4))
        );
        assert!(Pattern::new(r"\w{9000}").unwrap_err().span.is_none());
    }

    #[test]
    fn knows_a_catch_all() {
        for pattern in [
            "", ".*", "^.*$", ".+", "/", r"\/", "^/", r"^\/.*", "^", "$", ".", "(foo)?", "/.+$",
            "a|",
        ] {
            assert!(is_all(pattern), "{pattern}");
        }
        for pattern in ["^$", "^/$", "/$", "a", "/a", "^a?$", "x*$", r"\b", "^/a?b"] {
            assert!(!is_all(pattern), "{pattern}");
        }
    }

    fn is_all(pattern: &str) -> bool {
        Pattern::new(pattern).unwrap().catch_all
    }
}
