//! Connections to a proxy that wait for a request.
//!
//! Connecting and greeting takes two round trips. A request that finds a connection with both behind it does not wait
//! for them. Each connection that is made leaves one more, up to [`SPARES`], for [`IDLE`]: a program that has made one
//! soon makes another, and a proxy that is not in use is left alone.

use std::cell::{Cell, RefCell};
use std::time::Duration;

use rustix::net::{RecvFlags, recv};
use rustix::time::{ClockId, clock_gettime};
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::Stream;

/// How many wait at most, for one proxy.
const SPARES: usize = 4;

/// How long one waits.
pub(crate) const IDLE: Duration = Duration::from_secs(5);

/// How long none are made after one could not be: a proxy may count connections, and need the room.
const PAUSE: Duration = Duration::from_secs(60);

/// Connections to one proxy.
#[derive(Debug, Default)]
pub(crate) struct Spares {
    waiting: RefCell<Vec<Spare>>,
    /// How many are on their way.
    coming: Cell<usize>,
    last: Cell<u64>,
    not_before: Cell<Option<Instant>>,
}

/// One of them.
#[derive(Debug)]
struct Spare {
    number: u64,
    stream: Stream,
    /// When it was made, by [`since_boot`].
    made: Duration,
}

impl Spares {
    /// The newest that the proxy has not closed, and none from before the machine was suspended: the proxy may have
    /// closed that during the suspension, when its packets did not arrive.
    pub(crate) fn take(&self) -> Option<Stream> {
        let mut waiting = self.waiting.borrow_mut();
        let now = since_boot();
        loop {
            let spare = waiting.pop()?;
            if now.saturating_sub(spare.made) < IDLE && is_open(&spare.stream) {
                return Some(spare.stream);
            }
        }
    }

    /// Whether another one is to be made. It is to be given to [`add`](Self::add) then, whatever comes of it.
    pub(crate) fn wants(&self) -> bool {
        let room = self.waiting.borrow().len() + self.coming.get() < SPARES;
        let paused = self.not_before.get().is_some_and(|at| Instant::now() < at);
        if room && !paused {
            self.coming.set(self.coming.get() + 1);
        }
        room && !paused
    }

    /// Keeps one, none if it could not be made; returns what to [`remove`](Self::remove) it by.
    pub(crate) fn add(&self, stream: Option<Stream>) -> Option<u64> {
        self.coming.set(self.coming.get().saturating_sub(1));
        let Some(stream) = stream else {
            self.not_before.set(Some(Instant::now() + PAUSE));
            return None;
        };
        let number = self.last.get().wrapping_add(1);
        self.last.set(number);
        self.waiting.borrow_mut().push(Spare {
            number,
            stream,
            made: since_boot(),
        });
        Some(number)
    }

    /// Closes one that nobody has taken.
    pub(crate) fn remove(&self, number: u64) {
        self.waiting
            .borrow_mut()
            .retain(|spare| spare.number != number);
    }
}

/// How long ago the machine was started, the time included in which it was suspended and tokio's clock stood still.
fn since_boot() -> Duration {
    Duration::try_from(clock_gettime(ClockId::Boottime)).unwrap_or_default()
}

