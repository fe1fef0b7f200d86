//! Runs a command under a target of the user's choice.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    cgtproxy_agent::exec::main()
}
