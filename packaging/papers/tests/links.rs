//! What documents refer to is there.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a panic is a failed test"
)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use pulldown_cmark::{Event, Options, Parser, Tag, TagEnd};

/// A document's links, and the names of its headings as they stand in links.
fn read(path: &Path) -> (Vec<String>, Vec<String>) {
    let text = std::fs::read_to_string(path).unwrap();
    let (mut links, mut headings) = (Vec::new(), Vec::new());
    let mut heading: Option<String> = None;
    for event in Parser::new_ext(&text, Options::ENABLE_TABLES) {
        match event {
            Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
                links.push(dest_url.to_string());
            }
            Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
            Event::End(TagEnd::Heading(_)) => headings.extend(heading.take()),
            Event::Text(text) | Event::Code(text) => {
                if let Some(heading) = &mut heading {
                    let kept = text.to_lowercase().replace(' ', "-");
                    heading.extend(
                        kept.chars()
                            .filter(|c| c.is_alphanumeric() || "-_".contains(*c)),
                    );
                }
            }
            _ => {}
        }
    }
    (links, headings)
}

#[test]
fn all_links_within_the_repository_lead_somewhere() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()
        .unwrap();
    let mut documents: Vec<PathBuf> = vec![root.join("tests/README.md")];
    for directory in [root.clone(), root.join("docs")] {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "md") {
                documents.push(path);
            }
        }
    }
    let read: HashMap<_, _> = documents
        .into_iter()
        .map(|path| {
            let contents = read(&path);
            (path, contents)
        })
        .collect();
    let mut checked = 0;
    for (path, (links, _)) in &read {
        for link in links.iter().filter(|link| !link.contains("://")) {
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => path.clone(),
                file => path.parent().unwrap().join(file),
            };
            let target = target
                .canonicalize()
                .unwrap_or_else(|_| panic!("{}: there is no {link}", path.display()));
            if !anchor.is_empty() {
                let headings = read.get(&target).map(|(_, headings)| headings);
                assert!(
                    headings.is_some_and(|all| all.iter().any(|heading| heading == anchor)),
                    "{}: {link}: {headings:?}",
                    path.display()
                );
            }
            checked += 1;
        }
    }
    assert!(checked > 25, "{checked}");
}
