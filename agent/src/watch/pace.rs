//! Until when events are left in inotify's queue.

use std::time::Duration;

use tokio::time::Instant;

/// How long events are left in inotify's queue while a call to the helper is under way. A call that takes longer is no
/// reason not to know what there is.
const CALL: Duration = Duration::from_millis(100);

/// In how many calls in a row something has to happen until events are gathered before the next call. To be woken by
/// each event costs those who make control groups more than the waiting does.
const CROWD: u32 = 8;

/// How long events are gathered.
const GATHER: Duration = Duration::from_millis(1);

/// Until when events are left in inotify's queue: while a call is under way that does not take too long, and a little
/// longer when something has happened during many calls in a row.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// Until when they are left while the call is under way.
    call: Option<Instant>,
    /// In how many calls in a row something has happened.
    crowded: u32,
    /// Until when they are left because so much happens.
    rest: Option<Instant>,
}

impl Pace {
    /// Notes whether a call is under way now, and whether events were left in the queue.
    pub(super) fn update(&mut self, calling: bool, left: bool, now: Instant) {
        if calling {
            self.call.get_or_insert(now + CALL);
        } else if self.call.take().is_some() && left {
            self.crowded = self.crowded.saturating_add(1);
            self.rest = (self.crowded >= CROWD).then(|| now + GATHER);
        }
    }

    /// Notes that nothing was left in the queue.
    pub(super) fn nothing_left(&mut self) {
        self.crowded = 0;
    }

    /// Until when events are left in the queue; none if they are not.
    pub(super) fn quiet(&self, now: Instant) -> Option<Instant> {
        self.call.or(self.rest).filter(|until| *until > now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_left_during_a_call_that_does_not_take_too_long() {
        let mut pace = Pace::default();
        let start = Instant::now();
        assert_eq!(pace.quiet(start), None);
        pace.update(true, true, start);
        pace.update(true, true, start + CALL / 2);
        assert_eq!(pace.quiet(start), Some(start + CALL));
        assert_eq!(pace.quiet(start + CALL), None);
        pace.update(false, true, start + CALL);
        pace.update(true, true, start + CALL);
        assert_eq!(pace.quiet(start + CALL), Some(start + 2 * CALL));
    }

    #[test]
    fn events_are_gathered_when_something_happens_in_many_calls_in_a_row() {
        let mut pace = Pace::default();
        let now = Instant::now();
        let call = |pace: &mut Pace| {
            pace.update(true, true, now);
            pace.update(false, true, now);
        };
        for _ in 1..CROWD {
            call(&mut pace);
            assert_eq!(pace.quiet(now), None);
        }
        call(&mut pace);
        assert_eq!(pace.quiet(now), Some(now + GATHER));
        assert_eq!(pace.quiet(now + GATHER), None);
        pace.nothing_left();
        call(&mut pace);
        assert_eq!(pace.quiet(now), None);
    }
}