/// Whether the proxy has neither closed it nor, without TLS, said anything: it has been asked nothing.
fn is_open(stream: &Stream) -> bool {
    let peek = |stream: &TcpStream| {
        recv(
            stream,
            &mut [0_u8; 1],
            RecvFlags::PEEK | RecvFlags::DONTWAIT,
        )
    };
    let nothing = Err(rustix::io::Errno::AGAIN);
    match stream {
        Stream::Tcp(stream) => peek(stream).map(|(_, length)| length) == nothing,
        // What TLS says by itself, such as a ticket for the next time.
        Stream::Tls(stream) => {
            let peeked = peek(stream.get_ref().0).map(|(_, length)| length);
            peeked == nothing || matches!(peeked, Ok(1..))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::rc::Rc;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio::task::LocalSet;

    use crate::target::Target;
    use crate::upstream::{Error, Protocol, Upstream};

    /// A SOCKS5 server whose side of each connection a test plays.
    struct Server(TcpListener);

    impl Server {
        async fn start() -> (Self, Rc<Upstream>) {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let host = "127.0.0.1".to_owned();
            let upstream = Upstream::new("own".into(), Protocol::Socks5, host, port, None);
            (Self(listener), Rc::new(upstream))
        }

        /// The next connection, and its greeting.
        async fn greet(&self) -> TcpStream {
            let (mut stream, _) = self.0.accept().await.unwrap();
            stream.read_exact(&mut [0; 3]).await.unwrap();
            stream.write_all(&[5, 0]).await.unwrap();
            stream
        }
    }

    async fn grant(stream: &mut TcpStream) {
        stream.read_exact(&mut [0; 10]).await.unwrap();
        let granted = [5, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        stream.write_all(&granted).await.unwrap();
    }

    fn target() -> Target {
        Target::Address("192.0.2.1:80".parse().unwrap())
    }

    /// One connection, and the spare one that it leaves.
    async fn first(server: &Server, upstream: &Rc<Upstream>) -> TcpStream {
        let target = target();
        let serve = async {
            let mut stream = server.greet().await;
            grant(&mut stream).await;
        };
        let (connected, ()) = tokio::join!(upstream.connect(&target), serve);
        connected.unwrap();
        upstream.prepare();
        server.greet().await
    }

    async fn until_it_waits(upstream: &Upstream) {
        while upstream.spares().coming.get() > 0 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn the_next_connection_finds_one_that_has_been_greeted() {
        let test = async {
            let (server, upstream) = Server::start().await;
            let mut spare = first(&server, &upstream).await;
            until_it_waits(&upstream).await;
            // Nobody accepts or greets any more.
            let target = target();
            let (connected, ()) = tokio::join!(upstream.connect(&target), grant(&mut spare));
            connected.unwrap();
        };
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test]
    async fn one_that_the_proxy_has_closed_is_replaced() {
        let test = async {
            let (server, upstream) = Server::start().await;
            let mut spare = first(&server, &upstream).await;
            until_it_waits(&upstream).await;
            let target = target();
            let serve = async {
                // It takes the request, and closes.
                spare.read_exact(&mut [0; 10]).await.unwrap();
                drop(spare);
                let mut stream = server.greet().await;
                grant(&mut stream).await;
            };
            let (connected, ()) = tokio::join!(upstream.connect(&target), serve);
            connected.unwrap();
            // What was closed long ago is not even tried.
            upstream.prepare();
            drop(server.greet().await);
            until_it_waits(&upstream).await;
            while upstream.spares().take().is_some() {
                tokio::task::yield_now().await;
            }
        };
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test]
    async fn what_was_made_before_the_machine_was_suspended_is_not_used() {
        let test = async {
            let (server, upstream) = Server::start().await;
            let mut spare = first(&server, &upstream).await;
            until_it_waits(&upstream).await;
            // It wakes up: no time has passed for those who wait.
            for spare in upstream.spares().waiting.borrow_mut().iter_mut() {
                spare.made = spare.made.saturating_sub(IDLE);
            }
            let target = target();
            let serve = async {
                let asked = spare.read(&mut [0; 1]).await.unwrap();
                assert_eq!(asked, 0, "nothing is asked on it");
                let mut stream = server.greet().await;
                grant(&mut stream).await;
            };
            let (connected, ()) = tokio::join!(upstream.connect(&target), serve);
            connected.unwrap();
        };
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test]
    async fn there_are_a_few_and_they_end_when_nobody_needs_them() {
        let test = async {
            let (server, upstream) = Server::start().await;
            let mut spares = vec![first(&server, &upstream).await];
            for _ in 0..2 * SPARES {
                upstream.prepare();
            }
            while spares.len() < SPARES {
                spares.push(server.greet().await);
            }
            until_it_waits(&upstream).await;
            assert_eq!(upstream.spares().waiting.borrow().len(), SPARES);
            tokio::time::pause();
            for mut spare in spares {
                assert_eq!(spare.read(&mut [0; 1]).await.unwrap(), 0);
            }
            assert!(upstream.spares().take().is_none());
        };
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test]
    async fn a_proxy_without_room_for_them_is_left_alone() {
        let test = async {
            let (server, upstream) = Server::start().await;
            upstream.prepare();
            drop(server.0.accept().await.unwrap());
            until_it_waits(&upstream).await;
            assert!(!upstream.spares().wants());
            drop(server);
            let refused = upstream.connect(&target()).await;
            assert!(matches!(refused, Err(Error::Down(_))));
        };
        LocalSet::new().run_until(test).await;
    }
}
