//! Much, there and back, each byte compared.

use std::io::{Error, Read, Result, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::thread;

/// The length of what is repeated, a prime: no buffer's length divides it, so no block can be where another should.
const PERIOD: usize = 1_048_573;

/// What is repeated.
fn pattern() -> Vec<u8> {
    let mut state = 1_u32;
    std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    })
    .take(PERIOD)
    .collect()
}

/// Sends so many bytes, ends that direction, and reads as many back until the other one ends.
pub(super) fn run(to: SocketAddr, bytes: u64) -> Result<()> {
    let mut stream = TcpStream::connect(to)?;
    let mut sender = stream.try_clone()?;
    let send = thread::spawn(move || send(&mut sender, bytes));
    let count = receive(&mut stream)?;
    send.join().expect("the sender")?;
    assert_eq!(count, bytes, "so many came back");
    Ok(())
}

/// Hears what the server says until it ends that direction; then sends so many bytes, and ends the other one.
pub(super) fn hear_out(to: SocketAddr, greeting: &str, bytes: u64) -> Result<()> {
    let mut stream = TcpStream::connect(to)?;
    let mut heard = Vec::new();
    stream.read_to_end(&mut heard)?;
    assert_eq!(heard, greeting.as_bytes(), "what the server said");
    send(&mut stream, bytes)
}

/// Sends so many bytes, and ends that direction.
pub(crate) fn send(stream: &mut TcpStream, bytes: u64) -> Result<()> {
    let pattern = pattern();
    let mut left = bytes;
    while left > 0 {
        let piece = left.min(PERIOD as u64) as usize;
        stream.write_all(&pattern[..piece])?;
        left -= piece as u64;
    }
    stream.shutdown(Shutdown::Write)
}

/// Receives what [`send`] sends until it ends: how many bytes that was.
pub(crate) fn receive(stream: &mut TcpStream) -> Result<u64> {
    let pattern = pattern();
    let mut buffer = vec![0; 1 << 18];
    let mut count = 0;
    let mut at = 0;
    loop {
        let length = stream.read(&mut buffer)?;
        if length == 0 {
            return Ok(count);
        }
        let mut received = &buffer[..length];
        while !received.is_empty() {
            let piece = received.len().min(PERIOD - at);
            if received[..piece] != pattern[at..at + piece] {
                return Err(Error::other(format!("other bytes after {count}")));
            }
            received = &received[piece..];
            at = (at + piece) % PERIOD;
        }
        count += length as u64;
    }
}
