//! `cgtproxy-agent check`

use std::fmt::Write;
use std::path::Path;
use std::process::ExitCode;

use super::Error;
use crate::config::{self, Scope, Severity};
use crate::text::{count, printable};

/// Checks a file and prints what was found.
pub(super) fn run(file: &Path, bytes: &[u8], scope: Scope) -> Result<ExitCode, Error> {
    let (_, findings) = config::read(file, bytes, scope);
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = findings.render(&mut text, super::colours());
    let errors = findings.count(Severity::Error);
    let warnings = findings.count(Severity::Warning);
    let file = printable(&file.to_string_lossy());
    let counted = match (errors, warnings) {
        (0, 0) => "no errors".to_owned(),
        (0, _) => count(warnings, "warning"),
        (_, 0) => count(errors, "error"),
        (_, _) => format!("{}, {}", count(errors, "error"), count(warnings, "warning")),
    };
    let _ = writeln!(text, "{file}: {counted}");
    super::print(text.as_bytes())?;
    Ok(match findings.has_errors() {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    })
}
