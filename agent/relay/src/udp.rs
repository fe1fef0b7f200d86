//! UDP, by associations with a SOCKS5 server (RFC 1928, 7).
//!
//! Each destination of each of an application's sockets is a *flow*: the kernel shows another client port for it. The
//! flows of one socket share one association, so that the other ends of them all see it at one address.
//! A flow to a name has an association of its own, since answers come from an address.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::{OnceCell, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::conntrack;
use crate::original::{Original, Unknown};
use crate::relay::Entry;
use crate::socks;
use crate::target::Target;
use crate::upstream::{Error, Upstream};

/// The largest datagram, and the largest header before one.
const DATAGRAM: usize = 65_536;

/// How many datagrams of a flow may wait until the proxy is ready for them.
const WAITING: usize = 16;

/// How many bytes they may have: one of the largest fits in, with others.
const FLOW_BYTES: usize = 2 * DATAGRAM;

/// How many bytes the datagrams of all flows may have that wait.
pub(crate) const WAITING_BYTES: usize = 8 << 20;

/// Of how many flows the helper may be asked at once.
pub(crate) const LOOKUPS: usize = 1024;

/// What is counted for a datagram that waits, beside its bytes.
const OVERHEAD: usize = 64;

/// How often to look for flows that are over.
const SWEEP: Duration = Duration::from_secs(1);

/// How long after its first answer a flow has conntrack's longer time (net/netfilter/nf_conntrack_proto_udp.c, two
/// seconds; one more to be on the safe side).
const STREAM: Duration = Duration::from_secs(3);

/// How long before conntrack a flow is forgotten here: later the same client port may mean another one.
const MARGIN: Duration = Duration::from_secs(2);

/// How long the helper's word about a flow in use is good for. Whoever flushes conntrack (a firewall, an administrator)
/// has the kernel choose anew which client port stands for which destination.
const RECHECK: Duration = Duration::from_secs(10);

/// How long to wait after receiving failed.
const BACK_OFF: Duration = Duration::from_millis(50);

thread_local! {
    static SHARED: RefCell<Box<[u8]>> = RefCell::new(vec![0; DATAGRAM].into_boxed_slice());
}

/// How long the kernel remembers flows.
#[derive(Debug, Clone, Copy)]
struct Timeouts {
    /// Without an answer, or with a first one.
    short: Duration,
    /// With more.
    long: Duration,
}

impl Timeouts {
    fn load() -> Self {
        // The kernel's own defaults, where it tells nobody.
        let read = |name, default| {
            conntrack::timeout(name, Duration::from_secs(default)).saturating_sub(MARGIN)
        };
        Self {
            short: read("udp_timeout", 30),
            long: read("udp_timeout_stream", 120),
        }
    }
}

/// One application's socket talking to one destination.
#[derive(Debug)]
struct Flow {
    timeouts: Timeouts,
    state: RefCell<State>,
    first_answer: Cell<Option<Instant>>,
    /// Whose it is and where it goes, once the helper has said so.
    original: Cell<Option<Original>>,
    /// When the helper was last asked.
    asked: Cell<Instant>,
    /// When it is over, unless something happens.
    deadline: Cell<Instant>,
    _permit: OwnedSemaphorePermit,
}

#[derive(Debug)]
enum State {
    /// These datagrams wait for the proxy.
    Waiting(Waiting),
    /// The proxy takes datagrams with this header in front.
    Ready {
        association: Rc<Association>,
        header: Vec<u8>,
        /// By what answers are known.
        key: Option<SocketAddr>,
    },
    /// It does not: they go nowhere until this flow is over.
    Failed,
}

/// Datagrams of a flow that the proxy is not ready for.
#[derive(Debug)]
struct Waiting {
    datagrams: Vec<Vec<u8>>,
    /// A permit for each byte that any flow may keep, and those that this one has.
    budget: Arc<Semaphore>,
    bytes: Option<OwnedSemaphorePermit>,
}

impl Waiting {
    fn new(budget: Arc<Semaphore>) -> Self {
        Self {
            datagrams: Vec::new(),
            budget,
            bytes: None,
        }
    }

