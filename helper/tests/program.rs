//! The helper as a process, as far as that goes without privileges.

#![allow(clippy::unwrap_used, reason = "a panic is a failed test")]

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

/// What the unit's `RestartPreventExitStatus=` is about.
const EX_CONFIG: i32 = 78;

#[test]
fn nobody_has_to_read_what_it_says() {
    let (stderr, reader) = UnixStream::pair().unwrap();
    drop(reader);
    let status = Command::new(env!("CARGO_BIN_EXE_cgtproxy-helper"))
        .args(["--config", "/nonexistent/helper.yaml"])
        .env_remove("LISTEN_FDS")
        .stderr(OwnedFd::from(stderr))
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(EX_CONFIG), "{status}");
}

#[test]
fn who_may_not_remove_anything_is_told_so() {
    // Root is nobody in particular here, of a user namespace that the network is not of.
    let output = Command::new("unshare")
        .args(["--user", "--map-user=1000", "--map-group=1000"])
        .args([env!("CARGO_BIN_EXE_cgtproxy-helper"), "--remove"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("needs CAP_NET_ADMIN"), "{said}");
}

#[test]
fn the_journal_learns_how_bad_it_is() {
    let (mut reader, journal) = std::io::pipe().unwrap();
    let file = File::from(OwnedFd::from(journal.try_clone().unwrap()));
    let metadata = file.metadata().unwrap();
    drop(file);
    let status = Command::new(env!("CARGO_BIN_EXE_cgtproxy-helper"))
        .args(["--config", "/nonexistent/helper.yaml"])
        .env_remove("LISTEN_FDS")
        .env(
            "JOURNAL_STREAM",
            format!("{}:{}", metadata.dev(), metadata.ino()),
        )
        .stderr(journal)
        .status()
        .unwrap();
    let mut said = String::new();
    reader.read_to_string(&mut said).unwrap();
    assert!(!status.success());
    assert!(
        said.starts_with("<3>can't read '/nonexistent/helper.yaml': "),
        "{said}"
    );
}
