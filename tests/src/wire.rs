//! What the harness, the test applications and the test servers say to each other: JSON, one value
//! a line, over stdin and stdout, or over the very connections that are being tested.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, SocketAddrV4};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The transport protocols a test server speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// A connection, one answer for each line.
    Tcp,
    /// One answer for each datagram.
    Udp,
}

impl Transport {
    /// The number that stands for the protocol in an IP header.
    pub fn protocol(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }
}

/// What a test server is there for; it says so in every answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ServerKind {
    /// Stands at the far end of the machine's uplink and has every address there is.
    Internet,
    /// Takes diverted traffic, for any destination.
    Tproxy,
    /// An ordinary service on the machine.
    Local,
}

/// One socket a server listens on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Listen {
    /// TCP or UDP.
    pub transport: Transport,
    /// Where to bind.
    pub address: SocketAddr,
    /// Takes further paths of a connection (MPTCP, RFC 8684), besides TCP.
    pub multipath: bool,
}

/// Everything a test server must know to start.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServerSpec {
    /// The name it gives in its answers.
    pub name: String,
    /// What it is there for.
    pub kind: ServerKind,
    /// Its sockets.
    pub listen: Vec<Listen>,
}

/// A server's answer, which tells who answered and what the question looked like on arrival.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The name of the server.
    pub by: String,
    /// What the server is there for.
    pub kind: ServerKind,
    /// Who asked, as the server saw it.
    pub source: SocketAddr,
    /// Who was asked, as the server saw it: for a TPROXY server, the original destination.
    pub destination: SocketAddr,
    /// The question, so that a late answer is not taken for another one.
    pub token: String,
}

/// Something that reached a server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arrival {
    /// TCP or UDP.
    pub transport: Transport,
    /// Who sent it.
    pub source: SocketAddr,
    /// Where it was going.
    pub destination: SocketAddr,
    /// The question; none for a TCP connection that was accepted and has asked nothing yet.
    pub token: Option<String>,
}

/// What the harness asks of a server.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ServerOrder {
    /// Serve whatever has arrived by now, then tell what arrived since the last time.
    Sync,
    /// Send echo requests to that address from every CPU and return when the replies are back.
    Flush(IpAddr),
    /// Send a datagram that nobody has asked for (a TPROXY server only).
    SpeakFirst {
        /// As whom.
        from: SocketAddr,
        /// To whom.
        to: SocketAddr,
    },
    /// Say something on every TCP connection that is open.
    SpeakUp,
}

/// A server's reply to the harness.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ServerReport {
    /// All sockets are bound.
    Ready,
    /// What arrived since the last time.
    Arrived(Vec<Arrival>),
    /// All echo requests were answered.
    Flushed,
    /// It was said.
    Said,
    /// It did not work, and why.
    Failed(String),
}

/// What a server says that does not care what it is asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Speech {
    /// To everybody, at once.
    pub say: Vec<u8>,
    /// What it does afterwards.
    pub then: Afterwards,
}

/// What a server does that has said all it had to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Afterwards {
    /// Ends the connection.
    Close,
    /// Keeps it open and reads nothing.
    Hold,
    /// Says it again and again, and reads nothing.
    Repeat,
    /// Hears the other side out, and says on the standard output how much that was and how it ended.
    Hear,
}

