//! `cgtproxy-agent doctor`, which is `check permission` too.

use std::io;
use std::process::ExitCode;

use super::Error;
use crate::cli::Arguments;
use crate::doctor::facts::{self, Agent, Facts};
use crate::doctor::{Severity, check, report};
use crate::relay;
use crate::server;

/// Looks at everything and prints what was found.
pub(super) fn run(arguments: &Arguments, json: bool) -> Result<ExitCode, Error> {
    let facts = gather(arguments)?;
    let groups = check::all(&facts);
    let mut text = String::new();
    if json {
        let value = report::json(&groups, facts.version);
        text = serde_json::to_string_pretty(&value).map_err(io::Error::from)?;
        text.push('\n');
    } else {
        // Writing to a string does not fail.
        let _ = report::render(&mut text, &groups, super::colours());
    }
    super::print(text.as_bytes())?;
    Ok(match report::count(&groups, Severity::Error) {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

fn gather(arguments: &Arguments) -> Result<Facts, Error> {
    // Without control groups of version 2 there is no subtree, and that is what is to be said then.
    let hierarchy = facts::hierarchy(arguments.cgroup_root.as_deref());
    let subtree = match super::own_subtree(arguments) {
        Err(Error::NoRoot(_)) => super::usual_subtree(arguments)?,
        subtree => subtree?,
    };
    let file = super::config_file(arguments)?;
    let (config, gateway) = facts::read_config(&file);
    let agent_socket = server::default_socket(arguments.scope());
    let (helper, agent, relay) = super::runtime()?.block_on(async {
        let (helper, agent) = tokio::join!(
            facts::ask_helper(&arguments.socket),
            facts::ask_agent(&agent_socket, arguments.scope())
        );
        let relayed = match &agent {
            Agent::Answers(status) => relay::is_to_be_asked(status),
            _ => false,
        };
        let relay = match relayed {
            true => Some(relay::status(&relay::default_socket()).await),
            false => None,
        };
        (helper, agent, relay)
    });
    let uid = rustix::process::getuid().as_raw();
    Ok(Facts {
        scope: arguments.scope(),
        uid,
        version: env!("CARGO_PKG_VERSION"),
        helper_socket: arguments.socket.clone(),
        helper,
        agent,
        relay,
        config,
        config_file: file.path,
        config_named: file.explicit,
        gateway: gateway.as_ref().map(facts::gateway),
        hierarchy,
        manager: facts::manager(&subtree),
        session: facts::session(&subtree),
        inotify: facts::inotify(),
        listeners: facts::listeners(),
        rules: facts::rules(),
        routing_tables: facts::routing_tables(),
        network: facts::network(),
        system: facts::system(subtree.root()),
    })
}
