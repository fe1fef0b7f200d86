//! Every check, with facts of a machine on which nothing is wrong and with each thing that can be.

mod cases;
mod machine;

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use cgtproxy_proto::HELPER_SOCKET;
use cgtproxy_proto::agent::Awaited;
use cgtproxy_proto::helper::{GetStatus_Reply_session, MarkWriter};

use super::all;
use crate::config::Scope;
use crate::doctor::facts::*;
use crate::doctor::{Finding, Group, Severity, report};
use cases::{BROKEN, HARMLESS};
use machine::{
    MANAGER, agent, fine, gateway, helper, helper_status, listeners, relay, relayed, relayed_here,
    send_the_proxy_through_itself,
};

fn ids(facts: &Facts) -> Vec<&'static str> {
    let groups = all(facts);
    groups
        .iter()
        .flat_map(|g| &g.findings)
        .map(|f| f.id)
        .collect()
}

#[test]
fn nothing_is_wrong_with_a_machine_that_is_fine() {
    let groups = all(&fine());
    for group in &groups {
        assert_eq!(group.findings, [], "{}", group.name);
        assert_eq!(group.unseen, Vec::<String>::new(), "{}", group.name);
    }
    let mut text = String::new();
    report::render(&mut text, &groups, false).unwrap();
    assert!(text.ends_with("\nnothing is wrong\n"), "{text}");
}

#[test]
fn what_is_wrong_is_found_and_said() {
    for (id, severity, wreck) in BROKEN {
        let mut facts = fine();
        wreck(&mut facts);
        let groups = all(&facts);
        let found = groups
            .iter()
            .flat_map(|g| &g.findings)
            .find(|f| f.id == *id);
        let found = found.unwrap_or_else(|| panic!("{id}: {:?}", ids(&facts)));
        assert_eq!(found.severity, *severity, "{id}");
        assert!(
            !found.problem.is_empty() && !found.effect.is_empty(),
            "{id}"
        );
        // Whoever is told of something that does not work is told how to mend it.
        if *severity != Severity::Note {
            assert!(found.advice.is_some() || !found.commands.is_empty(), "{id}");
        }
        let mut text = String::new();
        report::render(&mut text, &groups, false).unwrap();
        assert!(text.contains(&format!("[{id}]")), "{text}");
        assert!(!text.contains("nothing is wrong"), "{text}");
    }
}

#[test]
fn what_does_no_harm_is_not_found() {
    for (what, change) in HARMLESS {
        let mut facts = fine();
        change(&mut facts);
        assert_eq!(ids(&facts), Vec::<&str>::new(), "{what}");
    }
}

/// resolved asks the servers then, which nobody hijacks.
#[test]
fn link_local_servers_are_no_matter_where_programs_ask_resolved() {
    let mut facts = fine();
    facts.config = ConfigState::Read(vec![relayed(true)]);
    facts.system.resolv = Ok("nameserver fe80::1%wlan0\n".into());
    facts.system.nsswitch = Ok("hosts: resolve dns".into());
    assert_eq!(ids(&facts), ["nss-resolve"]);
}

#[test]
fn nobody_is_blamed_for_a_proxy_while_the_helper_can_not_be_asked_about_it() {
    let mut facts = fine();
    facts.helper = Helper::Unreachable("no answer".into());
    listeners(&mut facts)[0].uid = 991;
    assert_eq!(ids(&facts), ["helper-unreachable"]);
}

#[test]
fn what_could_not_be_looked_at_does_not_pass_for_good() {
    let mut facts = fine();
    facts.rules = Err("no rights".into());
    facts.listeners = Err("no rights".into());
    facts.system.nsswitch = Err("no rights".into());
    facts.helper = Helper::Answers(Box::new(helper_status()), Err("too old".into()));
    let groups = all(&facts);
    let mut text = String::new();
    report::render(&mut text, &groups, false).unwrap();
    for name in ["kernel", "routing", "marks", "proxies", "dns"] {
        let group = groups.iter().find(|group| group.name == name).unwrap();
        assert!(!group.unseen.is_empty(), "{name}");
        assert!(text.contains(&format!("unknown  {name}\n")), "{text}");
    }
    assert!(text.contains("could not be looked at: "), "{text}");
    assert!(
        text.ends_with("nothing is wrong with what could be looked at\n"),
        "{text}"
    );
    assert_eq!(report::count(&groups, Severity::Error), 0);
}

