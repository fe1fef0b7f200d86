//! The agent itself: its tasks, from start to end.

use std::cell::RefCell;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use cgtproxy_proto::client::Client;
use cgtproxy_proto::scheduling;
use cgtproxy_proto::socket::{self, Socket};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::LocalSet;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::config::{ConfigFile, LoadError};
use crate::notify;
use crate::relay;
use crate::reload::{self, Loader};
use crate::server;
use crate::state::Agent;
use crate::subtree::Subtree;
use crate::sync;
use crate::text::chain;
use crate::watch;

/// How soon a service tries again to listen where another agent does.
const IN_USE: Duration = Duration::from_secs(2);

/// What an agent needs to know.
#[derive(Debug)]
pub(crate) struct Options {
    /// The control groups it is in charge of.
    pub subtree: Subtree,
    /// Its configuration.
    pub config: ConfigFile,
    /// The helper's socket.
    pub helper: PathBuf,
    /// Its own.
    pub socket: PathBuf,
    /// The relay's.
    pub relay: PathBuf,
}

/// Why the agent can't run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The configuration that the user named is not there.
    #[error(transparent)]
    Config(#[from] LoadError),
    /// Another agent is there, or the socket can't be made.
    #[error(transparent)]
    Socket(#[from] socket::Error),
    /// Nothing tells of control groups.
    #[error(transparent)]
    Watch(#[from] watch::Error),
    /// Another agent has the session with the helper.
    #[error(transparent)]
    Session(#[from] sync::Error),
    /// The kernel gives no signals or no event queue.
    #[error("can't start")]
    Start(#[source] io::Error),
}

/// Runs the agent until SIGTERM or SIGINT comes, or SIGUSR1, which leaves the policy to the next one.
///
/// # Errors
/// If it can't start, or can't go on.
pub(crate) fn run(options: Options) -> Result<(), Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Error::Start)?;
    LocalSet::new().block_on(&runtime, serve(options))
}

/// Listens on the agent's own socket; none if that can't be made. A service waits until no other agent listens on it:
/// systemd would start it again and again, each time for nothing.
async fn listen(path: &Path) -> Result<Option<Socket>, socket::Error> {
    let is_service = std::env::var_os(notify::VARIABLE).is_some();
    let mut said = false;
    loop {
        match server::listen(path) {
            Ok(socket) => return Ok(Some(socket)),
            Err(error @ socket::Error::InUse { .. }) if is_service => {
                if !std::mem::replace(&mut said, true) {
                    let why = chain(&error);
                    tracing::warn!("{why}; waiting until it ends");
                    notify::status(&why);
                }
                sleep(IN_USE).await;
            }
            Err(error @ socket::Error::InUse { .. }) => return Err(error),
            // cgtproxy-exec and status do without the agent's socket, applications do not do without rules.
            Err(error) => {
                tracing::warn!("{}; cgtproxy-exec and status don't work", chain(&error));
                return Ok(None);
            }
        }
    }
}

async fn serve(options: Options) -> Result<(), Error> {
    if let Err(error) = scheduling::take_short_turns() {
        tracing::debug!("can't ask for short slices: {error}");
    }
    // From here on no signal ends the program by itself.
    let mut terminate = signal(SignalKind::terminate()).map_err(Error::Start)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::Start)?;
    let mut hand_over = signal(SignalKind::user_defined1()).map_err(Error::Start)?;
    let hangup = signal(SignalKind::hangup()).map_err(Error::Start)?;

    // It may take long. What follows is about the time after that.
    let socket = tokio::select! {
        socket = listen(&options.socket) => socket?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
        _ = hand_over.recv() => return Ok(()),
    };
    // One that its socket starts has the time until there is something to say.
    let helper = Client::connect(&options.helper).await.ok();
    let (loader, source, file_error) = Loader::start(options.config)?;
    if file_error.is_some() {
        tracing::error!(
            "waiting for the configuration to be fixed; until then nothing is told to the helper"
        );
    }
    let agent = Rc::new(Agent::new(options.subtree.clone(), source, file_error));
    if let Some(awaited) = agent.state().awaited_configuration() {
        notify::status(&awaited.to_string());
    }
    let monitor = agent.state().source().config.monitor;
    let (mut sources, watcher) = watch::open(options.subtree, monitor);
    let watcher = Rc::new(RefCell::new(watcher));
    sources.start(&watcher, &agent).await?;

    let stop = CancellationToken::new();
    let session = sync::run(&agent, &options.helper, helper, &stop);
    tokio::pin!(session);
    let served = async {
        match &socket {
            Some(socket) => server::run(socket, &agent, &watcher).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        // In this order: the session tells of what the sources have just found.
        biased;
        () = sources.run(&watcher, &agent) => {}
        ended = &mut session => return ended.map_err(Error::Session),
        () = relay::run(&agent, &options.relay) => {}
        ended = reload::run(loader, &agent, &watcher, hangup) => ended.map_err(Error::Start)?,
        () = served => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        _ = hand_over.recv() => {
            tracing::info!("stopping; the rules stay for the agent that comes next");
            notify::stopping();
            // The connection just ends, and the helper keeps the policy for its grace.
            return Ok(());
        }
    }
    tracing::info!("stopping");
    notify::stopping();
    stop.cancel();
    session.await.map_err(Error::Session)
}
