//! A message to somebody else's netlink socket.

use std::ffi::OsStr;
use std::os::fd::AsRawFd;

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, sendto, socket,
};

/// Sends a netlink message without content to a port, and prints `sent` or the error's name.
pub(crate) fn send(protocol: &OsStr, port: &OsStr) {
    let protocol = match protocol.to_str() {
        Some("route") => SockProtocol::NetlinkRoute,
        Some("netfilter") => SockProtocol::NetlinkNetFilter,
        _ => panic!("route or netfilter"),
    };
    let port = port
        .to_str()
        .and_then(|port| port.parse().ok())
        .expect("a number");
    let from = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        protocol,
    )
    .expect("everybody may have one");
    // Its length, NLMSG_NOOP, and zeroes (linux/netlink.h).
    let mut message = [0_u8; 16];
    message[..4].copy_from_slice(&16_u32.to_ne_bytes());
    message[4..6].copy_from_slice(&1_u16.to_ne_bytes());
    let to = NetlinkAddr::new(port, 0);
    match sendto(from.as_raw_fd(), &message, &to, MsgFlags::empty()) {
        Ok(_) => println!("sent"),
        Err(error) => println!("{error:?}"),
    }
}
