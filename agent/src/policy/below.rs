//! What a pattern says about every path below a control group: whether something that is made there can match,
//! or must.

use regex_syntax::hir::{Dot, Hir, HirKind, Look, LookSet};

use super::automaton::Automaton;

/// Which control groups below one are selected, those included that are not there yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Below {
    /// None.
    Nothing,
    /// All.
    Everything,
    /// It depends on their names, or nobody knows.
    Something,
}

/// Whether a match stays one when more is added to the path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stays {
    /// Whatever is added. It may be tried on the path with the slash that comes next.
    Always,
    /// If it is in the path without that slash, for what comes after the match counts: a slash and the
    /// end are alike to it, but what comes after the slash is not known.
    BeforeTheSlash,
    /// It may be tied to the end.
    Perhaps,
}

/// What there is to know about a pattern beside its matches.
#[derive(Debug, Clone, Copy)]
pub(super) struct Outlook {
    stays: Stays,
    /// It is tied to the path's beginning, and can be found not to match any more.
    anchored: bool,
}

impl Outlook {
    pub(super) fn new(hir: &Hir) -> Self {
        let looks = match without_tail(hir) {
            Some(rest) => rest.iter().fold(LookSet::empty(), |looks, part| {
                looks.union(part.properties().look_set())
            }),
            None => hir.properties().look_set(),
        };
        let starts = LookSet::singleton(Look::Start).insert(Look::StartLF);
        let ends = LookSet::singleton(Look::End)
            .insert(Look::EndLF)
            .insert(Look::EndCRLF)
            .insert(Look::StartCRLF);
        let stays = if looks.subtract(starts).is_empty() {
            Stays::Always
        } else if looks.intersect(ends).is_empty() {
            Stays::BeforeTheSlash
        } else {
            Stays::Perhaps
        };
        Self {
            stays,
            anchored: hir.properties().look_set_prefix().contains(Look::Start),
        }
    }

    /// What it says about paths that begin with this one and a slash. The automaton is the pattern's own.
    pub(super) fn below(self, path: &[u8], automaton: &Automaton) -> Below {
        // What is not UTF-8 is matched in two readings.
        if std::str::from_utf8(path).is_err() {
            return Below::Something;
        }
        // The root's path is the only one that has that slash already.
        let path = path.strip_suffix(b"/").unwrap_or(path);
        let beginning = [path, b"/"].concat();
        let stays = match self.stays {
            Stays::Always => automaton.matches(&beginning),
            Stays::BeforeTheSlash => automaton.matches(path),
            Stays::Perhaps => false,
        };
        if stays {
            return Below::Everything;
        }
        match self.anchored {
            true => automaton.follow(&beginning).unwrap_or(Below::Something),
            false => Below::Something,
        }
    }
}

/// What stands before `.*$` at the end of an expression, which says nothing: no control group has a line
/// feed in its name (cgroup_mkdir, kernel/cgroup/cgroup.c).
fn without_tail(hir: &Hir) -> Option<&[Hir]> {
    let HirKind::Concat(parts) = hir.kind() else {
        return None;
    };
    let [rest @ .., any, end] = parts.as_slice() else {
        return None;
    };
    let HirKind::Repetition(repetition) = any.kind() else {
        return None;
    };
    let is_any = [Dot::AnyCharExceptLF, Dot::AnyChar]
        .into_iter()
        .any(|dot| *repetition.sub == Hir::dot(dot));
    let is_tail = is_any
        && repetition.min == 0
        && repetition.max.is_none()
        && *end.kind() == HirKind::Look(Look::End);
    is_tail.then_some(rest)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::policy::Pattern;

    const PATH: &[u8] = b"/user.slice/user-1000.slice/user@1000.service/app.slice";

    #[test]
    fn knows_what_can_still_come() {
        use Below::{Everything, Nothing, Something};
        for (pattern, below) in [
            ("", Everything),
            (".*", Everything),
            ("app", Everything),
            (r"/app\.slice/", Everything),
            (r"\bapp\b", Everything),
            (r"slice\b", Everything),
            (r"^/user\.slice/", Everything),
            (r"^/user\.slice/.*$", Everything),
            (r"/app\.slice.*$", Everything),
            ("firefox", Something),
            (r"/app\.slice$", Something),
            (r"/\B", Something),
            (
                r"^/user\.slice/user-\d+\.slice/user@\d+\.service/app\.slice/app-",
                Something,
            ),
            (
                r"^/user\.slice/user-\d+\.slice/user@\d+\.service/background\.slice/",
                Nothing,
            ),
            (
                r"^/user\.slice/user-\d+\.slice/user@\d+\.service/app\.slice$",
                Nothing,
            ),
            (r"^/system\.slice", Nothing),
            (r"^(/system\.slice|/user\.slice/user-7)", Nothing),
            ("^/$", Nothing),
            (r"^/.*/x\.scope$", Something),
        ] {
            assert_eq!(
                Pattern::new(pattern).unwrap().below(PATH),
                below,
                "{pattern}"
            );
        }
        let pattern = Pattern::new("^/x/").unwrap();
        assert_eq!(pattern.below(b"/x/\xff"), Something);
        assert_eq!(Pattern::new("^/a").unwrap().below(b"/"), Something);
        assert_eq!(Pattern::new(r"/\B").unwrap().below(b"/"), Something);
    }

    proptest! {
        /// What is said to be so for every control group below is so for any.
        #[test]
        fn never_says_too_much(
            pattern in r"\^?(/|a|b|\.|\[ab\]|\.\*|a\+|\(a\|b/\)|\\b|\\B|\$|\(\?m:\$\)|\(\?m:\^\)|x\?|é){0,5}\$?",
            path in "(/[abxé.]{1,3}){0,3}",
            more in "[abxé.\u{301}]{1,3}(/[ab]{1,2})?",
            raw in proptest::bool::ANY,
        ) {
            let Ok(pattern) = Pattern::new(&pattern) else { return Ok(()) };
            let path = if path.is_empty() { "/" } else { &path };
            let separator = if path.ends_with('/') { "" } else { "/" };
            let mut whole = [path, separator, &more].concat().into_bytes();
            if raw {
                whole.push(0xff);
            }
            match pattern.below(path.as_bytes()) {
                Below::Everything => prop_assert!(pattern.matches(&whole), "{pattern} {path} {more}"),
                Below::Nothing => prop_assert!(!pattern.matches(&whole), "{pattern} {path} {more}"),
                Below::Something => {}
            }
        }
    }
}
