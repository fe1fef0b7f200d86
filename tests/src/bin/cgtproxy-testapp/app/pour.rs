//! Datagrams without a pause, whatever becomes of them.

use std::io::Result;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use socket2::{Domain, Protocol, Socket, Type};

/// Goes on until the process ends.
pub(super) fn start(to: SocketAddr, tried: &Arc<AtomicU64>) -> Result<()> {
    let socket = Socket::new(Domain::for_address(to), Type::DGRAM, Some(Protocol::UDP))?;
    socket.connect(&to.into())?;
    let tried = Arc::clone(tried);
    std::thread::spawn(move || {
        loop {
            // A drop is an error.
            let _ = socket.send(b"poured");
            tried.fetch_add(1, Ordering::Relaxed);
        }
    });
    Ok(())
}
