//! The checks: from facts to findings.

mod agent;
mod control_groups;
mod dns;
mod gateway;
mod helper;
mod kernel;
mod marks;
mod proxies;
mod relay;
mod routing;

#[cfg(test)]
mod tests;

use super::Group;
use super::facts::Facts;
use crate::text::count;

/// A kind of checks.
type Check = fn(&Facts) -> Group;

/// All of them, in the order in which one thing rests on another.
const CHECKS: [Check; 9] = [
    helper::check,
    agent::check,
    control_groups::check,
    kernel::check,
    routing::check,
    marks::check,
    proxies::check,
    relay::check,
    dns::check,
];

/// Looks at everything.
pub(crate) fn all(facts: &Facts) -> Vec<Group> {
    let summarised = |check: &Check| {
        let mut group = check(facts);
        if !group.is_fine() {
            group.summary.clear();
        }
        group
    };
    CHECKS.iter().map(summarised).collect()
}

/// What it means that a program which runs has another version than this one.
const OTHER_VERSION: &str = "What one of them knows the other may not.";

/// That `what` has another version than this program, if it does.
fn other_version(facts: &Facts, what: &str, version: &str) -> Option<String> {
    let own = facts.version;
    (version != own).then(|| format!("{what} that runs has version {version}, this program {own}"))
}
