//! Can the kernel do what is needed?

use crate::doctor::facts::{Facts, Tracked};
use crate::doctor::{Finding, Group};

/// Before it, a class id in net_cls or net_prio took the place of a socket's control group ("bpf, cgroups:
/// Fix cgroup v2 fallback on v1/v2 mixed mode", include/linux/cgroup-defs.h).
const BOTH_VERSIONS: (u32, u32) = (5, 15);

pub(super) fn check(facts: &Facts) -> Group {
    let mut group = Group::new("kernel");
    let version = group.see("Linux's version", &facts.system.linux).copied();
    group.found(version.and_then(|version| net_cls(facts, version)));
    group.see(
        "controllers of version 1",
        &facts.system.v1_network_controllers,
    );
    match facts.diagnosis() {
        Ok(diagnosis) => {
            let (conntrack, nftables): (Vec<_>, Vec<_>) = diagnosis
                .missingFeatures
                .iter()
                .map(String::as_str)
                .partition(|feature| *feature == "ctnetlink");
            group.found(missing(&nftables));
            let matters = !conntrack.is_empty() && !facts.relayed().is_empty();
            group.found(matters.then(no_ctnetlink));
        }
        Err(why) => group.unseen.push(format!("what nftables can do: {why}")),
    }
    let tracked = group.see(
        "the connections that the kernel tracks",
        &facts.network.tracked,
    );
    group.found(tracked.and_then(|tracked| full(tracked.as_ref()?)));
    if let Some(status) = facts.helper_status() {
        group.found((!status.tableOwned).then(|| {
            Finding::note(
                "table-not-protected",
                "other programs can change the table 'inet cgtproxy' (Linux before 6.9, or own-table: false)",
            )
            .effect(
                "A firewall that flushes everything takes your rules away until the helper has put them \
                 back, a moment later.",
            )
        }));
        // Where it is switched off, another finding says so.
        let off = facts.network.ipv6_off_on_lo == Ok(true);
        group.found((!status.ipv6 && !off).then(|| {
            Finding::note("kernel-no-ipv6", "the kernel has no IPv6")
                .effect("Only IPv4 goes through proxies; there is nothing else.")
        }));
    }
    if let Some((major, minor)) = version {
        group.summary = format!("Linux {major}.{minor}, has all that is needed");
    }
    group
}

/// Short of the limit already: a table that is full stays a little below it, as the kernel forgets what has had no answer.
fn full(tracked: &Tracked) -> Option<Finding> {
    let Tracked { count, max } = *tracked;
    (max > 0 && count >= max - max / 20).then(|| {
        Finding::warning(
            "connections-full",
            format!("the kernel tracks {count} connections, and may track {max}"),
        )
        .effect("When there are as many as there may be, no new connection of anybody's gets through.")
        .advice("find out whose they are (conntrack -L), or raise the limit; a line in /etc/sysctl.d keeps it")
        .command(format!(
            "sudo sysctl -w net.netfilter.nf_conntrack_max={}",
            max.saturating_mul(2)
        ))
    })
}

fn no_ctnetlink() -> Finding {
    Finding::error("kernel-feature", "the kernel lacks ctnetlink")
        .effect("What goes by UDP to a proxy under 'proxies' does not arrive.")
        .advice("some distributions have this module in a package of extra modules")
        .command("sudo modprobe nf_conntrack_netlink")
}

fn missing(features: &[&str]) -> Option<Finding> {
    (!features.is_empty()).then(|| {
        let modules: Vec<&str> = features
            .iter()
            .map(|feature| match *feature {
                "tproxy" => "nft_tproxy",
                "fib" => "nft_fib_inet",
                _ => "nft_nat",
            })
            .collect();
        Finding::error(
            "kernel-feature",
            format!("the kernel's nftables lacks {}", features.join(", ")),
        )
        .effect("The helper can't put a policy with proxies into force.")
        .advice("some distributions have these modules in a package of extra modules")
        .command(format!("sudo modprobe --all {}", modules.join(" ")))
    })
}

fn net_cls(facts: &Facts, version: (u32, u32)) -> Option<Finding> {
    let controllers = facts.system.v1_network_controllers.as_ref().ok()?;
    (version < BOTH_VERSIONS && !controllers.is_empty()).then(|| {
        Finding::warning(
            "net-cls",
            format!(
                "{} of version 1 is mounted, and Linux before 5.15 forgets the control groups of sockets \
                 once it is used",
                controllers.join(" and ")
            ),
        )
        .effect("No rule matches any more, and everything goes direct, until the next boot.")
        .advice("boot with cgroup_no_v1=net_cls,net_prio, or with a newer kernel")
    })
}
