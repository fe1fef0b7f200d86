//! TCP through a TPROXY server: a small one of ours, the same in all cases, so that what differs is how connections get
//! there.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::thread;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, bind, listen, setsockopt, socket,
    sockopt,
};

use super::site::{Site, this_program};
use crate::birth::now;
use crate::order::{Place, Way};

pub(super) const RELAY_PORT: u16 = 7893;
const BACKEND_PORT: u16 = 7894;
/// Where applications connect to that are diverted: any address that is not this machine's.
const ELSEWHERE: (Ipv4Addr, u16) = (Ipv4Addr::new(198, 51, 100, 1), 9999);
const BUFFER: usize = 256 << 10;

impl Site<'_> {
    /// Megabytes a second, from the server behind the relay to an application.
    pub(super) fn bulk(&mut self, way: Way, bytes: u64) -> f64 {
        let printed = self.client(way, "--bulk-client", &bytes.to_string());
        serde_json::from_slice(&printed).expect("a number")
    }

    /// Microseconds from before connect(2) until the answer is there, over and over.
    pub(super) fn requests(&mut self, way: Way, count: usize) -> Vec<f64> {
        let printed = self.client(way, "--request-client", &count.to_string());
        serde_json::from_slice(&printed).expect("numbers")
    }

    fn client(&mut self, way: Way, role: &str, argument: &str) -> Vec<u8> {
        if self.relay.is_none() {
            let mut child = this_program()
                .arg("--relay")
                .stdout(Stdio::piped())
                .spawn()
                .expect("this very program");
            let mut ready = [0; 1];
            let mut output = child.stdout.take().expect("piped");
            output.read_exact(&mut ready).expect("it gets ready");
            self.relay = Some(child);
        }
        let (place, address) = match way {
            Way::Diverted => (Place::Proxied, SocketAddr::from(ELSEWHERE)),
            Way::Straight => (
                Place::NoSession,
                SocketAddr::from((Ipv4Addr::LOCALHOST, RELAY_PORT)),
            ),
        };
        let directory = self.place(place);
        let output = Command::new("/run/testbed/bin/cgtproxy-testapp")
            .arg("launch")
            .arg(directory)
            .arg(this_program().get_program())
            .args([role, &address.to_string(), argument])
            .stderr(Stdio::inherit())
            .output()
            .expect("the test application");
        assert!(output.status.success());
        output.stdout
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
            let meant = client.local_addr().expect("it is connected").ip();
            assert!(meant == IpAddr::V4(ELSEWHERE.0) || meant.is_loopback());
            let server = TcpStream::connect((Ipv4Addr::LOCALHOST, BACKEND_PORT)).expect("ours");
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
fn answer(mut connection: TcpStream) {
    let _ = connection.set_nodelay(true);
    let mut wanted = [0; 8];
    if connection.read_exact(&mut wanted).is_err() {
        return;
    }
    let mut wanted = u64::from_ne_bytes(wanted);
    let buffer = vec![0; BUFFER];
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

/// Receives so many bytes and prints how many megabytes came in a second.
pub(crate) fn bulk_client(address: SocketAddr, bytes: u64) {
    let start = now();
    let mut connection = TcpStream::connect(address).expect("a connection");
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
    println!("{}", received as f64 * 1000.0 / (now() - start) as f64);
}

/// Connects, asks for 64 bytes and receives them, over and over; prints what each took, in microseconds.
pub(crate) fn request_client(address: SocketAddr, count: usize) {
    let mut times = Vec::with_capacity(count);
    let mut buffer = [0; 64];
    for _ in 0..count {
        let start = now();
        let mut connection = TcpStream::connect(address).expect("a connection");
        connection
            .write_all(&64_u64.to_ne_bytes())
            .expect("it takes it");
        connection.read_exact(&mut buffer).expect("an answer");
        times.push((now() - start) as f64 / 1000.0);
    }
    println!("{}", serde_json::to_string(&times).expect("numbers"));
}
