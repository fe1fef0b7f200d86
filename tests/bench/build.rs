//! Compiles the program whose first act is a send: static and without a C library, so that nothing comes before it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a build that cannot go on says so by a panic"
)]

use std::path::PathBuf;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=src/first-send.c");
    let output = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it"));
    let status = Command::new("cc")
        .args(["-O2", "-static", "-nostdlib", "-ffreestanding"])
        .args(["-fno-stack-protector", "-fno-asynchronous-unwind-tables"])
        .args(["src/first-send.c", "-o"])
        .arg(output.join("first-send"))
        .status()
        .expect("cc, which links everything here, can be started");
    assert!(status.success(), "cc can't compile src/first-send.c");
}
