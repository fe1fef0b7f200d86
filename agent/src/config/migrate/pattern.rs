//! Which regular expressions of the original's examples mean an application, a unit or a slice.

use std::sync::LazyLock;

use regex_automata::Input;
use regex_automata::nfa::thompson::pikevm::PikeVM;

use super::write::{names, slice};

/// From the control group root to what is in `app.slice`, each part of which may be left out. A user in it is
/// any user: a rule for one of them is not widened.
const PREFIX: &str =
    r"\^?(?:\.\*)?(?:(?:/user\\?\.slice)?/user-ANY\\?\.slice/user@ANY\\?\.service)?(?:/\.\*)?/?";
const ANY_USER: &str = r"(?:\\d\+|\[0-9\]\+|\.\+|\.\*|\[\^/\]\+)";

/// `app-ID-RANDOM.scope` and `app-ID@RANDOM.service`, with any of the launchers or none.
const APP: &str = concat!(
    r"(?:app\\?\.slice/)?app",
    r"(?:\(-\([A-Za-z|]+\)\)\?|\(-[A-Za-z]+\)\?|\(-(?:\[\^-\]|\\w|\.)[+*]\)\?|-gnome|-KDE|-DDE|-flatpak)?",
    r"-(?P<id>.+?)",
    r"(?:\(-?\.\+\\\.scope\|\(@\.\+\)\?\\\.service\)|-(?:\.\+|\.\*|\\d\+|\[0-9\]\+)\\\.scope|\(@\.\+\)\?\\\.service|@\.\+\\\.service)\$?",
);

/// `NAME.service`, in whatever slices.
const UNIT: &str = r"(?:[a-z-]+\\?\.slice/)*(?P<unit>[^/()|]+\\\.service)\$?";

/// What is in `NAME.slice`, that itself or not. With `$` after the name it would be that alone.
const SLICE: &str = r"(?:[a-z-]+\\?\.slice/)*(?P<slice>[^/()|]+\\\.slice)(?:/|(?:/\.\*|/\.\+)\$?)?";

static FORM: LazyLock<Option<PikeVM>> = LazyLock::new(|| {
    let prefix = PREFIX.replace("ANY", ANY_USER);
    PikeVM::new(&format!("^{prefix}(?:{APP}|{UNIT}|{SLICE})$")).ok()
});

/// The selector that says in a line what an expression spells out: `app: ID`. None if it is not surely one.
pub(super) fn selector(expression: &str) -> Option<String> {
    // Whether a group is captured is all the same here, and so is whether a slash is escaped.
    let plain = expression.replace("(?:", "(").replace(r"\/", "/");
    // A user may have units of the same names as the system's services.
    if plain.replace('\\', "").contains("system.slice/") {
        return None;
    }
    let form = FORM.as_ref()?;
    let mut found = form.create_captures();
    form.captures(&mut form.create_cache(), Input::new(&plain), &mut found);
    let group = |name| plain.get(found.get_group_by_name(name)?.range());
    // Without a slash before it, it may be the end of a longer name.
    let whole = |name| {
        let start = found.get_group_by_name(name)?.start;
        plain.get(..start)?.ends_with('/').then(|| group(name))?
    };
    if let Some(ids) = group("id") {
        let alternatives = ids.strip_prefix('(').and_then(|s| s.strip_suffix(')'));
        let ids: Option<Vec<_>> = alternatives
            .unwrap_or(ids)
            .split('|')
            .map(literal)
            .collect();
        return Some(format!("app: {}", names(&ids?)));
    }
    if let Some(unit) = whole("unit") {
        let unit = literal(unit)?;
        // That of a service manager is above all that it starts.
        return (!unit.starts_with("user@")).then(|| format!("unit: {}", names(&[unit])));
    }
    let name = literal(whole("slice")?)?;
    (name != "user.slice" && !name.starts_with("user-"))
        .then(|| format!("slice: {}", names(&[slice(&name)])))
}

/// The text that an expression means if it means only that one. A bare dot stands for itself: that is how people
/// write names.
fn literal(expression: &str) -> Option<String> {
    let mut text = String::new();
    let mut rest = expression.chars();
    while let Some(c) = rest.next() {
        match c {
            '\\' => match rest.next()? {
                // `\\x2d`: the backslash itself.
                '\\' => text.push('\\'),
                c if c.is_ascii_punctuation() => text.push(c),
                _ => return None,
            },
            '.' | '-' | '_' | ':' | '@' => text.push(c),
            c if c.is_ascii_alphanumeric() => text.push(c),
            _ => return None,
        }
    }
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const APPS: &str = r"\/user\.slice\/user-\d+\.slice\/user@\d+\.service\/app\.slice\/app(?:-(?:gnome|DDE|flatpak))?-";
    const END: &str = r"(?:-.+\.scope|(?:@.+)?\.service)";

    #[test]
    fn knows_what_the_originals_examples_spell_out() {
        let spelled = |id: &str| format!("{APPS}{id}{END}");
        for (expression, meant) in [
            (spelled(r"(?:parsecd|com\.parsecgaming\.parsec)"), Some("app: [parsecd, com.parsecgaming.parsec]")),
            (spelled(r"org\.telegram\.desktop") + "$", Some("app: org.telegram.desktop")),
            (spelled(r"google\\x2dchrome"), Some(r"app: 'google\x2dchrome'")),
            (spelled(r"(firefox|on)"), Some("app: [firefox, 'on']")),
            (spelled(r"steam.*"), None),
            (spelled(r"a?b"), None),
            (APPS.replace(r"\d+", "1000") + "x" + END, None),
            (r"/app-org\.mozilla\.firefox-\d+\.scope".into(), Some("app: org.mozilla.firefox")),
            (r"^/user\.slice/.*/app\.slice/app-steam-.+\.scope$".into(), None),
            (r"app\.slice/app(-gnome)?-code(.+\.scope|(@.+)?\.service)$".into(), Some("app: code")),
            (r"\/system\.slice\/clash-meta\.service".into(), None),
            (r"^/system.slice/system-x\.slice/.*".into(), None),
            (r"/app\.slice/clash-meta\.service".into(), Some("unit: clash-meta.service")),
            (r"\/system\.slice\/(?:one\.metacubex\.)?clash-meta\.service".into(), None),
            (r"\/user\.slice\/user-\d+\.slice/user@\d+\.service\/cgtproxy\.slice\/cgtproxy-direct\.slice\/.*".into(), Some("slice: cgtproxy-direct")),
            ("/background\\.slice/".into(), Some("slice: background")),
            (r"/background\.slice/.*$".into(), Some("slice: background")),
            (r"/background\.slice$".into(), None),
            (r"background\.slice".into(), None),
            (r"fox\.service".into(), None),
            (r"@autostart\.service".into(), None),
            ("/user\\.slice".into(), None),
            (r"\/user\.slice\/user-1000\.slice".into(), None),
            (r"\/.*".into(), None),
            ("".into(), None),
            ("firefox".into(), None),
        ] {
            assert_eq!(selector(&expression).as_deref(), meant, "{expression}");
        }
    }
}
