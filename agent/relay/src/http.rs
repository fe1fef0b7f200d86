//! The client's side of CONNECT (RFC 9110, 9.3.6).

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::socks::Credentials;
use crate::target::Target;

/// How long `HTTP/1.1 200` is, in bytes.
const STATUS_BYTES: usize = 12;

/// The longest answer, in bytes, and how many fields it may have.
const ANSWER_BYTES: usize = 16 * 1024;
const FIELDS: usize = 96;

/// Why a proxy does not make a connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The connection to it broke.
    #[error("the connection to it broke: {0}")]
    Io(#[from] io::Error),
    /// It is something else.
    #[error("it does not answer as an HTTP proxy does")]
    Protocol,
    /// It wants to know who we are.
    #[error("it wants a user and a password ({0})")]
    Authentication(u16),
    /// It does not believe us.
    #[error("it refuses this user and password ({0})")]
    Credentials(u16),
    /// It does not make this connection.
    #[error("it refused ({0})")]
    Refused(u16),
}

/// Asks for a connection; what is written afterwards goes there. Returns what has come from there
/// already.
///
/// # Errors
/// If the proxy does not make it.
pub(crate) async fn connect<S>(
    stream: &mut S,
    credentials: Option<&Credentials>,
    target: &Target,
) -> Result<Vec<u8>, Error>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    stream
        .write_all(request(credentials, target).as_bytes())
        .await?;
    stream.flush().await?;
    let mut answer = Vec::with_capacity(1024);
    // Of all answers together.
    let mut room = ANSWER_BYTES;
    let mut looked_at = false;
    loop {
        let before = answer.len();
        if stream.read_buf(&mut answer).await? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        // Looked at line by line: who sends byte by byte would have it read from its beginning for each. What is no
        // answer at all shows at once.
        let new = answer.get(before..).unwrap_or_default();
        if looked_at && answer.len() > STATUS_BYTES && !new.contains(&b'\n') {
            match answer.len() < room {
                true => continue,
                false => return Err(Error::Protocol),
            }
        }
        looked_at = answer.len() >= STATUS_BYTES;
        // Others may come before the one that says whether it worked (RFC 9110, 15.2).
        let (length, code) = loop {
            let mut fields = [httparse::EMPTY_HEADER; FIELDS];
            let mut response = httparse::Response::new(&mut fields);
            match response.parse(&answer) {
                Ok(httparse::Status::Complete(length)) => match response.code {
                    Some(100 | 102..=199) => {
                        room = room.checked_sub(length).ok_or(Error::Protocol)?;
                        answer.drain(..length);
                    }
                    code => break (Some(length), code),
                },
                Ok(httparse::Status::Partial) if answer.len() < room => break (None, None),
                _ => return Err(Error::Protocol),
            }
        };
        if let Some(length) = length {
            return match code {
                Some(200..=299) => Ok(answer.split_off(length)),
                // 407 is the right one, but tinyproxy says 401 to a wrong password.
                Some(code @ (401 | 407)) => Err(match credentials {
                    Some(_) => Error::Credentials(code),
                    None => Error::Authentication(code),
                }),
                Some(code) => Err(Error::Refused(code)),
                None => Err(Error::Protocol),
            };
        }
    }
}

fn request(credentials: Option<&Credentials>, target: &Target) -> String {
    // A name comes from a DNS query; `fake::is_host` has let nothing through that would end a line.
    let target = target.to_string();
    let authorisation = credentials.map_or_else(String::new, |credentials| {
        let pair = format!("{}:{}", credentials.user, credentials.password);
        let encoded = base64(pair.as_bytes());
        format!("Proxy-Authorization: Basic {encoded}\r\n")
    });
    format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{authorisation}\r\n")
}

