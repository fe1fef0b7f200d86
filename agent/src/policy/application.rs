//! Which application a unit belongs to, by the name that its launcher gave it.
//!
//! Launchers write what <https://systemd.io/DESKTOP_ENVIRONMENTS/> asks for, more or less:
//!
//! ```text
//! app[-LAUNCHER]-ID-RANDOM.scope           GNOME, KDE, flatpak, uwsm, niri, COSMIC, browsers themselves
//! app[-LAUNCHER]-ID[@RANDOM].service       KDE, dde, app2unit, systemd for autostart
//! app[-LAUNCHER]-ID[-RANDOM].slice         terminals
//! app-dbus\x2dBUS\x2dID.slice, dbus-BUS-ID@N.service       dbus-broker, for what D-Bus starts
//! snap.SNAP.APP-UUID.scope, snap.SNAP.APP.service          snapd
//! ```
//!
//! A dash in an id is to be written `\x2d`; not all of them do so. `app-google-chrome-1.scope` may then be
//! `chrome` by a launcher `google`, which is what the convention says, or `google-chrome` by nobody in
//! particular. Both are meant.

/// Launchers that name themselves. Only for what would be ambiguous: any word may stand there.
const LAUNCHERS: [&str; 9] = [
    "gnome", "KDE", "DDE", "dde", "flatpak", "glib", "cosmic", "niri", "Hyprland",
];

/// Slices in `app.slice` that are of no application: those of uwsm.
const GROUPS: [&str; 1] = ["graphical"];

/// The ids by which the application of a unit can be meant, the likeliest first. None if the unit's name
/// tells of none.
pub(crate) fn application_ids(unit: &[u8]) -> Vec<String> {
    let Ok(unit) = std::str::from_utf8(unit) else {
        return Vec::new();
    };
    let Some((name, kind)) = unit.rsplit_once('.') else {
        return Vec::new();
    };
    if !matches!(kind, "scope" | "service" | "slice") {
        return Vec::new();
    }
    let mut ids = if let Some(name) = name.strip_prefix("app-") {
        by_convention(name, kind)
    } else if let Some(name) = name.strip_prefix("dbus-") {
        let id = name.split_once('-').filter(|_| kind == "service");
        id.map(|(_, id)| before_instance(id)).into_iter().collect()
    } else if let Some(name) = name.strip_prefix("snap.") {
        return of_snap(name, kind);
    } else {
        return Vec::new();
    };
    ids.retain(|id| !id.is_empty());
    let mut ids: Vec<String> = ids.into_iter().map(unescape).collect();
    ids.dedup();
    ids
}

/// What stands between `app-` and the unit's suffix, in all its readings, escaped.
fn by_convention<'n>(name: &'n str, kind: &str) -> Vec<&'n str> {
    if kind == "slice"
        && let Some(activated) = name.strip_prefix(r"dbus\x2d")
    {
        let id = activated.split_once(r"\x2d").map(|(_, id)| id);
        return id.into_iter().collect();
    }
    let plain = before_instance(name);
    let has_instance = plain.len() < name.len();
    let name = match kind {
        "scope" if !has_instance => before_random(plain),
        "slice" if plain.ends_with(|c: char| c.is_ascii_digit()) => before_random(plain),
        _ => plain,
    };
    let Some((launcher, id)) = name.split_once('-') else {
        let known = LAUNCHERS.contains(&name) || GROUPS.contains(&name);
        return match known && kind == "slice" {
            true => Vec::new(),
            false => vec![name],
        };
    };
    match launcher.bytes().all(|b| b.is_ascii_alphanumeric()) {
        true => vec![id, name],
        false => vec![name],
    }
}

/// The snap's name if the application has it too, else `SNAP.APP`; then as in the names of desktop files,
/// `SNAP_APP`, and the snap itself.
fn of_snap(name: &str, kind: &str) -> Vec<String> {
    let name = match (kind, uuid_start(name)) {
        ("scope", Some(start)) => name.get(..start).unwrap_or(name),
        ("slice", _) => return Vec::new(),
        _ => name,
    };
    let parts: Vec<&str> = name.split('.').collect();
    let (snap, app) = match parts.as_slice() {
        [snap, app] | [snap, "hook", app] => (unescape(snap), unescape(app)),
        _ => return Vec::new(),
    };
    let (dotted, underscored) = (format!("{snap}.{app}"), format!("{snap}_{app}"));
    match snap == app {
        true => vec![snap, dotted, underscored],
        false => vec![dotted, underscored, snap],
    }
}

fn before_instance(name: &str) -> &str {
    name.split_once('@').map_or(name, |(before, _)| before)
}

/// Without the part that makes the name unique, unless nothing but a launcher is left then.
fn before_random(name: &str) -> &str {
    let head = match uuid_start(name) {
        Some(start) => name.get(..start),
        None => name.rsplit_once('-').map(|(head, _)| head),
    };
    head.filter(|head| !LAUNCHERS.contains(head))
        .unwrap_or(name)
}

/// Where a UUID with dashes at the end of a name begins, and the character before it.
fn uuid_start(name: &str) -> Option<usize> {
    const UUID: usize = 36;
    let start = name.len().checked_sub(UUID + 1)?;
    let tail = name.get(start..)?;
    let is_uuid = tail.bytes().enumerate().all(|(at, byte)| match at {
        0 => matches!(byte, b'-' | b'.'),
        9 | 14 | 19 | 24 => byte == b'-',
        _ => byte.is_ascii_hexdigit(),
    });
    is_uuid.then_some(start)
}

/// A name without systemd's escape sequences, `\xHH`. What is none stays.
pub(crate) fn unescape(name: &str) -> String {
    let mut bytes = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((before, escape)) = rest.split_once(r"\x") {
        bytes.extend_from_slice(before.as_bytes());
        let digits = escape.get(..2);
        let byte = digits
            .filter(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()))
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match (byte, escape.get(2..)) {
            (Some(byte), Some(after)) => {
                bytes.push(byte);
                rest = after;
            }
            _ => {
                bytes.extend_from_slice(br"\x");
                rest = escape;
            }
        }
    }
    bytes.extend_from_slice(rest.as_bytes());
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests;
