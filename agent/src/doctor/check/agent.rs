//! Is the agent running, with the configuration that is on disk?

use super::count;
use crate::doctor::facts::{Agent, ConfigFile, Facts};
use crate::doctor::{Finding, Group};

const RESTART: &str = "systemctl --user restart cgtproxy-agent";

pub(super) fn check(facts: &Facts) -> Group {
    let mut group = Group::new("agent");
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
    let status = match &facts.agent {
        Agent::NotRunning => {
            return Some(
                Finding::error("agent-not-running", "cgtproxy-agent is not running")
                    .effect("Everything of yours goes direct.")
                    .command("systemctl --user enable --now cgtproxy-agent"),
            );
        }
        Agent::Unreachable(why) => {
            return Some(
                Finding::error(
                    "agent-unreachable",
                    format!("cgtproxy-agent can't be asked: {why}"),
                )
                .effect("cgtproxy-exec and 'cgtproxy-agent status' don't work.")
                .command(RESTART),
            );
        }
        Agent::Answers(status) => status,
    };
    match (status.connected, &status.problem) {
        (true, None) if status.version != facts.version => Some(
            Finding::warning(
                "agent-version",
                format!(
                    "the agent that runs has version {}, this program {}",
                    status.version, facts.version
                ),
            )
            .effect("What one of them knows the other may not.")
            .command(RESTART),
        ),
        (true, None) => None,
        (true, Some(problem)) => Some(
            Finding::error(
                "agent-refused",
                format!("the helper refuses a part of your policy: {problem}"),
            )
            .effect("What it refuses has the verdict that it had before.")
            .command(RESTART),
        ),
        (false, problem) => Some(
            Finding::error(
                "agent-disconnected",
                format!(
                    "the agent is not connected to the helper: {}",
                    problem.as_deref().unwrap_or("it is about to try")
                ),
            )
            .effect("None of your rules is in force.")
            .command(RESTART),
        ),
    }
}

fn configuration(facts: &Facts) -> Option<Finding> {
    let file = facts.config_file.display();
    if let Agent::Answers(status) = &facts.agent
        && let Some(error) = &status.configError
    {
        return Some(
            Finding::error(
                "config-not-in-force",
                format!("the configuration has a mistake: {error}"),
            )
            .effect("The configuration that was there before it is still in force.")
            .advice("'cgtproxy-agent check' lists all that is wrong with the file")
            .command("cgtproxy-agent check"),
        );
    }
    match &facts.config {
        ConfigFile::Wrong(why) => Some(
            Finding::error(
                "config-wrong",
                format!("the configuration is of no use: {why}"),
            )
            .effect("The agent does not start with it.")
            .advice("'cgtproxy-agent check' lists all that is wrong with the file")
            .command("cgtproxy-agent check"),
        ),
        ConfigFile::Missing => Some(
            Finding::note("config-missing", format!("there is no file {file}"))
                .effect("Everything goes direct, but for what cgtproxy-exec drops.")
                .advice("write one: docs/configuration.md"),
        ),
        ConfigFile::Read(_) => None,
    }
}
