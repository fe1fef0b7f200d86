//! How long to wait.

use std::time::Duration;

use tokio::time::Instant;

/// How long to wait before trying again: each time twice as long as the time before, up to a limit.
#[derive(Debug)]
pub(crate) struct Backoff {
    first: Duration,
    most: Duration,
    next: Duration,
}

impl Backoff {
    /// `first` is the first wait, `most` the longest.
    #[must_use]
    pub(crate) const fn new((first, most): (Duration, Duration)) -> Self {
        Self {
            first,
            most,
            next: first,
        }
    }

    /// How long to wait this time.
    pub(crate) fn next(&mut self) -> Duration {
        let now = self.next;
        self.next = (now * 2).min(self.most);
        now
    }

    /// It has worked: from here on as at first.
    pub(crate) fn reset(&mut self) {
        self.next = self.first;
    }
}

/// Returns at a time; never if there is none.
pub(crate) async fn sleep_until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_twice_as_long_each_time_up_to_the_limit() {
        let ms = Duration::from_millis;
        let mut back_off = Backoff::new((ms(10), ms(35)));
        assert_eq!([(); 4].map(|()| back_off.next()), [10, 20, 35, 35].map(ms));
        back_off.reset();
        assert_eq!(back_off.next(), ms(10));
    }
}
