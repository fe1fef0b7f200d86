//! Bypass lists: from addresses and networks as written to the ranges that an nftables set takes.

use std::net::{Ipv4Addr, Ipv6Addr};

use cgtproxy_proto::network::Network;

use crate::nft::Bypass;

/// Parses a policy's bypass list.
///
/// # Errors
/// The index of the first entry that is neither an address nor a network.
pub(crate) fn parse(entries: &[String]) -> Result<Bypass, usize> {
    let mut ipv4 = Vec::new();
    let mut ipv6 = Vec::new();
    for (index, entry) in entries.iter().enumerate() {
        let network: Network = entry.parse().map_err(|_| index)?;
        let ranges = if network.address().is_ipv4() {
            &mut ipv4
        } else {
            &mut ipv6
        };
        ranges.push(network.range());
    }
    let ipv4 = merge(ipv4).into_iter().map(|(first, last)| {
        (
            Ipv4Addr::from_bits(first as u32),
            Ipv4Addr::from_bits(last as u32),
        )
    });
    let ipv6 = merge(ipv6)
        .into_iter()
        .map(|(first, last)| (Ipv6Addr::from_bits(first), Ipv6Addr::from_bits(last)));
    Ok(Bypass {
        ipv4: ipv4.collect(),
        ipv6: ipv6.collect(),
    })
}

/// Sorts ranges, and joins those that overlap or touch: nftables refuses overlapping intervals.
fn merge(mut ranges: Vec<(u128, u128)>) -> Vec<(u128, u128)> {
    ranges.sort_unstable();
    let mut merged: Vec<(u128, u128)> = Vec::with_capacity(ranges.len());
    for (first, last) in ranges {
        match merged.last_mut() {
            Some(previous) if first <= previous.1.saturating_add(1) => {
                previous.1 = previous.1.max(last);
            }
            _ => merged.push((first, last)),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parsed(entries: &[&str]) -> Result<Bypass, usize> {
        parse(&entries.iter().map(|e| (*e).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn takes_addresses_and_networks() {
        let bypass = parsed(&["10.1.2.3/8", "192.0.2.1", "fe80::1/10", "::1"]).unwrap();
        assert_eq!(
            bypass.ipv4,
            [
                (Ipv4Addr::new(10, 0, 0, 0), Ipv4Addr::new(10, 255, 255, 255)),
                (Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 1)),
            ],
        );
        assert_eq!(bypass.ipv6.len(), 2);
        assert_eq!(
            bypass.ipv6[1].1,
            "febf:ffff:ffff:ffff:ffff:ffff:ffff:ffff"
                .parse::<Ipv6Addr>()
                .unwrap()
        );
    }

    #[test]
    fn takes_everything() {
        let bypass = parsed(&["0.0.0.0/0", "::/0", "255.255.255.255"]).unwrap();
        assert_eq!(bypass.ipv4, [(Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST)]);
        assert_eq!(
            bypass.ipv6,
            [(Ipv6Addr::UNSPECIFIED, Ipv6Addr::from_bits(u128::MAX))]
        );
    }

    #[test]
    fn names_the_entry_that_is_wrong() {
        for bad in [
            "",
            "x",
            "10.0.0.0/33",
            "::/129",
            "10.0.0.0/",
            "10.0.0.0/+8",
            "1.2.3",
            "::1%lo",
            "10.0.0.0/8/8",
        ] {
            assert_eq!(parsed(&["10.0.0.0/8", bad]), Err(1), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn ranges_neither_overlap_nor_touch_and_lose_nothing(
            ranges in proptest::collection::vec((0u128..60, 0u128..10), 0..12)
        ) {
            let ranges: Vec<_> = ranges.into_iter().map(|(first, n)| (first, first + n)).collect();
            let merged = merge(ranges.clone());
            prop_assert!(merged.windows(2).all(|w| w[0].1 + 1 < w[1].0));
            for address in 0..80 {
                let within = |ranges: &[(u128, u128)]| ranges.iter().any(|r| r.0 <= address && address <= r.1);
                prop_assert_eq!(within(&ranges), within(&merged));
            }
        }
    }
}