    /// Keeps it if there is room, for this flow and for all.
    fn push(&mut self, datagram: &[u8]) {
        let held = self.bytes.as_ref().map_or(0, |bytes| bytes.num_permits());
        let more = datagram.len() + OVERHEAD;
        if self.datagrams.len() >= WAITING || held + more > FLOW_BYTES {
            return;
        }
        let permits = u32::try_from(more)
            .ok()
            .and_then(|more| self.budget.clone().try_acquire_many_owned(more).ok());
        let Some(permits) = permits else { return };
        match &mut self.bytes {
            Some(bytes) => bytes.merge(permits),
            none => *none = Some(permits),
        }
        self.datagrams.push(datagram.to_vec());
    }
}

impl Flow {
    /// Puts its end off. Not that of one that failed: the next one may fare better, and an application that goes on
    /// sending would never get there.
    fn touch(&self) {
        if matches!(*self.state.borrow(), State::Failed) {
            return;
        }
        let now = Instant::now();
        let stream = self.first_answer.get().is_some_and(|at| now > at + STREAM);
        let time = match stream {
            true => self.timeouts.long,
            false => self.timeouts.short,
        };
        self.deadline.set(now + time);
    }

    /// Whether its association has ended.
    fn is_dead(&self) -> bool {
        match &*self.state.borrow() {
            State::Ready { association, .. } => association.dead.get(),
            _ => false,
        }
    }

    fn send(&self, datagram: &[u8]) {
        match &mut *self.state.borrow_mut() {
            State::Waiting(waiting) => waiting.push(datagram),
            State::Ready {
                association,
                header,
                ..
            } => association.send(header, datagram),
            State::Failed => {}
        }
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        if let State::Ready {
            association, key, ..
        } = &*self.state.borrow()
        {
            // Its successor's way may be there by now.
            let mut routes = association.routes.borrow_mut();
            if routes
                .get(key)
                .is_some_and(|route| std::ptr::eq(route.flow.as_ptr(), self))
            {
                routes.remove(key);
            }
        }
    }
}

/// What an answer needs to get back.
#[derive(Debug, Clone)]
struct Route {
    listener: Rc<UdpSocket>,
    client: SocketAddr,
    flow: Weak<Flow>,
}

/// Answers by whom they come from; for a name, whoever that is.
type Routes = Rc<RefCell<HashMap<Option<SocketAddr>, Route>>>;

/// Somebody at the proxy who passes datagrams on. It ends when the last flow that uses it does.
#[derive(Debug)]
struct Association {
    socket: Rc<UdpSocket>,
    routes: Routes,
    /// The proxy has ended it.
    dead: Rc<Cell<bool>>,
    _end: DropGuard,
}

