//! What was found, for people and for programs.

use std::fmt::{self, Write as _};

use serde_json::{Value, json};

use super::{Group, Severity};
use crate::text::{self, printable};

/// How many findings of that severity there are.
pub(crate) fn count(groups: &[Group], severity: Severity) -> usize {
    let findings = groups.iter().flat_map(|group| &group.findings);
    findings.filter(|f| f.severity == severity).count()
}

/// Everything, as JSON.
pub(crate) fn json(groups: &[Group], version: &str) -> Value {
    json!({
        "version": version,
        "errors": count(groups, Severity::Error),
        "warnings": count(groups, Severity::Warning),
        "notes": count(groups, Severity::Note),
        "groups": groups,
    })
}

/// SGR sequences (ECMA-48).
struct Style {
    good: &'static str,
    bad: &'static str,
    odd: &'static str,
    dim: &'static str,
    bold: &'static str,
    plain: &'static str,
}

const COLOURS: Style = Style {
    good: "\x1b[32m",
    bad: "\x1b[1;31m",
    odd: "\x1b[1;33m",
    dim: "\x1b[2m",
    bold: "\x1b[1m",
    plain: "\x1b[0m",
};
const NONE: Style = Style {
    good: "",
    bad: "",
    odd: "",
    dim: "",
    bold: "",
    plain: "",
};

/// Writes everything for a person. Names that others made are written harmlessly.
///
/// # Errors
/// If it can't be written.
pub(crate) fn render(out: &mut impl fmt::Write, groups: &[Group], colours: bool) -> fmt::Result {
    let style = if colours { &COLOURS } else { &NONE };
    for group in groups {
        head(out, group, style)?;
        for finding in &group.findings {
            let colour = match finding.severity {
                Severity::Error => style.bad,
                Severity::Warning => style.odd,
                Severity::Note => style.bold,
            };
            let problem = printable(&finding.problem);
            let (severity, id) = (finding.severity.name(), finding.id);
            let plain = style.plain;
            writeln!(out, "  {colour}{severity}{plain}: {problem} [{id}]")?;
            if !finding.effect.is_empty() {
                writeln!(out, "    {}", printable(&finding.effect))?;
            }
            if let Some(advice) = &finding.advice {
                writeln!(out, "    to mend it: {}", printable(advice))?;
            }
            for command in &finding.commands {
                writeln!(out, "    {}$ {}{plain}", style.bold, printable(command))?;
            }
        }
        for unseen in &group.unseen {
            let (odd, plain) = (style.odd, style.plain);
            writeln!(
                out,
                "  {odd}could not be looked at{plain}: {}",
                printable(unseen)
            )?;
        }
    }
    let mut total = String::new();
    for (severity, name) in [
        (Severity::Error, "error"),
        (Severity::Warning, "warning"),
        (Severity::Note, "note"),
    ] {
        let number = count(groups, severity);
        if number > 0 {
            let separator = if total.is_empty() { "" } else { ", " };
            write!(total, "{separator}{}", text::count(number, name))?;
        }
    }
    let unseen: usize = groups.iter().map(|group| group.unseen.len()).sum();
    writeln!(out)?;
    match (total.as_str(), unseen) {
        ("", 0) => writeln!(out, "nothing is wrong"),
        ("", _) => writeln!(out, "nothing is wrong with what could be looked at"),
        (total, _) => writeln!(
            out,
            "{total}; troubleshooting.md of the documentation has more about each, by the name in brackets"
        ),
    }
}

/// The line of a group: what is as it should be, or how bad it is.
fn head(out: &mut impl fmt::Write, group: &Group, style: &Style) -> fmt::Result {
    let worst = group.findings.iter().map(|finding| finding.severity).max();
    let (colour, word) = match worst {
        Some(Severity::Error) => (style.bad, "error"),
        Some(Severity::Warning) => (style.odd, "warning"),
        _ if !group.unseen.is_empty() => (style.odd, "unknown"),
        Some(Severity::Note) | None => (style.good, "ok"),
    };
    let (name, dim, plain) = (group.name, style.dim, style.plain);
    match group.is_fine() && !group.summary.is_empty() {
        true => {
            let summary = printable(&group.summary);
            writeln!(
                out,
                "{colour}{word:<7}{plain}  {name:<14}  {dim}{summary}{plain}"
            )
        }
        false => writeln!(out, "{colour}{word:<7}{plain}  {name}"),
    }
}
