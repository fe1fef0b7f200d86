//! The helper as a process, as far as that goes without privileges.

#![allow(clippy::unwrap_used, reason = "a panic is a failed test")]

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
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

/// As `sshd -t` does for its own.
#[test]
fn a_configuration_is_checked_without_starting() {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("check");
    let _ = std::fs::remove_dir_all(&directory);
    std::fs::create_dir(&directory).unwrap();
    let at = |name: &str| directory.join(name).to_str().unwrap().to_owned();
    std::fs::write(at("right"), "grace-seconds: 7\n").unwrap();
    std::fs::write(at("wrong"), "grace-seconds: 7\nown-table: maybe\n").unwrap();
    // Nobody ever opens its other end.
    let made = Command::new("mkfifo").arg(at("pipe")).status().unwrap();
    assert!(made.success());
    for (name, code, expected) in [
        ("right", 0, String::new()),
        (
            "wrong",
            EX_CONFIG,
            format!(
                "{}:2:12: 'own-table' is 'maybe'; write 'true' or 'false'\n",
                at("wrong")
            ),
        ),
        (
            "pipe",
            EX_CONFIG,
            format!("can't read '{}': it is not a regular file\n", at("pipe")),
        ),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_cgtproxy-helper"))
            .args(["--check", "--config", &at(name)])
            .env_remove("LISTEN_FDS")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(said.trim_start_matches("error: "), expected);
        assert_eq!(output.status.code(), Some(code), "{name}");
    }
    std::fs::remove_dir_all(&directory).unwrap();
}

#[test]
fn a_level_that_is_none_is_warned_of() {
    let said = |level: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_cgtproxy-helper"))
            .args(["--check", "--config", "/nonexistent/helper.yaml"])
            .env_remove("LISTEN_FDS")
            .env("CGTPROXY_LOG", level)
            .output()
            .unwrap();
        String::from_utf8(output.stderr).unwrap()
    };
    let error = "error: there is no file '/nonexistent/helper.yaml'\n";
    for level in ["error", "Info", "off", ""] {
        let expected = if level == "off" { "" } else { error };
        assert_eq!(said(level), expected, "{level}");
    }
    let warning = "warning: CGTPROXY_LOG is 'loud', which is ignored; write 'error', 'warn', 'info', 'debug' or 'trace'\n";
    assert_eq!(said("loud"), format!("{warning}{error}"));
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
        said.starts_with("<3>there is no file '/nonexistent/helper.yaml'"),
        "{said}"
    );
}

/// As other programs do, git and those of coreutils among them.
#[test]
fn a_help_that_can_not_be_written_is_a_failure() {
    for option in ["--help", "-h", "--version"] {
        let output = Command::new(env!("CARGO_BIN_EXE_cgtproxy-helper"))
            .arg(option)
            .stdout(File::options().write(true).open("/dev/full").unwrap())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{option}: {said}");
        assert!(
            said.starts_with("error: can't write the output: "),
            "{said}"
        );
    }
}
