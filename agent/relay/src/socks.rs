//! The client's side of SOCKS5 (RFC 1928), with passwords (RFC 1929).
//!
//! Written here because it is what the relay is for, and because what there is for tokio has either no UDP
//! or a fixed-width cast for lengths and single writes that may be short.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::target::Target;

const VERSION: u8 = 5;
const NO_AUTHENTICATION: u8 = 0;
const PASSWORD: u8 = 2;
const NONE_ACCEPTABLE: u8 = 0xff;
/// The version of the exchange of passwords (RFC 1929, 2).
const PASSWORD_VERSION: u8 = 1;
const CONNECT: u8 = 1;
const UDP_ASSOCIATE: u8 = 3;
const IPV4: u8 = 1;
const NAME: u8 = 3;
const IPV6: u8 = 4;

/// Room for the longest answer: 4 bytes, a name and its length, a port.
const ANSWER_BYTES: usize = 4 + 1 + FIELD_BYTES + 2;

/// The longest name, user and password there can be: their lengths are one byte.
pub(crate) const FIELD_BYTES: usize = 255;

/// Who to say that one is, and how to prove it: neither is empty nor longer than `FIELD_BYTES`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Credentials {
    /// The user.
    pub user: String,
    /// The password.
    pub password: String,
}

/// Why a server does not do what it is asked for.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The connection to it broke.
    #[error("the connection to it broke: {0}")]
    Io(#[from] io::Error),
    /// It is something else.
    #[error("it does not speak SOCKS5")]
    Protocol,
    /// It wants to know who we are.
    #[error("it wants a user and a password")]
    Authentication,
    /// It wants to know that in another way than we can tell.
    #[error("it accepts neither a user and a password nor a client without them")]
    Method,
    /// It does not believe us.
    #[error("it refuses this user and password")]
    Credentials,
    /// The name is longer than 255 bytes.
    #[error("the name is too long for SOCKS5")]
    NameTooLong,
    /// It does not do this for anybody, or not for this destination.
    #[error("{}", reason(*.0))]
    Refused(u8),
}

/// Reply codes (RFC 1928, 6).
fn reason(code: u8) -> &'static str {
    match code {
        1 => "it failed",
        2 => "its rules forbid it",
        3 => "the network is unreachable from there",
        4 => "the host is unreachable from there",
        5 => "the connection was refused there",
        6 => "the time to live expired there",
        7 => "it does not support this command",
        8 => "it does not support this kind of address",
        _ => "it refused",
    }
}

/// Agrees with a server on who we are; requests come after that.
///
/// # Errors
/// If it is none, or wants somebody else.
pub(crate) async fn greet<S>(stream: &mut S, credentials: Option<&Credentials>) -> Result<(), Error>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let methods: &[u8] = match credentials {
        Some(_) => &[VERSION, 2, NO_AUTHENTICATION, PASSWORD],
        None => &[VERSION, 1, NO_AUTHENTICATION],
    };
    stream.write_all(methods).await?;
    let [version, method] = read(stream).await?;
    match (version, method, credentials) {
        (VERSION, NO_AUTHENTICATION, _) => Ok(()),
        (VERSION, PASSWORD, Some(Credentials { user, password })) => {
            let mut message = vec![PASSWORD_VERSION];
            for field in [user, password] {
                let length = u8::try_from(field.len()).map_err(|_| Error::Credentials)?;
                message.push(length);
                message.extend_from_slice(field.as_bytes());
            }
            stream.write_all(&message).await?;
            match read(stream).await? {
                [_, 0] => Ok(()),
                _ => Err(Error::Credentials),
            }
        }
        (VERSION, PASSWORD | NONE_ACCEPTABLE, None) => Err(Error::Authentication),
        (VERSION, NONE_ACCEPTABLE, Some(_)) => Err(Error::Method),
        _ => Err(Error::Protocol),
    }
}

/// Asks for a connection; what is written afterwards goes there. Returns what has come from there already.
///
/// # Errors
/// If the server does not make it.
pub(crate) async fn connect<S>(stream: &mut S, target: &Target) -> Result<Vec<u8>, Error>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (_, early) = request(stream, CONNECT, target).await?;
    Ok(early)
}

/// Asks for somebody to send datagrams to, over IPv6 or not; returns where that is. It ends with the connection.
///
/// # Errors
/// If the server has none.
pub(crate) async fn associate<S>(stream: &mut S, ipv6: bool) -> Result<SocketAddr, Error>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    // Where the datagrams will come from is not known yet: RFC 1928, 7 has zeros for that. Dante takes those of one
    // family as the wish for an address of that.
    let unspecified = match ipv6 {
        true => Ipv6Addr::UNSPECIFIED.into(),
        false => Ipv4Addr::UNSPECIFIED.into(),
    };
    let unknown = Target::Address(SocketAddr::new(unspecified, 0));
    let (address, _) = request(stream, UDP_ASSOCIATE, &unknown).await?;
    address.ok_or(Error::Protocol)
}

