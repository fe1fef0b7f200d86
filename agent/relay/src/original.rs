//! Where UDP was going before it was redirected here: the helper knows.

use std::net::SocketAddr;
use std::path::PathBuf;

use cgtproxy_proto::client::{CallError, Client};
use cgtproxy_proto::helper::{FindRedirected_Args, FindRedirected_Reply};
use tokio::sync::Mutex;

/// A connection to the helper, made when it is first needed.
#[derive(Debug)]
pub struct Originals {
    socket: PathBuf,
    client: Mutex<Option<Client>>,
}

/// Who sends, and where to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Original {
    pub(crate) source: SocketAddr,
    pub(crate) destination: SocketAddr,
}

impl Originals {
    /// Asks the helper at this socket.
    #[must_use]
    pub fn new(socket: PathBuf) -> Self {
        Self {
            socket,
            client: Mutex::new(None),
        }
    }

    /// Who sends what arrives at `listener` from `client`, and where to. None if nobody sent it here, or
    /// the helper does not answer.
    pub(crate) async fn find(&self, listener: SocketAddr, client: SocketAddr) -> Option<Original> {
        let mut connection = self.client.lock().await;
        // A helper that was restarted has closed the connection.
        for _ in 0..2 {
            // Taken out for the call: one that is given up in its middle is of no use any more.
            let mut helper = match connection.take() {
                Some(helper) => helper,
                None => match Client::connect(&self.socket).await {
                    Ok(helper) => helper,
                    Err(error) => {
                        tracing::debug!("can't connect to the helper: {error}");
                        return None;
                    }
                },
            };
            let question = FindRedirected_Args {
                listener: listener.to_string(),
                client: client.to_string(),
            };
            let answer = helper
                .call::<_, FindRedirected_Reply>("org.cgtproxy.Helper.FindRedirected", question)
                .await;
            match answer {
                Ok(reply) => {
                    *connection = Some(helper);
                    return Some(Original {
                        source: reply.source.parse().ok()?,
                        destination: reply.destination.parse().ok()?,
                    });
                }
                Err(CallError::Fault(fault)) => {
                    *connection = Some(helper);
                    tracing::debug!("a datagram from {client} has no known way: {}", fault.name);
                    return None;
                }
                Err(error) => tracing::debug!("the helper does not answer: {error}"),
            }
        }
        None
    }
}
