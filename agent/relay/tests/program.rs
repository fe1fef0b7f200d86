//! The relay as a process.

#![allow(clippy::unwrap_used, reason = "a panic is a failed test")]

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Command;

#[test]
fn nobody_has_to_read_what_it_says() {
    let (stderr, reader) = UnixStream::pair().unwrap();
    drop(reader);
    let status = Command::new(env!("CARGO_BIN_EXE_cgtproxy-relay"))
        .args(["--socket", "/nonexistent/relay.sock"])
        .stderr(OwnedFd::from(stderr))
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(1), "{status}");
}

#[test]
fn the_journal_learns_how_bad_it_is() {
    let output = Command::new(env!("CARGO_BIN_EXE_cgtproxy-relay"))
        .args(["--socket", "/nonexistent/relay.sock"])
        .env("JOURNAL_STREAM", "1:1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.starts_with("<3>can't listen on /nonexistent/relay.sock: "),
        "{said}"
    );
}
