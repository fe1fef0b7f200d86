//! The user's running agent, for programs that do one thing after another.

use std::path::{Path, PathBuf};
use std::time::Duration;

use cgtproxy_proto::agent::{ErrorKind, GetStatus_Args, GetStatus_Reply};
use cgtproxy_proto::client::CallError;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::runtime::Runtime;
use tokio::time::timeout;

use super::Error;
use crate::cli::Arguments;
use crate::config::Scope;
use crate::connection::{ConnectError, Connection, is_roots};
use crate::server;

/// How long the agent may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// A connection, and what waits for it.
pub(super) struct Agent {
    runtime: Runtime,
    connection: Connection,
}

impl Agent {
    /// Connects to it, if it runs.
    pub(super) fn connect_if_running(scope: Scope) -> Result<Option<Self>, Error> {
        match Self::connect(scope) {
            Ok(agent) => Ok(Some(agent)),
            Err(Error::NotRunning | Error::SystemNotRunning) => Ok(None),
            Err(error) => Err(error),
        }
    }

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
            Err(ConnectError::Failed { source, .. }) if is_roots(scope, &source) => {
                Err(Error::SystemIsAskedByRoot)
            }
            Err(ConnectError::Failed { socket, source }) => Err(Error::Connect {
                path: socket,
                source,
            }),
        }
    }

    /// The state of the agent, if it goes by the file that the command line names.
    pub(super) fn status(&mut self, arguments: &Arguments) -> Result<GetStatus_Reply, Error> {
        let status: GetStatus_Reply = self.call("GetStatus", GetStatus_Args {})?;
        let Some(named) = &arguments.config else {
            return Ok(status);
        };
        // However it is written.
        let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
        match status.config.as_ref().map(PathBuf::from) {
            Some(own) if real(&own) == real(named) => Ok(status),
            own => Err(Error::OtherFile {
                own: own.map_or_else(|| "no file".to_owned(), |own| own.display().to_string()),
                named: named.clone(),
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
            .map_err(refused)
    }
}

fn refused(error: CallError) -> Error {
    if let CallError::Fault(fault) = &error
        && let ErrorKind::TooManyConnections(Some(args)) = fault.kind()
    {
        return Error::TooManyConnections(args.limit);
    }
    Error::Call(error)
}
