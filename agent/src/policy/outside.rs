//! Which patterns are about control groups that no user's agent decides about.

use regex_syntax::hir::{Hir, HirKind};

/// What a pattern is about that selects nothing below a user's service manager.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outside {
    /// The machine's own services.
    Services,
    /// Login sessions.
    Sessions,
    /// Something else, or nothing at all.
    Elsewhere,
}

/// What the names in a pattern say. Users may give such names to their own units, and have no reason to.
pub(super) fn named(hir: &Hir) -> Option<Outside> {
    if is_in_each_match(hir, &|text| contains(text, b"/user@")) {
        None
    } else if is_in_each_match(hir, &|text| contains(text, b"/system.slice")) {
        Some(Outside::Services)
    } else {
        let is_scope = is_in_each_match(hir, &|text| contains(text, b".scope"));
        let names_session = |text: &[u8]| is_of_session(text, is_scope);
        // Who begins with a name means all of it.
        let begins_with_one =
            beginning(hir).is_some_and(|text| names_session(&[b"/", text].concat()));
        (begins_with_one || is_in_each_match(hir, &names_session)).then_some(Outside::Sessions)
    }
}

/// The text that an expression begins with, if it does.
fn beginning(hir: &Hir) -> Option<&[u8]> {
    match hir.kind() {
        HirKind::Literal(literal) => Some(&literal.0),
        HirKind::Concat(parts) => beginning(parts.first()?),
        _ => None,
    }
}

/// Whether a text that is wanted stands in whatever an expression matches. Says no when in doubt.
fn is_in_each_match(hir: &Hir, is_wanted: &dyn Fn(&[u8]) -> bool) -> bool {
    let is_in = |part: &Hir| is_in_each_match(part, is_wanted);
    match hir.kind() {
        HirKind::Literal(literal) => is_wanted(&literal.0),
        HirKind::Capture(capture) => is_in(&capture.sub),
        HirKind::Repetition(repetition) => repetition.min > 0 && is_in(&repetition.sub),
        HirKind::Concat(parts) => parts.iter().any(is_in),
        HirKind::Alternation(parts) => parts.iter().all(is_in),
        HirKind::Empty | HirKind::Class(_) | HirKind::Look(_) => false,
    }
}

/// Whether a text names the scope of a login session, as logind does: with the number of the kernel's audit session, or
/// with `c` and a number of logind's own. Where the text ends before that, it does if the expression is about a scope.
fn is_of_session(text: &[u8], is_scope: bool) -> bool {
    const SESSION: &[u8] = b"/session-";
    let mut names = (0..text.len()).filter_map(|at| text.get(at..)?.strip_prefix(SESSION));
    names.any(|id| match id.strip_prefix(b"c").unwrap_or(id) {
        [] => is_scope,
        [first, ..] => first.is_ascii_digit(),
    })
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}
