//! What is wrong with a configuration file, and how it is said.

use std::fmt::{self, Write as _};
use std::path::{Path, PathBuf};

pub(crate) use cgtproxy_proto::yaml::Place;

use crate::text::printable;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Severity {
    /// The file can't be used.
    Error,
    /// The file is used, but does not do what it seems to.
    Warning,
}

impl Severity {
    /// The severity's name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
        }
    }
}

/// One thing that is wrong with a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// Where in the file; none if the finding is about the file as a whole.
    pub place: Option<Place>,
    /// What is wrong.
    pub message: String,
    /// What would be right.
    pub help: Option<String>,
    /// Lines that show it: a pattern and a caret below it.
    pub excerpt: Option<Excerpt>,
}

/// A line of text and the part of it that is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Excerpt {
    /// The line.
    pub line: String,
    /// How many columns of a terminal it takes before the part.
    pub before: usize,
    /// How many columns the part takes; at least one caret is drawn.
    pub length: usize,
}

impl Finding {
    pub(crate) fn new(severity: Severity, place: Place, message: impl Into<String>) -> Self {
        Self {
            severity,
            place: Some(place),
            message: message.into(),
            help: None,
            excerpt: None,
        }
    }
}

/// Everything that is wrong with one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Findings {
    /// The file.
    pub file: PathBuf,
    /// In the order of the file.
    pub list: Vec<Finding>,
}

impl Findings {
    /// No findings yet.
    pub(crate) fn new(file: &Path) -> Self {
        Self {
            file: file.to_owned(),
            list: Vec::new(),
        }
    }

    /// How many there are of a severity.
    pub(crate) fn count(&self, severity: Severity) -> usize {
        self.list.iter().filter(|f| f.severity == severity).count()
    }

    /// Whether any of them keeps the file from being used.
    pub(crate) fn has_errors(&self) -> bool {
        self.count(Severity::Error) > 0
    }

    /// `file:line:column`, as compilers write it.
    fn location(&self, finding: &Finding) -> String {
        let file = printable(&self.file.to_string_lossy());
        match finding.place {
            Some(Place { line, column }) => format!("{file}:{line}:{column}"),
            None => file,
        }
    }

    /// Each finding in one line: for the journal and `status`.
    pub(crate) fn lines(&self) -> impl Iterator<Item = (Severity, String)> {
        self.list.iter().map(|finding| {
            let mut line = format!("{}: {}", self.location(finding), finding.message);
            if let Some(help) = &finding.help {
                let _ = write!(line, "; {help}");
            }
            (finding.severity, line)
        })
    }

    /// All errors in one line.
    pub(crate) fn errors_in_one_line(&self) -> String {
        self.lines()
            .filter(|(severity, _)| *severity == Severity::Error)
            .map(|(_, line)| line)
            .collect::<Vec<_>>()
            .join("; ")
    }

    /// Writes all findings for a person, as compilers do.
    ///
    /// # Errors
    /// If `out` refuses.
    pub(crate) fn render(&self, out: &mut dyn fmt::Write, colour: bool) -> fmt::Result {
        let paint = |code: &str, text: &str| match colour {
            true => format!("\x1b[{code}m{text}\x1b[0m"),
            false => text.to_owned(),
        };
        for finding in &self.list {
            let code = match finding.severity {
                Severity::Error => "1;31",
                Severity::Warning => "1;33",
            };
            writeln!(
                out,
                "{}: {}: {}",
                paint("1", &self.location(finding)),
                paint(code, finding.severity.name()),
                finding.message
            )?;
            if let Some(excerpt) = &finding.excerpt {
                writeln!(out, "    {}", printable(&excerpt.line))?;
                let carets = "^".repeat(excerpt.length.max(1));
                writeln!(
                    out,
                    "    {}{}",
                    " ".repeat(excerpt.before),
                    paint(code, &carets)
                )?;
            }
            if let Some(help) = &finding.help {
                writeln!(out, "    {} {help}", paint("1;36", "help:"))?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.render(f, false)
    }
}
