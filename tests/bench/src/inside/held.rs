//! Many connections at once that nothing becomes of, or whose other side does not read what it is sent.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};

use super::client::Errand;
use super::daemons::Status;
use super::relay::ELSEWHERE;
use super::site::{Site, launched_in};
use crate::order::{Held, Place, Task};

/// The port of connections on which each end says one byte, and nothing more.
const IDLE: u16 = 9997;
/// The port of those on which each end goes on writing for as long as somebody takes it, and reads nothing.
const STUCK: u16 = 9996;

/// How much each end of a connection has to say that the other one does not read: more than the relay keeps.
const MUCH: usize = 64 << 10;

/// How little a reader that is slow has room for.
const ROOM: usize = 4096;

/// How often the writers have to find that nothing is taken any more, and how long they wait in between.
const QUIET: usize = 20;
pub(super) const PAUSE: Duration = Duration::from_millis(20);

/// Connections that are kept, and how much is to be written to each.
#[derive(Default)]
pub(super) struct Crowd(Vec<(TcpStream, usize)>);

impl Crowd {
    /// Keeps one that goes to a port for that, and says one byte on it; others are returned.
    pub(super) fn keep(&mut self, mut stream: TcpStream, port: u16) -> Option<TcpStream> {
        let much = match port {
            IDLE => 0,
            STUCK => MUCH,
            _ => return Some(stream),
        };
        stream.write_all(b"x").expect("there is room for it");
        stream.set_nonblocking(true).expect("a socket");
        self.0.push((stream, much));
        None
    }

    /// Writes to each what it takes: how much that was.
    pub(super) fn push(&mut self) -> usize {
        let bytes = [b'x'; MUCH];
        let mut written = 0;
        self.0.retain_mut(|(stream, left)| {
            let count = match stream.write(&bytes[..*left]) {
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
                // Whoever holds the other end has been told to end.
                Err(_) => return false,
            };
            *left -= count;
            written += count;
            true
        });
        written
    }
}

impl Errand {
    /// Connects so often, says so, and keeps all connections until nobody wants that any more.
    pub(super) fn hold(&self, connections: usize) {
        let mut crowd = Crowd::default();
        for _ in 0..connections {
            let mut stream = TcpStream::connect(self.to).expect("a connection");
            if self.to.port() == STUCK {
                setsockopt(&stream, sockopt::RcvBuf, &ROOM).expect("a socket");
            }
            // Somebody is at the other end.
            stream.read_exact(&mut [0]).expect("a byte");
            crowd.keep(stream, self.to.port());
        }
        let mut quiet = 0;
        while self.to.port() == STUCK && quiet < QUIET {
            quiet = if crowd.push() == 0 { quiet + 1 } else { 0 };
            thread::sleep(PAUSE);
        }
        assert_eq!(crowd.0.len(), connections, "none has ended");
        println!("held");
        let _ = std::io::stdin().read(&mut [0]);
    }
}

impl Site<'_> {
    /// Has an application hold so many connections through the relay; what the relay uses then.
    pub(super) fn hold(&mut self, connections: usize, stuck: bool) -> Held {
        // Everything is on this machine: with usual buffers the kernel would keep gigabytes.
        for (name, sizes) in [
            ("tcp_wmem", "4096 4096 4096"),
            ("tcp_rmem", "4096 32768 65536"),
        ] {
            fs::write(format!("/proc/sys/net/ipv4/{name}"), sizes).expect("our own network");
        }
        self.socks_server();
        let port = if stuck { STUCK } else { IDLE };
        let errand = Errand {
            to: SocketAddr::from((ELSEWHERE.0, port)),
            through: None,
            task: Task::Hold { connections },
        };
        let mut child = launched_in(&self.place(Place::Proxied))
            .arg("--errand")
            .arg(serde_json::to_string(&errand).expect("JSON"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the test application");
        let mut said = [0; 5];
        let mut output = child.stdout.take().expect("piped");
        output.read_exact(&mut said).expect("it holds them");
        let relay = self.carrier.as_ref().expect("this is about the relay");
        let status = Status::of(relay.pid());
        let held = Held {
            resident: status.bytes("VmRSS:"),
            anonymous: status.bytes("RssAnon:"),
        };
        drop(child.stdin.take());
        assert!(child.wait().expect("a child").success());
        held
    }
}
