//! UDP, by associations with a SOCKS5 server (RFC 1928, 7).
//!
//! Each destination of each of an application's sockets is a *flow*: the kernel shows another client port for it. The
//! flows of one socket share one association, so that the other ends of them all see it at one address.
//! A flow to a name has an association of its own, since answers come from an address.

mod association;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use cgtproxy_proto::back_off::BackOff;
use tokio::net::UdpSocket;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::conntrack;
use crate::entry::Entry;
use crate::original::{Original, Unknown};
use crate::socks;
use crate::target::Target;
use crate::upstream::{Error, Upstream};
use association::{Association, Associations, Route};

/// The largest datagram, and the largest header before one.
const DATAGRAM: usize = 65_536;

/// How many datagrams of a flow may wait until the proxy is ready for them.
const WAITING: usize = 16;

/// How many bytes they may have: one of the largest fits in, with others.
const FLOW_BYTES: usize = 2 * DATAGRAM;

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

/// How soon a flow that has failed may begin anew. Each time that it fails again it waits twice as long, up to what the
/// kernel remembers of flows without answers: a proxy that is being restarted is there again soon, and one that stays away
/// is not asked with each datagram.
const AGAIN: Duration = Duration::from_secs(1);

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
    /// When it began.
    began: Instant,
    /// When it is over, unless something happens.
    deadline: Cell<Instant>,
    /// How long it waits if it fails, and the one that begins in its place after it.
    back_off: RefCell<BackOff>,
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
        /// Whose association it is.
        upstream: Weak<Upstream>,
    },
    /// It does not: they go nowhere until the flow begins anew, at this time.
    Failed(Instant),
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
    /// Puts its end off.
    fn touch(&self) {
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

    /// Whether the proxy has ended its association at once.
    fn was_in_vain(&self) -> bool {
        match &*self.state.borrow() {
            State::Ready { association, .. } => association.was_in_vain(),
            _ => false,
        }
    }

    /// Whether it is over. One whose association was in vain has failed like one that the proxy did not take.
    fn is_over(&self, entry: &Entry) -> bool {
        if self.was_in_vain()
            && let Some(upstream) = self.fail(self.began, Some(&Error::Ended))
        {
            entry.reached_for_udp(&upstream, self.began, Err(&Error::Ended));
        }
        self.deadline.get() <= Instant::now() || self.is_dead()
    }

    /// Whether the next datagram begins another one. One that has failed is not forgotten by then: its successor waits for
    /// longer than it did.
    fn begins_anew(&self, entry: &Entry) -> bool {
        let is_over = self.is_over(entry);
        match *self.state.borrow() {
            State::Failed(again) => again <= Instant::now(),
            _ => is_over,
        }
    }

    /// How long its successor waits if it fails.
    fn next_back_off(&self) -> Option<BackOff> {
        let failed = matches!(*self.state.borrow(), State::Failed(_));
        failed.then(|| self.back_off.borrow().clone())
    }

    /// Gives up what it has, for some time since then: what the proxy has refused it will hardly grant soon. Returns whose
    /// that was, if it is the same still.
    fn fail(&self, since: Instant, why: Option<&Error>) -> Option<Rc<Upstream>> {
        let wait = match why {
            Some(Error::Refused(_)) => self.timeouts.short,
            _ => self.back_off.borrow_mut().next_wait(),
        };
        let before = self.state.replace(State::Failed(since + wait));
        let State::Ready {
            association,
            key,
            upstream,
            ..
        } = before
        else {
            return None;
        };
        association.remove_route(key, self);
        upstream.upgrade()
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
            State::Failed(_) => {}
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
    /// The proxy does not take it.
    NotTaken(Error),
    /// The helper does not answer, or nobody knows where it goes.
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
                flows.borrow_mut().retain(|_, flow| !flow.is_over(&entry));
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
            && !flow.begins_anew(entry)
        {
            flow.touch();
            flow.send(datagram);
            return recheck(flow, listener, entry, flows, client);
        }
        let before = flows.borrow_mut().remove(&client);
        let back_off = before
            .and_then(|flow| flow.next_back_off())
            .unwrap_or_else(|| BackOff::new((AGAIN, timeouts.short)));
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
            began: Instant::now(),
            deadline: Cell::new(Instant::now()),
            back_off: RefCell::new(back_off),
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
                Err(NotBegun::NotTaken(error)) => {
                    flow.fail(Instant::now(), Some(&error));
                }
                Err(NotBegun::Failed) => {
                    flow.fail(Instant::now(), None);
                }
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
    let association = associated.map_err(NotBegun::NotTaken)?;
    let header = socks::datagram_header(&target).map_err(|_| NotBegun::Failed)?;
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
        upstream: Rc::downgrade(&upstream),
    };
    if let State::Waiting(waiting) = flow.state.replace(ready) {
        for datagram in waiting.datagrams {
            flow.send(&datagram);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
