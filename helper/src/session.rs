//! One connection: the methods of `org.cgtproxy.Helper` on behalf of its peer.
//!
//! A method takes its parameters apart, validates their form, and hands typed values on; what goes
//! wrong is an [`Error`] until one place turns it into a declared one.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use cgtproxy_proto::helper::{
    self as wire, Diagnose_Reply, FindRedirected_Args, FindRedirected_Reply, GetStatus_Reply,
    GetStatus_Reply_session, RemovePolicy_Reply, ReplacePolicy_Args, ReplacePolicy_Reply,
    UpdateAssignments_Args, UpdateAssignments_Reply,
};
use cgtproxy_proto::service::{
    Answer, Fault, Identity, Parameters, Service, no_parameters, parameters, reply,
};
use cgtproxy_proto::text::chain;
use rustix::time::{ClockId, clock_gettime};
use serde_json::json;

use crate::bypass;
use crate::cgroup::{Subtree, Unavailable, subtree_path};
use crate::guarded::PeerProbe;
use crate::kernel::{Kernel, Linux};
use crate::nft::MarkWriter;
use crate::peer::{Peer, Uid};
use crate::quota::Slot;
use crate::registry::{PolicyRequest, Refused};
use crate::said::Said;
use crate::state::{self, ConnectionId, Holder, State};

pub(crate) mod convert;
mod lists;

/// Why a call is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A parameter has a value that it can't have.
    #[error("the parameter '{0}' is invalid")]
    Parameter(String),
    /// There is no user@UID.service, or it is not the peer's.
    #[error("there is no {0}")]
    NoUserManager(String),
    /// The state refuses.
    #[error(transparent)]
    State(#[from] state::Error),
}

/// One connection's side of the interface.
pub(crate) struct Session<K = Linux> {
    peer: Peer,
    slot: Slot,
    id: ConnectionId,
    state: Rc<RefCell<State<K>>>,
    /// None where nobody hangs up.
    peer_probe: Option<PeerProbe>,
    /// What was last said of the kernel's refusals.
    warned: RefCell<Said>,
}

impl<K: Kernel> Session<K> {
    /// Serves `peer`, whose connection is `id`.
    #[must_use]
    pub(crate) fn new(
        peer: Peer,
        slot: Slot,
        id: ConnectionId,
        state: Rc<RefCell<State<K>>>,
    ) -> Self {
        Self {
            peer,
            slot,
            id,
            state,
            peer_probe: None,
            warned: RefCell::default(),
        }
    }

    /// Has the session look whether its peer is still there, before a policy comes into force.
    #[must_use]
    pub(crate) fn with_peer_probe(mut self, probe: PeerProbe) -> Self {
        self.peer_probe = Some(probe);
        self
    }

    /// Refuses to bring into force what somebody wanted who is gone: the call may have waited for this helper to start,
    /// and an agent that was stopped meanwhile leaves nothing.
    fn check_peer_is_there(&self) -> Result<(), Error> {
        match self.peer_probe.as_ref().is_some_and(PeerProbe::is_gone) {
            true => Err(state::Error::NoSession.into()),
            false => Ok(()),
        }
    }

    /// The parameters of a policy that may be somebody else's to replace, or larger than a user may have: only what may be
    /// brought into force is taken apart.
    fn policy_arguments(&self, arguments: Parameters<'_>) -> Result<ReplacePolicy_Args, Fault> {
        let may = self.state.borrow().may_replace(self.peer.uid(), self.id);
        may.map_err(|error| self.fault(error.into()))?;
        if arguments.length() > lists::LOOKED_AT {
            let lists: lists::OfPolicy = parameters(arguments)?;
            if lists.gateway.is_some() && self.peer.uid() != Uid::ROOT {
                return Err(Fault::invalid_parameter("gateway"));
            }
            self.admit(lists.proxies.0, lists.bypass.0, lists.assignments.0)?;
        }
        let policy: ReplacePolicy_Args = parameters(arguments)?;
        let (proxies, bypass) = (policy.proxies.len(), policy.bypass.len());
        self.admit(proxies, bypass, policy.assignments.len())?;
        Ok(policy)
    }

