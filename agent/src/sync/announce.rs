//! Tells the service manager what is in force.

use crate::notify;
use crate::state::Agent;
use crate::text::count;

/// Tells the service manager why not all is in force. When it is, that is said again.
pub(super) fn say_problem(agent: &Agent, why: &str) {
    notify::status(why);
    agent.state_mut().announced = false;
}

/// Says once that all is in force, and at the end of each reload.
pub(super) fn announce(agent: &Agent) {
    let text = {
        let mut state = agent.state_mut();
        let reloaded = std::mem::take(&mut state.reloading);
        if std::mem::replace(&mut state.announced, true) && !reloaded {
            return;
        }
        let without = state.ledger().shortage().map_or(0, |(count, ..)| count);
        let mapped = state.tree().cover().count().saturating_sub(without);
        let all = count(state.tree().len(), "control group");
        format!("{all}, {mapped} of them with a verdict of their own")
    };
    tracing::info!("the policy is in force: {text}");
    notify::status(&format!("In force: {text}"));
    notify::ready();
    agent.state_mut().ready = true;
}

/// Ends a reload, if one is under way, as far as the service manager is concerned.
pub(super) fn finish_reload(agent: &Agent) {
    if std::mem::take(&mut agent.state_mut().reloading) {
        notify::ready();
    }
}
