//! For how long what was found out is good, where nobody is served while it is looked for.

use std::time::Duration;

/// How many times as long as looking took: whoever asks, and however often, others wait for a small part of the time.
const TIMES: u32 = 20;

/// For how long it is good: at least so long, and longer if looking `took` long, up to a limit.
pub(crate) fn holds(took: Duration, at_least: Duration, at_most: Duration) -> Duration {
    at_least.max(took.saturating_mul(TIMES).min(at_most))
}
