// The bounded run: the corpus of a target, and variations of it, in an ordinary test.

use std::path::PathBuf;

use proptest::prelude::*;
use proptest::test_runner::TestRunner;

/// Hands everything in `tests/fuzz/corpus/NAME`, and some thousand variations of it, to `target`.
pub(crate) fn run(name: &str, target: fn(&[u8])) {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .map(|above| above.join("tests/fuzz/corpus"))
        .find(|corpus| corpus.is_dir())
        .unwrap()
        .join(name);
    let mut corpus: Vec<Vec<u8>> = Vec::new();
    for entry in directory.read_dir().unwrap() {
        let bytes = std::fs::read(entry.unwrap().path()).unwrap();
        target(&bytes);
        corpus.push(bytes);
    }
    assert!(!corpus.is_empty());
    // What comes in where, how much it replaces, and of which other file it is, if of one.
    let change = (
        any::<prop::sample::Index>(),
        0usize..8,
        any::<Option<prop::sample::Index>>(),
        prop::collection::vec(any::<u8>(), 0..8),
    );
    let changes = (
        any::<prop::sample::Index>(),
        prop::collection::vec(change, 0..4),
    );
    let config = ProptestConfig {
        cases: 2048,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    TestRunner::new(config)
        .run(&changes, |(seed, changes)| {
            let mut bytes = seed.get(&corpus).clone();
            for (place, replaced, other, new) in changes {
                let from = place.index(bytes.len() + 1);
                let to = bytes.len().min(from + replaced);
                let new = match other {
                    Some(other) => {
                        let other = other.get(&corpus);
                        let start = place.index(other.len() + 1);
                        other[start..].to_vec()
                    }
                    None => new,
                };
                bytes.splice(from..to, new);
            }
            target(&bytes);
            Ok(())
        })
        .unwrap();
}
