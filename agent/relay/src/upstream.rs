//! The proxies that connections are carried on to.

mod spares;

use std::cell::RefCell;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::rc::Rc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, lookup_host};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::client::TlsStream;

use crate::http;
use crate::sockets::set_options;
use crate::socks::{self, Credentials};
use crate::target::Target;
use crate::tls::Tls;
use spares::Spares;

/// How long a proxy may take to accept a connection, to agree on TLS, and to greet: it needs nobody else for any of
/// them.
const CONNECT: Duration = Duration::from_secs(10);

/// How much of the first of these looking up its name may take: a little less than [`SILENCE`], after which it is the
/// proxy that is blamed.
const LOOK_UP: Duration = Duration::from_secs(9);

/// How many look-ups of one name there may be at once. Each keeps one of the few threads that there are for all proxies.
const LOOK_UPS: usize = 3;

/// How long certificates that could not be read are not looked for again.
const CERTIFICATES: Duration = Duration::from_secs(10);

/// How much earlier than the next one an address of a proxy is tried (RFC 8305, 5).
const HEAD_START: Duration = Duration::from_millis(250);

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
pub enum Protocol {
    /// SOCKS5.
    Socks5,
    /// HTTP CONNECT.
    Http,
    /// HTTP CONNECT, within TLS.
    Https,
}

/// A proxy that connections are carried on to.
#[derive(Debug)]
pub struct Upstream {
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
    look_up: LookUp,
    tls: RefCell<Option<Certificates>>,
    spares: Spares,
}

