//! A configuration of the original cgtproxy. It loads as it is; what there is a better word for is put in its
//! place in the text, and everything else, comments included, stays as somebody wrote it.

use std::ops::Range;
use std::path::Path;

use crate::config::finding::Place;
use crate::config::mount_point::{self, MOUNT_POINT};
use crate::config::read;
use crate::config::reader::Reader;
use crate::config::yaml::{Node, Value};
use crate::config::{Config, Scope};

use super::pattern;
use super::write::scalar;

/// What a piece of the text becomes.
type Edit = (Range<usize>, String);

/// Where something is done, what, and why.
type Done = (Place, String, String);

/// Rewrites the text of a file without errors, of which `root` is the tree and `config` the meaning.
pub(super) fn migrate(reader: &mut Reader<'_>, text: &str, root: &Node, config: &Config) -> String {
    let mut edits: Vec<Edit> = Vec::new();
    // It is said once it is done.
    let mut done: Vec<Done> = Vec::new();
    let mut adds_slices = false;
    for (key, value) in entries(root) {
        match reader.written(key).as_str() {
            "cgroup-root" => {
                let Some(edit) = removal(text, key, value) else {
                    continue;
                };
                if reader.written(value) != "AUTO" {
                    let help = "where cgroup v2 is mounted is found out; if it is not, start the daemons with \
                                '--cgroup-root DIR'";
                    done.push((key.place, "'cgroup-root' is left out".into(), help.into()));
                }
                edits.push(edit);
            }
            "route-table" => {
                let Some(edit) = removal(text, key, value) else {
                    continue;
                };
                let help = "the helper has one of its own; to choose it, write 'route-table' to \
                            /etc/cgtproxy/helper.yaml";
                done.push((key.place, "'route-table' is left out".into(), help.into()));
                edits.push(edit);
            }
            "tproxies" => {
                for (_, tproxy) in entries(value) {
                    for (key, value) in entries(tproxy) {
                        if reader.written(key) == "mark"
                            && let Some(edit) = removal(text, key, value)
                        {
                            let help = "the helper allots marks, out of the 'mark-mask' in /etc/cgtproxy/helper.yaml";
                            done.push((key.place, "'mark' is left out".into(), help.into()));
                            edits.push(edit);
                        }
                    }
                }
            }
            "rules" => {
                let Value::List(rules) = &value.value else {
                    continue;
                };
                if let Some((edit, said)) = rules_before_slices(reader, text, root, rules, config) {
                    edits.push(edit);
                    done.push(said);
                    adds_slices = true;
                }
                for (key, value) in rules.iter().flat_map(entries) {
                    if reader.written(key) == "match" {
                        let (edit, cut) = selector_of(reader, text, key, value);
                        edits.extend(edit);
                        done.extend(cut);
                    }
                }
            }
            _ => {}
        }
    }
    let new = edited(text, edits);
    // In a way of writing YAML that nobody has thought of here; it loads as it is.
    if !says_the_same(config, &new, adds_slices) {
        return text.to_owned();
    }
    for (place, what, why) in done {
        reader.warning(place, what).help = Some(why);
    }
    new
}

/// What takes the place of a rule's pattern, if something says the same in other words; and what was cut out of it, which
/// is said only of what is replaced.
fn selector_of(
    reader: &mut Reader<'_>,
    text: &str,
    key: &Node,
    value: &Node,
) -> (Option<Edit>, Option<Done>) {
    let Value::Text(written) = &value.value else {
        return (None, None);
    };
    let cut = mount_point::without(written);
    let pattern = cut.as_deref().unwrap_or(written);
    if let Ok(pattern) = reader.patterns.compile(pattern) {
        reader.warn_if_outside(key.place, &pattern);
    }
    let selector = pattern::selector(pattern).or_else(|| {
        let line = cut.as_deref().filter(|cut| !cut.contains('\n'))?;
        Some(format!("match: {}", scalar(line)))
    });
    let edit = selector.and_then(|s| Some((extent(text, key, value)?, s)));
    let done = (cut.is_some() && edit.is_some()).then(|| {
        let message = format!("'{MOUNT_POINT}' is left out");
        let help = "a path begins at the control group root".into();
        (key.place, message, help)
    });
    (edit, done)
}

