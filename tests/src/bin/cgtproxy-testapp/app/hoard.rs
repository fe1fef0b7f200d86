//! More than anybody wants to keep.

use std::fs;
use std::io::{ErrorKind, Result, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::thread;
use std::time::Duration;

/// Between two rounds of writing.
const PAUSE: Duration = Duration::from_millis(5);

/// Sends datagrams, each when all that wait on this machine have been received.
pub(super) fn send_datagrams(
    to: SocketAddr,
    sockets: u32,
    count: u32,
    bytes: usize,
) -> Result<Vec<OwnedFd>> {
    let datagram = vec![b'x'; bytes];
    let mut kept = Vec::new();
    for _ in 0..sockets {
        let any = match to {
            SocketAddr::V4(_) => "0.0.0.0:0",
            SocketAddr::V6(_) => "[::]:0",
        };
        let socket = UdpSocket::bind(any)?;
        socket.connect(to)?;
        kept.push(socket);
    }
    for _ in 0..count {
        for socket in &kept {
            socket.send(&datagram)?;
            while waits()? {
                thread::yield_now();
            }
        }
    }
    Ok(kept.into_iter().map(OwnedFd::from).collect())
}

/// Whether any UDP socket has something to read.
fn waits() -> Result<bool> {
    for table in ["/proc/self/net/udp", "/proc/self/net/udp6"] {
        for line in fs::read_to_string(table)?.lines().skip(1) {
            // Bytes to be sent and received, in hexadecimal.
            let queues = line.split_whitespace().nth(4).expect("tx_queue:rx_queue");
            let (_, received) = queues.split_once(':').expect("tx_queue:rx_queue");
            if received.bytes().any(|digit| digit != b'0') {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// Makes connections, and writes to them until no more than a hundredth of what was taken at first is taken in a round.
pub(super) fn hoard(to: SocketAddr, connections: u32) -> Result<Vec<OwnedFd>> {
    let mut kept = Vec::new();
    for _ in 0..connections {
        let stream = TcpStream::connect(to)?;
        stream.set_nonblocking(true)?;
        kept.push(stream);
    }
    let bytes = vec![b'x'; 1 << 16];
    let mut most = 0;
    loop {
        let mut written = 0;
        for stream in &mut kept {
            written += match stream.write(&bytes) {
                Ok(written) => written,
                Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
                Err(error) => return Err(error),
            };
        }
        if written < most / 100 {
            return Ok(kept.into_iter().map(OwnedFd::from).collect());
        }
        most = written.max(most);
        thread::sleep(PAUSE);
    }
}
