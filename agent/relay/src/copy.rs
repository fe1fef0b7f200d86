//! Carries bytes both ways.
//!
//! What is read goes out at once, from one buffer that all connections share. Only what the other side does
//! not take is kept, and nothing more is read until it has taken that: so an idle connection holds no
//! memory, and one whose reader is slow holds no more than [`BUFFER`] each way.
//!
//! Where much comes at once, more will: it goes through a pipe by splice(2), which moves pages instead of bytes. Pipes
//! are shared in the same way: a direction has one of its own only while something is left in it. There are no more than
//! [`PIPES`], since a user may have only so much memory of the kernel's in pipes; whoever finds none copies.
//!
//! Within TLS it is the same without pipes, and what the server does not take is kept within TLS.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::io::ioctl_fionread;
use rustix::net::Shutdown;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::task::coop::consume_budget;
use tokio_rustls::client::TlsStream;

use crate::upstream::Stream;

/// How much is read at a time, in bytes.
const BUFFER: usize = 16 * 1024;

/// How much a pipe holds, in bytes. The more it is, the less often the relay has to be woken.
const PIPE: usize = 512 * 1024;

/// How much has to come at once, in bytes, for what comes next to go through a pipe.
const BULK: usize = BUFFER;

/// How long a server has to take what an application said before it gave up.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// How many empty pipes are kept for whoever needs one next.
const SPARE_PIPES: usize = 8;

/// How many pipes there may be: half of what a user may have of them (pipe(7), pipe-user-pages-soft, 64 MiB).
const PIPES: usize = 64;

thread_local! {
    static SPARE: RefCell<Vec<Pipe>> = const { RefCell::new(Vec::new()) };
    static COUNT: Cell<usize> = const { Cell::new(0) };
    static SHARED: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER].into_boxed_slice());
}

/// A pipe that holds no more than [`PIPE`] bytes.
struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
}

impl Pipe {
    /// An empty one; none if there can be no more of them.
    fn take() -> Option<Self> {
        if let Some(pipe) = SPARE.with_borrow_mut(Vec::pop) {
            return Some(pipe);
        }
        if COUNT.get() >= PIPES {
            return None;
        }
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).ok()?;
        // A user may have only so much of that: then it stays smaller.
        let _ = fcntl_setpipe_size(&write, PIPE);
        COUNT.set(COUNT.get() + 1);
        Some(Self { read, write })
    }

    /// To be called with an empty one.
    fn put_back(self) {
        SPARE.with_borrow_mut(|pipes| {
            if pipes.len() < SPARE_PIPES {
                pipes.push(self);
            }
        });
    }

    /// Leaves it to the caller to [`forget_readable`] if there is nothing.
    fn fill(&self, from: &TcpStream) -> io::Result<usize> {
        Ok(splice(from, None, &self.write, None, PIPE, FLAGS)?)
    }

    fn drain(&self, to: &TcpStream, length: usize) -> io::Result<usize> {
        to.try_io(Interest::WRITABLE, || {
            Ok(splice(&self.read, None, to, None, length, FLAGS)?)
        })
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        COUNT.set(COUNT.get().saturating_sub(1));
    }
}

const FLAGS: SpliceFlags = SpliceFlags::MOVE.union(SpliceFlags::NONBLOCK);

/// What one look at a connection gave.
enum Step {
    /// So many bytes were there and are on their way.
    Passed(usize),
    /// There was nothing.
    Nothing,
    /// There was nothing that goes through a pipe.
    NothingForPipe,
    /// There will be nothing more.
    End,
    /// This is left, which the other side has not taken.
    Left(Vec<u8>),
    /// So many bytes are left in this pipe, which the other side has not taken.
    LeftInPipe(Pipe, usize),
}

/// Carries bytes both ways until both sides have said all they had to say. One that has may still
/// listen.
///
/// # Errors
/// If either side breaks off; then the other is to be told as well.
pub(crate) async fn carry(client: &mut TcpStream, server: &mut Stream) -> io::Result<()> {
    tokio::select! {
        carried = carry_both_ways(client, server) => carried,
        error = given_up(client) => Err(error),
    }
}

