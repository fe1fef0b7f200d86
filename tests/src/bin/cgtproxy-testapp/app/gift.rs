//! Descriptors for somebody who has not asked for any.

use std::io::{Error, ErrorKind, IoSlice, Result, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use socket2::SockRef;

/// How long whoever closes one of them last is to wait.
const LINGER: Duration = Duration::from_secs(1_000_000);

/// Sends a TCP socket with each connection, of which the receiver then has the only descriptor. Returns how many the
/// kernel has let through.
pub(super) fn give_away(path: &Path, count: u32) -> Result<u64> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut given = 0;
    for _ in 0..count {
        let lingering = TcpStream::connect(listener.local_addr()?)?;
        fill(&lingering)?;
        SockRef::from(&lingering).set_linger(Some(LINGER))?;
        let connection = UnixStream::connect(path)?;
        let descriptors = [lingering.as_raw_fd()];
        let sent = sendmsg::<()>(
            connection.as_raw_fd(),
            &[IoSlice::new(b"x")],
            &[ControlMessage::ScmRights(&descriptors)],
            MsgFlags::MSG_NOSIGNAL,
            None,
        );
        match sent {
            Ok(_) => given += 1,
            // It has refused the connection, or the kernel the descriptor.
            Err(Errno::EPIPE | Errno::EPERM) => SockRef::from(&lingering).set_linger(None)?,
            Err(error) => return Err(error.into()),
        }
    }
    // Who connected there never hears that it is gone.
    std::mem::forget(listener);
    Ok(given)
}

/// Writes until the peer, which reads nothing, takes no more.
fn fill(mut stream: &TcpStream) -> Result<()> {
    stream.set_nonblocking(true)?;
    let error = loop {
        if let Err(error) = stream.write(&[0; 65536]) {
            break error;
        }
    };
    stream.set_nonblocking(false)?;
    match error.kind() {
        ErrorKind::WouldBlock => Ok(()),
        _ => Err(Error::other(error)),
    }
}
