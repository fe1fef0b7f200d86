//! A server that tells whoever asks who it is, who asked and for what destination: the internet
//! with all its addresses, a TPROXY server, or an ordinary service.

mod datagram;
mod flush;

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;

use cgtproxy_tests::wire::{
    Answer, Arrival, Listen, ServerKind, ServerOrder, ServerReport, ServerSpec, Transport,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Protocol, Socket, Type};

use crate::lines::{parse, say, take_lines};

/// Serves until stdin ends.
pub(crate) fn serve(spec: &str) {
    let spec: ServerSpec = serde_json::from_str(spec).expect("a server's specification");
    let mut server = match Server::bind(spec) {
        Ok(server) => server,
        Err(error) => return say(&ServerReport::Failed(error)),
    };
    say(&ServerReport::Ready);
    server.run();
}

struct Server {
    name: String,
    kind: ServerKind,
    listeners: Vec<TcpListener>,
    datagrams: Vec<UdpSocket>,
    connections: Vec<Connection>,
    arrivals: Vec<Arrival>,
}

struct Connection {
    stream: TcpStream,
    peer: SocketAddr,
    /// For a diverted connection this is the original destination: that is how TPROXY tells it.
    local: SocketAddr,
    buffer: Vec<u8>,
}

impl Server {
    fn bind(spec: ServerSpec) -> Result<Self, String> {
        let mut server = Self {
            name: spec.name,
            kind: spec.kind,
            listeners: Vec::new(),
            datagrams: Vec::new(),
            connections: Vec::new(),
            arrivals: Vec::new(),
        };
        for listen in spec.listen {
            let mut listening = server.listen(&listen);
            if listening.is_err() && listen.multipath {
                // A kernel without MPTCP, or with one that lacks options (IPV6_FREEBIND before Linux 5.17), has TCP;
                // tests of it fail there by their applications.
                listening = server.listen(&Listen {
                    multipath: false,
                    ..listen
                });
            }
            listening.map_err(|e| format!("cannot listen on {listen:?}: {e}"))?;
        }
        Ok(server)
    }

    fn listen(&mut self, listen: &Listen) -> std::io::Result<()> {
        let address = listen.address;
        let (kind, protocol) = match listen.transport {
            Transport::Tcp if listen.multipath => (Type::STREAM, Protocol::MPTCP),
            Transport::Tcp => (Type::STREAM, Protocol::TCP),
            Transport::Udp => (Type::DGRAM, Protocol::UDP),
        };
        let socket = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        if self.kind == ServerKind::Tproxy {
            set_transparent(&socket, address)?;
        }
        if self.kind == ServerKind::Internet && address.is_ipv6() {
            // A route makes every address local, but IPv6 wants to hear from whoever sends from it.
            socket.set_freebind_v6(true)?;
        }
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        match listen.transport {
            Transport::Tcp => {
                socket.listen(4096)?;
                self.listeners.push(socket.into());
            }
            Transport::Udp => {
                // A burst must not be lost for want of room.
                socket.set_recv_buffer_size(8 << 20)?;
                let socket = socket.into();
                datagram::want_destinations(&socket, self.kind)?;
                self.datagrams.push(socket);
            }
        }
        Ok(())
    }