    /// The parameters of a change of some verdicts, if this connection holds the policy. What is removed is no more than
    /// what a user may have either.
    fn update_arguments(&self, arguments: Parameters<'_>) -> Result<UpdateAssignments_Args, Fault> {
        let holds = self.state.borrow().holds(self.peer.uid(), self.id);
        holds.map_err(|error| self.fault(error.into()))?;
        if arguments.length() > lists::LOOKED_AT {
            let lists: lists::OfUpdate = parameters(arguments)?;
            self.admit(0, 0, lists.assign.0.max(lists.remove.0))?;
        }
        let update: UpdateAssignments_Args = parameters(arguments)?;
        self.admit(0, 0, update.assign.len().max(update.remove.len()))?;
        Ok(update)
    }

    /// Refuses lists that are longer than what a user may have.
    fn admit(&self, proxies: usize, bypass: usize, cgroups: usize) -> Result<(), Fault> {
        let admitted = self
            .state
            .borrow()
            .registry()
            .admit(proxies, bypass, cgroups);
        admitted.map_err(|refused| self.fault(state::Error::Refused(refused).into()))
    }

    fn replace_policy(&self, arguments: ReplacePolicy_Args) -> Result<ReplacePolicy_Reply, Error> {
        self.check_peer_is_there()?;
        let uid = self.peer.uid();
        let mut state = self.state.borrow_mut();
        let assignments = convert::assignments(uid, "assignments", arguments.assignments)?;
        let gateway = arguments
            .gateway
            .map(|gateway| convert::gateway(uid, gateway))
            .transpose()?;
        let mut proxies = Vec::new();
        for (index, proxy) in arguments.proxies.into_iter().enumerate() {
            let invalid = |field| Error::Parameter(format!("proxies[{index}].{field}"));
            proxies.push(convert::proxy(uid, proxy).map_err(invalid)?);
        }
        let bypass = bypass::parse(&arguments.bypass)
            .map_err(|index| Error::Parameter(format!("bypass[{index}]")))?;
        let subtree = self.subtree(&state)?;
        let policy = PolicyRequest {
            subtree: subtree.top(),
            proxies,
            bypass_entries: arguments.bypass.len(),
            bypass,
            gateway,
        };
        let (generation, skipped) = state.replace(uid, self.id, &subtree, policy, assignments)?;
        self.forget_refusals();
        Ok(ReplacePolicy_Reply {
            generation: convert::number(generation),
            skipped: convert::skipped_reply(skipped),
        })
    }

    fn update_assignments(
        &self,
        arguments: UpdateAssignments_Args,
    ) -> Result<UpdateAssignments_Reply, Error> {
        self.check_peer_is_there()?;
        let mut state = self.state.borrow_mut();
        let assign = convert::assignments(self.peer.uid(), "assign", arguments.assign)?;
        let remove = convert::removals(&arguments.remove, &assign)?;
        let subtree = self.subtree(&state)?;
        let (generation, skipped) =
            state.update(self.peer.uid(), self.id, &subtree, assign, remove)?;
        self.forget_refusals();
        Ok(UpdateAssignments_Reply {
            generation: convert::number(generation),
            skipped: convert::skipped_reply(skipped),
        })
    }

    fn find_redirected(
        &self,
        arguments: &FindRedirected_Args,
    ) -> Result<FindRedirected_Reply, Error> {
        let address = |name: &str, text: &str| {
            let address = text.parse::<SocketAddr>();
            address.map_err(|_| Error::Parameter(name.to_owned()))
        };
        let listener = address("listener", &arguments.listener)?;
        let client = address("client", &arguments.client)?;
        let mut state = self.state.borrow_mut();
        let (source, destination) = state.find_redirected(self.peer.uid(), listener, client)?;
        self.forget_refusals();
        Ok(FindRedirected_Reply {
            source: source.to_string(),
            destination: destination.to_string(),
        })
    }

    fn remove_policy(&self) -> Result<RemovePolicy_Reply, Error> {
        self.state.borrow_mut().remove(self.peer.uid(), self.id)?;
        Ok(RemovePolicy_Reply {})
    }

