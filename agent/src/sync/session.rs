//! The session with the helper: connects, says what there is to say, one call at a time, and starts
//! over when the connection breaks.

use std::fmt::Display;
use std::io;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use cgtproxy_proto::client::{CallError, Client};
use cgtproxy_proto::helper::{
    ErrorKind, Gateway, RemovePolicy_Args, RemovePolicy_Reply, ReplacePolicy_Reply, SkipReason,
    Skipped, UpdateAssignments_Reply,
};
use cgtproxy_proto::path::ControlGroupPath;
use cgtproxy_proto::service::Fault;
use inotify::{Inotify, WatchMask};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::Call;
use super::proxy::proxy;
use super::wire;
use crate::config::Config;
use crate::notify;
use crate::policy::Start;
use crate::relay::Relay;
use crate::said::Kind;
use crate::state::{Agent, Link, Refused, Source};
use crate::text::{chain, count, printable};
use crate::view;
use crate::watch::inotify::Events;

/// How long to wait before connecting again: doubled from one to the other.
const RECONNECT: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(2));

/// How long to wait before saying again what the helper refused: doubled from one to the other.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));

/// How long a starting agent waits for another one to go. One that was killed a moment ago may not be
/// gone for the helper yet.
const SUCCESSION: Duration = Duration::from_secs(2);

/// How long the helper may take to remove the policy of an agent that ends, or to come back to do so. If it takes
/// longer, the policy stays for the grace, and then as the administrator's `on-agent-loss` says.
const FAREWELL: Duration = Duration::from_secs(2);

/// How long an agent that ends waits before connecting again.
const AGAIN: Duration = Duration::from_millis(20);

/// Why there can be no session.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another agent has it.
    #[error("another agent of this user is connected to the helper")]
    SessionExists,
}

/// How a session ended.
enum End {
    /// As it was told to.
    Stopped,
    /// Another agent has it.
    SessionExists,
    /// The connection is no more.
    Lost(String),
}

/// Keeps the helper in step until `stop` is cancelled; then removes the policy, even if the helper is just restarting.
/// `early` is a connection that is there already.
///
/// # Errors
/// If another agent of the user has the session when this one starts. One that comes later, while
/// the helper is away, is waited out.
pub async fn run(
    agent: &Agent,
    socket: &Path,
    mut early: Option<Client>,
    stop: &CancellationToken,
) -> Result<(), Error> {
    let started = Instant::now();
    let mut had_session = false;
    let mut back_off = RECONNECT.0;
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
                    let mut session = Session { agent, client, established: false };
                    let end = session.run(stop).await;
                    if session.established {
                        had_session = true;
                        back_off = RECONNECT.0;
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
            () = sleep(back_off) => back_off = (back_off * 2).min(RECONNECT.1),
            () = arrived.next() => back_off = RECONNECT.0,
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

/// What is kept of an earlier session can be removed by another one alone.
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

async fn remove(client: &mut Client) -> Result<(), CallError> {
    let call = client.call("org.cgtproxy.Helper.RemovePolicy", RemovePolicy_Args {});
    call.await.map(|RemovePolicy_Reply {}| ())
}

/// Says of an agent's policy that it outlives the agent.
fn say_that_it_stays(why: &str) {
    tracing::warn!(
        "the policy could not be removed: {why}; what becomes of it is up to 'on-agent-loss' in helper.yaml"
    );
}

fn unreachable(socket: &Path, error: &io::Error) -> String {
    let socket = printable(&socket.to_string_lossy());
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            format!("no helper listens on {socket}")
        }
        _ => format!("can't connect to the helper at {socket}: {}", chain(error)),
    }
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

/// One connection.
struct Session<'a> {
    agent: &'a Agent,
    client: Client,
    /// The helper has taken a policy.
    established: bool,
}