/// The text with these edits made.
fn edited(text: &str, mut edits: Vec<Edit>) -> String {
    edits.sort_by_key(|(range, _)| (range.start, range.end));
    let mut new = text.to_owned();
    // Two that are cut out of one line may both want what is between them.
    let mut next = text.len();
    for (range, with) in edits.into_iter().rev() {
        let range = range.start..range.end.min(next);
        next = range.start;
        if new.get(range.clone()).is_some() {
            new.replace_range(range, &with);
        }
    }
    new
}

/// The original has no slices that come before rules. Where they would decide otherwise, they are switched off.
fn rules_before_slices(
    reader: &mut Reader<'_>,
    text: &str,
    root: &Node,
    rules: &[Node],
    config: &Config,
) -> Option<(Edit, Done)> {
    let slices = config.rules.exec_slices.as_ref()?;
    let (place, (slice, target)) = rules
        .iter()
        .zip(&config.rules.rules)
        .find_map(|(node, rule)| Some((node.place, slices.overrules(rule)?)))?;
    let is_there = |(key, _): &(Node, Node)| reader.written(key) == "exec-slices";
    if entries(root).iter().any(is_there) {
        return None;
    }
    let version = entries(root)
        .iter()
        .find(|(key, _)| reader.written(key) == "version");
    let edit =
        version.and_then(|(key, value)| insertion(text, key, value, "exec-slices: false"))?;
    let what = "'exec-slices: false' is added".to_owned();
    let why = format!(
        "what cgtproxy-exec puts into '{slice}' goes where rules say, and not to '{target}' before them"
    );
    Some((edit, (place, what, why)))
}

/// Whether there are the same proxies and rules with the same targets as before, and slices of cgtproxy-exec unless they
/// are switched off.
fn says_the_same(old: &Config, new: &str, without_slices: bool) -> bool {
    let Some(new) = read::read(Path::new(""), new.as_bytes(), Scope::User).0 else {
        return false;
    };
    let targets = |config: &Config| -> Vec<String> {
        let rules = config.rules.rules.iter();
        rules.map(|rule| rule.target.name().to_owned()).collect()
    };
    let has_slices = |config: &Config| config.rules.exec_slices.is_some();
    old.proxies == new.proxies
        && old.bypass == new.bypass
        && targets(old) == targets(&new)
        && has_slices(&new) == (has_slices(old) && !without_slices)
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

/// Another entry of the same map: on a line after this one, or before it on the same line.
fn insertion(text: &str, key: &Node, value: &Node, entry: &str) -> Option<Edit> {
    let range = extent(text, key, value)?;
    let indent = text.get(..range.start)?.rsplit('\n').next()?;
    let rest = text
        .get(range.end..)?
        .split_inclusive('\n')
        .next()
        .unwrap_or_default();
    let after = rest.trim();
    let in_braces = text.trim_start().starts_with('{');
    if in_braces || !indent.trim().is_empty() || !(after.is_empty() || after.starts_with('#')) {
        return Some((range.start..range.start, format!("{entry}, ")));
    }
    let end = range.end + rest.len();
    let line = match rest.ends_with('\n') {
        true => format!("{indent}{entry}\n"),
        false => format!("\n{indent}{entry}"),
    };
    Some((end..end, line))
}

/// An entry's lines, if there is nothing else on them, or what it is in a map on one line.
fn removal(text: &str, key: &Node, value: &Node) -> Option<Edit> {
    let range = extent(text, key, value)?;
    let start = text.get(..range.start)?.rfind('\n').map_or(0, |at| at + 1);
    let rest = text.get(range.end..)?;
    let end = rest.find('\n').map_or(rest.len(), |at| at + 1);
    let after = rest.get(..end)?.trim();
    let alone = text.get(start..range.start)?.trim().is_empty()
        && (after.is_empty() || after.starts_with('#'));
    let whole = match alone {
        true => start..range.end + end,
        false => within_line(text, range)?,
    };
    Some((whole, String::new()))
}

/// An entry of a map in braces, and the comma after it or before it.
fn within_line(text: &str, range: Range<usize>) -> Option<Range<usize>> {
    let before = text.get(..range.start)?.trim_end();
    let after = text.get(range.end..)?;
    let rest = after.trim_start();
    let comma = after.len() - rest.len() + 1;
    if let Some(rest) = rest.strip_prefix(',') {
        let spaces = rest.len() - rest.trim_start_matches(' ').len();
        return Some(range.start..range.end + comma + spaces);
    }
    if !rest.starts_with('}') {
        return None;
    }
    let start = before.strip_suffix(',').map_or(range.start, str::len);
    Some(start..range.end)
}
