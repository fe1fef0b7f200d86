//! The listening socket and the connections that come from it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use cgtproxy_proto::back_off::BackOff;
use cgtproxy_proto::limits::MESSAGE_BYTES;
use cgtproxy_proto::message::MessageReader;
use cgtproxy_proto::service::{Fault, ServeError, Service, send_fault, serve};
use cgtproxy_proto::text::chain;
use tokio::net::{UnixListener, UnixStream};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::cgroup::Unavailable;
use crate::guarded::{Guarded, Parked};
use crate::kernel::{Kernel, Linux};
use crate::monitor::{Loss, Monitor};
use crate::nft;
use crate::peer::{Account, Peer, Uid};
use crate::quota::{Quotas, Slot};
use crate::said::Said;
use crate::session::Session;
use crate::state::{ConnectionId, GraceId, Outcome, State};

/// How long to wait after accept(2) failed: doubled from one to the other.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));

/// A timer that is so late was not looked at because this process did not run.
const HELD_UP: Duration = Duration::from_millis(100);

/// How long whoever came while this process did not run may take to be served.
const SECOND_CHANCE: Duration = Duration::from_secs(1);

/// How often to look whether a user for whom something is kept is still there.
const LOOK_AGAIN: Duration = Duration::from_secs(10);

/// How long to wait before asking the kernel again for what it refused: doubled from one to the other.
const TRY_AGAIN: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(60));

/// The table, in a sentence.
const TABLE: &str = "the table 'inet cgtproxy'";

/// Serves connections until `shutdown` is cancelled, then ends them all.
#[derive(Clone)]
pub struct Server {
    state: Rc<RefCell<State>>,
    quotas: Quotas,
    parked: Parked,
    tasks: TaskTracker,
    /// Who waits for what becomes of each user's policy.
    graces: Rc<RefCell<BTreeMap<Uid, AbortHandle>>>,
    shutdown: CancellationToken,
}

impl Server {
    /// A server over this state. It is to be run within a `LocalSet`.
    #[must_use]
    pub fn new(state: Rc<RefCell<State>>, shutdown: CancellationToken) -> Self {
        let quotas = Quotas::new(state.borrow().config.limits);
        Self {
            state,
            quotas,
            parked: Parked::default(),
            tasks: TaskTracker::new(),
            graces: Rc::default(),
            shutdown,
        }
    }

    /// The connections that stay open because they can't be closed.
    #[must_use]
    pub fn parked(&self) -> Parked {
        self.parked.clone()
    }

