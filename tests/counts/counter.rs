// Counts the instructions of a hot path, and holds them to tests/counts/bounds.

use std::io::Write;
use std::process::Command;

/// Set in the process that callgrind watches.
const WATCHED: &str = "CGTPROXY_COUNTS_WATCHED";

/// How much more than the bound is no finding, in percent: another compiler, another C library, hash maps with
/// other seeds.
const MARGIN: u64 = 15;

const BOUNDS: &str = include_str!("bounds");

/// What is counted. By its name callgrind knows where to begin and where to end.
#[inline(never)]
pub(crate) fn counted(path: &mut dyn FnMut()) {
    path();
}

/// Runs the test `name` of `module`, which is what calls this, once more under callgrind. There `path` is run: it
/// prepares what it needs, and hands what is to be counted to [`counted`].
pub(crate) fn within_bound(module: &str, name: &str, path: impl FnOnce()) {
    if std::env::var_os(WATCHED).is_some() {
        return path();
    }
    let (package, module) = module.split_once("::").unwrap();
    let test = format!("{module}::{name}");
    let count = count(&test);
    let name = format!("{package}::{test}");
    let bound = BOUNDS
        .lines()
        .filter_map(|line| line.split_once(' '))
        .find_map(|(of, bound)| (of == name).then(|| bound.parse::<u64>().unwrap()))
        .unwrap_or_else(|| panic!("tests/counts/bounds lacks a line: '{name} {count}'"));
    let percent = |count: u64| count.abs_diff(bound) * 100 / bound;
    assert!(
        count <= bound || percent(count) <= MARGIN,
        "{name} takes {count} instructions, {}% more than the {bound} of tests/counts/bounds; if that is meant, \
         the line there becomes '{name} {count}'",
        percent(count),
    );
    if count < bound && percent(count) > MARGIN {
        // Not by eprintln!, which tests that pass are not heard with.
        let _ = writeln!(
            std::io::stderr(),
            "{name} takes {count} instructions, {}% less than the {bound} of tests/counts/bounds: the line there \
             may become '{name} {count}'",
            percent(count),
        );
    }
}

fn count(test: &str) -> u64 {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg("--toggle-collect=*::counter::counted*")
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--test-threads=1"])
        .env(WATCHED, "1")
        .output()
        .unwrap_or_else(|error| {
            panic!("valgrind does not start, '.ci/dependencies test' installs it: {error}")
        });
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{test} fails under callgrind: {}\n{}{said}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
    );
    let count = said
        .lines()
        .find_map(|line| line.split_once("Collected : ")?.1.trim().parse().ok())
        .unwrap_or(0);
    assert_ne!(count, 0, "callgrind has not seen {test}:\n{said}");
    count
}