/// What the harness asks of a test application. Flows are named by numbers the harness chooses.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AppOrder {
    /// Begin a TCP connection.
    OpenTcp {
        /// The new flow.
        flow: u32,
        /// Where to.
        to: SocketAddr,
    },
    /// Make a UDP socket and connect it, so that it takes answers only from whom it asked.
    OpenUdp {
        /// The new flow.
        flow: u32,
        /// Where to.
        to: SocketAddr,
    },
    /// Make an ICMP echo socket.
    OpenPing {
        /// The new flow.
        flow: u32,
        /// Where to.
        to: IpAddr,
    },
    /// Ask.
    Send {
        /// The flow.
        flow: u32,
        /// The question.
        token: String,
    },
    /// Wait for the next step of that flow, at most so long.
    Await {
        /// The flow.
        flow: u32,
        /// How long to wait before `Pending` is the reply.
        patience_ms: u32,
    },
    /// Close the socket.
    Close {
        /// The flow.
        flow: u32,
    },
    /// Tell the address and port of a flow's own end.
    Local {
        /// The flow.
        flow: u32,
    },
    /// Have every TCP flow that is begun from now on be one of MPTCP.
    Multipath,
    /// Bind every TCP and UDP socket of a flow made from now on to this interface (SO_BINDTODEVICE).
    Device {
        /// Its name.
        name: String,
    },
    /// Give a TCP connection up: whoever is at the other end gets a reset.
    Reset {
        /// The flow.
        flow: u32,
    },
    /// Hear the other end of a TCP connection out: `Closed` if it ends in order, and the error otherwise.
    HearEnd {
        /// The flow.
        flow: u32,
    },
    /// Send one packet of a protocol of one's own (needs CAP_NET_RAW).
    Raw {
        /// The number of the protocol.
        protocol: u8,
        /// Where to.
        to: IpAddr,
    },
    /// Give every TCP and UDP socket of a flow made from now on this SO_MARK (needs CAP_NET_RAW).
    Mark {
        /// The mark.
        mark: u32,
    },
    /// Put one UDP packet of IPv4 into the loopback interface by a packet socket, past all that locally made packets
    /// go through, with a mark (needs CAP_NET_RAW).
    Inject {
        /// The mark.
        mark: u32,
        /// Where to.
        to: SocketAddrV4,
        /// What is in it.
        token: String,
    },
    /// Send a datagram, or begin a connection, from an address that may not be the machine's.
    Claim {
        /// TCP or UDP.
        transport: Transport,
        /// As whom.
        from: SocketAddr,
        /// To whom.
        to: SocketAddr,
        /// The socket stays open.
        keep: bool,
    },
    /// Ask many times at once, each time from a new socket, before any answer is read.
    Burst {
        /// TCP or UDP.
        transport: Transport,
        /// Where to.
        to: SocketAddr,
        /// How many times.
        count: u32,
    },
    /// Open so many connections to a Unix socket, call a Varlink method on each, and keep them all.
    Crowd {
        /// The socket.
        path: PathBuf,
        /// The method.
        method: String,
        /// How many connections.
        count: u32,
    },
    /// Open so many connections to a Unix socket, send over each of them a TCP socket that takes long to close, and
    /// hang up.
    GiveAway {
        /// The socket.
        path: PathBuf,
        /// How many times.
        count: u32,
    },
    /// From now on connect to a Unix socket, write Varlink calls and hang up, again and again, as fast as it goes.
    StartFlood {
        /// The socket.
        path: PathBuf,
        /// The method.
        method: String,
        /// How many calls each connection has.
        calls: usize,
    },
    /// Tell how many connections the flood has made so far.
    Flooded,
    /// From now on send datagrams there, as fast as it goes, from one socket.
    Pour {
        /// Where to.
        to: SocketAddr,
    },
    /// Tell how many datagrams the application has tried to send so by now.
    Poured,
    /// Send datagrams that nobody need answer, each when those before it have been received, from sockets that
    /// stay open.
    SendDatagrams {
        /// Where to.
        to: SocketAddr,
        /// From how many sockets.
        sockets: u32,
        /// How many from each.
        count: u32,
        /// How large each is.
        bytes: usize,
    },
    /// Ask each of these by UDP, from one socket and in turns, until each has answered so often.
    PingPong {
        /// Whom, all of one family.
        to: Vec<SocketAddr>,
        /// How often.
        rounds: u32,
    },
    /// Send so many bytes over a connection to who sends them back, end that direction, and compare what returns until
    /// the other one ends.
    Bulk {
        /// Where to.
        to: SocketAddr,
        /// How many.
        bytes: u64,
    },
    /// Connect, hear this until the server ends its direction, and only then send so many bytes, and end.
    HearOut {
        /// Where to.
        to: SocketAddr,
        /// All that the server says.
        greeting: String,
        /// How many.
        bytes: u64,
    },
    /// Make TCP connections, write to each for as long as somebody takes it, read nothing, and keep them.
    Hoard {
        /// Where to.
        to: SocketAddr,
        /// How many.
        connections: u32,
    },
    /// Start asking again and again, each time from a new socket.
    StartTraffic {
        /// The number of this traffic.
        traffic: u32,
        /// TCP or UDP.
        transport: Transport,
        /// Where to.
        to: SocketAddr,
    },
    /// Tell what became of the questions asked since the last time.
    Tally {
        /// The number of the traffic.
        traffic: u32,
    },
    /// Stop it, and tell what became of the questions asked since the last time.
    StopTraffic {
        /// The number of the traffic.
        traffic: u32,
    },
}

