//! Connects to the helper, again and again, and removes what sessions have left when the agent ends.

use std::path::Path;
use std::time::Duration;

use cgtproxy_proto::back_off::BackOff;
use cgtproxy_proto::client::{CallError, Client};
use cgtproxy_proto::helper::{ErrorKind, ReplacePolicy_Reply};
use cgtproxy_proto::service::Fault;
use inotify::{Inotify, WatchMask};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::announce::finish_reload;
use super::session::{End, FAREWELL, Session, remove, say_that_it_stays};
use super::text::{refusal, unreachable};
use super::wire;
use crate::notify;
use crate::state::Agent;
use crate::text::chain;
use crate::watch::inotify::Events;

/// How long to wait before connecting again, at first and at most.
const RECONNECT: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(2));

/// How long a starting agent waits for another one to go. One that was killed a moment ago may not be
/// gone for the helper yet.
const SUCCESSION: Duration = Duration::from_secs(2);

/// How long an agent that ends waits before connecting again.
const AGAIN: Duration = Duration::from_millis(20);

/// Why there can be no session.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// Another agent has it.
    #[error("another agent of this user is connected to the helper")]
    SessionExists,
}

/// Keeps the helper in step until `stop` is cancelled; then removes the policy, even if the helper is just restarting.
/// `early` is a connection that is there already.
///
/// # Errors
/// If another agent of the user has the session when this one starts. One that comes later, while
/// the helper is away, is waited out.
pub(crate) async fn run(
    agent: &Agent,
    socket: &Path,
    mut early: Option<Client>,
    stop: &CancellationToken,
) -> Result<(), Error> {
    let started = Instant::now();
    let mut had_session = false;
    let mut back_off = BackOff::new(RECONNECT);
    let mut arrival = None;
    let mut said = String::new();
    loop {
        let early = early.take();
        let connecting = async {
            match early {
                Some(client) => Ok(client),
                None => Client::connect(socket).await,
            }
        };
        let end = tokio::select! {
            connected = connecting => match connected {
                Ok(client) => {
                    let mut session = Session::new(agent, client);
                    let end = session.run(stop).await;
                    if session.is_established() {
                        had_session = true;
                        back_off.reset();
                        said.clear();
                    }
                    end
                }
                Err(error) => End::Lost(unreachable(socket, &error)),
            },
            () = stop.cancelled() => break,
        };
        let why = match end {
            End::Stopped => return Ok(()),
            End::SessionExists if !had_session && started.elapsed() >= SUCCESSION => {
                return Err(Error::SessionExists);
            }
            End::SessionExists => Error::SessionExists.to_string(),
            End::Lost(_) if stop.is_cancelled() => break,
            End::Lost(why) => why,
        };
        // Once, not at every attempt.
        if why != said {
            tracing::warn!("{why}; trying again");
            notify::status(&why);
            said.clone_from(&why);
        }
        agent.state_mut().disconnected(why);
        finish_reload(agent);
        agent.tell();
        let arrived = arrival.get_or_insert_with(|| Arrival::watch(socket));
        tokio::select! {
            () = sleep(back_off.next_wait()) => {}
            () = arrived.next() => back_off.reset(),
            () = stop.cancelled() => break,
        }
    }
    if had_session {
        remove_what_is_left(socket).await;
    }
    Ok(())
}

/// Removes the policy of a session that is over, for an agent that ends. The helper may come back in a moment.
async fn remove_what_is_left(socket: &Path) {
    let mut why = "the helper does not answer".to_owned();
    let removing = async {
        loop {
            match Client::connect(socket).await {
                Ok(mut client) => match take_over_and_remove(&mut client).await {
                    Ok(()) => return Ok(()),
                    // Another agent has taken it over.
                    Err(CallError::Fault(fault)) if is_held(&fault) => {
                        return Ok(());
                    }
                    Err(CallError::Fault(fault)) => return Err(refusal(&fault, false)),
                    Err(error) => why = chain(&error),
                },
                Err(error) => why = unreachable(socket, &error),
            }
            sleep(AGAIN).await;
        }
    };
    match timeout(FAREWELL, removing).await {
        Ok(Ok(())) => {}
        Ok(Err(why)) => say_that_it_stays(&why),
        Err(_) => say_that_it_stays(&why),
    }
}

/// Removes what the helper keeps of an earlier session, which only a session can do.
async fn take_over_and_remove(client: &mut Client) -> Result<(), CallError> {
    let nothing = wire::ReplacePolicy {
        proxies: Vec::new(),
        bypass: Vec::new(),
        assignments: Vec::new(),
        gateway: None,
    };
    let _: ReplacePolicy_Reply = client
        .call("org.cgtproxy.Helper.ReplacePolicy", nothing)
        .await?;
    remove(client).await
}

/// Whether another agent has the session.
fn is_held(fault: &Fault) -> bool {
    matches!(fault.kind(), ErrorKind::SessionExists(_))
}

/// Tells when a socket appears, so that a helper that starts is found at once.
struct Arrival(Option<Events>);

impl Arrival {
    fn watch(socket: &Path) -> Self {
        let watch = || {
            let inotify = Inotify::init().ok()?;
            let mask = WatchMask::CREATE | WatchMask::MOVED_TO | WatchMask::ONLYDIR;
            inotify.watches().add(socket.parent()?, mask).ok()?;
            Events::new(inotify).ok()
        };
        Self(watch())
    }

    /// Waits for ever if there is nothing to watch: then there is the time.
    async fn next(&mut self) {
        if let Some(events) = &mut self.0
            && events.next().await.is_ok()
        {
            return;
        }
        self.0 = None;
        std::future::pending().await
    }
}
