//! Tells the service manager what is in force.

use crate::notify;
use crate::state::{Agent, State};
use crate::text::count;

/// Tells the service manager why not all is in force. When it is, that is said again.
pub(super) fn say_problem(agent: &Agent, why: &str) {
    notify::status(why);
    agent.state_mut().readiness.note_not_in_force();
}

/// Says once that all is in force, and at the end of each reload; and whenever there is something else to say of the file.
pub(super) fn announce(agent: &Agent) {
    let (words, ready, changed) = {
        let mut state = agent.state_mut();
        let words = in_force(&state);
        let (ready, changed) = state.readiness.note_in_force(&words);
        (words, ready, changed)
    };
    if changed {
        notify::status(&words);
    }
    if !ready {
        return;
    }
    let text = {
        let state = agent.state();
        let without = state.ledger().shortage().map_or(0, |(count, ..)| count);
        let mapped = state.tree().cover().count().saturating_sub(without);
        let all = count(state.tree().len(), "control group");
        format!("{all}, {mapped} of them with a verdict of their own")
    };
    tracing::info!("the policy is in force: {text}");
    notify::ready();
}

/// That all is in force, and what is not in force of the file. It stays so while control groups come and go.
fn in_force(state: &State) -> String {
    match (state.file_error(), state.postponed_why()) {
        (Some(error), _) => format!("In force; {}", error.short),
        (None, Some(why)) => format!("In force, and not what the file says now: {why}"),
        (None, None) => "In force".to_owned(),
    }
}

/// Ends a reload, if one is under way, as far as the service manager is concerned.
pub(super) fn finish_reload(agent: &Agent) {
    if agent.state_mut().readiness.end_reload() {
        notify::ready();
    }
}