/// Returns the address that the server answers with, none if it is a name, and what has come after its answer.
async fn request<S>(
    stream: &mut S,
    command: u8,
    target: &Target,
) -> Result<(Option<SocketAddr>, Vec<u8>), Error>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut message = vec![VERSION, command, 0];
    put(&mut message, target)?;
    stream.write_all(&message).await?;
    // One read(2) for nearly every answer.
    let mut answer = Vec::with_capacity(ANSWER_BYTES);
    loop {
        if stream.read_buf(&mut answer).await? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        let (code, rest) = match *answer {
            [VERSION, code, _, ref rest @ ..] => (code, rest),
            [] | [VERSION] | [VERSION, _] => continue,
            _ => return Err(Error::Protocol),
        };
        if code != 0 {
            return Err(Error::Refused(code));
        }
        match take_address(rest) {
            Ok((address, rest)) => return Ok((address, rest.to_vec())),
            // The longest address fits in, so this ends.
            Err(Malformed::Short) => {}
            Err(Malformed::Kind) => return Err(Error::Protocol),
        }
    }
}

async fn read<const N: usize, S: AsyncRead + Unpin>(stream: &mut S) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).await?;
    Ok(bytes)
}

/// Writes an address as SOCKS5 has it.
fn put(message: &mut Vec<u8>, target: &Target) -> Result<(), Error> {
    let port = match target {
        Target::Address(address) => {
            match address.ip() {
                IpAddr::V4(ip) => {
                    message.push(IPV4);
                    message.extend_from_slice(&ip.octets());
                }
                IpAddr::V6(ip) => {
                    message.push(IPV6);
                    message.extend_from_slice(&ip.octets());
                }
            }
            address.port()
        }
        Target::Name(name, port) => {
            let length = u8::try_from(name.len()).map_err(|_| Error::NameTooLong)?;
            message.extend_from_slice(&[NAME, length]);
            message.extend_from_slice(name.as_bytes());
            *port
        }
    };
    message.extend_from_slice(&port.to_be_bytes());
    Ok(())
}

/// Writes the header of a datagram to `target` (RFC 1928, 7), in front of which nothing is.
///
/// # Errors
/// If the target's name is too long.
pub(crate) fn datagram_header(target: &Target) -> Result<Vec<u8>, Error> {
    let mut header = vec![0, 0, 0];
    put(&mut header, target)?;
    Ok(header)
}

/// Takes a datagram from a server apart: whence it comes, none if that is a name, and what is in it.
/// None if it makes no sense, or is a fragment.
pub(crate) fn parse_datagram(datagram: &[u8]) -> Option<(Option<SocketAddr>, &[u8])> {
    let (&[_, _, fragment], rest) = datagram.split_first_chunk()?;
    if fragment != 0 {
        return None;
    }
    take_address(rest).ok()
}

/// Why there is no address in front of some bytes.
enum Malformed {
    /// There are too few of them.
    Short,
    /// There is no such kind of address.
    Kind,
}

