//! Applications on the machine, which ask the network and tell what became of it.

use std::net::{IpAddr, SocketAddr, SocketAddrV4};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::driven::Driven;
use super::launch::{Launch, binary};
use super::network::deliveries;
use super::outcome::Outcome;
use super::world::World;
use crate::wire::{AppOrder, AppReport, Crowd, ServerKind, Tally, Transport};

/// How long to wait for an answer before finding out where the question has gone. It decides how
/// fast a test is that waits in vain, and nothing else.
const PATIENCE_MS: u32 = 20;
/// How long an answer may take that must be there already, as all of its way has been watched.
const GRACE: Duration = Duration::from_millis(500);

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// A process in a cgroup that sends what it is told. It enters its cgroup first of all, so all its
/// sockets belong to that. Dropped, it is killed.
pub struct App {
    world: Arc<World>,
    process: Arc<Mutex<Driven>>,
}

impl App {
    pub(crate) fn start(world: &Arc<World>, launch: Launch) -> Self {
        let mut command = launch.command(binary("cgtproxy-testapp"));
        Self::begin(world, command.arg("app"))
    }

    /// By a command that ends up as a test application.
    pub(crate) fn start_by(world: &Arc<World>, argv: &[String]) -> Self {
        Self::begin(world, Command::new(&argv[0]).args(&argv[1..]))
    }

    fn begin(world: &Arc<World>, command: &mut Command) -> Self {
        let process = Driven::start("an application", command);
        match process.receive() {
            AppReport::Done => {}
            other => panic!("an application began with {other:?}"),
        }
        Self {
            world: Arc::clone(world),
            process: Arc::new(Mutex::new(process)),
        }
    }

    pub(crate) fn start_on_internet(world: &Arc<World>) -> Self {
        Self::start(world, Launch::root().on_internet())
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.process.lock().unwrap().pid()
    }

    /// Connects, asks and closes.
    pub fn tcp(&self, to: SocketAddr) -> Outcome {
        match self.open_tcp(to) {
            Ok(connection) => connection.ask(),
            Err(outcome) => outcome,
        }
    }

    /// Asks from a new UDP socket.
    pub fn udp(&self, to: SocketAddr) -> Outcome {
        self.open_udp(to).ask()
    }

    /// Asks by TCP or UDP.
    pub fn ask(&self, transport: Transport, to: SocketAddr) -> Outcome {
        match transport {
            Transport::Tcp => self.tcp(to),
            Transport::Udp => self.udp(to),
        }
    }

    /// Sends an ICMP or ICMPv6 echo request.
    pub fn ping(&self, to: IpAddr) -> Outcome {
        let flow = self.flow(
            SocketAddr::new(to, 0),
            if to.is_ipv4() { ICMP } else { ICMPV6 },
        );
        match self.order(&AppOrder::OpenPing {
            flow: flow.number,
            to,
        }) {
            AppReport::Done => flow.ask(),
            other => flow.outcome(other),
        }
    }

    /// Sends one packet of any other protocol, which nobody answers: see [`Outcome::LeftUnanswered`].
    /// Only root may.
    pub fn raw(&self, protocol: u8, to: IpAddr) -> Outcome {
        let flow = self.flow(SocketAddr::new(to, 0), protocol);
        let before = flow.delivered();
        let report = self.order(&AppOrder::Raw { protocol, to });
        self.world.settle();
        match report {
            AppReport::Done if flow.delivered() > before => Outcome::LeftUnanswered,
            AppReport::Done => Outcome::Silent,
            other => flow.outcome(other),
        }
    }

    /// Gives all TCP and UDP sockets from now on this SO_MARK, which an application without CAP_NET_RAW may not.
    ///
    /// # Panics
    /// When it does not obey.
    #[track_caller]
    pub fn mark(&self, mark: u32) {
        match self.order(&AppOrder::Mark { mark }) {
            AppReport::Done => {}
            other => panic!("an application that is to mark reports {other:?}"),
        }
    }

    /// Has all TCP connections from now on be of MPTCP.
    ///
    /// # Panics
    /// When it does not obey.
    #[track_caller]
    pub fn multipath(&self) {
        self.done(&AppOrder::Multipath);
    }

