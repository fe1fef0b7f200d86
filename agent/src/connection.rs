//! A connection to the user's running agent, for that user's other programs.

use std::io;
use std::path::PathBuf;

use cgtproxy_proto::client::{CallError, Client};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::config::Scope;

/// Why there is no connection.
#[derive(Debug)]
pub(crate) enum ConnectError {
    /// Nobody listens.
    NotRunning,
    /// The socket is there, but of no use.
    Failed {
        /// The socket.
        socket: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Whether an error of connecting to a socket says that nobody listens on it.
pub(crate) fn nobody_listens(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionRefused, NotFound};
    matches!(error.kind(), NotFound | ConnectionRefused)
}

/// Whether an error of connecting to an agent's socket says that only root may, since it is the system's.
pub(crate) fn is_roots(scope: Scope, error: &io::Error) -> bool {
    scope == Scope::System && error.kind() == io::ErrorKind::PermissionDenied
}

/// A connection to an agent.
#[derive(Debug)]
pub(crate) struct Connection(Client);

impl Connection {
    /// Connects to the agent at `socket`.
    ///
    /// # Errors
    /// If there is none, or it can't be reached.
    pub(crate) async fn open(socket: PathBuf) -> Result<Self, ConnectError> {
        match Client::connect(&socket).await {
            Ok(client) => Ok(Self(client)),
            Err(error) if nobody_listens(&error) => Err(ConnectError::NotRunning),
            Err(source) => Err(ConnectError::Failed { socket, source }),
        }
    }

    /// Calls a method of `org.cgtproxy.Agent`. Not cancel safe.
    ///
    /// # Errors
    /// If the agent refuses, or the connection fails.
    pub(crate) async fn call<A: Serialize, R: DeserializeOwned>(
        &mut self,
        method: &str,
        arguments: A,
    ) -> Result<R, CallError> {
        let method = format!("{}.{method}", cgtproxy_proto::agent::INTERFACE);
        self.0.call(&method, arguments).await
    }
}
