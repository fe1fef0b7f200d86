//! A connection whose peer may send what this process must never have: descriptors of others' files.
//!
//! A descriptor that nobody takes is closed by whoever reads past it, or closes the socket that it waits in. What
//! closing takes is the file's business: a TCP socket can be told to linger for as long as its owner likes
//! (`SO_LINGER`, socket(7)), and whoever closes it last sleeps so long. The one thread that serves everybody must
//! not.
//!
//! Linux 6.16 does not let anybody send them ([`crate::sys::refuse_descriptors`]). Before that, and to connections made
//! before, they can be sent, and nothing is read here that was not looked at first. Looking (`MSG_PEEK`) closes nothing. Where
//! descriptors are, nothing is read, and the socket stays open until this process ends: a process that ends does not
//! linger (`PF_EXITING` in inet_release, net/ipv4/af_inet.c). Where systemd has the listening socket, the helper is
//! started again once there are too many of them ([`Parked::too_many`]). Elsewhere they may reach the limit of open
//! files, as connections that stay may: no more are accepted then, and those that are open go on.
//!
//! As in [`cgtproxy_proto::stream`], the runtime waits for room to write only while there is none.

use std::cell::Cell;
use std::io::{self, IoSliceMut};
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, ready};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::set_socket_oobinline;
use rustix::net::{
    RecvAncillaryBuffer, RecvFlags, ReturnFlags, SendFlags, Shutdown, recv, recvmsg, send, shutdown,
};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::Notify;

use crate::sys::{refuses_descriptors, watch_shared};

/// How many bytes are looked at, and read, at once.
const CHUNK: usize = 64 * 1024;

/// How many bytes are read at once in order to be thrown away.
const WASTE: usize = 4 * 1024;

/// So many sockets may stay open.
const MOST_PARKED: usize = 64;

/// The sockets that stay open until this process ends.
#[derive(Debug, Clone, Default)]
pub struct Parked(Rc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    count: Cell<usize>,
    too_many: Notify,
}

impl Parked {
    /// Returns once there are more than there should be.
    pub async fn too_many(&self) {
        self.0.too_many.notified().await;
    }

    fn park(&self, socket: Rc<OwnedFd>) {
        // Never closed.
        std::mem::forget(socket);
        let count = self.0.count.get() + 1;
        self.0.count.set(count);
        if count == 1 {
            tracing::warn!("a peer has sent descriptors; its connection is not read any further");
        }
        if count > MOST_PARKED {
            self.0.too_many.notify_one();
        }
    }
}

/// Why nothing was received.
#[derive(Debug)]
enum Failure {
    /// There are descriptors with it, or right behind.
    Descriptors,
    Other(Errno),
}

impl From<Failure> for io::Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Descriptors => Self::new(
                io::ErrorKind::InvalidData,
                "the peer has sent descriptors, which nobody wants",
            ),
            Failure::Other(error) => error.into(),
        }
    }
}

/// A socket that is not closed with descriptors in it.
#[derive(Debug)]
struct Socket {
    socket: Rc<OwnedFd>,
    /// There may be descriptors in it.
    suspect: bool,
    parked: Parked,
}

impl Socket {
    fn receive(&self, room: &mut [u8]) -> Result<usize, Failure> {
        let length = match self.suspect {
            true => look(&self.socket, room)?,
            false => room.len(),
        };
        // `look` has seen no descriptors in so many bytes, and nothing else reads from the socket.
        let room = room.get_mut(..length).unwrap_or_default();
        let read = recv(&self.socket, room, RecvFlags::DONTWAIT).map_err(Failure::Other)?;
        Ok(read.0)
    }

    fn send(&self, bytes: &[u8]) -> Result<usize, Errno> {
        send(
            &self.socket,
            bytes,
            SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
        )
    }
}

/// How much can be read at once without descriptors.
fn look(socket: &OwnedFd, room: &mut [u8]) -> Result<usize, Failure> {
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    let mut nothing = RecvAncillaryBuffer::default();
    let seen = recvmsg(socket, &mut [IoSliceMut::new(room)], &mut nothing, flags);
    let seen = seen.map_err(Failure::Other)?;
    match seen.flags.contains(ReturnFlags::CTRUNC) {
        true => Err(Failure::Descriptors),
        false => Ok(seen.bytes),
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Nothing comes any more; what has been sent can still be read at the other end.
        let _ = shutdown(&self.socket, Shutdown::Both);
        let mut waste = [0; WASTE];
        let descriptors = loop {
            match self.receive(&mut waste) {
                Ok(1..) | Err(Failure::Other(Errno::INTR)) => {}
                Ok(0) | Err(Failure::Other(_)) => break false,
                Err(Failure::Descriptors) => break true,
            }
        };
        if descriptors {
            self.parked.park(Rc::clone(&self.socket));
        }
    }
}