    /// Binds all TCP and UDP sockets from now on to this interface.
    ///
    /// # Panics
    /// When it does not obey.
    #[track_caller]
    pub fn device(&self, name: &str) {
        self.done(&AppOrder::Device {
            name: name.to_owned(),
        });
    }

    /// Puts one datagram with this mark into the loopback interface, past everything that locally made packets go
    /// through (needs CAP_NET_RAW). Tells whether a server has had it.
    ///
    /// # Panics
    /// When it can't.
    #[track_caller]
    pub fn inject(&self, mark: u32, to: SocketAddrV4) -> bool {
        let token = format!("injected {}", self.world.number());
        match self.order(&AppOrder::Inject {
            mark,
            to,
            token: token.clone(),
        }) {
            AppReport::Done => {}
            other => panic!("nothing is injected: {other:?}"),
        }
        self.world.settle();
        self.world.was_asked(&token)
    }

    /// Sends a datagram, or begins a connection, from an address that may not be the machine's (`IP_FREEBIND`,
    /// `IPV6_FREEBIND`), which takes no privilege.
    ///
    /// # Errors
    /// What the kernel says.
    ///
    /// # Panics
    /// When it does not obey.
    #[track_caller]
    pub fn claim(
        &self,
        transport: Transport,
        from: SocketAddr,
        to: SocketAddr,
    ) -> Result<(), Errno> {
        self.claims(transport, from, to, true)
    }

    /// Begins a connection of TCP from that address and port, and thinks better of it.
    ///
    /// # Panics
    /// When it does not obey.
    #[track_caller]
    pub fn begin_in_vain(&self, from: SocketAddr, to: SocketAddr) {
        assert_eq!(self.claims(Transport::Tcp, from, to, false), Ok(()));
    }

    #[track_caller]
    fn claims(
        &self,
        transport: Transport,
        from: SocketAddr,
        to: SocketAddr,
        keep: bool,
    ) -> Result<(), Errno> {
        match self.order(&AppOrder::Claim {
            transport,
            from,
            to,
            keep,
        }) {
            AppReport::Done => Ok(()),
            AppReport::Failed { errno } => Err(Errno::from_raw(errno)),
            other => panic!("an application that claims an address reports {other:?}"),
        }
    }

    /// Opens so many connections to a Varlink service, calls that method on each, and keeps them for as long as the
    /// application lives.
    ///
    /// # Panics
    /// When it can't.
    #[track_caller]
    pub fn crowd(&self, socket: &str, method: &str, count: u32) -> Crowd {
        match self.order(&AppOrder::Crowd {
            path: socket.into(),
            method: method.to_owned(),
            count,
        }) {
            AppReport::Crowd(crowd) => crowd,
            other => panic!("a crowd reports {other:?}"),
        }
    }

    /// Opens so many connections to a Unix socket, sends over each a TCP socket that takes days to close, and hangs up.
    /// Returns how many sockets the kernel has let through.
    ///
    /// # Panics
    /// When it can't.
    #[track_caller]
    pub fn give_away(&self, socket: &str, count: u32) -> u64 {
        match self.order(&AppOrder::GiveAway {
            path: socket.into(),
            count,
        }) {
            AppReport::Count(given) => given,
            other => panic!("what is given away reports {other:?}"),
        }
    }

    /// From now on connects to a Varlink service, writes so many calls and hangs up, as fast as it goes, for as long as
    /// the application lives.
    ///
    /// # Panics
    /// When it does not obey.
    #[track_caller]
    pub fn flood(&self, socket: &str, method: &str, calls: usize) {
        match self.order(&AppOrder::StartFlood {
            path: socket.into(),
            method: method.to_owned(),
            calls,
        }) {
            AppReport::Done => {}
            other => panic!("a flood begins with {other:?}"),
        }
    }

    /// From now on sends datagrams there without a pause, from one socket, for as long as the application lives.
    ///
    /// # Panics
    /// When there is no route.
    #[track_caller]
    pub fn pour(&self, to: SocketAddr) {
        match self.order(&AppOrder::Pour { to }) {
            AppReport::Done => {}
            other => panic!("nothing is poured: {other:?}"),
        }
    }

    /// How many datagrams it has poured so far, those included that the kernel refused to send.
    ///
    /// # Panics
    /// When it does not obey.
    #[track_caller]
    pub fn poured(&self) -> u64 {
        match self.order(&AppOrder::Poured) {
            AppReport::Count(count) => count,
            other => panic!("an application that pours reports {other:?}"),
        }
    }

