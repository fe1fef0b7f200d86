//! The demonstration holds what it promises.

#![allow(clippy::expect_used, reason = "a panic is a failed test")]

use std::process::{Command, Stdio};

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

#[test]
fn who_has_seen_enough_is_not_shown_a_panic() {
    let mut demo = Command::new(env!("CARGO_BIN_EXE_cgtproxy-demo"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it can be started");
    drop(demo.stdout.take());
    let demo = demo.wait_with_output().expect("it ends");
    let errors = String::from_utf8_lossy(&demo.stderr);
    assert!(demo.status.success() && errors.is_empty(), "{errors}");
}
