//! `cgtproxy-agent status`

use std::io::{self, Write};
use std::process::ExitCode;

use cgtproxy_proto::agent::{ControlGroup, GetStatus_Reply, Rule, Target};
use cgtproxy_proto::relay::GetStatus_Reply as RelayStatus;
use serde::Serialize;
use serde_json::{Value, json};

use super::Error;
use super::client::Agent;
use super::table::{dash, table};
use crate::cli::Arguments;
use crate::otherwise::{self, Otherwise, SYSTEM_POLICY, is_enforced};
use crate::relay;
use crate::text::printable;
use crate::view;

/// What both say, for programs.
#[derive(Serialize)]
struct WithRelay<'a> {
    #[serde(flatten)]
    agent: &'a GetStatus_Reply,
    /// Whether root has a policy for the machine besides; none if nobody can tell.
    #[serde(rename = "systemPolicy")]
    system_policy: Option<bool>,
    /// Of those who have one: its own answer, or why there is none.
    relay: Option<Value>,
}

/// Asks the agent, and the relay if there is one, and prints what they say.
pub(super) fn run(arguments: &Arguments, json: bool) -> Result<ExitCode, Error> {
    let mut status = Agent::connect(arguments.scope())?.status(arguments)?;
    ports(&mut status);
    let otherwise = super::otherwise(arguments, Some(&status))?;
    let relay = match relay::is_to_be_asked(&status) {
        true => Some(relay_status()?),
        false => None,
    };
    let mut out = io::BufWriter::new(io::stdout().lock());
    if json {
        let relay = relay.map(|status| match status {
            Ok(status) => json!(status),
            Err(why) => json!({ "problem": why }),
        });
        let all = WithRelay {
            agent: &status,
            system_policy: otherwise.system_policy(),
            relay,
        };
        serde_json::to_writer_pretty(&mut out, &all).map_err(io::Error::from)?;
        writeln!(out)?;
    } else {
        print(&mut out, &status, &otherwise)?;
        if let Some(relay) = relay {
            print_relay(&mut out, relay.as_ref())?;
        }
    }
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}

/// Leaves out the ports that the relay has not told yet.
fn ports(status: &mut GetStatus_Reply) {
    for target in &mut status.targets {
        target.port = target.port.filter(|&port| port != 0);
    }
}

/// What the relay says of its proxies, or why it says nothing.
fn relay_status() -> Result<Result<RelayStatus, String>, Error> {
    Ok(super::runtime()?.block_on(relay::status(&relay::default_socket())))
}

fn print_relay(out: &mut impl Write, status: Result<&RelayStatus, &String>) -> io::Result<()> {
    writeln!(out)?;
    let status = match status {
        Ok(status) => status,
        Err(why) => return writeln!(out, "Relay:  {}", printable(why)),
    };
    table(
        out,
        &["RELAYED TO", "TCP", "UDP", "PROBLEM"],
        status.upstreams.iter().map(|upstream| {
            let problem = upstream.problem.as_deref().map(printable);
            let udp = || {
                Some(format!(
                    "no UDP: {}",
                    printable(upstream.udpProblem.as_deref()?)
                ))
            };
            [
                printable(&upstream.name),
                upstream.connections.to_string(),
                upstream.flows.to_string(),
                problem.or_else(udp).unwrap_or_else(dash),
            ]
        }),
    )
}

