//! A control group as rules see it.

use std::borrow::Cow;
use std::cell::OnceCell;

use cgtproxy_proto::path::ControlGroupPath;

use super::application::application_ids;

/// A control group's path from the control group root, and the units that it is in.
#[derive(Debug)]
pub(crate) struct Subject {
    path: Vec<u8>,
    /// Where the part below the subtree's root begins.
    below: usize,
    /// Taken apart once, whatever the number of rules.
    applications: OnceCell<Vec<String>>,
    /// See [`Self::lossy`].
    lossy: OnceCell<Option<String>>,
}

impl Subject {
    /// The control group at `path` below a subtree whose root has the path `prefix`, with a slash before
    /// each component, from the control group root.
    pub(crate) fn new(prefix: &[u8], path: &ControlGroupPath) -> Self {
        Self {
            path: absolute(prefix, path),
            below: prefix.len(),
            applications: OnceCell::new(),
            lossy: OnceCell::new(),
        }
    }

    /// The path from the control group root; it begins with a slash.
    pub(crate) fn path(&self) -> &[u8] {
        &self.path
    }

    /// The path with characters in the place of bytes that are not UTF-8; none if there are no such bytes.
    pub(crate) fn lossy(&self) -> Option<&str> {
        self.lossy.get_or_init(|| lossy(&self.path)).as_deref()
    }

    /// The units below the subtree's root that it is in, from the outermost: slices, and in the innermost
    /// of them one that is none. What a unit makes below itself is no unit, whatever its name; but for
    /// the units of the service managers of users. They are named as their control groups: see [`unit_name`].
    pub(crate) fn units(&self) -> impl Iterator<Item = &[u8]> {
        let below = self.path.get(self.below..).unwrap_or_default();
        let names = below.split(|&b| b == b'/').filter(|name| !name.is_empty());
        names.scan(true, |inside, name| {
            let this = *inside;
            *inside &= holds_units(name);
            this.then_some(name)
        })
    }

    /// Whether units may be made below it that are not there yet.
    pub(crate) fn may_get_units(&self) -> bool {
        let below = self.path.get(self.below..).unwrap_or_default();
        let mut names = below.split(|&b| b == b'/').filter(|name| !name.is_empty());
        names.all(holds_units)
    }

    /// All ids of the applications whose units it is in.
    pub(crate) fn applications(&self) -> &[String] {
        self.applications
            .get_or_init(|| self.units().flat_map(application_ids).collect())
    }
}

/// A path with U+FFFD in the place of bytes that are not UTF-8; none if there are no such bytes.
pub(super) fn lossy(path: &[u8]) -> Option<String> {
    match String::from_utf8_lossy(path) {
        Cow::Borrowed(_) => None,
        Cow::Owned(lossy) => Some(lossy),
    }
}

/// The name of the unit whose control group has this name. Where that could be a file of the kernel's, as
/// `io.github.Foo.service` could, systemd writes a `_` before it, and before those that begin with one.
pub(crate) fn unit_name(control_group: &[u8]) -> &[u8] {
    control_group.strip_prefix(b"_").unwrap_or(control_group)
}

/// Whether systemd puts other units into the control group of this one.
fn holds_units(unit: &[u8]) -> bool {
    unit.ends_with(b".slice") || unit.starts_with(b"user@") && unit.ends_with(b".service")
}

/// The path from the control group root, as rules see it: it begins with a slash.
fn absolute(prefix: &[u8], path: &ControlGroupPath) -> Vec<u8> {
    let mut whole = Vec::with_capacity(prefix.len() + 1 + path.as_bytes().len());
    whole.extend_from_slice(prefix);
    // Only the control group root itself, which has no name, ends in a slash.
    if !path.as_bytes().is_empty() || prefix.is_empty() {
        whole.push(b'/');
    }
    whole.extend_from_slice(path.as_bytes());
    whole
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject(prefix: &str, path: &str) -> Subject {
        let path = ControlGroupPath::from_wire(path).unwrap();
        Subject::new(prefix.as_bytes(), &path)
    }

    #[test]
    fn paths_begin_with_one_slash() {
        for (prefix, path, whole) in [
            ("", "a/b", "/a/b"),
            ("", "", "/"),
            ("/x", "a/b", "/x/a/b"),
            ("/x", "", "/x"),
        ] {
            assert_eq!(subject(prefix, path).path(), whole.as_bytes());
        }
    }

    #[test]
    fn units_end_at_the_first_that_is_no_slice() {
        for (prefix, path, units, more) in [
            ("/user.slice/user-1.slice/user@1.service", "", "", true),
            ("/x/user@1.service", "app.slice", "app.slice", true),
            (
                "/x/user@1.service",
                "app.slice/app-a-1.scope/tab(4).scope",
                "app.slice app-a-1.scope",
                false,
            ),
            (
                "",
                "user.slice/user@1.service/app.slice/b.service/c.slice/d.scope",
                "user.slice user@1.service app.slice b.service",
                false,
            ),
            (
                "",
                "machine.slice/vm.scope",
                "machine.slice vm.scope",
                false,
            ),
        ] {
            let subject = subject(prefix, path);
            let found: Vec<_> = subject.units().map(String::from_utf8_lossy).collect();
            assert_eq!(found.join(" "), units, "{prefix} {path}");
            assert_eq!(subject.may_get_units(), more, "{prefix} {path}");
        }
    }
}