    /// How many connections its flood has made so far.
    ///
    /// # Panics
    /// When there is no flood.
    #[track_caller]
    pub fn flooded(&self) -> u64 {
        match self.order(&AppOrder::Flooded) {
            AppReport::Count(calls) => calls,
            other => panic!("a flood reports {other:?}"),
        }
    }

    /// Opens a TCP connection to be used step by step, or tells why there is none.
    ///
    /// # Errors
    /// What became of the attempt.
    pub fn open_tcp(&self, to: SocketAddr) -> Result<Connection, Outcome> {
        let connection = self.flow(to, Transport::Tcp.protocol());
        let before = connection.delivered();
        match self.order(&AppOrder::OpenTcp {
            flow: connection.number,
            to,
        }) {
            AppReport::Done => {}
            other => return Err(connection.outcome(other)),
        }
        match connection.conclude(before, None) {
            Ok(AppReport::Connected) => Ok(connection),
            Ok(other) => Err(connection.outcome(other)),
            Err(outcome) => Err(outcome),
        }
    }

    /// Makes a UDP socket to be used step by step.
    ///
    /// # Panics
    /// When there is no route.
    pub fn open_udp(&self, to: SocketAddr) -> Connection {
        let connection = self.flow(to, Transport::Udp.protocol());
        match self.order(&AppOrder::OpenUdp {
            flow: connection.number,
            to,
        }) {
            AppReport::Done => connection,
            other => panic!("no UDP socket for {to}: {other:?}"),
        }
    }

    /// Asks many times at once, each time from a new socket, and tells what became of it all.
    ///
    /// # Panics
    /// When the application cannot say.
    pub fn burst(&self, transport: Transport, to: SocketAddr, count: u32) -> Tally {
        match self.order(&AppOrder::Burst {
            transport,
            to,
            count,
        }) {
            AppReport::Tally(tally) => tally,
            other => panic!("a burst reports {other:?}"),
        }
    }

    /// What becomes of one TCP connection and a question on it in the end, however long a relay waits for its proxy.
    ///
    /// # Panics
    /// When nothing comes back.
    #[track_caller]
    pub fn end_of_one(&self, to: SocketAddr) -> Outcome {
        match self.open_tcp(to) {
            Ok(connection) => Outcome::in_the_end(|| connection.ask()),
            Err(outcome) => outcome,
        }
    }

    /// Sends so many datagrams of so many bytes from each of so many sockets, and waits until those on this machine
    /// who are sent them have received each. The sockets stay open.
    ///
    /// # Panics
    /// When the application can't.
    #[track_caller]
    pub fn send_datagrams(&self, to: SocketAddr, sockets: u32, count: u32, bytes: usize) {
        self.done(&AppOrder::SendDatagrams {
            to,
            sockets,
            count,
            bytes,
        });
    }

    /// Makes so many TCP connections, and writes to each for as long as somebody takes it. Nothing is read; the
    /// connections stay open.
    ///
    /// # Panics
    /// When the application can't.
    #[track_caller]
    pub fn hoard(&self, to: SocketAddr, connections: u32) {
        self.done(&AppOrder::Hoard { to, connections });
    }

    /// Asks each of these by UDP, from one socket and in turns, until each has answered so often.
    ///
    /// # Panics
    /// When one does not answer, an answer comes from another than its question went to, or not all see the socket at
    /// one address.
    #[track_caller]
    pub fn ping_pong(&self, to: Vec<SocketAddr>, rounds: u32) {
        self.done(&AppOrder::PingPong { to, rounds });
    }

    /// Sends so many bytes to an echo server, ends that direction, and reads them back until the other one ends.
    ///
    /// # Panics
    /// When other bytes come back, or not as many.
    #[track_caller]
    pub fn bulk(&self, to: SocketAddr, bytes: u64) {
        self.done(&AppOrder::Bulk { to, bytes });
    }

    /// Connects to a server that says `greeting` and ends that direction; then sends it so many bytes, and ends the
    /// other one.
    ///
    /// # Panics
    /// When it says something else, or does not take them.
    #[track_caller]
    pub fn hear_out(&self, to: SocketAddr, greeting: &str, bytes: u64) {
        self.done(&AppOrder::HearOut {
            to,
            greeting: greeting.to_owned(),
            bytes,
        });
    }

