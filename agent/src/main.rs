//! cgtproxy-agent: decides which of a user's applications go direct, are dropped or are proxied.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use cgtproxy_agent::{cli::Arguments, command};
use cgtproxy_proto::{log, text};

/// The original's name for the variable that says how much is logged.
const OLD_VARIABLE: &str = "LOG_LEVEL";

fn main() -> ExitCode {
    let arguments = match Arguments::of_process() {
        Ok(arguments) => arguments,
        Err(status) => return status,
    };
    log::init(&[log::VARIABLE, OLD_VARIABLE]);
    command::run(arguments).unwrap_or_else(|error| {
        tracing::error!("{}", text::chain(&error));
        ExitCode::FAILURE
    })
}
