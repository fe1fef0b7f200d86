//! Looks up a proxy's name, and connects to one of its addresses.

use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use super::{CONNECT, Error, down, owner};

/// How much of the first of these looking up its name may take: a little less than [`super::SILENCE`], after which it is
/// the proxy that is blamed.
const LOOK_UP: Duration = Duration::from_secs(9);

/// How many look-ups of one name there may be at once. Each keeps one of the few threads that there are for all proxies.
const LOOK_UPS: usize = 3;

/// How much earlier than the next one an address of a proxy is tried (RFC 8305, 5).
const HEAD_START: Duration = Duration::from_millis(250);

/// What a name's addresses are; none while that is being looked up.
type Found = Option<Result<Vec<SocketAddr>, String>>;

/// Looking up a name: once for all who wait for it. It can't be ended, and may take longer than anybody waits; another one
/// begins then, in case that the network is there by now. These are the ones that go on, and when they began.
#[derive(Debug, Default)]
pub(super) struct LookUp(RefCell<Vec<(Instant, watch::Receiver<Found>)>>);

impl LookUp {
    /// The latest one that is going on, unless it has been for so long that another one is due.
    fn going_on(&self) -> Option<watch::Receiver<Found>> {
        let mut all = self.0.borrow_mut();
        all.retain(|(_, found)| found.borrow().is_none() && found.has_changed().is_ok());
        let (began, found) = all.last()?;
        (began.elapsed() < LOOK_UP || all.len() >= LOOK_UPS).then(|| found.clone())
    }

    /// What is being looked up already, or what this finds.
    pub(super) async fn find(
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

/// A connection to one of the addresses that are being looked up. On this machine, one of these `users` may have it too.
pub(super) async fn reach(
    addresses: impl Future<Output = io::Result<impl Iterator<Item = SocketAddr>>>,
    users: &Arc<[u32]>,
) -> Result<TcpStream, Error> {
    let reached = async {
        match timeout(LOOK_UP, addresses).await {
            Ok(addresses) => connect(addresses.map_err(down)?, users).await.map_err(down),
            Err(_) => Err(Error::Down("looking up its name takes too long".into())),
        }
    };
    let reached = timeout(CONNECT, reached).await;
    reached.unwrap_or_else(|_| Err(Error::Down("it does not answer".into())))
}

/// Connects to the first of these addresses that answers. Each has a head start over the next one, so that a family that
/// leads nowhere keeps nobody waiting for long, and somebody else who has taken one of them is not in the way of the other.
async fn connect(
    addresses: impl Iterator<Item = SocketAddr>,
    users: &Arc<[u32]>,
) -> io::Result<TcpStream> {
    let mut addresses = addresses.fuse();
    let mut attempts = JoinSet::new();
    let mut failure = io::Error::other("its name has no address");
    loop {
        if let Some(address) = addresses.next() {
            let users = users.clone();
            attempts.spawn(async move {
                let stream = TcpStream::connect(address).await?;
                owner::check(&stream, &users)?;
                Ok(stream)
            });
        }
        match timeout(HEAD_START, attempts.join_next()).await {
            Ok(Some(Ok(Ok(stream)))) => return Ok(stream),
            // That the other address is nobody's is of less use to know.
            Ok(Some(Ok(Err(_)))) if owner::is_why(&failure) => {}
            Ok(Some(Ok(Err(error)))) => failure = error,
            Ok(Some(Err(error))) => failure = error.into(),
            Ok(None) => return Err(failure),
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upstream::SILENCE;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::sync::Notify;

    /// Somebody who answers nobody, once there is a connection.
    fn silent() -> (tokio::net::TcpListener, SocketAddr) {
        // Nobody calls accept(2), and one may wait for it.
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let socket = socket.listen(0).unwrap();
        let address = socket.local_addr().unwrap();
        (socket, address)
    }

    #[tokio::test]
    async fn an_address_that_leads_nowhere_keeps_nobody_waiting() {
        let (_socket, silent) = silent();
        let _waits = TcpStream::connect(silent).await.unwrap();
        let proxy = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let there = proxy.local_addr().unwrap();
        let nobody = "127.0.0.1:1".parse().unwrap();
        let users = Arc::default();

        let connected = connect([silent, nobody, there].into_iter(), &users);
        let stream = timeout(CONNECT, connected).await.unwrap().unwrap();
        assert_eq!(stream.peer_addr().unwrap(), there);
        let refused = connect([nobody].into_iter(), &users).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        connect([].into_iter(), &users).await.unwrap_err();
    }

    /// Time stands still but for who waits for it.
    #[tokio::test(start_paused = true)]
    async fn a_proxy_is_not_blamed_for_who_looks_up_its_name() {
        let nobody = std::future::pending::<io::Result<std::iter::Empty<SocketAddr>>>();
        // Before it counts as silent.
        let error = timeout(SILENCE, reach(nobody, &Arc::default()))
            .await
            .unwrap()
            .unwrap_err();
        assert!(error.to_string().contains("its name"), "{error}");

        let (_socket, silent) = silent();
        let _waits = TcpStream::connect(silent).await.unwrap();
        let found = std::future::ready(Ok([silent].into_iter()));
        let error = reach(found, &Arc::default()).await.unwrap_err();
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
}
