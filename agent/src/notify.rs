//! What the service manager is told. Without one, nothing.

use sd_notify::NotifyState;

use crate::text::chain;

/// The agent does its work.
pub fn ready() {
    send(&[NotifyState::Ready]);
}

/// A sentence for `systemctl status`.
pub fn status(text: &str) {
    send(&[NotifyState::Status(text)]);
}

/// The configuration is being loaded; [`ready`] ends it.
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => send(&[NotifyState::Reloading, now]),
        Err(error) => tracing::debug!("can't tell the time: {}", chain(&error)),
    }
}

/// The agent ends.
pub fn stopping() {
    send(&[NotifyState::Stopping]);
}

fn send(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!("can't notify the service manager: {}", chain(&error));
    }
}
