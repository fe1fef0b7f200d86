//! The proxies that connections are carried on to.

mod owner;
mod reach;
mod spares;

use std::cell::RefCell;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::client::TlsStream;

use crate::http;
use crate::sockets::set_options;
use crate::socks::{self, Credentials};
use crate::target::Target;
use crate::tls::Tls;
use reach::{LookUp, reach};
use spares::Spares;

/// How long a proxy may take to accept a connection, to agree on TLS, and to greet: it needs nobody else for any of
/// them.
const CONNECT: Duration = Duration::from_secs(10);

/// How long certificates that could not be read are not looked for again.
const CERTIFICATES: Duration = Duration::from_secs(10);

/// How long a proxy may take to reach a destination. Some go a long way (Tor), and some destinations never answer; nobody
/// waits longer than this for a page.
const REACH: Duration = Duration::from_secs(60);

/// How long a connection may stay without an answer until its proxy counts as down, unless the proxy has answered on
/// another one since.
pub(crate) const SILENCE: Duration = Duration::from_secs(10);

/// Why UDP is not carried on by one.
const NO_UDP: &str = "an HTTP proxy carries no UDP";

/// How a proxy is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// SOCKS5.
    Socks5,
    /// HTTP CONNECT.
    Http,
    /// HTTP CONNECT, within TLS.
    Https,
}

/// A proxy that connections are carried on to.
#[derive(Debug)]
pub(crate) struct Upstream {
    /// Its name in the user's configuration.
    pub name: String,
    /// How it is spoken to.
    pub protocol: Protocol,
    /// Its address or name.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// Who to say that one is.
    pub credentials: Option<Credentials>,
    /// Whose it may be on this machine, beside the user's own, root's and system users'.
    users: Arc<[u32]>,
    look_up: LookUp,
    tls: RefCell<Option<Certificates>>,
    spares: Spares,
}

/// Why a connection was not carried on.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum Error {
    /// The proxy is not there, or no proxy of its kind: nothing gets through.
    #[error("{0}")]
    Down(String),
    /// It does not carry this one on.
    #[error("{0}")]
    Refused(String),
    /// It ended the connection where an answer was due.
    #[error("it ended the connection")]
    Ended,
    /// It takes connections, and says nothing about this one.
    #[error("it does not answer")]
    Silent,
}

/// A connection to a destination, through a proxy.
#[derive(Debug)]
pub(crate) enum Stream {
    /// As it is.
    Tcp(TcpStream),
    /// Within TLS.
    Tls(Box<TlsStream<TcpStream>>),
}

impl Stream {
    /// What it all goes over.
    pub(crate) fn tcp(&self) -> &TcpStream {
        match self {
            Self::Tcp(stream) => stream,
            Self::Tls(stream) => stream.get_ref().0,
        }
    }
}

impl Upstream {
    /// A proxy, which is not spoken to yet.
    pub(crate) fn new(
        name: String,
        protocol: Protocol,
        host: String,
        port: u16,
        credentials: Option<Credentials>,
    ) -> Self {
        Self {
            name,
            protocol,
            host,
            port,
            credentials,
            users: Arc::default(),
            look_up: LookUp::default(),
            tls: RefCell::default(),
            spares: Spares::default(),
        }
    }

    /// The same, which on this machine may be one of these users' too.
    pub(crate) fn of_users(self, users: Arc<[u32]>) -> Self {
        Self { users, ..self }
    }

    /// Whether the other one is the same in all that matters.
    pub(crate) fn is_same_as(&self, other: &Self) -> bool {
        (&self.host, self.port, self.protocol) == (&other.host, other.port, other.protocol)
            && (&self.credentials, &self.users) == (&other.credentials, &other.users)
    }

    /// A connection to `target`, and what has come from there already.
    ///
    /// # Errors
    /// If the proxy is not there, or does not carry it on.
    pub(crate) async fn connect(&self, target: &Target) -> Result<(Stream, Vec<u8>), Error> {
        let ask = async |stream: &mut Stream| match stream {
            Stream::Tcp(stream) => self.ask(stream, target).await,
            Stream::Tls(stream) => self.ask(stream.as_mut(), target).await,
        };
        self.opened(ask).await
    }

