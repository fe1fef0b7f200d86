//! Configurations of other programs, as ours.

mod cgproxy;
mod original;
mod pattern;
mod write;

use std::path::Path;

use super::Scope;
use super::finding::{Findings, Severity};
use super::read;
use super::reader::Reader;
use super::yaml::{Node, Value};

/// Makes a configuration of ours from one of cgproxy's, or from one of the original cgtproxy's: its text, and
/// what could not be carried over, as warnings about the old file.
///
/// # Errors
/// All that is wrong with the old file, if anything is.
pub(crate) fn migrate(file: &Path, bytes: &[u8]) -> Result<(String, Findings), Findings> {
    let (text, root) = read::document(file, bytes)?;
    let mut reader = Reader::new(text, Findings::new(file));
    let migrated = match kind(&reader, &root) {
        Some(Kind::Cgproxy) => cgproxy::migrate(&mut reader, &root),
        Some(Kind::Cgtproxy) => {
            let (config, findings) = read::read(file, bytes, Scope::User);
            let Some(config) = config else {
                return Err(findings);
            };
            Some(original::migrate(&mut reader, text, &root, &config))
        }
        None => {
            let finding = reader.error(
                root.place,
                "this is a configuration neither of cgproxy nor of cgtproxy",
            );
            finding.help = Some(
                "cgproxy's is a JSON object with keys like 'port' and 'cgroup_proxy'; cgtproxy's has \
                 'version' and 'rules'"
                    .into(),
            );
            None
        }
    };
    let mut findings = reader.finish();
    match migrated {
        Some(text) if !findings.has_errors() => Ok((text, findings)),
        _ => {
            // Nothing is carried over: there is no use in saying what is not.
            findings.list.retain(|f| f.severity == Severity::Error);
            Err(findings)
        }
    }
}

enum Kind {
    Cgproxy,
    Cgtproxy,
}

/// The program whose configuration it is: the one that knows the first key that either knows.
fn kind(reader: &Reader<'_>, root: &Node) -> Option<Kind> {
    let Value::Map(entries) = &root.value else {
        return None;
    };
    entries.iter().find_map(|(key, _)| {
        let key = reader.written(key);
        if cgproxy::KEYS.contains(&key.as_str()) {
            Some(Kind::Cgproxy)
        } else if read::KEYS.contains(&key.as_str()) {
            Some(Kind::Cgtproxy)
        } else {
            None
        }
    })
}

/// Whether a file is cgproxy's, and not one of ours with a key of cgproxy's in it.
pub(super) fn is_of_cgproxy(reader: &Reader<'_>, root: &Node) -> bool {
    let has_version = match &root.value {
        Value::Map(entries) => entries
            .iter()
            .any(|(key, _)| reader.written(key) == "version"),
        _ => false,
    };
    !has_version && matches!(kind(reader, root), Some(Kind::Cgproxy))
}

#[cfg(test)]
mod tests;