    #[track_caller]
    fn done(&self, order: &AppOrder) {
        match self.order(order) {
            AppReport::Done => {}
            other => panic!("{order:?}: {other:?}"),
        }
    }

    /// Starts asking again and again, each time from a new socket, while other things happen.
    pub fn traffic(&self, transport: Transport, to: SocketAddr) -> Traffic {
        let number = self.world.number();
        self.order(&AppOrder::StartTraffic {
            traffic: number,
            transport,
            to,
        });
        Traffic {
            process: Arc::clone(&self.process),
            number,
        }
    }

    fn flow(&self, to: SocketAddr, protocol: u8) -> Connection {
        Connection {
            world: Arc::clone(&self.world),
            process: Arc::clone(&self.process),
            number: self.world.number(),
            to,
            protocol,
        }
    }

    fn order(&self, order: &AppOrder) -> AppReport {
        self.process.lock().unwrap().ask(order)
    }
}

/// A socket of an application's that stays open. Dropped, it is closed.
pub struct Connection {
    world: Arc<World>,
    process: Arc<Mutex<Driven>>,
    number: u32,
    to: SocketAddr,
    protocol: u8,
}

impl Connection {
    /// Asks once and tells what became of it.
    pub fn ask(&self) -> Outcome {
        let before = self.delivered();
        let token = format!("question {}", self.world.number());
        match self.order(&AppOrder::Send {
            flow: self.number,
            token: token.clone(),
        }) {
            AppReport::Done => {}
            // A send reports the error that an earlier packet met; this one was not sent.
            other => return self.insist_on_drop(self.outcome(other), before, &token),
        }
        match self.conclude(before, Some(&token)) {
            Ok(report) => self.outcome(report),
            Err(outcome) => outcome,
        }
    }

    /// The address and port of its own end.
    ///
    /// # Panics
    /// When it has none.
    #[track_caller]
    pub fn local(&self) -> SocketAddr {
        match self.order(&AppOrder::Local { flow: self.number }) {
            AppReport::Local(address) => address,
            other => panic!("the end of a flow: {other:?}"),
        }
    }

    /// Gives a TCP connection up, so that the other end gets a reset.
    ///
    /// # Panics
    /// When the application can't.
    #[track_caller]
    pub fn reset(self) {
        let report = self.order(&AppOrder::Reset { flow: self.number });
        assert!(matches!(report, AppReport::Done), "{report:?}");
    }

    /// Sends a line to whom it need not mean anything.
    ///
    /// # Panics
    /// When the application can't.
    #[track_caller]
    pub fn say(&self, line: &str) {
        let report = self.order(&AppOrder::Send {
            flow: self.number,
            token: line.to_owned(),
        });
        assert!(matches!(report, AppReport::Done), "{report:?}");
    }

    /// Hears the other end of a TCP connection out, and tells whether it has ended by a reset.
    ///
    /// # Panics
    /// When that fails otherwise.
    #[track_caller]
    pub fn ends_by_reset(&self) -> bool {
        match self.order(&AppOrder::HearEnd { flow: self.number }) {
            AppReport::Closed => false,
            AppReport::Failed { errno } if errno == Errno::ECONNRESET as i32 => true,
            other => panic!("the end of a connection: {other:?}"),
        }
    }

    /// Waits for an answer; without one, finds out where the question has gone.
    fn conclude(&self, before: u64, token: Option<&str>) -> Result<AppReport, Outcome> {
        let mut report = self.step(PATIENCE_MS);
        let start = Instant::now();
        while matches!(report, AppReport::Pending) {
            // After this, whatever could answer has answered.
            self.world.settle();
            report = self.step(0);
            if !matches!(report, AppReport::Pending) {
                break;
            }
            let asked = token.is_some_and(|token| self.world.was_asked(token));
            let left = self.delivered() > before;
            if !asked && !left {
                return Err(Outcome::Silent);
            }
            if start.elapsed() > GRACE {
                return Err(if asked {
                    Outcome::AnswerLost
                } else {
                    Outcome::LeftUnanswered
                });
            }
        }
        Ok(report)
    }

