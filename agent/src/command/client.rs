//! The user's running agent, for programs that do one thing after another.

use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::runtime::Runtime;
use tokio::time::timeout;

use super::Error;
use crate::config::Scope;
use crate::connection::{ConnectError, Connection};
use crate::server;

/// How long the agent may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

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
    ) -> Result<R, Error> {
        let call = self.connection.call(method, arguments);
        // The time begins within the runtime.
        let answer = self
            .runtime
            .block_on(async { timeout(PATIENCE, call).await });
        answer
            .map_err(|_| Error::NoAnswer(PATIENCE.as_secs()))?
            .map_err(Error::Call)
    }
}
