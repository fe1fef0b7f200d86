//! Names of proxies.

use std::fmt;
use std::str::FromStr;

use crate::limits::PROXY_NAME_BYTES;

/// The name of a proxy: a letter or digit, then letters, digits, `.`, `_` and `-`. It becomes part of
/// names of nftables chains and of systemd slices, and means the same in both without escaping.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProxyName(String);

/// Why a string is not the name of a proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidProxyName {
    /// It is empty or longer than [`PROXY_NAME_BYTES`].
    #[error("a proxy's name has 1 to {PROXY_NAME_BYTES} characters")]
    Length,
    /// It has another character than the allowed ones.
    #[error("a proxy's name is a letter or digit, then letters, digits, '.', '_' and '-'")]
    Character,
    /// It is the name of a target that every policy has.
    #[error("'direct', 'drop' and 'drop-all' can't be names of proxies")]
    Reserved,
}

impl ProxyName {
    /// The name as it was written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ProxyName {
    type Err = InvalidProxyName;

    fn from_str(name: &str) -> Result<Self, InvalidProxyName> {
        if name.is_empty() || name.len() > PROXY_NAME_BYTES {
            return Err(InvalidProxyName::Length);
        }
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if !name.chars().all(allowed) || !name.starts_with(|c: char| c.is_ascii_alphanumeric()) {
            return Err(InvalidProxyName::Character);
        }
        if matches!(name, "direct" | "drop" | "drop-all") {
            return Err(InvalidProxyName::Reserved);
        }
        Ok(Self(name.to_owned()))
    }
}

impl fmt::Display for ProxyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_what_nftables_and_systemd_take() {
        for name in [
            "mihomo",
            "a",
            "7",
            "clash-meta",
            "v2ray.us_1",
            &"x".repeat(64),
        ] {
            assert_eq!(name.parse::<ProxyName>().unwrap().as_str(), name);
        }
    }

    #[test]
    fn refuses_the_rest() {
        for (name, why) in [
            ("", InvalidProxyName::Length),
            (&*"x".repeat(65), InvalidProxyName::Length),
            ("-x", InvalidProxyName::Character),
            ("a b", InvalidProxyName::Character),
            ("a;drop", InvalidProxyName::Character),
            ("a\0", InvalidProxyName::Character),
            ("\u{1b}[2J", InvalidProxyName::Character),
            ("ä", InvalidProxyName::Character),
            ("direct", InvalidProxyName::Reserved),
            ("drop", InvalidProxyName::Reserved),
        ] {
            assert_eq!(name.parse::<ProxyName>(), Err(why), "{name:?}");
        }
    }
}