async fn carry_both_ways(client: &TcpStream, server: &mut Stream) -> io::Result<()> {
    let tells = Cell::new(true);
    match server {
        Stream::Tcp(server) => {
            let up = pin!(one_way(client, server, &tells));
            let down = pin!(one_way(server, client, &tells));
            both_ways(up, down, &tells).await
        }
        // On the heap, since most connections are not within TLS.
        Stream::Tls(server) => {
            let carried = async {
                let server = Tls(RefCell::new(server.as_mut()));
                let up = pin!(into_tls(client, &server, &tells));
                let down = pin!(out_of_tls(&server, client, &tells));
                both_ways(up, down, &tells).await
            };
            Box::pin(carried).await
        }
    }
}

/// Returns when a connection has broken, by a reset or by an end of the line. That one side has ended what it says, it
/// does not take for that.
pub(crate) async fn broken(stream: &TcpStream) {
    // It fails when the runtime ends.
    let _ = stream.ready(Interest::ERROR).await;
}

/// Returns when the application has given up, and the server had time to take what it had said before: whoever waits
/// for a server that takes nothing, or says nothing, hears of nothing else.
async fn given_up(client: &TcpStream) -> io::Error {
    broken(client).await;
    // On the heap, since hardly anybody needs it.
    Box::pin(tokio::time::sleep(LAST_WORDS)).await;
    io::ErrorKind::ConnectionReset.into()
}

/// Waits for both directions, which tell no end of what comes where that is no end.
async fn both_ways(
    mut up: Pin<&mut impl Future<Output = Result<(), Broken>>>,
    mut down: Pin<&mut impl Future<Output = Result<(), Broken>>>,
    tells: &Cell<bool>,
) -> io::Result<()> {
    let (ended, other): (_, Pin<&mut dyn Future<Output = _>>) = tokio::select! {
        ended = &mut up => (ended, down),
        ended = &mut down => (ended, up),
    };
    match ended {
        Ok(()) => {}
        Err(Broken::From(error)) => return Err(error),
        // It takes nothing more, but may have said something before, as a server does that refuses what an application
        // is sending. Where that ends says nothing, so nobody is told that it is the end. On the heap, as above.
        Err(Broken::To(error)) => {
            tells.set(false);
            let _ = Box::pin(tokio::time::timeout(LAST_WORDS, other)).await;
            return Err(error);
        }
    }
    other
        .await
        .map_err(|(Broken::From(error) | Broken::To(error))| error)
}

/// Which end of a direction has broken.
enum Broken {
    From(io::Error),
    To(io::Error),
}

/// Says that there will be nothing more, if that is to be told.
fn end(to: &TcpStream, tells: &Cell<bool>) -> Result<(), Broken> {
    if !tells.get() {
        return Ok(());
    }
    match rustix::net::shutdown(to, Shutdown::Write) {
        // It is gone altogether, which its own direction finds out.
        Err(rustix::io::Errno::NOTCONN) => Ok(()),
        result => result.map_err(|error| Broken::To(error.into())),
    }
}

/// Carries what comes until there will be nothing more, and says so.
async fn one_way(from: &TcpStream, to: &TcpStream, tells: &Cell<bool>) -> Result<(), Broken> {
    let mut bulk = false;
    loop {
        from.readable().await.map_err(Broken::From)?;
        let pipe = if bulk { Pipe::take() } else { None };
        let step = match pipe {
            Some(pipe) => step_by_pipe(pipe, from, to)?,
            None => step(|buffer| read(from, buffer), |bytes| to.try_write(bytes))?,
        };
        match step {
            Step::Passed(length) => {
                bulk = length >= BULK;
                consume_budget().await;
            }
            Step::Nothing => {}
            Step::NothingForPipe => bulk = false,
            Step::End => return end(to, tells),
            Step::Left(bytes) => finish(to, &bytes).await.map_err(Broken::To)?,
            Step::LeftInPipe(pipe, left) => {
                finish_pipe(to, pipe, left).await.map_err(Broken::To)?;
            }
        }
    }
}

