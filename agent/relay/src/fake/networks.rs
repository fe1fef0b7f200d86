//! The networks that addresses are from.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use cgtproxy_proto::network::{FAKE_IPV4, FAKE_IPV6, Network};

/// Families of addresses that a proxy leaves out: one that stood for a name would lead past the proxy, and to nobody.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct LeftOut {
    /// IPv4.
    pub ipv4: bool,
    /// IPv6.
    pub ipv6: bool,
}

/// Where the addresses are from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Networks {
    pub(super) ipv4: (Ipv4Addr, u8),
    pub(super) ipv6: (Ipv6Addr, u8),
}

impl Default for Networks {
    fn default() -> Self {
        Self {
            ipv4: FAKE_IPV4,
            ipv6: FAKE_IPV6,
        }
    }
}

impl Networks {
    /// Reads networks as ADDRESS/PREFIX; those that are not given are the default ones.
    ///
    /// # Errors
    /// The name of the parameter that is none with room for a name.
    pub(crate) fn parse(ipv4: Option<&str>, ipv6: Option<&str>) -> Result<Self, &'static str> {
        let network = |text: &str| text.parse::<Network>().ok();
        let mut networks = Self::default();
        if let Some(text) = ipv4 {
            let network = network(text).and_then(Network::ipv4);
            let network = network.filter(|(_, prefix)| *prefix <= 30);
            networks.ipv4 = network.ok_or("fakeIpv4")?;
        }
        if let Some(text) = ipv6 {
            let network = network(text).and_then(Network::ipv6);
            let network = network.filter(|(_, prefix)| *prefix <= 126);
            networks.ipv6 = network.ok_or("fakeIpv6")?;
        }
        Ok(networks)
    }

    /// How many addresses the smaller one has.
    pub(super) fn size(self) -> u32 {
        let ipv4 = 1_u64 << (32 - u32::from(self.ipv4.1));
        let ipv6 = 1_u64 << (128 - u32::from(self.ipv6.1)).min(32);
        u32::try_from(ipv4.min(ipv6)).unwrap_or(u32::MAX)
    }

    pub(super) fn ipv4(self, number: u32) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.ipv4.0.to_bits().wrapping_add(number))
    }

    pub(super) fn ipv6(self, number: u32) -> Ipv6Addr {
        Ipv6Addr::from_bits(self.ipv6.0.to_bits().wrapping_add(number.into()))
    }

    /// The number of an address; none if it is not in the networks.
    pub(super) fn number(self, address: IpAddr) -> Option<u32> {
        match address {
            IpAddr::V4(ip) => {
                let (base, prefix) = self.ipv4;
                let number = ip.to_bits().checked_sub(base.to_bits())?;
                let last = u32::MAX.checked_shr(prefix.into()).unwrap_or(0);
                (number <= last).then_some(number)
            }
            IpAddr::V6(ip) => {
                let (base, prefix) = self.ipv6;
                let number = ip.to_bits().checked_sub(base.to_bits())?;
                let last = u128::MAX.checked_shr(prefix.into()).unwrap_or(0);
                // An offset beyond u32 can't belong to an entry.
                (number <= last).then(|| u32::try_from(number).unwrap_or(u32::MAX))
            }
        }
    }
}
