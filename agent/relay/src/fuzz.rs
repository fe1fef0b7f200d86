//! What comes from outside, as bytes: each function takes any, and must neither panic nor break what it asserts.
//! libFuzzer runs them (tests/fuzz), and so does every `cargo test`, over the corpus and variations of it.

use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;

use crate::fake::{Fakes, LeftOut, Networks};
use crate::socks::{self, Credentials};
use crate::target::Target;
use crate::{dns, http};

/// Lets a future run that waits for nothing but its input, which is all there.
fn finish<T>(future: impl Future<Output = T>) -> Option<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().build().ok()?;
    Some(runtime.block_on(future))
}

fn target() -> Target {
    Target::Name(Rc::from("example.org"), 443)
}

fn credentials() -> Credentials {
    Credentials {
        user: "user".into(),
        password: "password".into(),
    }
}

/// What a SOCKS5 server answers to a connection and to an association, with a password and without, and what it
/// sends as a datagram.
pub fn socks(bytes: &[u8]) {
    let credentials = credentials();
    for credentials in [None, Some(&credentials)] {
        let _ = finish(async {
            let mut stream = tokio::io::join(bytes, tokio::io::sink());
            if socks::greet(&mut stream, credentials).await.is_ok() {
                let _ = socks::connect(&mut stream, &target()).await;
            }
            let mut stream = tokio::io::join(bytes, tokio::io::sink());
            if socks::greet(&mut stream, credentials).await.is_ok() {
                let _ = socks::associate(&mut stream, false).await;
            }
        });
    }
    if let Some((from, payload)) = socks::parse_datagram(bytes) {
        assert!(bytes.ends_with(payload));
        // What has an address is written as it was read, but for one of IPv4 that was written as one of IPv6.
        if let Some(from) = from {
            let read_as_v6 = bytes.get(3) == Some(&4);
            let written = match from {
                SocketAddr::V4(v4) if read_as_v6 => {
                    SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port())
                }
                from => from,
            };
            let header = socks::datagram_header(&Target::Address(written)).unwrap_or_default();
            let read: &[u8] = bytes
                .get(3..bytes.len() - payload.len())
                .unwrap_or_default();
            assert_eq!(header.get(3..), Some(read));
        }
    }
}

/// What an HTTP proxy answers to CONNECT. What follows the answer belongs to the application: no byte of it is lost,
/// whether it was read with the answer or not.
pub fn http(bytes: &[u8]) {
    let mut rest = bytes;
    let answered = finish(async {
        let mut stream = tokio::io::join(&mut rest, tokio::io::sink());
        http::connect(&mut stream, None, &target()).await
    });
    if let Some(Ok(early)) = answered {
        assert!(bytes.ends_with(&[&early, rest].concat()));
    }
}

/// A DNS query of an application's. What is answered can be read, and bears the query's number.
pub fn dns(bytes: &[u8]) {
    let mut fakes = Fakes::new(None);
    for ipv6 in [false, true] {
        let left_out = LeftOut { ipv4: !ipv6, ipv6 };
        if let Some(answer) = dns::answer(bytes, &mut fakes, left_out) {
            assert_eq!(answer.get(..2), bytes.get(..2));
            // Its question may be of a type that the reader here refuses.
            let known = dns::with_known_type(&answer).map(|(known, _)| known);
            assert!(simple_dns::Packet::parse(&known.unwrap_or(answer)).is_ok());
        }
    }
}

/// The file of names. Whatever it says, no two names have one number, and none is where it is not looked for.
pub fn names(bytes: &[u8]) {
    let mut fakes = Fakes::new(None);
    fakes.set_networks(Networks::default());
    fakes.load(&String::from_utf8_lossy(bytes), 1000);
    let Some(number) = fakes.number("example.org") else {
        return;
    };
    let (ipv4, ipv6) = fakes.addresses(number);
    for address in [IpAddr::from(ipv4), IpAddr::from(ipv6)] {
        let target = fakes.target(SocketAddr::new(address, 1));
        assert_eq!(target, Some(Target::Name("example.org".into(), 1)));
    }
}

#[cfg(test)]
#[path = "../../../tests/fuzz/variations.rs"]
mod variations;

#[cfg(test)]
mod tests {
    #[test]
    fn no_socks_server_panics_the_relay() {
        super::variations::run("relay-socks", super::socks);
    }

    #[test]
    fn no_http_proxy_panics_the_relay() {
        super::variations::run("relay-http", super::http);
    }

    #[test]
    fn no_query_panics_the_relay() {
        super::variations::run("relay-dns", super::dns);
    }

    #[test]
    fn no_file_of_names_panics_the_relay() {
        super::variations::run("relay-names", super::names);
    }
}
