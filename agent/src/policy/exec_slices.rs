//! The slices that cgtproxy-exec runs commands in.

use std::collections::HashMap;
use std::rc::Rc;

use cgtproxy_proto::name::ProxyName;
use cgtproxy_proto::path::ControlGroupPath;

use super::Target;

/// The name of a proxy that `cgtproxy-proxy.slice` and `cgtproxy-exec proxy` mean before the first one.
pub const DEFAULT_PROXY: &str = "proxy";

/// `cgtproxy-TARGET.slice` for each target. Whoever runs a command under one of them means it, so
/// they decide before any rule.
#[derive(Debug, Clone)]
pub struct ExecSlices(HashMap<Vec<u8>, Target>);

impl ExecSlices {
    /// The slices for a configuration with these proxies.
    #[must_use]
    pub fn new<'a>(proxies: impl IntoIterator<Item = &'a Rc<ProxyName>>) -> Self {
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
    #[must_use]
    pub fn find(&self, path: &ControlGroupPath) -> Option<Target> {
        path.components()
            .rev()
            .filter(|c| c.starts_with(b"cgtproxy-"))
            .find_map(|c| self.0.get(c))
            .cloned()
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
            ("cgtproxy-clash.slice.d", None),
            ("xcgtproxy-clash.slice", None),
        ];
        for (path, target) in cases {
            assert_eq!(find(&names, path).as_deref(), target, "{path}");
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
