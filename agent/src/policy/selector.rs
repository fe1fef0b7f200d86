//! How a rule says which control groups it is about.

use std::fmt;

use super::{Below, Names, Pattern, Subject, unit_name};

/// Which control groups a rule is about.
#[derive(Debug, Clone)]
pub(crate) enum Selector {
    /// Those whose path from the control group root this regular expression matches.
    Match(Pattern),
    /// Those of applications with these ids.
    App(Names),
    /// Those of units with these names.
    Unit(Names),
    /// Those of slices with these names.
    Slice(Names),
}

impl Selector {
    /// Whether it selects a control group.
    pub(crate) fn matches(&self, group: &Subject) -> bool {
        match self {
            Self::Match(pattern) => pattern.matches_either(group.path(), group.lossy()),
            Self::App(names) => group
                .applications()
                .iter()
                .any(|id| names.matches(id.as_bytes())),
            // Whoever wrote the name down as they saw it in the control groups means it too.
            Self::Unit(names) | Self::Slice(names) => group.units().any(|control_group| {
                let unit = unit_name(control_group);
                names.matches(unit)
                    || unit.len() != control_group.len() && names.matches(control_group)
            }),
        }
    }

    /// Which control groups below this one it selects.
    pub(crate) fn below(&self, group: &Subject) -> Below {
        match self {
            Self::Match(pattern) => pattern.below(group.path()),
            // What is in a unit has whatever is below it in that unit too.
            Self::App(_) | Self::Unit(_) | Self::Slice(_) => {
                match (self.matches(group), group.may_get_units()) {
                    (true, _) => Below::Everything,
                    (false, true) => Below::Something,
                    (false, false) => Below::Nothing,
                }
            }
        }
    }

    /// Whether it surely selects every control group.
    pub(crate) fn is_catch_all(&self) -> bool {
        match self {
            Self::Match(pattern) => pattern.catch_all,
            // The root of the subtree is in no unit below it.
            Self::App(_) | Self::Unit(_) | Self::Slice(_) => false,
        }
    }

    /// Whether it is about this slice by its name, and not about one that systemd puts into it.
    pub(crate) fn names_slice(&self, name: &str) -> bool {
        match self {
            Self::Match(pattern) => pattern.names_slice(name),
            Self::Unit(names) | Self::Slice(names) => names.contains(name),
            Self::App(_) => false,
        }
    }

    /// Whether it surely selects all control groups that another one does.
    pub(crate) fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Match(a), Self::Match(b)) => a.text == b.text,
            (Self::App(a), Self::App(b))
            | (Self::Unit(a), Self::Unit(b))
            | (Self::Unit(a), Self::Slice(b))
            | (Self::Slice(a), Self::Slice(b)) => a.covers(b),
            _ => false,
        }
    }
}

/// As in a configuration, on one line.
impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Match(pattern) if pattern.text.is_empty() => f.write_str("match: \"\""),
            Self::Match(pattern) => write!(f, "match: {pattern}"),
            Self::App(names) => write!(f, "app: {names}"),
            Self::Unit(names) => write!(f, "unit: {names}"),
            Self::Slice(names) => write!(f, "slice: {names}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use cgtproxy_proto::path::ControlGroupPath;

    use super::*;

    #[test]
    fn names_select_what_is_in_a_unit() {
        let names = |list: &[&str]| Names::new(list.iter().map(|&n| n.to_owned()).collect());
        let prefix = b"/user.slice/user-1.slice/user@1.service";
        let group = |path: &str| Subject::new(prefix, &ControlGroupPath::from_wire(path).unwrap());
        let app = Selector::App(names(&["org.telegram.desktop", "google-*"]));
        let unit = Selector::Unit(names(&[
            "foo.service",
            "run-*.scope",
            "io.github.Foo.service",
        ]));
        let slice = Selector::Slice(names(&["background.slice", "pids.slice"]));
        for (path, selected) in [
            ("", ""),
            ("app.slice", ""),
            ("app.slice/app-flatpak-org.telegram.desktop-7.scope", "a"),
            ("app.slice/app-flatpak-org.telegram.desktop-7.scope/x", "a"),
            (r"app.slice/app-google\x2dchrome@1.service", "a"),
            (
                "app.slice/snap.google-x.google-x-8d3f1834-c397-4085-b29d-3b2538c9ff4e.scope",
                "a",
            ),
            ("app.slice/foo.service", "u"),
            ("app.slice/foo.service/app-google-x-1.scope", "u"),
            ("run-7.scope", "u"),
            ("background.slice/foo.service", "us"),
            ("background.slice", "s"),
            ("app.slice/background.slice.service", ""),
            // As systemd escapes what could be the name of a file of the kernel's.
            ("app.slice/_io.github.Foo.service", "u"),
            ("_pids.slice/_io.github.Foo.service/x", "us"),
            ("app.slice/__io.github.Foo.service", ""),
        ] {
            let by = |selector: &Selector, letter| match selector.matches(&group(path)) {
                true => letter,
                false => "",
            };
            let found = [by(&app, "a"), by(&unit, "u"), by(&slice, "s")].concat();
            assert_eq!(found, selected, "{path}");
        }
        use Below::{Everything, Nothing, Something};
        for (path, below) in [
            ("", [Something, Something, Something]),
            ("app.slice", [Something, Something, Something]),
            ("background.slice", [Something, Something, Everything]),
            ("app.slice/bar.service", [Nothing, Nothing, Nothing]),
            ("app.slice/foo.service", [Nothing, Everything, Nothing]),
            (
                "app.slice/foo.service/x.slice",
                [Nothing, Everything, Nothing],
            ),
        ] {
            let found = [&app, &unit, &slice].map(|selector| selector.below(&group(path)));
            assert_eq!(found, below, "{path}");
        }
    }

    #[test]
    fn an_expression_that_can_not_be_seen_is_quoted() {
        let shown = |pattern| Selector::Match(Pattern::new(pattern).unwrap()).to_string();
        assert_eq!(shown(""), "match: \"\"");
        assert_eq!(shown("^/x"), "match: ^/x");
    }
}
