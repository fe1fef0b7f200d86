//! Proxies that are spoken to by SOCKS5 or HTTP, written as `SCHEME://[USER:PASSWORD@]HOST[:PORT]`.

use std::fmt;
use std::num::NonZeroU16;

/// The longest user and password: SOCKS5 has one byte for their lengths.
const FIELD_BYTES: usize = 255;

/// How a proxy is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scheme {
    /// SOCKS5; the application looks names up as it would without a proxy.
    Socks5,
    /// SOCKS5, and names are looked up by the proxy.
    Socks5h,
    /// HTTP CONNECT.
    Http,
    /// HTTP CONNECT, within TLS.
    Https,
}

impl Scheme {
    /// The scheme as it is written.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Socks5 => "socks5",
            Self::Socks5h => "socks5h",
            Self::Http => "http",
            Self::Https => "https",
        }
    }

    /// Whether it carries TCP alone.
    pub(crate) fn is_http(self) -> bool {
        matches!(self, Self::Http | Self::Https)
    }

    /// The port that a proxy of this scheme listens on unless somebody says otherwise.
    fn port(self) -> u16 {
        match self {
            Self::Socks5 | Self::Socks5h => 1080,
            // As curl has it.
            Self::Http => 1080,
            Self::Https => 443,
        }
    }
}

/// A proxy elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Upstream {
    /// How the proxy is spoken to.
    pub scheme: Scheme,
    /// The proxy's name or address.
    pub host: String,
    /// The proxy's port.
    pub port: NonZeroU16,
    /// User and password.
    pub credentials: Option<(String, String)>,
    /// Whose it may be on this machine, beside the user's own, root's and system users'. No part of the text.
    pub users: Vec<u32>,
}

/// An upstream as it is written, without user and password.
impl fmt::Display for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            scheme, host, port, ..
        } = self;
        match host.contains(':') {
            true => write!(f, "{}://[{host}]:{port}", scheme.name()),
            false => write!(f, "{}://{host}:{port}", scheme.name()),
        }
    }
}

/// What is wrong with an upstream. No message has the password in it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InvalidUpstream {
    /// There is no known scheme.
    #[error("it does not begin with 'socks5://', 'socks5h://', 'http://' or 'https://'")]
    Scheme,
    /// There is no host.
    #[error("it names no host")]
    Host,
    /// The host has an empty label, or one that DNS has no room for.
    #[error("the host's name has '..' in it, or a part longer than 63 characters")]
    Name,
    /// The host ends in a number, as no name does.
    #[error("the host is no IPv4 address, which is four numbers from 0 to 255")]
    Ipv4,
    /// The host is an IPv6 address without brackets, whose end could be a port.
    #[error("an IPv6 address stands in brackets, as in 'http://[::1]:8080'")]
    Brackets,
    /// What follows the host is no port.
    #[error("what follows the host is no port from 1 to 65535")]
    Port,
    /// User and password can't be told.
    #[error(
        "user and password are written as 'USER:PASSWORD@', neither of them empty or longer than 255 bytes, \
         with '%' and two digits for characters that mean something else"
    )]
    Credentials,
    /// Something in user or password would end them.
    #[error("in a user or a password '/' is written '%2F', '?' is '%3F' and '#' is '%23'")]
    Unescaped,
    /// There is something after the port.
    #[error("nothing may follow the port")]
    Path,
}

impl std::str::FromStr for Upstream {
    type Err = InvalidUpstream;

    fn from_str(text: &str) -> Result<Self, InvalidUpstream> {
        let (scheme, rest) = text.split_once("://").ok_or(InvalidUpstream::Scheme)?;
        let scheme = match scheme.to_ascii_lowercase().as_str() {
            "socks5" => Scheme::Socks5,
            "socks5h" => Scheme::Socks5h,
            "http" => Scheme::Http,
            "https" => Scheme::Https,
            _ => return Err(InvalidUpstream::Scheme),
        };
        let authority = rest.strip_suffix('/').unwrap_or(rest);
        if let Some((_, after)) = authority.split_once(['/', '?', '#']) {
            return Err(match after.contains('@') {
                true => InvalidUpstream::Unescaped,
                false => InvalidUpstream::Path,
            });
        }
        let (credentials, address) = match authority.rsplit_once('@') {
            Some((credentials, address)) => (Some(self::credentials(credentials)?), address),
            None => (None, authority),
        };
        let (host, port) = match address.strip_prefix('[') {
            Some(rest) => {
                let (host, port) = rest.split_once(']').ok_or(InvalidUpstream::Host)?;
                host.parse::<std::net::Ipv6Addr>()
                    .map_err(|_| InvalidUpstream::Host)?;
                let port = match port.strip_prefix(':') {
                    None if port.is_empty() => None,
                    None => return Err(InvalidUpstream::Port),
                    port => port,
                };
                (host, port)
            }
            None if address.matches(':').count() > 1 => return Err(InvalidUpstream::Brackets),
            None => match address.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (address, None),
            },
        };
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':');
        if host.is_empty() || host.len() > FIELD_BYTES || !host.chars().all(allowed) {
            return Err(InvalidUpstream::Host);
        }
        if !host.contains(':') {
            check_name(host)?;
        }
        let port = match port {
            // Nor has it a sign.
            Some(port) if !port.bytes().all(|b| b.is_ascii_digit()) => {
                return Err(InvalidUpstream::Port);
            }
            Some(port) => port.parse().map_err(|_| InvalidUpstream::Port)?,
            None => NonZeroU16::new(scheme.port()).ok_or(InvalidUpstream::Port)?,
        };
        Ok(Self {
            scheme,
            host: host.to_owned(),
            port,
            credentials,
            users: Vec::new(),
        })
    }
}

