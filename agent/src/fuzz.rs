//! What comes from outside, as bytes: each function takes any, and must neither panic nor break what it asserts.
//! libFuzzer runs them (tests/fuzz), and so does every `cargo test`, over the corpus and variations of it.

use std::path::Path;

use crate::config::{self, LoadError, Scope};

/// A user's configuration, or the machine's. What is refused has a place in the file, and no message brings control
/// characters to a terminal.
pub fn configuration(bytes: &[u8]) {
    for scope in [Scope::User, Scope::System] {
        let findings = match config::parse(Path::new("config.yaml"), bytes, scope) {
            Ok(loaded) => loaded.findings,
            Err(LoadError::Invalid(findings)) => {
                assert!(findings.has_errors());
                findings
            }
            Err(_) => continue,
        };
        for (_, line) in findings.lines() {
            assert!(line.starts_with("config.yaml"), "{line:?}");
            assert!(
                !line.contains(|c: char| c.is_control() && c != '\n'),
                "{line:?}"
            );
        }
    }
}

/// A file of cgproxy's or of the original's. What is made of it is a configuration that loads, and of which there is
/// nothing left to be made.
pub fn migration(bytes: &[u8]) {
    let (text, findings) = match config::migrate(Path::new("old"), bytes) {
        Ok(migrated) => migrated,
        Err(findings) => {
            assert!(findings.has_errors());
            return;
        }
    };
    for (_, line) in findings.lines() {
        assert!(
            !line.contains(|c: char| c.is_control() && c != '\n'),
            "{line:?}"
        );
    }
    let file = Path::new("config.yaml");
    let loaded = config::parse(file, text.as_bytes(), Scope::User);
    assert!(loaded.is_ok(), "{text:?}: {loaded:?}");
    let again = config::migrate(file, text.as_bytes());
    assert!(again.is_ok_and(|(again, _)| again == text), "{text:?}");
}

#[cfg(test)]
#[path = "../../tests/fuzz/variations.rs"]
mod variations;

#[cfg(test)]
mod tests {
    #[test]
    fn no_configuration_panics() {
        super::variations::run("configuration", super::configuration);
    }

    #[test]
    fn what_is_migrated_loads() {
        super::variations::run("migration", super::migration);
    }
}
