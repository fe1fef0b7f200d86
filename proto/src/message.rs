//! Varlink's framing: JSON objects that end with a NUL byte (varlink.org, Method-Call).

use std::io;
use std::pin::pin;

use tokio::io::{AsyncRead, AsyncReadExt};

/// How much is asked of the kernel at first: more than most messages are. Also what an idle connection keeps.
const FIRST: usize = 4 * 1024;

/// What a longer message has room for at least.
const CHUNK: usize = 16 * 1024;

/// A bound that the buffers of several connections share.
pub trait Budget {
    /// A buffer is about to have `to` bytes in place of `from`. False: it may not, and has `from` still.
    fn resize(&self, from: usize, to: usize) -> bool;
}

/// A buffer of a connection that shares nothing with others.
#[derive(Debug)]
pub struct Unshared;

impl Budget for Unshared {
    fn resize(&self, _from: usize, _to: usize) -> bool {
        true
    }
}

/// Why no message could be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The connection broke, or ended within a message.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The message is longer than the limit, in bytes. What follows cannot be read any more.
    #[error("a message is longer than {0} bytes")]
    TooLarge(usize),
    /// The buffers that share the budget hold as much as they may.
    #[error("messages hold as many bytes as they may")]
    OverBudget,
}

/// Reads messages from a stream and holds no more of it than one message of the allowed length.
#[derive(Debug)]
pub struct MessageReader<R, B: Budget = Unshared> {
    stream: R,
    buffer: Vec<u8>,
    /// How much of `buffer` is known to have no NUL.
    scanned: usize,
    limit: usize,
    budget: B,
    /// How many bytes the budget knows of.
    accounted: usize,
    /// How many bytes the message has that was handed out last.
    handed_out: usize,
    /// The last message was not there yet when it was asked for.
    waited: bool,
}

impl<R: AsyncRead + Unpin> MessageReader<R> {
    /// Messages of `stream` of at most `limit` bytes each, their NULs not counted.
    pub fn new(stream: R, limit: usize) -> Self {
        Self::with_budget(stream, limit, Unshared)
    }
}

impl<R: AsyncRead + Unpin, B: Budget> MessageReader<R, B> {
    /// As [`Self::new`], with a buffer that counts against a budget, from which
    /// [`ReadError::OverBudget`] comes. What an idle connection keeps is not counted. A message that has been handed out
    /// is, until the next one is asked for: by then it is to be dropped, and what was said to it as well.
    pub fn with_budget(stream: R, limit: usize, budget: B) -> Self {
        Self {
            stream,
            buffer: Vec::new(),
            scanned: 0,
            limit,
            budget,
            accounted: 0,
            handed_out: 0,
            waited: false,
        }
    }

    /// Where the messages come from.
    pub fn stream_mut(&mut self) -> &mut R {
        &mut self.stream
    }

    /// Whether the last message had to be waited for.
    #[must_use]
    pub fn waited(&self) -> bool {
        self.waited
    }

    fn account(&mut self, bytes: usize) -> Result<(), ReadError> {
        let bytes = self.handed_out + countable(bytes);
        if !self.budget.resize(self.accounted, bytes) {
            return Err(ReadError::OverBudget);
        }
        self.accounted = bytes;
        Ok(())
    }

    /// The next message, its NUL included; none at the end of the stream. Cancel safe: what has
    /// been read stays for the next call.
    ///
    /// # Errors
    /// If the stream fails or ends in the middle of a message, or the message is too long.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, ReadError> {
        self.waited = false;
        // An account that shrinks is never refused.
        self.handed_out = 0;
        self.account(self.buffer.capacity())?;
        loop {
            let unscanned = self.buffer.get(self.scanned..).unwrap_or_default();
            // `contains` looks at many bytes at once, `position` at each for itself.
            if unscanned.contains(&0)
                && let Some(found) = unscanned.iter().position(|&b| b == 0)
            {
                let end = self.scanned + found;
                if end > self.limit {
                    return Err(ReadError::TooLarge(self.limit));
                }
                let rest = self.buffer.split_off(end + 1);
                self.scanned = 0;
                let message = std::mem::replace(&mut self.buffer, rest);
                self.handed_out = countable(message.capacity());
                self.account(self.buffer.capacity())?;
                return Ok(Some(message));
            }
            self.scanned = self.buffer.len();
            if self.scanned > self.limit {
                return Err(ReadError::TooLarge(self.limit));
            }
            let length = self.buffer.len();
            if length == self.buffer.capacity() {
                // Doubled, so that a long message is not copied for each chunk, but not beyond what the
                // longest one needs.
                let most = self.limit.saturating_add(CHUNK);
                let wanted = match length {
                    0 => FIRST,
                    _ => (2 * length).min(most).max(CHUNK),
                };
                self.account(wanted)?;
                self.buffer.reserve_exact(wanted - length);
            }
            let mut read = pin!(self.stream.read_buf(&mut self.buffer));
            let waited = &mut self.waited;
            let length = std::future::poll_fn(|context| {
                let polled = read.as_mut().poll(context);
                *waited |= polled.is_pending();
                polled
            });
            if length.await? == 0 {
                return if self.buffer.is_empty() {
                    Ok(None)
                } else {
                    Err(ReadError::Io(io::ErrorKind::UnexpectedEof.into()))
                };
            }
        }
    }
}

