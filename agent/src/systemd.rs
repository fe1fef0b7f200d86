//! The ways to systemd over D-Bus.

use std::path::Path;
use std::pin::Pin;

use futures_core::Stream;
use zbus::connection::Builder;
use zbus::{Connection, DBusError};

pub(crate) use cgtproxy_proto::socket::runtime_directory;

/// The bus's own name on it, and that of its interface.
pub(crate) const BUS: &str = "org.freedesktop.DBus";
/// The bus's own object.
pub(crate) const BUS_PATH: &str = "/org/freedesktop/DBus";
/// systemd's name on a bus.
pub(crate) const SYSTEMD: &str = "org.freedesktop.systemd1";
/// The interface of its manager object.
pub(crate) const MANAGER: &str = "org.freedesktop.systemd1.Manager";
/// Its manager object.
pub(crate) const MANAGER_PATH: &str = "/org/freedesktop/systemd1";

/// A D-Bus error without its name, which tells a person nothing that the text does not. It is not
/// treated as a cause of ours: it repeats its own causes in its text.
pub(crate) fn said(error: &zbus::Error) -> String {
    match error {
        zbus::Error::MethodError(_, Some(text), _) => text.clone(),
        zbus::Error::FDO(error) => error.description().unwrap_or("no reason given").to_owned(),
        _ => error.to_string(),
    }
}

/// A bus that systemd may have its name on, as a D-Bus address.
///
/// On its own socket (`systemd/private`) systemd calls itself `org.freedesktop.systemd1`, which is no unique name, and
/// zbus takes no message from such a sender.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Address(pub(crate) String);

impl Address {
    /// All that are worth a try to reach the user's systemd, the most usual one first.
    pub(crate) fn all(session_bus: Option<&str>, runtime: &Path) -> Vec<Self> {
        // A variable left over from another session, or by dbus-run-session, names a bus without
        // a systemd on it: hence the user's own, even when it is set.
        let given = session_bus.unwrap_or_default().split(';');
        let mut all: Vec<_> = given
            .filter(|a| !a.is_empty())
            .map(|a| Self(a.to_owned()))
            .collect();
        let own = Self(format!("unix:path={}", escape(&runtime.join("bus"))));
        if !all.contains(&own) {
            all.push(own);
        }
        all
    }

    /// That of the system's own systemd.
    pub(crate) fn system() -> Vec<Self> {
        vec![Self("unix:path=/run/dbus/system_bus_socket".to_owned())]
    }

    /// Connects. Whether a systemd is at the other end is not known yet.
    pub(crate) async fn open(&self) -> zbus::Result<Manager> {
        let connection = Builder::address(&*self.0).build().await?;
        Ok(Manager { connection })
    }
}

/// A path as a D-Bus address takes it (D-Bus specification, Server Addresses).
fn escape(path: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    let mut escaped = String::new();
    for &byte in path.as_os_str().as_bytes() {
        if byte.is_ascii_alphanumeric() || b"-_/.\\*".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("%{byte:02x}"));
        }
    }
    escaped
}

/// A connection to a systemd.
pub(crate) struct Manager {
    pub(crate) connection: Connection,
}

impl Manager {
    /// Calls a method of the manager's.
    pub(crate) async fn call<B>(&self, method: &str, body: &B) -> zbus::Result<zbus::Message>
    where
        B: serde::Serialize + zbus::zvariant::DynamicType,
    {
        self.connection
            .call_method(Some(SYSTEMD), MANAGER_PATH, Some(MANAGER), method, body)
            .await
    }
}

/// The next item of a stream.
pub(crate) async fn next<S: Stream + Unpin>(stream: &mut S) -> Option<S::Item> {
    std::future::poll_fn(|context| Pin::new(&mut *stream).poll_next(context)).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_to_systemd_is_tried_once() {
        let all = |given| -> Vec<String> {
            let all = Address::all(given, Path::new("/run/user/1000"));
            all.into_iter().map(|Address(bus)| bus).collect()
        };
        let own = "unix:path=/run/user/1000/bus";
        assert_eq!(all(None), [own]);
        assert_eq!(all(Some(own)), [own]);
        assert_eq!(
            all(Some("unix:path=/tmp/a;unix:abstract=b")),
            ["unix:path=/tmp/a", "unix:abstract=b", own]
        );
        assert_eq!(escape(Path::new("/tmp/ä;b")), "/tmp/%c3%a4%3bb");
    }
}