    /// A connection to the proxy and what it has answered on it.
    async fn opened<T>(
        &self,
        ask: impl AsyncFn(&mut Stream) -> Result<T, Error>,
    ) -> Result<(Stream, T), Error> {
        if let Some(mut stream) = self.spares.take() {
            match ask(&mut stream).await {
                // The proxy has closed the spare connection. None of the application's data has been sent on it yet.
                Err(error @ (Error::Down(_) | Error::Ended)) => {
                    tracing::debug!("a connection was of no use: {error}");
                }
                answer => return Ok((stream, answer?)),
            }
        }
        let mut stream = self.open().await?;
        let answer = ask(&mut stream).await?;
        Ok((stream, answer))
    }

    #[cfg(test)]
    pub(crate) fn spares(&self) -> &Spares {
        &self.spares
    }

    /// Makes a connection for whoever needs one next. To be called within a `LocalSet`.
    pub(crate) fn prepare(self: &Rc<Self>) {
        if !self.spares.wants() {
            return;
        }
        let upstream = Rc::downgrade(self);
        tokio::task::spawn_local(async move {
            // Only this task holds the upstream for that long: if it is replaced, its spare connections go with it.
            let number = {
                let Some(upstream) = upstream.upgrade() else {
                    return;
                };
                let opened = upstream.open().await;
                upstream.spares.add(opened.ok())
            };
            let Some(number) = number else { return };
            sleep(spares::IDLE).await;
            if let Some(upstream) = upstream.upgrade() {
                upstream.spares.remove(number);
            }
        });
    }

    async fn ask<S>(&self, stream: &mut S, target: &Target) -> Result<Vec<u8>, Error>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let asked = async {
            Ok::<_, Error>(match self.protocol {
                Protocol::Socks5 => socks::connect(stream, target).await?,
                Protocol::Http | Protocol::Https => {
                    http::connect(stream, self.credentials.as_ref(), target).await?
                }
            })
        };
        timeout(REACH, asked).await.unwrap_or(Err(Error::Silent))
    }

    /// Somebody to send datagrams to: where that is, and the connection that it ends with.
    ///
    /// # Errors
    /// If the proxy has no such thing.
    pub(crate) async fn associate(&self) -> Result<(TcpStream, SocketAddr), Error> {
        if self.protocol != Protocol::Socks5 {
            return Err(Error::Refused(NO_UDP.into()));
        }
        let ask = async |stream: &mut Stream| {
            let Stream::Tcp(stream) = stream else {
                return Err(Error::Refused(NO_UDP.into()));
            };
            let peer = stream.peer_addr().map_err(down)?;
            let asked = timeout(CONNECT, socks::associate(stream, peer.is_ipv6())).await;
            let mut relay = asked.map_err(|_| Error::Silent)??;
            let own = stream.local_addr().map_err(down)?;
            let is_near = peer.ip().is_loopback() || own.ip() == peer.ip();
            // A server elsewhere is not to choose who here gets datagrams.
            if is_nobodys(relay.ip()) || !is_near && is_here(relay) {
                relay.set_ip(peer.ip());
            }
            Ok(relay)
        };
        match self.opened(ask).await? {
            (Stream::Tcp(stream), relay) => Ok((stream, relay)),
            (Stream::Tls(_), _) => Err(Error::Refused(NO_UDP.into())),
        }
    }

    /// A connection to the proxy, on which it waits for a request.
    async fn open(&self) -> Result<Stream, Error> {
        let mut stream = self.dial().await?;
        if let (Protocol::Socks5, Stream::Tcp(stream)) = (self.protocol, &mut stream) {
            let greeted = socks::greet(stream, self.credentials.as_ref());
            match timeout(CONNECT, greeted).await {
                Ok(greeted) => greeted.map_err(|error| Error::Down(error.to_string()))?,
                Err(_) => return Err(Error::Down("it does not answer".into())),
            }
        }
        Ok(stream)
    }

    async fn dial(&self) -> Result<Stream, Error> {
        let (host, port) = (self.host.clone(), self.port);
        let addresses = self.look_up.find(async move {
            let addresses = lookup_host((host, port)).await?;
            Ok(addresses.collect())
        });
        let stream = reach(addresses, &self.users).await?;
        set_options(&stream).map_err(down)?;
        if self.protocol != Protocol::Https {
            return Ok(Stream::Tcp(stream));
        }
        let tls = self.tls(Tls::load).map_err(down)?;
        match timeout(CONNECT, tls.connect(&self.host, stream)).await {
            Ok(stream) => Ok(Stream::Tls(Box::new(stream.map_err(down)?))),
            Err(_) => Err(Error::Down("it does not answer".into())),
        }
    }

    /// What TLS needs to know, which is read when nobody did, or in vain some time ago.
    fn tls(&self, load: impl FnOnce() -> io::Result<Tls>) -> io::Result<Tls> {
        let mut known = self.tls.borrow_mut();
        match &*known {
            Some(Certificates::Known(tls)) => return Ok(tls.clone()),
            Some(Certificates::Missing(why, at)) if at.elapsed() < CERTIFICATES => {
                return Err(io::Error::other(why.clone()));
            }
            _ => {}
        }
        let loaded = load();
        *known = Some(match &loaded {
            Ok(tls) => Certificates::Known(tls.clone()),
            Err(error) => Certificates::Missing(error.to_string(), Instant::now()),
        });
        loaded
    }
}