    fn outcome(&self, report: AppReport) -> Outcome {
        match report {
            AppReport::Answered(answer) => match answer.kind {
                ServerKind::Internet if answer.destination != self.to => Outcome::Redirected {
                    to: answer.destination,
                },
                ServerKind::Internet => Outcome::Direct {
                    seen_as: answer.source.ip(),
                },
                ServerKind::Tproxy => Outcome::Proxied {
                    by: answer.by,
                    original_destination: answer.destination,
                },
                ServerKind::Local => Outcome::Local {
                    by: answer.by,
                    at: answer.destination,
                },
            },
            AppReport::Echoed => self.echoed(),
            AppReport::Closed => Outcome::Closed,
            AppReport::Failed { errno } => match Errno::from_raw(errno) {
                Errno::EPERM => Outcome::Forbidden,
                Errno::ECONNREFUSED => Outcome::Refused,
                Errno::ECONNRESET | Errno::EPIPE => Outcome::Closed,
                _ => Outcome::Failed { errno },
            },
            AppReport::Done
            | AppReport::Connected
            | AppReport::Pending
            | AppReport::Tally(_)
            | AppReport::Crowd(_)
            | AppReport::Count(_)
            | AppReport::Local(_) => {
                panic!("an application reports {report:?}")
            }
        }
    }

    /// An echo does not say who sent it, the record of the internet does.
    fn echoed(&self) -> Outcome {
        let deliveries = deliveries(self.to.ip());
        match deliveries
            .iter()
            .find(|delivery| delivery.protocol == self.protocol)
        {
            Some(delivery) => Outcome::Direct {
                seen_as: delivery.source,
            },
            None => Outcome::Local {
                by: "the kernel".to_owned(),
                at: self.to,
            },
        }
    }

    /// "Forbidden" promises more than the error that the application saw.
    fn insist_on_drop(&self, outcome: Outcome, before: u64, token: &str) -> Outcome {
        if outcome == Outcome::Forbidden {
            self.world.settle();
            assert!(
                !self.world.was_asked(token),
                "{}: refused and sent all the same",
                self.to
            );
            assert_eq!(
                self.delivered(),
                before,
                "{}: refused and sent all the same",
                self.to
            );
        }
        outcome
    }

    /// How many packets of this protocol have reached the destination.
    fn delivered(&self) -> u64 {
        deliveries(self.to.ip())
            .iter()
            .filter(|delivery| delivery.protocol == self.protocol)
            .map(|delivery| delivery.packets)
            .sum()
    }

    fn step(&self, patience_ms: u32) -> AppReport {
        self.order(&AppOrder::Await {
            flow: self.number,
            patience_ms,
        })
    }

    fn order(&self, order: &AppOrder) -> AppReport {
        self.process.lock().unwrap().ask(order)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Not while panicking: the application may be what failed.
        if !std::thread::panicking() {
            self.order(&AppOrder::Close { flow: self.number });
        }
    }
}

/// Traffic that goes on while other things happen.
pub struct Traffic {
    process: Arc<Mutex<Driven>>,
    number: u32,
}

impl Traffic {
    /// What became of the questions since the last time.
    pub fn tally(&self) -> Tally {
        self.order(&AppOrder::Tally {
            traffic: self.number,
        })
    }

    /// Waits until some more questions are through and returns what became of those that were
    /// begun after this call.
    ///
    /// # Panics
    /// When the traffic has come to a halt.
    #[track_caller]
    pub fn next(&self, count: u64) -> Tally {
        // One question may be under way while we ask: that one is not counted.
        let mut stale = self.tally();
        crate::wait::wait_until("a question to be through", || {
            stale = self.tally();
            stale.total() > 0
        });
        let mut sum = Tally::default();
        crate::wait::wait_until("questions to be through", || {
            sum.add(&self.tally());
            sum.total() >= count
        });
        sum
    }

    /// Stops it and returns what became of the questions since the last time.
    pub fn stop(self) -> Tally {
        self.order(&AppOrder::StopTraffic {
            traffic: self.number,
        })
    }

    fn order(&self, order: &AppOrder) -> Tally {
        match self.process.lock().unwrap().ask(order) {
            AppReport::Tally(tally) => tally,
            other => panic!("traffic reports {other:?}"),
        }
    }
}
