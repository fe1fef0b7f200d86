//! One JSON value a line, on stdin and stdout.

use std::io::{Write, stdout};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Tells the harness.
pub(crate) fn say(value: &impl Serialize) {
    let mut line = serde_json::to_vec(value).unwrap();
    line.push(b'\n');
    let mut out = stdout().lock();
    // When nobody listens any more, there is nothing left to do.
    if out.write_all(&line).and_then(|()| out.flush()).is_err() {
        std::process::exit(0);
    }
}

/// Takes whole lines off the front of a buffer.
pub(crate) fn take_lines(buffer: &mut Vec<u8>) -> Vec<Vec<u8>> {
    let mut lines = Vec::new();
    while let Some(end) = buffer.iter().position(|&b| b == b'\n') {
        let mut line: Vec<u8> = buffer.drain(..=end).collect();
        line.pop();
        lines.push(line);
    }
    lines
}

/// Reads one order of the harness.
pub(crate) fn parse<T: DeserializeOwned>(line: &[u8]) -> T {
    serde_json::from_slice(line)
        .unwrap_or_else(|e| panic!("not an order: {} ({e})", String::from_utf8_lossy(line)))
}
