//! What is known of the relay.

use std::collections::BTreeMap;

use crate::config::{Config, Means, Proxy};

/// Where the relay listens for each proxy, and where it answers DNS queries.
pub(crate) type Ports = BTreeMap<String, (u16, Option<u16>)>;

/// What is known of the relay.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Relay {
    pub(crate) ports: Ports,
    /// Why it can't be told what to do.
    pub problem: Option<String>,
}

impl Relay {
    /// The port of a proxy that the relay has; 0 if it has not said yet.
    pub(crate) fn port(&self, proxy: &Proxy) -> u16 {
        let ports = self.ports.get(proxy.name.as_str());
        ports.map_or(0, |(port, _)| *port)
    }

    /// The port of a proxy's DNS server.
    pub(crate) fn dns_port(&self, proxy: &Proxy) -> Option<u16> {
        self.ports
            .get(proxy.name.as_str())
            .and_then(|(_, dns)| *dns)
    }

    /// Whether the relay has still to say where it listens for one of the configuration's proxies.
    pub(crate) fn is_awaited(&self, config: &Config) -> bool {
        let relayed = config
            .proxies
            .iter()
            .filter(|proxy| matches!(proxy.means, Means::Relay { .. }));
        self.problem.is_none() && relayed.into_iter().any(|proxy| self.port(proxy) == 0)
    }
}