/// Base 64 (RFC 4648, 4).
fn base64(bytes: &[u8]) -> String {
    const DIGITS: [u8; 64] = *b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let word = group
            .iter()
            .zip([16, 8, 0])
            .fold(0_u32, |word, (&byte, shift)| {
                word | u32::from(byte) << shift
            });
        for (place, shift) in [18, 12, 6, 0].into_iter().enumerate() {
            let digit = DIGITS.get((word >> shift & 63) as usize);
            match digit.filter(|_| place <= group.len()) {
                Some(&digit) => text.push(char::from(digit)),
                None => text.push('='),
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    async fn answered(answer: &[u8]) -> Result<Vec<u8>, Error> {
        answered_to(None, answer).await
    }

    async fn answered_to(who: Option<&Credentials>, answer: &[u8]) -> Result<Vec<u8>, Error> {
        let mut stream = tokio::io::join(answer, tokio::io::sink());
        let target = Target::Name("example.org".into(), 443);
        connect(&mut stream, who, &target).await
    }

    #[tokio::test]
    async fn reads_answers() {
        let answer = b"HTTP/1.1 200 Connection established\r\nVia: x\r\n\r\nearly";
        assert_eq!(answered(answer).await.unwrap(), b"early");
        let answer = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n\
                       HTTP/1.1 200 OK\r\n\r\nearly";
        assert_eq!(answered(answer).await.unwrap(), b"early");
        // Whatever the pieces.
        for first in 0..=answer.len() {
            let (head, tail) = answer.split_at(first);
            let pieces = tokio::io::AsyncReadExt::chain(head, tail);
            let mut stream = tokio::io::join(pieces, tokio::io::sink());
            let target = Target::Name("example.org".into(), 443);
            let mut early = connect(&mut stream, None, &target).await.unwrap();
            stream.read_to_end(&mut early).await.unwrap();
            assert_eq!(early, b"early");
        }
        let endless = b"HTTP/1.1 102 Processing\r\n\r\n".repeat(ANSWER_BYTES / 27 + 1);
        let error = answered(&endless).await.unwrap_err();
        assert!(matches!(error, Error::Protocol), "{error}");
        for (answer, expected) in [
            ("HTTP/1.1 101 No\r\n\r\n", "it refused (101)"),
            (
                "SSH-2.0-a banner without an end",
                "it does not answer as an HTTP proxy does",
            ),
            ("HTTP/1.0 502 Bad Gateway\r\n\r\n", "it refused (502)"),
            ("\x05\x01", "it does not answer as an HTTP proxy does"),
            (
                "HTTP/1.1 200 O",
                "the connection to it broke: unexpected end of file",
            ),
        ] {
            let error = answered(answer.as_bytes()).await.unwrap_err();
            assert_eq!(error.to_string(), expected);
        }
        let endless = format!("HTTP/1.1 200 OK\r\nx: {}", "y".repeat(ANSWER_BYTES));
        let error = answered(endless.as_bytes()).await.unwrap_err();
        assert!(matches!(error, Error::Protocol));
    }

    fn credentials() -> Credentials {
        Credentials {
            user: "Aladdin".into(),
            password: "open sesame".into(),
        }
    }

    #[tokio::test]
    async fn who_says_nothing_is_not_told_that_it_was_wrong() {
        let credentials = credentials();
        for code in [401, 407] {
            let answer = format!("HTTP/1.1 {code} No\r\n\r\n");
            let error = answered(answer.as_bytes()).await.unwrap_err();
            let expected = format!("it wants a user and a password ({code})");
            assert_eq!(error.to_string(), expected);
            let error = answered_to(Some(&credentials), answer.as_bytes()).await;
            let expected = format!("it refuses this user and password ({code})");
            assert_eq!(error.unwrap_err().to_string(), expected);
        }
    }

    #[test]
    fn says_who_it_is() {
        let credentials = credentials();
        let target = Target::Address("[2001:db8::1]:443".parse().unwrap());
        assert_eq!(
            request(Some(&credentials), &target),
            "CONNECT [2001:db8::1]:443 HTTP/1.1\r\nHost: [2001:db8::1]:443\r\n\
             Proxy-Authorization: Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==\r\n\r\n"
        );
        for (plain, encoded) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v")] {
            assert_eq!(base64(plain.as_bytes()), encoded);
        }
    }

    proptest! {
        #[test]
        fn no_answer_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let _ = runtime.block_on(answered(&bytes));
        }
    }
}