/// Whether a host that is no IPv6 address can be an IPv4 address or a name.
fn check_name(host: &str) -> Result<(), InvalidUpstream> {
    // The root's dot may be written.
    let host = host.strip_suffix('.').unwrap_or(host);
    let last = host.rsplit('.').next().unwrap_or_default();
    // What a resolver would make of '1' or '10.1' depends on the resolver.
    if !last.is_empty() && last.bytes().all(|b| b.is_ascii_digit()) {
        let address = host.parse::<std::net::Ipv4Addr>();
        return address.map(drop).map_err(|_| InvalidUpstream::Ipv4);
    }
    let fits = |label: &str| !label.is_empty() && label.len() <= 63;
    match host.split('.').all(fits) {
        true => Ok(()),
        false => Err(InvalidUpstream::Name),
    }
}

fn credentials(text: &str) -> Result<(String, String), InvalidUpstream> {
    let invalid = InvalidUpstream::Credentials;
    let (user, password) = text.split_once(':').ok_or(invalid.clone())?;
    let field = |text| {
        let text = decoded(text)?;
        (!text.is_empty() && text.len() <= FIELD_BYTES).then_some(text)
    };
    match (field(user), field(password)) {
        (Some(user), Some(password)) => Ok((user, password)),
        _ => Err(invalid),
    }
}

/// Replaces '%' and two hexadecimal digits by the byte that they mean.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let (digits, after) = rest.split_first_chunk::<2>()?;
        rest = after;
        if !digits.iter().all(u8::is_ascii_hexdigit) {
            return None;
        }
        let digits = std::str::from_utf8(digits).ok()?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(text: &str) -> Result<String, InvalidUpstream> {
        let upstream: Upstream = text.parse()?;
        Ok(match &upstream.credentials {
            Some((user, password)) => format!("{upstream} {user} {password}"),
            None => upstream.to_string(),
        })
    }

    #[test]
    fn reads_what_curl_reads() {
        for (text, expected) in [
            ("socks5://127.0.0.1:1080", "socks5://127.0.0.1:1080"),
            ("SOCKS5h://localhost/", "socks5h://localhost:1080"),
            ("http://proxy.example:3128", "http://proxy.example:3128"),
            ("https://[2001:db8::1]", "https://[2001:db8::1]:443"),
            ("http://[::1]:80/", "http://[::1]:80"),
            ("http://proxy.example.:80", "http://proxy.example.:80"),
            ("http://4.example:80", "http://4.example:80"),
            ("socks5://me:p%40ss:w@h:1", "socks5://h:1 me p@ss:w"),
        ] {
            assert_eq!(read(text).as_deref(), Ok(expected));
        }
        for (text, expected) in [
            ("", InvalidUpstream::Scheme),
            ("127.0.0.1:1080", InvalidUpstream::Scheme),
            ("socks4://h:1", InvalidUpstream::Scheme),
            ("socks5://", InvalidUpstream::Host),
            ("socks5://:1", InvalidUpstream::Host),
            ("socks5://a b:1", InvalidUpstream::Host),
            ("http://[::1", InvalidUpstream::Host),
            ("http://[h]:1", InvalidUpstream::Host),
            ("socks5://h:0", InvalidUpstream::Port),
            ("socks5://h:65536", InvalidUpstream::Port),
            ("socks5://::1", InvalidUpstream::Brackets),
            ("http://::1:8080", InvalidUpstream::Brackets),
            ("socks5://h:1:2", InvalidUpstream::Brackets),
            ("socks5://256.1.1.1", InvalidUpstream::Ipv4),
            ("socks5://10.1:1", InvalidUpstream::Ipv4),
            ("socks5://h..x", InvalidUpstream::Name),
            ("socks5://.h", InvalidUpstream::Name),
            ("socks5://h:+80", InvalidUpstream::Port),
            ("socks5://h:", InvalidUpstream::Port),
            ("http://h:1/path", InvalidUpstream::Path),
            ("http://me:a/b@h:1", InvalidUpstream::Unescaped),
            ("http://me#:a@h:1/", InvalidUpstream::Unescaped),
            ("http://me@h:1", InvalidUpstream::Credentials),
            ("http://me:@h:1", InvalidUpstream::Credentials),
            ("http://me:%4@h:1", InvalidUpstream::Credentials),
            ("http://me:%ff@h:1", InvalidUpstream::Credentials),
            ("http://me:%+1@h:1", InvalidUpstream::Credentials),
        ] {
            assert_eq!(read(text), Err(expected), "{text}");
        }
    }

    proptest! {
        #[test]
        #[cfg_attr(miri, ignore = "texts that are made of a pattern take minutes")]
        fn no_text_panics(text in "(socks5://|http://|\\[|\\]|@|:|%|\\PC){0,12}") {
            let _ = text.parse::<Upstream>();
        }
    }
}
