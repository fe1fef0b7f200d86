//! Varlink's framing: JSON objects that end with a NUL byte (varlink.org, Method-Call).

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt};

/// How much is asked of the kernel at once; also what an idle connection keeps.
const CHUNK: usize = 16 * 1024;

/// Why no message could be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The connection broke, or ended within a message.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The message is longer than the limit, in bytes. What follows cannot be read any more.
    #[error("a message is longer than {0} bytes")]
    TooLarge(usize),
}

/// Reads messages from a stream and holds no more of it than one message of the allowed length.
#[derive(Debug)]
pub struct MessageReader<R> {
    stream: R,
    buffer: Vec<u8>,
    /// How much of `buffer` is known to have no NUL.
    scanned: usize,
    limit: usize,
}

impl<R: AsyncRead + Unpin> MessageReader<R> {
    /// Messages of `stream` of at most `limit` bytes each, their NULs not counted.
    pub fn new(stream: R, limit: usize) -> Self {
        Self {
            stream,
            buffer: Vec::new(),
            scanned: 0,
            limit,
        }
    }

    /// The next message, its NUL included; none at the end of the stream. Cancel safe: what has
    /// been read stays for the next call.
    ///
    /// # Errors
    /// If the stream fails or ends in the middle of a message, or the message is too long.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, ReadError> {
        loop {
            let unscanned = self.buffer.get(self.scanned..).unwrap_or_default();
            if let Some(found) = unscanned.iter().position(|&b| b == 0) {
                let end = self.scanned + found;
                if end > self.limit {
                    return Err(ReadError::TooLarge(self.limit));
                }
                let rest = self.buffer.split_off(end + 1);
                self.scanned = 0;
                return Ok(Some(std::mem::replace(&mut self.buffer, rest)));
            }
            self.scanned = self.buffer.len();
            if self.scanned > self.limit {
                return Err(ReadError::TooLarge(self.limit));
            }
            self.buffer.reserve(CHUNK);
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return if self.buffer.is_empty() {
                    Ok(None)
                } else {
                    Err(ReadError::Io(io::ErrorKind::UnexpectedEof.into()))
                };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn half_a_message_is_an_error() {
        let mut reader = MessageReader::new(&b"{"[..], 10);
        assert!(matches!(block_on(reader.next()), Err(ReadError::Io(_))));
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
