//! More connections to a service than it could want.

use std::io::{BufRead, BufReader, ErrorKind, Result, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cgtproxy_tests::wire::Crowd;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::Value;

/// How many threads flood.
const THREADS: usize = 4;

fn call(method: &str) -> Vec<u8> {
    format!("{{\"method\":\"{method}\"}}\0").into_bytes()
}

/// Opens the connections, then reads what is said on each. They stay open.
pub(super) fn crowd(path: &Path, method: &str, count: u32) -> Result<(Crowd, Vec<UnixStream>)> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    let mut connections = Vec::new();
    for _ in 0..count {
        let mut connection = UnixStream::connect(path)?;
        // One that is refused may have been closed.
        match connection.write_all(&call(method)) {
            Err(error) if error.kind() != ErrorKind::BrokenPipe => return Err(error),
            _ => connections.push(connection),
        }
    }
    let mut crowd = Crowd::default();
    for connection in &connections {
        let mut reply = Vec::new();
        BufReader::new(connection).read_until(0, &mut reply)?;
        if reply.pop().is_none() {
            crowd.closed += 1;
            continue;
        }
        let reply: Value = serde_json::from_slice(&reply)?;
        match reply["error"].as_str() {
            None => crowd.answered += 1,
            Some(error) => *crowd.refused.entry(error.to_owned()).or_default() += 1,
        }
    }
    Ok((crowd, connections))
}

/// Goes on until the process ends. Returns the number of connections, which grows.
pub(super) fn flood(path: PathBuf, method: &str, calls: usize) -> Arc<AtomicU64> {
    let connections = Arc::new(AtomicU64::new(0));
    let calls = Arc::new(call(method).repeat(calls));
    for _ in 0..THREADS {
        let (path, calls, connections) =
            (path.clone(), Arc::clone(&calls), Arc::clone(&connections));
        std::thread::spawn(move || {
            loop {
                // Whether the service takes them is its own business.
                let connection = UnixStream::connect(&path);
                if connection.is_ok_and(|mut stream| stream.write_all(&calls).is_ok()) {
                    connections.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
    }
    connections
}
