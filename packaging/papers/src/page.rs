//! What all manual pages have in common.

use clap_mangen::roff::{Roff, bold, roman};

use crate::Paper;

/// What stands in the middle of a page's first line.
pub(crate) const MANUAL: &str = "cgtproxy";

/// What stands at the left of a page's last line.
pub(crate) const SOURCE: &str = concat!("cgtproxy ", env!("CARGO_PKG_VERSION"));

/// All pages, in the order in which they mention each other.
const PAGES: [(&str, &str); 9] = [
    ("cgtproxy-agent", "1"),
    ("cgtproxy-exec", "1"),
    ("cgtproxy.yaml", "5"),
    ("cgtproxy-helper.yaml", "5"),
    ("org.cgtproxy.Agent", "7"),
    ("org.cgtproxy.Helper", "7"),
    ("org.cgtproxy.Relay", "7"),
    ("cgtproxy-helper", "8"),
    ("cgtproxy-relay", "8"),
];

/// No longer than this are lines of a page's source, in bytes, where words can be parted. mandoc wants at most
/// 80, and counts what it makes of characters that are not ASCII.
const WIDTH: usize = 72;

/// What a page has beside its text.
pub(crate) struct Head<'a> {
    pub(crate) name: &'a str,
    pub(crate) section: &'a str,
    pub(crate) date: &'a str,
}

impl Head<'_> {
    /// The page with this text.
    pub(crate) fn paper(&self, text: &str) -> Paper {
        Paper {
            path: format!("man{0}/{1}.{0}", self.section, self.name),
            text: tidy(&spelled(text)),
        }
    }

    /// The first line of a page that does not come from a command line.
    pub(crate) fn title(&self, roff: &mut Roff) {
        let name = self.name.to_uppercase();
        roff.control("TH", [&name, self.section, self.date, SOURCE, MANUAL]);
    }
}

/// The section that mentions all pages but `own`.
pub(crate) fn see_also(roff: &mut Roff, own: &str) {
    roff.control("SH", ["SEE ALSO"]);
    let mut line = Vec::new();
    for (name, section) in PAGES.into_iter().filter(|(name, _)| *name != own) {
        if !line.is_empty() {
            line.push(roman(", "));
        }
        line.extend([bold(name), roman(format!("({section})"))]);
    }
    roff.text(line);
}

/// Writes what groff can't show in the C locale in other characters, by which no line becomes a request.
fn spelled(text: &str) -> String {
    [("…", "\\&..."), ("−", "\\-"), ("ⁿ", "\\(han")]
        .iter()
        .fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

/// Makes lines as they should be: short, none blank in running text, and no paragraph begun twice.
fn tidy(text: &str) -> String {
    let mut tidy: Vec<String> = Vec::new();
    let mut example = false;
    // Whether the paragraph belongs to a term.
    let mut term = false;
    for line in text.lines() {
        match line {
            ".EX" => example = true,
            ".EE" => example = false,
            _ => {}
        }
        if example {
            tidy.push(line.to_owned());
            continue;
        }
        let line = match line.trim_end() {
            // Blank lines part the paragraphs of a help.
            "" if term => ".IP",
            "" => ".PP",
            line => line,
        };
        let last = tidy.last().map_or("", String::as_str);
        let after_heading = is_heading(last);
        let after_term = last == ".TP";
        let begins = is_heading(line) || matches!(line, ".PP" | ".TP" | ".IP");
        if begins && matches!(last, ".PP" | ".IP") {
            tidy.pop();
        } else if line == ".PP" && after_heading {
            continue;
        }
        if begins || line.starts_with(".IP") {
            term = matches!(line, ".TP" | ".IP");
        }
        // What follows .TP is one line, however long.
        if line.starts_with('.') || after_term {
            tidy.push(line.to_owned());
        } else {
            tidy.extend(wrapped(line));
        }
    }
    tidy.join("\n") + "\n"
}

fn is_heading(line: &str) -> bool {
    line.starts_with(".SH") || line.starts_with(".SS")
}

/// A line of running text, as several.
fn wrapped(line: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in line.split(' ') {
        match lines.last_mut() {
            Some(last) if last.is_empty() => last.push_str(word),
            Some(last) if last.len() + 1 + word.len() <= WIDTH => {
                last.push(' ');
                last.push_str(word);
            }
            // At the beginning of a line these would not be text.
            _ if word.starts_with(['.', '\'']) => lines.push(format!("\\&{word}")),
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn running_text_is_wrapped_and_examples_are_not() {
        let long = "word ".repeat(30) + ".word";
        let page = tidy(&format!(".PP\n{long}\n.EX\n\n{long}\n.EE\n"));
        let mut lines = page.lines();
        assert_eq!(lines.next(), Some(".PP"));
        assert!(lines.clone().take(2).all(|line| line.len() <= WIDTH));
        assert!(page.contains(&format!(".EX\n\n{long}\n.EE\n")), "{page}");
        let dots = format!("{} .word", "w".repeat(WIDTH));
        assert_eq!(wrapped(&dots)[1], "\\&.word");
    }

    #[test]
    fn no_paragraph_begins_twice() {
        assert_eq!(
            tidy(".SH A\n.PP\nb\n\n\nc\n.PP\n.TP\nd\ne\n\nf\n.PP\n.SH G\nh\n"),
            ".SH A\nb\n.PP\nc\n.TP\nd\ne\n.IP\nf\n.SH G\nh\n"
        );
    }
}
