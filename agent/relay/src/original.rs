//! Where UDP was going before it was redirected here: the helper knows.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use cgtproxy_proto::client::{CallError, Client};
use cgtproxy_proto::helper::{ErrorKind, FindRedirected_Args, FindRedirected_Reply};
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::time::timeout;

/// How long the helper may take for an answer: everybody else waits meanwhile.
const ANSWER: Duration = Duration::from_secs(5);

/// A connection to the helper, made when it is first needed.
#[derive(Debug)]
pub(crate) struct Originals {
    socket: PathBuf,
    client: Arc<Mutex<Option<Client>>>,
}

/// The right to ask next.
#[derive(Debug)]
pub(crate) struct Turn(OwnedMutexGuard<Option<Client>>);

/// Who sends, and where to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Original {
    pub(crate) source: SocketAddr,
    pub(crate) destination: SocketAddr,
}

/// Why nobody says that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unknown {
    /// It was not redirected: somebody sends to the relay's own port.
    NotRedirected,
    /// The helper does not answer.
    NoAnswer,
}

impl Originals {
    /// Asks the helper at this socket.
    pub(crate) fn new(socket: PathBuf) -> Self {
        Self {
            socket,
            client: Arc::default(),
        }
    }

    /// The same over a connection of its own, so that neither waits for the other's questions.
    pub(crate) fn another(&self) -> Self {
        Self::new(self.socket.clone())
    }

    /// Who sends what arrives at `listener` from `client`, and where to.
    ///
    /// # Errors
    /// If nobody sent it here, or the helper does not answer.
    pub(crate) async fn find(
        &self,
        listener: SocketAddr,
        client: SocketAddr,
    ) -> Result<Original, Unknown> {
        let turn = self.next_turn().await;
        self.find_in(turn, listener, client).await
    }

    /// The next turn, after all who wait for theirs already.
    pub(crate) async fn next_turn(&self) -> Turn {
        Turn(self.client.clone().lock_owned().await)
    }

    /// The same, unless somebody else has it: for what can wait, so that nobody waits for it.
    pub(crate) fn turn(&self) -> Option<Turn> {
        self.client.clone().try_lock_owned().ok().map(Turn)
    }

    /// As [`Self::find`], for who has the turn.
    pub(crate) async fn find_in(
        &self,
        turn: Turn,
        listener: SocketAddr,
        client: SocketAddr,
    ) -> Result<Original, Unknown> {
        let asked = timeout(ANSWER, self.ask(turn, listener, client));
        asked.await.unwrap_or_else(|_| {
            tracing::debug!("the helper does not answer in time");
            Err(Unknown::NoAnswer)
        })
    }

    async fn ask(
        &self,
        Turn(mut connection): Turn,
        listener: SocketAddr,
        client: SocketAddr,
    ) -> Result<Original, Unknown> {
        // A helper that was restarted has closed the connection.
        for _ in 0..2 {
            // Taken out during the call: after a call that was cancelled, a connection can't be used again.
            let mut helper = match connection.take() {
                Some(helper) => helper,
                None => match Client::connect(&self.socket).await {
                    Ok(helper) => helper,
                    Err(error) => {
                        tracing::debug!("can't connect to the helper: {error}");
                        return Err(Unknown::NoAnswer);
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
                    let address = |text: &str| text.parse().map_err(|_| Unknown::NoAnswer);
                    return Ok(Original {
                        source: address(&reply.source)?,
                        destination: address(&reply.destination)?,
                    });
                }
                Err(CallError::Fault(fault)) => {
                    *connection = Some(helper);
                    tracing::debug!("a datagram from {client} has no known way: {}", fault.name);
                    return Err(match fault.kind() {
                        ErrorKind::NotRedirected(_) => Unknown::NotRedirected,
                        _ => Unknown::NoAnswer,
                    });
                }
                Err(error) => tracing::debug!("the helper does not answer: {error}"),
            }
        }
        Err(Unknown::NoAnswer)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::collections::HashMap;
    use std::path::Path;
    use std::rc::Rc;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixListener;

    /// What a helper knows: where datagrams were sent, by the client that the kernel shows.
    pub(crate) type Known = Rc<RefCell<HashMap<SocketAddr, SocketAddr>>>;

    /// A helper that tells that.
    pub(crate) fn helper(directory: &Path, known: &Known) -> Originals {
        let path = directory.join("helper.sock");
        let listener = UnixListener::bind(&path).unwrap();
        tokio::task::spawn_local(tell(listener, known.clone()));
        Originals::new(path)
    }

    /// Tells that to whoever asks there.
    pub(crate) async fn tell(listener: UnixListener, known: Known) {
        while let Ok((mut stream, _)) = listener.accept().await {
            let known = known.clone();
            tokio::task::spawn_local(async move {
                let mut call = Vec::new();
                while let Ok(byte) = stream.read_u8().await {
                    if byte != 0 {
                        call.push(byte);
                        continue;
                    }
                    let asked: serde_json::Value =
                        serde_json::from_slice(&std::mem::take(&mut call)).unwrap();
                    let client = asked["parameters"]["client"].as_str().unwrap();
                    let client: SocketAddr = client.parse().unwrap();
                    let destination = known.borrow().get(&client).copied();
                    let answer = match destination {
                        Some(destination) => serde_json::json!({ "parameters": {
                            "source": "192.0.2.9:9",
                            "destination": destination.to_string(),
                        }}),
                        None => serde_json::json!({
                            "error": "org.cgtproxy.Helper.NotRedirected",
                            "parameters": {},
                        }),
                    };
                    let answer = format!("{answer}\0");
                    stream.write_all(answer.as_bytes()).await.unwrap();
                }
            });
        }
    }

    /// Time stands still but for who waits for it.
    #[tokio::test(start_paused = true)]
    async fn a_helper_that_says_nothing_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("helper.sock");
        // The kernel connects; nobody answers.
        let _helper = tokio::net::UnixListener::bind(&path).unwrap();
        let originals = Originals::new(path);
        let (listener, client) = (
            "127.0.0.1:1".parse().unwrap(),
            "127.0.0.1:2".parse().unwrap(),
        );
        for _ in 0..2 {
            let found = timeout(Duration::from_secs(60), originals.find(listener, client));
            assert_eq!(found.await.unwrap(), Err(Unknown::NoAnswer));
        }
    }
}
