//! The user's running agent, for programs that do one thing after another.

use cgtproxy_proto::client::CallError;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::runtime::Runtime;

use super::Error;
use crate::config::Scope;
use crate::connection::{ConnectError, Connection};
use crate::server;

/// A connection, and what waits for it.
pub(super) struct Agent {
    runtime: Runtime,
    connection: Connection,
}

impl Agent {
    /// Connects to it.
    pub(super) fn connect(scope: Scope) -> Result<Self, Error> {
        let runtime = super::runtime()?;
        match runtime.block_on(Connection::open(server::default_socket(scope))) {
            Ok(connection) => Ok(Self {
                runtime,
                connection,
            }),
            Err(ConnectError::NotRunning) => Err(match scope {
                Scope::User => Error::NotRunning,
                Scope::System => Error::SystemNotRunning,
            }),
            Err(ConnectError::Failed { socket, source }) => Err(Error::Connect {
                path: socket,
                source,
            }),
        }
    }

    /// Calls a method.
    pub(super) fn call<A: Serialize, R: DeserializeOwned>(
        &mut self,
        method: &str,
        arguments: A,
    ) -> Result<R, CallError> {
        self.runtime
            .block_on(self.connection.call(method, arguments))
    }
}
