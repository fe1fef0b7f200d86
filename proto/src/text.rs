//! Names that others made, on their way to a terminal or a log.

use std::fmt::Write as _;

/// The text with everything escaped that a terminal would obey instead of show: control characters,
/// and those that change the direction of text.
#[must_use]
pub fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        let bidi = matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if c.is_control() || bidi || matches!(c, '\u{2028}' | '\u{2029}' | '\u{feff}') {
            let _ = write!(shown, "{}", c.escape_unicode());
        } else {
            shown.push(c);
        }
    }
    shown
}

/// The text as one word of a shell's command.
#[must_use]
pub fn quoted(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+@:".contains(c);
    match !text.is_empty() && text.chars().all(is_plain) {
        true => text.to_owned(),
        false => format!("'{}'", text.replace('\'', r"'\''")),
    }
}

/// An error and everything that caused it, in one line.
#[must_use]
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    printable(&text)
}

/// So many of them, in English.
#[must_use]
pub fn count(number: usize, what: &str) -> String {
    match number {
        1 => format!("1 {what}"),
        number => format!("{number} {}", plural(what)),
    }
}

fn plural(what: &str) -> String {
    match what.strip_suffix('y') {
        Some(stem) if !stem.ends_with(['a', 'e', 'o', 'u']) => format!("{stem}ies"),
        _ if what.ends_with('s') => format!("{what}es"),
        _ => format!("{what}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::{count, printable, quoted};

    #[test]
    fn counts_as_english_does() {
        let counted = [
            (1, "proxy"),
            (0, "proxy"),
            (2, "process"),
            (3, "control group"),
        ];
        assert_eq!(
            counted.map(|(number, what)| count(number, what)),
            ["1 proxy", "0 proxies", "2 processes", "3 control groups"]
        );
        assert_eq!(count(2, "key"), "2 keys");
    }

    #[test]
    fn a_shell_takes_it_for_one_word() {
        for (text, word) in [
            ("/a/user@5.service", "/a/user@5.service"),
            (r"a\x2db", r"'a\x2db'"),
            ("it's", r"'it'\''s'"),
            ("", "''"),
        ] {
            assert_eq!(quoted(text), word);
        }
    }

    #[test]
    fn a_terminal_gets_no_orders() {
        assert_eq!(printable("app-ä b\\x2d"), "app-ä b\\x2d");
        assert_eq!(printable("\x1b[2J\n\u{202e}"), "\\u{1b}[2J\\u{a}\\u{202e}");
        assert_eq!(printable("a\u{61c}b"), "a\\u{61c}b");
        assert_eq!(printable("\u{9b}x\u{7f}"), "\\u{9b}x\\u{7f}");
    }
}
