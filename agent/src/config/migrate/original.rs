//! A configuration of the original cgtproxy. It loads as it is; what there is a better word for is put in its
//! place in the text, and everything else, comments included, stays as somebody wrote it.

use std::ops::Range;
use std::path::Path;

use crate::config::Scope;
use crate::config::read;
use crate::config::reader::Reader;
use crate::config::yaml::{Node, Value};

use super::pattern;

/// Rewrites the text of a file without errors, of which `root` is the tree.
pub(super) fn migrate(reader: &mut Reader<'_>, text: &str, root: &Node) -> String {
    let mut edits: Vec<(Range<usize>, String)> = Vec::new();
    for (key, value) in entries(root) {
        match reader.written(key).as_str() {
            "cgroup-root" => {
                if reader.written(value) != "AUTO" {
                    reader.warning(key.place, "'cgroup-root' is left out").help = Some(
                        "where cgroup v2 is mounted is found out; if it is not, start the daemons with \
                         '--cgroup-root DIR'"
                            .into(),
                    );
                }
                edits.extend(removal(text, key, value));
            }
            "route-table" => {
                reader.warning(key.place, "'route-table' is left out").help = Some(
                    "the helper has one of its own; to choose it, write 'route-table' to \
                     /etc/cgtproxy/helper.yaml"
                        .into(),
                );
                edits.extend(removal(text, key, value));
            }
            "tproxies" => {
                for (_, tproxy) in entries(value) {
                    for (key, value) in entries(tproxy) {
                        if reader.written(key) == "mark" {
                            reader.warning(key.place, "'mark' is left out").help = Some(
                                "the helper allots marks, out of the 'mark-mask' in \
                                 /etc/cgtproxy/helper.yaml"
                                    .into(),
                            );
                            edits.extend(removal(text, key, value));
                        }
                    }
                }
            }
            "rules" => {
                let Value::List(rules) = &value.value else {
                    continue;
                };
                for (key, value) in rules.iter().flat_map(entries) {
                    if let (Value::Text(pattern), "match") =
                        (&value.value, reader.written(key).as_str())
                    {
                        if let Ok(pattern) = reader.patterns.compile(pattern) {
                            reader.warn_if_outside(key.place, &pattern);
                        }
                        let selector = pattern::selector(pattern);
                        let edit = selector.and_then(|s| Some((extent(text, key, value)?, s)));
                        edits.extend(edit);
                    }
                }
            }
            _ => {}
        }
    }
    edits.sort_by_key(|(range, _)| range.start);
    let mut new = text.to_owned();
    for (range, with) in edits.into_iter().rev() {
        if new.get(range.clone()).is_some() {
            new.replace_range(range, &with);
        }
    }
    match says_the_same(text, &new) {
        true => new,
        // In a way of writing YAML that nobody has thought of here; it loads as it is.
        false => text.to_owned(),
    }
}

/// Whether there are the same proxies and rules with the same targets as before.
fn says_the_same(old: &str, new: &str) -> bool {
    let read = |text: &str| read::read(Path::new(""), text.as_bytes(), Scope::User).0;
    let (Some(old), Some(new)) = (read(old), read(new)) else {
        return false;
    };
    let targets = |config: &crate::config::Config| -> Vec<String> {
        let rules = config.rules.rules.iter();
        rules.map(|rule| rule.target.name().to_owned()).collect()
    };
    old.proxies == new.proxies && old.bypass == new.bypass && targets(&old) == targets(&new)
}

fn entries(node: &Node) -> &[(Node, Node)] {
    match &node.value {
        Value::Map(entries) => entries,
        _ => &[],
    }
}

/// Where an entry stands, from its key to the end of its value, without the end of that line. None if it can't
/// be told.
fn extent(text: &str, key: &Node, value: &Node) -> Option<Range<usize>> {
    let key_range = key.range.clone()?;
    let after = text.get(key_range.end..)?;
    let start_of_value = after.trim_start_matches([' ', '\t', ':', '"', '\'']);
    if !start_of_value.starts_with(['|', '>']) {
        let value = value.range.clone()?;
        return (key_range.end < value.start).then_some(key_range.start..value.end);
    }
    // A block: its header, and all lines that are indented more than the key.
    let line_start = text
        .get(..key_range.start)?
        .rfind('\n')
        .map_or(0, |at| at + 1);
    let indent = text.get(line_start..key_range.start)?.len();
    let mut end = key_range.end + after.find('\n')?;
    let mut at = end + 1;
    for line in text.get(at..)?.split_inclusive('\n') {
        let content = line.trim_end();
        let own = content.len() - content.trim_start_matches(' ').len();
        if !content.is_empty() && own <= indent {
            break;
        }
        if !content.is_empty() {
            end = at + content.len();
        }
        at += line.len();
    }
    Some(key_range.start..end)
}

/// An entry's lines, if there is nothing else on them.
fn removal(text: &str, key: &Node, value: &Node) -> Option<(Range<usize>, String)> {
    let range = extent(text, key, value)?;
    let start = text.get(..range.start)?.rfind('\n').map_or(0, |at| at + 1);
    let rest = text.get(range.end..)?;
    let end = rest.find('\n').map_or(rest.len(), |at| at + 1);
    let after = rest.get(..end)?.trim();
    let alone = text.get(start..range.start)?.trim().is_empty()
        && (after.is_empty() || after.starts_with('#'));
    alone.then(|| (start..range.end + end, String::new()))
}