/// Nor does what would need something that is missing.
#[test]
fn a_relay_that_nobody_could_ask_does_not_pass_for_good() {
    let said = |facts: &Facts| {
        let groups = all(facts);
        let mut text = String::new();
        report::render(&mut text, &groups, false).unwrap();
        text
    };
    let mut facts = fine();
    facts.config = ConfigState::Read(vec![relayed(true)]);
    facts.agent = Agent::NotRunning;
    facts.relay = None;
    let text = said(&facts);
    assert!(text.contains("unknown  relay\n"), "{text}");
    assert!(text.contains("unknown  dns\n"), "{text}");
    facts.agent = fine().agent;
    facts.relay = Some(Err("no relay listens".into()));
    let text = said(&facts);
    assert!(text.contains("error    relay\n"), "{text}");
    assert!(text.contains("unknown  dns\n"), "{text}");
}

#[test]
fn what_is_wrong_has_no_summary_that_says_it_is_right() {
    for (id, _, wreck) in BROKEN {
        let mut facts = fine();
        wreck(&mut facts);
        for group in all(&facts) {
            let worst = group.findings.iter().map(|finding| finding.severity).max();
            let wrong = worst.is_some_and(|worst| worst > Severity::Note);
            assert!(!wrong || group.summary.is_empty(), "{id}: {group:?}");
        }
    }
}

#[test]
fn as_many_watches_are_advised_as_are_needed() {
    let mut facts = fine();
    let advised = |facts: &Facts| {
        let found = only(facts, super::control_groups::check);
        format!("{found:?}")
    };
    facts.inotify.as_mut().unwrap().watches = 60;
    assert!(advised(&facts).contains("max_user_watches=65536"));
    facts.manager.groups = Ok(vec![(1, format!("{MANAGER}/app-a.scope")); 70_000]);
    facts.inotify.as_mut().unwrap().watches = 70_000;
    assert!(advised(&facts).contains("max_user_watches=131072"));
}

#[test]
fn what_is_kept_of_an_agent_that_is_gone_does_not_pass_for_direct() {
    let mut facts = fine();
    facts.agent = Agent::NotRunning;
    let effect = |facts: &Facts| {
        let findings = super::agent::check(facts).findings;
        findings[0].effect.clone()
    };
    let status = &mut helper(&mut facts).0;
    (status.session, status.systemPolicy) = (GetStatus_Reply_session::none, Some(false));
    assert_eq!(effect(&facts), "Everything of yours goes direct.");
    helper(&mut facts).0.systemPolicy = Some(true);
    assert_eq!(
        effect(&facts),
        "Everything of yours goes as the system policy says."
    );
    helper(&mut facts).0.session = GetStatus_Reply_session::kept;
    assert!(effect(&facts).contains("still dropped"));
    // Nor while there is an agent that has nothing in force.
    facts.agent = fine().agent;
    let status = agent(&mut facts);
    (status.connected, status.problem) = (false, Some("no helper listens".into()));
    assert!(effect(&facts).contains("still dropped"));
    helper(&mut facts).0.session = GetStatus_Reply_session::none;
    assert_eq!(effect(&facts), "None of your rules is in force.");
}

#[test]
fn each_of_several_variables_is_0() {
    let mut facts = fine();
    let problem = |facts: &mut Facts, off: &[&str]| {
        gateway(facts).forwarding_off = Ok(off.iter().map(|&name| name.to_owned()).collect());
        only(facts, super::routing::check).problem
    };
    let (v4, v6) = ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding");
    assert!(problem(&mut facts, &[v4]).ends_with(": net.ipv4.ip_forward is 0"));
    assert!(problem(&mut facts, &[v4, v6]).ends_with(" and net.ipv6.conf.all.forwarding are 0"));
}

