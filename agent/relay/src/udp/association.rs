//! Associations with a SOCKS5 server: who passes the datagrams of flows on, and brings the answers back (RFC 1928, 7).

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::rc::{Rc, Weak};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::OnceCell;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{Flow, SHARED};
use crate::socks;
use crate::upstream::{Error, Upstream, any_of_family};

/// How soon after granting it a proxy ends an association that is of no use to anybody. Later, it may have waited in vain
/// for datagrams, which some go one way only.
const AT_ONCE: Duration = Duration::from_secs(2);

/// What an answer needs to get back.
#[derive(Debug, Clone)]
pub(super) struct Route {
    pub(super) listener: Rc<UdpSocket>,
    pub(super) client: SocketAddr,
    pub(super) flow: Weak<Flow>,
}

/// Answers by whom they come from; for a name, whoever that is.
type Routes = Rc<RefCell<HashMap<Option<SocketAddr>, Route>>>;

/// Somebody at the proxy who passes datagrams on. It ends when the last flow that uses it does.
#[derive(Debug)]
pub(super) struct Association {
    socket: Rc<UdpSocket>,
    routes: Routes,
    /// The proxy has ended it.
    dead: Rc<Cell<bool>>,
    /// It has brought an answer.
    answered: Rc<Cell<bool>>,
    /// It was ended at once, before it had brought an answer.
    in_vain: Rc<Cell<bool>>,
    _end: DropGuard,
}

impl Association {
    /// One that nobody uses yet.
    pub(super) async fn open(upstream: &Rc<Upstream>) -> Result<Rc<Self>, Error> {
        let (control, relay) = upstream.associate().await?;
        let down = |error: io::Error| Error::Down(error.to_string());
        let socket = std::net::UdpSocket::bind(any_of_family(relay)).map_err(down)?;
        let socket = Rc::new(connected(socket, relay).map_err(down)?);
        // Until the runtime has heard from the kernel, `try_send` would throw the first datagrams away.
        socket.writable().await.map_err(down)?;
        let end = CancellationToken::new();
        let association = Rc::new(Self {
            socket: socket.clone(),
            routes: Routes::default(),
            dead: Rc::default(),
            answered: Rc::default(),
            in_vain: Rc::default(),
            _end: end.clone().drop_guard(),
        });
        let routes = association.routes.clone();
        let dead = association.dead.clone();
        let answered = association.answered.clone();
        let in_vain = association.in_vain.clone();
        let granted = Instant::now();
        tokio::task::spawn_local(async move {
            tokio::select! {
                () = answers(&socket, &routes, &answered) => {}
                () = ended(control) => {}
                () = end.cancelled() => {}
            }
            in_vain.set(!answered.get() && granted.elapsed() < AT_ONCE);
            dead.set(true);
        });
        Ok(association)
    }

    /// Sends it, or not: it is a datagram.
    pub(super) fn send(&self, header: &[u8], datagram: &[u8]) {
        let message = [header, datagram].concat();
        if let Err(error) = self.socket.try_send(&message) {
            tracing::trace!("a datagram was not sent: {error}");
        }
    }

    /// Whether the proxy has ended it.
    pub(super) fn is_dead(&self) -> bool {
        self.dead.get()
    }

    /// Whether the proxy has ended it at once, before there was an answer.
    pub(super) fn was_in_vain(&self) -> bool {
        self.in_vain.get()
    }

    /// Brings answers from there back by this way from now on.
    pub(super) fn add_route(&self, from: Option<SocketAddr>, route: Route) {
        self.routes.borrow_mut().insert(from, route);
    }

    /// Takes the way of a flow that ends along, and not that of its successor, which may be there by now.
    pub(super) fn remove_route(&self, from: Option<SocketAddr>, flow: &Flow) {
        let mut routes = self.routes.borrow_mut();
        if routes
            .get(&from)
            .is_some_and(|route| std::ptr::eq(route.flow.as_ptr(), flow))
        {
            routes.remove(&from);
        }
    }
}

/// This socket, to be used with that peer alone. Until it is connected, anybody may send to it: that is thrown away.
fn connected(socket: std::net::UdpSocket, peer: SocketAddr) -> io::Result<UdpSocket> {
    socket.set_nonblocking(true)?;
    socket.connect(peer)?;
    while socket.recv(&mut [0]).is_ok() {}
    UdpSocket::from_std(socket)
}

/// Returns when the proxy ends the connection that stands for an association.
async fn ended(mut control: TcpStream) {
    let mut nothing = [0; 16];
    while let Ok(1..) = control.read(&mut nothing).await {}
}