    /// Accepts connections until it is told to stop.
    pub async fn run(&self, listener: UnixListener) {
        let mut back_off = BackOff::new(BACK_OFF);
        let mut next = 0;
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = self.shutdown.cancelled() => break,
            };
            match accepted {
                Ok((stream, _)) => {
                    if !back_off.is_at_first() {
                        tracing::info!("connections can be accepted again");
                    }
                    back_off.reset();
                    next += 1;
                    self.accepted(stream, ConnectionId(next));
                    // Those that are open have their turn before another one is: whoever connects as fast as it goes
                    // would otherwise have more of them open than are ever closed.
                    tokio::task::yield_now().await;
                }
                Err(error) => {
                    // Once, not at every attempt.
                    if back_off.is_at_first() {
                        tracing::warn!(
                            "can't accept connections: {error}; those that are open go on"
                        );
                    }
                    tokio::select! {
                        () = tokio::time::sleep(back_off.next_wait()) => {}
                        () = self.shutdown.cancelled() => break,
                    }
                }
            }
        }
        self.tasks.close();
        self.tasks.wait().await;
        // It is closed by the end of this process: connections that nobody has accepted may have descriptors in them.
        std::mem::forget(listener);
    }

    /// Sees to a policy whose agent is gone, unless an agent takes it over within the grace period, and to what is
    /// kept of it afterwards.
    pub fn await_grace(&self, uid: Uid, grace: GraceId) {
        let this = self.clone();
        let wait = self.tasks.spawn_local(async move {
            // The policy stays in the kernel for the next helper.
            tokio::select! {
                () = this.see_to(uid, grace) => {}
                () = this.shutdown.cancelled() => {}
            }
        });
        // A grace before this one is over, since somebody has taken it over: a user who comes and goes all the time must
        // not have more than one.
        let before = self.graces.borrow_mut().insert(uid, wait.abort_handle());
        if let Some(before) = before {
            before.abort();
        }
    }

    async fn see_to(&self, uid: Uid, grace: GraceId) {
        let period = self.state.borrow().config.grace;
        let over = || self.state.borrow_mut().grace_is_over(uid, grace);
        match until_done(uid, period, over).await {
            Outcome::TakenOver => return,
            Outcome::Removed => {
                tracing::info!(
                    uid = uid.value(),
                    "removed the policy of an agent that is gone"
                );
                return;
            }
            Outcome::Kept => {
                let loss = self.state.borrow().config.on_agent_loss;
                tracing::info!(
                    uid = uid.value(),
                    "an agent is gone: {loss} until one comes back"
                );
            }
        }
        loop {
            let still = || self.state.borrow_mut().look_after_kept(uid, grace);
            match until_done(uid, LOOK_AGAIN, still).await {
                Outcome::Kept => {}
                Outcome::TakenOver => return,
                Outcome::Removed => {
                    tracing::info!(
                        uid = uid.value(),
                        "removed what was kept of a policy whose user is gone"
                    );
                    return;
                }
            }
        }
    }

    /// Restores what somebody else takes away, at once and for as long as the server runs.
    pub fn guard(&self, monitor: Monitor) {
        let this = self.clone();
        self.tasks.spawn_local(async move {
            // What is still to be put back, because the kernel has refused it.
            let mut missing = Vec::new();
            let mut again = BackOff::new(TRY_AGAIN);
            let mut deaf = false;
            let mut said = BTreeMap::new();
            loop {
                let lost = tokio::select! {
                    loss = monitor.next(), if !deaf => match loss {
                        Ok(loss) => {
                            again.reset();
                            vec![loss]
                        }
                        // Not again at once; whatever happens meanwhile is looked for then.
                        Err(error) => {
                            tracing::error!("can't hear what others change: {error}; trying again");
                            deaf = true;
                            missing = monitor.all();
                            continue;
                        }
                    },
                    () = tokio::time::sleep(again.wait()), if !missing.is_empty() => {
                        again.next_wait();
                        deaf = false;
                        std::mem::take(&mut missing)
                    }
                    () = this.shutdown.cancelled() => return,
                };
                for loss in lost {
                    missing.retain(|still| *still != loss);
                    if !this.restore(loss, said.entry(loss).or_default()) {
                        missing.push(loss);
                    }
                }
            }
        });
    }

    /// Puts back what may be gone. False if the kernel refuses, now.
    fn restore(&self, loss: Loss, said: &mut Said) -> bool {
        match loss {
            Loss::Routing => {
                let mut state = self.state.borrow_mut();
                let before = state.ipv6();
                let restored = state.ensure_routing();
                match (before, state.ipv6()) {
                    (true, false) => {
                        tracing::info!("IPv6 has been switched off on lo: only IPv4 is diverted");
                    }
                    (false, true) => {
                        tracing::info!("IPv6 has been switched on: it is diverted as well");
                    }
                    _ => return report("the routing of diverted packets", restored, said),
                }
                // It was asked last, and the kernel has refused nothing.
                said.works();
                true
            }
            Loss::Table => {
                let restored = self.state.borrow_mut().rebuild_table();
                report(TABLE, restored.map(|()| true), said)
            }
            Loss::Unheard => {
                let made = self.state.borrow_mut().rebuild_table();
                if made.is_ok() {
                    tracing::info!("made {TABLE} anew: what others changed was not heard");
                }
                report(TABLE, made.map(|()| false), said)
            }
        }
    }

    fn accepted(&self, stream: UnixStream, id: ConnectionId) {
        let peer = Peer::of(&stream);
        let stream = match Guarded::new(stream, &self.parked) {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!("can't serve a connection: {error}");
                return;
            }
        };
        let peer = match peer {
            Ok(peer) => peer,
            Err(error) => {
                tracing::warn!("refused a connection: can't tell who it is from: {error}");
                return;
            }
        };
        let uid = peer.uid();
        let account = match self.state.borrow().root.subtree(&peer) {
            // Whose service manager can't be looked for at the moment is not taken for one without.
            Ok(_) | Err(Unavailable::Later) => Account::User(uid),
            Err(_) => Account::Others,
        };
        let admitted = admit(&mut self.state.borrow_mut(), &self.quotas, account, uid);
        let slot = match admitted {
            Ok(slot) => slot,
            Err(fault) => {
                self.tasks.spawn_local(refuse(stream, fault));
                return;
            }
        };
        let this = self.clone();
        self.tasks.spawn_local(async move {
            tokio::select! {
                () = this.converse(stream, peer, slot, id) => {}
                () = this.shutdown.cancelled() => return,
            }
            let grace = this.state.borrow_mut().disconnected(uid, id);
            if let Some(grace) = grace {
                this.await_grace(uid, grace);
            }
        });
    }

    async fn converse(&self, stream: Guarded, peer: Peer, slot: Slot, id: ConnectionId) {
        let uid = peer.uid();
        let probe = stream.peer_probe();
        let mut messages = MessageReader::with_budget(stream, MESSAGE_BYTES, slot.budget());
        let mut session =
            Session::new(peer, slot, id, Rc::clone(&self.state)).with_peer_probe(probe);
        match serve(&mut messages, &mut session).await {
            Ok(()) | Err(ServeError::Write(_)) => {}
            Err(error) => {
                tracing::debug!(uid = uid.value(), "ended a connection: {}", chain(&error))
            }
        }
    }
}

