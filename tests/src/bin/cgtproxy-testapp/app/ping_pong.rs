//! One UDP socket that talks to many, as those of QUIC and of games do.

use std::io::{ErrorKind, Result};
use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use cgtproxy_tests::wire::Answer;

/// How long to wait for an answer before asking once more: datagrams may be lost.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often to ask.
const ATTEMPTS: u32 = 10;

/// Asks each so often.
pub(super) fn run(to: &[SocketAddr], rounds: u32) -> Result<()> {
    let any = match to.first() {
        Some(SocketAddr::V6(_)) => "[::]:0",
        _ => "0.0.0.0:0",
    };
    let socket = UdpSocket::bind(any)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let mut seen_as = None;
    for round in 0..rounds {
        // All at once, as far as nothing is lost.
        for to in to {
            socket.send_to(format!("{round} {to}").as_bytes(), to)?;
        }
        let mut missing: Vec<SocketAddr> = to.to_vec();
        let mut attempts = 0;
        while !missing.is_empty() {
            let mut buffer = [0; 2048];
            let (length, from) = match socket.recv_from(&mut buffer) {
                Ok(received) => received,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    attempts += 1;
                    assert!(attempts < ATTEMPTS, "no answer from {missing:?}");
                    for to in &missing {
                        socket.send_to(format!("{round} {to}").as_bytes(), to)?;
                    }
                    continue;
                }
                Err(error) => return Err(error),
            };
            let answer: Answer = serde_json::from_slice(&buffer[..length])?;
            assert_eq!(answer.destination, from, "an answer from somebody else");
            assert!(answer.token.ends_with(&format!(" {from}")), "{answer:?}");
            let same = *seen_as.get_or_insert(answer.source);
            assert_eq!(answer.source, same, "one socket, two addresses");
            missing.retain(|to| *to != from);
        }
    }
    Ok(())
}
