//! The bench itself: everything that it measures can be measured. How quick things are is not looked at, since tests run
//! on machines that do something else besides.

use std::process::Command;

#[test]
fn every_row_is_measured_and_written() {
    let directory = std::env::temp_dir().join(format!("cgtproxy-bench-{}", std::process::id()));
    let output = Command::new(env!("CARGO_BIN_EXE_cgtproxy-bench"))
        .args(["--quick", "--out"])
        .arg(&directory)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let table = String::from_utf8_lossy(&output.stdout);
    for row in [
        "latency",
        "first-send",
        "burst",
        "start",
        "packets",
        "relay",
        "socks",
        "idle",
        "users",
        "flood",
        "restore",
    ] {
        assert!(
            table.contains(&format!("\n{row}: ")),
            "{row} is not in:\n{table}"
        );
    }
    // What does not depend on how quick the machine is.
    for target in [
        "first-send: leaks, cgtproxy, start: closed, alone",
        "first-send: leaks, cgtproxy, start: closed, among",
        "first-send: leaks in a slice that has the verdict",
        "burst: flat, never in force",
        "burst: flat, left for ever",
        "burst: nested, never in force",
        "burst: nested, left for ever",
        "idle: helper, threads",
        "idle: agent, threads",
    ] {
        let reached = |line: &str| line.starts_with(target) && line.ends_with(" reached");
        assert!(
            table.lines().any(reached),
            "{target} is not reached:\n{table}"
        );
    }
    let json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(directory.join("bench.json")).unwrap()).unwrap();
    assert!(json["series"].as_array().unwrap().len() > 50);
    for plot in ["latency", "packets", "start", "burst", "relay", "flood"] {
        let svg = std::fs::read_to_string(directory.join(format!("{plot}.svg"))).unwrap();
        assert!(
            svg.trim_end().ends_with("</svg>"),
            "{plot}.svg is cut short"
        );
    }
    std::fs::remove_dir_all(&directory).unwrap();
}