    fn get_status(&self) -> GetStatus_Reply {
        let state = self.state.borrow();
        let uid = self.peer.uid();
        let policy = state.registry().policy(uid);
        GetStatus_Reply {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            session: match state.holder(uid) {
                Holder::None => GetStatus_Reply_session::none,
                Holder::Connection(_) => GetStatus_Reply_session::active,
                Holder::Grace(_) => GetStatus_Reply_session::grace,
                Holder::Kept(_) => GetStatus_Reply_session::kept,
            },
            generation: convert::number(policy.map_or(0, |policy| policy.generation)),
            proxies: policy.map_or_else(Vec::new, |policy| {
                let proxies = policy.layout.proxies.iter();
                proxies
                    .map(|(name, proxy)| convert::proxy_reply(name, &proxy.settings))
                    .collect()
            }),
            controlGroups: convert::number(policy.map_or(0, |policy| policy.cgroups as u64)),
            ipv6: state.ipv6(),
            tableOwned: state.table_owned(),
            proxyUids: state
                .config
                .proxy_uids
                .iter()
                .filter(|&&proxy| proxy != 0 && proxy != uid.value())
                .map(|&proxy| proxy.into())
                .collect(),
            systemPolicy: Some(state.registry().has(Uid::ROOT)),
        }
    }

    fn diagnose(&self) -> Diagnose_Reply {
        let mut state = self.state.borrow_mut();
        let diagnosis = state.diagnose();
        let config = &state.config;
        Diagnose_Reply {
            markMask: config.marks.mask().into(),
            divertBit: config.marks.divert().into(),
            routeTable: config.route_table.into(),
            rulePriority: config.rule_priority.into(),
            missingFeatures: diagnosis
                .missing_features
                .iter()
                .map(|feature| (*feature).to_owned())
                .collect(),
            markWriters: diagnosis.mark_writers.map(|writers| {
                let writer = |writer: MarkWriter| wire::MarkWriter {
                    table: writer.table,
                    bits: writer.bits.into(),
                };
                writers.into_iter().map(writer).collect()
            }),
        }
    }

    fn subtree(&self, state: &State<K>) -> Result<Subtree, Error> {
        let before = state.registry().policy(self.peer.uid());
        let before = before.map(|policy| policy.layout.subtree);
        let subtree = state.root.subtree_again(&self.peer, before);
        subtree.map_err(|why| match why {
            Unavailable::Later => state::Error::Later.into(),
            _ => Error::NoUserManager(subtree_path(self.peer.uid())),
        })
    }

    /// Says once what the kernel refuses, for as long as it refuses nothing else: agents try again and again.
    fn warn(&self, what: &str) {
        if self.warned.borrow_mut().is_news(what) {
            tracing::warn!(uid = self.peer.uid().value(), "{what}");
        }
    }

    /// The kernel has done what was asked: what it refuses next is news.
    fn forget_refusals(&self) {
        self.warned.borrow_mut().works();
    }

    /// The one place where an error becomes what the caller is told.
    fn fault(&self, error: Error) -> Fault {
        let fault = |error: &str, parameters| Fault::new(wire::INTERFACE, error, parameters);
        let limit = |error: &str, limit: usize| fault(error, json!({ "limit": limit }));
        match error {
            Error::Parameter(parameter) => Fault::invalid_parameter(parameter),
            Error::NoUserManager(path) => fault("NoUserManager", json!({ "controlGroup": path })),
            Error::State(state::Error::SessionExists) => fault("SessionExists", json!({})),
            Error::State(state::Error::NoSession) => fault("NoSession", json!({})),
            Error::State(state::Error::NotRedirected) => fault("NotRedirected", json!({})),
            Error::State(state::Error::Conntrack(refusal)) => {
                self.warn(&format!("can't look connections up: {refusal}"));
                fault("KernelRefused", json!({ "message": refusal.to_string() }))
            }
            Error::State(state::Error::Refused(refused)) => match refused {
                Refused::NoPolicy => fault("NoSession", json!({})),
                Refused::ProxyExists(name) => {
                    fault("ProxyExists", json!({ "name": name.as_str() }))
                }
                Refused::UnknownProxy(name) => {
                    fault("UnknownProxy", json!({ "name": name.as_str() }))
                }
                Refused::TooManyProxies(most) => limit("TooManyProxies", most),
                Refused::TooManyBypassEntries(most) => limit("TooManyBypassEntries", most),
                Refused::TooManyControlGroups(most) => limit("TooManyControlGroups", most),
                Refused::NoMarksLeft => fault("NoMarksLeft", json!({})),
            },
            Error::State(error @ (state::Error::Kernel(_) | state::Error::Later)) => {
                let message = chain(&error);
                self.warn(&message);
                fault("KernelRefused", json!({ "message": message }))
            }
        }
    }

