//! Packets from an address that may not be the machine's.

use std::io::{Error, Result};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use cgtproxy_tests::wire::Transport;
use nix::errno::Errno;
use socket2::{Domain, Protocol, Socket, Type};

/// Sends a datagram, or the beginning of a connection. Nobody needs a privilege to bind such a socket.
pub(super) fn claim(
    transport: Transport,
    from: SocketAddr,
    to: SocketAddr,
    device: Option<&str>,
) -> Result<OwnedFd> {
    let (kind, protocol) = match transport {
        Transport::Tcp => (Type::STREAM, Protocol::TCP),
        Transport::Udp => (Type::DGRAM, Protocol::UDP),
    };
    let socket = Socket::new(Domain::for_address(to), kind, Some(protocol))?;
    match to {
        SocketAddr::V4(_) => socket.set_freebind_v4(true)?,
        SocketAddr::V6(_) => socket.set_freebind_v6(true)?,
    }
    socket.bind_device(device.map(str::as_bytes))?;
    socket.set_reuse_address(true)?;
    // Closed, it leaves the port to others at once.
    socket.set_linger(Some(Duration::ZERO))?;
    socket.set_nonblocking(true)?;
    socket.bind(&from.into())?;
    let sent = match transport {
        Transport::Tcp => socket.connect(&to.into()),
        Transport::Udp => socket.send_to(b"{}", &to.into()).map(drop),
    };
    match sent {
        Err(error) if !is(&error, Errno::EINPROGRESS) => Err(error),
        _ => Ok(socket.into()),
    }
}

fn is(error: &Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno as i32)
}
