//! How long the kernel remembers connections, and with them where they were going.

use std::time::Duration;

/// The value of `net.netfilter.nf_conntrack_NAME` in the network namespace of the relay, which is that of who is redirected
/// to it; the default where the kernel tells nobody.
pub(crate) fn timeout(name: &str, default: Duration) -> Duration {
    let path = format!("/proc/sys/net/netfilter/nf_conntrack_{name}");
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let seconds = text.trim().parse().map(Duration::from_secs);
    seconds.unwrap_or(default)
}