/// Tells whether the peer is still at the other end of a connection, for as long as that is open.
#[derive(Debug, Clone)]
pub(crate) struct PeerProbe(Weak<OwnedFd>);

impl PeerProbe {
    /// Whether the peer has closed the connection, or is dead (`POLLHUP`): nobody would hear of an answer. A peer that
    /// has only shut its sending side down waits for one.
    #[must_use]
    pub(crate) fn is_gone(&self) -> bool {
        let Some(socket) = self.0.upgrade() else {
            return true;
        };
        let mut asked = [PollFd::new(&*socket, PollFlags::empty())];
        let now = Timespec::default();
        let told = poll(&mut asked, Some(&now));
        let [asked] = &asked;
        told.is_ok() && asked.revents().contains(PollFlags::HUP)
    }
}

/// A connected stream socket.
#[derive(Debug)]
pub(crate) struct Guarded {
    /// What the runtime waits for: something to read or, while the socket is full, room to write. None if it could not
    /// be told to wait.
    waiting: Option<(Interest, AsyncFd<Rc<OwnedFd>>)>,
    socket: Socket,
}

impl Guarded {
    /// Takes over a connection.
    ///
    /// # Errors
    /// If the runtime can't wait for it.
    pub(crate) fn new(stream: UnixStream, parked: &Parked) -> io::Result<Self> {
        let stream = OwnedFd::from(stream.into_std()?);
        let socket = Socket {
            suspect: !refuses_descriptors(&stream),
            socket: Rc::new(stream),
            parked: parked.clone(),
        };
        // Urgent data is looked at only where it is data like any other.
        set_socket_oobinline(&socket.socket, true)?;
        let mut this = Self {
            waiting: None,
            socket,
        };
        this.wait_for(Interest::READABLE)?;
        Ok(this)
    }

    /// What tells whether the peer is still there.
    #[must_use]
    pub(crate) fn peer_probe(&self) -> PeerProbe {
        PeerProbe(Rc::downgrade(&self.socket.socket))
    }

    /// Has the runtime wait for this, and for nothing else.
    fn wait_for(&mut self, interest: Interest) -> io::Result<(&AsyncFd<Rc<OwnedFd>>, &Socket)> {
        let waiting = match self.waiting.take() {
            Some(waiting) if waiting.0 == interest => waiting,
            other => {
                // The runtime takes one descriptor once.
                drop(other);
                let socket = Rc::clone(&self.socket.socket);
                (interest, watch_shared(socket, interest)?)
            }
        };
        let (_, watched) = self.waiting.insert(waiting);
        Ok((watched, &self.socket))
    }

    fn waits_for(&self, interest: Interest) -> bool {
        let waiting = self.waiting.as_ref();
        waiting.is_some_and(|(for_what, _)| *for_what == interest)
    }
}

impl AsyncRead for Guarded {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let length = buffer.remaining().min(CHUNK);
        if length == 0 {
            return Poll::Ready(Ok(()));
        }
        let (watched, socket) = self.wait_for(Interest::READABLE)?;
        loop {
            let mut ready = ready!(watched.poll_read_ready(context))?;
            let room = buffer.initialize_unfilled_to(length);
            match socket.receive(room) {
                Ok(read) => {
                    // What comes after that is told anew.
                    if (1..length).contains(&read) {
                        ready.clear_ready();
                    }
                    buffer.advance(read);
                    return Poll::Ready(Ok(()));
                }
                Err(Failure::Other(Errno::AGAIN)) => ready.clear_ready(),
                Err(Failure::Other(Errno::INTR)) => {}
                Err(failure) => return Poll::Ready(Err(failure.into())),
            }
        }
    }
}

