//! What a program says of its command line: its help, its version, or what is wrong.

use std::io::{self, Write};
use std::process::ExitCode;

/// The exit status of a program whose command line is wrong.
pub const WRONG: u8 = 2;

/// The exit status of a program that fails.
pub const FAILED: u8 = 1;

/// Prints what clap has to say, and returns the exit status that goes with it: `wrong` if the command line is, `failed` if
/// what was asked for can't be written. (clap's own `exit` does not say that.)
#[must_use]
pub fn end(said: &clap::Error, wrong: u8, failed: u8) -> ExitCode {
    let printed = said.print().and_then(|()| io::stdout().flush());
    if said.use_stderr() {
        return ExitCode::from(wrong);
    }
    match printed {
        // Whoever reads has seen enough.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            // There may be no standard error, and nowhere else to say so.
            let _ = writeln!(io::stderr(), "error: can't write the output: {error}");
            ExitCode::from(failed)
        }
        _ => ExitCode::SUCCESS,
    }
}
