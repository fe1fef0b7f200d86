//! The slices that cgtproxy-exec runs commands in.

use std::collections::HashMap;
use std::rc::Rc;

use cgtproxy_proto::name::ProxyName;
use cgtproxy_proto::path::ControlGroupPath;

use super::{Rule, Target};

/// The name of a proxy that `cgtproxy-proxy.slice` and `cgtproxy-exec proxy` mean before the first one.
pub(crate) const DEFAULT_PROXY: &str = "proxy";

/// `cgtproxy-TARGET.slice` for each target. Whoever runs a command under one of them means it, so
/// they decide before any rule.
#[derive(Debug, Clone)]
pub(crate) struct ExecSlices(HashMap<Vec<u8>, Target>);

impl ExecSlices {
    /// The slices for a configuration with these proxies.
    pub(crate) fn new<'a>(proxies: impl IntoIterator<Item = &'a Rc<ProxyName>>) -> Self {
        let mut slices = HashMap::new();
        let mut add = |name: &str, target| {
            slices
                .entry(format!("cgtproxy-{name}.slice").into_bytes())
                .or_insert(target);
        };
        add("direct", Target::Direct);
        add("drop", Target::Drop);
        let mut first = None;
        for name in proxies {
            let target = Target::Proxy(name.clone());
            first.get_or_insert_with(|| target.clone());
            add(name.as_str(), target);
        }
        if let Some(first) = first {
            add(DEFAULT_PROXY, first);
        }
        Self(slices)
    }

    /// The verdict for a path: systemd nests `a-b.slice` in `a.slice`, so the deepest one is meant.
    pub(crate) fn find(&self, path: &ControlGroupPath) -> Option<Target> {
        let Place::In { slices, .. } = Place::of(path) else {
            return None;
        };
        let found = slices.iter().rev().find_map(|name| self.0.get(*name));
        found.cloned()
    }

    /// The slice that a rule names and does not decide about, for its target here is another than the rule's.
    pub(crate) fn overrules(&self, rule: &Rule) -> Option<(&str, &Target)> {
        self.0
            .iter()
            .filter(|(_, target)| **target != rule.target)
            .filter_map(|(name, target)| Some((std::str::from_utf8(name).ok()?, target)))
            .filter(|(name, _)| rule.selector.names_slice(name))
            .min_by_key(|(name, _)| *name)
    }

    /// Whether a control group below this one may be in a slice whose target has this property.
    pub(crate) fn may_come_below(
        &self,
        path: &ControlGroupPath,
        is_such: impl Fn(&Target) -> bool,
    ) -> bool {
        let mut others = self.0.iter().filter(|(_, other)| is_such(other));
        match Place::of(path) {
            Place::Above => others.next().is_some(),
            Place::Beside => false,
            Place::In { inside: true, .. } => false,
            Place::In { slices, .. } => {
                let outer = slices.last().copied().unwrap_or(ALL);
                others.any(|(name, _)| is_slice_in(outer, name))
            }
        }
    }
}

/// The slice that systemd puts all slices of targets in, since their names begin with its name.
const ALL: &[u8] = b"cgtproxy.slice";
const SUFFIX: &[u8] = b".slice";

/// Whether systemd puts a slice of this name into the other one, or into one that it puts there.
fn is_slice_in(outer: &[u8], name: &[u8]) -> bool {
    let stem = outer.strip_suffix(SUFFIX).unwrap_or(outer);
    let rest = name.strip_prefix(stem);
    rest.is_some_and(|rest| rest.starts_with(b"-") && rest.ends_with(SUFFIX))
}

/// Where a control group is, seen from the slices. Only systemd makes slices, and it puts these where their
/// names say: what an application calls its own control groups does not count.
enum Place<'p> {
    /// They may be below it.
    Above,
    /// Neither is in the other.
    Beside,
    /// In `cgtproxy.slice`.
    In {
        /// The slices in it that this one is in, from the outermost.
        slices: Vec<&'p [u8]>,
        /// It is in the last of them, and is none itself.
        inside: bool,
    },
}