/// Why a connection was not carried on.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
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
    #[must_use]
    pub fn new(
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
            look_up: LookUp::default(),
            tls: RefCell::default(),
            spares: Spares::default(),
        }
    }

    /// Whether the other one is the same in all that matters.
    #[must_use]
    pub fn is_same_as(&self, other: &Self) -> bool {
        (&self.host, self.port, self.protocol) == (&other.host, other.port, other.protocol)
            && self.credentials == other.credentials
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
        let stream = reach(addresses).await?;
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

/// What a name's addresses are; none while that is being looked up.
type Found = Option<Result<Vec<SocketAddr>, String>>;

/// Looking up a name: once for all who wait for it. It can't be ended, and may take longer than anybody waits; another one
/// begins then, in case that the network is there by now. These are the ones that go on, and when they began.
#[derive(Debug, Default)]
struct LookUp(RefCell<Vec<(Instant, watch::Receiver<Found>)>>);

impl LookUp {
    /// The latest one that is going on, unless it has been for so long that another one is due.
    fn going_on(&self) -> Option<watch::Receiver<Found>> {
        let mut all = self.0.borrow_mut();
        all.retain(|(_, found)| found.borrow().is_none() && found.has_changed().is_ok());
        let (began, found) = all.last()?;
        (began.elapsed() < LOOK_UP || all.len() >= LOOK_UPS).then(|| found.clone())
    }

    /// What is being looked up already, or what this finds.
    async fn find(
        &self,
        look: impl Future<Output = io::Result<Vec<SocketAddr>>> + Send + 'static,
    ) -> io::Result<impl Iterator<Item = SocketAddr>> {
        let mut found = self.going_on().unwrap_or_else(|| {
            let (tell, found) = watch::channel(None);
            tokio::spawn(async move {
                let found = look.await.map_err(|error| error.to_string());
                // Nobody need be waiting any more.
                let _ = tell.send(Some(found));
            });
            self.0.borrow_mut().push((Instant::now(), found.clone()));
            found
        });
        let found = found.wait_for(Option::is_some).await;
        let found = found.ok().and_then(|found| found.clone());
        let addresses = found.unwrap_or_else(|| Err("it can't be looked up".to_owned()));
        Ok(addresses.map_err(io::Error::other)?.into_iter())
    }
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

/// Whether an address is one of this machine's: a server elsewhere is not to choose who here gets datagrams. The kernel
/// sends what is for one of its own addresses from that address.
fn is_here(address: SocketAddr) -> bool {
    let from = UdpSocket::bind(any_of_family(address)).and_then(|socket| {
        // This sends nothing.
        socket.connect(address)?;
        socket.local_addr()
    });
    let address = address.ip().to_canonical();
    address.is_loopback() || from.is_ok_and(|from| from.ip().to_canonical() == address)
}

/// A connection to one of the addresses that are being looked up.
async fn reach(
    addresses: impl Future<Output = io::Result<impl Iterator<Item = SocketAddr>>>,
) -> Result<TcpStream, Error> {
    let reached = async {
        match timeout(LOOK_UP, addresses).await {
            Ok(addresses) => connect(addresses.map_err(down)?).await.map_err(down),
            Err(_) => Err(Error::Down("looking up its name takes too long".into())),
        }
    };
    let reached = timeout(CONNECT, reached).await;
    reached.unwrap_or_else(|_| Err(Error::Down("it does not answer".into())))
}

fn down(error: io::Error) -> Error {
    Error::Down(error.to_string())
}

/// Connects to the first of these addresses that answers. Each has a head start over the next one, so that a family that
/// leads nowhere keeps nobody waiting for long.
async fn connect(addresses: impl Iterator<Item = SocketAddr>) -> io::Result<TcpStream> {
    let mut addresses = addresses.fuse();
    let mut attempts = JoinSet::new();
    let mut failure = io::Error::other("its name has no address");
    loop {
        if let Some(address) = addresses.next() {
            attempts.spawn(TcpStream::connect(address));
        }
        match timeout(HEAD_START, attempts.join_next()).await {
            Ok(Some(Ok(Ok(stream)))) => return Ok(stream),
            Ok(Some(Ok(Err(error)))) => failure = error,
            Ok(Some(Err(error))) => failure = error.into(),
            Ok(None) => return Err(failure),
            Err(_) => {}
        }
    }
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
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::io::AsyncWriteExt;
    use tokio::sync::Notify;

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
        for other in [
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

    /// Somebody who answers nobody, once there is a connection.
    fn silent() -> (tokio::net::TcpListener, SocketAddr) {
        // Nobody calls accept(2), and one may wait for it.
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let socket = socket.listen(0).unwrap();
        let address = socket.local_addr().unwrap();
        (socket, address)
    }

    #[test]
    #[cfg_attr(miri, ignore = "needs sockets")]
    fn addresses_of_this_machine_and_of_nobody_are_known() {
        for here in ["127.0.0.1:1", "[::1]:1", "[::ffff:127.0.0.2]:1"] {
            assert!(is_here(here.parse().unwrap()), "{here}");
        }
        assert!(!is_here("192.0.2.3:1".parse().unwrap()));
        for nobody in ["0.0.0.0", "::", "224.0.0.1", "ff02::1", "255.255.255.255"] {
            assert!(is_nobodys(nobody.parse().unwrap()), "{nobody}");
        }
        assert!(!is_nobodys("192.0.2.3".parse().unwrap()));
    }

    #[tokio::test]
    async fn an_address_that_leads_nowhere_keeps_nobody_waiting() {
        let (_socket, silent) = silent();
        let _waits = TcpStream::connect(silent).await.unwrap();
        let proxy = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let there = proxy.local_addr().unwrap();
        let nobody = "127.0.0.1:1".parse().unwrap();

        let connected = connect([silent, nobody, there].into_iter());
        let stream = timeout(CONNECT, connected).await.unwrap().unwrap();
        assert_eq!(stream.peer_addr().unwrap(), there);
        let refused = connect([nobody].into_iter()).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        connect([].into_iter()).await.unwrap_err();
    }

    /// Time stands still but for who waits for it.
    #[tokio::test(start_paused = true)]
    async fn a_proxy_is_not_blamed_for_who_looks_up_its_name() {
        let nobody = std::future::pending::<io::Result<std::iter::Empty<SocketAddr>>>();
        // Before it counts as silent.
        let error = timeout(SILENCE, reach(nobody)).await.unwrap().unwrap_err();
        assert!(error.to_string().contains("its name"), "{error}");

        let (_socket, silent) = silent();
        let _waits = TcpStream::connect(silent).await.unwrap();
        let found = std::future::ready(Ok([silent].into_iter()));
        let error = reach(found).await.unwrap_err();
        assert_eq!(error.to_string(), "it does not answer");
    }

    #[tokio::test]
    async fn a_name_is_looked_up_once_for_all_who_wait_for_it() {
        let look_up = LookUp::default();
        let counted = Arc::new(AtomicUsize::new(0));
        let answer = Arc::new(Notify::new());
        let find = || {
            let (counted, answer) = (counted.clone(), answer.clone());
            look_up.find(async move {
                counted.fetch_add(1, Ordering::Relaxed);
                answer.notified().await;
                match counted.load(Ordering::Relaxed) {
                    1 => Ok(vec!["192.0.2.1:1".parse().unwrap()]),
                    _ => Err(io::Error::other("no such name")),
                }
            })
        };
        // Who gives up leaves it to the next one.
        for _ in 0..100 {
            assert!(timeout(Duration::ZERO, find()).await.is_err());
        }
        assert_eq!(counted.load(Ordering::Relaxed), 1);
        let found = async {
            let (a, b) = tokio::join!(find(), find());
            (
                a.map(Iterator::collect::<Vec<_>>),
                b.map(Iterator::collect::<Vec<_>>),
            )
        };
        let ((a, b), ()) = tokio::join!(found, async { answer.notify_one() });
        assert_eq!(a.unwrap(), ["192.0.2.1:1".parse().unwrap()]);
        assert_eq!(b.unwrap().len(), 1);
        assert_eq!(counted.load(Ordering::Relaxed), 1);
        // What was found then is not what there is now.
        answer.notify_one();
        let error = find().await.map(Iterator::collect::<Vec<_>>).unwrap_err();
        assert_eq!(error.to_string(), "no such name");
        assert_eq!(counted.load(Ordering::Relaxed), 2);
    }

    /// Time stands still but for who waits for it.
    #[tokio::test(start_paused = true)]
    async fn who_comes_later_does_not_wait_for_a_look_up_that_hangs() {
        let look_up = LookUp::default();
        let begun = Arc::new(AtomicUsize::new(0));
        let hangs = || {
            let begun = begun.clone();
            look_up.find(async move {
                begun.fetch_add(1, Ordering::Relaxed);
                std::future::pending().await
            })
        };
        // Each thread that looks names up may be kept for long, and there are few.
        for expected in [1, 2, 3, 3, 3] {
            for _ in 0..5 {
                assert!(timeout(LOOK_UP / 5, hangs()).await.is_err());
            }
            assert_eq!(begun.load(Ordering::Relaxed), expected);
        }
        let look_up = LookUp::default();
        let hangs = look_up.find(std::future::pending());
        assert!(timeout(LOOK_UP, hangs).await.is_err());
        let found = look_up.find(async { Ok(vec!["192.0.2.1:1".parse().unwrap()]) });
        let found = timeout(LOOK_UP, found).await.expect("DNS works again");
        assert_eq!(found.unwrap().count(), 1);
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
