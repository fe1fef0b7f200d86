//! Addresses and networks, as they are written, and those of which there are defaults.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// The IPv4 network of addresses that stand for names unless the relay is told otherwise: the one that is set aside for
/// benchmarks (RFC 2544). Nothing on the internet has it, and lists of private networks, which many
/// bypass, leave it out.
pub const FAKE_IPV4: (Ipv4Addr, u8) = (Ipv4Addr::new(198, 18, 0, 0), 15);
/// The IPv6 network of addresses that stand for names unless the relay is told otherwise: for benchmarks, too (RFC 5180).
pub const FAKE_IPV6: (Ipv6Addr, u8) = (Ipv6Addr::new(0x2001, 2, 0, 0, 0, 0, 0, 0), 48);

/// An IPv4 or IPv6 network, or a single address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    prefix: u8,
}

/// Why a text is no network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidNetwork {
    /// The part before the slash is no address.
    #[error("it is no IPv4 or IPv6 address")]
    Address,
    /// The part after the slash is no prefix length.
    #[error("after the '/' stands a number from 0 to {0}")]
    Prefix(u8),
}

impl FromStr for Network {
    type Err = InvalidNetwork;

    fn from_str(text: &str) -> Result<Self, InvalidNetwork> {
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| InvalidNetwork::Address)?;
        let longest = if address.is_ipv4() { 32 } else { 128 };
        let prefix = match prefix {
            None => longest,
            Some(digits) => digits
                .parse()
                .ok()
                // `parse` takes a sign as well.
                .filter(|&p: &u8| p <= longest && digits.bytes().all(|b| b.is_ascii_digit()))
                .ok_or(InvalidNetwork::Prefix(longest))?,
        };
        Ok(Self { address, prefix })
    }
}

impl Network {
    /// The numbers of its first and its last address.
    #[must_use]
    pub fn range(self) -> (u128, u128) {
        let (address, bits) = match self.address {
            IpAddr::V4(address) => (address.to_bits().into(), 32),
            IpAddr::V6(address) => (address.to_bits(), 128),
        };
        // Those of a 128-bit number that the prefix, and before it the family, leaves free.
        let free = u128::MAX
            .checked_shr(128 - bits + u32::from(self.prefix))
            .unwrap_or(0);
        (address & !free, address | free)
    }

    /// The network itself, if the text named one of the addresses in it.
    #[must_use]
    pub fn network(self) -> Self {
        let (first, _) = self.range();
        let address = match self.address {
            IpAddr::V4(_) => Ipv4Addr::from_bits(first as u32).into(),
            IpAddr::V6(_) => Ipv6Addr::from_bits(first).into(),
        };
        Self { address, ..self }
    }

    /// The network's first address and the length of its prefix, if it is one of IPv4.
    #[must_use]
    pub fn ipv4(self) -> Option<(Ipv4Addr, u8)> {
        match self.network().address {
            IpAddr::V4(address) => Some((address, self.prefix)),
            IpAddr::V6(_) => None,
        }
    }

    /// The network's first address and the length of its prefix, if it is one of IPv6.
    #[must_use]
    pub fn ipv6(self) -> Option<(Ipv6Addr, u8)> {
        match self.network().address {
            IpAddr::V6(address) => Some((address, self.prefix)),
            IpAddr::V4(_) => None,
        }
    }

    /// Its first address, or the one that was named.
    #[must_use]
    pub fn address(self) -> IpAddr {
        self.address
    }

    /// How many bits of its addresses are the same.
    #[must_use]
    pub fn prefix(self) -> u8 {
        self.prefix
    }

    /// Whether it and another network have an address in common.
    #[must_use]
    pub fn overlaps(self, address: IpAddr, prefix: u8) -> bool {
        if self.address.is_ipv4() != address.is_ipv4() {
            return false;
        }
        let prefix = prefix.min(self.prefix);
        let within = |address| Self { address, prefix }.network();
        within(self.address) == within(address)
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, prefix } = self;
        match (address, prefix) {
            (IpAddr::V4(_), 32) | (IpAddr::V6(_), 128) => write!(f, "{address}"),
            _ => write!(f, "{address}/{prefix}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_addresses_and_networks() {
        for (text, network) in [
            ("127.0.0.1", "127.0.0.1"),
            ("10.1.2.3/8", "10.0.0.0/8"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("1.2.3.4/32", "1.2.3.4"),
            ("fe80::1/10", "fe80::/10"),
            ("::/0", "::/0"),
            ("2001:db8::1", "2001:db8::1"),
        ] {
            let read: Network = text.parse().unwrap();
            let first = read.network();
            assert_eq!(first.to_string(), network, "{text}");
            let ipv4 = read.ipv4().map(|(address, _)| address.into());
            let ipv6 = read.ipv6().map(|(address, _)| address.into());
            assert_eq!(ipv4.xor(ipv6), Some(first.address()), "{text}");
        }
    }

    #[test]
    fn refuses_the_rest() {
        let cases = [
            ("", InvalidNetwork::Address),
            ("localhost", InvalidNetwork::Address),
            ("10.0.0", InvalidNetwork::Address),
            ("fe80::1%eth0", InvalidNetwork::Address),
            ("10.0.0.0/33", InvalidNetwork::Prefix(32)),
            ("10.0.0.0/", InvalidNetwork::Prefix(32)),
            ("10.0.0.0/+8", InvalidNetwork::Prefix(32)),
            ("10.0.0.0/255.0.0.0", InvalidNetwork::Prefix(32)),
            ("::/129", InvalidNetwork::Prefix(128)),
        ];
        for (text, why) in cases {
            assert_eq!(text.parse::<Network>(), Err(why), "{text}");
        }
    }
}
