//! Collects the licences of the crates that are linked into what is installed, from the crates' own sources, wherever
//! cargo has those: in its registry or in a vendored directory.
//!
//! It is done when this is compiled and not when it runs, so that the program needs neither cargo nor sources.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::ffi::OsStr;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// What is installed, as `cargo build` is told.
const PROGRAMS: [&str; 6] = [
    "-p",
    "cgtproxy-helper",
    "-p",
    "cgtproxy-agent",
    "-p",
    "cgtproxy-relay",
];

/// How names of files begin that have a licence or belong to one.
const BEGINNINGS: [&str; 6] = [
    "license",
    "licence",
    "copying",
    "copyright",
    "notice",
    "unlicense",
];

const INTRODUCTION: &str = "\
Licences of third parties

The programs of cgtproxy are linked with the Rust crates below, each under a licence of its own, and with the
standard library of Rust (MIT OR Apache-2.0, https://github.com/rust-lang/rust). The licence of cgtproxy itself is the
GNU General Public License, version 3 or later.

The texts stand below, by their numbers, as they are in the crates' sources, each text once. Where a crate has none in its
sources, the expression says its licence; the texts of MIT and Apache-2.0 are among those of the others.
";

/// A crate that is linked.
struct Linked {
    name: String,
    version: String,
    /// An SPDX expression.
    licence: String,
    /// Where it is from.
    repository: String,
    /// Whom its manifest names.
    authors: String,
    /// The licence's file, if the manifest names one.
    file: Option<PathBuf>,
    directory: PathBuf,
}

fn main() -> Result<(), Box<dyn Error>> {
    // Cargo.lock says which crates, and these which of them are linked.
    for file in [
        "build.rs",
        "../../Cargo.lock",
        "../../Cargo.toml",
        "../../agent/Cargo.toml",
        "../../agent/relay/Cargo.toml",
        "../../helper/Cargo.toml",
        "../../proto/Cargo.toml",
    ] {
        println!("cargo::rerun-if-changed={file}");
    }
    let text = write(&linked()?)?;
    let directory = std::env::var_os("OUT_DIR").ok_or("cargo says where")?;
    std::fs::write(Path::new(&directory).join("third-party-licenses"), text)?;
    Ok(())
}

/// What cargo says. Whether it may use the network is up to its configuration, as with the crates themselves.
fn cargo(arguments: &[&str]) -> Result<String, Box<dyn Error>> {
    let program = std::env::var_os("CARGO").ok_or("cargo says which it is")?;
    let output = Command::new(program).args(arguments).output()?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        return Err(format!("cargo {}: {complaint}", arguments.join(" ")).into());
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// All crates that are linked and not this project's, by name.
fn linked() -> Result<Vec<Linked>, Box<dyn Error>> {
    let target = std::env::var("TARGET")?;
    let tree = cargo(
        &[
            &["tree", "--locked", "--target", &target],
            &PROGRAMS[..],
            &["--edges", "normal,no-proc-macro", "--prefix", "none"],
        ]
        .concat(),
    )?;
    // NAME vVERSION, and remarks.
    let names: BTreeSet<(&str, &str)> = tree
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            Some((words.next()?, words.next()?.strip_prefix('v')?))
        })
        .collect();
    let metadata = cargo(&[
        "metadata",
        "--locked",
        "--format-version",
        "1",
        "--filter-platform",
        &target,
    ])?;
    let metadata: Value = serde_json::from_str(&metadata)?;
    let packages = metadata.get("packages").and_then(Value::as_array);
    let mut all = Vec::new();
    for package in packages.ok_or("cargo metadata has packages")? {
        let text = |key| package.get(key).and_then(Value::as_str);
        let (Some(name), Some(version), Some(manifest)) =
            (text("name"), text("version"), text("manifest_path"))
        else {
            return Err("packages have names, versions and manifests".into());
        };
        // What has no source is in the workspace.
        if text("source").is_none() || !names.contains(&(name, version)) {
            continue;
        }
        let authors = package.get("authors").and_then(Value::as_array);
        let authors: Vec<_> = authors
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        let directory = Path::new(manifest).parent().ok_or("a file is somewhere")?;
        all.push(Linked {
            name: name.to_owned(),
            version: version.to_owned(),
            licence: text("license").unwrap_or("see its text").to_owned(),
            repository: text("repository").unwrap_or("crates.io").to_owned(),
            authors: authors.join(", "),
            file: text("license_file").map(|file| directory.join(file)),
            directory: directory.to_owned(),
        });
    }
    all.sort_by(|a, b| (&a.name, &a.version).cmp(&(&b.name, &b.version)));
    Ok(all)
}

/// Licences and what belongs to them in a crate, those of what it has from elsewhere included, by path.
fn texts(directory: &Path) -> Result<Vec<PathBuf>, std::io::Error> {
    let mut found = Vec::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory)? {
            let entry = entry?;
            let (path, name) = (entry.path(), entry.file_name());
            let name = name.to_string_lossy().to_ascii_lowercase();
            if entry.file_type()?.is_dir() {
                // How it is tested and published is nothing that is linked.
                if !name.starts_with('.') {
                    directories.push(path);
                }
            } else if BEGINNINGS.iter().any(|begin| name.starts_with(begin))
                && path.extension() != Some(OsStr::new("rs"))
            {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Every crate, and then every text once.
fn write(all: &[Linked]) -> Result<String, Box<dyn Error>> {
    let mut result = INTRODUCTION.to_owned();
    // By their words: how lines are broken makes no other licence.
    let mut numbers: BTreeMap<String, usize> = BTreeMap::new();
    let mut written = String::new();
    for of in all {
        let Linked { name, version, .. } = of;
        write!(result, "\n{name} {version}\n    Licence: {}\n", of.licence)?;
        writeln!(result, "    Source: {}", of.repository)?;
        let mut files = texts(&of.directory)?;
        files.extend(of.file.clone().filter(|file| !files.contains(file)));
        if files.is_empty() {
            if !of.authors.is_empty() {
                writeln!(result, "    Authors: {}", of.authors)?;
            }
            writeln!(result, "    Texts: none in its sources")?;
            continue;
        }
        let mut references = Vec::new();
        for file in &files {
            let text = std::fs::read(file)?;
            let text = String::from_utf8_lossy(&text).replace("\r\n", "\n");
            let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
            let shown = file.strip_prefix(&of.directory).unwrap_or(file).display();
            let next = numbers.len() + 1;
            let number = *numbers.entry(words).or_insert(next);
            if number == next {
                let rule = "-".repeat(100);
                write!(
                    written,
                    "\n{rule}\n[{number}] {shown} of {name} {version}\n{rule}\n\n"
                )?;
                writeln!(written, "{}", text.trim_matches('\n'))?;
            }
            references.push(format!("[{number}] {shown}"));
        }
        writeln!(result, "    Texts: {}", references.join(", "))?;
    }
    result.push_str(&written);
    Ok(result)
}