/// Brings answers back, for ever.
async fn answers(
    socket: &UdpSocket,
    routes: &RefCell<HashMap<Option<SocketAddr>, Route>>,
    answered: &Cell<bool>,
) {
    while socket.readable().await.is_ok() {
        SHARED.with_borrow_mut(|buffer| {
            // An error is what became of a datagram that was sent before.
            let Ok(length) = socket.try_recv(buffer) else {
                return;
            };
            let message = buffer.get(..length).unwrap_or_default();
            let Some((from, payload)) = socks::parse_datagram(message) else {
                return;
            };
            let route = {
                let routes = routes.borrow();
                let named = || routes.get(&None);
                routes.get(&from).or_else(named).cloned()
            };
            let Some(route) = route else { return };
            let Some(flow) = route.flow.upgrade() else {
                return;
            };
            if let Err(error) = route.listener.try_send_to(payload, route.client) {
                tracing::trace!("an answer was not sent: {error}");
                return;
            }
            flow.answered();
            answered.set(true);
        });
        tokio::task::coop::consume_budget().await;
    }
}

/// The association that the flows of one socket share, made by the first of them. What comes of that holds for all who
/// have waited: if each tried in its turn, a silent proxy would keep the last of them for as long as there are others.
#[derive(Debug)]
struct Slot {
    upstream: Rc<Upstream>,
    association: OnceCell<Result<Weak<Association>, Error>>,
}

/// Those of all sockets.
#[derive(Debug, Default)]
pub(super) struct Associations(RefCell<HashMap<SocketAddr, Rc<Slot>>>);

impl Associations {
    /// That of one socket.
    pub(super) async fn of(
        &self,
        source: SocketAddr,
        upstream: &Rc<Upstream>,
    ) -> Result<Rc<Association>, Error> {
        let alive = |weak: &Weak<Association>| weak.upgrade().filter(|a| !a.is_dead());
        loop {
            let slot = {
                let mut slots = self.0.borrow_mut();
                let over = slots.get(&source).is_some_and(|slot| {
                    let opened = slot.association.get();
                    let is_alive =
                        |opened: &Result<_, _>| opened.as_ref().is_ok_and(|a| alive(a).is_some());
                    !Rc::ptr_eq(&slot.upstream, upstream) || opened.is_some_and(|o| !is_alive(o))
                });
                if over {
                    slots.remove(&source);
                }
                let fresh = || {
                    Rc::new(Slot {
                        upstream: upstream.clone(),
                        association: OnceCell::new(),
                    })
                };
                slots.entry(source).or_insert_with(fresh).clone()
            };
            // Kept by whoever opens it until there is a flow that uses it.
            let mut opened = None;
            let result = slot
                .association
                .get_or_init(|| async {
                    let association = Association::open(upstream).await?;
                    opened = Some(association.clone());
                    Ok(Rc::downgrade(&association))
                })
                .await;
            let weak = result.as_ref().map_err(Clone::clone)?;
            if let Some(association) = opened.or_else(|| alive(weak)) {
                return Ok(association);
            }
        }
    }

    /// Whether there are none, nor any on their way.
    pub(super) fn is_empty(&self) -> bool {
        self.0.borrow().is_empty()
    }

