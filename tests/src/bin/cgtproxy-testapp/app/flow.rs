//! One socket and how far it has come.

use std::io::{ErrorKind, Read, Result, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use cgtproxy_tests::wire::{Answer, AppReport};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Protocol, Socket, Type};

use super::ping::Ping;
use crate::lines::take_lines;

/// A TCP connection, a UDP socket or an ICMP echo socket, each with one peer.
pub(crate) enum Flow {
    Tcp(Stream),
    Udp { socket: Socket, token: String },
    Ping(Ping),
}

/// A TCP connection.
pub(crate) struct Stream {
    socket: Socket,
    connected: bool,
    token: String,
    buffer: Vec<u8>,
}

impl Flow {
    /// Begins to connect; [`Flow::step`] tells what became of it.
    pub(crate) fn tcp(
        to: SocketAddr,
        protocol: Protocol,
        mark: u32,
        device: Option<&str>,
    ) -> Result<Self> {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(protocol))?;
        set_mark(&socket, mark, to)?;
        socket.bind_device(device.map(str::as_bytes))?;
        socket.set_nonblocking(true)?;
        socket.set_tcp_nodelay(true)?;
        match socket.connect(&to.into()) {
            Err(e) if e.raw_os_error() != Some(Errno::EINPROGRESS as i32) => return Err(e),
            _ => {}
        }
        let token = String::new();
        Ok(Self::Tcp(Stream {
            socket,
            connected: false,
            token,
            buffer: Vec::new(),
        }))
    }

    pub(crate) fn udp(to: SocketAddr, mark: u32, device: Option<&str>) -> Result<Self> {
        let socket = Socket::new(Domain::for_address(to), Type::DGRAM, Some(Protocol::UDP))?;
        set_mark(&socket, mark, to)?;
        socket.bind_device(device.map(str::as_bytes))?;
        socket.set_nonblocking(true)?;
        if to.is_ipv4() {
            socket.set_broadcast(true)?;
        }
        socket.connect(&to.into())?;
        Ok(Self::Udp {
            socket,
            token: String::new(),
        })
    }

    pub(crate) fn ping(to: IpAddr) -> Result<Self> {
        Ok(Self::Ping(Ping::open(SocketAddr::new(to, 0))?))
    }

    /// Its own end.
    pub(crate) fn local(&self) -> Result<SocketAddr> {
        let socket = match self {
            Self::Tcp(stream) => &stream.socket,
            Self::Udp { socket, .. } => socket,
            Self::Ping(_) => return Err(ErrorKind::Unsupported.into()),
        };
        let address = socket.local_addr()?;
        address.as_socket().ok_or(ErrorKind::Unsupported.into())
    }

    /// Asks.
    pub(crate) fn send(&mut self, question: &str) -> Result<()> {
        match self {
            Self::Tcp(stream) => {
                question.clone_into(&mut stream.token);
                (&stream.socket).write_all(format!("{question}\n").as_bytes())
            }
            Self::Udp { socket, token } => {
                question.clone_into(token);
                socket.send(question.as_bytes()).map(drop)
            }
            Self::Ping(ping) => ping.send(question),
        }
    }

    /// Closes a TCP connection by a reset.
    pub(crate) fn reset(self) -> Result<()> {
        match self {
            Self::Tcp(stream) => stream.socket.set_linger(Some(Duration::ZERO)),
            Self::Udp { .. } | Self::Ping(_) => Ok(()),
        }
    }

    /// Reads until the other end of a TCP connection is through.
    pub(crate) fn hear_end(&mut self) -> Result<AppReport> {
        let Self::Tcp(stream) = self else {
            return Err(ErrorKind::Unsupported.into());
        };
        stream.socket.set_nonblocking(false)?;
        std::io::copy(&mut &stream.socket, &mut std::io::sink())?;
        Ok(AppReport::Closed)
    }

    /// Waits for what happens next.
    pub(crate) fn step(&mut self, patience: Duration) -> Result<AppReport> {
        match self {
            Self::Tcp(stream) => stream.step(patience),
            Self::Udp { socket, token } => {
                let deadline = Instant::now() + patience;
                while wait(socket.as_fd(), PollFlags::POLLIN, deadline)? {
                    let mut buffer = [0; 2048];
                    let count = (&*socket).read(&mut buffer)?;
                    // Whoever claims to be the peer may have said anything.
                    let answer = serde_json::from_slice(&buffer[..count]).ok();
                    if let Some(answer) = answer.filter(|a: &Answer| a.token == *token) {
                        return Ok(AppReport::Answered(answer));
                    }
                }
                Ok(AppReport::Pending)
            }
            Self::Ping(ping) => {
                let echo = ping.receive(patience)?;
                Ok(if echo.is_some() {
                    AppReport::Echoed
                } else {
                    AppReport::Pending
                })
            }
        }
    }
}

impl Stream {
    fn step(&mut self, patience: Duration) -> Result<AppReport> {
        let deadline = Instant::now() + patience;
        if !self.connected {
            if !wait(self.socket.as_fd(), PollFlags::POLLOUT, deadline)? {
                return Ok(AppReport::Pending);
            }
            if let Some(error) = self.socket.take_error()? {
                return Err(error);
            }
            self.connected = true;
            return Ok(AppReport::Connected);
        }
        while wait(self.socket.as_fd(), PollFlags::POLLIN, deadline)? {
            let mut buffer = [0; 4096];
            match (&self.socket).read(&mut buffer) {
                Ok(0) => return Ok(AppReport::Closed),
                Ok(count) => self.buffer.extend_from_slice(&buffer[..count]),
                Err(e) if e.kind() == ErrorKind::ConnectionReset => return Ok(AppReport::Closed),
                Err(e) => return Err(e),
            }
            for line in take_lines(&mut self.buffer) {
                let answer: Answer = serde_json::from_slice(&line)?;
                if answer.token == self.token {
                    return Ok(AppReport::Answered(answer));
                }
            }
        }
        Ok(AppReport::Pending)
    }
}

/// The mark of sockets that nobody marks.
pub(crate) const NO_MARK: u32 = 0;

/// Before the socket has a route, which depends on it. With a mark that leads to lo the kernel chooses the
/// destination for the source too, and finds no route then: so the source is the one that others have.
fn set_mark(socket: &Socket, mark: u32, to: SocketAddr) -> Result<()> {
    if mark == NO_MARK {
        return Ok(());
    }
    let other = Socket::new(Domain::for_address(to), Type::DGRAM, Some(Protocol::UDP))?;
    other.connect(&to.into())?;
    let mut source = other.local_addr()?.as_socket().expect("it is of IP");
    source.set_port(0);
    socket.bind(&source.into())?;
    socket.set_mark(mark)
}

/// Waits until a socket is ready (errors count as ready), or until the deadline.
pub(super) fn wait(socket: BorrowedFd<'_>, events: PollFlags, deadline: Instant) -> Result<bool> {
    let left = deadline.saturating_duration_since(Instant::now());
    let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
    Ok(poll(&mut [PollFd::new(socket, events)], timeout)? > 0)
}