    fn run(&mut self) {
        let mut orders = Vec::new();
        loop {
            let wake_for_orders = self.wait();
            self.serve_all();
            if !wake_for_orders {
                continue;
            }
            let mut chunk = [0; 4096];
            let count = nix::unistd::read(std::io::stdin(), &mut chunk).unwrap_or(0);
            if count == 0 {
                return;
            }
            orders.extend_from_slice(&chunk[..count]);
            for line in take_lines(&mut orders) {
                match parse(&line) {
                    ServerOrder::Sync => {
                        self.serve_all();
                        let arrivals = std::mem::take(&mut self.arrivals);
                        say(&ServerReport::Arrived(arrivals));
                    }
                    ServerOrder::SpeakFirst { from, to } => {
                        let said = self.answer(to, from, "");
                        match datagram::speak(from, to, &said) {
                            Ok(()) => say(&ServerReport::Said),
                            // The kernel does not let it leave, which is for a test to judge.
                            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                                say(&ServerReport::Said);
                            }
                            Err(error) => say(&ServerReport::Failed(error.to_string())),
                        }
                    }
                    ServerOrder::SpeakUp => {
                        for connection in &self.connections {
                            let mut said = self.answer(connection.peer, connection.local, "");
                            said.push(b'\n');
                            (&connection.stream).write_all(&said).expect("it is open");
                        }
                        say(&ServerReport::Said);
                    }
                    ServerOrder::Flush(address) => match flush::every_cpu(address) {
                        Ok(()) => say(&ServerReport::Flushed),
                        Err(error) => say(&ServerReport::Failed(error.to_string())),
                    },
                }
            }
        }
    }

    /// Sleeps until there is something to do; says whether the harness wants something.
    fn wait(&self) -> bool {
        let stdin = std::io::stdin();
        let listeners = self.listeners.iter().map(AsFd::as_fd);
        let datagrams = self.datagrams.iter().map(AsFd::as_fd);
        let connections = self.connections.iter().map(|c| c.stream.as_fd());
        let mut fds: Vec<PollFd<'_>> = std::iter::once(stdin.as_fd())
            .chain(listeners.chain(datagrams).chain(connections))
            .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
            .collect();
        poll(&mut fds, PollTimeout::NONE).expect("poll");
        fds[0].any().unwrap_or(true)
    }

    /// Serves everything that has arrived, until nothing is left to read.
    fn serve_all(&mut self) {
        for listener in &self.listeners {
            while let Ok((stream, peer)) = listener.accept() {
                let Ok(local) = stream.local_addr() else {
                    continue;
                };
                stream.set_nonblocking(true).unwrap();
                self.arrivals.push(Arrival {
                    transport: Transport::Tcp,
                    source: peer,
                    destination: local,
                    token: None,
                });
                self.connections.push(Connection {
                    stream,
                    peer,
                    local,
                    buffer: Vec::new(),
                });
            }
        }
        let mut connections = std::mem::take(&mut self.connections);
        connections.retain_mut(|connection| self.serve_connection(connection));
        self.connections = connections;
        for socket in &self.datagrams {
            while let Some(question) = datagram::receive(socket, self.kind) {
                let token = String::from_utf8_lossy(&question.payload).into_owned();
                let answer = self.answer(question.source, question.destination, &token);
                self.arrivals.push(Arrival {
                    transport: Transport::Udp,
                    source: question.source,
                    destination: question.destination,
                    token: Some(token),
                });
                if let Err(error) = datagram::reply(socket, self.kind, &question, &answer) {
                    // Not fatal: the test sees a question without an answer, and this line.
                    eprintln!("{}: cannot answer {}: {error}", self.name, question.source);
                }
            }
        }
    }

    /// Answers what is there to answer; false when the connection is over.
    fn serve_connection(&mut self, connection: &mut Connection) -> bool {
        let mut chunk = [0; 4096];
        loop {
            match connection.stream.read(&mut chunk) {
                Ok(0) => return false,
                Ok(count) => connection.buffer.extend_from_slice(&chunk[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                Err(_) => return false,
            }
            for line in take_lines(&mut connection.buffer) {
                let token = String::from_utf8_lossy(&line).into_owned();
                let mut answer = self.answer(connection.peer, connection.local, &token);
                answer.push(b'\n');
                self.arrivals.push(Arrival {
                    transport: Transport::Tcp,
                    source: connection.peer,
                    destination: connection.local,
                    token: Some(token),
                });
                if connection.stream.write_all(&answer).is_err() {
                    return false;
                }
            }
        }
    }

    fn answer(&self, source: SocketAddr, destination: SocketAddr, token: &str) -> Vec<u8> {
        serde_json::to_vec(&Answer {
            by: self.name.clone(),
            kind: self.kind,
            source,
            destination,
            token: token.to_owned(),
        })
        .unwrap()
    }
}

/// Lets a socket have any address, of either family.
fn set_transparent(socket: &Socket, address: SocketAddr) -> std::io::Result<()> {
    if address.is_ipv4() {
        socket.set_ip_transparent_v4(true)
    } else {
        socket.set_ip_transparent_v6(true)
    }
}
