//! What the agent knows, as its interface shows it.

use std::path::Path;

use cgtproxy_proto::agent::{ControlGroup, Explain_Reply, Rule, Target};
use cgtproxy_proto::helper::SkipReason;
use cgtproxy_proto::path::ControlGroupPath;

use crate::config::{Config, Means};
use crate::policy::{self, Choice, Origin, unit_name};
use crate::state::Relay;
use crate::state::State;
use crate::subtree::Subtree;
use crate::text::printable;

/// The reason that is given for a control group for which there is no room.
pub(crate) const NO_ROOM: &str = "noRoom";

/// A control group and its verdict; none if there is no such control group.
pub(crate) fn control_group(state: &State, path: &ControlGroupPath) -> Option<ControlGroup> {
    state.tree().get(path)?;
    let given = state.tree().giver(path);
    let given = given.as_ref().map(|(giver, choice)| (giver, *choice));
    let mut group = judged(&state.subtree, path, given);
    group.inForce = state.in_force(path);
    group.skipped = skipped(state, path).map(str::to_owned);
    Some(group)
}

/// A control group with the verdict that a choice at `giver`, itself or an ancestor, gives it. Not in
/// force.
pub(crate) fn judged(
    subtree: &Subtree,
    path: &ControlGroupPath,
    given: Option<(&ControlGroupPath, &Choice)>,
) -> ControlGroup {
    let origin = given.map(|(_, choice)| choice.origin);
    ControlGroup {
        path: subtree.to_wire(path),
        target: given.map_or("direct", |(_, c)| c.target.name()).to_owned(),
        rule: match origin {
            Some(Origin::Rule(number)) => Some(number.into()),
            _ => None,
        },
        inheritedFrom: given
            .filter(|(giver, _)| *giver != path)
            .map(|(giver, _)| subtree.to_wire(giver)),
        execSlice: origin == Some(Origin::ExecSlice),
        relay: (origin == Some(Origin::Relay)).then_some(true),
        inForce: false,
        skipped: None,
    }
}

/// The one of these control groups that is meant by its path in the subtree, else by its own name, else by its unit's.
pub(crate) fn find<'a>(
    groups: impl Iterator<Item = &'a ControlGroupPath>,
    meant: &ControlGroupPath,
) -> Option<&'a ControlGroupPath> {
    let by = |path: &'a ControlGroupPath| {
        let name = path.name()?;
        let names = [path.as_bytes(), name, unit_name(name)];
        let by = names.iter().position(|name| *name == meant.as_bytes())?;
        Some((by, path))
    };
    let first = groups.filter_map(by).min_by_key(|(by, _)| *by);
    first.map(|(_, path)| path)
}

/// Why the helper passed over a control group, if it did, or why it was not told of it.
pub(crate) fn skipped(state: &State, path: &ControlGroupPath) -> Option<&'static str> {
    if state.ledger().is_waiting(path) {
        return Some(NO_ROOM);
    }
    state.ledger().skipped(path).map(|reason| match reason {
        SkipReason::missing => "missing",
        SkipReason::notOwned => "notOwned",
        SkipReason::notControlGroup => "notControlGroup",
        SkipReason::unreadable => "unreadable",
        SkipReason::tooDeep => "tooDeep",
    })
}

/// Why the helper passed over a control group, for a person.
pub(crate) fn sentence(reason: &SkipReason) -> &'static str {
    match reason {
        SkipReason::missing => "it was gone already",
        SkipReason::notOwned => "it belongs to root",
        SkipReason::notControlGroup => "it is no control group of this user's",
        SkipReason::unreadable => "the helper can't open it",
        SkipReason::tooDeep => "it is nested deeper than any rule looks",
    }
}

/// Why a control group has no verdict of its own, for a person, by the name of the reason. The agent that has named it may
/// be of another version.
pub(crate) fn named_sentence(reason: &str) -> String {
    if reason == NO_ROOM {
        return "there is no room for another verdict".to_owned();
    }
    let known: Result<SkipReason, _> = serde_json::from_value(reason.into());
    known.map_or_else(|_| printable(reason), |known| sentence(&known).to_owned())
}

/// The targets of a configuration, and how many of these control groups have each.
pub(crate) fn targets(config: &Config, relay: &Relay, groups: &[ControlGroup]) -> Vec<Target> {
    let count = |name: &str| groups.iter().filter(|g| g.target == name).count();
    let built_in = |name: &str| Target {
        name: name.to_owned(),
        port: None,
        relayed: None,
        controlGroups: count(name) as i64,
    };
    let mut targets = vec![built_in("direct"), built_in("drop")];
    if count("drop-all") > 0 {
        targets.push(built_in("drop-all"));
    }
    targets.extend(config.proxies.iter().map(|proxy| Target {
        name: proxy.name.to_string(),
        port: Some(match &proxy.means {
            Means::Tproxy(port) | Means::Redirect(port) => port.get().into(),
            Means::Relay { .. } => relay.port(proxy).into(),
        }),
        relayed: matches!(proxy.means, Means::Relay { .. }).then_some(true),
        controlGroups: count(proxy.name.as_str()) as i64,
    }));
    targets
}

/// The rules of a configuration, in their order.
pub(crate) fn rules(config: &Config) -> Vec<Rule> {
    config.rules.rules.iter().map(shown).collect()
}

/// A control group, with the rule of a configuration that gives it its verdict, if one does, and the file of that rule.
pub(crate) fn explained(
    config: &Config,
    from: Option<&Path>,
    group: ControlGroup,
) -> Explain_Reply {
    let rule = rule(config, &group);
    Explain_Reply {
        config: from.filter(|_| rule.is_some()).map(file),
        rule,
        controlGroup: group,
    }
}

/// The name of a file.
pub(crate) fn file(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// The rule of a configuration that gives a control group its verdict, if one does.
pub(crate) fn rule(config: &Config, group: &ControlGroup) -> Option<Rule> {
    config.rules.rules.get(rule_index(group)?).map(shown)
}

/// The place in the list of the rule that decides about a control group; none if no rule does.
pub(crate) fn rule_index(group: &ControlGroup) -> Option<usize> {
    usize::try_from(group.rule?).ok()?.checked_sub(1)
}

/// A control group with the verdict that a configuration means for it, without an agent.
pub(crate) fn meant(config: &Config, subtree: &Subtree, path: &ControlGroupPath) -> ControlGroup {
    let given = config.rules.explain(&subtree.prefix(), path);
    let given = given.as_ref().map(|(choice, giver)| (giver, choice));
    judged(subtree, path, given)
}

fn shown(rule: &policy::Rule) -> Rule {
    Rule {
        selector: rule.selector.to_string(),
        target: rule.target.name().to_owned(),
        line: i64::try_from(rule.line).ok(),
        enforce: rule.enforce.then_some(true),
    }
}
