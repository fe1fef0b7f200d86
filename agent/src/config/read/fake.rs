//! The networks of addresses that stand for names.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::config::finding::Place;
use crate::config::reader::{Reader, one_or_more};
use crate::config::yaml::Node;
use crate::config::{FakeAddresses, Means, Network};
use crate::text::printable;

use super::proxies::Proxies;

/// What no proxy takes: this machine, the link, and what is no one's address.
const LEFT_OUT: [(IpAddr, u8); 6] = [
    (IpAddr::V4(Ipv4Addr::new(127, 0, 0, 0)), 8),
    (IpAddr::V4(Ipv4Addr::new(224, 0, 0, 0)), 4),
    (IpAddr::V4(Ipv4Addr::BROADCAST), 32),
    (IpAddr::V6(Ipv6Addr::LOCALHOST), 128),
    (IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0)), 10),
    (IpAddr::V6(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0)), 8),
];

impl Reader<'_> {
    /// A network of each family, or one of them; none if anything about them is wrong.
    pub(super) fn fake_addresses(&mut self, node: &Node) -> Option<FakeAddresses> {
        let mut networks = FakeAddresses::default();
        let mut right = true;
        for item in one_or_more(node) {
            let Some(text) = self.text(item, "an entry of 'fake-addresses'") else {
                right = false;
                continue;
            };
            // Room for a few names at least.
            let network = text
                .parse::<Network>()
                .ok()
                .map(|network| network.network())
                .filter(|network| match network.address() {
                    IpAddr::V4(_) => network.prefix() <= 30,
                    IpAddr::V6(_) => network.prefix() <= 126,
                });
            let Some(network) = network else {
                right = false;
                let message = format!("'{}' is no network", printable(&text));
                self.error(item.place, message).help =
                    Some("write one like '198.18.0.0/15' or '2001:2::/48'".into());
                continue;
            };
            let left_out = LEFT_OUT
                .into_iter()
                .find(|&(address, prefix)| network.overlaps(address, prefix));
            if let Some((address, prefix)) = left_out {
                right = false;
                let message = format!(
                    "'fake-addresses' has {network}, but no proxy gets what goes to {address}/{prefix}"
                );
                self.error(item.place, message).help = Some(
                    "choose one that nobody uses, like '198.18.0.0/15' or '2001:2::/48'".into(),
                );
                continue;
            }
            let second = match network.address() {
                IpAddr::V4(_) => networks.ipv4.replace(network).is_some(),
                IpAddr::V6(_) => networks.ipv6.replace(network).is_some(),
            };
            if second {
                right = false;
                self.error(
                    item.place,
                    "'fake-addresses' has two networks of one family",
                )
                .help = Some("keep one of them".into());
            }
        }
        right.then_some(networks)
    }

    /// What stands for a name must not be bypassed: it leads nowhere.
    pub(super) fn check_fake_addresses(
        &mut self,
        proxies: &Proxies,
        networks: &FakeAddresses,
        bypass: &[(Place, Network)],
    ) {
        let fake = |means: &Means| matches!(means, Means::Relay { fake_dns: true, .. });
        if !proxies.list.iter().any(|proxy| fake(&proxy.means)) {
            return;
        }
        for (address, prefix) in networks.networks() {
            for (place, bypassed) in bypass {
                if bypassed.overlaps(address, prefix) {
                    let message = format!(
                        "'bypass' has {bypassed}, but {address}/{prefix} stands for names that a proxy looks up"
                    );
                    self.error(*place, message).help = Some(
                        "take it out of 'bypass', or choose other networks with 'fake-addresses'"
                            .into(),
                    );
                }
            }
        }
    }
}
