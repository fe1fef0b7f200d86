//! The application whose connections and datagrams are timed.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::relay::{BUFFER, ELSEWHERE};
use super::socks;
use crate::birth::now;
use crate::order::Task;

/// How many connections a rush has at once.
const AT_ONCE: usize = 16;

/// To how many destinations one socket sends datagrams.
const FLOWS: usize = 16;

/// How many datagrams are on their way at any time, and how long they are: QUIC's are.
const WINDOW: usize = 48;
const DATAGRAM: usize = 1200;

/// What to do, and how to get there.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Errand {
    pub(super) to: SocketAddr,
    /// Speak SOCKS5 to this server.
    pub(super) through: Option<SocketAddr>,
    pub(super) task: Task,
}

impl Errand {
    /// Does it, and prints what is to be known about it: JSON.
    pub(crate) fn run(self) {
        let printed = match self.task {
            Task::Hold { connections } => return self.hold(connections),
            Task::Bulk { bytes } => vec![self.bulk(bytes)],
            Task::Requests { count } => (0..count).map(|_| self.request()).collect(),
            Task::Rush { count } => vec![self.rush(count)],
            Task::Datagrams { count } => vec![self.datagrams(count)],
        };
        println!("{}", serde_json::to_string(&printed).expect("numbers"));
    }

    fn connect(&self) -> TcpStream {
        let mut stream = TcpStream::connect(self.through.unwrap_or(self.to)).expect("a connection");
        stream.set_nodelay(true).expect("TCP");
        if self.through.is_some() {
            socks::ask(&mut stream, socks::CONNECT, self.to);
        }
        stream
    }

    /// Receives so many bytes: megabytes a second.
    fn bulk(&self, bytes: u64) -> f64 {
        let start = now();
        let mut connection = self.connect();
        connection
            .write_all(&bytes.to_ne_bytes())
            .expect("it takes it");
        let mut buffer = vec![0; BUFFER];
        let mut received = 0;
        while received < bytes {
            let length = connection.read(&mut buffer).expect("more");
            assert!(length > 0, "the connection ended early");
            received += length as u64;
        }
        received as f64 * 1000.0 / (now() - start) as f64
    }

    /// Connects, asks for 64 bytes and receives them: microseconds.
    fn request(&self) -> f64 {
        let start = now();
        let mut connection = self.connect();
        connection
            .write_all(&64_u64.to_ne_bytes())
            .expect("it takes it");
        connection.read_exact(&mut [0; 64]).expect("an answer");
        (now() - start) as f64 / 1000.0
    }

    /// The same for several at once, so many in all: connections a second.
    fn rush(self, count: usize) -> f64 {
        let start = now();
        let some = || {
            for _ in 0..count.div_ceil(AT_ONCE) {
                self.request();
            }
        };
        thread::scope(|scope| {
            for _ in 0..AT_ONCE {
                scope.spawn(some);
            }
        });
        let made = count.div_ceil(AT_ONCE) * AT_ONCE;
        made as f64 * 1e9 / (now() - start) as f64
    }

    /// Sends datagrams from one socket to several destinations, one more for each that comes back:
    /// round trips a second.
    fn datagrams(&self, count: usize) -> f64 {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a port");
        let patience = Duration::from_secs(5);
        socket.set_read_timeout(Some(patience)).expect("a socket");
        let association = self.through.map(|server| {
            let mut control = TcpStream::connect(server).expect("a connection");
            let unknown = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
            let relay = socks::ask(&mut control, socks::ASSOCIATE, unknown);
            (control, relay)
        });
        let message = |flow: usize| {
            let octet = u8::try_from(flow + 1).expect("there are few");
            let to = SocketAddr::from((Ipv4Addr::new(198, 51, 100, octet), ELSEWHERE.1));
            match &association {
                Some((_, relay)) => {
                    let mut message = socks::datagram_header(to);
                    message.resize(message.len() + DATAGRAM, 0);
                    (message, *relay)
                }
                None => (vec![0; DATAGRAM], to),
            }
        };
        let messages: Vec<_> = (0..FLOWS).map(message).collect();
        let send = |flow: usize| {
            let (message, to) = &messages[flow % FLOWS];
            socket.send_to(message, to).expect("it leaves");
        };
        let mut buffer = vec![0; 2 * DATAGRAM];
        let mut receive = || {
            socket
                .recv_from(&mut buffer)
                .expect("none of them is lost: it comes back");
        };
        // Flows are begun one by one, and not timed.
        for flow in 0..FLOWS {
            send(flow);
            receive();
        }
        let start = now();
        (0..WINDOW).for_each(send);
        for n in WINDOW..count + WINDOW {
            receive();
            if n < count {
                send(n);
            }
        }
        count.max(WINDOW) as f64 * 1e9 / (now() - start) as f64
    }
}
