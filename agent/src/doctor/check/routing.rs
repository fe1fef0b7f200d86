//! Do diverted packets get to the proxy, and is there a way for the others?

use super::gateway;
use crate::doctor::facts::{Facts, Family, Rule};
use crate::doctor::{Finding, Group};

/// Rule 0 looks the machine's own addresses up, and is there before all others.
const LOCAL: u32 = 255;

pub(super) fn check(facts: &Facts) -> Group {
    let mut group = Group::new("routing");
    let rules = group.see("routing rules", &facts.rules);
    let tables = group.see("routing tables", &facts.routing_tables);
    match facts.diagnosis() {
        Ok(ours) => {
            let ours = Ours {
                divert: u32::try_from(ours.divertBit).unwrap_or_default(),
                table: u32::try_from(ours.routeTable).unwrap_or_default(),
                priority: u32::try_from(ours.rulePriority).unwrap_or_default(),
            };
            group.summary = format!("priority {}, table {}", ours.priority, ours.table);
            for family in families(facts) {
                if let Some(rules) = rules {
                    group.found(missing_rule(rules, family, &ours));
                    group.found(earlier(rules, family, &ours));
                }
                if let Some(tables) = tables {
                    group.found(missing_route(tables, family, &ours));
                }
            }
        }
        Err(why) => group
            .unseen
            .push(format!("whether diverted packets find their way: {why}")),
    }
    group.found(ipv6(facts));
    let network = &facts.network;
    for (family, route, matters) in [
        (Family::Ipv4, &network.ipv4_route, true),
        (
            Family::Ipv6,
            &network.ipv6_route,
            wants_ipv6(facts) && network.has_ipv6(),
        ),
    ] {
        let what = format!("the way to the internet over {family}");
        let route = group.see(&what, route);
        group.found((matters && route == Some(&false)).then(|| no_route(family)));
    }
    group.see("systemd-networkd", &facts.system.networkd);
    group.see("networkd.conf", &facts.system.networkd_removes_rules);
    group.found(networkd(facts));
    group.found(bridge(facts));
    gateway::check(facts, &mut group);
    group
}

/// What the helper has in the kernel.
struct Ours {
    divert: u32,
    table: u32,
    priority: u32,
}

/// The families that are diverted.
fn families(facts: &Facts) -> Vec<Family> {
    let ipv6 = facts.helper_status().is_some_and(|status| status.ipv6);
    match ipv6 {
        true => vec![Family::Ipv4, Family::Ipv6],
        false => vec![Family::Ipv4],
    }
}

fn ip(family: Family) -> &'static str {
    match family {
        Family::Ipv4 => "ip",
        Family::Ipv6 => "ip -6",
    }
}

fn missing_rule(rules: &[Rule], family: Family, ours: &Ours) -> Option<Finding> {
    let is_ours = |rule: &Rule| {
        rule.family == family
            && rule.priority == ours.priority
            && rule.table == Some(ours.table)
            && rule.mark == Some((ours.divert, ours.divert))
    };
    (!rules.iter().any(is_ours)).then(|| {
        let problem = format!(
            "the routing rule for diverted packets is not there ({family}, priority {})",
            ours.priority
        );
        removed(Finding::error("rule-missing", problem), family)
    })
}

fn missing_route(tables: &[(Family, u32)], family: Family, ours: &Ours) -> Option<Finding> {
    (!tables.contains(&(family, ours.table))).then(|| {
        let problem = format!(
            "the routing table {} has no {family} route that delivers to this machine",
            ours.table
        );
        removed(Finding::error("route-missing", problem), family)
    })
}

/// What the helper has put there is gone.
fn removed(finding: Finding, family: Family) -> Finding {
    finding
        .effect(format!(
            "What should go through a TPROXY server over {family} is dropped; nothing of it leaves directly."
        ))
        .advice("the helper puts it back when another program removes it, and logs if it can't")
        .command("sudo systemctl restart cgtproxy-helper.service")
}

