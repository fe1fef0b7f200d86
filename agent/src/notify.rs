//! What the service manager is told. Without one, nothing.

use std::io;

use cgtproxy_proto::notify;

use crate::text::chain;

/// The agent does its work.
pub fn ready() {
    told(notify::ready());
}

/// A sentence for `systemctl status`.
pub fn status(text: &str) {
    told(notify::status(text));
}

/// The configuration is being loaded; [`ready`] ends it.
pub fn reloading() {
    told(notify::reloading());
}

/// The agent ends.
pub fn stopping() {
    told(notify::stopping());
}

fn told(told: io::Result<()>) {
    if let Err(error) = told {
        tracing::debug!("can't notify the service manager: {}", chain(&error));
    }
}
