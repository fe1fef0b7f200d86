//! One session with the helper: says what there is to say, one call at a time.

use std::rc::Rc;
use std::time::Duration;

use cgtproxy_proto::back_off::BackOff;
use cgtproxy_proto::client::{CallError, Client};
use cgtproxy_proto::helper::{ErrorKind, RemovePolicy_Args, RemovePolicy_Reply, SkipReason};
use cgtproxy_proto::path::ControlGroupPath;
use cgtproxy_proto::service::Fault;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::Level;

use super::announce::{announce, finish_reload, say_problem};
use super::text::refusal;
use super::wire::{Reply, send};
use crate::ledger::Call;
use crate::policy::Start;
use crate::said::{Kind, say};
use crate::state::{Agent, Link, Refused, Relay, Source};
use crate::text::{chain, printable};
use crate::timing::sleep_until;
use crate::view;

/// How long to wait before making a call again that the helper refused, at first and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));

/// How long the helper may take to remove the policy of an agent that ends, or to come back to do so. If it takes
/// longer, the policy stays for the grace, and then as the administrator's `on-agent-loss` says.
pub(super) const FAREWELL: Duration = Duration::from_secs(2);

/// How a session ended.
pub(super) enum End {
    /// The agent stops.
    Stopped,
    /// Another agent of the user has the session.
    SessionExists,
    /// The connection is of no use any more, for this reason.
    Lost(String),
}

/// One connection to the helper.
pub(super) struct Session<'a> {
    agent: &'a Agent,
    client: Client,
    /// The helper has taken a policy.
    established: bool,
}

impl<'a> Session<'a> {
    /// A session that has not said anything yet.
    pub(super) fn new(agent: &'a Agent, client: Client) -> Self {
        Self {
            agent,
            client,
            established: false,
        }
    }

    /// Whether the helper has taken a policy in this session.
    pub(super) fn is_established(&self) -> bool {
        self.established
    }

    /// Keeps the helper in step until the session ends.
    pub(super) async fn run(&mut self, stop: &CancellationToken) -> End {
        let mut back_off = BackOff::new(RETRY);
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
                    () = sleep_until(postponed) => continue,
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
                    back_off.reset();
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
                        () = wait_for_news(self.agent, back_off.next_wait(), &source) => {}
                        () = self.client.closed() => return lost(&CallError::Closed),
                        () = stop.cancelled() => return self.remove_policy().await,
                    }
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
            let why = view::sentence(&reason);
            // It was gone before the helper looked, as short-lived ones are.
            let is_news =
                reason != SkipReason::missing && state.said.is_news(Kind::PassedOver(why), &path);
            say(is_news, Level::WARN, || {
                let name = state.subtree.shown(&path);
                format!("the helper passed over '{name}': {why}")
            });
        }
        self.agent.tell();
    }

    /// Whether a refusal only tells how many control groups the helper takes, which was not known. Then the next call
    /// keeps to it.
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
            // The helper closes the connection after these, or has forgotten the session: the next one begins anew.
            ErrorKind::TooManyConnections(_)
            | ErrorKind::TooManyBytes(_)
            | ErrorKind::MessageTooLarge(_)
            | ErrorKind::NoSession(_) => return Some(End::Lost(why)),
            _ if fault.is_permission_denied() => return Some(End::Lost(why)),
            _ => {}
        }
        let passing = matches!(
            kind,
            ErrorKind::KernelRefused(_) | ErrorKind::NoMarksLeft(_) | ErrorKind::NoUserManager(_)
        );
        let (refused, repeated) = {
            let mut state = self.agent.state_mut();
            let repeated = state.was_refused(&why);
            (state.refused(call, &why, passing, source), repeated)
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

    /// Tells the service manager how it stands, since there is nothing to tell the helper.
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

    /// Removes the policy that this session has established. What an earlier session has left is not removed.
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

/// Returns after `back_off`, or when another configuration than `source` is to be in force.
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

fn lost(error: &CallError) -> End {
    End::Lost(match error {
        CallError::Closed => "the helper closed the connection".to_owned(),
        error => format!("lost the helper: {}", chain(error)),
    })
}

/// Ends this connection's session, and its policy with it.
pub(super) async fn remove(client: &mut Client) -> Result<(), CallError> {
    let call = client.call("org.cgtproxy.Helper.RemovePolicy", RemovePolicy_Args {});
    call.await.map(|RemovePolicy_Reply {}| ())
}

/// Logs that the agent's policy outlives the agent.
pub(super) fn say_that_it_stays(why: &str) {
    tracing::warn!(
        "the policy could not be removed: {why}; what becomes of it is up to 'on-agent-loss' in helper.yaml"
    );
}