/// Rules that get to see diverted packets before ours does, and would take them.
fn earlier(rules: &[Rule], family: Family, ours: &Ours) -> Vec<Finding> {
    let takes = |rule: &&Rule| {
        // Whatever its value: a diverted packet may have any bits but ours.
        let takes = match (rule.mark, rule.inverted) {
            (Some((value, mask)), false) => mask & ours.divert == 0 || value & ours.divert != 0,
            (Some((value, mask)), true) => {
                mask & !ours.divert != 0 || mask & !value & ours.divert != 0
            }
            (None, inverted) => !inverted,
        };
        rule.family == family
            && rule.priority < ours.priority
            && rule.table.is_some_and(|table| table != LOCAL)
            && !rule.narrower
            && !rule.suppressed
            && takes
    };
    let finding = |rule: &Rule| {
        let table = rule.table.unwrap_or_default();
        let mark = match rule.mark {
            Some((value, mask)) => format!(" for marks {value:#x}/{mask:#x}"),
            None => String::new(),
        };
        let finding = Finding::error(
            "rule-before",
            format!(
                "the {family} routing rule {}{mark} comes before the one for diverted packets, {}",
                rule.priority, ours.priority
            ),
        )
        .effect(format!(
            "Where table {table} has a route, packets leave by that instead of going to the proxy."
        ));
        finding
            .advice(format!(
                "give it a priority above {}, or set rule-priority in /etc/cgtproxy/helper.yaml to one \
                 below {}",
                ours.priority, rule.priority
            ))
            .command(format!("sudo {} rule del priority {}", ip(family), rule.priority))
    };
    rules.iter().filter(takes).map(finding).collect()
}

/// Whether a proxy is to take IPv6.
fn wants_ipv6(facts: &Facts) -> bool {
    facts.proxies().iter().any(|proxy| proxy.ipv6)
}

fn ipv6(facts: &Facts) -> Option<Finding> {
    let network = &facts.network;
    if !network.ipv6 || !wants_ipv6(facts) {
        return None;
    }
    match (&network.ipv6_off, &network.ipv6_off_on_lo) {
        (Ok(false), Ok(true)) => Some(
            Finding::error(
                "ipv6-off-on-lo",
                "IPv6 is switched off on lo and nowhere else",
            )
            .effect("Diverted packets come in over lo: over IPv6, they reach no proxy.")
            .command("sudo sysctl -w net.ipv6.conf.lo.disable_ipv6=0"),
        ),
        (Ok(true), _) => Some(
            Finding::note(
                "ipv6-off",
                "IPv6 is switched off (net.ipv6.conf.all.disable_ipv6)",
            )
            .effect("Applications use IPv4 only."),
        ),
        _ => None,
    }
}

fn no_route(family: Family) -> Finding {
    Finding::note(
        "no-route",
        format!("the machine has no way to the internet over {family}"),
    )
    .effect(
        "Applications get 'Network is unreachable' before their packets could be diverted, even if the proxy \
         could reach the destination.",
    )
}

fn networkd(facts: &Facts) -> Option<Finding> {
    let system = &facts.system;
    (system.networkd == Ok(true) && system.networkd_removes_rules == Ok(true)).then(|| {
        Finding::warning(
            "networkd-rules",
            "systemd-networkd removes routing rules that it did not make, whenever it configures an interface",
        )
        .effect(
            "The helper puts its own back at once; what is to be diverted in that moment is dropped, and has to be sent again.",
        )
        .command(
            "sudo sh -c 'mkdir -p /etc/systemd/networkd.conf.d && printf \
             \"[Network]\\nManageForeignRoutingPolicyRules=no\\n\" > \
             /etc/systemd/networkd.conf.d/cgtproxy.conf'",
        )
        .command("sudo systemctl restart systemd-networkd")
    })
}

fn bridge(facts: &Facts) -> Option<Finding> {
    let gateways = facts.gateway.as_ref().map(|gateway| &gateway.bridges);
    // Of a bridge that the gateway names, another finding tells.
    let named = gateways.is_some_and(|bridges| !bridges.is_empty());
    (facts.network.bridge_filter && !named).then(|| {
        Finding::note(
            "bridge-filter",
            "br_netfilter has packets that a bridge carries pass the rules for routed packets \
             (net.bridge.bridge-nf-call-iptables), as Docker and Kubernetes want it",
        )
        .effect(
            "Your own applications are not affected: what is diverted comes in over lo. Containers and \
             virtual machines behind a bridge are no applications of yours; those behind a bridge that the \
             machine's 'gateway' names have no network.",
        )
    })
}