    fn dispatch(&self, method: &str, arguments: Parameters<'_>) -> Result<Answer, Fault> {
        let refused = |error| self.fault(error);
        match method {
            "ReplacePolicy" => reply(
                self.replace_policy(self.policy_arguments(arguments)?)
                    .map_err(refused)?,
            ),
            "UpdateAssignments" => reply(
                self.update_assignments(self.update_arguments(arguments)?)
                    .map_err(refused)?,
            ),
            "FindRedirected" => reply(
                self.find_redirected(&parameters(arguments)?)
                    .map_err(refused)?,
            ),
            "RemovePolicy" => {
                no_parameters(arguments)?;
                reply(self.remove_policy().map_err(refused)?)
            }
            "GetStatus" => {
                no_parameters(arguments)?;
                reply(self.get_status())
            }
            "Diagnose" => {
                no_parameters(arguments)?;
                reply(self.diagnose())
            }
            _ => Err(Self::no_such_method(method)),
        }
    }
}

impl<K: Kernel> Service for Session<K> {
    const IDENTITY: Identity = Identity {
        product: "cgtproxy-helper",
        version: env!("CARGO_PKG_VERSION"),
        interface: wire::INTERFACE,
        description: wire::DESCRIPTION,
    };

    fn call(
        &mut self,
        method: &str,
        arguments: Parameters<'_>,
    ) -> impl Future<Output = Result<Answer, Fault>> {
        let before = processor_time();
        let answer = self.dispatch(method, arguments);
        let after = processor_time();
        self.slot.spent(after.saturating_sub(before));
        std::future::ready(answer)
    }

    fn over_budget(&self) -> Option<Fault> {
        let limit = self.state.borrow().config.limits.message_bytes;
        Some(Fault::new(
            wire::INTERFACE,
            "TooManyBytes",
            json!({ "limit": limit }),
        ))
    }

    async fn admit(&mut self, bytes: usize, waited: bool) {
        self.slot.admit(bytes, waited).await;
    }
}

/// How long this thread has had a processor, with what the kernel has done for it.
fn processor_time() -> Duration {
    // Which Miri has no clock for.
    match cfg!(miri) {
        true => Duration::ZERO,
        false => clock_gettime(ClockId::ThreadCPUTime)
            .try_into()
            .unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use cgtproxy_proto::limits::MESSAGE_BYTES;
    use cgtproxy_proto::message::MessageReader;
    use cgtproxy_proto::service::serve;
    use tokio::time::Instant;

    use super::*;
    use crate::config::Limits;
    use crate::kernel::model::{Bed, Model};
    use crate::peer::Account;
    use crate::quota::Quotas;
    use crate::snapshot::Snapshot;

    #[tokio::test(start_paused = true)]
    #[cfg_attr(miri, ignore = "asks how long it has computed")]
    async fn what_a_call_takes_counts() {
        const SAVED: usize = 20;
        let bed = Bed::new().unwrap();
        let quotas = Quotas::new(Limits {
            calls_per_second: 1,
            ..Limits::default()
        });
        let (state, _) = State::new(
            bed.config.clone(),
            bed.root.clone(),
            Model::default(),
            Snapshot::nowhere(),
            BTreeMap::new(),
        )
        .unwrap();
        let slot = quotas.connect(Account::User(bed.uid)).unwrap();
        let mut session = Session::new(
            Peer::for_test(bed.uid),
            slot,
            ConnectionId(1),
            Rc::new(RefCell::new(state)),
        );
        let calls = b"{\"method\":\"org.cgtproxy.Helper.GetStatus\"}\0".repeat(SAVED + 1);
        let start = Instant::now();
        let stream = tokio::io::join(&calls[..], Vec::new());
        let mut messages = MessageReader::new(stream, MESSAGE_BYTES);
        serve(&mut messages, &mut session).await.unwrap();
        // Each takes more than a microsecond, which is a millisecond's worth of calls here.
        assert!(start.elapsed() > Duration::from_millis(1000 + SAVED as u64));
    }
}