/// What counts of a buffer: that of a short message is what every connection may have.
fn countable(capacity: usize) -> usize {
    if capacity <= CHUNK { 0 } else { capacity }
}

impl<R, B: Budget> Drop for MessageReader<R, B> {
    fn drop(&mut self) {
        self.budget.resize(self.accounted, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::pin::Pin;
    use std::task::{Context, Poll};

    use tokio::io::ReadBuf;

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap()
            .block_on(future)
    }

    #[test]
    fn splits_at_nul() {
        let mut reader = MessageReader::new(&b"{}\0[1]\0"[..], 10);
        assert_eq!(block_on(reader.next()).unwrap().unwrap(), b"{}\0");
        assert_eq!(block_on(reader.next()).unwrap().unwrap(), b"[1]\0");
        assert!(block_on(reader.next()).unwrap().is_none());
    }

    /// Hands out so many bytes at a time.
    struct Pieces<'a>(&'a [u8], usize);

    impl AsyncRead for Pieces<'_> {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buffer: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            let length = self.1.min(self.0.len()).min(buffer.remaining());
            let (piece, rest) = self.0.split_at(length);
            buffer.put_slice(piece);
            self.0 = rest;
            Poll::Ready(Ok(()))
        }
    }

    #[test]
    fn messages_of_any_length_come_whole_in_pieces_of_any_length() {
        for length in [0, FIRST - 2, FIRST - 1, FIRST, CHUNK - 1, 5 * CHUNK] {
            let message = [&vec![b'x'; length][..], b"\0"].concat();
            let sent = [&message[..], b"{}\0", &message, &message].concat();
            for piece in [1, 1000, FIRST, sent.len()] {
                let mut reader = MessageReader::new(Pieces(&sent, piece), length.max(2));
                for expected in [&message[..], b"{}\0", &message, &message] {
                    let read = block_on(reader.next()).unwrap().unwrap();
                    assert!(read == expected, "{length} {piece}");
                    assert!(read.capacity() <= length.max(CHUNK) + CHUNK);
                }
                assert!(block_on(reader.next()).unwrap().is_none());
            }
        }
    }

    #[test]
    fn a_short_message_takes_little_room() {
        let mut reader = MessageReader::new(&b"{}\0"[..], 100 * CHUNK);
        let message = block_on(reader.next()).unwrap().unwrap();
        assert!(message.capacity() <= 4096);
    }

    #[test]
    fn half_a_message_is_an_error() {
        let mut reader = MessageReader::new(&b"{"[..], 10);
        assert!(matches!(block_on(reader.next()), Err(ReadError::Io(_))));
    }

    #[derive(Debug, Clone)]
    struct Shared(std::rc::Rc<std::cell::Cell<usize>>, usize);

    impl Budget for Shared {
        fn resize(&self, from: usize, to: usize) -> bool {
            let new = self.0.get() - from + to;
            if to > from && new > self.1 {
                return false;
            }
            self.0.set(new);
            true
        }
    }

    #[test]
    fn two_readers_share_a_budget() {
        let used = Shared(std::rc::Rc::default(), 5 * CHUNK);
        let half = vec![b'x'; 3 * CHUNK];
        let whole = [&half[..], b"\0"].concat();
        let reader = |bytes| MessageReader::with_budget(bytes, 100 * CHUNK, used.clone());
        // One waits in the middle of a message, and what it holds is not there for the other.
        let mut first = reader(&half[..]);
        assert!(matches!(block_on(first.next()), Err(ReadError::Io(_))));
        assert!(used.0.get() >= half.len());
        let mut second = reader(&whole[..]);
        assert!(matches!(
            block_on(second.next()),
            Err(ReadError::OverBudget)
        ));
        drop((first, second));
        assert_eq!(used.0.get(), 0);
        let mut third = reader(&whole[..]);
        assert_eq!(block_on(third.next()).unwrap().unwrap(), whole);
        // It counts for as long as it is there.
        assert!(used.0.get() >= whole.len());
        assert!(block_on(third.next()).unwrap().is_none());
        assert_eq!(used.0.get(), 0);
        // Short messages cost nothing.
        let nothing = Shared(std::rc::Rc::default(), 0);
        let mut fourth = MessageReader::with_budget(&b"{}\0"[..], 10, nothing);
        assert_eq!(block_on(fourth.next()).unwrap().unwrap(), b"{}\0");
    }

    #[test]
    fn limit_at_n_and_one_more() {
        let mut reader = MessageReader::new(&b"1234\0"[..], 4);
        assert_eq!(block_on(reader.next()).unwrap().unwrap(), b"1234\0");
        let mut reader = MessageReader::new(&b"12345\0"[..], 4);
        assert!(matches!(
            block_on(reader.next()),
            Err(ReadError::TooLarge(4))
        ));
        let mut reader = MessageReader::new(&b"123456789"[..], 4);
        assert!(matches!(
            block_on(reader.next()),
            Err(ReadError::TooLarge(4))
        ));
    }
}
