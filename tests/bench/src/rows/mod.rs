//! What is measured, row by row. Whatever is compared is measured in turns, A B A B, so that a machine that is busy
//! with something else is as busy for all of them.

mod arrivals;
mod burst;
mod idle;
mod packets;
mod relay;
mod restore;
mod socks;
mod start;
mod users;

use crate::cli::Options;
use crate::order::Kind;
use crate::report::Report;
use crate::yard::Yard;

/// Measures the rows that are asked for.
pub(crate) fn run(options: &Options, report: &mut Report) {
    for row in &options.rows {
        eprintln!("{row}");
        match row.as_str() {
            "latency" => arrivals::latency(options, report),
            "first-send" => arrivals::first_send(options, report),
            "burst" => burst::run(options, report),
            "start" => start::run(options, report),
            "packets" => packets::run(options, report),
            "relay" => relay::run(options, report),
            "socks" => socks::run(options, report),
            "idle" => idle::run(options, report),
            "users" => users::many(options, report),
            "flood" => users::flood(options, report),
            "restore" => restore::run(options, report),
            other => unreachable!("the command line knows no '{other}'"),
        }
    }
}

/// A yard for each of these, and one for the original where it is installed.
fn yards(kinds: &[Kind]) -> Vec<Yard> {
    kinds
        .iter()
        .copied()
        .chain(original())
        .map(Yard::start)
        .collect()
}

/// The original is measured where it is installed.
fn original() -> Option<Kind> {
    let path = std::env::var_os("PATH")?;
    let found = std::env::split_paths(&path).any(|d| d.join("cgtproxy").is_file());
    found.then_some(Kind::Original)
}
