//! cgtproxy-agent: decides which of a user's applications go direct, are dropped or are proxied.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    cgtproxy_agent::command::main()
}
