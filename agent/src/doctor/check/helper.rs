//! Is there a helper, and does it serve this user?

use std::path::Path;

use cgtproxy_proto::HELPER_SOCKET;

use crate::doctor::facts::{Facts, Helper};
use crate::doctor::{Finding, Group};

const NOTHING_IN_FORCE: &str =
    "No rule of yours can be put into force: everything goes direct, or as the system policy says.";
const START: &str = "sudo systemctl enable --now cgtproxy-helper.socket";

pub(super) fn check(facts: &Facts) -> Group {
    let mut group = Group::new("helper");
    let socket = facts.helper_socket.display();
    let found = match &facts.helper {
        Helper::Missing if facts.agent_is_connected() && is_default(facts) => Some(
            Finding::error(
                "helper-missing",
                format!("the socket {socket} is gone, although cgtproxy-helper runs"),
            )
            .effect(
                "What is in force stays so, but whoever is not connected yet can have nothing brought into force. The \
                 command takes all of it away, until the agents are back: meanwhile everything goes direct.",
            )
            .command("sudo systemctl restart cgtproxy-helper.socket"),
        ),
        Helper::Missing => Some(
            Finding::error(
                "helper-missing",
                format!("there is no socket {socket}: cgtproxy-helper is not installed or not started"),
            )
            .command(START),
        ),
        Helper::Dead => Some(
            Finding::error(
                "helper-dead",
                format!("nobody listens on the socket {socket}: cgtproxy-helper was stopped or has failed"),
            )
            .advice("'journalctl -u cgtproxy-helper' says why")
            .command("sudo systemctl restart cgtproxy-helper.socket"),
        ),
        Helper::Forbidden { in_sight: false } => Some(
            Finding::error(
                "helper-forbidden",
                format!("you may not get to the socket {socket}; everybody may, as it is installed"),
            )
            .advice("the mode of a directory on the way keeps you out: each needs 'x' for others")
            .command(format!("namei -l {socket}")),
        ),
        Helper::Forbidden { in_sight: true } => Some(
            Finding::error(
                "helper-forbidden",
                format!("you may not open the socket {socket}; everybody may, as it is installed"),
            )
            // To restart the socket would take every user's policy away for a moment.
            .command(format!("sudo chmod 666 {socket}")),
        ),
        Helper::Unreachable(why) => Some(
            Finding::error(
                "helper-unreachable",
                format!("the helper at {socket} can't be asked: {why}"),
            )
            .advice("'journalctl -u cgtproxy-helper' may say more")
            .command("sudo systemctl restart cgtproxy-helper.service"),
        ),
        Helper::Refuses(name, text) => Some(refused(name, text)),
        Helper::Answers(status, _) => {
            group.summary = format!("answers, version {}", status.version);
            (status.version != facts.version).then(|| {
                Finding::warning(
                    "helper-version",
                    format!(
                        "the helper that runs has version {}, this program {}",
                        status.version, facts.version
                    ),
                )
                .effect("What one of them knows the other may not.")
                .command("sudo systemctl try-restart cgtproxy-helper.service")
            })
        }
    };
    group.found(found);
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

/// Whether it is the socket that the agents that run are connected to.
fn is_default(facts: &Facts) -> bool {
    facts.helper_socket == Path::new(HELPER_SOCKET)
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
