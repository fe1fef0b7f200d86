//! Packages of the binaries under test, made inside a sandbox by the project's Makefile.

use std::path::{Path, PathBuf};

use crate::command::{output_with_input, run};

/// Where the sandbox has the binaries under test.
const PROGRAMS: &str = "/run/testbed/bin";
/// Where their manual pages and completions are put.
const PAPERS: &str = "/run/testbed/papers";
/// Where the binaries are that packages are made of, without what only a debugger wants.
const STRIPPED: &str = "/run/testbed/stripped";

/// The project's directory.
pub fn workspace() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().expect("it is in the project's").to_owned()
}

/// Runs `make TARGET` with the binaries under test, and returns what it says. Variables may follow.
///
/// # Panics
/// When it fails.
#[track_caller]
pub fn make(target: &str, variables: &[&str]) -> String {
    write_papers();
    let workspace = workspace();
    let workspace = workspace.to_str().expect("a path in UTF-8");
    let (programs, papers) = (
        format!("BUILDDIR={PROGRAMS}"),
        format!("PAPERSDIR={PAPERS}"),
    );
    let make = ["make", "-s", "-C", workspace, target, &programs, &papers];
    run(&[&make[..], variables].concat())
}

#[track_caller]
fn write_papers() {
    let papers = format!("{PROGRAMS}/cgtproxy-papers");
    run(&[&papers, "--date", "2026-01-02", PAPERS]);
}

/// Builds a package, `deb`, `rpm` or `tarball`, in `directory`, with these variables in the environment, and
/// returns its path.
///
/// # Panics
/// When it can't be built without a remark.
#[track_caller]
pub fn build(kind: &str, directory: &str, environment: &[&str]) -> PathBuf {
    if !Path::new(STRIPPED).exists() {
        std::fs::create_dir(STRIPPED).expect("/run is ours");
        for program in ["helper", "agent", "exec", "relay"] {
            let (from, to) = (
                format!("{PROGRAMS}/cgtproxy-{program}"),
                format!("{STRIPPED}/cgtproxy-{program}"),
            );
            run(&["strip", "--strip-unneeded", "-o", &to, &from]);
        }
    }
    write_papers();
    let builder = workspace().join("packaging").join(kind);
    let builder = builder.to_str().expect("a path in UTF-8");
    let (programs, papers) = (
        format!("BUILDDIR={STRIPPED}"),
        format!("PAPERSDIR={PAPERS}"),
    );
    let to = format!("OUTDIR={directory}");
    let variables = [
        &programs,
        &papers,
        &to,
        "SOURCE_DATE_EPOCH=1767312000",
        // What takes long here makes packages smaller, and they are not kept.
        "DPKG_DEB_COMPRESSOR_TYPE=gzip",
        "DPKG_DEB_COMPRESSOR_LEVEL=1",
    ];
    let command = [&["env"], &variables[..], environment, &[builder]].concat();
    let output = output_with_input(&command, "");
    let [said, remarks] =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    // Where Debian 13's libc6 keeps its place in /lib64 is said about every package, and means nothing for this one.
    let about_libc = |line: &&str| {
        line.ends_with("diversions involved - output may be incorrect")
            || line.starts_with(" diversion by libc6 ")
    };
    let remarks: Vec<&str> = remarks.lines().filter(|line| !about_libc(line)).collect();
    assert!(
        output.status.success() && remarks.is_empty(),
        "{builder}: {}: {remarks:?}",
        output.status
    );
    PathBuf::from(said.trim())
}

/// Where everything is that a distribution's package has, as packaging/manifest says.
///
/// # Panics
/// When nothing can say so.
#[track_caller]
pub fn list() -> Vec<String> {
    let install = workspace().join("packaging/install");
    let install = install.to_str().expect("a path in UTF-8");
    let list = run(&["env", "PREFIX=/usr", install, "list"]);
    list.lines().map(str::to_owned).collect()
}
