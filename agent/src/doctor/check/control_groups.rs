//! Has this user control groups by which applications can be told apart?

use super::count;
use crate::config::Scope;
use crate::doctor::facts::{Facts, Hierarchy};
use crate::doctor::{Finding, Group};

pub(super) fn check(facts: &Facts) -> Group {
    let mut group = Group::new("control groups");
    group.found(hierarchy(facts));
    group.found(manager(facts));
    group.see(
        "the control groups of your service manager",
        &facts.manager.owner,
    );
    if let Some(groups) = group.see("your control groups", &facts.manager.groups) {
        group.summary = format!("{} in {}", groups.len(), facts.manager.path);
        group.found(no_scopes(facts, groups));
        group.found(limits(facts, groups.len()));
    }
    group.see("the limits of inotify", &facts.inotify);
    group
}

fn hierarchy(facts: &Facts) -> Option<Finding> {
    match facts.hierarchy {
        Hierarchy::Unified => None,
        Hierarchy::Hybrid => Some(
            Finding::note(
                "cgroup-hybrid",
                "control groups of version 1 are mounted beside those of version 2",
            )
            .effect("cgtproxy works, as long as nothing uses net_cls or net_prio.")
            .advice("boot with systemd.unified_cgroup_hierarchy=1"),
        ),
        Hierarchy::None => Some(
            Finding::error(
                "cgroup-missing",
                "control groups of version 2 are not mounted",
            )
            .effect("Applications can't be told apart: cgtproxy does not work at all.")
            .advice("boot with systemd.unified_cgroup_hierarchy=1"),
        ),
    }
}

fn manager(facts: &Facts) -> Option<Finding> {
    let path = &facts.manager.path;
    match facts.manager.owner {
        _ if facts.hierarchy == Hierarchy::None => None,
        // It is about all of them, whoever they belong to.
        _ if facts.scope == Scope::System => None,
        // The helper accepts no policy from an agent without a service manager.
        Ok(None) if facts.manager.in_container || facts.agent_is_connected() => Some(
            Finding::error(
                "manager-out-of-sight",
                format!("there is no control group {path} to be seen from here"),
            )
            .effect(
                "This is within a control group namespace, as in a container: your control groups can't be looked \
                 at, and cgtproxy-exec runs nothing.",
            )
            .advice("run it outside of the container"),
        ),
        Ok(None) => Some(
            Finding::error(
                "manager-missing",
                format!("you have no service manager: there is no control group {path}"),
            )
            .effect("The helper takes no policy of yours.")
            .advice("log in through systemd-logind, or have a manager without a login")
            .command(format!("sudo loginctl enable-linger {}", facts.uid)),
        ),
        Ok(Some(owner)) if owner != facts.uid => Some(
            Finding::error(
                "manager-not-yours",
                format!("the control group {path} belongs to uid {owner}"),
            )
            .effect("The helper takes no policy of yours.")
            .command(format!("sudo systemctl restart user@{}.service", facts.uid)),
        ),
        Ok(Some(_)) | Err(_) => None,
    }
}

/// Desktops that start applications in their own session's control group.
fn no_scopes(facts: &Facts, groups: &[(u64, String)]) -> Option<Finding> {
    if facts.scope == Scope::System {
        return None;
    }
    let desktop = facts.session.desktop.as_ref()?;
    let is_app = |path: &String| {
        path.rsplit('/')
            .next()
            .is_some_and(|n| n.starts_with("app-"))
    };
    let has_apps = groups.iter().any(|(_, path)| is_app(path));
    (!has_apps && facts.session.graphical > 0).then(|| {
        Finding::warning(
            "no-app-scopes",
            format!(
                "the desktop ({desktop}) gives applications no control groups of their own: {} with a \
                 display in your login session, none below {}",
                count(facts.session.graphical, "process"),
                facts.manager.path
            ),
        )
        .effect("No rule can match them, and they go direct.")
        .advice(
            "start the desktop under uwsm, or each application in a scope, or with cgtproxy-exec",
        )
        .command("systemd-run --user --scope --slice=app.slice COMMAND")
    })
}

/// The agent needs a watch for each control group, and others of the same user use some too.
fn limits(facts: &Facts, groups: usize) -> Option<Finding> {
    let limits = facts.inotify.as_ref().ok()?;
    let needed = groups as u64 + 64;
    if limits.instances < 16 {
        return Some(
            Finding::warning(
                "inotify-instances",
                format!(
                    "fs.inotify.max_user_instances is {}: other programs may leave none for the agent",
                    limits.instances
                ),
            )
            .effect("The agent then hears of new applications over D-Bus, or looks for them every few seconds, and their own verdict comes late.")
            .command("sudo sysctl -w fs.inotify.max_user_instances=128")
            .advice("a line in /etc/sysctl.d keeps it"),
        );
    }
    (limits.watches < needed).then(|| {
        let enough = needed.next_power_of_two().max(65536);
        Finding::warning(
            "inotify-watches",
            format!(
                "fs.inotify.max_user_watches is {}, for {}",
                limits.watches,
                count(groups, "control group")
            ),
        )
        .effect("Of new applications in what is not watched the agent hears over D-Bus, or looks for them every few seconds, and their own verdict comes late.")
        .command(format!("sudo sysctl -w fs.inotify.max_user_watches={enough}"))
        .advice("a line in /etc/sysctl.d keeps it")
    })
}
