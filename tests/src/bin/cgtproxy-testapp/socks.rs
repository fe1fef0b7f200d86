//! A SOCKS5 server out on the internet, with UDP (RFC 1928). It knows what `192-0-2-7.example` is, and no other names.
//! Whoever is asked sees it come from the internet's own addresses.

use std::io::{Error, Read, Result, Write, copy};
use std::net::{
    IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket,
};
use std::os::fd::AsFd;
use std::thread;

use cgtproxy_tests::sandbox::{INTERNET_V4, INTERNET_V6};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Protocol, Socket, Type};

const CONNECT: u8 = 1;
const ASSOCIATE: u8 = 3;
const IPV4: u8 = 1;
const NAME: u8 = 3;
const IPV6: u8 = 4;
const REFUSED: u8 = 5;

/// Serves until it is killed.
pub(crate) fn serve(address: &str) {
    take_clients(address, attend);
}

/// Has each client attended to until the program is killed.
pub(crate) fn take_clients(address: &str, attend: fn(TcpStream) -> Result<()>) {
    let listener = TcpListener::bind(address).expect("an address of the internet's");
    for client in listener.incoming().flatten() {
        thread::spawn(move || {
            // A client that goes away in the middle is what tests do.
            let _ = attend(client);
        });
    }
}

fn attend(mut client: TcpStream) -> Result<()> {
    client.set_nodelay(true)?;
    let [version, methods] = read(&mut client)?;
    if version != 5 {
        return Err(Error::other("not SOCKS5"));
    }
    client.read_exact(&mut vec![0; usize::from(methods)])?;
    client.write_all(&[5, 0])?;
    let [_, command, _] = read(&mut client)?;
    let to = address(&mut client)?;
    match command {
        CONNECT => {
            let Ok(server) = connect(to) else {
                return client.write_all(&reply(REFUSED, to));
            };
            client.write_all(&reply(0, server.local_addr()?))?;
            carry(client, server)
        }
        ASSOCIATE => associate(client),
        _ => Err(Error::other("an unknown command")),
    }
}

/// The address in the name of a host.
fn named(name: &[u8]) -> Option<IpAddr> {
    let name = std::str::from_utf8(name).ok()?;
    let label = name.strip_suffix(".example")?;
    label.replace('-', ".").parse().ok()
}

/// A connection to somebody, from the internet's own address.
pub(crate) fn connect(to: SocketAddr) -> Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    socket.bind(&own(to).into())?;
    socket.connect(&to.into())?;
    Ok(socket.into())
}

/// Where that is asked from.
fn own(to: SocketAddr) -> SocketAddr {
    let ip = if to.is_ipv4() {
        INTERNET_V4
    } else {
        INTERNET_V6
    };
    SocketAddr::new(ip, 0)
}

/// Carries bytes both ways, and passes on the end of each.
pub(crate) fn carry(client: TcpStream, server: TcpStream) -> Result<()> {
    let (mut from_client, mut to_server) = (client.try_clone()?, server.try_clone()?);
    let up = thread::spawn(move || {
        let _ = copy(&mut from_client, &mut to_server);
        let _ = to_server.shutdown(Shutdown::Write);
    });
    let (mut from_server, mut to_client) = (server, client);
    let _ = copy(&mut from_server, &mut to_client);
    let _ = to_client.shutdown(Shutdown::Write);
    let _ = up.join();
    Ok(())
}

/// Passes datagrams on until the client ends the connection.
fn associate(mut client: TcpStream) -> Result<()> {
    let relay = UdpSocket::bind(own(client.local_addr()?))?;
    let out = [INTERNET_V4, INTERNET_V6].map(|ip| UdpSocket::bind((ip, 0)));
    let [v4, v6] = out;
    let out = [v4?, v6?];
    client.write_all(&reply(0, relay.local_addr()?))?;
    let mut sender = None;
    let mut buffer = vec![0; 1 << 16];
    loop {
        let mut ready = [
            client.as_fd(),
            relay.as_fd(),
            out[0].as_fd(),
            out[1].as_fd(),
        ]
        .map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        poll(&mut ready, PollTimeout::NONE)?;
        let [ended, asked, answered @ ..] = ready.map(|fd| fd.any().unwrap_or(true));
        if ended {
            return Ok(());
        }
        if asked {
            let (length, from) = relay.recv_from(&mut buffer)?;
            sender = Some(from);
            if let Some((to, payload)) = take_apart(&buffer[..length]) {
                let _ = out[usize::from(to.is_ipv6())].send_to(payload, to);
            }
        }
        for (socket, _) in out.iter().zip(answered).filter(|(_, ready)| *ready) {
            let (length, from) = socket.recv_from(&mut buffer)?;
            let mut message = vec![0, 0, 0];
            put(&mut message, from);
            message.extend_from_slice(&buffer[..length]);
            if let Some(sender) = sender {
                let _ = relay.send_to(&message, sender);
            }
        }
    }
}

/// Where a datagram is to go, and what is in it; none if it is a fragment, or makes no sense.
fn take_apart(mut message: &[u8]) -> Option<(SocketAddr, &[u8])> {
    let [_, _, 0] = read(&mut message).ok()? else {
        return None;
    };
    let to = address(&mut message).ok()?;
    Some((to, message))
}

/// Reads an address and a port. Not by the relay's own reader: a mistake in that one would be in both.
fn address(from: &mut impl Read) -> Result<SocketAddr> {
    let [kind] = read(from)?;
    let ip: IpAddr = match kind {
        IPV4 => Ipv4Addr::from(read::<4>(from)?).into(),
        IPV6 => Ipv6Addr::from(read::<16>(from)?).into(),
        NAME => {
            let [length] = read(from)?;
            let mut name = vec![0; usize::from(length)];
            from.read_exact(&mut name)?;
            named(&name).ok_or_else(|| Error::other("an unknown name"))?
        }
        _ => return Err(Error::other("no address")),
    };
    Ok(SocketAddr::new(ip, u16::from_be_bytes(read(from)?)))
}

fn reply(code: u8, address: SocketAddr) -> Vec<u8> {
    let mut message = vec![5, code, 0];
    put(&mut message, address);
    message
}

fn put(message: &mut Vec<u8>, address: SocketAddr) {
    match address.ip() {
        IpAddr::V4(ip) => {
            message.push(IPV4);
            message.extend_from_slice(&ip.octets());
        }
        IpAddr::V6(ip) => {
            message.push(IPV6);
            message.extend_from_slice(&ip.octets());
        }
    }
    message.extend_from_slice(&address.port().to_be_bytes());
}

fn read<const N: usize>(from: &mut impl Read) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}
