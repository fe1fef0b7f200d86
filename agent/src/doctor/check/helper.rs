//! Is there a helper, and does it serve this user?

use std::path::Path;

use cgtproxy_proto::HELPER_SOCKET;

use super::{OTHER_VERSION, other_version};
use crate::doctor::facts::{Facts, Helper};
use crate::doctor::{Finding, Group};

const NOTHING_IN_FORCE: &str =
    "No rule of yours can be put into force: everything goes direct, or as the system policy says.";

pub(super) fn check(facts: &Facts) -> Group {
    let mut group = Group::new("helper");
    if let Helper::Answers(status, _) = &facts.helper {
        group.summary = format!("answers, version {}", status.version);
    }
    group.found(answer(facts));
    group.see("cgtproxy.service", &facts.system.original);
    group.found((facts.system.original == Ok(true)).then(|| {
        Finding::error(
            "original-runs",
            "cgtproxy.service runs, the daemon of the original cgtproxy",
        )
        .effect("It and the helper use the same nftables table, which each of them takes away from the other.")
        .advice("its configuration loads here as it is: see 'migrate' in cgtproxy-agent(1)")
        .command("sudo systemctl disable --now cgtproxy.service")
    }));
    for finding in &mut group.findings {
        if finding.effect.is_empty() {
            finding.effect = NOTHING_IN_FORCE.to_owned();
        }
    }
    group
}

/// What is wrong with the helper's answer, or why there is none.
fn answer(facts: &Facts) -> Option<Finding> {
    let socket = facts.helper_socket.display();
    Some(match &facts.helper {
        Helper::Answers(status, _) => {
            let problem = other_version(facts, "the helper", &status.version)?;
            Finding::warning("helper-version", problem)
                .effect(OTHER_VERSION)
                .command("sudo systemctl try-restart cgtproxy-helper.service")
        }
        Helper::Refuses(name, text) => refused(name, text),
        Helper::Missing => missing(facts),
        Helper::Dead => Finding::error(
            "helper-dead",
            format!(
                "nobody listens on the socket {socket}: cgtproxy-helper was stopped or has failed"
            ),
        )
        .advice("'journalctl -u cgtproxy-helper' says why")
        .command("sudo systemctl restart cgtproxy-helper.socket"),
        Helper::Forbidden { in_sight: false } => Finding::error(
            "helper-forbidden",
            format!("you may not get to the socket {socket}; everybody may, as it is installed"),
        )
        .advice("the mode of a directory on the way keeps you out: each needs 'x' for others")
        .command(format!("namei -l {socket}")),
        Helper::Forbidden { in_sight: true } => Finding::error(
            "helper-forbidden",
            format!("you may not open the socket {socket}; everybody may, as it is installed"),
        )
        // To restart the socket would take every user's policy away for a moment.
        .command(format!("sudo chmod 666 {socket}")),
        Helper::Unreachable(why) => Finding::error(
            "helper-unreachable",
            format!("the helper at {socket} can't be asked: {why}"),
        )
        .advice("'journalctl -u cgtproxy-helper' may say more")
        .command("sudo systemctl restart cgtproxy-helper.service"),
    })
}

/// There is no socket.
fn missing(facts: &Facts) -> Finding {
    let socket = facts.helper_socket.display();
    if facts.manager.in_container {
        return Finding::error(
            "helper-missing",
            format!("there is no socket {socket} to be seen from here, as in a container"),
        )
        .advice("run it outside of the container");
    }
    // It is the socket that the agents that run are connected to.
    let is_default = facts.helper_socket == Path::new(HELPER_SOCKET);
    if facts.agent_is_connected() && is_default {
        return Finding::error(
            "helper-missing",
            format!("the socket {socket} is gone, although cgtproxy-helper runs"),
        )
        .effect(
            "What is in force stays so, but whoever is not connected yet can have nothing brought into force. The \
             command takes all of it away, until the agents are back: meanwhile everything goes direct.",
        )
        .command("sudo systemctl restart cgtproxy-helper.socket");
    }
    Finding::error(
        "helper-missing",
        format!("there is no socket {socket}: cgtproxy-helper is not installed or not started"),
    )
    .command("sudo systemctl enable --now cgtproxy-helper.socket")
}

/// The helper is there and does not want this user.
fn refused(name: &str, text: &str) -> Finding {
    let finding = Finding::error(
        "helper-refuses",
        format!("the helper does not serve you: {text}"),
    );
    match name.rsplit('.').next() {
        Some("TooManyConnections") => finding
            .advice(
                "end programs of yours that are connected to it, or have the administrator raise \
                 limits.connections in /etc/cgtproxy/helper.yaml and restart the helper",
            )
            .command("sudo systemctl restart cgtproxy-helper.service"),
        _ => finding.advice(
            "the administrator says in /etc/cgtproxy/helper.yaml who may use it and how much",
        ),
    }
}