impl Session<'_> {
    async fn run(&mut self, stop: &CancellationToken) -> End {
        let mut back_off = RETRY.0;
        loop {
            let (call, source, relay, postponed) = {
                let mut state = self.agent.state_mut();
                state.try_postponed();
                let source = state.source().clone();
                let call = state.next_call();
                // Only a whole policy says where the relay listens.
                let relay = match call {
                    Some(Call::Replace(_)) => state.relay.clone(),
                    _ => Relay::default(),
                };
                (call, source, relay, state.postponed_until())
            };
            let Some(call) = call else {
                self.settled();
                tokio::select! {
                    () = self.agent.work() => continue,
                    () = until(postponed) => continue,
                    () = self.client.closed() => return lost(&CallError::Closed),
                    () = stop.cancelled() => return self.remove_policy().await,
                }
            };
            tracing::trace!("telling the helper: {call:?}");
            let calling = self.agent.calling();
            let answer = tokio::select! {
                answer = send(&mut self.client, &call, &source.config, &relay) => answer,
                // The connection is of no use in the middle of a call. The helper ends the session
                // with it, and may have done by then what it was asked.
                () = async { stop.cancelled().await; sleep(FAREWELL).await } => {
                    say_that_it_stays("the helper does not answer");
                    return End::Stopped;
                }
            };
            drop(calling);
            match answer {
                Ok(reply) => {
                    back_off = RETRY.0;
                    self.acknowledged(&call, reply, &source);
                    // What has happened meanwhile goes out with the next call.
                    tokio::task::yield_now().await;
                }
                Err(CallError::Fault(fault)) => {
                    if self.learns_limit(&fault) {
                        continue;
                    }
                    if let Some(end) = self.refused(&call, &source, &fault) {
                        return end;
                    }
                    // There is something else to be said.
                    let other = !Rc::ptr_eq(self.agent.state().source(), &source);
                    if other || !self.agent.state().has_root() {
                        continue;
                    }
                    tokio::select! {
                        () = wait_for_news(self.agent, back_off, &source) => {}
                        () = self.client.closed() => return lost(&CallError::Closed),
                        () = stop.cancelled() => return self.remove_policy().await,
                    }
                    back_off = (back_off * 2).min(RETRY.1);
                }
                Err(error) => return lost(&error),
            }
        }
    }

    fn acknowledged(&mut self, call: &Call, reply: Reply, source: &Rc<Source>) {
        let skipped = reply
            .skipped
            .into_iter()
            .filter_map(|s| Some((ControlGroupPath::from_wire(&s.controlGroup).ok()?, s.reason)))
            .collect();
        let (news, mended) = {
            let mut state = self.agent.state_mut();
            state.refusal = None;
            let postponed = state.is_postponed();
            let news = state.acknowledged(call, reply.generation, skipped, source);
            (news, postponed && !state.is_postponed())
        };
        if mended {
            tracing::info!("the configuration that was refused is in force");
        }
        self.established = true;
        for (path, reason) in news {
            let mut state = self.agent.state_mut();
            let (name, why) = (state.subtree.shown(&path), view::sentence(&reason));
            // It was gone before the helper looked, as short-lived ones are.
            let is_news =
                reason != SkipReason::missing && state.said.is_news(Kind::PassedOver(why), &path);
            match is_news {
                true => tracing::warn!("the helper passed over '{name}': {why}"),
                false => tracing::debug!("the helper passed over '{name}': {why}"),
            }
        }
        self.agent.tell();
    }

    /// Whether a refusal only says how many control groups there is room for, which nobody knew. What there is room for
    /// is said at once, and what has gone is removed.
    fn learns_limit(&self, fault: &Fault) -> bool {
        let ErrorKind::TooManyControlGroups(Some(args)) = fault.kind() else {
            return false;
        };
        let limit = usize::try_from(args.limit);
        limit.is_ok_and(|limit| self.agent.state_mut().bound(limit))
    }

    /// Deals with a refusal; returns the session's end if it is one.
    fn refused(&mut self, call: &Call, source: &Rc<Source>, fault: &Fault) -> Option<End> {
        let kind = fault.kind();
        let why = refusal(fault, source.config.rules.start == Start::Closed);
        match kind {
            ErrorKind::SessionExists(_) => return Some(End::SessionExists),
            // The helper closes the connection after these.
            ErrorKind::TooManyConnections(_)
            | ErrorKind::TooManyBytes(_)
            | ErrorKind::MessageTooLarge(_) => return Some(End::Lost(why)),
            _ if fault.is_permission_denied() => return Some(End::Lost(why)),
            ErrorKind::NoSession(_) => {
                // It has forgotten us, and takes everything anew.
                let mut state = self.agent.state_mut();
                state.refused(call, &why, true, source);
                state.disconnected(why);
                return None;
            }
            _ => {}
        }
        let passing = matches!(
            kind,
            ErrorKind::KernelRefused(_) | ErrorKind::NoMarksLeft(_) | ErrorKind::NoUserManager(_)
        );
        let (refused, repeated) = {
            let mut state = self.agent.state_mut();
            let said = [state.refusal.as_deref(), state.postponed_why()];
            let repeated = said.into_iter().flatten().any(|said| said == why);
            let refused = state.refused(call, &why, passing, source);
            if refused == Refused::Again {
                if let Link::Broken(reason) = &mut state.link {
                    reason.clone_from(&why);
                }
                state.refusal = Some(why.clone());
            }
            (refused, repeated)
        };
        match refused {
            Refused::TakenBack if repeated => {}
            Refused::TakenBack => {
                let file = source.file.as_deref().map(|f| f.to_string_lossy());
                let file = printable(&file.unwrap_or_default());
                let again = if passing {
                    " until it is tried again"
                } else {
                    ""
                };
                tracing::error!(
                    "can't put {file} into force: {why}; the old configuration stays{again}"
                );
            }
            Refused::Overtaken => {
                tracing::info!("{why}; trying the configuration that has come meanwhile");
                return None;
            }
            Refused::Again if repeated => {}
            Refused::Again => {
                tracing::error!("{why}; trying again");
                say_problem(self.agent, &why);
            }
        }
        finish_reload(self.agent);
        self.agent.tell();
        None
    }

    /// There is nothing to say.
    fn settled(&self) {
        // What has room after the next call has it by now.
        let news = self.agent.state_mut().news_of_shortage();
        for why in news {
            tracing::warn!("{why}");
        }
        let (settled, awaited) = {
            let state = self.agent.state();
            (state.is_settled(), state.awaited().map(Link::Waiting))
        };
        if let Some(waiting) = awaited {
            if self.agent.state().link != waiting {
                let why = waiting.problem().unwrap_or_default();
                // What is wrong with a configuration was logged when it was read.
                if self.agent.state().awaited_configuration().is_none() {
                    tracing::info!("{why}");
                }
                say_problem(self.agent, &why);
                self.agent.state_mut().link = waiting;
                self.agent.tell();
            }
        } else if settled {
            // Until the relay has said where it listens, what goes to it is refused.
            if self.agent.state().awaits_relay() {
                return;
            }
            announce(self.agent);
        }
        finish_reload(self.agent);
    }

    /// Ends what this session has established. What an earlier one has left is not this one's to remove.
    async fn remove_policy(&mut self) -> End {
        if !self.established {
            return End::Lost("stopped before the helper took anything".to_owned());
        }
        match timeout(FAREWELL, remove(&mut self.client)).await {
            Ok(Ok(())) => return End::Stopped,
            Ok(Err(CallError::Fault(fault))) => say_that_it_stays(&refusal(&fault, false)),
            Ok(Err(error)) => return lost(&error),
            Err(_) => say_that_it_stays("the helper does not answer"),
        }
        End::Stopped
    }
}

