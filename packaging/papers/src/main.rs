//! cgtproxy-papers: writes the manual pages, the shells' completions and the licences of what is linked, when cgtproxy is
//! built.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

/// Writes the manual pages, the shells' completions and the third parties' licences of cgtproxy
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The date that the manual pages bear
    #[arg(long, value_name = "YYYY-MM-DD")]
    date: String,

    /// Where to put them; made if it is not there
    directory: PathBuf,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let written = cgtproxy_papers::all(&arguments.date)
        .and_then(|papers| cgtproxy_papers::write(&papers, &arguments.directory));
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut message = error.to_string();
            let mut cause = std::error::Error::source(&error);
            while let Some(error) = cause {
                message.push_str(&format!(": {error}"));
                cause = error.source();
            }
            eprintln!("cgtproxy-papers: {message}");
            ExitCode::FAILURE
        }
    }
}
