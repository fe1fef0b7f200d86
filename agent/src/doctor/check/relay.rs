//! Does the relay run, and does it reach the proxies that it carries connections on to?

use cgtproxy_proto::relay::{GetStatus_Reply, UpstreamStatus};

use super::proxies::is_unreached;
use super::{OTHER_VERSION, count, other_version};
use crate::doctor::facts::Facts;
use crate::doctor::{Finding, Group};
use crate::text::printable;

/// Why the relay was not asked, where the configuration has a proxy for it.
pub(super) const UNASKED: &str =
    "only an agent that has the proxies of the configuration in force knows of it";

pub(super) fn check(facts: &Facts) -> Group {
    let mut group = Group::new("relay");
    let status = match &facts.relay {
        None => {
            match facts.relayed().is_empty() {
                true => group.summary = "nothing is carried on to other proxies".to_owned(),
                false => group.unseen.push(format!("the relay: {UNASKED}")),
            }
            return group;
        }
        Some(Err(why)) => {
            group.found([Finding::error(
                "relay-missing",
                format!("the relay is of no use: {why}"),
            )
            .effect("Connections to proxies under 'proxies' are refused; none goes direct.")
            .command("systemctl --user restart cgtproxy-relay.socket")]);
            return group;
        }
        Some(Ok(status)) => status,
    };
    group.summary = format!("runs, {}", count(status.upstreams.len(), "proxy"));
    let other = other_version(facts, "the relay", &status.version);
    group.found(other.map(|problem| {
        Finding::warning("relay-version", problem)
            .effect(OTHER_VERSION)
            .command("systemctl --user daemon-reload")
            .command("systemctl --user restart cgtproxy-relay.service")
    }));
    // What is known better already.
    let elsewhere = status
        .upstreams
        .iter()
        .filter(|upstream| !is_unreached(facts, &upstream.name));
    group.found(elsewhere.filter_map(down));
    group.found(full(status));
    group.found(status.upstreams.iter().filter_map(without_udp));
    group
}

fn down(upstream: &UpstreamStatus) -> Option<Finding> {
    let problem = upstream.problem.as_deref()?;
    Some(
        Finding::error(
            "upstream-down",
            format!(
                "the proxy '{}' could not be used when that was last tried: {}",
                upstream.name,
                printable(problem)
            ),
        )
        .effect(
            "Connections to it are reset, at once, or when their time is over; none goes direct.",
        )
        .advice(
            "start it, or correct 'upstream' in the configuration; the next connection finds out",
        ),
    )
}

/// All proxies share what there may be.
fn full(status: &GetStatus_Reply) -> Option<Finding> {
    let limit = status.limit;
    let sum = |of: fn(&UpstreamStatus) -> i64| {
        let each = status.upstreams.iter().map(of);
        each.fold(0, i64::saturating_add)
    };
    let (connections, flows) = (sum(|u| u.connections), sum(|u| u.flows));
    let what = match (connections >= limit, flows >= limit) {
        (false, false) => return None,
        (true, false) => "connections",
        (false, true) => "UDP flows",
        (true, true) => "connections and UDP flows",
    };
    Some(
        Finding::warning(
            "relay-full",
            format!("the relay has all the {limit} {what} that there may be"),
        )
        .effect("Further connections are reset, and further datagrams lost.")
        .advice(
            "end what has so many, or raise --connections in a drop-in of cgtproxy-relay.service",
        )
        .command("systemctl --user edit cgtproxy-relay.service"),
    )
}

fn without_udp(upstream: &UpstreamStatus) -> Option<Finding> {
    let problem = upstream.udpProblem.as_deref()?;
    Some(
        Finding::note(
            "upstream-no-udp",
            format!(
                "the proxy '{}' carries no UDP: {}",
                upstream.name,
                printable(problem)
            ),
        )
        .effect("What applications send by UDP is lost, QUIC among it; most go on by TCP.")
        .advice("'no-udp: true' sends UDP direct instead"),
    )
}
