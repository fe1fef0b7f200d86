//! UDP, by associations with a SOCKS5 server (RFC 1928, 7).
//!
//! Each destination of each of an application's sockets is a *flow*: the kernel shows another client port for it. The
//! flows of one socket share one association, so that the other ends of them all see it at one address.
//! A flow to a name has an association of its own, since answers come from an address.

mod association;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::conntrack;
use crate::original::{Original, Unknown};
use crate::relay::Entry;
use crate::socks;
use crate::target::Target;
use association::{Association, Associations, Route};

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

/// How long it is good for while so many flows begin that the helper is asked about nothing else.
const RECHECK_AT_LATEST: Duration = Duration::from_secs(30);

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
            State::Ready { association, .. } => association.is_dead(),
            _ => false,
        }
    }

    /// Notes that an answer has come.
    fn answered(&self) {
        if self.first_answer.get().is_none() {
            self.first_answer.set(Some(Instant::now()));
        }
        self.touch();
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
            association.remove_route(*key, self);
        }
    }
}

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
    let associations = Rc::new(Associations::default());
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
            _ = sweep.tick(), if counted > 0 || !associations.is_empty() => {
                let now = Instant::now();
                flows.borrow_mut().retain(|_, flow| flow.deadline.get() > now && !flow.is_dead());
                associations.forget_unused();
            }
            () = entry.gone.cancelled() => return,
        }
        receive(&listener, &entry, timeouts, &flows, &associations);
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
    associations: &Rc<Associations>,
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
        let (listener, entry) = (listener.clone(), entry.clone());
        let associations = associations.clone();
        // Flows end with their listener, whatever is still on its way for them.
        let flows = Rc::downgrade(flows);
        tokio::task::spawn_local(async move {
            match begin(&flow, &listener, &entry, &associations, client, lookup).await {
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
    let age = flow.asked.get().elapsed();
    let Some(original) = flow.original.get().filter(|_| age >= RECHECK) else {
        return;
    };
    let Ok(local) = listener.local_addr() else {
        return;
    };
    // The helper answers so many questions in a second, and flows that begin wait for theirs. This one can do without,
    // for a while; then it waits in line, if no other such flow does.
    let turn = entry.shared.originals.turn();
    let waits = match turn {
        Some(_) => None,
        None if age < RECHECK_AT_LATEST => return,
        None => match entry.shared.recheck.clone().try_acquire_owned() {
            Ok(permit) => Some(permit),
            Err(_) => return,
        },
    };
    flow.asked.set(Instant::now());
    let (entry, flows) = (entry.clone(), Rc::downgrade(flows));
    tokio::task::spawn_local(async move {
        let originals = &entry.shared.originals;
        let found = match turn {
            Some(turn) => originals.find_in(turn, local, client).await,
            None => originals.find(local, client).await,
        };
        drop(waits);
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
    associations: &Associations,
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
            let associated = associations.of(original.source, &upstream).await;
            (associated, Some(*address))
        }
    };
    entry.reached_for_udp(&upstream, began, associated.as_ref().map(|_| ()));
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
    association.add_route(key, route);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dns::LeftOut;
    use crate::fake::Fakes;
    use crate::original::Originals;
    use crate::relay::{Relay, Shared, Wanted};
    use crate::upstream::{Error, Protocol, Upstream};
    use std::rc::Weak;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::task::LocalSet;

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
        bed_of(&relay, upstream).await
    }

    /// The same of a relay that is there.
    async fn bed_of(relay: &Relay, upstream: Upstream) -> (Rc<Entry>, Rc<UdpSocket>, UdpSocket) {
        configure(relay, upstream);
        let entry = relay.entry("own").unwrap();
        let listener = Rc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        let application = socket_to(&listener).await;
        (entry, listener, application)
    }

    fn configure(relay: &Relay, upstream: Upstream) {
        let wanted = Wanted {
            upstream,
            fake_dns: false,
            left_out: LeftOut::default(),
            preferred_port: None,
        };
        relay.configure(vec![wanted]).unwrap();
    }

    async fn socket_to(listener: &UdpSocket) -> UdpSocket {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let to = listener.local_addr().unwrap();
        socket.connect(to).await.unwrap();
        socket
    }

    pub(super) const TIMEOUTS: Timeouts = Timeouts {
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
            let (flows, associations) = (Flows::default(), Rc::default());
            let say = |to: &str| known.borrow_mut().insert(client, to.parse().unwrap());
            let Shared {
                originals, lookups, ..
            } = &*entry.shared;
            let timeouts = Timeouts {
                short: 2 * RECHECK_AT_LATEST,
                ..TIMEOUTS
            };
            let send = async || {
                application.send(b"?").await.unwrap();
                listener.readable().await.unwrap();
                receive(&listener, &entry, timeouts, &flows, &associations);
            };
            let flow = async || {
                send().await;
                while lookups.available_permits() < 1 || originals.turn().is_none() {
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
            // Nor while others ask.
            let turn = originals.turn();
            send().await;
            tokio::task::yield_now().await;
            drop(turn);
            assert!(flows.borrow().contains_key(&client));
            assert_eq!(flow().await, None);
            assert_eq!(flow().await.as_deref(), Some("192.0.2.2:2"));
            // Where they always do, it waits for its turn.
            say("192.0.2.3:3");
            let asked = (originals.turn(), lookups.clone().try_acquire_owned());
            tokio::time::advance(RECHECK_AT_LATEST).await;
            send().await;
            tokio::task::yield_now().await;
            assert_eq!(entry.shared.recheck.available_permits(), 0);
            drop(asked);
            while originals.turn().is_none() {
                tokio::task::yield_now().await;
            }
            assert_eq!(flow().await.as_deref(), Some("192.0.2.3:3"));
            // Without a change it stays.
            let before = flows.borrow().get(&client).map(Rc::as_ptr);
            tokio::time::advance(RECHECK).await;
            assert_eq!(flow().await.as_deref(), Some("192.0.2.3:3"));
            assert_eq!(flows.borrow().get(&client).map(Rc::as_ptr), before);
            assert_eq!(entry.shared.flows.available_permits(), 1);
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
            let (flows, associations) = (Flows::default(), Rc::default());
            for _ in 0..3 * LIMIT {
                let stranger = socket_to(&listener).await;
                stranger.send(b"?").await.unwrap();
                listener.readable().await.unwrap();
                receive(&listener, &entry, TIMEOUTS, &flows, &associations);
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
                receive(&listener, &entry, TIMEOUTS, &flows, &associations);
            }
            receive(&listener, &entry, TIMEOUTS, &flows, &associations);
            assert_eq!(flows.borrow().len(), LIMIT / 2);
        };
        LocalSet::new().run_until(test).await;
    }

    /// Time stands still but for who waits for it.
    #[tokio::test(start_paused = true)]
    async fn one_that_failed_begins_anew_in_time_however_much_is_sent() {
        let test = async {
            let originals = Originals::new("/nonexistent".into());
            let upstream = Upstream::new("own".into(), Protocol::Http, "there".into(), 1, None);
            let (entry, listener, application) = bed(1, originals, upstream).await;
            let (flows, associations) = (Flows::default(), Rc::default());
            let mut attempts: Vec<(u64, Weak<Flow>)> = Vec::new();
            for second in 0..90 {
                application.send(b"are you there?").await.unwrap();
                listener.readable().await.unwrap();
                receive(&listener, &entry, TIMEOUTS, &flows, &associations);
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

    /// Time stands still but for who waits for it.
    #[tokio::test(start_paused = true)]
    async fn what_becomes_of_a_former_proxy_is_not_said_of_its_successor() {
        let test = async {
            let directory = tempfile::tempdir().unwrap();
            let known = Known::default();
            let originals = helper(directory.path(), &known);
            let relay = Relay::new(Shared::new(2, originals, Fakes::new(None)));
            // It takes connections and says nothing.
            let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = silent.local_addr().unwrap().port();
            let leads_to = |port| {
                let host = "127.0.0.1".into();
                Upstream::new("own".into(), Protocol::Socks5, host, port, None)
            };
            let problem = || relay.reports()[0].problem.clone();
            for (another, expected) in [(false, Some("it does not answer")), (true, None)] {
                let (entry, listener, application) = bed_of(&relay, leads_to(port)).await;
                let client = application.local_addr().unwrap();
                known
                    .borrow_mut()
                    .insert(client, "192.0.2.1:1".parse().unwrap());
                let (flows, associations) = (Flows::default(), Rc::default());
                application.send(b"?").await.unwrap();
                listener.readable().await.unwrap();
                receive(&listener, &entry, TIMEOUTS, &flows, &associations);
                let (_asked, _) = silent.accept().await.unwrap();
                assert_eq!(problem(), None);
                if another {
                    configure(&relay, leads_to(1));
                }
                let flow = flows.borrow()[&client].clone();
                while matches!(*flow.state.borrow(), State::Waiting(_)) {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
                assert_eq!(problem().as_deref(), expected);
                if another {
                    // Nor that it is there.
                    let former = Rc::new(leads_to(port));
                    entry.reached(&former, Instant::now(), Err(&Error::Ended));
                    assert_eq!(problem(), None);
                    let now = entry.upstream();
                    entry.reached(&now, Instant::now(), Err(&Error::Ended));
                    entry.reached(&former, Instant::now(), Ok(()));
                    assert!(problem().is_some());
                }
                configure(&relay, leads_to(2));
            }
        };
        LocalSet::new().run_until(test).await;
    }
}