/// Reads an address as SOCKS5 has it, none if that is a name; returns what comes after it.
fn take_address(bytes: &[u8]) -> Result<(Option<SocketAddr>, &[u8]), Malformed> {
    fn take<const N: usize>(bytes: &[u8]) -> Result<([u8; N], &[u8]), Malformed> {
        let (taken, rest) = bytes.split_first_chunk().ok_or(Malformed::Short)?;
        Ok((*taken, rest))
    }
    let ([kind], rest) = take(bytes)?;
    let (address, rest): (Option<IpAddr>, _) = match kind {
        IPV4 => {
            let (octets, rest) = take::<4>(rest)?;
            (Some(octets.into()), rest)
        }
        IPV6 => {
            let (octets, rest) = take::<16>(rest)?;
            // A server whose sockets are of both families may write an address of IPv4 so.
            (Some(IpAddr::from(octets).to_canonical()), rest)
        }
        NAME => {
            let ([length], rest) = take(rest)?;
            let rest = rest.get(usize::from(length)..);
            (None, rest.ok_or(Malformed::Short)?)
        }
        _ => return Err(Malformed::Kind),
    };
    let (port, rest) = take(rest)?;
    let port = u16::from_be_bytes(port);
    Ok((address.map(|ip| SocketAddr::new(ip, port)), rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn datagrams_are_read_as_they_are_written() {
        for address in ["192.0.2.1:53", "[2001:db8::1]:443"] {
            let address: SocketAddr = address.parse().unwrap();
            let mut datagram = datagram_header(&Target::Address(address)).unwrap();
            datagram.extend_from_slice(b"payload");
            let parsed = parse_datagram(&datagram);
            assert_eq!(parsed, Some((Some(address), &b"payload"[..])));
            datagram[2] = 1;
            assert_eq!(parse_datagram(&datagram), None);
        }
        let mapped = Target::Address("[::ffff:192.0.2.1]:53".parse().unwrap());
        let mapped = datagram_header(&mapped).unwrap();
        let plain: SocketAddr = "192.0.2.1:53".parse().unwrap();
        assert_eq!(parse_datagram(&mapped), Some((Some(plain), &b""[..])));
        let name = Target::Name("example.org".into(), 80);
        let header = datagram_header(&name).unwrap();
        assert_eq!(parse_datagram(&header), Some((None, &b""[..])));
        let long = Target::Name("x".repeat(256).into(), 80);
        assert!(matches!(datagram_header(&long), Err(Error::NameTooLong)));
    }

    /// What the relay says to a server that answers with `answers`.
    async fn said(
        answers: &[u8],
        credentials: Option<&Credentials>,
    ) -> (Vec<u8>, Result<(), Error>) {
        let (mut ours, mut theirs) = tokio::io::duplex(4096);
        theirs.write_all(answers).await.unwrap();
        let target = Target::Address("192.0.2.1:80".parse().unwrap());
        let asked = async {
            greet(&mut ours, credentials).await?;
            connect(&mut ours, &target).await.map(drop)
        };
        let result = tokio::time::timeout(std::time::Duration::from_secs(5), asked);
        let result = result.await.unwrap();
        drop(ours);
        let mut said = Vec::new();
        theirs.read_to_end(&mut said).await.unwrap();
        (said, result)
    }

    #[tokio::test]
    async fn connects_with_and_without_a_password() {
        let granted = [5, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        let request = [5, 1, 0, 1, 192, 0, 2, 1, 0, 80];
        let (told, result) = said(&[&[5, 0][..], &granted].concat(), None).await;
        result.unwrap();
        assert_eq!(told, [&[5, 1, 0][..], &request].concat());
        let credentials = Credentials {
            user: "me".into(),
            password: "pw".into(),
        };
        let answers = [&[5, 2, 1, 0][..], &granted].concat();
        let (told, result) = said(&answers, Some(&credentials)).await;
        result.unwrap();
        let expected = [&[5, 2, 0, 2, 1, 2][..], b"me", &[2], b"pw", &request].concat();
        assert_eq!(told, expected);
        assert!(matches!(
            said(&[5, 2, 1, 1], Some(&credentials)).await.1,
            Err(Error::Credentials)
        ));
        assert!(matches!(
            said(&[5, 0xff], None).await.1,
            Err(Error::Authentication)
        ));
        let error = said(&[5, 0xff], Some(&credentials)).await.1.unwrap_err();
        assert_eq!(
            error.to_string(),
            "it accepts neither a user and a password nor a client without them"
        );
        assert!(matches!(
            said(b"HTTP/1.1", None).await.1,
            Err(Error::Protocol)
        ));
        let refused = said(&[5, 0, 5, 5, 0, 1, 0, 0, 0, 0, 0, 0], None).await.1;
        assert!(matches!(refused, Err(Error::Refused(5))));
    }

    /// However an answer comes in pieces, what comes after it belongs to the application.
    #[tokio::test]
    async fn what_follows_the_answer_is_kept() {
        let target = Target::Address("192.0.2.1:80".parse().unwrap());
        let addresses: [&[u8]; 3] = [
            &[1, 192, 0, 2, 1, 0, 80],
            &[4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 80],
            &[3, 1, b'x', 0, 80],
        ];
        for address in addresses {
            let answer = [&[5, 0, 0], address, b"early"].concat();
            for first in 0..=answer.len() {
                let (head, tail) = answer.split_at(first);
                let pieces = tokio::io::AsyncReadExt::chain(head, tail);
                let mut stream = tokio::io::join(pieces, tokio::io::sink());
                let mut early = connect(&mut stream, &target).await.unwrap();
                stream.read_to_end(&mut early).await.unwrap();
                assert_eq!(early, b"early");
            }
        }
    }

    proptest! {
        #[test]
        fn no_datagram_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse_datagram(&bytes);
        }

        #[test]
        fn no_answer_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async {
                let mut stream = tokio::io::join(&bytes[..], tokio::io::sink());
                let target = Target::Name("example.org".into(), 1);
                let _ = connect(&mut stream, &target).await;
                let mut stream = tokio::io::join(&bytes[..], tokio::io::sink());
                let _ = associate(&mut stream, false).await;
            });
        }
    }
}
