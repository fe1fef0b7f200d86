//! Among the modules of a crate, what needs another one goes one way.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a panic is a failed test"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// The modules at the top of a crate, and which others each of them names.
type Modules = BTreeMap<String, BTreeSet<String>>;

#[test]
fn no_module_needs_one_that_needs_it() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    for sources in ["proto/src", "helper/src", "agent/src", "agent/relay/src"] {
        let mut modules = Modules::new();
        for entry in root.join(sources).read_dir().unwrap() {
            let path = entry.unwrap().path();
            let module = path.file_stem().unwrap().to_str().unwrap().to_owned();
            // Programs, and what is only there to try all of the crate.
            if !["lib", "main", "bin", "fuzz", "counts"].contains(&&*module) {
                collect(&path, modules.entry(module).or_default());
            }
        }
        assert!(modules.values().any(|named| named.len() > 1), "{sources}");
        assert_eq!(circle(modules), None, "in {sources}");
    }
}

/// Collects the modules that a file names, or all files of a directory, but for tests.
fn collect(path: &Path, named: &mut BTreeSet<String>) {
    if path.is_dir() {
        for entry in path.read_dir().unwrap() {
            let path = entry.unwrap().path();
            if path.file_stem().is_some_and(|stem| stem != "tests") {
                collect(&path, named);
            }
        }
    } else if path.extension().is_some_and(|extension| extension == "rs") {
        named.extend(names(&std::fs::read_to_string(path).unwrap()));
    }
}

/// What follows `crate::` in code, and in braces after that.
fn names(source: &str) -> BTreeSet<String> {
    let mut code = String::new();
    let mut lines = source.lines().peekable();
    while let Some(line) = lines.next() {
        // Tests are the last thing in a file, and may name anything.
        let is_module = |next: &&str| next.contains("mod ") && next.ends_with('{');
        if line.starts_with("#[cfg(")
            && line.contains("test")
            && lines.peek().is_some_and(is_module)
        {
            break;
        }
        code.push_str(line.split_once("//").map_or(line, |(code, _)| code));
        code.push('\n');
    }
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    let name = |text: &str| -> String { text.chars().take_while(|&c| is_name(c)).collect() };
    let mut found = BTreeSet::new();
    for (at, prefix) in code.match_indices("crate::") {
        if code[..at].ends_with(|c| is_name(c) || c == '$') {
            continue;
        }
        let rest = &code[at + prefix.len()..];
        let Some(list) = rest.strip_prefix('{') else {
            found.insert(name(rest));
            continue;
        };
        let mut depth = 0;
        for item in list.split_inclusive(['{', '}', ',']) {
            if depth == 0 {
                found.insert(name(item.trim_start()));
            }
            match item.chars().last() {
                Some('{') => depth += 1,
                Some('}') => depth -= 1,
                _ => {}
            }
            if depth < 0 {
                break;
            }
        }
    }
    found.remove("");
    found
}

/// Modules each of which names the next one, and the last one the first; none if there are none.
fn circle(mut modules: Modules) -> Option<Vec<String>> {
    for (module, named) in &mut modules {
        named.remove(module);
    }
    loop {
        let known: BTreeSet<String> = modules.keys().cloned().collect();
        modules.retain(|_, named| !named.is_disjoint(&known));
        if modules.len() == known.len() {
            break;
        }
    }
    // Of these, each names another one of these.
    let mut way: Vec<String> = vec![modules.keys().next()?.clone()];
    loop {
        let mut named = modules[way.last()?].iter();
        let next = named.find(|module| modules.contains_key(*module))?;
        if let Some(first) = way.iter().position(|module| module == next) {
            return Some(way.split_off(first));
        }
        way.push(next.clone());
    }
}

#[test]
fn names_are_found_where_there_are_any() {
    let source = "use crate::a::B;\nuse crate::{\n    c, d::{self, e},\n    f::G,\n};\n// crate::h\n\
                  fn i() { crate::j::k($crate::l) }\n#[cfg(test)]\nuse crate::m;\n#[cfg(test)]\n\
                  pub(crate) mod tests {\n    use crate::n;\n}\n";
    assert_eq!(
        Vec::from_iter(names(source)),
        ["a", "c", "d", "f", "j", "m"]
    );
}

#[test]
fn circles_are_found_where_there_are_any() {
    let modules = |named: &[(&str, &[&str])]| {
        let set = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        let named = named
            .iter()
            .map(|(name, names)| ((*name).to_owned(), set(names)));
        named.collect()
    };
    let one_way = modules(&[
        ("a", &["a", "b", "c"]),
        ("b", &["c", "elsewhere"]),
        ("c", &[]),
    ]);
    assert_eq!(circle(one_way), None);
    let round = modules(&[("a", &["b"]), ("b", &["c"]), ("c", &["d", "b"]), ("d", &[])]);
    assert_eq!(circle(round), Some(vec!["b".to_owned(), "c".to_owned()]));
}
