//! What is listened on, and for which proxy.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;

use crate::entry::{Entry, Report, Shared, Wanted};
use crate::sockets::Sockets;
use crate::{dns, tcp, udp};

/// A proxy's ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ports {
    /// Its name.
    pub name: String,
    /// For connections.
    pub port: u16,
    /// For DNS queries, if they are answered.
    pub dns_port: Option<u16>,
}

/// All proxies.
#[derive(Debug)]
pub(crate) struct Relay {
    shared: Rc<Shared>,
    entries: RefCell<BTreeMap<String, Rc<Entry>>>,
}

impl Relay {
    /// A relay without proxies.
    pub(crate) fn new(shared: Shared) -> Self {
        Self {
            shared: Rc::new(shared),
            entries: RefCell::default(),
        }
    }

    /// What all listeners share.
    pub(crate) fn shared(&self) -> &Shared {
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
    pub(crate) fn configure(&self, wanted: Vec<Wanted>) -> io::Result<Vec<Ports>> {
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
            let entry = start(self.shared.clone(), wanted, sockets, dns);
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
    pub(crate) fn save(&self) {
        self.shared.fakes.borrow_mut().save();
    }

    /// How all proxies are doing.
    pub(crate) fn reports(&self) -> Vec<Report> {
        let entries = self.entries.borrow();
        entries.values().map(|entry| entry.report()).collect()
    }
}

/// Listens for a proxy from now on.
fn start(shared: Rc<Shared>, wanted: Wanted, sockets: Sockets, dns: Option<Sockets>) -> Rc<Entry> {
    let dns_port = dns.as_ref().map(|sockets| sockets.port);
    let entry = Rc::new(Entry::new(shared, wanted, sockets.port, dns_port));
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
