//! Sockets: those that are listened on, and what all connections have set.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::net::sockopt;
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};

use crate::conntrack;

/// How often to look for a port that is free for TCP and UDP, on both addresses.
const ATTEMPTS: usize = 64;

/// How many connections may wait to be accepted.
const BACKLOG: u32 = 4096;

/// How long a connection may be silent before its ends are asked whether they are there still.
const KEEPALIVE: Duration = Duration::from_secs(120);

/// How long conntrack remembers a silent connection of which one side has ended, by the kernel's own default
/// (net/netfilter/nf_conntrack_proto_tcp.c). One that is open it remembers for days.
const CLOSE_WAIT: Duration = Duration::from_secs(60);

/// Listening sockets with one port: TCP and UDP, on 127.0.0.1 and, where there is IPv6, on ::1.
#[derive(Debug)]
pub(crate) struct Sockets {
    pub(crate) port: u16,
    pub(crate) tcp: Vec<(TcpListener, SocketAddr)>,
    pub(crate) udp: Vec<UdpSocket>,
}

impl Sockets {
    /// With this port, if it is free.
    pub(crate) fn bind(preferred: Option<u16>) -> io::Result<Self> {
        if let Some(port) = preferred
            && let Ok(sockets) = Self::at(port)
        {
            return Ok(sockets);
        }
        let mut result = Err(io::ErrorKind::AddrInUse.into());
        for _ in 0..ATTEMPTS {
            result = Self::at(0);
            match &result {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
                _ => break,
            }
        }
        result
    }

    fn at(port: u16) -> io::Result<Self> {
        let v4 = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
        let first = listen(v4)?;
        let port = first.local_addr()?.port();
        let v4 = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
        let v6 = SocketAddr::new(Ipv6Addr::LOCALHOST.into(), port);
        let mut sockets = Self {
            port,
            tcp: vec![(first, v4)],
            udp: vec![bind_udp(v4)?],
        };
        match listen(v6) {
            Ok(listener) => {
                sockets.tcp.push((listener, v6));
                sockets.udp.push(bind_udp(v6)?);
            }
            // A machine without IPv6 sends none.
            Err(error)
                if matches!(
                    rustix::io::Errno::from_io_error(&error),
                    Some(rustix::io::Errno::AFNOSUPPORT | rustix::io::Errno::ADDRNOTAVAIL)
                ) => {}
            Err(error) => return Err(error),
        }
        Ok(sockets)
    }
}

/// Without SO_REUSEADDR: the rests of connections that ended in order keep other users from taking the port at once
/// when the relay ends, as the kernel could not tell their listener from this one. Those that the relay's end has
/// reset leave none, so the next relay listens here again.
fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match address.ip() {
        IpAddr::V4(_) => TcpSocket::new_v4()?,
        IpAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.bind(address)?;
    set_listener_options(&socket)?;
    socket.listen(BACKLOG)
}

fn bind_udp(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = std::net::UdpSocket::bind(address)?;
    socket.set_nonblocking(true)?;
    UdpSocket::from_std(socket)
}

/// What is worth a packet to the sender is worth one here, and ends that are gone are found out. What is accepted at a
/// listener with these options has them too.
pub(crate) fn set_options(socket: impl AsFd) -> io::Result<()> {
    sockopt::set_tcp_nodelay(&socket, true)?;
    sockopt::set_socket_oobinline(&socket, true)?;
    sockopt::set_socket_keepalive(&socket, true)?;
    sockopt::set_tcp_keepidle(&socket, KEEPALIVE)?;
    Ok(())
}

/// The same for a listener whose connections are translated on their way here. One that conntrack has forgotten is not
/// translated any more: what the application gets then comes from nobody it knows, and it answers with a reset. So each
/// is asked twice in the time that one lasts of which either side has ended. The interval counts as well: it is the
/// time from one question to the next, 75 seconds by default (tcp(7)).
fn set_listener_options(listener: impl AsFd) -> io::Result<()> {
    set_options(&listener)?;
    let remembered = conntrack::timeout("tcp_timeout_close_wait", CLOSE_WAIT);
    let often = (remembered / 2).clamp(Duration::from_secs(1), KEEPALIVE);
    sockopt::set_tcp_keepidle(&listener, often)?;
    sockopt::set_tcp_keepintvl(&listener, often)?;
    Ok(())
}

/// Makes the end of a connection a reset, but not what shutdown(2) says before that.
pub(crate) fn reset(stream: &TcpStream) {
    if let Err(error) = stream.set_zero_linger() {
        tracing::debug!("can't reset a connection: {error}");
    }
}
