//! A connection to the user's running agent.

use std::io;

use cgtproxy_proto::client::{CallError, Client};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::runtime::Runtime;

use super::Error;
use crate::server;

/// The agent, for programs that do one thing after another.
pub(super) struct Agent {
    runtime: Runtime,
    client: Client,
}

impl Agent {
    /// Connects to it.
    pub(super) fn connect() -> Result<Self, Error> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .map_err(Error::Start)?;
        let path = server::default_socket();
        match runtime.block_on(Client::connect(&path)) {
            Ok(client) => Ok(Self { runtime, client }),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) =>
            {
                Err(Error::NotRunning)
            }
            Err(source) => Err(Error::Connect { path, source }),
        }
    }

    /// Calls a method.
    pub(super) fn call<A: Serialize, R: DeserializeOwned>(
        &mut self,
        method: &str,
        arguments: A,
    ) -> Result<R, CallError> {
        let method = format!("{}.{method}", cgtproxy_proto::agent::INTERFACE);
        self.runtime.block_on(self.client.call(&method, arguments))
    }
}
