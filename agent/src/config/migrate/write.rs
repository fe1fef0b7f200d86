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
    match plain {
        true => text.to_owned(),
        false => format!("'{}'", text.replace('\'', "''")),
    }
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
