//! A proxy as applications reach it: what its listeners share, and what has become of its connections.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::fake::{Fakes, LeftOut};
use crate::original::Originals;
use crate::target::Target;
use crate::upstream::{Error, Upstream};

/// How many bytes the datagrams of all UDP flows may have that wait.
pub(crate) const WAITING_BYTES: usize = 8 << 20;

/// Of how many UDP flows the helper may be asked at once.
const LOOKUPS: usize = 1024;

/// What all listeners share.
#[derive(Debug)]
pub(crate) struct Shared {
    /// How many TCP connections there may be, and how many UDP flows.
    pub limit: usize,
    /// One permit for each TCP connection that there may be.
    pub(crate) connections: Arc<Semaphore>,
    /// One permit for each UDP flow that there may be.
    pub(crate) flows: Arc<Semaphore>,
    /// One permit for each byte of datagrams that wait for a proxy.
    pub(crate) waiting: Arc<Semaphore>,
    /// One permit for each flow of which the helper may be asked at once. There are fewer than flows: whoever floods a
    /// listener leaves room for those that are known.
    pub(crate) lookups: Arc<Semaphore>,
    /// The permit of the flow in use that waits until the helper can be asked about it: one at a time.
    pub(crate) recheck: Arc<Semaphore>,
    /// Where UDP was going.
    pub(crate) originals: Originals,
    /// Where queries were going: they don't wait for the rest.
    pub(crate) dns_originals: Originals,
    /// Addresses that stand for names.
    pub(crate) fakes: RefCell<Fakes>,
}

impl Shared {
    /// With room for `limit` connections.
    pub(crate) fn new(limit: usize, originals: Originals, fakes: Fakes) -> Self {
        Self {
            limit,
            connections: Arc::new(Semaphore::new(limit)),
            flows: Arc::new(Semaphore::new(limit)),
            waiting: Arc::new(Semaphore::new(WAITING_BYTES)),
            lookups: Arc::new(Semaphore::new(LOOKUPS.min(limit.div_ceil(2)))),
            recheck: Arc::new(Semaphore::new(1)),
            dns_originals: originals.another(),
            originals,
            fakes: RefCell::new(fakes),
        }
    }
}

/// One proxy's listeners, and what has become of its connections.
#[derive(Debug)]
pub(crate) struct Entry {
    /// Replaced when the configuration is.
    upstream: RefCell<Rc<Upstream>>,
    /// Of which families no addresses stand for names.
    pub(crate) left_out: Cell<LeftOut>,
    pub(crate) port: u16,
    pub(crate) dns_port: Option<u16>,
    pub(crate) shared: Rc<Shared>,
    /// Cancelled when the proxy is not in the configuration any more.
    pub(crate) gone: CancellationToken,
    pub(crate) open: Cell<usize>,
    pub(crate) flows: Cell<usize>,
    total: Cell<u64>,
    /// When it last answered, whatever that was.
    answered: Cell<Option<Instant>>,
    problem: RefCell<Option<String>>,
    udp_problem: RefCell<Option<String>>,
}

/// How a proxy is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Report {
    /// Its name.
    pub name: String,
    /// The port for connections.
    pub port: u16,
    /// Open TCP connections.
    pub open: usize,
    /// UDP flows.
    pub flows: usize,
    /// Connections since the relay started.
    pub total: u64,
    /// Why it could not be reached.
    pub problem: Option<String>,
    /// Why it carries no UDP.
    pub udp_problem: Option<String>,
}

impl Entry {
    /// One that nothing is known of.
    pub(crate) fn new(
        shared: Rc<Shared>,
        wanted: Wanted,
        port: u16,
        dns_port: Option<u16>,
    ) -> Self {
        Self {
            upstream: RefCell::new(Rc::new(wanted.upstream)),
            left_out: Cell::new(wanted.left_out),
            port,
            dns_port,
            shared,
            gone: CancellationToken::new(),
            open: Cell::new(0),
            flows: Cell::new(0),
            total: Cell::new(0),
            answered: Cell::new(None),
            problem: RefCell::default(),
            udp_problem: RefCell::default(),
        }
    }

