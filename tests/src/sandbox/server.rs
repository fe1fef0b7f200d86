//! Test servers: TPROXY servers and ordinary services.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use super::cgroup::Cgroup;
use super::driven::Driven;
use super::launch::{Launch, binary};
use super::world::World;
use crate::wire::{Arrival, Listen, ServerKind, ServerOrder, ServerReport, ServerSpec, Transport};

/// A running server, seen from the harness.
pub(crate) struct Control {
    name: String,
    process: Mutex<Driven>,
    arrivals: Mutex<Vec<Arrival>>,
}

impl Control {
    #[track_caller]
    pub(crate) fn start(launch: Launch, spec: &ServerSpec) -> Self {
        let json = serde_json::to_string(spec).expect("plain data");
        let mut command = launch.command(binary("cgtproxy-testapp"));
        let process = Driven::start(&spec.name, command.args(["serve", &json]));
        match process.receive() {
            ServerReport::Ready => {}
            other => panic!("{}: {other:?}", spec.name),
        }
        Self {
            name: spec.name.clone(),
            process: Mutex::new(process),
            arrivals: Mutex::default(),
        }
    }

    /// Has everything served that has arrived by now.
    pub(crate) fn sync(&self) {
        match self.process.lock().unwrap().ask(&ServerOrder::Sync) {
            ServerReport::Arrived(arrivals) => self.arrivals.lock().unwrap().extend(arrivals),
            other => panic!("{}: {other:?}", self.name),
        }
    }

    /// Has echo requests sent, to push other packets through.
    pub(crate) fn flush(&self, address: IpAddr) {
        match self
            .process
            .lock()
            .unwrap()
            .ask(&ServerOrder::Flush(address))
        {
            ServerReport::Flushed => {}
            other => panic!("{}: {other:?}", self.name),
        }
    }

    #[track_caller]
    fn say(&self, order: &ServerOrder) {
        match self.process.lock().unwrap().ask(order) {
            ServerReport::Said => {}
            other => panic!("{}: {other:?}", self.name),
        }
    }

    pub(crate) fn arrivals(&self) -> MutexGuard<'_, Vec<Arrival>> {
        self.arrivals.lock().unwrap()
    }
}

/// A server to be.
pub struct ServerBuilder {
    world: Arc<World>,
    spec: ServerSpec,
    launch: Launch,
}

impl ServerBuilder {
    pub(crate) fn new(world: &Arc<World>, name: &str, kind: ServerKind) -> Self {
        let spec = ServerSpec {
            name: name.to_owned(),
            kind,
            listen: Vec::new(),
        };
        let launch = Launch::root();
        Self {
            world: Arc::clone(world),
            spec,
            launch,
        }
    }

    /// Listens on that port, TCP and UDP, on all addresses of both families.
    pub fn port(mut self, port: u16) -> Self {
        for ip in [
            IpAddr::from(Ipv4Addr::UNSPECIFIED),
            IpAddr::from(Ipv6Addr::UNSPECIFIED),
        ] {
            self = self.at(SocketAddr::new(ip, port));
        }
        self
    }

    /// Listens on that port, TCP and UDP, on 127.0.0.1 and ::1 and nowhere else.
    pub fn loopback_port(self, port: u16) -> Self {
        let ipv4 = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
        let ipv6 = SocketAddr::new(Ipv6Addr::LOCALHOST.into(), port);
        self.at(ipv4).at(ipv6)
    }

    /// Listens there, TCP and UDP.
    pub fn at(self, address: SocketAddr) -> Self {
        self.listen(Transport::Tcp, address)
            .listen(Transport::Udp, address)
    }

    /// Listens there.
    pub fn listen(mut self, transport: Transport, address: SocketAddr) -> Self {
        self.spec.listen.push(Listen {
            transport,
            address,
            multipath: false,
        });
        self
    }

    /// Runs as that uid, which then owns the sockets; root if never told.
    pub fn uid(mut self, uid: u32) -> Self {
        // What a TPROXY server needs: any address for its own, and ports like 53 to answer from.
        self.launch =
            self.launch
                .uid(uid)
                .capabilities(&["net_admin", "net_raw", "net_bind_service"]);
        self
    }

    pub(crate) fn netns(mut self, netns: &Path) -> Self {
        self.launch = self.launch.netns(netns);
        self
    }

    /// Runs in that cgroup; in the root cgroup if never told.
    pub fn cgroup(mut self, cgroup: &Cgroup) -> Self {
        self.launch = self.launch.cgroup(&cgroup.directory());
        self
    }

    /// Starts it; it is listening when this returns.
    ///
    /// # Panics
    /// When it cannot listen.
    #[track_caller]
    pub fn start(self) -> Server {
        let control = Arc::new(Control::start(self.launch, &self.spec));
        self.world.add_server(&control);
        Server {
            world: self.world,
            control,
        }
    }
}

/// A running server. Dropped, it is killed.
pub struct Server {
    world: Arc<World>,
    control: Arc<Control>,
}

impl Server {
    /// All that has reached it, once everything sent before has arrived.
    pub fn arrivals(&self) -> Vec<Arrival> {
        self.world.settle();
        self.control.arrivals().clone()
    }

    /// As a TPROXY server, sends a datagram as `from` that nobody has asked for.
    ///
    /// # Panics
    /// When it can't.
    #[track_caller]
    pub fn speak_first(&self, from: SocketAddr, to: SocketAddr) {
        self.control.say(&ServerOrder::SpeakFirst { from, to });
    }

    /// Says something on every TCP connection that is open.
    ///
    /// # Panics
    /// When it can't.
    #[track_caller]
    pub fn speak_up(&self) {
        self.control.say(&ServerOrder::SpeakUp);
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.control.process.lock().unwrap().pid()
    }

    /// Insists that nothing has reached it.
    ///
    /// # Panics
    /// When something did.
    #[track_caller]
    pub fn assert_idle(&self) {
        let arrivals = self.arrivals();
        assert!(
            arrivals.is_empty(),
            "{} was sent {arrivals:?}",
            self.control.name
        );
    }
}
