//! ICMP and ICMPv6 echo, by the sockets that need no privilege.

use std::io::{Read, Result};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use socket2::{Domain, Protocol, Socket, Type};

use super::flow::wait;

const HEADER: usize = 8;

/// An echo socket with one peer.
pub(crate) struct Ping {
    socket: Socket,
    request: u8,
    reply: u8,
}

impl Ping {
    pub(crate) fn open(to: SocketAddr) -> Result<Self> {
        let (protocol, request, reply) = match to {
            SocketAddr::V4(_) => (Protocol::ICMPV4, 8, 0),
            SocketAddr::V6(_) => (Protocol::ICMPV6, 128, 129),
        };
        let socket = Socket::new(Domain::for_address(to), Type::DGRAM, Some(protocol))?;
        socket.set_nonblocking(true)?;
        socket.connect(&to.into())?;
        Ok(Self {
            socket,
            request,
            reply,
        })
    }

    /// Sends an echo request; the kernel fills in identifier and checksum.
    pub(crate) fn send(&self, token: &str) -> Result<()> {
        static SEQUENCE: AtomicU16 = AtomicU16::new(0);
        let sequence = SEQUENCE.fetch_add(1, Ordering::Relaxed).to_be_bytes();
        let mut packet = vec![self.request, 0, 0, 0, 0, 0, sequence[0], sequence[1]];
        packet.extend_from_slice(token.as_bytes());
        self.socket.send(&packet).map(drop)
    }

    /// Waits for a reply and returns what was sent along with the request.
    pub(crate) fn receive(&self, patience: Duration) -> Result<Option<Vec<u8>>> {
        let deadline = Instant::now() + patience;
        while wait(self.socket.as_fd(), PollFlags::POLLIN, deadline)? {
            let mut packet = [0; 2048];
            let count = (&self.socket).read(&mut packet)?;
            if count >= HEADER && packet[0] == self.reply {
                return Ok(Some(packet[HEADER..count].to_vec()));
            }
        }
        Ok(None)
    }
}
