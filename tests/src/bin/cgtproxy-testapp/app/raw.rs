//! Packets of protocols that the kernel does not speak for us.

use std::io::Result;
use std::net::{IpAddr, SocketAddr};

use socket2::{Domain, Protocol, Socket, Type};

/// Sends one packet with a few zero bytes in it.
pub(super) fn send(protocol: u8, to: IpAddr) -> Result<()> {
    let to = SocketAddr::new(to, 0);
    let protocol = Protocol::from(i32::from(protocol));
    let socket = Socket::new(Domain::for_address(to), Type::RAW, Some(protocol))?;
    socket.send_to(&[0; 32], &to.into()).map(drop)
}
