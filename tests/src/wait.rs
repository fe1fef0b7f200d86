//! Waiting for something to become true.

use std::time::{Duration, Instant};

/// Nothing here takes so long unless it is broken, however busy the machine is.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// Asks until there is a value. For things that the kernel offers no event for.
///
/// # Panics
/// After [`DEADLINE`], naming what was waited for.
#[track_caller]
pub fn wait_for<T>(what: &str, mut question: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = question() {
            return value;
        }
        assert!(
            start.elapsed() < DEADLINE,
            "waited {DEADLINE:?} in vain for: {what}"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Asks until the answer is yes.
///
/// # Panics
/// After [`DEADLINE`], naming what was waited for.
#[track_caller]
pub fn wait_until(what: &str, mut question: impl FnMut() -> bool) {
    wait_for(what, || question().then_some(()));
}