/// A test application's reply.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AppReport {
    /// Done; there was nothing to wait for.
    Done,
    /// The TCP connection is established.
    Connected,
    /// A server answered.
    Answered(Answer),
    /// The echo request came back.
    Echoed,
    /// Nothing happened yet.
    Pending,
    /// The peer closed the connection.
    Closed,
    /// A system call failed, or an error came back from the network.
    Failed {
        /// The error's number.
        errno: i32,
    },
    /// What became of many questions.
    Tally(Tally),
    /// What became of many connections.
    Crowd(Crowd),
    /// How many, of what was asked for.
    Count(u64),
    /// The address and port of a flow's own end.
    Local(SocketAddr),
}

/// What became of many connections to a Varlink service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Crowd {
    /// How many calls were answered.
    pub answered: u32,
    /// How many were refused, by the error's name.
    pub refused: BTreeMap<String, u32>,
    /// How many connections were closed without a word.
    pub closed: u32,
}

/// What became of many questions.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// How many of them the internet answered itself.
    pub direct: u64,
    /// How many each TPROXY server answered, with the destination they were sent to.
    pub proxied: BTreeMap<String, u64>,
    /// How many an ordinary service on the machine answered.
    pub local: BTreeMap<String, u64>,
    /// How many failed with which errno (1, EPERM, is what a drop looks like to a UDP sender).
    pub failed: BTreeMap<i32, u64>,
    /// How many got no answer for seconds.
    pub silent: u64,
    /// How many TPROXY answers named another destination than the one asked.
    pub misdirected: u64,
}

impl Tally {
    /// All questions together.
    pub fn total(&self) -> u64 {
        self.direct
            + self.proxied.values().sum::<u64>()
            + self.local.values().sum::<u64>()
            + self.failed.values().sum::<u64>()
            + self.silent
            + self.misdirected
    }
}

impl Tally {
    /// Adds what another tally counted.
    pub fn add(&mut self, other: &Self) {
        self.direct += other.direct;
        self.silent += other.silent;
        self.misdirected += other.misdirected;
        for (name, count) in &other.proxied {
            *self.proxied.entry(name.clone()).or_default() += count;
        }
        for (name, count) in &other.local {
            *self.local.entry(name.clone()).or_default() += count;
        }
        for (errno, count) in &other.failed {
            *self.failed.entry(*errno).or_default() += count;
        }
    }
}

/// Programs to be started one after another, each in a control group of its own.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Starts {
    /// The directory in which control groups are made.
    pub parent: PathBuf,
    /// What their names begin with.
    pub name: String,
    /// How many.
    pub count: u32,
    /// How many other control groups there are meanwhile, one of which goes and one comes for each start.
    pub others: u32,
    /// Where each of them begins a TCP connection and sends a datagram.
    pub to: Vec<SocketAddr>,
    /// No connection, and a datagram again and again until the kernel takes it.
    pub insist: bool,
}

/// What became of them.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct StartsReport {
    /// How many datagrams the kernel refused to send; of those that insist, how many had to wait.
    pub refused: u64,
    /// How long each took from the making of its control group to its end.
    pub microseconds: Vec<u64>,
}
