//! What everything in one sandbox shares.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, Weak};

use super::network;
use super::server::Control;

pub(crate) struct World {
    internet: Arc<Control>,
    servers: Mutex<Vec<Weak<Control>>>,
    logs: Mutex<Vec<PathBuf>>,
    /// Hosts behind the machine.
    hosts: Mutex<Vec<IpAddr>>,
    networks: AtomicU8,
    v4: AtomicU32,
    v6: AtomicU32,
    count: AtomicU32,
}

impl World {
    pub(crate) fn create() -> Self {
        network::build();
        Self {
            internet: Arc::new(network::start_internet()),
            servers: Mutex::default(),
            logs: Mutex::default(),
            hosts: Mutex::default(),
            networks: AtomicU8::new(1),
            v4: AtomicU32::new(0),
            v6: AtomicU32::new(1),
            count: AtomicU32::new(0),
        }
    }

    /// A number that is used once: for names of files and flows, and for questions.
    pub(crate) fn number(&self) -> u32 {
        self.count.fetch_add(1, Ordering::Relaxed)
    }

    /// TEST-NET-2 and TEST-NET-3, then the benchmarking network.
    pub(crate) fn fresh_v4(&self) -> IpAddr {
        let n = self.v4.fetch_add(1, Ordering::Relaxed);
        let [.., high, low] = n.to_be_bytes();
        match n {
            0..254 => Ipv4Addr::new(198, 51, 100, low + 1),
            254..508 => Ipv4Addr::new(203, 0, 113, u8::try_from(n - 253).unwrap()),
            _ => Ipv4Addr::new(198, 18, high, low),
        }
        .into()
    }

    pub(crate) fn fresh_v6(&self) -> IpAddr {
        let n = self.v6.fetch_add(1, Ordering::Relaxed);
        let [a, b, c, d] = n.to_be_bytes().map(u16::from);
        Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, a << 8 | b, c << 8 | d).into()
    }

    pub(crate) fn add_server(&self, server: &Arc<Control>) {
        self.servers.lock().unwrap().push(Arc::downgrade(server));
    }

    /// A new file for what a process has to say.
    pub(crate) fn new_log(&self, name: &str) -> PathBuf {
        let path = network::state_dir("log").join(format!("{name}-{}", self.number()));
        self.logs.lock().unwrap().push(path.clone());
        path
    }

    pub(crate) fn print_logs(&self) {
        for path in self.logs.lock().unwrap().iter() {
            let text = std::fs::read(path).unwrap_or_default();
            eprintln!("-- {}\n{}", path.display(), String::from_utf8_lossy(&text));
        }
    }

    /// See [`super::Sandbox::settle`]. Packets first, then the servers' answers, then the packets
    /// those are made of.
    pub(crate) fn settle(&self) {
        self.flush();
        self.internet.sync();
        for server in self.live_servers() {
            server.sync();
        }
        self.flush();
    }

    /// Echo requests push everything before them through, there and back.
    fn flush(&self) {
        self.internet.flush(network::MACHINE_V4);
        for host in self.hosts.lock().unwrap().iter() {
            self.internet.flush(*host);
        }
    }

    /// The number of a network behind the machine.
    pub(crate) fn new_network(&self) -> u8 {
        self.networks.fetch_add(1, Ordering::Relaxed)
    }

    /// Packets to and from this host have to settle, too.
    pub(crate) fn add_host(&self, address: IpAddr) {
        self.hosts.lock().unwrap().push(address);
    }

    /// Whether a question is known to have reached a server. Ask after [`World::settle`].
    pub(crate) fn was_asked(&self, token: &str) -> bool {
        let asked = |server: &Control| {
            server
                .arrivals()
                .iter()
                .any(|arrival| arrival.token.as_deref() == Some(token))
        };
        asked(&self.internet) || self.live_servers().iter().any(|server| asked(server))
    }

    fn live_servers(&self) -> Vec<Arc<Control>> {
        self.servers
            .lock()
            .unwrap()
            .iter()
            .filter_map(Weak::upgrade)
            .collect()
    }
}
