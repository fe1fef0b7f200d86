//! The known name that somebody meant who wrote another one.

/// The known name that is nearest to `name`, if it is near enough to be what was meant.
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // No known name is nearly as long as this one, and the comparison takes quadratic time.
    if name.len() > 100 {
        return None;
    }
    let plain = name.to_lowercase().replace('_', "-");
    let length = plain.chars().count();
    known
        .into_iter()
        .map(|known| (distance_to_any_number(&plain, &known.to_lowercase()), known))
        .filter(|(distance, known)| *distance <= (known.len() / 3).max(1) && *distance < length)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, known)| known)
}

/// The distance to a known name, or to its singular if it is a plural in `ies`, which is far from that.
fn distance_to_any_number(name: &str, known: &str) -> usize {
    let singular = known.strip_suffix("ies").map(|stem| format!("{stem}y"));
    let to_singular = singular.map_or(usize::MAX, |singular| distance(name, &singular));
    distance(name, known).min(to_singular)
}

/// How many characters have to be put in, taken out, replaced, or swapped with their neighbours to make one text of
/// the other.
fn distance(one: &str, other: &str) -> usize {
    let other: Vec<char> = other.chars().collect();
    // The distances of the beginnings of `one` so far, one row for each, to all beginnings of `other`.
    let mut rows: [Vec<usize>; 2] = [Vec::new(), (0..=other.len()).collect()];
    let mut before = None;
    for (number, character) in one.chars().enumerate() {
        let [last_but_one, last] = &rows;
        let mut row = vec![number + 1];
        let mut left = number + 1;
        let mut before_there = None;
        for (at, there) in other.iter().copied().enumerate() {
            let cost = |row: &[usize], at: usize, more: usize| {
                row.get(at).map_or(usize::MAX, |distance| distance + more)
            };
            let replaced = cost(last, at, usize::from(there != character));
            let swapped = match at.checked_sub(1) {
                Some(at) if before == Some(there) && before_there == Some(character) => {
                    cost(last_but_one, at, 1)
                }
                _ => usize::MAX,
            };
            left = replaced
                .min(swapped)
                .min(cost(last, at + 1, 1))
                .min(left + 1);
            row.push(left);
            before_there = Some(there);
        }
        before = Some(character);
        let [_, last] = rows;
        rows = [last, row];
    }
    let [_, last] = rows;
    last.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_what_has_to_be_changed() {
        for (one, other, expected) in [
            ("", "", 0),
            ("", "abc", 3),
            ("abc", "", 3),
            ("bypass", "bypass", 0),
            ("bypas", "bypass", 1),
            ("bypasss", "bypass", 1),
            ("bybass", "bypass", 1),
            ("yb", "by", 1),
            ("bpyass", "bypass", 1),
            ("kitten", "sitting", 3),
            ("ä", "a", 1),
        ] {
            assert_eq!(distance(one, other), expected, "{one} {other}");
            assert_eq!(distance(other, one), expected, "{other} {one}");
        }
    }

    #[test]
    fn what_is_far_away_was_not_meant() {
        let keys = ["proxies", "tproxies", "no-udp", "m", "rules"];
        for (name, expected) in [
            ("proxy", Some("proxies")),
            ("tproxy", Some("tproxies")),
            ("no_udp", Some("no-udp")),
            ("No-UPD", Some("no-udp")),
            ("rule", Some("rules")),
            ("x", None),
            ("", None),
            ("routing", None),
            (&"m".repeat(101), None),
        ] {
            assert_eq!(nearest(name, keys), expected, "{name}");
        }
    }
}
