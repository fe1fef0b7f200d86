//! The ways to systemd over D-Bus.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::pin::Pin;

use futures_core::Stream;
use zbus::connection::Builder;
use zbus::{Connection, DBusError};

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

/// Where the user's systemd can be reached, the most usual address first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Address {
    /// A bus it may have its name on, as a D-Bus address.
    Bus(String),
    /// The socket on which it speaks D-Bus itself, for systems without a bus per user.
    Private(PathBuf),
}

impl Address {
    /// All addresses that are worth a try.
    pub(crate) fn all(session_bus: Option<&str>, runtime: &Path) -> Vec<Self> {
        // A variable left over from another session, or by dbus-run-session, names a bus without
        // a systemd on it: hence the others, even when it is set.
        let given = session_bus.unwrap_or_default().split(';');
        let mut all: Vec<_> = given
            .filter(|a| !a.is_empty())
            .map(|a| Self::Bus(a.to_owned()))
            .collect();
        let own = Self::Bus(format!("unix:path={}", escape(&runtime.join("bus"))));
        if !all.contains(&own) {
            all.push(own);
        }
        all.push(Self::Private(runtime.join("systemd/private")));
        all
    }

    /// All addresses of the system's own systemd.
    pub(crate) fn system() -> Vec<Self> {
        vec![
            Self::Bus("unix:path=/run/dbus/system_bus_socket".to_owned()),
            Self::Private("/run/systemd/private".into()),
        ]
    }

    /// As a person knows it.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Bus(address) => address.clone(),
            Self::Private(path) => path.display().to_string(),
        }
    }

    /// Connects. Whether a systemd is at the other end is not known yet.
    pub(crate) async fn open(&self) -> zbus::Result<Manager> {
        let (connection, destination) = match self {
            Self::Bus(address) => (Builder::address(&**address).build().await?, Some(SYSTEMD)),
            Self::Private(path) => {
                let stream = UnixStream::connect(path).map_err(zbus::Error::from)?;
                (Builder::unix_stream(stream).p2p().build().await?, None)
            }
        };
        Ok(Manager {
            connection,
            destination,
        })
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
    /// Its name on the bus, if it is reached by one.
    pub(crate) destination: Option<&'static str>,
}

impl Manager {
    /// Calls a method of the manager's.
    pub(crate) async fn call<B>(&self, method: &str, body: &B) -> zbus::Result<zbus::Message>
    where
        B: serde::Serialize + zbus::zvariant::DynamicType,
    {
        self.connection
            .call_method(self.destination, MANAGER_PATH, Some(MANAGER), method, body)
            .await
    }
}

/// Where the sockets of the user's programs are (XDG Base Directory Specification). Programs that
/// switch users often leave the variable unset, and the directory is where systemd makes it.
pub(crate) fn runtime_directory() -> PathBuf {
    std::env::var_os("XDG_RUNTIME_DIR")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .unwrap_or_else(|| {
            let uid = rustix::process::getuid();
            format!("/run/user/{}", uid.as_raw()).into()
        })
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
        let runtime = Path::new("/run/user/1000");
        let own = Address::Bus("unix:path=/run/user/1000/bus".into());
        let private = Address::Private("/run/user/1000/systemd/private".into());
        assert_eq!(Address::all(None, runtime), [own.clone(), private.clone()]);
        assert_eq!(
            Address::all(Some("unix:path=/run/user/1000/bus"), runtime),
            [own.clone(), private.clone()]
        );
        assert_eq!(
            Address::all(Some("unix:path=/tmp/a;unix:abstract=b"), runtime),
            [
                Address::Bus("unix:path=/tmp/a".into()),
                Address::Bus("unix:abstract=b".into()),
                own,
                private
            ]
        );
        assert_eq!(escape(Path::new("/tmp/ä;b")), "/tmp/%c3%a4%3bb");
    }
}