/// Whoever knows that nobody listens need not be told that the relay has found nobody.
#[test]
fn a_proxy_that_nobody_is_is_said_once() {
    let mut facts = fine();
    facts.config = ConfigState::Read(vec![relayed_here(Some(Ipv4Addr::LOCALHOST), None)]);
    relay(&mut facts).upstreams[0].problem = Some("Connection refused".into());
    assert_eq!(ids(&facts), ["upstream-down"]);
    // Nor that it has found somebody else; one user is said to be meant.
    for (uid, expected) in [(1001, "upstream-of-another"), (1002, "upstream-down")] {
        listeners(&mut facts)[0].uid = uid;
        assert_eq!(ids(&facts), [expected]);
    }
    listeners(&mut facts).clear();
    assert_eq!(ids(&facts), ["upstream-not-listening"]);
}

/// Each step has a time of its own: see docs/configuration.md.
#[test]
fn a_proxy_that_is_down_has_no_time_limit_that_is_another() {
    let mut facts = fine();
    relay(&mut facts).upstreams[0].problem = Some("Connection refused".into());
    let effect = only(&facts, super::relay::check).effect;
    assert!(!effect.contains("minute"), "{effect}");
    assert!(
        effect.contains("at once, or when their time is over"),
        "{effect}"
    );
}

/// The system's agent is well, and a restart would change nothing.
#[test]
fn nobody_but_root_is_told_to_mend_the_systems_agent() {
    let mut facts = fine();
    facts.scope = Scope::System;
    facts.agent = Agent::Roots;
    let group = super::agent::check(&facts);
    assert_eq!(group.findings, []);
    assert_eq!(
        group.unseen,
        [
            "the system's cgtproxy-agent: only root may ask it, with 'sudo cgtproxy-agent --system doctor'"
        ]
    );
    // cgtproxy-exec does not ask it.
    facts.agent = Agent::Unreachable("reset".into());
    let finding = only(&facts, super::agent::check);
    assert!(!finding.effect.contains("cgtproxy-exec"), "{finding:?}");
}

#[test]
fn commands_that_are_offered_can_be_pasted() {
    let mut facts = fine();
    send_the_proxy_through_itself(&mut facts);
    let path = format!(r"{MANAGER}/app.slice/app-clash\x2dmeta.service");
    agent(&mut facts).controlGroups[0].path = path.clone();
    facts.manager.groups = Ok(vec![(7, path)]);
    assert_eq!(
        only(&facts, super::proxies::check).commands,
        [r"cgtproxy-agent explain 'app-clash\x2dmeta.service'"]
    );
}

/// Whoever has lost it is not helped by what starts a program that does not run.
#[test]
fn a_socket_that_is_gone_is_told_from_a_program_that_does_not_run() {
    let mut facts = fine();
    facts.helper = Helper::Missing;
    let finding = only(&facts, super::helper::check);
    assert_eq!(
        finding.commands,
        ["sudo systemctl restart cgtproxy-helper.socket"]
    );
    let enable = "sudo systemctl enable --now cgtproxy-helper.socket";
    facts.helper_socket = "/run/other.sock".into();
    assert_eq!(only(&facts, super::helper::check).commands, [enable]);
    facts.helper_socket = HELPER_SOCKET.into();
    agent(&mut facts).connected = false;
    assert_eq!(only(&facts, super::helper::check).commands, [enable]);
    // Nor is anything wrong where it can't be seen.
    for connected in [true, false] {
        facts.manager.in_container = true;
        agent(&mut facts).connected = connected;
        let none: [&str; 0] = [];
        assert_eq!(only(&facts, super::helper::check).commands, none);
    }
    let mut facts = fine();
    facts.agent = Agent::NotRunning;
    let finding = only(&facts, super::agent::check);
    assert_eq!(
        finding.commands,
        ["systemctl --user restart cgtproxy-agent"]
    );
}

