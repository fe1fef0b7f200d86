//! Is the agent running, with the configuration that is on disk?

use cgtproxy_proto::agent::{Awaited, GetStatus_Reply as AgentStatus};

use super::{OTHER_VERSION, count, other_version};
use crate::config::Scope;
use crate::doctor::facts::{Agent, ConfigState, Facts};
use crate::doctor::{Finding, Group};

/// The commands about the agent.
struct Words {
    enable: &'static str,
    restart: &'static str,
    /// What comes before it if the unit may be another than the manager knows.
    new_unit: Option<&'static str>,
    reload: &'static str,
    /// What it means that it can't be asked.
    mute: &'static str,
}

fn words(scope: Scope) -> Words {
    match scope {
        Scope::User => Words {
            enable: "systemctl --user enable --now cgtproxy-agent",
            restart: "systemctl --user restart cgtproxy-agent",
            new_unit: Some("systemctl --user daemon-reload"),
            reload: "systemctl --user reload cgtproxy-agent",
            mute: "cgtproxy-exec and 'cgtproxy-agent status' don't work.",
        },
        Scope::System => Words {
            enable: "systemctl enable --now cgtproxy-agent-system",
            restart: "systemctl restart cgtproxy-agent-system",
            // Packages have told the system's manager.
            new_unit: None,
            reload: "systemctl reload cgtproxy-agent-system",
            mute: "'cgtproxy-agent --system status' does not work.",
        },
    }
}

pub(super) fn check(facts: &Facts) -> Group {
    let mut group = Group::new("agent");
    if matches!(facts.agent, Agent::Roots) {
        group.unseen.push(format!(
            "{}: only root may ask it, with 'sudo {}'",
            facts.scope.agent(),
            facts.command("doctor")
        ));
    }
    group.found(running(facts));
    group.found(configuration(facts));
    if let Agent::Answers(status) = &facts.agent {
        let targets = status.targets.len();
        let groups = status.controlGroups.len();
        group.summary = format!(
            "in force, {}, {}",
            count(targets, "target"),
            count(groups, "control group")
        );
    }
    group
}

fn running(facts: &Facts) -> Option<Finding> {
    let words = words(facts.scope);
    let agent = facts.scope.agent();
    match &facts.agent {
        // As where somebody has emptied $XDG_RUNTIME_DIR, or has another one.
        Agent::NotRunning if facts.otherwise().is_connected() => Some(
            unreachable(
                facts,
                format!("nobody listens on the socket of {agent}, which runs"),
            )
            .advice("set XDG_RUNTIME_DIR as the agent has it, or restart the agent")
            .command(words.restart),
        ),
        Agent::NotRunning => Some(
            Finding::error("agent-not-running", format!("{agent} is not running"))
                .effect(facts.otherwise().idle())
                .command(words.enable),
        ),
        // That is no fault of the agent's.
        Agent::Roots => None,
        Agent::Unreachable(why) => Some(
            unreachable(facts, format!("{agent} can't be asked: {why}")).command(words.restart),
        ),
        Agent::Full(limit) => Some(
            unreachable(
                facts,
                format!("{agent} serves no more than {limit} programs at once"),
            )
            // A restart would not end them.
            .advice("end programs that keep connections to its socket open"),
        ),
        Agent::Answers(status) => in_force(facts, status),
    }
}

/// The agent runs, and does not answer.
fn unreachable(facts: &Facts, what: String) -> Finding {
    Finding::error("agent-unreachable", what).effect(words(facts.scope).mute)
}

/// Is all that an agent has in force, by what it answers?
fn in_force(facts: &Facts, status: &AgentStatus) -> Option<Finding> {
    let words = words(facts.scope);
    match (status.connected, &status.problem) {
        (true, None) => {
            let problem = other_version(facts, "the agent", &status.version)?;
            let finding = Finding::warning("agent-version", problem).effect(OTHER_VERSION);
            let commands = words.new_unit.into_iter().chain([words.restart]);
            Some(commands.fold(finding, Finding::command))
        }
        (true, Some(problem)) => Some(
            Finding::error(
                "agent-refused",
                format!("the helper refuses a part of your policy: {problem}"),
            )
            .effect("What it refuses has the verdict that it had before.")
            // A restarted agent would send its whole policy at once, and all of it would be refused.
            .advice("the agent says it again by itself, and it is in force once the helper has room for it"),
        ),
        // That is what is said of the configuration.
        (false, _) if status.awaits == Some(Awaited::configuration) => None,
        (false, problem) => Some(
            Finding::error(
                "agent-disconnected",
                format!(
                    "the agent is not connected to the helper: {}",
                    problem.as_deref().unwrap_or("it is about to try")
                ),
            )
            .effect(
                facts
                    .otherwise()
                    .left()
                    .unwrap_or("None of your rules is in force."),
            )
            // A restarted agent would get the same answer.
            .advice("when that is fixed, the agent connects by itself within seconds"),
        ),
    }
}

fn configuration(facts: &Facts) -> Option<Finding> {
    let file = facts.config_file.display();
    let check = facts.file_command("check");
    if let Agent::Answers(status) = &facts.agent
        && let Some(error) = &status.configError
    {
        let effect = match status.connected {
            true => "The configuration that was there before it is still in force.".to_owned(),
            false if status.awaits == Some(Awaited::configuration) => format!(
                "The agent waits for the file to be fixed. {}",
                facts.otherwise().idle()
            ),
            false => "The agent keeps to the configuration that was there before it.".to_owned(),
        };
        return Some(match &facts.config {
            ConfigState::Read(_) => {
                Finding::error("config-not-in-force", format!("the configuration is not in force: {error}"))
                    .effect(effect)
                    .advice(
                        "the file has no mistake: when what stands in its way is fixed, have the agent load it again",
                    )
                    .command(words(facts.scope).reload)
            }
            ConfigState::Missing => {
                Finding::error("config-not-in-force", format!("the configuration was removed: {error}"))
                    .effect(match status.connected {
                        true => "What it said is still in force.".to_owned(),
                        false => effect,
                    })
                    .advice("put it back, or restart the agent to go without")
                    .command(words(facts.scope).restart)
            }
            ConfigState::Wrong(_) => Finding::error("config-not-in-force", format!("the configuration has a mistake: {error}"))
                .effect(effect)
                .advice(format!("'{check}' lists all that is wrong with the file"))
                .command(check),
        });
    }
    match &facts.config {
        ConfigState::Wrong(why) => Some(
            Finding::error(
                "config-wrong",
                format!("the configuration is of no use: {why}"),
            )
            .effect("An agent that starts with it waits for it to be fixed.")
            .advice(format!("'{check}' lists all that is wrong with the file"))
            .command(check),
        ),
        ConfigState::Missing => Some(
            Finding::note("config-missing", format!("there is no file {file}"))
                .effect(match facts.scope {
                    Scope::User => {
                        format!("Without it, {}.", facts.otherwise().without_file())
                    }
                    Scope::System => facts.otherwise().idle(),
                })
                .advice("write one: see cgtproxy.yaml(5)"),
        ),
        ConfigState::Read(_) => None,
    }
}