fn print(out: &mut impl Write, status: &GetStatus_Reply, otherwise: &Otherwise) -> io::Result<()> {
    let problem = status.problem.as_deref().map(printable);
    match (status.connected, problem) {
        (true, None) => writeln!(out, "Helper:         connected")?,
        (true, Some(problem)) => writeln!(out, "Helper:         connected, but {problem}")?,
        (false, problem) => writeln!(
            out,
            "Helper:         not connected: {}",
            problem.unwrap_or_default()
        )?,
    }
    writeln!(out, "Generation:     {}", status.generation)?;
    let config = status.config.as_deref();
    let none = || format!("none, {}", otherwise.without_file());
    let config = config.map_or_else(none, printable);
    writeln!(out, "Configuration:  {config}")?;
    if let Some(error) = &status.configError {
        writeln!(out, "  not in force: {}", printable(error))?;
    }
    if otherwise.waits() {
        writeln!(out, "  {}", otherwise.idle())?;
    } else if !status.connected
        && let Some(left) = otherwise.left()
    {
        writeln!(out, "  {left}")?;
    }
    if let Some(monitors) = &status.monitors {
        let by = match monitors.is_empty() {
            true => "none".to_owned(),
            false => printable(&monitors.join(", ")),
        };
        writeln!(out, "Monitor:        {by}")?;
    }
    if let Some(problem) = &status.monitorProblem {
        writeln!(out, "  degraded: {}", printable(problem))?;
    }
    writeln!(out)?;
    table(
        out,
        &["TARGET", "PORT", "CONTROL GROUPS"],
        targets(status, otherwise).into_iter(),
    )?;
    writeln!(out)?;
    table(
        out,
        &["TARGET", "BY", "IN FORCE", "CONTROL GROUP"],
        status.controlGroups.iter().map(|group| {
            [
                printable(otherwise.target(group)),
                by(group, rule(status, group)),
                in_force(group),
                printable(&group.path),
            ]
        }),
    )?;
    let mut groups = status.controlGroups.iter();
    if groups.any(|group| otherwise.yields(group, rule(status, group))) {
        writeln!(out, "\n{}", otherwise::note())?;
    }
    Ok(())
}

/// The rows of the targets, with what is left to the system policy as one of them.
fn targets(status: &GetStatus_Reply, otherwise: &Otherwise) -> Vec<[String; 3]> {
    let groups = &status.controlGroups;
    let count = |name: &str| {
        let shown = groups.iter().filter(|g| otherwise.target(g) == name);
        shown.count()
    };
    let row = |name: &str, port| [printable(name), port, count(name).to_string()];
    let known = status.targets.iter().map(|t| row(&t.name, port(t)));
    let system = (count(SYSTEM_POLICY) > 0).then(|| row(SYSTEM_POLICY, dash()));
    known.chain(system).collect()
}

/// The rule that gives a control group its verdict.
fn rule<'s>(status: &'s GetStatus_Reply, group: &ControlGroup) -> Option<&'s Rule> {
    status.rules.as_ref()?.get(view::rule_index(group)?)
}

/// Where a proxy listens. Of what is relayed that is a port of the relay's, which says nothing to anybody.
fn port(target: &Target) -> String {
    match target.relayed {
        Some(true) => "relay".to_owned(),
        _ => target.port.map_or_else(dash, |port| port.to_string()),
    }
}

/// What gives a control group its verdict, in a word.
fn by(group: &ControlGroup, rule: Option<&Rule>) -> String {
    let what = match (group.execSlice, group.rule) {
        (true, _) => "cgtproxy-exec".to_owned(),
        (false, Some(number)) => format!("rule {number}"),
        (false, None) if group.relay == Some(true) => "the relay".to_owned(),
        (false, None) => return dash(),
    };
    match (is_enforced(rule), &group.inheritedFrom) {
        (true, Some(_)) => format!("{what} (enforced, inherited)"),
        (true, None) => format!("{what} (enforced)"),
        (false, Some(_)) => format!("{what} (inherited)"),
        (false, None) => what,
    }
}