impl<'p> Place<'p> {
    fn of(path: &'p ControlGroupPath) -> Self {
        let mut components = path.components().peekable();
        // A user's service manager, seen from the root of the machine.
        let manager: [fn(&[u8]) -> bool; 3] = [
            |name| name == b"user.slice",
            |name| name.starts_with(b"user-") && name.ends_with(b".slice"),
            |name| name.starts_with(b"user@") && name.ends_with(b".service"),
        ];
        if components.peek().is_some_and(|name| *name == b"user.slice") {
            for is_part in manager {
                match components.next() {
                    None => return Self::Above,
                    Some(name) if !is_part(name) => return Self::Beside,
                    Some(_) => {}
                }
            }
        }
        match components.next() {
            None => return Self::Above,
            Some(name) if name != ALL => return Self::Beside,
            Some(_) => {}
        }
        let mut slices = Vec::new();
        let mut outer = ALL;
        while let Some(name) = components.next_if(|name| is_slice_in(outer, name)) {
            slices.push(name);
            outer = name;
        }
        let inside = components.next().is_some();
        Self::In { slices, inside }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(proxies: &[&str], path: &str) -> Option<String> {
        let proxies: Vec<_> = proxies
            .iter()
            .map(|n| Rc::new(n.parse().unwrap()))
            .collect();
        let path = ControlGroupPath::from_wire(path).unwrap();
        ExecSlices::new(&proxies)
            .find(&path)
            .map(|t| t.name().to_owned())
    }

    #[test]
    fn the_deepest_slice_decides() {
        let names = ["clash", "clash-meta"];
        let cases = [
            ("cgtproxy.slice", None),
            ("cgtproxy.slice/cgtproxy-direct.slice", Some("direct")),
            (
                "cgtproxy.slice/cgtproxy-drop.slice/run-1.scope",
                Some("drop"),
            ),
            (
                "cgtproxy.slice/cgtproxy-clash.slice/cgtproxy-clash-meta.slice/x",
                Some("clash-meta"),
            ),
            ("cgtproxy.slice/cgtproxy-clash.slice/x", Some("clash")),
            ("cgtproxy.slice/cgtproxy-other.slice", None),
            ("cgtproxy.slice/cgtproxy-clash.slice.d", None),
            ("cgtproxy.slice/xcgtproxy-clash.slice", None),
            ("cgtproxy.slice/x/cgtproxy-clash.slice", None),
            (
                "cgtproxy.slice/cgtproxy-drop.slice/cgtproxy-clash.slice",
                Some("drop"),
            ),
            ("app.slice/app-x.scope/cgtproxy-direct.slice", None),
            (
                "user.slice/user-1.slice/user@1.service/cgtproxy.slice/cgtproxy-drop.slice",
                Some("drop"),
            ),
        ];
        for (path, target) in cases {
            assert_eq!(find(&names, path).as_deref(), target, "{path}");
        }
    }

    #[test]
    fn what_may_come_below() {
        let slices = |proxies: &[&str]| {
            let proxies: Vec<_> = proxies
                .iter()
                .map(|n| Rc::new(n.parse().unwrap()))
                .collect();
            ExecSlices::new(&proxies)
        };
        let one = slices(&["clash"]);
        let nested = slices(&["clash", "clash-meta"]);
        for (path, differs) in [
            ("", [true, true]),
            ("app.slice", [false, false]),
            ("user.slice/user-1.slice", [true, true]),
            ("user.slice/x.scope", [false, false]),
            ("cgtproxy.slice", [true, true]),
            ("cgtproxy.slice/cgtproxy-drop.slice", [false, false]),
            ("cgtproxy.slice/cgtproxy-clash.slice", [false, true]),
            (
                "cgtproxy.slice/cgtproxy-clash.slice/run-1.scope",
                [false, false],
            ),
            ("cgtproxy.slice/run-1.scope", [false, false]),
        ] {
            let path = ControlGroupPath::from_wire(path).unwrap();
            let target = one.find(&path).unwrap_or(Target::Direct);
            let found = [&one, &nested]
                .map(|slices| slices.may_come_below(&path, |other| *other != target));
            assert_eq!(found, differs, "{path:?}");
        }
    }

    #[test]
    fn proxy_is_the_first_one_unless_one_has_that_name() {
        let path = "cgtproxy.slice/cgtproxy-proxy.slice/x";
        assert_eq!(find(&["a", "b"], path).as_deref(), Some("a"));
        assert_eq!(find(&["a", "proxy"], path).as_deref(), Some("proxy"));
        assert_eq!(find(&[], path), None);
    }
}
