//! What is in the way: facts are gathered first ([`facts`]), then looked at ([`check`]), then told ([`report`]).
//!
//! A check is a function from facts to findings and does nothing else. What could not be found out is a fact of its own
//! kind and never passes for a good one. Each finding has an id, under which docs/troubleshooting.md
//! has more about it.

pub(crate) mod check;
pub(crate) mod facts;
pub(crate) mod report;

use serde::Serialize;

/// Why something could not be looked at.
pub(crate) type Unseen = String;

/// A fact, or why it could not be had.
pub(crate) type Look<T> = Result<T, Unseen>;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Severity {
    /// Good to know.
    Note,
    /// It works, but not always, or not as one may think.
    Warning,
    /// It does not work.
    Error,
}

impl Severity {
    /// Its name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    /// The name under which docs/troubleshooting.md has it.
    pub id: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// What is wrong.
    pub problem: String,
    /// What it does to the user.
    pub effect: String,
    /// What to do, where that is more than the commands, or comes before them.
    pub advice: Option<String>,
    /// Commands that mend it.
    pub commands: Vec<String>,
}

impl Finding {
    fn new(severity: Severity, id: &'static str, problem: impl Into<String>) -> Self {
        Self {
            id,
            severity,
            problem: problem.into(),
            effect: String::new(),
            advice: None,
            commands: Vec::new(),
        }
    }

    pub(crate) fn error(id: &'static str, problem: impl Into<String>) -> Self {
        Self::new(Severity::Error, id, problem)
    }

    pub(crate) fn warning(id: &'static str, problem: impl Into<String>) -> Self {
        Self::new(Severity::Warning, id, problem)
    }

    pub(crate) fn note(id: &'static str, problem: impl Into<String>) -> Self {
        Self::new(Severity::Note, id, problem)
    }

    pub(crate) fn effect(mut self, effect: impl Into<String>) -> Self {
        self.effect = effect.into();
        self
    }

    pub(crate) fn advice(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    pub(crate) fn command(mut self, command: impl Into<String>) -> Self {
        self.commands.push(command.into());
        self
    }
}

/// What checks of one kind have found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Group {
    /// What they are about, in a word.
    pub name: &'static str,
    /// What was looked at, as it is if nothing is wrong; empty if something is.
    pub summary: String,
    /// What is wrong.
    pub findings: Vec<Finding>,
    /// What could not be looked at, and why.
    pub unseen: Vec<Unseen>,
}

impl Group {
    pub(crate) fn new(name: &'static str) -> Self {
        Self {
            name,
            ..Self::default()
        }
    }

    /// Whether everything was looked at, and nothing is worse than a note.
    pub(crate) fn is_fine(&self) -> bool {
        let notes_only = |finding: &Finding| finding.severity == Severity::Note;
        self.unseen.is_empty() && self.findings.iter().all(notes_only)
    }

    pub(crate) fn found(&mut self, finding: impl IntoIterator<Item = Finding>) {
        self.findings.extend(finding);
    }

    /// The fact, or none and a note of why.
    pub(crate) fn see<'f, T>(&mut self, what: &str, fact: &'f Look<T>) -> Option<&'f T> {
        match fact {
            Ok(fact) => Some(fact),
            Err(why) => {
                self.unseen.push(format!("{what}: {why}"));
                None
            }
        }
    }
}