impl AsyncWrite for Guarded {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.waits_for(Interest::READABLE) {
            match self.socket.send(bytes) {
                Err(Errno::AGAIN) => {}
                sent => return Poll::Ready(sent.map_err(Into::into)),
            }
        }
        let (watched, socket) = self.wait_for(Interest::WRITABLE)?;
        let written = loop {
            let mut ready = ready!(watched.poll_write_ready(context))?;
            match socket.send(bytes) {
                Err(Errno::AGAIN) => ready.clear_ready(),
                sent => break sent.map_err(Into::into),
            }
        };
        self.wait_for(Interest::READABLE)?;
        Poll::Ready(written)
    }

    fn poll_flush(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = shutdown(&self.socket.socket, Shutdown::Write);
        Poll::Ready(shut.map_err(Into::into))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixListener, UnixStream as Blocking};
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use rustix::net::sockopt::set_socket_linger;
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, sendmsg};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use crate::sys::refuse_descriptors;

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .unwrap()
            .block_on(future)
    }

    /// As connections are to a listener that takes descriptors, on every kernel.
    fn pair(parked: &Parked) -> (Guarded, Blocking) {
        let (ours, theirs) = Blocking::pair().unwrap();
        let ours = guarded(ours, parked);
        assert!(ours.socket.suspect);
        (ours, theirs)
    }

    fn guarded(ours: Blocking, parked: &Parked) -> Guarded {
        ours.set_nonblocking(true).unwrap();
        Guarded::new(UnixStream::from_std(ours).unwrap(), parked).unwrap()
    }

    fn listener() -> UnixListener {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let (process, number) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let name = format!("cgtproxy-guarded-{process}-{number}");
        UnixListener::bind_addr(&SocketAddr::from_abstract_name(name).unwrap()).unwrap()
    }

    fn connect(listener: &UnixListener) -> Blocking {
        Blocking::connect_addr(&listener.local_addr().unwrap()).unwrap()
    }

    /// A connection to a listener that takes none, as far as the kernel sees to that.
    fn refusing_pair(parked: &Parked) -> (Guarded, Blocking) {
        let listener = listener();
        let refused = refuse_descriptors(&listener);
        let theirs = connect(&listener);
        let ours = guarded(listener.accept().unwrap().0, parked);
        assert_eq!(ours.socket.suspect, refused.is_err());
        (ours, theirs)
    }

    /// The end of a TCP connection that takes a thousand seconds to close, and the one that makes it.
    fn lingering() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (other, _) = listener.accept().unwrap();
        stream.set_nonblocking(true).unwrap();
        while send(&stream, &[0; 65536], SendFlags::NOSIGNAL).is_ok() {}
        stream.set_nonblocking(false).unwrap();
        set_socket_linger(&stream, Some(Duration::from_secs(1000))).unwrap();
        (stream, other)
    }

    /// Sends a descriptor away that has no other owner any more.
    fn give_away(to: &Blocking, bytes: &[u8], file: TcpStream, flags: SendFlags) {
        assert_eq!(send_file(to, bytes, file, flags), Ok(bytes.len()));
    }

    fn send_file(
        to: &Blocking,
        bytes: &[u8],
        file: TcpStream,
        flags: SendFlags,
    ) -> Result<usize, Errno> {
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let files = [file.as_fd()];
        assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
        sendmsg(to, &[io::IoSlice::new(bytes)], &mut control, flags)
    }

    /// What is not looked at can't have any.
    #[test]
    fn who_is_not_looked_at_can_send_none() {
        let parked = Parked::default();
        block_on(async {
            let (mut ours, mut theirs) = refusing_pair(&parked);
            if ours.socket.suspect {
                return;
            }
            for flags in [SendFlags::empty(), SendFlags::OOB] {
                let (end, _other) = Blocking::pair().unwrap();
                let sent = send_file(&theirs, b"x", OwnedFd::from(end).into(), flags);
                assert_eq!(sent, Err(Errno::PERM));
            }
            io::Write::write_all(&mut theirs, b"plain").unwrap();
            let mut read = [0; 64];
            assert_eq!(ours.read(&mut read).await.unwrap(), 5);
            assert_eq!(&read[..5], b"plain");
        });
        assert_eq!(parked.0.count.get(), 0);
    }

    #[test]
    fn who_came_before_they_were_refused_is_looked_at() {
        let parked = Parked::default();
        block_on(async {
            let listener = listener();
            let theirs = connect(&listener);
            let (file, _other) = lingering();
            give_away(&theirs, b"x", file, SendFlags::empty());
            let _ = refuse_descriptors(&listener);
            let mut ours = guarded(listener.accept().unwrap().0, &parked);
            assert!(ours.socket.suspect);
            assert!(ours.read(&mut [0; 64]).await.is_err());
        });
        assert_eq!(parked.0.count.get(), 1);
    }

    #[test]
    fn descriptors_are_never_closed_here() {
        block_on(descriptors_of_all_kinds());
    }

    async fn descriptors_of_all_kinds() {
        let parked = Parked::default();
        let (plain, urgent) = (SendFlags::empty(), SendFlags::OOB);
        for (before, read, flags) in [
            (&b""[..], true, plain),
            (&b"plain"[..], true, plain),
            (&b"plain"[..], false, plain),
            (&b""[..], false, plain),
            (&b""[..], true, urgent),
            (&b""[..], false, urgent),
        ] {
            let count = parked.0.count.get();
            let (mut ours, mut theirs) = pair(&parked);
            io::Write::write_all(&mut theirs, before).unwrap();
            let (file, _other) = lingering();
            give_away(&theirs, b"x", file, flags);
            drop(theirs);
            // This would take a thousand seconds.
            if read {
                let error = ours.read(&mut [0; 64]).await.unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::InvalidData);
            }
            drop(ours);
            assert_eq!(parked.0.count.get(), count + 1);
        }
    }

    #[test]
    fn who_reads_on_after_them_hears_the_same() {
        let parked = Parked::default();
        block_on(async {
            let (mut ours, theirs) = pair(&parked);
            let (file, _other) = lingering();
            give_away(&theirs, b"x", file, SendFlags::empty());
            for _ in 0..3 {
                assert!(ours.read(&mut [0; 1]).await.is_err());
            }
            drop(ours);
            // Nothing more comes.
            assert!(io::Write::write_all(&mut &theirs, b"y").is_err());
        });
        assert_eq!(parked.0.count.get(), 1);
    }

    #[test]
    fn too_many_are_told_of() {
        let parked = Parked::default();
        block_on(async {
            for _ in 0..=MOST_PARKED {
                let (ours, theirs) = pair(&parked);
                let (end, _other) = Blocking::pair().unwrap();
                give_away(
                    &theirs,
                    b"x",
                    TcpStream::from(OwnedFd::from(end)),
                    SendFlags::empty(),
                );
                drop(ours);
            }
            parked.too_many().await;
        });
    }

    #[test]
    fn what_is_plain_goes_through_in_both_directions() {
        goes_through_in_both_directions(pair);
        goes_through_in_both_directions(refusing_pair);
    }

    fn goes_through_in_both_directions(pair: fn(&Parked) -> (Guarded, Blocking)) {
        let parked = Parked::default();
        block_on(async {
            let (mut ours, theirs) = pair(&parked);
            let sent: Vec<u8> = (0..4_000_000_u32).map(|n| (n / 7) as u8).collect();
            let there = sent.clone();
            let other = std::thread::spawn(move || {
                let mut theirs = theirs;
                io::Write::write_all(&mut theirs, &there).unwrap();
                theirs.shutdown(std::net::Shutdown::Write).unwrap();
                let mut back = Vec::new();
                io::Read::read_to_end(&mut theirs, &mut back).unwrap();
                back
            });
            let mut read = Vec::new();
            ours.read_to_end(&mut read).await.unwrap();
            assert!(read == sent);
            ours.write_all(&read).await.unwrap();
            assert!(ours.waits_for(Interest::READABLE));
            ours.shutdown().await.unwrap();
            assert!(other.join().unwrap() == sent);
        });
        assert_eq!(parked.0.count.get(), 0);
    }

    /// What was not read is no reset for the peer, and what was sent is there to be read.
    #[test]
    fn closed_unread_it_is_the_end_and_no_error() {
        is_the_end_and_no_error(pair);
        is_the_end_and_no_error(refusing_pair);
    }

    fn is_the_end_and_no_error(pair: fn(&Parked) -> (Guarded, Blocking)) {
        let parked = Parked::default();
        block_on(async {
            let (mut ours, mut theirs) = pair(&parked);
            io::Write::write_all(&mut theirs, &[0; 100_000]).unwrap();
            ours.write_all(b"no").await.unwrap();
            drop(ours);
            let mut back = Vec::new();
            io::Read::read_to_end(&mut theirs, &mut back).unwrap();
            assert_eq!(back, b"no");
        });
        assert_eq!(parked.0.count.get(), 0);
    }

    #[test]
    fn who_has_hung_up_is_told_from_who_waits_for_an_answer() {
        block_on(async {
            let (ours, mut theirs) = pair(&Parked::default());
            let probe = ours.peer_probe();
            assert!(!probe.is_gone());
            io::Write::write_all(&mut theirs, b"x").unwrap();
            theirs.shutdown(std::net::Shutdown::Write).unwrap();
            assert!(!probe.is_gone());
            drop(theirs);
            assert!(probe.is_gone());
            drop(ours);
            assert!(probe.is_gone());
        });
    }

    #[test]
    fn a_peer_that_is_gone_is_an_error() {
        let parked = Parked::default();
        block_on(async {
            let (mut ours, theirs) = pair(&parked);
            drop(theirs);
            let error = ours.write_all(b"x").await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
            assert_eq!(ours.read(&mut [0; 8]).await.unwrap(), 0);
        });
    }
}
