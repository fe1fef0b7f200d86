//! The examples in the documentation.

use std::path::Path;

use cgtproxy_agent::config::{Scope, read};

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

fn check(name: &str, example: &str, scope: Scope) {
    let (config, findings) = read(Path::new(name), example.as_bytes(), scope);
    assert!(
        config.is_some() && findings.list.is_empty(),
        "{findings}{example}"
    );
}

#[test]
fn examples_are_configurations() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let text = |file: &str| std::fs::read_to_string(root.join(file)).unwrap();
    let configuration = text("docs/configuration.md");
    let (ours, _) = configuration.split_once(HELPERS).unwrap();
    let examples_of = |file: &str, text: &str, least: usize| {
        let found = examples(text);
        assert!(found.len() >= least, "{file}");
        for (line, example) in found {
            let scope = match example.contains("enforce:") || example.contains("gateway:") {
                true => Scope::System,
                false => Scope::User,
            };
            check(&format!("{file}:{line}"), &example, scope);
        }
    };
    examples_of("configuration.md", ours, 3);
    examples_of("README.md", &text("README.md"), 1);
    check(
        "config.yaml",
        &text("docs/examples/config.yaml"),
        Scope::User,
    );
}
