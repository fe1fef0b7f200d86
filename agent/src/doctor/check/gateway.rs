//! Does the machine forward what its `gateway` is to divert, and does that get to the proxy?

use crate::doctor::facts::{Facts, Gateway, Proxy};
use crate::doctor::{Finding, Group};

pub(super) fn check(facts: &Facts, group: &mut Group) {
    let Some(gateway) = &facts.gateway else {
        return;
    };
    let proxies = facts.proxies();
    let proxy = proxies.iter().find(|proxy| proxy.name == gateway.proxy);
    let off = group.see("whether the machine forwards", &gateway.forwarding_off);
    group.found(off.and_then(|off| not_forwarding(proxy, off)));
    let checked = group.see("src_valid_mark", &gateway.src_valid_mark);
    group.found(checked.and_then(|checked| source_checked(proxy, checked)));
    group.found(bridged(facts, gateway));
}

/// What has a value, and its verb.
fn are(names: &[impl AsRef<str>]) -> String {
    let verb = if names.len() == 1 { "is" } else { "are" };
    let names: Vec<&str> = names.iter().map(AsRef::as_ref).collect();
    format!("{} {verb}", names.join(" and "))
}

/// The finding about variables of sysctl that are off, of the families that the proxy takes.
fn not_forwarding(proxy: Option<&Proxy>, off: &[String]) -> Option<Finding> {
    let takes = |name: &&String| match (proxy, name.starts_with("net.ipv6.")) {
        (Some(proxy), true) => proxy.ipv6,
        (Some(proxy), false) => proxy.ipv4,
        (None, _) => true,
    };
    let off: Vec<&String> = off.iter().filter(takes).collect();
    (!off.is_empty()).then(|| {
        let names: Vec<&str> = off.iter().map(|name| name.as_str()).collect();
        let finding = Finding::warning(
            "gateway-forwarding",
            format!("the machine does not forward: {} 0", are(&names)),
        )
        .effect("Of what hosts behind the 'gateway' send, only what goes to its proxy gets anywhere: neither ping nor what 'bypass' lists.")
        .advice("a line for each in /etc/sysctl.d keeps it");
        off.iter().fold(finding, |finding, name| {
            finding.command(format!("sudo sysctl -w {name}=1"))
        })
    })
}

/// The kernel looks up the way back to the sender with the packet's mark, and so finds it on this machine.
fn source_checked(proxy: Option<&Proxy>, on: &[String]) -> Option<Finding> {
    let takes_ipv4 = proxy.is_none_or(|proxy| proxy.ipv4);
    (takes_ipv4 && !on.is_empty()).then(|| {
        let finding = Finding::error(
            "gateway-src-valid-mark",
            format!(
                "the kernel takes senders behind the 'gateway' for itself: {} 1, as wg-quick sets it",
                are(on)
            ),
        )
        .effect("What the 'gateway' diverts over IPv4 is dropped; nothing of it leaves directly.")
        .advice("wg-quick needs it only with a strict reverse path filter (rp_filter=1)");
        on.iter().fold(finding, |finding, name| {
            finding.command(format!("sudo sysctl -w {name}=0"))
        })
    })
}

fn bridged(facts: &Facts, gateway: &Gateway) -> Option<Finding> {
    (facts.network.bridge_filter && !gateway.bridges.is_empty()).then(|| {
        Finding::error(
            "gateway-bridge",
            format!(
                "br_netfilter has what the bridge {} carries pass the rules for routed packets \
                 (net.bridge.bridge-nf-call-iptables), and the 'gateway' names that bridge",
                gateway.bridges.join(" and ")
            ),
        )
        .effect("Every connection that the 'gateway' diverts there is refused.")
        .advice("where Docker or Kubernetes needs it, take the bridge out of 'interfaces'")
        .command(
            "sudo sysctl -w net.bridge.bridge-nf-call-iptables=0 net.bridge.bridge-nf-call-ip6tables=0",
        )
    })
}