    /// Forgets those that nobody uses or waits for.
    pub(super) fn forget_unused(&self) {
        self.0.borrow_mut().retain(|_, slot| {
            match slot.association.get() {
                Some(Ok(association)) => association.strong_count() > 0,
                Some(Err(_)) => false,
                // Whoever waits for it has the slot too.
                None => Rc::strong_count(slot) > 1,
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::TIMEOUTS;
    use super::super::{AGAIN, State};
    use super::*;
    use crate::upstream::Protocol;
    use cgtproxy_proto::back_off::BackOff;
    use std::sync::Arc;
    use std::time::Duration;
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;
    use tokio::sync::Semaphore;
    use tokio::task::LocalSet;
    use tokio::time::Instant;

    /// A SOCKS5 server.
    async fn server() -> (TcpListener, Rc<Upstream>) {
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = server.local_addr().unwrap().port();
        let host = "127.0.0.1".into();
        let upstream = Upstream::new("own".into(), Protocol::Socks5, host, port, None);
        (server, Rc::new(upstream))
    }

    /// A connection to it that has asked for an association.
    async fn asked(server: &TcpListener) -> TcpStream {
        let (mut control, _) = server.accept().await.unwrap();
        control.read_exact(&mut [0; 3]).await.unwrap();
        control.write_all(&[5, 0]).await.unwrap();
        control.read_exact(&mut [0; 10]).await.unwrap();
        control
    }

    #[tokio::test]
    async fn the_first_datagram_of_an_association_is_sent() {
        let (server, upstream) = server().await;
        let relay = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let [high, low] = relay.local_addr().unwrap().port().to_be_bytes();
        let attend = async {
            let mut control = asked(&server).await;
            let reply = [5, 0, 0, 1, 127, 0, 0, 1, high, low];
            control.write_all(&reply).await.unwrap();
            control
        };
        let both = async {
            let (association, control) = tokio::join!(
                async {
                    let association = Association::open(&upstream).await.unwrap();
                    association.send(b"header ", b"and datagram");
                    association
                },
                attend
            );
            let mut buffer = [0; 64];
            let arrived = tokio::time::timeout(Duration::from_secs(10), relay.recv(&mut buffer));
            let length = arrived.await.unwrap().unwrap();
            assert_eq!(&buffer[..length], b"header and datagram");
            drop((association, control));
        };
        LocalSet::new().run_until(both).await;
    }

    #[tokio::test]
    async fn what_others_send_before_it_is_connected_is_no_answer() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let own = socket.local_addr().unwrap();
        let [relay, stranger] = [(); 2].map(|()| std::net::UdpSocket::bind("127.0.0.1:0").unwrap());
        for _ in 0..3 {
            stranger.send_to(b"forged", own).unwrap();
        }
        let socket = connected(socket, relay.local_addr().unwrap()).unwrap();
        stranger.send_to(b"forged", own).unwrap();
        relay.send_to(b"answer", own).unwrap();
        let mut buffer = [0; 64];
        let length = socket.recv(&mut buffer).await.unwrap();
        assert_eq!(&buffer[..length], b"answer");
    }

    #[tokio::test]
    async fn a_flow_that_ends_takes_only_its_own_way_along() {
        let test = async {
            let (server, upstream) = server().await;
            let attend = async {
                let mut control = asked(&server).await;
                let granted = [5, 0, 0, 1, 127, 0, 0, 1, 0, 9];
                control.write_all(&granted).await.unwrap();
                control
            };
            let (association, _control) = tokio::join!(Association::open(&upstream), attend);
            let association = association.unwrap();
            let listener = Rc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
            let key = Some("192.0.2.1:1".parse().unwrap());
            let permits = Arc::new(Semaphore::new(2));
            let flow = || {
                let flow = Rc::new(Flow {
                    timeouts: TIMEOUTS,
                    state: RefCell::new(State::Ready {
                        association: association.clone(),
                        header: Vec::new(),
                        key,
                        upstream: Weak::new(),
                    }),
                    first_answer: Cell::new(None),
                    original: Cell::new(None),
                    asked: Cell::new(Instant::now()),
                    began: Instant::now(),
                    deadline: Cell::new(Instant::now()),
                    back_off: RefCell::new(BackOff::new((AGAIN, TIMEOUTS.short))),
                    _permit: permits.clone().try_acquire_owned().unwrap(),
                });
                let route = Route {
                    listener: listener.clone(),
                    client: "127.0.0.1:1".parse().unwrap(),
                    flow: Rc::downgrade(&flow),
                };
                association.add_route(key, route);
                flow
            };
            // The same destination, by another client port.
            let (first, second) = (flow(), flow());
            drop(first);
            assert!(association.routes.borrow().contains_key(&key));
            drop(second);
            assert!(association.routes.borrow().is_empty());
        };
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test]
    async fn an_association_is_kept_for_who_waits_for_it_or_uses_it() {
        let test = async {
            let (server, upstream) = server().await;
            let associations = Associations::default();
            let source = "127.0.0.1:1".parse().unwrap();
            let kept = || {
                associations.forget_unused();
                associations.0.borrow().len()
            };
            let open = || associations.of(source, &upstream);
            // Two flows of one socket, which learn of one attempt.
            let attend = async {
                let control = asked(&server).await;
                assert_eq!(kept(), 1, "two wait");
                drop(control);
            };
            let (first, second, ()) = tokio::join!(open(), open(), attend);
            for failed in [first, second] {
                assert!(matches!(failed, Err(Error::Ended)), "{failed:?}");
            }
            // Who comes afterwards begins anew, whether it has been forgotten meanwhile or not.
            let attend = async {
                let mut control = asked(&server).await;
                let granted = [5, 0, 0, 1, 127, 0, 0, 1, 0, 9];
                control.write_all(&granted).await.unwrap();
                control
            };
            let (third, fourth, control) = tokio::join!(open(), open(), attend);
            let (third, fourth) = (third.unwrap(), fourth.unwrap());
            assert!(Rc::ptr_eq(&third, &fourth), "one for both");
            drop(third);
            assert_eq!(kept(), 1, "one is in use");
            drop((fourth, control));
            assert_eq!(kept(), 0);

            let attend = async { drop(asked(&server).await) };
            let (refused, ()) = tokio::join!(open(), attend);
            assert!(matches!(refused, Err(Error::Ended)), "{refused:?}");
            assert_eq!(kept(), 0, "nobody waits any more");
            assert_eq!(Rc::strong_count(&upstream), 1);
        };
        LocalSet::new().run_until(test).await;
    }

    /// Time stands still but for who waits for it.
    #[tokio::test(start_paused = true)]
    async fn all_who_wait_for_a_silent_server_fail_when_the_first_does() {
        let test = async {
            // The kernel connects; nobody greets.
            let (_server, upstream) = server().await;
            let associations = Rc::new(Associations::default());
            let source = "127.0.0.1:1".parse().unwrap();
            let flows: Vec<_> = (0..50)
                .map(|_| {
                    let (associations, upstream) = (associations.clone(), upstream.clone());
                    tokio::task::spawn_local(
                        async move { associations.of(source, &upstream).await },
                    )
                })
                .collect();
            let began = Instant::now();
            for flow in flows {
                let failed = flow.await.unwrap();
                assert!(matches!(failed, Err(Error::Down(_))), "{failed:?}");
            }
            assert_eq!(began.elapsed().as_secs(), 10);
        };
        LocalSet::new().run_until(test).await;
    }
}
