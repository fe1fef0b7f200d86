//! Expressions of the original, whose paths begin where cgroup v2 is mounted.

use std::ops::Range;

/// Where that is, as somebody writes it.
pub(super) const MOUNT_POINT: &str = "/sys/fs/cgroup";

/// An expression without the mount point where a path begins with it; none if it does so nowhere.
pub(super) fn without(pattern: &str) -> Option<String> {
    let mut cut = String::new();
    let mut end = 0;
    for (at, _) in pattern.match_indices("sys") {
        let Some(range) = occurrence(pattern, at) else {
            continue;
        };
        cut.push_str(pattern.get(end..range.start)?);
        if !cut.ends_with('^') {
            cut.push('^');
        }
        end = range.end;
    }
    let rest = pattern.get(end..)?;
    (end > 0).then(|| cut + rest)
}

/// The mount point whose first name is at `at`, if nothing but a beginning is before it and it ends with a name.
fn occurrence(pattern: &str, at: usize) -> Option<Range<usize>> {
    let (before, mut rest) = pattern.split_at_checked(at)?;
    let before = before.strip_suffix('/')?;
    let before = before.strip_suffix('\\').unwrap_or(before);
    let begins = ["", "^"].contains(&before)
        || ["|", "(", "(?:", "|^", "(^", "(?:^"]
            .iter()
            .any(|end| before.ends_with(end));
    if !begins {
        return None;
    }
    rest = rest.strip_prefix("sys")?;
    for name in ["fs", "cgroup"] {
        rest = slash(rest)?.strip_prefix(name)?;
    }
    // A hybrid hierarchy has it there.
    let unified = slash(rest).and_then(|rest| rest.strip_prefix("unified"));
    let rest = unified.filter(|rest| is_end(rest)).unwrap_or(rest);
    is_end(rest).then(|| before.len()..pattern.len() - rest.len())
}

fn slash(text: &str) -> Option<&str> {
    text.strip_prefix('\\').unwrap_or(text).strip_prefix('/')
}

/// Whether a name ends before this.
fn is_end(rest: &str) -> bool {
    let ends = ["|", "(", ")", ".*", ".+"];
    rest.is_empty() || slash(rest).is_some() || ends.iter().any(|end| rest.starts_with(end))
}
