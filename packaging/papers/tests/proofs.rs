//! The tests that docs/proofs.md names are there.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a panic is a failed test"
)]

use std::path::Path;

use pulldown_cmark::{Event, Options, Parser, Tag, TagEnd};

#[test]
fn every_property_has_its_tests() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    let text = std::fs::read_to_string(docs.join("proofs.md")).unwrap();
    let (mut properties, mut tests) = (0, 0);
    let mut source = None;
    for event in Parser::new_ext(&text, Options::ENABLE_TABLES) {
        match event {
            Event::Start(Tag::TableRow) => tests = 0,
            Event::End(TagEnd::TableRow) => {
                properties += 1;
                assert!(tests > 0, "property {properties} has no test");
            }
            Event::Start(Tag::Link { dest_url, .. }) if dest_url.ends_with(".rs") => {
                source = Some(std::fs::read_to_string(docs.join(&*dest_url)).unwrap());
            }
            Event::End(TagEnd::Link) => source = None,
            Event::Text(name) => {
                if let Some(source) = &source {
                    assert!(is_test(source, &name), "there is no test {name}");
                    tests += 1;
                }
            }
            _ => {}
        }
    }
    assert!(properties > 10, "the table is not read");
}

/// Whether the function of that name has an attribute that makes it a test, and none that has it left out.
fn is_test(source: &str, name: &str) -> bool {
    let function = format!("fn {name}(");
    let mut upwards = source.lines().rev().map(str::trim_start);
    if !upwards.any(|line| line.contains(&function)) {
        return false;
    }
    let attributes: Vec<&str> = upwards
        .take_while(|line| line.starts_with("#[") || line.starts_with("//"))
        .filter(|line| line.starts_with("#["))
        .collect();
    let is = |attribute: &str| attributes.iter().any(|line| line.starts_with(attribute));
    (is("#[test]") || is("#[tokio::test")) && !is("#[ignore")
}

#[test]
fn a_test_that_is_left_out_proves_nothing() {
    let source = "#[test]\n/// It is.\nfn is() {}\n#[test]\n#[ignore = \"slow\"]\nfn left_out() {}\nfn none() {}\n";
    let found = ["is", "left_out", "none", "gone"].map(|name| is_test(source, name));
    assert_eq!(found, [true, false, false, false]);
}
