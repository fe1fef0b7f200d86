//! How long to wait for what fails again and again.

use std::time::Duration;

/// How long to wait before trying again: each time twice as long as the time before, up to a limit.
#[derive(Debug, Clone)]
pub struct BackOff {
    first: Duration,
    most: Duration,
    next: Duration,
}

impl BackOff {
    /// `first` is the first wait, `most` the longest.
    #[must_use]
    pub const fn new((first, most): (Duration, Duration)) -> Self {
        Self {
            first,
            most,
            next: first,
        }
    }

    /// How long to wait this time.
    pub fn next_wait(&mut self) -> Duration {
        let now = self.next;
        self.next = (now * 2).min(self.most);
        now
    }

    /// How long [`Self::next_wait`] would wait.
    #[must_use]
    pub fn wait(&self) -> Duration {
        self.next
    }

    /// It has worked: from here on as at first.
    pub fn reset(&mut self) {
        self.next = self.first;
    }

    /// Whether nothing was waited for since it worked.
    #[must_use]
    pub fn is_at_first(&self) -> bool {
        self.next == self.first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_twice_as_long_each_time_up_to_the_limit() {
        let ms = Duration::from_millis;
        let mut back_off = BackOff::new((ms(10), ms(35)));
        assert_eq!(
            [(); 4].map(|()| back_off.next_wait()),
            [10, 20, 35, 35].map(ms)
        );
        assert!(!back_off.is_at_first());
        assert_eq!([back_off.wait(), back_off.wait()], [ms(35); 2]);
        back_off.reset();
        assert!(back_off.is_at_first());
        assert_eq!(back_off.next_wait(), ms(10));
    }
}