fn in_force(group: &ControlGroup) -> String {
    match (&group.skipped, group.inForce) {
        (Some(reason), _) => format!("no: {}", view::named_sentence(reason)),
        (None, true) => "yes".to_owned(),
        (None, false) => "no".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Scope;

    #[test]
    fn shows_names_of_others_harmlessly_and_in_columns() {
        let group = |path: &str, rule, inherited: Option<&str>| ControlGroup {
            path: path.into(),
            target: "mihomo".into(),
            rule,
            inheritedFrom: inherited.map(Into::into),
            execSlice: false,
            inForce: true,
            skipped: None,
            relay: None,
        };
        let mut status = GetStatus_Reply {
            version: "1".into(),
            connected: true,
            problem: None,
            awaits: None,
            generation: 3,
            config: None,
            configError: None,
            monitors: Some(vec!["inotify".into(), "dbus".into()]),
            monitorProblem: Some("no watches".into()),
            targets: vec![Target {
                name: "mihomo".into(),
                port: Some(7893),
                relayed: None,
                controlGroups: 2,
            }],
            controlGroups: vec![
                group("/a\x1b[2J", Some(1), None),
                group("/a/b", Some(1), Some("/a")),
            ],
            rules: None,
        };
        let otherwise = Otherwise::knowing(Scope::User, false);
        let shown = |status: &GetStatus_Reply| {
            let mut out = Vec::new();
            print(&mut out, status, &otherwise).unwrap();
            String::from_utf8(out).unwrap()
        };
        assert_eq!(
            shown(&status),
            "Helper:         connected\n\
             Generation:     3\n\
             Configuration:  none, everything goes direct, unless cgtproxy-exec says otherwise\n\
             Monitor:        inotify, dbus\n\
             \x20 degraded: no watches\n\
             \n\
             TARGET  PORT  CONTROL GROUPS\n\
             mihomo  7893  2\n\
             \n\
             TARGET  BY                  IN FORCE  CONTROL GROUP\n\
             mihomo  rule 1              yes       /a\\u{1b}[2J\n\
             mihomo  rule 1 (inherited)  yes       /a/b\n"
        );
        status.connected = false;
        status.configError = Some("c.yaml:1:1: error: wrong".into());
        status.problem = Some("waiting for it to be fixed".into());
        let text = shown(&status);
        assert!(
            text.starts_with("Helper:         not connected: waiting for it to be fixed\n"),
            "{text}"
        );
        assert_eq!(text.matches("c.yaml:1:1").count(), 1, "{text}");
        status.targets.clear();
        status.controlGroups[0].skipped = Some("notOwned".into());
        let text = shown(&status);
        assert!(
            text.contains("none, everything goes direct, unless cgtproxy-exec says otherwise\n")
        );
        // The port is one of the relay's own, and not that of the proxy.
        status.targets.push(Target {
            name: "there".into(),
            port: Some(56005),
            relayed: Some(true),
            controlGroups: 0,
        });
        let text = shown(&status);
        assert!(text.contains("there   relay  0\n"), "{text}");
        assert!(text.contains("no: it belongs to root"), "{text}");
    }

    #[test]
    fn what_users_decide_before_the_system_policy_is_not_said_to_hold() {
        let group = |path: &str, rule| ControlGroup {
            path: path.into(),
            target: "drop".into(),
            rule: Some(rule),
            inheritedFrom: None,
            execSlice: false,
            inForce: true,
            skipped: None,
            relay: None,
        };
        let rule = |enforce| Rule {
            selector: "app: a".into(),
            target: "drop".into(),
            line: None,
            enforce,
        };
        let base = "/user.slice/user-5.slice/user@5.service";
        let status = |groups| GetStatus_Reply {
            version: "1".into(),
            connected: true,
            problem: None,
            awaits: None,
            generation: 3,
            config: None,
            configError: None,
            monitors: None,
            monitorProblem: None,
            targets: Vec::new(),
            controlGroups: groups,
            rules: Some(vec![rule(None), rule(Some(true))]),
        };
        let shown = |scope, groups| {
            let mut out = Vec::new();
            print(&mut out, &status(groups), &Otherwise::knowing(scope, true)).unwrap();
            String::from_utf8(out).unwrap()
        };
        let (app, service) = (format!("{base}/a.scope"), "/system.slice/a.service");
        let note = otherwise::note();
        let text = shown(Scope::System, vec![group(&app, 1), group(&app, 2)]);
        assert!(text.contains("drop    rule 2 (enforced)  yes"), "{text}");
        assert!(text.contains("drop    rule 1             yes"), "{text}");
        assert!(text.ends_with(&format!("\n\n{note}\n")), "{text}");
        for (scope, groups) in [
            (Scope::System, vec![group(&app, 2), group(service, 1)]),
            (Scope::User, vec![group(&app, 1)]),
        ] {
            let text = shown(scope, groups);
            assert!(!text.contains(&note), "{text}");
        }
    }
}