/// Returns at that time; never if there is none.
async fn until(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// Returns after a while, or when there is another configuration.
async fn wait_for_news(agent: &Agent, back_off: Duration, source: &Rc<Source>) {
    let time = sleep(back_off);
    tokio::pin!(time);
    loop {
        tokio::select! {
            () = &mut time => return,
            () = agent.work() => {
                if !Rc::ptr_eq(agent.state().source(), source) {
                    return;
                }
            }
        }
    }
}

/// Tells the service manager why not all is in force. When it is, that is said again.
fn say_problem(agent: &Agent, why: &str) {
    notify::status(why);
    agent.state_mut().announced = false;
}

/// Says once that all is in force, and at the end of each reload.
fn announce(agent: &Agent) {
    let text = {
        let mut state = agent.state_mut();
        let reloaded = std::mem::take(&mut state.reloading);
        if std::mem::replace(&mut state.announced, true) && !reloaded {
            return;
        }
        let without = state.ledger().shortage().map_or(0, |(count, ..)| count);
        let mapped = state.tree().cover().count().saturating_sub(without);
        let all = count(state.tree().len(), "control group");
        format!("{all}, {mapped} of them with a verdict of their own")
    };
    tracing::info!("the policy is in force: {text}");
    notify::status(&format!("In force: {text}"));
    notify::ready();
    agent.state_mut().ready = true;
}

/// Ends a reload, if one is under way, as far as the service manager is concerned.
fn finish_reload(agent: &Agent) {
    if std::mem::take(&mut agent.state_mut().reloading) {
        notify::ready();
    }
}

fn lost(error: &CallError) -> End {
    End::Lost(match error {
        CallError::Closed => "the helper closed the connection".to_owned(),
        error => format!("lost the helper: {}", chain(error)),
    })
}

/// What both methods reply.
struct Reply {
    generation: i64,
    skipped: Vec<Skipped>,
}

async fn send(
    client: &mut Client,
    call: &Call,
    config: &Config,
    relay: &Relay,
) -> Result<Reply, CallError> {
    match call {
        Call::Replace(assign) => {
            let arguments = wire::ReplacePolicy {
                proxies: config
                    .proxies
                    .iter()
                    .map(|p| proxy(p, &config.fake_addresses, relay))
                    .collect(),
                bypass: config.bypass.iter().map(ToString::to_string).collect(),
                assignments: wire::assignments(assign),
                gateway: config.gateway.as_ref().map(|gateway| Gateway {
                    interfaces: gateway.interfaces.iter().map(ToString::to_string).collect(),
                    proxy: gateway.proxy.to_string(),
                }),
            };
            let reply: ReplacePolicy_Reply = client
                .call("org.cgtproxy.Helper.ReplacePolicy", arguments)
                .await?;
            Ok(Reply {
                generation: reply.generation,
                skipped: reply.skipped,
            })
        }
        Call::Update { assign, remove } => {
            let arguments = wire::UpdateAssignments {
                assign: wire::assignments(assign),
                remove: remove.iter().map(|path| path.as_wire()).collect(),
            };
            let reply: UpdateAssignments_Reply = client
                .call("org.cgtproxy.Helper.UpdateAssignments", arguments)
                .await?;
            Ok(Reply {
                generation: reply.generation,
                skipped: reply.skipped,
            })
        }
    }
}

/// That a user has more control groups with a verdict of their own than one may have, for a person.
#[must_use]
pub fn too_many_control_groups(limit: impl Display, closed: bool) -> String {
    match closed {
        true => format!(
            "the administrator allows no more than {limit} control groups with a verdict of their \
             own per user, and with 'start: closed' each has one that rules could decide otherwise \
             than its slice: those that are too many stay without network; tie rules to slices \
             with '^', or let packets leave at once with 'start: open'"
        ),
        false => format!(
            "the administrator allows no more than {limit} control groups with a verdict of their \
             own per user: let rules match slices rather than everything in them"
        ),
    }
}

/// An error of the helper for a person. `closed`: the configuration says `start: closed`.
fn refusal(fault: &Fault, closed: bool) -> String {
    use ErrorKind as Kind;
    let text = |text: Option<&str>| printable(text.unwrap_or_default());
    let limit = |limit: Option<i64>| limit.map_or_else(|| "so many".to_owned(), |n| n.to_string());
    match fault.kind() {
        Kind::NoUserManager(args) => format!(
            "the helper finds no control group {}: is there a user manager, and is the control \
             group root the same for both?",
            text(args.as_ref().map(|args| &*args.controlGroup))
        ),
        Kind::ProxyExists(args) => format!(
            "two proxies are named '{}'",
            text(args.as_ref().map(|args| &*args.name))
        ),
        Kind::UnknownProxy(args) => format!(
            "the helper knows no proxy '{}'",
            text(args.as_ref().map(|args| &*args.name))
        ),
        Kind::TooManyProxies(args) => format!(
            "the administrator allows no more than {} proxies per user",
            limit(args.map(|args| args.limit))
        ),
        Kind::TooManyBypassEntries(args) => format!(
            "the administrator allows no more than {} bypass entries per user",
            limit(args.map(|args| args.limit))
        ),
        Kind::TooManyControlGroups(args) => {
            too_many_control_groups(limit(args.map(|args| args.limit)), closed)
        }
        Kind::TooManyConnections(args) => format!(
            "the administrator allows no more than {} connections per user",
            limit(args.map(|args| args.limit))
        ),
        Kind::MessageTooLarge(args) => format!(
            "the helper takes no messages of more than {} bytes",
            limit(args.map(|args| args.limit))
        ),
        Kind::TooManyBytes(args) => format!(
            "the helper holds no more than {} bytes of unfinished messages per user",
            limit(args.map(|args| args.limit))
        ),
        Kind::NoMarksLeft(_) => {
            "all packet marks of the machine's range are in use; those of proxies that are renamed or \
             replaced become free only when these are taken out first, or the agent is stopped and started"
                .to_owned()
        }
        Kind::KernelRefused(args) => format!(
            "the kernel refused the policy: {}",
            text(args.as_ref().map(|args| &*args.message))
        ),
        Kind::NoSession(_) => "the helper has ended the session".to_owned(),
        _ if fault.is_permission_denied() => {
            "the administrator does not allow this user to use the helper".to_owned()
        }
        _ => format!(
            "the helper refused with {} {}",
            printable(&fault.name),
            printable(&fault.parameters.to_string())
        ),
    }
}
