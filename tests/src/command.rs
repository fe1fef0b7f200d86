//! Command-line tools: run, insist on success, take the output.

use std::ffi::OsStr;
use std::io::Write;
use std::process::{Command, Output, Stdio};

/// Runs a command that must succeed and returns its stdout.
///
/// # Panics
/// When it cannot be started or fails, with its stderr.
#[track_caller]
pub(crate) fn run<S: AsRef<OsStr>>(argv: &[S]) -> String {
    run_with_input(argv, "")
}

/// As [`run`], with something to read on stdin.
#[track_caller]
pub(crate) fn run_with_input<S: AsRef<OsStr>>(argv: &[S], input: &str) -> String {
    let output = output_with_input(argv, input);
    let shown = argv
        .iter()
        .map(|a| a.as_ref().to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ");
    assert!(
        output.status.success(),
        "`{shown}` failed ({}): {}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim(),
        if input.is_empty() {
            String::new()
        } else {
            format!("\nits input was:\n{input}")
        },
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a command and returns what came of it.
///
/// # Panics
/// When it cannot be started.
#[track_caller]
pub(crate) fn output_with_input<S: AsRef<OsStr>>(argv: &[S], input: &str) -> Output {
    let (program, arguments) = argv.split_first().expect("a command");
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("cannot run {}: {e}", program.as_ref().display()));
    // A command that has no use for its input may be gone already; its status tells the rest.
    let _ = child
        .stdin
        .take()
        .expect("piped")
        .write_all(input.as_bytes());
    child.wait_with_output().expect("a child can be waited for")
}
