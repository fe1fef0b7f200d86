//! Carries bytes both ways.
//!
//! What is read goes out at once, from one buffer that all connections share. Only what the other side does
//! not take is kept, and nothing more is read until it has taken that: so an idle connection holds no
//! memory, and one whose reader is slow holds no more than [`BUFFER`] each way.

use std::cell::RefCell;
use std::io;

use rustix::net::Shutdown;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::task::coop::consume_budget;

use crate::upstream::Stream;

/// How much is read at a time, in bytes.
const BUFFER: usize = 128 * 1024;

/// How much a direction of a connection within TLS holds, in bytes.
const TLS_BUFFER: usize = 16 * 1024;

thread_local! {
    static SHARED: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER].into_boxed_slice());
}

/// What one look at a connection gave.
enum Step {
    /// All that was there is on its way.
    Passed,
    /// There was nothing.
    Nothing,
    /// There will be nothing more.
    End,
    /// This is left, which the other side has not taken.
    Left(Vec<u8>),
}

/// Carries bytes both ways until both sides have said all they had to say. One that has may still
/// listen.
///
/// # Errors
/// If either side breaks off; then the other is to be told as well.
pub(crate) async fn carry(client: &mut TcpStream, server: &mut Stream) -> io::Result<()> {
    match server {
        Stream::Tcp(server) => {
            tokio::try_join!(one_way(client, server), one_way(server, client))?;
        }
        Stream::Tls(server) => {
            tokio::io::copy_bidirectional_with_sizes(
                client,
                server.as_mut(),
                TLS_BUFFER,
                TLS_BUFFER,
            )
            .await?;
        }
    }
    Ok(())
}

async fn one_way(from: &TcpStream, to: &TcpStream) -> io::Result<()> {
    loop {
        from.readable().await?;
        match step(from, to)? {
            Step::Passed => consume_budget().await,
            Step::Nothing => {}
            Step::End => {
                return match rustix::net::shutdown(to, Shutdown::Write) {
                    // It is gone altogether, which its own direction finds out.
                    Err(rustix::io::Errno::NOTCONN) => Ok(()),
                    result => Ok(result?),
                };
            }
            Step::Left(bytes) => finish(to, &bytes).await?,
        }
    }
}

fn step(from: &TcpStream, to: &TcpStream) -> io::Result<Step> {
    SHARED.with_borrow_mut(|buffer| {
        let read = match from.try_read(buffer) {
            Ok(0) => return Ok(Step::End),
            Ok(read) => buffer.get(..read).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Step::Nothing),
            Err(error) => return Err(error),
        };
        let written = match to.try_write(read) {
            Ok(written) => written,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(error) => return Err(error),
        };
        Ok(match read.get(written..) {
            None | Some([]) => Step::Passed,
            Some(left) => Step::Left(left.to_vec()),
        })
    })
}

async fn finish(to: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        to.ready(Interest::WRITABLE).await?;
        match to.try_write(bytes) {
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
