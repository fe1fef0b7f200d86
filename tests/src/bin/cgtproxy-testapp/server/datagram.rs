//! Datagrams whose destination is known, and answers that come from there.

use std::io::{IoSlice, IoSliceMut, Result};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket};
use std::os::fd::AsRawFd;

use cgtproxy_tests::wire::ServerKind;
use nix::cmsg_space;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt,
    sockopt,
};
use socket2::{Domain, Protocol, Socket, Type};

/// One datagram.
pub(super) struct Question {
    pub(super) payload: Vec<u8>,
    pub(super) source: SocketAddr,
    pub(super) destination: SocketAddr,
}

/// Asks the kernel to tell each datagram's destination: the original one for a TPROXY server.
pub(super) fn want_destinations(socket: &UdpSocket, kind: ServerKind) -> Result<()> {
    match (kind, socket.local_addr()?.is_ipv4()) {
        (ServerKind::Tproxy, true) => setsockopt(socket, sockopt::Ipv4OrigDstAddr, &true)?,
        (ServerKind::Tproxy, false) => setsockopt(socket, sockopt::Ipv6OrigDstAddr, &true)?,
        (_, true) => setsockopt(socket, sockopt::Ipv4PacketInfo, &true)?,
        (_, false) => setsockopt(socket, sockopt::Ipv6RecvPacketInfo, &true)?,
    }
    Ok(())
}

/// The next datagram, if there is one.
pub(super) fn receive(socket: &UdpSocket, kind: ServerKind) -> Option<Question> {
    let port = socket.local_addr().ok()?.port();
    let mut payload = [0; 2048];
    let mut control = cmsg_space!(libc::in6_pktinfo, libc::sockaddr_in6);
    let mut buffers = [IoSliceMut::new(&mut payload)];
    let message = recvmsg::<SockaddrStorage>(
        socket.as_raw_fd(),
        &mut buffers,
        Some(&mut control),
        MsgFlags::MSG_DONTWAIT,
    )
    .ok()?;
    let source = to_std(&message.address?)?;
    let destination = message.cmsgs().ok()?.find_map(|control| match control {
        ControlMessageOwned::Ipv4PacketInfo(info) => {
            Some(SocketAddr::new(ipv4(info.ipi_addr).into(), port))
        }
        ControlMessageOwned::Ipv6PacketInfo(info) => Some(SocketAddr::new(
            Ipv6Addr::from(info.ipi6_addr.s6_addr).into(),
            port,
        )),
        ControlMessageOwned::Ipv4OrigDstAddr(address) => {
            let port = u16::from_be(address.sin_port);
            Some(SocketAddrV4::new(ipv4(address.sin_addr), port).into())
        }
        ControlMessageOwned::Ipv6OrigDstAddr(address) => {
            let port = u16::from_be(address.sin6_port);
            Some(SocketAddr::new(
                Ipv6Addr::from(address.sin6_addr.s6_addr).into(),
                port,
            ))
        }
        _ => None,
    });
    let length = message.bytes;
    let destination = destination
        .unwrap_or_else(|| panic!("a {kind:?} server was not told a datagram's destination"));
    Some(Question {
        payload: payload[..length].to_vec(),
        source,
        destination,
    })
}

/// Answers from the very address and port that was asked.
pub(super) fn reply(
    socket: &UdpSocket,
    kind: ServerKind,
    question: &Question,
    answer: &[u8],
) -> Result<()> {
    if kind == ServerKind::Tproxy {
        return speak(question.destination, question.source, answer);
    }
    let to = SockaddrStorage::from(question.source);
    let buffers = [IoSlice::new(answer)];
    let send = |control| {
        sendmsg(
            socket.as_raw_fd(),
            &buffers,
            &[control],
            MsgFlags::empty(),
            Some(&to),
        )
    };
    match question.destination.ip() {
        IpAddr::V4(from) => send(ControlMessage::Ipv4PacketInfo(&libc::in_pktinfo {
            ipi_ifindex: 0,
            ipi_spec_dst: libc::in_addr {
                s_addr: u32::from(from).to_be(),
            },
            ipi_addr: libc::in_addr { s_addr: 0 },
        })),
        IpAddr::V6(from) => send(ControlMessage::Ipv6PacketInfo(&libc::in6_pktinfo {
            ipi6_addr: libc::in6_addr {
                s6_addr: from.octets(),
            },
            ipi6_ifindex: 0,
        })),
    }?;
    Ok(())
}

/// Sends as somebody else.
pub(super) fn speak(from: SocketAddr, to: SocketAddr, said: &[u8]) -> Result<()> {
    let socket = Socket::new(Domain::for_address(from), Type::DGRAM, Some(Protocol::UDP))?;
    super::set_transparent(&socket, from)?;
    socket.set_reuse_address(true)?;
    socket.bind(&from.into())?;
    socket.send_to(said, &to.into())?;
    Ok(())
}

fn ipv4(address: libc::in_addr) -> Ipv4Addr {
    Ipv4Addr::from(u32::from_be(address.s_addr))
}

fn to_std(address: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = address.as_sockaddr_in() {
        return Some(SocketAddrV4::from(*v4).into());
    }
    address
        .as_sockaddr_in6()
        .map(|v6| SocketAddrV6::from(*v6).into())
}
