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

/// The longest name, user and password there can be: their lengths are one byte.
pub(crate) const FIELD_BYTES: usize = 255;

/// Who to say that one is, and how to prove it: neither is empty nor longer than [`FIELD_BYTES`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The user.
    pub user: String,
    /// The password.
    pub password: String,
}

/// Why a server does not do what it is asked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The connection to it broke.
    #[error("the connection to it broke: {0}")]
    Io(#[from] io::Error),
    /// It is something else.
    #[error("it does not speak SOCKS5")]
    Protocol,
    /// It wants to know more of us than we can tell.
    #[error("it wants a user and a password")]
    Authentication,
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

/// Agrees with a server on who we are.
async fn greet<S>(stream: &mut S, credentials: Option<&Credentials>) -> Result<(), Error>
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
        (VERSION, PASSWORD | NONE_ACCEPTABLE, _) => Err(Error::Authentication),
        _ => Err(Error::Protocol),
    }
}

/// Asks for a connection; what is written afterwards goes there.
///
/// # Errors
/// If the server does not make it.
pub(crate) async fn connect<S>(
    stream: &mut S,
    credentials: Option<&Credentials>,
    target: &Target,
) -> Result<(), Error>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    greet(stream, credentials).await?;
    request(stream, CONNECT, target).await?;
    Ok(())
}

/// Asks for somebody to send datagrams to; returns where that is. It ends with the connection.
///
/// # Errors
/// If the server has none.
pub(crate) async fn associate<S>(
    stream: &mut S,
    credentials: Option<&Credentials>,
) -> Result<SocketAddr, Error>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    greet(stream, credentials).await?;
    // Where the datagrams will come from is not known yet: RFC 1928, 7 has zeros for that.
    let unknown = Target::Address(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0));
    match request(stream, UDP_ASSOCIATE, &unknown).await? {
        Target::Address(address) => Ok(address),
        Target::Name(..) => Err(Error::Protocol),
    }
}

async fn request<S>(stream: &mut S, command: u8, target: &Target) -> Result<Target, Error>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut message = vec![VERSION, command, 0];
    put(&mut message, target)?;
    stream.write_all(&message).await?;
    let [version, code, _, kind] = read(stream).await?;
    if version != VERSION {
        return Err(Error::Protocol);
    }
    if code != 0 {
        return Err(Error::Refused(code));
    }
    let address: IpAddr = match kind {
        IPV4 => Ipv4Addr::from(read::<4, _>(stream).await?).into(),
        IPV6 => Ipv6Addr::from(read::<16, _>(stream).await?).into(),
        NAME => {
            let [length] = read(stream).await?;
            let mut name = vec![0; usize::from(length)];
            stream.read_exact(&mut name).await?;
            let port = u16::from_be_bytes(read(stream).await?);
            return Ok(Target::Name(String::from_utf8_lossy(&name).into(), port));
        }
        _ => return Err(Error::Protocol),
    };
    let port = u16::from_be_bytes(read(stream).await?);
    Ok(Target::Address(SocketAddr::new(address, port)))
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
    let (&[_, _, fragment, kind], rest) = datagram.split_first_chunk()?;
    if fragment != 0 {
        return None;
    }
    let (address, rest): (Option<IpAddr>, _) = match kind {
        IPV4 => {
            let (octets, rest) = rest.split_first_chunk::<4>()?;
            (Some(Ipv4Addr::from(*octets).into()), rest)
        }
        IPV6 => {
            let (octets, rest) = rest.split_first_chunk::<16>()?;
            (Some(Ipv6Addr::from(*octets).into()), rest)
        }
        NAME => {
            let (&length, rest) = rest.split_first()?;
            (None, rest.get(usize::from(length)..)?)
        }
        _ => return None,
    };
    let (port, payload) = rest.split_first_chunk()?;
    let port = u16::from_be_bytes(*port);
    Some((address.map(|ip| SocketAddr::new(ip, port)), payload))
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
        let result = tokio::time::timeout(
            std::time::Duration::from_secs(5),
            connect(&mut ours, credentials, &target),
        );
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
        assert!(matches!(
            said(b"HTTP/1.1", None).await.1,
            Err(Error::Protocol)
        ));
        let refused = said(&[5, 0, 5, 5, 0, 1, 0, 0, 0, 0, 0, 0], None).await.1;
        assert!(matches!(refused, Err(Error::Refused(5))));
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
                let _ = connect(&mut stream, None, &target).await;
                let mut stream = tokio::io::join(&bytes[..], tokio::io::sink());
                let _ = associate(&mut stream, None).await;
            });
        }
    }
}