/// Lets a user connect, or says why not. Connections count before the databases of users and groups are asked: while they
/// are, nobody is served.
fn admit(
    state: &mut State<impl Kernel>,
    quotas: &Quotas,
    account: Account,
    uid: Uid,
) -> Result<Slot, Fault> {
    let Some(slot) = quotas.connect(account) else {
        return Err(Session::<Linux>::too_many_connections(
            state.config.limits.connections,
        ));
    };
    match state.allows(account, uid) {
        true => Ok(slot),
        false => Err(Fault::permission_denied()),
    }
}

/// Does this when a period is over, and again for as long as the kernel refuses: nobody else would ever do it.
async fn until_done(
    uid: Uid,
    mut period: Duration,
    mut act: impl FnMut() -> Result<Outcome, nft::Error>,
) -> Outcome {
    let mut again = BackOff::new(TRY_AGAIN);
    let mut said = Said::default();
    loop {
        sleep_awake(period).await;
        match act() {
            Ok(outcome) => return outcome,
            Err(error) => {
                let why = chain(&error);
                if said.is_news(&why) {
                    tracing::error!(
                        uid = uid.value(),
                        "can't release or remove what an agent left: {why}; trying again"
                    );
                }
                period = again.next_wait();
            }
        }
    }
}

/// Sleeps for a period in which others could reach this process. When it was stopped meanwhile, or the
/// machine slept, whoever waits to be served is served first.
async fn sleep_awake(period: Duration) {
    let mut end = Instant::now() + period;
    loop {
        tokio::time::sleep_until(end).await;
        let now = Instant::now();
        if now.saturating_duration_since(end) < HELD_UP {
            return;
        }
        end = now + period.min(SECOND_CHANCE);
    }
}

/// Logs whether `what` was restored, or can't be; false if it can't. It may turn out to have been as it should be.
fn report(
    what: &str,
    restored: Result<bool, impl std::error::Error + 'static>,
    said: &mut Said,
) -> bool {
    match &restored {
        Ok(restored) => {
            let had_failed = said.works();
            if *restored {
                tracing::info!("{what} was changed by another program; restored it");
            } else if had_failed {
                tracing::info!("{what} is as it should be again");
            }
        }
        Err(error) => {
            let why = chain(error);
            if said.is_news(&why) {
                tracing::error!(
                    "{what} may have been changed by another program and can't be restored: {why}; trying again"
                );
            }
        }
    }
    restored.is_ok()
}

/// Says why, and closes. The socket's buffer is empty, so that nobody can make this wait.
async fn refuse(mut stream: Guarded, fault: Fault) {
    if let Err(error) = send_fault(&mut stream, fault).await {
        tracing::debug!("can't refuse a connection: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::{Access, Accounts};
    use crate::kernel::model::{Bed, Model};
    use crate::snapshot::Snapshot;

    #[test]
    #[cfg_attr(miri, ignore = "asks the user database")]
    fn who_has_too_many_connections_has_no_databases_asked() {
        let bed = Bed::new().unwrap();
        let mut config = bed.config.clone();
        // They know nothing of this user, who may be in that group.
        let uid = Uid::for_test(987_654);
        config.access = Access {
            allow: None,
            deny: Accounts {
                uids: [].into(),
                gids: [60].into(),
            },
        };
        config.limits.connections = 1;
        let (mut state, _) = State::new(
            config,
            bed.root.clone(),
            Model::default(),
            Snapshot::nowhere(),
            BTreeMap::new(),
        )
        .unwrap();
        let quotas = Quotas::new(state.config.limits);
        let account = Account::User(uid);
        let mut why = || admit(&mut state, &quotas, account, uid).unwrap_err().name;
        // Who is refused has no connection.
        for _ in 0..2 {
            assert_eq!(why(), Fault::permission_denied().name);
        }
        let _one = quotas.connect(account).unwrap();
        assert_eq!(why(), Session::<Linux>::too_many_connections(1).name);
    }
}