    /// Goes on as that proxy. What is known of one that is the same in all that matters stays known.
    pub(crate) fn keep(&self, wanted: Wanted) {
        if !self.upstream.borrow().is_same_as(&wanted.upstream) {
            *self.upstream.borrow_mut() = Rc::new(wanted.upstream);
            self.answered.set(None);
            *self.problem.borrow_mut() = None;
            *self.udp_problem.borrow_mut() = None;
        }
        self.left_out.set(wanted.left_out);
    }

    /// The proxy as it is configured now.
    pub(crate) fn upstream(&self) -> Rc<Upstream> {
        self.upstream.borrow().clone()
    }

    /// A connection begins.
    pub(crate) fn count(&self) {
        self.total.set(self.total.get().saturating_add(1));
    }

    /// Notes how reaching the proxy went, which began at that time, for whoever asks; the log has changes alone. What
    /// became of one that is not configured any more says nothing about the one that is.
    pub(crate) fn reached(
        &self,
        upstream: &Rc<Upstream>,
        began: Instant,
        result: Result<(), &Error>,
    ) {
        if !self.leads_to(upstream) {
            return;
        }
        match result {
            Ok(()) | Err(Error::Refused(_)) => self.answered.set(Some(Instant::now())),
            // It has answered other connections since, so this destination is slow and not the proxy.
            Err(Error::Silent) if self.answered.get().is_some_and(|at| at >= began) => return,
            Err(Error::Silent | Error::Ended | Error::Down(_)) => {}
        }
        note(&self.problem, &upstream.name, result, "");
    }

    /// The same for UDP.
    pub(crate) fn reached_for_udp(
        &self,
        upstream: &Rc<Upstream>,
        began: Instant,
        result: Result<(), &Error>,
    ) {
        if !self.leads_to(upstream) {
            return;
        }
        if let Err(error @ (Error::Down(_) | Error::Silent)) = result {
            return self.reached(upstream, began, Err(error));
        }
        self.reached(upstream, began, Ok(()));
        // It is there, but has no UDP: it is not down, and will not have any the next time.
        let refused = match result {
            Err(Error::Refused(why)) => Some(Error::Down(why.clone())),
            // How sshd says no.
            Err(Error::Ended) => Some(Error::Ended),
            _ => None,
        };
        note(
            &self.udp_problem,
            &upstream.name,
            refused.as_ref().map_or(Ok(()), Err),
            " for UDP",
        );
    }

    /// Whether that is the proxy as it is configured now.
    fn leads_to(&self, upstream: &Rc<Upstream>) -> bool {
        Rc::ptr_eq(&self.upstream.borrow(), upstream)
    }

    /// What a destination means; none if that is not known any more.
    pub(crate) fn target(&self, destination: SocketAddr) -> Option<Target> {
        if self.dns_port.is_none() {
            return Some(Target::Address(destination));
        }
        let target = self.shared.fakes.borrow_mut().target(destination);
        if target.is_none() {
            tracing::debug!("{destination} stands for a name that nobody knows any more");
        }
        target
    }

    pub(crate) fn report(&self) -> Report {
        Report {
            name: self.upstream.borrow().name.clone(),
            port: self.port,
            open: self.open.get(),
            flows: self.flows.get(),
            total: self.total.get(),
            problem: self.problem.borrow().clone(),
            udp_problem: self.udp_problem.borrow().clone(),
        }
    }
}

fn note(problem: &RefCell<Option<String>>, name: &str, result: Result<(), &Error>, what: &str) {
    let new = match result {
        Ok(()) | Err(Error::Refused(_)) => None,
        Err(error) => Some(error.to_string()),
    };
    let mut problem = problem.borrow_mut();
    if *problem == new {
        return;
    }
    match &new {
        Some(why) => tracing::warn!("can't use proxy '{name}'{what}: {why}"),
        None => tracing::info!("proxy '{name}' can be used again{what}"),
    }
    *problem = new;
}

/// A proxy as it is to be.
#[derive(Debug)]
pub(crate) struct Wanted {
    /// Where connections go.
    pub upstream: Upstream,
    /// DNS queries are answered with addresses that stand for names.
    pub fake_dns: bool,
    /// But none of these.
    pub left_out: LeftOut,
    /// The port it was listened on for before.
    pub preferred_port: Option<u16>,
    /// The same for DNS queries.
    pub preferred_dns_port: Option<u16>,
}
