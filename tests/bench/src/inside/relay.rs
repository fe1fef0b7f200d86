//! TCP through a TPROXY server: a small one of ours, the same in all cases, so that what differs is how connections get
//! there. And the ways to a SOCKS5 server, of which this one is one.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::{Child, Stdio};
use std::thread;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, bind, listen, setsockopt, socket,
    sockopt,
};
use nix::unistd::Pid;

use super::client::Errand;
use super::site::{Site, launched_in, this_program};
use super::socks;
use crate::order::{Cores, Kind, Place, Task, Way};

pub(super) const RELAY_PORT: u16 = 7893;
const BACKEND_PORT: u16 = 7894;
/// Where applications connect to that are diverted: any address that is not this machine's.
pub(super) const ELSEWHERE: (Ipv4Addr, u16) = (Ipv4Addr::new(198, 51, 100, 1), 9999);
/// The port to which the TPROXY server goes on through the SOCKS5 server.
const THROUGH_SOCKS: u16 = 9998;
pub(super) const BUFFER: usize = 256 << 10;

/// A server of this program's that serves until it is killed.
pub(super) struct Server(Child);

impl Server {
    fn start(role: &str) -> Self {
        let mut child = this_program()
            .arg(role)
            .stdout(Stdio::piped())
            .spawn()
            .expect("this very program");
        let mut ready = [0; 1];
        let mut output = child.stdout.take().expect("piped");
        output.read_exact(&mut ready).expect("it gets ready");
        Self(child)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Site<'_> {
    /// Has an application do something, which gets there that way; what it has to say about it.
    pub(super) fn errand(&mut self, way: Way, cores: Cores, task: Task) -> Vec<f64> {
        let elsewhere = SocketAddr::from(ELSEWHERE);
        let socks = SocketAddr::from(socks::ADDRESS);
        let through_socks = SocketAddr::from((ELSEWHERE.0, THROUGH_SOCKS));
        let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, RELAY_PORT));
        let (place, to, through) = match (way, self.kind) {
            (Way::Straight, _) => (Place::NoSession, loopback, None),
            (Way::Diverted, _) => (Place::Proxied, elsewhere, None),
            (Way::Spoken, _) => (Place::NoSession, elsewhere, Some(socks)),
            (Way::Carried, Kind::Relay) => (Place::Proxied, elsewhere, None),
            (Way::Carried, _) => (Place::Proxied, through_socks, None),
        };
        let relay = self.relay_pid(way);
        let server = self.socks_server();
        let [first, second] = processors(cores);
        pin(server, first);
        if let Some(relay) = relay {
            pin(relay, second);
        }
        let directory = self.place(place);
        let errand = Errand { to, through, task };
        // What is started inherits it.
        sched_setaffinity(Pid::from_raw(0), &first).expect("a processor that is there");
        let output = launched_in(&directory)
            .arg("--errand")
            .arg(serde_json::to_string(&errand).expect("JSON"))
            .stderr(Stdio::inherit())
            .output()
            .expect("the test application");
        assert!(output.status.success());
        serde_json::from_slice(&output.stdout).expect("numbers")
    }

    /// The SOCKS5 server's process; started, if it is not there.
    pub(super) fn socks_server(&mut self) -> u32 {
        let server = self.socks.get_or_insert_with(|| Server::start("--socks"));
        server.0.id()
    }

    /// The process through which connections come that way; started, if it is not there.
    fn relay_pid(&mut self, way: Way) -> Option<u32> {
        match (way, self.kind) {
            (Way::Spoken, _) => None,
            (Way::Carried, Kind::Relay) => self.carrier.as_ref().map(|relay| relay.pid()),
            _ => {
                let server = self.relay.get_or_insert_with(|| Server::start("--relay"));
                Some(server.0.id())
            }
        }
    }
}