/// The one finding of a check.
fn only(facts: &Facts, check: fn(&Facts) -> Group) -> Finding {
    let findings = check(facts).findings;
    assert_eq!(findings.len(), 1, "{findings:?}");
    findings[0].clone()
}

#[test]
fn nobody_is_told_to_restart_an_agent_that_would_have_it_no_better() {
    let mut facts = fine();
    agent(&mut facts).problem = Some("too many control groups".into());
    let refused = only(&facts, super::agent::check);
    assert_eq!((refused.id, refused.commands.len()), ("agent-refused", 0));
    agent(&mut facts).connected = false;
    let finding = only(&facts, super::agent::check);
    assert_eq!(
        (finding.id, finding.commands.len()),
        ("agent-disconnected", 0)
    );
}

/// A user's manager that nobody has told goes on with the units that it has read.
#[test]
fn what_is_restarted_after_an_upgrade_has_its_new_unit() {
    let mut facts = fine();
    agent(&mut facts).version = "0".into();
    relay(&mut facts).version = "0".into();
    for (check, unit) in [
        (super::agent::check as fn(&Facts) -> Group, "cgtproxy-agent"),
        (super::relay::check, "cgtproxy-relay.service"),
    ] {
        let restart = format!("systemctl --user restart {unit}");
        assert_eq!(
            only(&facts, check).commands,
            ["systemctl --user daemon-reload", &restart]
        );
    }
    // A package has told the system's.
    facts.scope = Scope::System;
    let commands = only(&facts, super::agent::check).commands;
    assert_eq!(commands, ["systemctl restart cgtproxy-agent-system"]);
}

#[test]
fn what_the_helper_refuses_is_no_mistake_in_the_file() {
    let mut facts = fine();
    agent(&mut facts).configError = Some("no more than 3 proxies".into());
    let refused = only(&facts, super::agent::check);
    assert_eq!(refused.id, "config-not-in-force");
    assert!(!refused.problem.contains("mistake"), "{refused:?}");
    let advice = refused.advice.unwrap();
    assert!(advice.contains("the file has no mistake"), "{advice}");
    assert!(
        refused.commands[0].contains("reload"),
        "{:?}",
        refused.commands
    );

    facts.config = ConfigState::Wrong("c:1:1".into());
    let wrong = only(&facts, super::agent::check);
    assert!(wrong.problem.contains("mistake"), "{wrong:?}");
    assert!(wrong.commands[0].contains("check"), "{wrong:?}");
    // Without the helper the one before it waits for that, and not for the file.
    let waits = |facts: &Facts| {
        let findings = super::agent::check(facts).findings;
        let found = findings.iter().find(|f| f.id == "config-not-in-force");
        let disconnected = findings.iter().any(|f| f.id == "agent-disconnected");
        let waits = found.unwrap().effect.contains("to be fixed");
        assert_ne!(waits, disconnected, "{findings:?}");
        waits
    };
    agent(&mut facts).connected = false;
    agent(&mut facts).problem = Some("no helper listens".into());
    assert!(!waits(&facts));
    agent(&mut facts).problem = Some("waiting".into());
    agent(&mut facts).awaits = Some(Awaited::configuration);
    assert!(waits(&facts));
}

#[test]
fn advice_is_about_the_file_that_was_looked_at() {
    let mut facts = fine();
    facts.config = ConfigState::Wrong("c:1:1".into());
    let commands = |facts: &Facts| only(facts, super::agent::check).commands;
    assert_eq!(commands(&facts), ["cgtproxy-agent check"]);
    facts.config_named = true;
    facts.config_file = "/tmp/it's.yaml".into();
    assert_eq!(
        commands(&facts),
        [r"cgtproxy-agent --config '/tmp/it'\''s.yaml' check"]
    );
    // An agent is asked about its own file, and refuses another.
    let mut facts = fine();
    facts.config_named = true;
    send_the_proxy_through_itself(&mut facts);
    assert_eq!(
        only(&facts, super::proxies::check).commands,
        ["cgtproxy-agent explain mihomo.service"]
    );
}