/// What TLS needs to know, or why and when that could not be read.
#[derive(Debug, Clone)]
enum Certificates {
    Known(Tls),
    Missing(String, Instant),
}

/// Whether no server can be reached at an address. Many a server that listens on all addresses says just that.
fn is_nobodys(address: IpAddr) -> bool {
    let address = address.to_canonical();
    let is_broadcast = matches!(address, IpAddr::V4(address) if address.is_broadcast());
    address.is_unspecified() || address.is_multicast() || is_broadcast
}

/// Any address and any port of the same family.
pub(crate) fn any_of_family(of: SocketAddr) -> SocketAddr {
    match of {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    }
}

/// Whether an address is one of this machine's: a socket can have no other one. (With `net.ipv4.ip_nonlocal_bind` it can, and
/// all addresses count as the machine's.)
fn is_here(address: SocketAddr) -> bool {
    let mut any_port = canonical(address);
    any_port.set_port(0);
    let can_be_bound = || {
        let bound = UdpSocket::bind(any_port);
        !bound.is_err_and(|error| error.kind() == io::ErrorKind::AddrNotAvailable)
    };
    any_port.ip().is_loopback() || can_be_bound()
}

/// An address of IPv4 as one, whatever the socket is.
fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        IpAddr::V4(v4) => (v4, address.port()).into(),
        IpAddr::V6(_) => address,
    }
}

fn down(error: io::Error) -> Error {
    Error::Down(error.to_string())
}

