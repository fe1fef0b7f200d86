//! Packets of protocols that the kernel does not speak for us.

use std::io::Result;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::AsRawFd;

use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{MsgFlags, sendto};
use socket2::{Domain, Protocol, Socket, Type};

/// Sends one packet with a few zero bytes in it.
pub(super) fn send(protocol: u8, to: IpAddr) -> Result<()> {
    let to = SocketAddr::new(to, 0);
    let protocol = Protocol::from(i32::from(protocol));
    let socket = Socket::new(Domain::for_address(to), Type::RAW, Some(protocol))?;
    socket.send_to(&[0; 32], &to.into()).map(drop)
}

/// Who an injected packet says it is from: the kernel lets no address of the machine's own in from a device.
const STRANGER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 77), 4077);

/// Puts a datagram into the loopback interface.
pub(super) fn inject(mark: u32, to: SocketAddrV4, text: &str) -> Result<()> {
    let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
    socket.set_mark(mark)?;
    let loopback = getifaddrs()?
        .filter(|interface| interface.interface_name == "lo")
        .find_map(|interface| interface.address?.as_link_addr().copied())
        .expect("every machine has one");
    let frame = [&ETHERNET[..], &datagram(to, text.as_bytes())].concat();
    sendto(socket.as_raw_fd(), &frame, &loopback, MsgFlags::empty())?;
    Ok(())
}

/// From nobody to nobody, which are the addresses that lo has, and IPv4 follows.
const ETHERNET: [u8; 14] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x08, 0x00];

/// IPv4 (RFC 791) and UDP (RFC 768), whose checksum may be left out.
fn datagram(to: SocketAddrV4, payload: &[u8]) -> Vec<u8> {
    const IP: usize = 20;
    const UDP: usize = 8;
    let bytes = |length: usize| u16::try_from(length).expect("it is short").to_be_bytes();
    let mut packet = vec![0x45, 0];
    packet.extend(bytes(IP + UDP + payload.len()));
    packet.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    packet.extend(STRANGER.ip().octets());
    packet.extend(to.ip().octets());
    let (words, _) = packet.as_chunks();
    let sum: u32 = words
        .iter()
        .map(|pair| u32::from(u16::from_be_bytes(*pair)))
        .sum();
    // Ten words: what is carried over is carried once.
    let checksum = !u16::try_from((sum & 0xffff) + (sum >> 16)).expect("a small sum");
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    packet.extend(STRANGER.port().to_be_bytes());
    packet.extend(to.port().to_be_bytes());
    packet.extend(bytes(UDP + payload.len()));
    packet.extend([0, 0]);
    packet.extend(payload);
    packet
}
