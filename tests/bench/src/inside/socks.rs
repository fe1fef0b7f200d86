//! A SOCKS5 server that is in nobody's way: what is beyond it is itself. Whoever connects somewhere through it gets as
//! many bytes as they ask for, and datagrams come back from where they are sent to. So nothing is measured but
//! the way to the server.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use super::held::{Crowd, PAUSE};
use super::relay::answer;

pub(super) const PORT: u16 = 1080;
pub(super) const ADDRESS: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, PORT);

pub(super) const CONNECT: u8 = 1;
pub(super) const ASSOCIATE: u8 = 3;

/// How many connections are served at once.
const WORKERS: usize = 64;

/// Serves until it is killed.
pub(crate) fn serve() {
    let listener = Arc::new(TcpListener::bind(ADDRESS).expect("a port"));
    let kept = Arc::new(Mutex::new(Crowd::default()));
    for _ in 0..WORKERS {
        let (listener, kept) = (listener.clone(), kept.clone());
        thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                // An application that is killed has made its measurement fail already.
                let _ = attend(connection, &kept);
            }
        });
    }
    print!(".");
    io::stdout().flush().expect("somebody waits for it");
    loop {
        kept.lock().expect("nobody panics").push();
        thread::sleep(PAUSE);
    }
}

fn attend(mut connection: TcpStream, kept: &Mutex<Crowd>) -> io::Result<()> {
    connection.set_nodelay(true)?;
    let mut buffer = [0; 512];
    // Whoever speaks SOCKS5 waits for each answer before going on.
    let length = connection.read(&mut buffer)?;
    assert!(length > 2 && buffer[0] == 5, "SOCKS5 is what is spoken");
    connection.write_all(&[5, 0])?;
    let length = connection.read(&mut buffer)?;
    // The relay keeps connections ready, and ends those that nobody has needed.
    if length == 0 {
        return Ok(());
    }
    assert!(length >= 10, "a request comes in one piece");
    match buffer[1] {
        CONNECT => {
            connection.write_all(&[5, 0, 0, 1, 0, 0, 0, 0, 0, 0])?;
            let port = u16::from_be_bytes([buffer[length - 2], buffer[length - 1]]);
            let mut kept = kept.lock().expect("nobody panics");
            let answered = kept.keep(connection, port);
            drop(kept);
            if let Some(connection) = answered {
                answer(connection);
            }
        }
        ASSOCIATE => {
            let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
            let own = socket.local_addr()?;
            let over = AtomicBool::new(false);
            let mut reply = vec![5, 0, 0];
            put(&mut reply, own);
            connection.write_all(&reply)?;
            thread::scope(|scope| {
                scope.spawn(|| send_back(&socket, &over));
                let ended = connection.read(&mut buffer);
                over.store(true, Ordering::Relaxed);
                // It looks at that when something arrives.
                let _ = socket.send_to(&[], own);
                ended
            })?;
        }
        other => panic!("nobody here asks for command {other}"),
    }
    Ok(())
}

/// The header of a datagram says where it goes to, or where it comes from: for an echo that is the same.
fn send_back(socket: &UdpSocket, over: &AtomicBool) {
    let mut buffer = vec![0; 1 << 16];
    while !over.load(Ordering::Relaxed) {
        if let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..length], from);
        }
    }
}

/// The client's side: asks for something, and returns the address that the server answers with.
pub(super) fn ask(stream: &mut TcpStream, command: u8, to: SocketAddr) -> SocketAddr {
    stream.write_all(&[5, 1, 0]).expect("it takes it");
    let mut method = [0; 2];
    stream.read_exact(&mut method).expect("an answer");
    assert_eq!(method, [5, 0]);
    let mut request = vec![5, command, 0];
    put(&mut request, to);
    stream.write_all(&request).expect("it takes it");
    let mut reply = [0; 10];
    stream.read_exact(&mut reply).expect("an answer");
    let [version, code, _, _, a, b, c, d, high, low] = reply;
    assert_eq!((version, code), (5, 0));
    SocketAddr::from(([a, b, c, d], u16::from_be_bytes([high, low])))
}

/// What stands before a datagram.
pub(super) fn datagram_header(to: SocketAddr) -> Vec<u8> {
    let mut header = vec![0, 0, 0];
    put(&mut header, to);
    header
}

fn put(message: &mut Vec<u8>, address: SocketAddr) {
    let IpAddr::V4(ip) = address.ip() else {
        panic!("the bench's addresses are IPv4");
    };
    message.push(1);
    message.extend_from_slice(&ip.octets());
    message.extend_from_slice(&address.port().to_be_bytes());
}