#[test]
fn a_file_that_was_removed_has_no_mistake() {
    let mut facts = fine();
    facts.config = ConfigState::Missing;
    agent(&mut facts).configError = Some("there is no file /c".into());
    let removed = only(&facts, super::agent::check);
    assert_eq!(removed.id, "config-not-in-force");
    assert!(!removed.problem.contains("mistake"), "{removed:?}");
    assert!(removed.effect.contains("still in force"), "{removed:?}");
    assert!(removed.commands[0].contains("restart"), "{removed:?}");
    // Of one that it started with there is nothing to keep.
    agent(&mut facts).connected = false;
    agent(&mut facts).awaits = Some(Awaited::configuration);
    let removed = only(&facts, super::agent::check);
    assert!(removed.effect.contains("waits for the file"), "{removed:?}");
}

#[test]
fn the_socket_is_not_blamed_for_the_directory_that_it_is_in() {
    let mut facts = fine();
    facts.helper = Helper::Forbidden { in_sight: true };
    let socket = only(&facts, super::helper::check);
    assert_eq!(
        socket.commands,
        ["sudo chmod 666 /run/cgtproxy/helper.sock"]
    );
    facts.helper = Helper::Forbidden { in_sight: false };
    let directory = only(&facts, super::helper::check);
    assert_eq!(directory.commands, ["namei -l /run/cgtproxy/helper.sock"]);
}

#[test]
fn without_the_configuration_the_policy_in_force_counts() {
    let mut facts = fine();
    facts.config = ConfigState::Missing;
    helper(&mut facts).0.proxies = vec![cgtproxy_proto::helper::Proxy {
        name: "other".into(),
        port: 1,
        redirect: None,
        noTcp: None,
        noUdp: None,
        rejectUdp: None,
        noIpv4: None,
        noIpv6: None,
        dnsHijack: None,
        fakeIpv4: None,
        fakeIpv6: None,
    }];
    assert_eq!(ids(&facts), ["config-missing", "proxy-not-listening"]);
}

#[test]
fn names_of_others_reach_the_terminal_harmlessly() {
    let mut facts = fine();
    let writer = MarkWriter {
        table: "ip \x1b[2J\u{202e}".into(),
        bits: 1,
    };
    helper(&mut facts).1.markWriters = Some(vec![writer]);
    let mut text = String::new();
    report::render(&mut text, &all(&facts), false).unwrap();
    assert!(text.contains("ip \\u{1b}[2J\\u{202e}"), "{text}");
    assert!(!text.contains('\x1b') && !text.contains('\u{202e}'));
}

/// Every id that a check can give, as its source has it.
fn ids_in_source() -> BTreeSet<String> {
    let sources = [
        include_str!("agent.rs"),
        include_str!("control_groups.rs"),
        include_str!("dns.rs"),
        include_str!("gateway.rs"),
        include_str!("helper.rs"),
        include_str!("kernel.rs"),
        include_str!("marks.rs"),
        include_str!("proxies.rs"),
        include_str!("relay.rs"),
        include_str!("routing.rs"),
    ];
    let mut ids = BTreeSet::new();
    for source in sources {
        for severity in ["Finding::error(", "Finding::warning(", "Finding::note("] {
            for rest in source.split(severity).skip(1) {
                let id = rest.trim_start().strip_prefix('"').unwrap();
                ids.insert(id.split('"').next().unwrap().to_owned());
            }
        }
    }
    ids
}

#[test]
fn every_finding_is_tested_and_in_the_documentation() {
    let documentation = include_str!("../../../../docs/troubleshooting.md");
    let tested: BTreeSet<String> = BROKEN.iter().map(|(id, ..)| (*id).to_owned()).collect();
    assert_eq!(ids_in_source(), tested);
    for id in tested {
        assert!(
            documentation.contains(&format!("`{id}`")),
            "{id} is not in docs/troubleshooting.md"
        );
    }
}
