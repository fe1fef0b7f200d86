//! What is listened on, and for which proxy.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;

use tokio::net::{TcpListener, TcpSocket, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::dns::LeftOut;
use crate::fake::Fakes;
use crate::original::Originals;
use crate::target::Target;
use crate::upstream::{Error, Upstream};
use crate::{dns, tcp, udp};

/// How often to look for a port that is free for TCP and UDP, on both addresses.
const ATTEMPTS: usize = 64;

/// How many connections may wait to be accepted.
const BACKLOG: u32 = 4096;

/// What all listeners share.
#[derive(Debug)]
pub struct Shared {
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
    #[must_use]
    pub fn new(limit: usize, originals: Originals, fakes: Fakes) -> Self {
        Self {
            limit,
            connections: Arc::new(Semaphore::new(limit)),
            flows: Arc::new(Semaphore::new(limit)),
            waiting: Arc::new(Semaphore::new(udp::WAITING_BYTES)),
            lookups: Arc::new(Semaphore::new(udp::LOOKUPS.min(limit.div_ceil(2)))),
            recheck: Arc::new(Semaphore::new(1)),
            dns_originals: originals.another(),
            originals,
            fakes: RefCell::new(fakes),
        }
    }
}

/// One proxy's listeners, and what has become of its connections.
#[derive(Debug)]
pub struct Entry {
    /// Replaced when the configuration is.
    upstream: RefCell<Rc<Upstream>>,
    /// Of which families no addresses stand for names.
    pub(crate) left_out: Cell<LeftOut>,
    port: u16,
    dns_port: Option<u16>,
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
pub struct Report {
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
    /// One that is listened for from now on.
    fn start(
        shared: Rc<Shared>,
        wanted: Wanted,
        sockets: Sockets,
        dns: Option<Sockets>,
    ) -> Rc<Self> {
        let entry = Rc::new(Self {
            upstream: RefCell::new(Rc::new(wanted.upstream)),
            left_out: Cell::new(wanted.left_out),
            port: sockets.port,
            dns_port: dns.as_ref().map(|sockets| sockets.port),
            shared,
            gone: CancellationToken::new(),
            open: Cell::new(0),
            flows: Cell::new(0),
            total: Cell::new(0),
            answered: Cell::new(None),
            problem: RefCell::default(),
            udp_problem: RefCell::default(),
        });
        for (listener, at) in sockets.tcp {
            tokio::task::spawn_local(tcp::run(listener, at, entry.clone()));
        }
        for socket in sockets.udp {
            tokio::task::spawn_local(udp::run(Rc::new(socket), entry.clone()));
        }
        if let Some(dns) = dns {
            for (listener, at) in dns.tcp {
                tokio::task::spawn_local(dns::run_tcp(listener, at, entry.clone()));
            }
            for socket in dns.udp {
                tokio::task::spawn_local(dns::run_udp(Rc::new(socket), entry.clone()));
            }
        }
        entry
    }

    /// Goes on as that proxy. What is known of one that is the same in all that matters stays known.
    fn keep(&self, wanted: Wanted) {
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

    fn report(&self) -> Report {
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
pub struct Wanted {
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

/// A proxy's ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ports {
    /// Its name.
    pub name: String,
    /// For connections.
    pub port: u16,
    /// For DNS queries, if they are answered.
    pub dns_port: Option<u16>,
}

/// All proxies.
#[derive(Debug)]
pub struct Relay {
    shared: Rc<Shared>,
    entries: RefCell<BTreeMap<String, Rc<Entry>>>,
}

impl Relay {
    /// A relay without proxies.
    #[must_use]
    pub fn new(shared: Shared) -> Self {
        Self {
            shared: Rc::new(shared),
            entries: RefCell::default(),
        }
    }

    /// What all listeners share.
    #[must_use]
    pub fn shared(&self) -> &Shared {
        &self.shared
    }

    #[cfg(test)]
    pub(crate) fn entry(&self, name: &str) -> Option<Rc<Entry>> {
        self.entries.borrow().get(name).cloned()
    }

    /// Takes over a configuration whose names differ. To be called within a `LocalSet`.
    ///
    /// # Errors
    /// If there is no port for one; nothing has changed then.
    pub fn configure(&self, wanted: Vec<Wanted>) -> io::Result<Vec<Ports>> {
        let mut entries = self.entries.borrow_mut();
        let mut fresh = Vec::new();
        let mut kept = Vec::new();
        for wanted in wanted {
            match entries.get(&wanted.upstream.name) {
                Some(entry) if entry.dns_port.is_some() == wanted.fake_dns => {
                    kept.push((entry.clone(), wanted));
                }
                old => {
                    // A listener of the old entry would be in the way of its successor's.
                    let preferred = |port: Option<u16>| port.filter(|_| old.is_none());
                    let sockets = Sockets::bind(preferred(wanted.preferred_port))?;
                    let dns = match wanted.fake_dns {
                        true => Some(Sockets::bind(preferred(wanted.preferred_dns_port))?),
                        false => None,
                    };
                    fresh.push((wanted, sockets, dns));
                }
            }
        }
        // From here on nothing fails.
        let mut next = BTreeMap::new();
        for (entry, wanted) in kept {
            let name = wanted.upstream.name.clone();
            entry.keep(wanted);
            next.insert(name, entry);
        }
        for (wanted, sockets, dns) in fresh {
            let name = wanted.upstream.name.clone();
            let entry = Entry::start(self.shared.clone(), wanted, sockets, dns);
            next.insert(name, entry);
        }
        let old = std::mem::replace(&mut *entries, next);
        for (name, entry) in old {
            if !entries
                .get(&name)
                .is_some_and(|new| Rc::ptr_eq(new, &entry))
            {
                entry.gone.cancel();
            }
        }
        let ports = entries.iter().map(|(name, entry)| Ports {
            name: name.clone(),
            port: entry.port,
            dns_port: entry.dns_port,
        });
        Ok(ports.collect())
    }

    /// Writes down which addresses stand for which names.
    pub fn save(&self) {
        self.shared.fakes.borrow_mut().save();
    }

    /// How all proxies are doing.
    #[must_use]
    pub fn reports(&self) -> Vec<Report> {
        let entries = self.entries.borrow();
        entries.values().map(|entry| entry.report()).collect()
    }
}

/// Listening sockets with one port: TCP and UDP, on 127.0.0.1 and, where there is IPv6, on ::1.
#[derive(Debug)]
struct Sockets {
    port: u16,
    tcp: Vec<(TcpListener, SocketAddr)>,
    udp: Vec<UdpSocket>,
}

impl Sockets {
    fn bind(preferred: Option<u16>) -> io::Result<Self> {
        if let Some(port) = preferred
            && let Ok(sockets) = Self::at(port)
        {
            return Ok(sockets);
        }
        let mut result = Err(io::ErrorKind::AddrInUse.into());
        for _ in 0..ATTEMPTS {
            result = Self::at(0);
            match &result {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
                _ => break,
            }
        }
        result
    }

    fn at(port: u16) -> io::Result<Self> {
        let v4 = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
        let first = listen(v4)?;
        let port = first.local_addr()?.port();
        let v4 = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
        let v6 = SocketAddr::new(Ipv6Addr::LOCALHOST.into(), port);
        let mut sockets = Self {
            port,
            tcp: vec![(first, v4)],
            udp: vec![bind_udp(v4)?],
        };
        match listen(v6) {
            Ok(listener) => {
                sockets.tcp.push((listener, v6));
                sockets.udp.push(bind_udp(v6)?);
            }
            // A machine without IPv6 sends none.
            Err(error)
                if matches!(
                    rustix::io::Errno::from_io_error(&error),
                    Some(rustix::io::Errno::AFNOSUPPORT | rustix::io::Errno::ADDRNOTAVAIL)
                ) => {}
            Err(error) => return Err(error),
        }
        Ok(sockets)
    }
}

/// Without SO_REUSEADDR: the rests of connections that ended in order keep other users from taking the port at once
/// when the relay ends, as the kernel could not tell their listener from this one. Those that the relay's end has
/// reset leave none, so the next relay listens here again.
fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match address.ip() {
        IpAddr::V4(_) => TcpSocket::new_v4()?,
        IpAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.bind(address)?;
    tcp::set_listener_options(&socket)?;
    socket.listen(BACKLOG)
}

fn bind_udp(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = std::net::UdpSocket::bind(address)?;
    socket.set_nonblocking(true)?;
    UdpSocket::from_std(socket)
}