/// Reads what there is and writes it, as far as both can be done at once.
fn step(
    read: impl FnOnce(&mut [u8]) -> io::Result<usize>,
    write: impl FnOnce(&[u8]) -> io::Result<usize>,
) -> Result<Step, Broken> {
    SHARED.with_borrow_mut(|buffer| {
        let read = match read(buffer) {
            Ok(0) => return Ok(Step::End),
            Ok(read) => buffer.get(..read).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Step::Nothing),
            Err(error) => return Err(Broken::From(error)),
        };
        let written = match write(read) {
            Ok(written) => written,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(error) => return Err(Broken::To(error)),
        };
        Ok(match read.get(written..) {
            None | Some([]) => Step::Passed(written),
            Some(left) => Step::Left(left.to_vec()),
        })
    })
}

fn read(from: &TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
    let read = from.try_read(buffer)?;
    if (1..buffer.len()).contains(&read) && !is_more(from) {
        forget_readable(from);
    }
    Ok(read)
}

/// To be called when there was less than was asked for: the runtime would take it that there may be more, and one read(2)
/// in two would be in vain. What comes from now on, it hears of. (tokio does so itself where it polls.)
fn forget_readable(from: &TcpStream) {
    let nothing = || Err::<(), _>(io::ErrorKind::WouldBlock.into());
    let _ = from.try_io(Interest::READABLE, nothing);
}

/// Whether there is more to be read. What reads stops before urgent data (tcp(7)), with more behind; and splice(2)
/// finds nothing there, or an end, however often it looks.
fn is_more(from: &TcpStream) -> bool {
    ioctl_fionread(from).is_ok_and(|bytes| bytes > 0)
}

fn step_by_pipe(pipe: Pipe, from: &TcpStream, to: &TcpStream) -> Result<Step, Broken> {
    let mut filled = pipe.fill(from);
    let is_nothing = match &filled {
        Ok(length) => *length == 0,
        Err(error) => error.kind() == io::ErrorKind::WouldBlock,
    };
    let more = is_nothing && is_more(from);
    if more {
        // It may have come just now.
        filled = pipe.fill(from);
    }
    let length = match filled {
        Ok(length) if length > 0 => length,
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(Broken::From(error)),
        nothing => {
            pipe.put_back();
            return Ok(if more {
                Step::NothingForPipe
            } else if nothing.is_ok() {
                Step::End
            } else {
                forget_readable(from);
                Step::Nothing
            });
        }
    };
    let drained = match pipe.drain(to, length) {
        Ok(drained) => drained,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
        Err(error) => return Err(Broken::To(error)),
    };
    match length.saturating_sub(drained) {
        0 => {
            pipe.put_back();
            Ok(Step::Passed(length))
        }
        left => Ok(Step::LeftInPipe(pipe, left)),
    }
}

async fn finish_pipe(to: &TcpStream, pipe: Pipe, mut left: usize) -> io::Result<()> {
    while left > 0 {
        to.ready(Interest::WRITABLE).await?;
        match pipe.drain(to, left) {
            Ok(drained) => left = left.saturating_sub(drained),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    pipe.put_back();
    Ok(())
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

/// A connection within TLS, either direction of which can be used while the other one waits.
struct Tls<'a>(RefCell<&'a mut TlsStream<TcpStream>>);

impl Tls<'_> {
    fn try_read(&self, context: &mut Context<'_>, buffer: &mut [u8]) -> io::Result<usize> {
        let mut buffer = ReadBuf::new(buffer);
        let read = Pin::new(&mut **self.0.borrow_mut()).poll_read(context, &mut buffer);
        at_once(read).map(|()| buffer.filled().len())
    }

    fn poll_write(&self, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut **self.0.borrow_mut()).poll_write(context, bytes)
    }

    async fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        poll_fn(|context| self.poll_write(context, bytes)).await
    }

    /// Returns when the kernel has all that was written.
    async fn flush(&self) -> io::Result<()> {
        poll_fn(|context| Pin::new(&mut **self.0.borrow_mut()).poll_flush(context)).await
    }

    async fn end(&self) -> io::Result<()> {
        poll_fn(|context| Pin::new(&mut **self.0.borrow_mut()).poll_shutdown(context)).await
    }
}

