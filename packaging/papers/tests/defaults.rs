//! What is written down as the helper's defaults is what it does without a file.

#![allow(clippy::unwrap_used, reason = "a panic is a failed test")]

use std::path::Path;

use cgtproxy_helper::config::Config;

/// What the helper makes of a text.
fn read(text: &str) -> String {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, text).unwrap();
    format!("{:#?}", Config::load(Some(file.path())).unwrap())
}

#[test]
fn the_defaults_in_the_documentation_are_the_helpers() {
    let defaults = read("");
    let documents = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    let text = |file: &str| std::fs::read_to_string(documents.join(file)).unwrap();
    assert_eq!(read(&text("examples/helper.yaml")), defaults);
    let configuration = text("configuration.md");
    let (_, after) = configuration.split_once("These are the defaults:").unwrap();
    let (_, block) = after.split_once("```yaml\n").unwrap();
    let (block, _) = block.split_once("```").unwrap();
    assert_eq!(read(block), defaults);
    // Every key but that of which there is no default.
    for key in ["mark-mask", "own-table", "deny", "calls-per-second"] {
        assert!(block.contains(key), "{key}");
    }
}
