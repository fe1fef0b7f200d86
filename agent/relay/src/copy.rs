//! Carries bytes both ways.
//!
//! What is read goes out at once, from one buffer that all connections share. Only what the other side does
//! not take is kept, and nothing more is read until it has taken that: so an idle connection holds no
//! memory, and one whose reader is slow holds no more than [`BUFFER`] each way.
//!
//! Where much comes at once, more will: it goes through a pipe by splice(2), which moves pages instead of bytes. Pipes
//! are shared in the same way: a direction has one of its own only while something is left in it. There are no more than
//! [`PIPES`], since a user may have only so much memory of the kernel's in pipes; whoever finds none copies.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::time::Duration;

use rustix::io::ioctl_fionread;
use rustix::net::Shutdown;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::task::coop::consume_budget;

use crate::upstream::Stream;

/// How much is read at a time, in bytes.
const BUFFER: usize = 16 * 1024;

/// How much a pipe holds, in bytes.
const PIPE: usize = 128 * 1024;

/// How much a direction of a connection within TLS holds, in bytes.
const TLS_BUFFER: usize = 16 * 1024;

/// How much has to come at once, in bytes, for what comes next to go through a pipe.
const BULK: usize = BUFFER;

/// How long a server has to take what an application said before it gave up.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// How many empty pipes are kept for whoever needs one next.
const SPARE_PIPES: usize = 8;

/// How many pipes there may be: half of what a user may have of them (pipe(7), pipe-user-pages-soft, 64 MiB).
const PIPES: usize = 256;

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
    match server {
        Stream::Tcp(server) => {
            tokio::select! {
                carried = both_ways(client, server) => carried,
                error = given_up(client) => Err(error),
            }
        }
        Stream::Tls(server) => {
            // Its copier has the client for itself. What it waits for when the server takes no more is the server alone.
            tokio::io::copy_bidirectional_with_sizes(
                client,
                server.as_mut(),
                TLS_BUFFER,
                TLS_BUFFER,
            )
            .await
            .map(drop)
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

async fn both_ways(client: &TcpStream, server: &TcpStream) -> io::Result<()> {
    let (mut up, mut down) = (pin!(one_way(client, server)), pin!(one_way(server, client)));
    let (first, other) = tokio::select! {
        first = &mut up => ((first, server), (down, client)),
        first = &mut down => ((first, client), (up, server)),
    };
    let ((ended, to), (other, other_to)) = (first, other);
    match ended {
        Ok(()) => end(to)?,
        Err(Broken::From(error)) => return Err(error),
        // It takes nothing more, but may have said something before, as a server does that refuses what an application
        // is sending. Where that ends says nothing, so nobody is told that it is the end. On the heap, as above.
        Err(Broken::To(error)) => {
            let _ = Box::pin(tokio::time::timeout(LAST_WORDS, other)).await;
            return Err(error);
        }
    }
    match other.await {
        Ok(()) => end(other_to),
        Err(Broken::From(error) | Broken::To(error)) => Err(error),
    }
}

/// Which end of a direction has broken.
enum Broken {
    From(io::Error),
    To(io::Error),
}

/// Says that there will be nothing more.
fn end(to: &TcpStream) -> io::Result<()> {
    match rustix::net::shutdown(to, Shutdown::Write) {
        // It is gone altogether, which its own direction finds out.
        Err(rustix::io::Errno::NOTCONN) => Ok(()),
        result => Ok(result?),
    }
}

/// Carries what comes until there will be nothing more.
async fn one_way(from: &TcpStream, to: &TcpStream) -> Result<(), Broken> {
    let mut bulk = false;
    loop {
        from.readable().await.map_err(Broken::From)?;
        let pipe = if bulk { Pipe::take() } else { None };
        let step = match pipe {
            Some(pipe) => step_by_pipe(pipe, from, to)?,
            None => step(from, to)?,
        };
        match step {
            Step::Passed(length) => {
                bulk = length >= BULK;
                consume_budget().await;
            }
            Step::Nothing => {}
            Step::NothingForPipe => bulk = false,
            Step::End => return Ok(()),
            Step::Left(bytes) => finish(to, &bytes).await.map_err(Broken::To)?,
            Step::LeftInPipe(pipe, left) => {
                finish_pipe(to, pipe, left).await.map_err(Broken::To)?;
            }
        }
    }
}

fn step(from: &TcpStream, to: &TcpStream) -> Result<Step, Broken> {
    SHARED.with_borrow_mut(|buffer| {
        let read = match from.try_read(buffer) {
            Ok(0) => return Ok(Step::End),
            Ok(read) => {
                if read < BUFFER && !is_more(from) {
                    forget_readable(from);
                }
                buffer.get(..read).unwrap_or_default()
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Step::Nothing),
            Err(error) => return Err(Broken::From(error)),
        };
        let written = match to.try_write(read) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{SendFlags, send};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    /// The ends of a connection; the second one has the options that the relay's own have.
    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        crate::tcp::set_options(&listener).unwrap();
        let address = listener.local_addr().unwrap();
        let (ours, theirs) = tokio::join!(TcpStream::connect(address), listener.accept());
        (ours.unwrap(), theirs.unwrap().0)
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

    #[tokio::test]
    async fn much_arrives_in_order_both_ways_and_ends_are_passed_on() {
        let (mut client, mut ours) = pair().await;
        let (server, mut theirs) = pair().await;
        let mut stream = Stream::Tcp(server);
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

    /// Waits until its peer has broken it off, and everything that was said before is there.
    async fn until_broken(stream: &TcpStream) {
        stream.ready(Interest::ERROR).await.unwrap();
        stream.readable().await.unwrap();
    }

    /// What there is to be heard before a reset.
    async fn heard(mut stream: TcpStream) -> Vec<u8> {
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
        for bytes in [0, 100, 1 << 26] {
            for ends in [false, true] {
                let (client, mut ours) = pair().await;
                // It neither reads nor says anything.
                let (server, _theirs) = pair().await;
                let mut stream = Stream::Tcp(server);
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