/// What can't be done at once is an error, as of sockets; who asked is woken when it can.
fn at_once<T>(poll: Poll<io::Result<T>>) -> io::Result<T> {
    match poll {
        Poll::Ready(result) => result,
        Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
    }
}

/// As [`one_way`], to a server within TLS.
async fn into_tls(from: &TcpStream, to: &Tls<'_>, tells: &Cell<bool>) -> Result<(), Broken> {
    loop {
        from.readable().await.map_err(Broken::From)?;
        let step = poll_fn(|context| {
            let write = |bytes: &[u8]| at_once(to.poll_write(context, bytes));
            Poll::Ready(step(|buffer| read(from, buffer), write))
        });
        match step.await? {
            Step::Left(bytes) => {
                let mut left = bytes.as_slice();
                while !left.is_empty() {
                    let written = to.write(left).await.map_err(Broken::To)?;
                    left = left.get(written..).unwrap_or_default();
                }
            }
            Step::End if tells.get() => return to.end().await.map_err(Broken::To),
            Step::End => return Ok(()),
            _ => {}
        }
        to.flush().await.map_err(Broken::To)?;
        consume_budget().await;
    }
}

/// As [`one_way`], from a server within TLS.
async fn out_of_tls(from: &Tls<'_>, to: &TcpStream, tells: &Cell<bool>) -> Result<(), Broken> {
    loop {
        let step = poll_fn(|context| {
            let read = |buffer: &mut [u8]| from.try_read(context, buffer);
            match step(read, |bytes| to.try_write(bytes)) {
                Ok(Step::Nothing) => Poll::Pending,
                step => Poll::Ready(step),
            }
        });
        match step.await? {
            Step::Left(bytes) => finish(to, &bytes).await.map_err(Broken::To)?,
            Step::End => return end(to, tells),
            _ => {}
        }
        consume_budget().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::tests::{Ends, connect_within, ends};
    use rustix::net::{SendFlags, send};
    use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
    use tokio::net::TcpListener;

    /// A server's end of a connection.
    trait Theirs: AsyncRead + AsyncWrite + Unpin {}
    impl<T: AsyncRead + AsyncWrite + Unpin> Theirs for T {}

    /// The ends of a connection; the second one has the options that the relay's own have.
    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        crate::sockets::set_options(&listener).unwrap();
        let address = listener.local_addr().unwrap();
        let (ours, theirs) = tokio::join!(TcpStream::connect(address), listener.accept());
        (ours.unwrap(), theirs.unwrap().0)
    }

    /// A connection to a server, and its end.
    async fn connect(tls: Option<&Ends>) -> (Stream, Box<dyn Theirs>) {
        let (ours, theirs) = pair().await;
        let Some(tls) = tls else {
            return (Stream::Tcp(ours), Box::new(theirs));
        };
        let (ours, theirs) = connect_within(tls, ours, theirs).await;
        (ours, Box::new(theirs))
    }

    /// Bytes of which none can be where another one should.
    fn much(seed: u32) -> Vec<u8> {
        (0..3_000_000_u32)
            .flat_map(|n| {
                n.wrapping_mul(2_654_435_761)
                    .wrapping_add(seed)
                    .to_le_bytes()
            })
            .collect()
    }

    #[test]
    fn there_are_no_more_pipes_than_may_be() {
        let pipes: Vec<_> = std::iter::from_fn(Pipe::take).take(PIPES + 1).collect();
        assert_eq!(pipes.len(), PIPES);
        pipes.into_iter().for_each(Pipe::put_back);
        let kept = SPARE.with_borrow(Vec::len);
        assert_eq!((kept, COUNT.get()), (SPARE_PIPES, SPARE_PIPES));
    }

    #[tokio::test]
    async fn much_arrives_in_order_both_ways_and_ends_are_passed_on() {
        let tls = ends();
        for tls in [None, Some(&tls)] {
            let (mut client, mut ours) = pair().await;
            let (mut stream, mut theirs) = connect(tls).await;
            let carried = carry(&mut ours, &mut stream);
            let (up, down) = (much(1), much(2));
            let application = async {
                client.write_all(&up).await.unwrap();
                client.shutdown().await.unwrap();
                // The other way is still open, and its reader is slower than who writes.
                let mut received = Vec::new();
                client.read_to_end(&mut received).await.unwrap();
                received
            };
            let destination = async {
                let mut received = Vec::new();
                theirs.read_to_end(&mut received).await.unwrap();
                theirs.write_all(&down).await.unwrap();
                theirs.shutdown().await.unwrap();
                received
            };
            let (carried, at_application, at_destination) =
                tokio::join!(carried, application, destination);
            carried.unwrap();
            assert!(at_destination == up);
            assert!(at_application == down);
            // No direction keeps a pipe when nothing is left in it, and more than a few are not kept at all.
            assert!(SPARE.with_borrow(|pipes| !pipes.is_empty() && pipes.len() <= SPARE_PIPES));
        }
    }

    /// A server may read nothing more until somebody has heard it out.
    #[tokio::test]
    async fn who_has_ended_hears_a_server_that_takes_the_end_late() {
        let tls = ends();
        for tls in [None, Some(&tls)] {
            let (mut client, mut ours) = pair().await;
            let (mut stream, mut theirs) = connect(tls).await;
            let (up, down) = (much(1), much(2));
            let (mut reads, mut writes) = client.split();
            let application = async {
                let say = async {
                    writes.write_all(&up).await.unwrap();
                    writes.shutdown().await.unwrap();
                };
                let mut received = Vec::new();
                tokio::join!(say, reads.read_to_end(&mut received))
                    .1
                    .unwrap();
                received
            };
            let destination = async {
                theirs.write_all(&down).await.unwrap();
                theirs.shutdown().await.unwrap();
                let mut received = Vec::new();
                theirs.read_to_end(&mut received).await.unwrap();
                received
            };
            let carried = carry(&mut ours, &mut stream);
            let (carried, at_application, at_destination) =
                tokio::join!(carried, application, destination);
            carried.unwrap();
            assert!(at_destination == up);
            assert!(at_application == down);
        }
    }

    /// Waits until its peer has broken it off, and everything that was said before is there.
    async fn until_broken(stream: &TcpStream) {
        stream.ready(Interest::ERROR).await.unwrap();
        stream.readable().await.unwrap();
    }

    /// What there is to be heard before a reset.
    async fn heard(mut stream: impl AsyncRead + Unpin) -> Vec<u8> {
        let mut heard = Vec::new();
        let error = stream.read_to_end(&mut heard).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        heard
    }

    #[tokio::test]
    async fn who_goes_on_talking_hears_what_was_said_before_the_other_side_broke_off() {
        for client_breaks_off in [false, true] {
            let (client, mut ours) = pair().await;
            let (server, theirs) = pair().await;
            let (mut breaks_off, broken, talks, listens) = match client_breaks_off {
                true => (client, &ours, theirs, &server),
                false => (theirs, &server, client, &ours),
            };
            // What is unread when it closes makes a reset of that.
            broken.try_write(b"unread").unwrap();
            breaks_off.readable().await.unwrap();
            breaks_off.write_all(b"enough").await.unwrap();
            drop(breaks_off);
            until_broken(broken).await;
            talks.try_write(b"more").unwrap();
            listens.readable().await.unwrap();

            let mut stream = Stream::Tcp(server);
            let error = carry(&mut ours, &mut stream).await.unwrap_err();
            assert!(crate::upstream::has_ended(&error), "{error}");
            let Stream::Tcp(server) = stream else {
                unreachable!("it is the same");
            };
            for stream in [ours, server] {
                stream.set_zero_linger().unwrap();
            }
            assert_eq!(heard(talks).await, b"enough");
        }
    }

    #[tokio::test]
    async fn who_uploads_within_tls_hears_what_the_server_said_before_it_broke_off() {
        let (mut client, mut ours) = pair().await;
        let (server, theirs) = pair().await;
        let (mut stream, mut theirs) = connect_within(&ends(), server, theirs).await;
        // What is unread when it closes makes a reset of that.
        stream.tcp().try_write(b"unread").unwrap();
        theirs.get_ref().0.readable().await.unwrap();
        theirs.write_all(b"enough").await.unwrap();
        theirs.flush().await.unwrap();
        drop(theirs);
        until_broken(stream.tcp()).await;
        // However much there is of it.
        let said = client.try_write(&vec![b'x'; 1 << 20]).unwrap();
        assert!(said > BUFFER);
        ours.readable().await.unwrap();

        let error = carry(&mut ours, &mut stream).await.unwrap_err();
        assert!(crate::upstream::has_ended(&error), "{error}");
        ours.set_zero_linger().unwrap();
        drop(ours);
        assert_eq!(heard(&mut client).await, b"enough");
    }

    /// Time stands still but for who waits for it.
    #[tokio::test(start_paused = true)]
    async fn urgent_data_is_carried_like_the_rest() {
        for before in [3, BUFFER, 2 * BUFFER] {
            for ends in [false, true] {
                let (client, mut ours) = pair().await;
                let (server, mut theirs) = pair().await;
                let said = [&vec![b'x'; before], &b"!ABOR\r\n"[..]].concat();
                let (first, rest) = said.split_at(before);
                let (urgent, last) = rest.split_at(1);
                let none = SendFlags::empty();
                for (piece, flags) in [(first, none), (urgent, SendFlags::OOB), (last, none)] {
                    assert_eq!(send(&client, piece, flags).unwrap(), piece.len());
                }
                if ends {
                    rustix::net::shutdown(&client, Shutdown::Write).unwrap();
                }
                while ioctl_fionread(&ours).unwrap() < said.len() as u64 {
                    tokio::task::yield_now().await;
                }
                let mut stream = Stream::Tcp(server);
                let carried = carry(&mut ours, &mut stream);
                let hear = async {
                    let mut heard = vec![0; said.len()];
                    theirs.read_exact(&mut heard).await.unwrap();
                    if ends {
                        assert_eq!(theirs.read(&mut [0]).await.unwrap(), 0);
                    }
                    heard
                };
                let heard = async {
                    tokio::select! {
                        heard = hear => heard,
                        carried = carried => unreachable!("{carried:?}"),
                    }
                };
                let heard = tokio::time::timeout(Duration::from_secs(60), heard).await;
                assert!(heard.expect("all of it arrives") == said);
            }
        }
    }

    /// Time stands still but for who waits for it.
    #[tokio::test(start_paused = true)]
    async fn an_application_that_gives_up_is_not_waited_for() {
        let tls = ends();
        let all = |bytes| [(bytes, None), (bytes, Some(&tls))];
        for (bytes, tls) in [0, 100, 1 << 26].into_iter().flat_map(all) {
            for ends in [false, true] {
                let (client, mut ours) = pair().await;
                // It neither reads nor says anything.
                let (mut stream, _theirs) = connect(tls).await;
                let carried = carry(&mut ours, &mut stream);
                let application = async {
                    let mut left = bytes;
                    while left > 0 {
                        let writable = client.writable();
                        // When nothing moves any more, both sides' buffers are full.
                        if tokio::time::timeout(Duration::from_secs(1), writable)
                            .await
                            .is_err()
                        {
                            break;
                        }
                        left -= client.try_write(&vec![0; left.min(1 << 16)]).unwrap_or(0);
                    }
                    if ends {
                        rustix::net::shutdown(&client, Shutdown::Write).unwrap();
                        tokio::time::sleep(Duration::from_secs(1)).await;
                    }
                    client.set_zero_linger().unwrap();
                    drop(client);
                };
                let both = async { tokio::join!(carried, application).0 };
                let carried = tokio::time::timeout(Duration::from_secs(60), both).await;
                let error = carried.expect("it is over").unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
            }
        }
    }
}
