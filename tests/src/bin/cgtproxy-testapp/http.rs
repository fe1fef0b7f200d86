//! An HTTP proxy out on the internet that knows CONNECT and nothing else (RFC 9110, 9.3.6). It passes on the end of each
//! direction by itself, which tinyproxy does not.

use std::io::{Error, Read, Result, Write};
use std::net::TcpStream;

use crate::socks::{carry, connect, take_clients};

/// Serves until it is killed.
pub(crate) fn serve(address: &str) {
    take_clients(address, attend);
}

fn attend(mut client: TcpStream) -> Result<()> {
    client.set_nodelay(true)?;
    let head = head(&mut client)?;
    let to = head
        .strip_prefix("CONNECT ")
        .and_then(|rest| rest.split_once(' '))
        .and_then(|(to, _)| to.parse().ok())
        .ok_or_else(|| Error::other("no CONNECT with an address"))?;
    let Ok(server) = connect(to) else {
        return client.write_all(b"HTTP/1.1 502 Bad Gateway\r\n\r\n");
    };
    client.write_all(b"HTTP/1.1 200 OK\r\n\r\n")?;
    carry(client, server)
}

/// A request's head; what comes after it stays unread.
fn head(client: &mut TcpStream) -> Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        client.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    String::from_utf8(head).map_err(Error::other)
}
