//! A Varlink interface's manual page, from its description.

use clap_mangen::roff::{Roff, bold, roman};

use crate::Paper;
use crate::page::{Head, see_also};

/// A part of a description: comments and what they are about.
struct Member<'a> {
    comment: Vec<&'a str>,
    definition: Vec<&'a str>,
}

impl<'a> Member<'a> {
    /// `interface`, `type`, `method` or `error`, and the name.
    fn kind_and_name(&self) -> (&'a str, &'a str) {
        let first = self.definition.first().copied().unwrap_or_default();
        let (kind, rest) = first.split_once(' ').unwrap_or((first, ""));
        let end = rest.find([' ', '(']).unwrap_or(rest.len());
        (kind, rest.split_at(end).0)
    }
}

pub(crate) fn page(name: &str, description: &str, date: &str) -> Paper {
    let head = Head {
        name,
        section: "7",
        date,
    };
    let members: Vec<_> = description.split("\n\n").map(member).collect();
    let mut roff = Roff::new();
    head.title(&mut roff);
    roff.control("SH", ["NAME"]);
    roff.text([roman(format!("{name} - Varlink interface of cgtproxy"))]);
    for (kind, title) in [
        ("interface", "DESCRIPTION"),
        ("method", "METHODS"),
        ("error", "ERRORS"),
        ("type", "TYPES"),
    ] {
        let mut of_kind = members.iter().filter(|m| m.kind_and_name().0 == kind);
        let Some(first) = of_kind.next() else {
            continue;
        };
        roff.control("SH", [title]);
        for member in std::iter::once(first).chain(of_kind) {
            if kind != "interface" {
                roff.control("SS", [member.kind_and_name().1]);
            }
            text(&mut roff, &member.comment);
            if kind != "interface" {
                roff.control("PP", []);
                roff.control("EX", []);
                for line in &member.definition {
                    roff.text([roman(*line)]);
                }
                roff.control("EE", []);
            }
        }
    }
    roff.control("SH", ["NOTES"]);
    roff.text([
        bold("varlinkctl introspect"),
        roman(" asks a running service for this description. Varlink is at https://varlink.org."),
    ]);
    see_also(&mut roff, name);
    head.paper(&roff.render())
}

fn member(block: &str) -> Member<'_> {
    let mut comment = Vec::new();
    let mut definition = Vec::new();
    for line in block.lines() {
        match line.strip_prefix('#') {
            Some(text) if definition.is_empty() => comment.push(text.trim()),
            _ => definition.push(line),
        }
    }
    Member {
        comment,
        definition,
    }
}

/// A comment, in which a line that begins with one word and a colon says what that word means.
fn text(roff: &mut Roff, lines: &[&str]) {
    for line in lines {
        match line.split_once(": ") {
            Some((term, meaning)) if !term.contains(' ') => {
                roff.control("TP", []);
                roff.text([bold(term)]);
                roff.text([roman(meaning)]);
            }
            _ => {
                roff.text([roman(*line)]);
            }
        }
    }
}