pub(crate) fn has_ended(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

impl From<socks::Error> for Error {
    fn from(error: socks::Error) -> Self {
        match error {
            socks::Error::Refused(_) | socks::Error::NameTooLong => {
                Self::Refused(error.to_string())
            }
            socks::Error::Io(error) if has_ended(&error) => Self::Ended,
            _ => Self::Down(error.to_string()),
        }
    }
}

impl From<http::Error> for Error {
    fn from(error: http::Error) -> Self {
        match error {
            http::Error::Refused(_) => Self::Refused(error.to_string()),
            http::Error::Io(error) if has_ended(&error) => Self::Ended,
            _ => Self::Down(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;

    /// What a reload keeps is the proxy that is the same in all of this.
    #[test]
    fn one_that_is_elsewhere_or_spoken_to_otherwise_is_another_proxy() {
        let credentials = |password: &str| {
            Some(Credentials {
                user: "me".into(),
                password: password.into(),
            })
        };
        let of = |name: &str, protocol, host: &str, port, credentials| {
            Upstream::new(name.into(), protocol, host.into(), port, credentials)
        };
        let own = of("own", Protocol::Http, "there", 1, credentials("p"));
        assert!(own.is_same_as(&of("own", Protocol::Http, "there", 1, credentials("p"))));
        let same = of("own", Protocol::Http, "there", 1, credentials("p"));
        for other in [
            same.of_users([1002].into()),
            of("own", Protocol::Https, "there", 1, credentials("p")),
            of("own", Protocol::Socks5, "there", 1, credentials("p")),
            of("own", Protocol::Http, "elsewhere", 1, credentials("p")),
            of("own", Protocol::Http, "there", 2, credentials("p")),
            of("own", Protocol::Http, "there", 1, credentials("q")),
            of("own", Protocol::Http, "there", 1, None),
        ] {
            assert!(!own.is_same_as(&other), "{other:?}");
            assert!(!other.is_same_as(&own), "{other:?}");
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "needs sockets")]
    fn addresses_of_this_machine_and_of_nobody_are_known() {
        for here in [
            "127.0.0.1:1",
            "127.9.9.9:1",
            "[::1]:1",
            "[::ffff:127.0.0.2]:1",
        ] {
            assert!(is_here(here.parse().unwrap()), "{here}");
        }
        for elsewhere in ["192.0.2.3:1", "[::ffff:192.0.2.3]:1", "[2001:db8::3]:1"] {
            assert!(!is_here(elsewhere.parse().unwrap()), "{elsewhere}");
        }
        for nobody in ["0.0.0.0", "::", "224.0.0.1", "ff02::1", "255.255.255.255"] {
            assert!(is_nobodys(nobody.parse().unwrap()), "{nobody}");
        }
        assert!(!is_nobodys("192.0.2.3".parse().unwrap()));
    }

    /// Time stands still but for who waits for it.
    #[tokio::test(start_paused = true)]
    async fn certificates_that_are_not_there_are_not_looked_for_each_time() {
        let upstream = Upstream::new("own".into(), Protocol::Https, "there".into(), 1, None);
        let tries = std::cell::Cell::new(0);
        let load = || {
            tries.set(tries.get() + 1);
            Err(io::Error::other("there are none"))
        };
        for _ in 0..10 {
            let error = upstream.tls(load).unwrap_err();
            assert_eq!(error.to_string(), "there are none");
            sleep(Duration::from_secs(1)).await;
        }
        assert_eq!(tries.get(), 1);
        upstream.tls(load).unwrap_err();
        assert_eq!(tries.get(), 2);
    }

    /// Time stands still but for who waits for it.
    #[tokio::test(start_paused = true)]
    async fn who_answers_byte_by_byte_has_a_minute_all_in_all() {
        let target = Target::Address("192.0.2.1:80".parse().unwrap());
        for (protocol, begin) in [
            (Protocol::Socks5, &[5, 0, 0, 3, 255][..]),
            (Protocol::Http, b"HTTP/1.1 200 OK\r\nX: "),
        ] {
            let upstream = Upstream::new("own".into(), protocol, "there".into(), 1, None);
            let (mut ours, mut theirs) = tokio::io::duplex(4096);
            let drip = async {
                theirs.write_all(begin).await.unwrap();
                loop {
                    sleep(Duration::from_secs(5)).await;
                    theirs.write_all(b"x").await.unwrap();
                }
            };
            let began = Instant::now();
            let asked = tokio::select! {
                asked = upstream.ask(&mut ours, &target) => asked,
                () = drip => unreachable!("it never ends"),
            };
            assert!(matches!(asked, Err(Error::Silent)), "{asked:?}");
            assert_eq!(began.elapsed().as_secs(), REACH.as_secs());
        }
    }
}
