//! Packages: what is in them, and what they do to a system.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a panic is a failed test"
)]

mod contents;
mod installed;
mod scripts;
mod source;

use std::collections::BTreeSet;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

const OUT: &str = "/run/testbed/packages";

/// Runs a command of the host's inside the sandbox.
#[track_caller]
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| {
        panic!(
            "can't run {}: {error}",
            command.get_program().to_string_lossy()
        )
    });
    assert!(
        output.status.success(),
        "{command:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn lines(text: &str) -> BTreeSet<String> {
    text.lines().map(str::to_owned).collect()
}

/// All files below a directory, as absolute paths in it.
fn files(directory: &str) -> BTreeSet<String> {
    lines(&run(Command::new("find")
        .arg(directory)
        .args(["-not", "-type", "d", "-printf", "/%P\n"])))
}

/// Puts a script into /run/tools.
fn write_tool(name: &str, script: &str) {
    let path = Path::new("/run/tools").join(name);
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
}
