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
            Event::End(TagEnd::TableRow) => {
                properties += 1;
                assert!(tests >= properties, "property {properties} has no test");
            }
            Event::Start(Tag::Link { dest_url, .. }) if dest_url.ends_with(".rs") => {
                source = Some(std::fs::read_to_string(docs.join(&*dest_url)).unwrap());
            }
            Event::End(TagEnd::Link) => source = None,
            Event::Text(name) => {
                if let Some(source) = &source {
                    assert!(
                        source.contains(&format!("fn {name}(")),
                        "there is no test {name}"
                    );
                    tests += 1;
                }
            }
            _ => {}
        }
    }
    assert!(properties > 10, "the table is not read");
}