impl Association {
    async fn open(upstream: &Rc<Upstream>) -> Result<Rc<Self>, Error> {
        let (control, relay) = upstream.associate().await?;
        let down = |error: std::io::Error| Error::Down(error.to_string());
        let any: SocketAddr = match relay {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let socket = Rc::new(UdpSocket::bind(any).await.map_err(down)?);
        socket.connect(relay).await.map_err(down)?;
        // Until the runtime has heard from the kernel, `try_send` would throw the first datagrams away.
        socket.writable().await.map_err(down)?;
        let end = CancellationToken::new();
        let association = Rc::new(Self {
            socket: socket.clone(),
            routes: Routes::default(),
            dead: Rc::default(),
            _end: end.clone().drop_guard(),
        });
        let routes = association.routes.clone();
        let dead = association.dead.clone();
        tokio::task::spawn_local(async move {
            tokio::select! {
                () = answers(&socket, &routes) => {}
                () = ended(control) => {}
                () = end.cancelled() => {}
            }
            dead.set(true);
        });
        Ok(association)
    }

    /// Sends it, or not: it is a datagram.
    fn send(&self, header: &[u8], datagram: &[u8]) {
        let message = [header, datagram].concat();
        if let Err(error) = self.socket.try_send(&message) {
            tracing::trace!("a datagram was not sent: {error}");
        }
    }
}

/// Returns when the proxy ends the connection that stands for an association.
async fn ended(mut control: TcpStream) {
    let mut nothing = [0; 16];
    while let Ok(1..) = control.read(&mut nothing).await {}
}

/// Brings answers back, for ever.
async fn answers(socket: &UdpSocket, routes: &RefCell<HashMap<Option<SocketAddr>, Route>>) {
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
            if flow.first_answer.get().is_none() {
                flow.first_answer.set(Some(Instant::now()));
            }
            flow.touch();
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

/// The associations of all sockets.
type Slots = Rc<RefCell<HashMap<SocketAddr, Rc<Slot>>>>;

/// The flows of one listener, by the client that the kernel shows for each.
type Flows = Rc<RefCell<HashMap<SocketAddr, Rc<Flow>>>>;

/// Why a flow has not begun.
enum NotBegun {
    /// Nobody has redirected it.
    Stranger,
    /// The proxy does not take it, or the helper does not answer.
    Failed,
}

/// Carries datagrams on until the proxy is gone.
pub(crate) async fn run(listener: Rc<UdpSocket>, entry: Rc<Entry>) {
    let timeouts = Timeouts::load();
    let flows = Flows::default();
    let slots = Slots::default();
    let mut sweep = interval(SWEEP);
    sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut counted = 0;
    loop {
        tokio::select! {
            readable = listener.readable() => {
                if let Err(error) = readable {
                    tracing::warn!("can't receive: {error}");
                    tokio::time::sleep(BACK_OFF).await;
                }
            }
            // Opening an association may take longer than the flow that wanted it lasts.
            _ = sweep.tick(), if counted > 0 || !slots.borrow().is_empty() => {
                let now = Instant::now();
                flows.borrow_mut().retain(|_, flow| flow.deadline.get() > now && !flow.is_dead());
                forget(&slots);
            }
            () = entry.gone.cancelled() => return,
        }
        receive(&listener, &entry, timeouts, &flows, &slots);
        let others = entry.flows.get().saturating_sub(counted);
        counted = flows.borrow().len();
        entry.flows.set(others + counted);
        tokio::task::coop::consume_budget().await;
    }
}

/// Takes a datagram, if there is one.
fn receive(
    listener: &Rc<UdpSocket>,
    entry: &Rc<Entry>,
    timeouts: Timeouts,
    flows: &Flows,
    slots: &Slots,
) {
    SHARED.with_borrow_mut(|buffer| {
        let Ok((length, client)) = listener.try_recv_from(buffer) else {
            return;
        };
        let datagram = buffer.get(..length).unwrap_or_default();
        let known = flows.borrow().get(&client).cloned();
        if let Some(flow) = known
            && flow.deadline.get() > Instant::now()
            && !flow.is_dead()
        {
            flow.touch();
            flow.send(datagram);
            return recheck(flow, listener, entry, flows, client);
        }
        flows.borrow_mut().remove(&client);
        let shared = &entry.shared;
        let Ok(permit) = shared.flows.clone().try_acquire_owned() else {
            return;
        };
        let Ok(lookup) = shared.lookups.clone().try_acquire_owned() else {
            return;
        };
        let mut waiting = Waiting::new(shared.waiting.clone());
        waiting.push(datagram);
        let flow = Rc::new(Flow {
            timeouts,
            state: RefCell::new(State::Waiting(waiting)),
            first_answer: Cell::new(None),
            original: Cell::new(None),
            asked: Cell::new(Instant::now()),
            deadline: Cell::new(Instant::now()),
            _permit: permit,
        });
        flow.touch();
        flows.borrow_mut().insert(client, flow.clone());
        let (listener, entry, slots) = (listener.clone(), entry.clone(), slots.clone());
        // Flows end with their listener, whatever is still on its way for them.
        let flows = Rc::downgrade(flows);
        tokio::task::spawn_local(async move {
            match begin(&flow, &listener, &entry, &slots, client, lookup).await {
                Ok(()) => {}
                // Another user may send any number of these, and takes nobody's room by that.
                Err(NotBegun::Stranger) => {
                    if let Some(flows) = flows.upgrade() {
                        remove(&flows, client, &flow);
                    }
                }
                Err(NotBegun::Failed) => *flow.state.borrow_mut() = State::Failed,
            }
        });
    });
}

/// Has the helper asked about a flow once more if that is due, and forgets the flow if it goes elsewhere now: the next
/// datagram begins another one.
fn recheck(
    flow: Rc<Flow>,
    listener: &Rc<UdpSocket>,
    entry: &Rc<Entry>,
    flows: &Flows,
    client: SocketAddr,
) {
    let due = flow.asked.get().elapsed() >= RECHECK;
    let Some(original) = flow.original.get().filter(|_| due) else {
        return;
    };
    let lookup = entry.shared.lookups.clone().try_acquire_owned();
    let (Ok(lookup), Ok(local)) = (lookup, listener.local_addr()) else {
        return;
    };
    flow.asked.set(Instant::now());
    let (entry, flows) = (entry.clone(), Rc::downgrade(flows));
    tokio::task::spawn_local(async move {
        let _lookup = lookup;
        let found = entry.shared.originals.find(local, client).await;
        // A helper that is away for a moment says nothing about it.
        if found != Ok(original)
            && found != Err(Unknown::NoAnswer)
            && let Some(flows) = flows.upgrade()
        {
            tracing::debug!("{client} is another flow than it was");
            remove(&flows, client, &flow);
        }
    });
}

/// Forgets this flow, and not another one that has taken its place.
fn remove(flows: &Flows, client: SocketAddr, flow: &Rc<Flow>) {
    let mut flows = flows.borrow_mut();
    if flows
        .get(&client)
        .is_some_and(|known| Rc::ptr_eq(known, flow))
    {
        flows.remove(&client);
    }
}

/// Finds out where a flow goes, with a permit to ask for that, and gets it an association.
async fn begin(
    flow: &Rc<Flow>,
    listener: &Rc<UdpSocket>,
    entry: &Rc<Entry>,
    slots: &Slots,
    client: SocketAddr,
    lookup: OwnedSemaphorePermit,
) -> Result<(), NotBegun> {
    let local = listener.local_addr().map_err(|_| NotBegun::Failed)?;
    let found = entry.shared.originals.find(local, client).await;
    drop(lookup);
    let original = found.map_err(|unknown| match unknown {
        Unknown::NotRedirected => NotBegun::Stranger,
        Unknown::NoAnswer => NotBegun::Failed,
    })?;
    flow.original.set(Some(original));
    let target = entry.target(original.destination);
    let target = target.ok_or(NotBegun::Failed)?;
    let upstream = entry.upstream();
    let began = Instant::now();
    let (associated, key) = match &target {
        Target::Name(..) => (Association::open(&upstream).await, None),
        Target::Address(address) => {
            let associated = shared(slots, original.source, &upstream).await;
            (associated, Some(*address))
        }
    };
    entry.reached_for_udp(began, associated.as_ref().map(|_| ()));
    if associated.is_ok() {
        upstream.prepare();
    }
    let (Ok(association), Ok(header)) = (associated, socks::datagram_header(&target)) else {
        return Err(NotBegun::Failed);
    };
    let route = Route {
        listener: listener.clone(),
        client,
        flow: Rc::downgrade(flow),
    };
    association.routes.borrow_mut().insert(key, route);
    let ready = State::Ready {
        association: association.clone(),
        header,
        key,
    };
    if let State::Waiting(waiting) = flow.state.replace(ready) {
        for datagram in waiting.datagrams {
            flow.send(&datagram);
        }
    }
    Ok(())
}

/// The association of one socket.
async fn shared(
    slots: &Slots,
    source: SocketAddr,
    upstream: &Rc<Upstream>,
) -> Result<Rc<Association>, Error> {
    let alive = |weak: &Weak<Association>| weak.upgrade().filter(|a| !a.dead.get());
    loop {
        let slot = {
            let mut slots = slots.borrow_mut();
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

/// Forgets the associations that nobody uses or waits for.
fn forget(slots: &Slots) {
    slots.borrow_mut().retain(|_, slot| {
        match slot.association.get() {
            Some(Ok(association)) => association.strong_count() > 0,
            Some(Err(_)) => false,
            // Whoever waits for it has the slot too.
            None => Rc::strong_count(slot) > 1,
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dns::LeftOut;
    use crate::fake::Fakes;
    use crate::original::Originals;
    use crate::relay::{Relay, Shared, Wanted};
    use crate::upstream::Protocol;
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;
    use tokio::task::LocalSet;

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

    /// What a helper knows: where datagrams were sent, by the client that the kernel shows.
    type Known = Rc<RefCell<HashMap<SocketAddr, SocketAddr>>>;

    /// A helper that tells that.
    fn helper(directory: &std::path::Path, known: &Known) -> Originals {
        let path = directory.join("helper.sock");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let known = known.clone();
        tokio::task::spawn_local(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let known = known.clone();
                tokio::task::spawn_local(async move {
                    let mut call = Vec::new();
                    while let Ok(byte) = stream.read_u8().await {
                        if byte != 0 {
                            call.push(byte);
                            continue;
                        }
                        let asked: serde_json::Value =
                            serde_json::from_slice(&std::mem::take(&mut call)).unwrap();
                        let client = asked["parameters"]["client"].as_str().unwrap();
                        let client: SocketAddr = client.parse().unwrap();
                        let destination = known.borrow().get(&client).copied();
                        let answer = match destination {
                            Some(destination) => serde_json::json!({ "parameters": {
                                "source": "192.0.2.9:9",
                                "destination": destination.to_string(),
                            }}),
                            None => serde_json::json!({
                                "error": "org.cgtproxy.Helper.NotRedirected",
                                "parameters": {},
                            }),
                        };
                        let answer = format!("{answer}\0");
                        stream.write_all(answer.as_bytes()).await.unwrap();
                    }
                });
            }
        });
        Originals::new(path)
    }

    /// A relay for that server, its listener, and a socket that is connected to it.
    async fn bed(
        limit: usize,
        originals: Originals,
        upstream: Upstream,
    ) -> (Rc<Entry>, Rc<UdpSocket>, UdpSocket) {
        let relay = Relay::new(Shared::new(limit, originals, Fakes::new(None)));
        let wanted = Wanted {
            upstream,
            fake_dns: false,
            left_out: LeftOut::default(),
            preferred_port: None,
        };
        relay.configure(vec![wanted]).unwrap();
        let entry = relay.entry("own").unwrap();
        let listener = Rc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        let application = socket_to(&listener).await;
        (entry, listener, application)
    }

    async fn socket_to(listener: &UdpSocket) -> UdpSocket {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let to = listener.local_addr().unwrap();
        socket.connect(to).await.unwrap();
        socket
    }

    const TIMEOUTS: Timeouts = Timeouts {
        short: Duration::from_secs(30),
        long: Duration::from_secs(120),
    };

    /// Time stands still but for who waits for it.
    #[tokio::test(start_paused = true)]
    async fn a_flow_that_goes_elsewhere_now_begins_anew() {
        let test = async {
            let directory = tempfile::tempdir().unwrap();
            let known = Known::default();
            let originals = helper(directory.path(), &known);
            let upstream = Upstream::new("own".into(), Protocol::Http, "there".into(), 1, None);
            let (entry, listener, application) = bed(2, originals, upstream).await;
            let client = application.local_addr().unwrap();
            let (flows, slots) = (Flows::default(), Slots::default());
            let say = |to: &str| known.borrow_mut().insert(client, to.parse().unwrap());
            let flow = async || {
                application.send(b"?").await.unwrap();
                listener.readable().await.unwrap();
                receive(&listener, &entry, TIMEOUTS, &flows, &slots);
                while entry.shared.lookups.available_permits() < 1 {
                    tokio::task::yield_now().await;
                }
                let flow = flows.borrow().get(&client).cloned();
                flow.map(|flow| flow.original.get().unwrap().destination.to_string())
            };
            say("192.0.2.1:1");
            assert_eq!(flow().await.as_deref(), Some("192.0.2.1:1"));
            say("192.0.2.2:2");
            assert_eq!(flow().await.as_deref(), Some("192.0.2.1:1"), "not yet");
            tokio::time::advance(RECHECK).await;
            assert_eq!(flow().await, None);
            assert_eq!(flow().await.as_deref(), Some("192.0.2.2:2"));
            // Without a change it stays.
            let before = flows.borrow().get(&client).map(Rc::as_ptr);
            tokio::time::advance(RECHECK).await;
            assert_eq!(flow().await.as_deref(), Some("192.0.2.2:2"));
            assert_eq!(flows.borrow().get(&client).map(Rc::as_ptr), before);
            assert_eq!(entry.shared.flows.available_permits(), 1);
        };
        LocalSet::new().run_until(test).await;
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
                    }),
                    first_answer: Cell::new(None),
                    original: Cell::new(None),
                    asked: Cell::new(Instant::now()),
                    deadline: Cell::new(Instant::now()),
                    _permit: permits.clone().try_acquire_owned().unwrap(),
                });
                let route = Route {
                    listener: listener.clone(),
                    client: "127.0.0.1:1".parse().unwrap(),
                    flow: Rc::downgrade(&flow),
                };
                association.routes.borrow_mut().insert(key, route);
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
    async fn strangers_take_no_room_of_flows() {
        const LIMIT: usize = 4;
        let test = async {
            let directory = tempfile::tempdir().unwrap();
            let originals = helper(directory.path(), &Known::default());
            let upstream = Upstream::new("own".into(), Protocol::Http, "there".into(), 1, None);
            let (entry, listener, _) = bed(LIMIT, originals, upstream).await;
            let (flows, slots) = (Flows::default(), Slots::default());
            for _ in 0..3 * LIMIT {
                let stranger = socket_to(&listener).await;
                stranger.send(b"?").await.unwrap();
                listener.readable().await.unwrap();
                receive(&listener, &entry, TIMEOUTS, &flows, &slots);
                assert_eq!(flows.borrow().len(), 1, "the helper is asked");
                while !flows.borrow().is_empty() {
                    tokio::task::yield_now().await;
                }
            }
            assert_eq!(entry.shared.flows.available_permits(), LIMIT);
            assert_eq!(entry.shared.lookups.available_permits(), LIMIT / 2);
            assert_eq!(entry.shared.waiting.available_permits(), WAITING_BYTES);
            // Nor do those of whom nothing is known yet take all of it.
            let mut strangers = Vec::new();
            for _ in 0..2 * LIMIT {
                let stranger = socket_to(&listener).await;
                stranger.send(b"?").await.unwrap();
                strangers.push(stranger);
            }
            while flows.borrow().len() < LIMIT / 2 {
                receive(&listener, &entry, TIMEOUTS, &flows, &slots);
            }
            receive(&listener, &entry, TIMEOUTS, &flows, &slots);
            assert_eq!(flows.borrow().len(), LIMIT / 2);
        };
        LocalSet::new().run_until(test).await;
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

    /// Time stands still but for who waits for it.
    #[tokio::test(start_paused = true)]
    async fn one_that_failed_begins_anew_in_time_however_much_is_sent() {
        let test = async {
            let originals = Originals::new("/nonexistent".into());
            let upstream = Upstream::new("own".into(), Protocol::Http, "there".into(), 1, None);
            let (entry, listener, application) = bed(1, originals, upstream).await;
            let (flows, slots) = (Flows::default(), Slots::default());
            let mut attempts: Vec<(u64, Weak<Flow>)> = Vec::new();
            for second in 0..90 {
                application.send(b"are you there?").await.unwrap();
                listener.readable().await.unwrap();
                receive(&listener, &entry, TIMEOUTS, &flows, &slots);
                let flow = flows.borrow().values().next().unwrap().clone();
                if !attempts
                    .iter()
                    .any(|(_, known)| known.as_ptr() == Rc::as_ptr(&flow))
                {
                    attempts.push((second, Rc::downgrade(&flow)));
                }
                while matches!(*flow.state.borrow(), State::Waiting(_)) {
                    tokio::task::yield_now().await;
                }
                assert!(matches!(*flow.state.borrow(), State::Failed));
                tokio::time::advance(Duration::from_secs(1)).await;
            }
            let seconds: Vec<_> = attempts.iter().map(|(second, _)| *second).collect();
            assert_eq!(seconds, [0, 30, 60]);
        };
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test]
    async fn an_association_is_kept_for_who_waits_for_it_or_uses_it() {
        let test = async {
            let (server, upstream) = server().await;
            let slots = Slots::default();
            let source = "127.0.0.1:1".parse().unwrap();
            let kept = || {
                forget(&slots);
                slots.borrow().len()
            };
            let open = || shared(&slots, source, &upstream);
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
            let slots = Slots::default();
            let source = "127.0.0.1:1".parse().unwrap();
            let flows: Vec<_> = (0..50)
                .map(|_| {
                    let (slots, upstream) = (slots.clone(), upstream.clone());
                    tokio::task::spawn_local(async move { shared(&slots, source, &upstream).await })
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
