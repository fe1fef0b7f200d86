//! Much, there and back, each byte compared.

use std::io::{Error, Read, Result, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::thread;

/// The length of what is repeated, a prime: no buffer's length divides it, so no block can be where another should.
const PERIOD: usize = 1_048_573;

/// Sends so many bytes, ends that direction, and reads as many back until the other one ends.
pub(super) fn run(to: SocketAddr, bytes: u64) -> Result<()> {
    let mut state = 1_u32;
    let pattern: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    })
    .take(PERIOD)
    .collect();
    let mut stream = TcpStream::connect(to)?;
    let mut sender = stream.try_clone()?;
    let sent = pattern.clone();
    let send = thread::spawn(move || {
        let mut left = bytes;
        while left > 0 {
            let piece = left.min(PERIOD as u64) as usize;
            sender.write_all(&sent[..piece])?;
            left -= piece as u64;
        }
        sender.shutdown(Shutdown::Write)
    });
    let mut buffer = vec![0; 1 << 18];
    let mut count = 0;
    let mut at = 0;
    loop {
        let length = stream.read(&mut buffer)?;
        if length == 0 {
            break;
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
    send.join().expect("the sender")?;
    assert_eq!(count, bytes, "so many came back");
    Ok(())
}
