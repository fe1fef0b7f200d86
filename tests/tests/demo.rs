//! The demonstration holds what it promises.

#![allow(clippy::expect_used, reason = "a panic is a failed test")]

use std::process::Command;

#[test]
fn everything_it_shows_is_as_configured() {
    let demo = Command::new(env!("CARGO_BIN_EXE_cgtproxy-demo"))
        .output()
        .expect("it can be started");
    let shown = String::from_utf8_lossy(&demo.stdout);
    let errors = String::from_utf8_lossy(&demo.stderr);
    assert!(demo.status.success(), "{shown}\n{errors}");
    assert!(shown.contains("observations are as configured"), "{shown}");
}
