//! The examples in the documentation.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use tempfile::NamedTempFile;

use crate::world::{agent_command, output};

/// Where the part about another file begins.
const HELPERS: &str = "## The administrator's file";

/// The YAML in a text, with the number of the line that it begins after.
fn examples(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut open: Option<(usize, String)> = None;
    for (line, number) in text.lines().zip(1..) {
        match (&mut open, line.trim_end()) {
            (None, "```yaml") => open = Some((number, String::new())),
            (Some(_), "```") => found.extend(open.take()),
            (Some((_, example)), line) => *example += &format!("{line}\n"),
            (None, _) => {}
        }
    }
    found
}

/// A file of the repository.
fn text(file: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    std::fs::read_to_string(root.join(file)).unwrap()
}

/// The keys that the readers of configuration files know, but for those that are accepted and ignored.
fn keys() -> BTreeSet<String> {
    let mut keys = BTreeSet::new();
    let readers = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/config/read");
    let readers = readers.read_dir().unwrap().map(|entry| entry.unwrap());
    for reader in readers.filter(|entry| entry.file_type().unwrap().is_file()) {
        let source = std::fs::read_to_string(reader.path()).unwrap();
        let lists = source.split("KEYS: &[&str] = &[").skip(1);
        let lists = lists.filter_map(|list| list.split(']').next());
        let names = lists.flat_map(|list| list.split('"').skip(1).step_by(2));
        keys.extend(names.map(str::to_owned));
    }
    keys.retain(|key| !["cgroup-root", "route-table", "mark"].contains(&key.as_str()));
    keys
}

/// How many crates a program links.
fn crates(package: &str) -> usize {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["tree", "--locked", "--offline", "--prefix", "none"]);
    cargo.args(["--target", "x86_64-unknown-linux-gnu"]);
    cargo.args(["-p", package, "-e", "normal,no-proc-macro"]);
    let output = cargo.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let tree = String::from_utf8(output.stdout).unwrap();
    let crates = tree.lines().map(|line| line.trim_end_matches(" (*)"));
    crates.collect::<BTreeSet<_>>().len()
}

fn check(name: &str, example: &str, options: &[&str]) {
    let file = NamedTempFile::new().unwrap();
    std::fs::write(&file, example).unwrap();
    let mut command = agent_command();
    command.args(options).arg("check").arg(file.path());
    let (code, said, errors) = output(command);
    assert_eq!((code, &*errors), (Some(0), ""), "{name}: {said}{example}");
    assert!(said.ends_with(": no errors\n"), "{name}: {said}{example}");
}

#[test]
fn examples_are_configurations() {
    let configuration = text("docs/configuration.md");
    let (ours, _) = configuration.split_once(HELPERS).unwrap();
    let examples_of = |file: &str, text: &str, least: usize| {
        let found = examples(text);
        assert!(found.len() >= least, "{file}");
        for (line, example) in found {
            let options = match example.contains("enforce:") || example.contains("gateway:") {
                true => &["--system"][..],
                false => &[],
            };
            check(&format!("{file}:{line}"), &example, options);
        }
    };
    examples_of("configuration.md", ours, 3);
    examples_of("README.md", &text("README.md"), 2);
    examples_of("README.zh_CN.md", &text("README.zh_CN.md"), 2);
    check("config.yaml", &text("docs/examples/config.yaml"), &[]);
}

#[test]
fn every_key_is_in_an_example() {
    let configuration = text("docs/configuration.md");
    let (ours, _) = configuration.split_once(HELPERS).unwrap();
    let all: String = examples(ours).into_iter().map(|(_, e)| e).collect();
    let is_there = |key: &str| {
        let mut words = all.split([' ', '{', '\n']);
        words.any(|word| word.strip_suffix(':') == Some(key))
    };
    let keys = keys();
    assert!(keys.len() > 20, "{keys:?}");
    let missing: Vec<_> = keys.iter().filter(|key| !is_there(key)).collect();
    assert!(missing.is_empty(), "{missing:?}");
    assert!(all.contains("drop: all"));
}

#[test]
fn the_programs_link_as_many_crates_as_is_written() {
    let written = text("docs/how-it-works.md");
    let [helper, agent, relay] =
        ["helper", "agent", "relay"].map(|program| crates(&format!("cgtproxy-{program}")));
    assert!(
        written.contains(&format!("The helper links {helper} crates"))
            && written.contains(&format!("agent {agent} and the relay {relay}.")),
        "{helper}, {agent}, {relay}"
    );
}

/// The names in what is printed as JSON, as far as no interface has them.
fn printed(source: &str, function: &str) -> Vec<String> {
    let source = text(source);
    let (_, body) = source.split_once(&format!("fn {function}(")).unwrap();
    let (body, _) = body.split_once("\n}\n").unwrap();
    let names = body.lines().filter_map(|line| {
        let (name, _) = line.trim_start().strip_prefix('"')?.split_once("\":")?;
        Some(name.to_owned())
    });
    names.collect()
}

#[test]
fn every_name_in_json_is_written_down() {
    let configuration = text("docs/configuration.md");
    let (_, section) = configuration
        .split_once("### What `--json` prints")
        .unwrap();
    let (section, _) = section.split_once("\n## ").unwrap();
    for (command, source, function, least) in [
        ("apps", "agent/src/command/apps/mod.rs", "to_json", 11),
        ("explain", "agent/src/command/explain.rs", "to_json", 7),
        ("doctor", "agent/src/doctor/report.rs", "json", 5),
    ] {
        let row = section
            .lines()
            .find(|line| line.starts_with(&format!("| `{command}`")));
        let row = row.expect(command);
        let names = printed(source, function);
        assert!(names.len() >= least, "{command}: {names:?}");
        for name in names {
            assert!(row.contains(&format!("`{name}`")), "{command}: {name}");
        }
    }
}