/// The processors for applications and servers, and those for what is between them.
fn processors(cores: Cores) -> [CpuSet; 2] {
    // Before this thread was told where to be.
    let all = sched_getaffinity(Pid::from_raw(1)).expect("our own first process");
    let numbers = || (0..CpuSet::count()).filter(|&n| all.is_set(n).unwrap_or(false));
    let only = |number: Option<usize>| {
        let mut set = CpuSet::new();
        set.set(number.expect("there is a processor"))
            .expect("it is there");
        set
    };
    match cores {
        Cores::All => [all, all],
        Cores::One => [only(numbers().next()); 2],
        // With one processor there is no other.
        Cores::Apart => [only(numbers().next()), only(numbers().next_back())],
    }
}

/// Has all threads of a process run there.
fn pin(process: u32, processors: CpuSet) {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).expect("it is running");
    for task in tasks.flatten() {
        let task = task
            .file_name()
            .to_string_lossy()
            .parse()
            .expect("a number");
        sched_setaffinity(Pid::from_raw(task), &processors).expect("a thread of ours");
    }
}

/// Serves as the relay and as the server behind it, until it is killed.
pub(crate) fn serve() {
    let backend = TcpListener::bind((Ipv4Addr::LOCALHOST, BACKEND_PORT)).expect("a port");
    let relay = transparent();
    print!(".");
    std::io::stdout().flush().expect("somebody waits for it");
    thread::spawn(move || {
        for connection in backend.incoming().flatten() {
            thread::spawn(move || answer(connection));
        }
    });
    for client in relay.incoming().flatten() {
        thread::spawn(move || {
            // A diverted connection's own address is where the application meant to go.
            let meant = client.local_addr().expect("it is connected");
            assert!(meant.ip() == IpAddr::V4(ELSEWHERE.0) || meant.ip().is_loopback());
            let server = if meant.port() == THROUGH_SOCKS {
                let mut server = TcpStream::connect(socks::ADDRESS).expect("ours");
                server.set_nodelay(true).expect("TCP");
                socks::ask(&mut server, socks::CONNECT, meant);
                server
            } else {
                TcpStream::connect((Ipv4Addr::LOCALHOST, BACKEND_PORT)).expect("ours")
            };
            client.set_nodelay(true).expect("TCP");
            server.set_nodelay(true).expect("TCP");
            let (mut from_client, mut to_server) = pair(&client, &server);
            let up = thread::spawn(move || copy(&mut from_client, &mut to_server));
            let (mut from_server, mut to_client) = pair(&server, &client);
            copy(&mut from_server, &mut to_client);
            let _ = up.join();
        });
    }
}

fn pair(a: &TcpStream, b: &TcpStream) -> (TcpStream, TcpStream) {
    let clone = |s: &TcpStream| s.try_clone().expect("a descriptor");
    (clone(a), clone(b))
}

fn copy(from: &mut TcpStream, to: &mut TcpStream) {
    let mut buffer = vec![0; BUFFER];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

/// Eight bytes say how many bytes are wanted.
pub(super) fn answer(mut connection: TcpStream) {
    let _ = connection.set_nodelay(true);
    let mut wanted = [0; 8];
    if connection.read_exact(&mut wanted).is_err() {
        return;
    }
    let mut wanted = u64::from_ne_bytes(wanted);
    let buffer = vec![0; BUFFER.min(usize::try_from(wanted).unwrap_or(BUFFER))];
    while wanted > 0 {
        let length = wanted.min(BUFFER as u64);
        if connection.write_all(&buffer[..length as usize]).is_err() {
            return;
        }
        wanted -= length;
    }
}

fn transparent() -> TcpListener {
    let socket = socket(
        AddressFamily::Inet,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .expect("a socket");
    setsockopt(&socket, sockopt::ReuseAddr, &true).expect("a socket");
    setsockopt(&socket, sockopt::IpTransparent, &true).expect("root");
    let address = SockaddrIn::new(0, 0, 0, 0, RELAY_PORT);
    bind(socket.as_raw_fd(), &address).expect("a port");
    listen(&socket, Backlog::new(1024).expect("a number")).expect("a socket");
    TcpListener::from(socket)
}
