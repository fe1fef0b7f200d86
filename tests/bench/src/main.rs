//! Measures cgtproxy on a real kernel, in sandboxes, side by side with the least that could be done and with what there
//! was before. `make bench` runs it; docs/performance.md says what comes out.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a measurement that cannot go on is best ended with a panic, which shows the sandbox"
)]

mod birth;
mod cli;
mod floor;
mod inside;
mod netlink;
mod order;
mod plot;
mod report;
mod rows;
mod stats;
mod yard;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use cgtproxy_tests::sandbox::run_in_sandbox;

use cli::{Role, parse};
use report::Report;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match parse(&arguments) {
        Ok(Role::Measure(kind)) => run_in_sandbox(|sandbox| inside::measure(sandbox, kind)),
        Ok(Role::Floor(directory)) => {
            floor::run(&directory);
            ExitCode::SUCCESS
        }
        Ok(Role::Packets(number)) => {
            inside::send_packets(number);
            ExitCode::SUCCESS
        }
        Ok(Role::Relay) => {
            inside::serve_relay();
            ExitCode::SUCCESS
        }
        Ok(Role::Socks) => {
            inside::serve_socks();
            ExitCode::SUCCESS
        }
        Ok(Role::Errand(errand)) => {
            errand.run();
            ExitCode::SUCCESS
        }
        Ok(Role::Become(words)) => inside::become_program(&words),
        Ok(Role::Help) => {
            print!("{}", cli::help());
            ExitCode::SUCCESS
        }
        Ok(Role::Bench(options)) => bench(&options),
        Err(why) => {
            eprintln!("cgtproxy-bench: {why}");
            ExitCode::FAILURE
        }
    }
}

fn bench(options: &cli::Options) -> ExitCode {
    if let Err(why) = can_run() {
        eprintln!("cgtproxy-bench: {why}");
        return ExitCode::FAILURE;
    }
    let mut report = Report::new(options);
    rows::run(options, &mut report);
    report.print();
    if let Some(directory) = &options.out
        && let Err(why) = write(&report, directory)
    {
        eprintln!("cgtproxy-bench: {}: {why}", directory.display());
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn write(report: &Report, directory: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(directory)?;
    std::fs::write(directory.join("bench.json"), report.json())?;
    std::fs::write(directory.join("results.md"), report.markdown())?;
    plot::all(report, directory)
}

fn can_run() -> Result<(), String> {
    let this: PathBuf = std::env::current_exe().map_err(|e| e.to_string())?;
    if !nix::unistd::Uid::effective().is_root() {
        return Err("only root may make the sandboxes: run `make bench`".into());
    }
    for program in [
        "cgtproxy-helper",
        "cgtproxy-agent",
        "cgtproxy-relay",
        "cgtproxy-testapp",
    ] {
        if !this.with_file_name(program).exists() {
            return Err(format!(
                "{program} is not beside this program: run `make bench`"
            ));
        }
    }
    Ok(())
}
