//! The relay as a process.

#![allow(clippy::unwrap_used, reason = "a panic is a failed test")]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::process::{Child, Command};

use rustix::process::{Pid, Signal, kill_process};

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
fn without_a_runtime_directory_it_listens_where_the_agent_looks() {
    // A user for whom systemd has made none.
    let output = Command::new("unshare")
        .args(["--user", "--map-user=3999999999"])
        .arg(env!("CARGO_BIN_EXE_cgtproxy-relay"))
        .env_remove("XDG_RUNTIME_DIR")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let socket = "/run/user/3999999999/cgtproxy-relay.sock";
    assert!(
        said.contains(&format!("can't listen on {socket}: ")),
        "{said}"
    );
    assert_eq!(output.status.code(), Some(1), "{said}");
}

/// A relay that listens there, with files of its own in that directory.
fn relay(socket: &Path, directory: &Path) -> Command {
    let mut relay = Command::new(env!("CARGO_BIN_EXE_cgtproxy-relay"));
    relay.arg("--socket").arg(socket).env("HOME", directory);
    relay
}

/// One that is ready, and the socket by which it says so.
struct Started {
    relay: Child,
    _told: UnixDatagram,
}

impl Started {
    fn new(socket: &Path, directory: &Path) -> Self {
        let notify = directory.join("notify");
        let told = UnixDatagram::bind(&notify).unwrap();
        let mut relay = relay(socket, directory);
        let relay = relay.env("NOTIFY_SOCKET", &notify).spawn().unwrap();
        let mut message = [0; 64];
        told.recv(&mut message).unwrap();
        assert!(message.starts_with(b"READY=1"));
        Self { relay, _told: told }
    }

    fn stop(mut self) {
        kill_process(Pid::from_child(&self.relay), Signal::TERM).unwrap();
        assert_eq!(self.relay.wait().unwrap().code(), Some(0));
    }
}

#[test]
fn of_two_relays_neither_takes_the_others_socket() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let socket = directory.join("relay.sock");
    let first = Started::new(&socket, directory);
    // One that is starting has none yet.
    std::fs::rename(&socket, directory.join("first")).unwrap();
    let output = relay(&socket, directory).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("another relay listens on"), "{said}");
    assert_eq!(output.status.code(), Some(1), "{said}");
    // One that does not see the first one's lock.
    std::fs::remove_file(socket.with_extension("lock")).unwrap();
    std::fs::remove_file(directory.join("notify")).unwrap();
    let second = Started::new(&socket, directory);
    first.stop();
    UnixStream::connect(&socket).unwrap();
    second.stop();
    assert!(!socket.exists());
}

/// As other programs do, git and those of coreutils among them.
#[test]
fn a_help_that_can_not_be_written_is_a_failure() {
    for option in ["--help", "-h", "--version"] {
        let output = Command::new(env!("CARGO_BIN_EXE_cgtproxy-relay"))
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
