//! YAML as people write it.

/// Words that YAML takes for something else than text.
const WORDS: [&str; 9] = ["y", "n", "yes", "no", "on", "off", "true", "false", "null"];

/// A text as a scalar, in quotes if it needs them.
pub(super) fn scalar(text: &str) -> String {
    let plain = text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'@'))
        && !WORDS.contains(&text.to_ascii_lowercase().as_str());
    if plain {
        text.to_owned()
    } else if text.contains(is_escaped) {
        escaped(text)
    } else {
        format!("'{}'", text.replace('\'', "''"))
    }
}

/// Whether YAML has this character by an escape alone. A line break would become a space within quotes.
fn is_escaped(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            '\u{2028}' | '\u{2029}' | '\u{feff}' | '\u{fffe}' | '\u{ffff}'
        )
}

/// A text in double quotes, in which there are escapes.
fn escaped(text: &str) -> String {
    let mut quoted = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if is_escaped(c) => quoted += &format!("\\u{:04x}", u32::from(c)),
            c => quoted.push(c),
        }
    }
    quoted + "\""
}

/// A slice's name, without its suffix unless what is left could be another unit's.
pub(super) fn slice(name: &str) -> String {
    match name.strip_suffix(".slice") {
        Some(short) if !short.contains('.') => short.to_owned(),
        _ => name.to_owned(),
    }
}

/// A name, or several as a list on one line.
pub(super) fn names(names: &[String]) -> String {
    match names {
        [name] => scalar(name),
        names => {
            let names: Vec<_> = names.iter().map(|name| scalar(name)).collect();
            format!("[{}]", names.join(", "))
        }
    }
}
