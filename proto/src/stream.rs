//! A connection whose process is woken by what there is to read, and by nothing else.
//!
//! The runtime's own `UnixStream` waits for room to write as well, all the time. So whenever the other side takes a
//! message out of the socket, the kernel wakes who has sent it (`unix_write_space`, net/unix/af_unix.c), which has
//! nothing to do, and may do it on the very processor that the other side needs to deal with the message.

use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown, send, shutdown};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::net::unix::pipe::{Receiver, Sender};

/// A connected stream socket.
#[derive(Debug)]
pub struct Stream(Waiting);

/// What the runtime waits for.
#[derive(Debug)]
enum Waiting {
    /// Something to read, as from the reading end of a pipe.
    Read(Receiver),
    /// Room to write, as at the writing end of one: while the socket is full.
    Write(Sender),
    /// Nothing: it could not be told to wait for something else.
    Nothing,
}

impl Stream {
    /// Takes over a connection.
    ///
    /// # Errors
    /// If the runtime can't wait for it.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        let socket = OwnedFd::from(stream.into_std()?);
        let socket = Receiver::from_owned_fd_unchecked(socket)?;
        Ok(Self(Waiting::Read(socket)))
    }

    /// The socket, for reading.
    fn reader(&mut self) -> io::Result<&mut Receiver> {
        if let Waiting::Write(_) = self.0 {
            self.0 = Waiting::Read(Receiver::from_owned_fd_unchecked(self.take()?)?);
        }
        match &mut self.0 {
            Waiting::Read(socket) => Ok(socket),
            Waiting::Write(_) | Waiting::Nothing => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// The socket, for writing when there is room.
    fn writer(&mut self) -> io::Result<&mut Sender> {
        if let Waiting::Read(_) = self.0 {
            self.0 = Waiting::Write(Sender::from_owned_fd_unchecked(self.take()?)?);
        }
        match &mut self.0 {
            Waiting::Write(socket) => Ok(socket),
            Waiting::Read(_) | Waiting::Nothing => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// The socket itself, which nobody waits for any more.
    fn take(&mut self) -> io::Result<OwnedFd> {
        match std::mem::replace(&mut self.0, Waiting::Nothing) {
            Waiting::Read(socket) => socket.into_nonblocking_fd(),
            Waiting::Write(socket) => socket.into_nonblocking_fd(),
            Waiting::Nothing => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(self.reader()?).poll_read(context, buffer)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if let Waiting::Read(socket) = &self.0 {
            match send(socket, bytes, SendFlags::NOSIGNAL) {
                Err(Errno::AGAIN) => {}
                sent => return Poll::Ready(sent.map_err(Into::into)),
            }
        }
        let written = ready!(Pin::new(self.writer()?).poll_write(context, bytes));
        self.reader()?;
        Poll::Ready(written)
    }

    fn poll_flush(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(shutdown(self.reader()?, Shutdown::Write).map_err(Into::into))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .unwrap()
            .block_on(future)
    }

    fn pair() -> (Stream, Stream) {
        let (one, other) = UnixStream::pair().unwrap();
        (Stream::new(one).unwrap(), Stream::new(other).unwrap())
    }

    /// Much more than a socket holds (net.core.wmem_default) goes through it in pieces.
    #[test]
    fn more_than_fits_is_written_as_room_is_made() {
        block_on(async {
            let (mut one, mut other) = pair();
            let sent: Vec<u8> = (0..4_000_000_u32).map(|n| (n / 7) as u8).collect();
            let mut read = Vec::new();
            let writing = async {
                one.write_all(&sent).await.unwrap();
                assert!(matches!(one.0, Waiting::Read(_)));
                one.shutdown().await.unwrap();
                one
            };
            let (_one, length) = tokio::join!(writing, other.read_to_end(&mut read));
            assert_eq!(length.unwrap(), sent.len());
            assert!(read == sent);
        });
    }

    #[test]
    fn a_peer_that_is_gone_is_an_error() {
        block_on(async {
            let (mut one, other) = pair();
            drop(other);
            let error = one.write_all(b"x").await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
            assert_eq!(one.read(&mut [0; 8]).await.unwrap(), 0);
        });
    }

    /// Also when it had to be waited for.
    #[test]
    fn a_peer_that_goes_while_it_has_to_read_is_an_error() {
        block_on(async {
            let (mut one, other) = pair();
            let sent = vec![0; 4_000_000];
            let going = async {
                tokio::task::yield_now().await;
                drop(other);
            };
            let (written, ()) = tokio::join!(one.write_all(&sent), going);
            let kind = written.unwrap_err().kind();
            assert!(
                matches!(
                    kind,
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                ),
                "{kind}"
            );
        });
    }

    /// How often this thread has given up its processor because it had to wait.
    fn waits() -> u64 {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let field = "voluntary_ctxt_switches:";
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        line.unwrap().trim().parse().unwrap()
    }

    /// Returns when that thread waits.
    fn until_asleep(thread: &str) {
        let is_asleep = || {
            let stat = std::fs::read_to_string(format!("/proc/{thread}/stat")).unwrap();
            stat.rsplit(')').next().unwrap().starts_with(" S")
        };
        while !is_asleep() {
            std::thread::yield_now();
        }
    }

    #[test]
    fn whoever_has_sent_is_not_woken_when_it_is_read() {
        use std::io::{Read, Write};
        const ROUNDS: u64 = 50;
        let (one, mut other) = std::os::unix::net::UnixStream::pair().unwrap();
        one.set_nonblocking(true).unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        let sender = std::thread::spawn(move || {
            block_on(async {
                let mut one = Stream::new(UnixStream::from_std(one).unwrap()).unwrap();
                let thread = std::fs::read_link("/proc/thread-self").unwrap();
                tell.send(thread.to_str().unwrap().to_owned()).unwrap();
                let before = waits();
                for _ in 0..ROUNDS {
                    one.write_all(b"x").await.unwrap();
                    one.read_u8().await.unwrap();
                }
                waits() - before
            })
        });
        let thread = told.recv().unwrap();
        for _ in 0..ROUNDS {
            until_asleep(&thread);
            other.read_exact(&mut [0]).unwrap();
            until_asleep(&thread);
            other.write_all(b"y").unwrap();
        }
        assert!(sender.join().unwrap() <= ROUNDS);
    }
}
