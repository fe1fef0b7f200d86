//! cgtproxy-agent: decides which of a user's applications go direct, are dropped or are proxied.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use cgtproxy_agent::{cli::Arguments, command, log, text};
use clap::Parser;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    log::init();
    command::run(arguments).unwrap_or_else(|error| {
        tracing::error!("{}", text::chain(&error));
        ExitCode::FAILURE
    })
}
