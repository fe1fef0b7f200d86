//! Every way in which helper, agents and kernel can come, go and miss each other: no interleaving leaves a
//! stale rule, and none makes a gap.
//!
//! What runs here is the helper's own code, from a call that has been taken apart to the plan that the kernel gets:
//! [`State`], the registry and the look-up of control groups. What is modelled:
//!
//! - the kernel, by [`Model`], which panics at a plan that nf_tables would refuse;
//! - the snapshot, by its own code over bytes in memory, which are lost, cut off or kept when a helper starts;
//! - connections: queues of messages that outlive an agent that is killed, and a helper that has not accepted
//!   them, whose listening socket is the service manager's;
//! - the helper's process: what [`crate::server`] calls when a connection ends, a timer runs out or the kernel
//!   announces that the table was taken away, in whatever order, and as often as it takes if the kernel refuses;
//! - two agents, as agent/src/sync/session.rs and agent/src/run.rs have them: one call at a time, another
//!   connection when one breaks, SIGTERM, SIGUSR1, SIGKILL.
//!
//! Time is not modelled: a timer may run out at any moment, but for one thing. As long as an agent lives that
//! wants its policy in force, or a successor is on its way (SIGUSR1), the grace in which it is waited for does
//! not end: that an agent is back within it is the one thing that is taken for granted.
//!
//! All states that can be reached are visited, with no limit but those of [`Bounds`].

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::num::NonZeroU16;

use cgtproxy_proto::name::ProxyName;

use super::*;
use crate::access::{Access, Accounts};
use crate::config::OnAgentLoss;
use crate::kernel::model::{Bed, Model};
use crate::nft::{Bypass, Delivery, Exceptions, Fakes, ProxySettings, Verdict};
use crate::snapshot::Memory;

/// How many timers run at a time.
const TIMERS: usize = 2;

/// How often what is rare may happen on one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Bounds {
    agents: usize,
    /// How many connections there are at a time, those of agents that are gone included.
    connections: usize,
    /// Verdicts change.
    updates: bool,
    /// The helper's process ends, by whatever signal.
    helper_ends: u8,
    /// The kernel refuses a transaction.
    refusals: u8,
    /// Another program takes the table away.
    flushes: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Message {
    Replace,
    Update,
    Remove,
    /// The agent's side is closed.
    End,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Agent {
    Gone,
    /// It has no connection, and wants one.
    Waiting,
    /// It has said this, and waits for the answer.
    Calling {
        connection: u64,
        what: Message,
        established: bool,
        /// SIGTERM has come.
        stopping: bool,
    },
    /// The helper has taken its policy.
    Idle(u64),
    /// It has asked for the removal.
    Leaving(u64),
}

impl Agent {
    fn connection(self) -> Option<u64> {
        match self {
            Self::Gone | Self::Waiting => None,
            Self::Calling { connection, .. } | Self::Idle(connection) => Some(connection),
            Self::Leaving(connection) => Some(connection),
        }
    }

    /// Whether its policy is to be in force.
    fn wants(self) -> bool {
        match self {
            Self::Waiting | Self::Idle(_) => true,
            Self::Calling { stopping, .. } => !stopping,
            Self::Gone | Self::Leaving(_) => false,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Connection {
    agent: usize,
    accepted: bool,
    queue: VecDeque<Message>,
}

/// What a helper that starts finds of the snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Left {
    All,
    /// The end was not written.
    Cut,
    Nothing,
}

/// What can happen next. Agents are named by their index, connections and graces by their number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    Start(usize),
    Connect(usize),
    /// Some verdict is to change.
    Update(usize),
    Kill(usize),
    HandOver(usize),
    Terminate(usize),
    /// It does not wait for the helper's answer any longer.
    GiveUp(usize),
    /// The helper reads the next message; whether the kernel refuses what comes of it.
    Handle(u64, bool),
    Expire(GraceId, bool),
    /// The helper looks whether anybody is there for whom it keeps something.
    LookAfter(GraceId),
    /// Whether it had accepted every connection that there is.
    HelperEnds(bool),
    /// With what is left of the snapshot.
    HelperStarts(Left),
    Flush,
    Restore(bool),
}

struct Helper {
    state: State<Model>,
    timers: BTreeSet<GraceId>,
}

struct World<'a> {
    bed: &'a Bed,
    left: Bounds,
    kernel: Model,
    snapshot: Memory,
    helper: Option<Helper>,
    agents: Vec<Agent>,
    connections: BTreeMap<u64, Connection>,
    next_connection: u64,
    /// An agent has left its policy to the next one.
    successor_due: bool,
}

/// What tells states apart: numbers that are given out one after the other are replaced by their order.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Fingerprint {
    left: Bounds,
    agents: Vec<(Agent, Option<usize>)>,
    connections: Vec<Connection>,
    /// The holder, with the number of timers that are of no account.
    helper: Option<(Option<Held>, usize, bool, bool)>,
    kernel: Option<(usize, bool)>,
    gone: bool,
    successor_due: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Held {
    Connection(Option<usize>),
    Grace,
    Kept,
}

/// The port of what has no proxy.
const NOBODY: u16 = 0;

/// The port tells whose policy it is.
fn port(agent: usize) -> u16 {
    1001 + agent as u16
}

fn policy(subtree: &Subtree, agent: usize) -> (PolicyRequest, Assignments) {
    let name: ProxyName = "p".parse().unwrap();
    let policy = PolicyRequest {
        subtree: subtree.top(),
        proxies: vec![(
            name.clone(),
            ProxySettings {
                delivery: Delivery::Tproxy(NonZeroU16::new(port(agent)).unwrap()),
                exceptions: Exceptions::default(),
                reject_udp: false,
                dns_hijack: None,
                fakes: Fakes::default(),
            },
        )],
        bypass_entries: 0,
        bypass: Bypass::default(),
        gateway: None,
    };
    let mut assignments = application(Verdict::Proxy(name));
    let all = ControlGroupPath::from_wire("").unwrap();
    assignments.insert(all, Verdict::Drop.into());
    (policy, assignments)
}

type Assignments = BTreeMap<ControlGroupPath, nft::Element>;

fn application(verdict: Verdict) -> Assignments {
    let path = ControlGroupPath::from_wire("app.slice").unwrap();
    [(path, verdict.into())].into()
}

impl<'a> World<'a> {
    fn new(bed: &'a Bed, bounds: Bounds) -> Self {
        Self {
            bed,
            left: bounds,
            kernel: Model::default(),
            snapshot: Memory::default(),
            helper: None,
            agents: vec![Agent::Gone; bounds.agents],
            connections: BTreeMap::new(),
            next_connection: 1,
            successor_due: false,
        }
    }

    /// The same once more, to go on from it in another way.
    fn fork(&self) -> Self {
        let kernel = Model::default();
        *kernel.table.borrow_mut() = self.kernel.table.borrow().clone();
        kernel.gone.set(self.kernel.gone.get());
        let snapshot = Memory::default();
        snapshot.borrow_mut().clone_from(&self.snapshot.borrow());
        let helper = self.helper.as_ref().map(|helper| {
            let state = &helper.state;
            let state = State {
                config: state.config.clone(),
                root: state.root.clone(),
                ipv6: state.ipv6,
                kernel: kernel.clone(),
                registry: state.registry.clone(),
                doubtful: state.doubtful,
                snapshot: state.snapshot.fork(&snapshot),
                conntrack: None,
                holders: state.holders.clone(),
                graces: state.graces,
                gate: Gate::new(state.config.access.clone(), state.root.spare()),
                diagnosis: None,
                unreadable: Said::default(),
            };
            Helper {
                state,
                timers: helper.timers.clone(),
            }
        });
        Self {
            bed: self.bed,
            left: self.left,
            kernel,
            snapshot,
            helper,
            agents: self.agents.clone(),
            connections: self.connections.clone(),
            next_connection: self.next_connection,
            successor_due: self.successor_due,
        }
    }

    fn holder(&self) -> Holder {
        self.helper
            .as_ref()
            .map_or(Holder::None, |helper| helper.state.holder(self.bed.uid))
    }

    /// Whose policy the kernel has; [`NOBODY`]'s is what is kept without an agent.
    fn in_force(&self) -> Option<u16> {
        let table = self.kernel.table.borrow();
        let objects = table.of(self.bed.uid)?;
        let proxy = objects.layout.proxies.values().next();
        let verdicts: Vec<_> = objects.elements.values().map(|e| &e.verdict).collect();
        if proxy.is_none() {
            let kept: &[_] = match self.bed.config.on_agent_loss {
                OnAgentLoss::Keep if verdicts.contains(&&Verdict::Direct) => {
                    &[&Verdict::Direct, &Verdict::Drop]
                }
                OnAgentLoss::Keep => &[&Verdict::Drop, &Verdict::Undecided],
                OnAgentLoss::Drop => &[&Verdict::Drop],
                OnAgentLoss::Direct => &[],
            };
            let mut sorted = verdicts;
            sorted.sort();
            assert_eq!(sorted, kept);
        }
        Some(proxy.map_or(NOBODY, |proxy| proxy.settings.delivery.port()))
    }

    fn is_wanted(&self) -> bool {
        self.successor_due || self.agents.iter().any(|agent| agent.wants())
    }

    fn fingerprint(&self) -> Fingerprint {
        let order = |number: u64| self.connections.keys().position(|&c| c == number);
        let anonymous = |agent: Agent| match agent {
            Agent::Calling {
                what,
                established,
                stopping,
                ..
            } => Agent::Calling {
                connection: 0,
                what,
                established,
                stopping,
            },
            Agent::Idle(_) => Agent::Idle(0),
            Agent::Leaving(_) => Agent::Leaving(0),
            agent => agent,
        };
        let agents = self.agents.iter().map(|&agent| {
            let connection = agent.connection().and_then(order);
            (anonymous(agent), connection)
        });
        let helper = self.helper.as_ref().map(|helper| {
            let (held, waiting) = match self.holder() {
                Holder::None => (None, 0),
                Holder::Connection(id) => (Some(Held::Connection(order(id.0))), 0),
                Holder::Grace(grace) => (
                    Some(Held::Grace),
                    usize::from(helper.timers.contains(&grace)),
                ),
                Holder::Kept(_) => (Some(Held::Kept), 0),
            };
            let state = &helper.state;
            let has = state.registry.has(self.bed.uid);
            let knows = state.registry.policy(self.bed.uid).is_some();
            (held, helper.timers.len() - waiting, has, knows)
        });
        let table = self.kernel.table.borrow();
        let kernel = table.of(self.bed.uid).map(|objects| {
            let direct = objects
                .elements
                .values()
                .any(|e| e.verdict == nft::Verdict::Direct);
            (usize::from(self.in_force().unwrap()), direct)
        });
        Fingerprint {
            left: self.left,
            agents: agents.collect(),
            connections: self.connections.values().cloned().collect(),
            helper,
            kernel,
            gone: self.kernel.gone.get(),
            successor_due: self.successor_due,
        }
    }

    /// Everything that can happen now.
    fn events(&self) -> Vec<Event> {
        let mut events = Vec::new();
        for (index, &agent) in self.agents.iter().enumerate() {
            match agent {
                Agent::Gone => {
                    events.push(Event::Start(index));
                    continue;
                }
                Agent::Waiting if self.connections.len() < self.left.connections => {
                    events.push(Event::Connect(index));
                }
                Agent::Idle(_) if self.left.updates => events.push(Event::Update(index)),
                Agent::Leaving(_) | Agent::Calling { stopping: true, .. } => {
                    events.push(Event::GiveUp(index));
                }
                _ => {}
            }
            if agent.wants() {
                events.extend([Event::Terminate(index), Event::HandOver(index)]);
            }
            events.push(Event::Kill(index));
        }
        let refused = |refused: bool| !refused || self.left.refusals > 0;
        let Some(helper) = &self.helper else {
            let left = [Left::All, Left::Cut, Left::Nothing];
            events.extend(left.map(Event::HelperStarts));
            return events;
        };
        for (&number, connection) in &self.connections {
            let Some(&message) = connection.queue.front() else {
                continue;
            };
            if message != Message::End {
                let kernel = [false, true].into_iter().filter(|&r| refused(r));
                events.extend(kernel.map(|refused| Event::Handle(number, refused)));
            } else if helper.timers.len() < TIMERS {
                events.push(Event::Handle(number, false));
            }
        }
        for &grace in &helper.timers {
            let is_awaited = self.holder() == Holder::Grace(grace);
            if is_awaited && self.is_wanted() {
                continue;
            }
            events.push(Event::Expire(grace, false));
            if is_awaited && refused(true) {
                events.push(Event::Expire(grace, true));
            }
        }
        if let Holder::Kept(grace) = self.holder()
            && !helper.state.registry.has(self.bed.uid)
        {
            events.push(Event::LookAfter(grace));
        }
        if self.kernel.gone.get() {
            events.push(Event::Restore(false));
            if refused(true) {
                events.push(Event::Restore(true));
            }
        } else if self.left.flushes > 0 {
            events.push(Event::Flush);
        }
        if self.left.helper_ends > 0 {
            events.push(Event::HelperEnds(false));
            if self.connections.values().any(|c| !c.accepted) {
                events.push(Event::HelperEnds(true));
            }
        }
        events
    }

    fn happen(&mut self, event: Event) {
        let before = self.in_force();
        let was_wanted = self.is_wanted();
        match event {
            Event::Start(agent) => {
                self.agents[agent] = Agent::Waiting;
                self.successor_due = false;
            }
            Event::Connect(agent) => {
                let number = self.next_connection;
                self.next_connection += 1;
                let connection = Connection {
                    agent,
                    accepted: false,
                    queue: VecDeque::new(),
                };
                self.connections.insert(number, connection);
                self.call(agent, number, Message::Replace, false, false);
            }
            Event::Update(agent) => {
                let connection = self.agents[agent].connection().unwrap();
                self.call(agent, connection, Message::Update, true, false);
            }
            Event::Kill(agent) | Event::GiveUp(agent) => self.close(agent, Agent::Gone),
            Event::HandOver(agent) => {
                self.close(agent, Agent::Gone);
                self.successor_due = true;
            }
            Event::Terminate(agent) => match &mut self.agents[agent] {
                Agent::Calling { stopping, .. } => *stopping = true,
                Agent::Idle(connection) => {
                    let connection = *connection;
                    self.leave(agent, connection);
                }
                waiting => *waiting = Agent::Gone,
            },
            Event::Handle(number, refused) => {
                self.left.refusals -= u8::from(refused);
                self.handle(number, refused);
            }
            Event::Expire(grace, refused) => {
                self.left.refusals -= u8::from(refused);
                self.kernel.refuse.set(refused);
                let helper = self.helper.as_mut().unwrap();
                let over = helper.state.grace_is_over(self.bed.uid, grace);
                // The server tries again later.
                if over.is_ok() {
                    helper.timers.remove(&grace);
                }
            }
            Event::LookAfter(grace) => {
                let helper = self.helper.as_mut().unwrap();
                let state = &mut helper.state;
                state.look_after_kept(self.bed.uid, grace).unwrap();
            }
            Event::HelperEnds(all) => {
                self.left.helper_ends -= 1;
                self.helper = None;
                self.connections.retain(|_, c| !c.accepted && !all);
                for agent in &mut self.agents {
                    let lost = agent
                        .connection()
                        .is_some_and(|connection| !self.connections.contains_key(&connection));
                    if lost {
                        *agent = match agent.wants() {
                            true => Agent::Waiting,
                            false => Agent::Gone,
                        };
                    }
                }
            }
            Event::HelperStarts(left) => {
                {
                    let mut snapshot = self.snapshot.borrow_mut();
                    let length = snapshot.len();
                    match left {
                        Left::All => {}
                        Left::Cut => snapshot.truncate(length.saturating_sub(3)),
                        Left::Nothing => snapshot.clear(),
                    }
                }
                // Which makes the table if there is none.
                self.kernel.gone.set(false);
                let (config, root) = (self.bed.config.clone(), self.bed.root.clone());
                let (snapshot, records) = Snapshot::in_memory(&self.snapshot, config.marks);
                let mut records = records.unwrap_or_default();
                records.locate(|uid, subtree| root.slices(uid, subtree));
                let inherited = self.kernel.table.borrow().inherited(&records);
                if left == Left::All {
                    let known = |left: &Inherited| matches!(left, Inherited::Known(_));
                    assert!(inherited.values().all(known), "the snapshot lacks a layout");
                }
                let kernel = self.kernel.clone();
                let (state, graces) =
                    State::new(config, root, kernel, snapshot, inherited).unwrap();
                self.helper = Some(Helper {
                    state,
                    timers: graces.into_iter().map(|(_, grace)| grace).collect(),
                });
            }
            Event::Flush => {
                self.left.flushes -= 1;
                self.kernel.flush();
            }
            Event::Restore(refused) => {
                self.left.refusals -= u8::from(refused);
                self.kernel.refuse.set(refused);
                let helper = self.helper.as_mut().unwrap();
                let restored = helper.state.rebuild_table();
                let known = helper.state.registry.policy(self.bed.uid).is_some();
                assert_eq!(
                    self.in_force().is_some(),
                    known && restored.is_ok(),
                    "what is known is put back"
                );
            }
        }
        // Which nothing may have been left for.
        self.kernel.refuse.set(false);
        self.assert_sound();
        let after = self.in_force();
        if before.is_some() && after.is_none() {
            let may_end = match event {
                Event::Handle(..) => true,
                Event::Expire(..) => self.bed.config.on_agent_loss == OnAgentLoss::Direct,
                Event::Flush | Event::LookAfter(_) => true,
                _ => false,
            };
            assert!(may_end, "a gap");
        }
        if let Event::Expire(..) = event {
            assert!(before == after || !was_wanted, "a gap");
        }
    }

    fn call(
        &mut self,
        agent: usize,
        connection: u64,
        what: Message,
        established: bool,
        stopping: bool,
    ) {
        self.say(connection, what);
        self.agents[agent] = Agent::Calling {
            connection,
            what,
            established,
            stopping,
        };
    }

    fn say(&mut self, connection: u64, what: Message) {
        let connection = self.connections.get_mut(&connection).unwrap();
        connection.queue.push_back(what);
    }

    fn leave(&mut self, agent: usize, connection: u64) {
        self.say(connection, Message::Remove);
        self.agents[agent] = Agent::Leaving(connection);
    }

    fn close(&mut self, agent: usize, then: Agent) {
        if let Some(connection) = self.agents[agent].connection() {
            self.say(connection, Message::End);
        }
        self.agents[agent] = then;
    }

    /// The helper deals with a connection's next message, and the agent with the answer.
    fn handle(&mut self, number: u64, refused: bool) {
        let connection = self.connections.get_mut(&number).unwrap();
        connection.accepted = true;
        let agent = connection.agent;
        let message = connection.queue.pop_front().unwrap();
        let helper = self.helper.as_mut().unwrap();
        let (uid, id) = (self.bed.uid, ConnectionId(number));
        if message == Message::End {
            self.connections.remove(&number);
            let grace = helper.state.disconnected(uid, id);
            helper.timers.extend(grace);
            return;
        }
        let subtree = &self.bed.subtree;
        self.kernel.refuse.set(refused);
        let answer = match message {
            Message::Replace => {
                let (policy, assignments) = policy(subtree, agent);
                let answer = helper.state.replace(uid, id, subtree, policy, assignments);
                answer.map(|(_, skipped)| assert!(skipped.is_empty()))
            }
            Message::Update => {
                let assign = application(Verdict::Direct);
                let answer = helper
                    .state
                    .update(uid, id, subtree, assign, BTreeSet::new());
                answer.map(|(_, skipped)| assert!(skipped.is_empty()))
            }
            Message::Remove | Message::End => helper.state.remove(uid, id),
        };
        if message == Message::Remove && self.in_force().is_none() {
            let owner = self
                .agents
                .iter()
                .position(|a| a.connection() == Some(number));
            let is_idle = |&(other, agent): &(usize, &Agent)| {
                Some(other) != owner && matches!(agent, Agent::Idle(_))
            };
            let robbed = self.agents.iter().enumerate().find(is_idle);
            assert_eq!(robbed, None, "one agent removed the policy of another");
        }
        // Whoever was killed meanwhile hears nothing.
        if self.agents[agent].connection() != Some(number) {
            return;
        }
        match (self.agents[agent], answer) {
            (Agent::Calling { stopping: true, .. }, Ok(())) => self.leave(agent, number),
            (Agent::Calling { .. }, Ok(())) => self.agents[agent] = Agent::Idle(number),
            (
                Agent::Calling {
                    stopping,
                    what: Message::Replace,
                    ..
                },
                Err(Error::SessionExists),
            ) => {
                self.close(
                    agent,
                    if stopping {
                        Agent::Gone
                    } else {
                        Agent::Waiting
                    },
                );
            }
            (
                Agent::Calling {
                    what,
                    established,
                    stopping,
                    ..
                },
                Err(Error::Kernel(_)),
            ) => match (stopping, established) {
                (false, _) => self.call(agent, number, what, established, false),
                (true, true) => self.leave(agent, number),
                (true, false) => self.close(agent, Agent::Gone),
            },
            (Agent::Leaving(_), Ok(()) | Err(Error::Kernel(_))) => self.close(agent, Agent::Gone),
            answer => panic!("no such answer was expected: {answer:?}"),
        }
    }

    /// What is true in every state.
    fn assert_sound(&self) {
        let Some(helper) = &self.helper else {
            return;
        };
        let state = &helper.state;
        let table = self.kernel.table.borrow();
        let objects = table.of(self.bed.uid);
        if !self.kernel.gone.get() {
            let known = state.registry.policy(self.bed.uid);
            if let Some(policy) = known {
                let objects = objects.expect("the kernel has what the helper knows");
                assert_eq!(&objects.layout, policy.layout);
                assert_eq!(objects.elements.len(), policy.cgroups);
            }
            assert_eq!(state.registry.has(self.bed.uid), objects.is_some());
        }
        match self.holder() {
            Holder::None => assert_eq!(objects, None, "it is nobody's, and stays for ever"),
            Holder::Connection(id) => {
                let connection = self.connections.get(&id.0);
                assert!(connection.is_some_and(|c| c.accepted), "its holder is gone");
            }
            Holder::Grace(grace) => {
                assert!(helper.timers.contains(&grace), "its grace never ends");
            }
            Holder::Kept(_) => assert_ne!(
                self.bed.config.on_agent_loss,
                OnAgentLoss::Direct,
                "nothing is kept"
            ),
        }
        for (index, agent) in self.agents.iter().enumerate() {
            if let Agent::Idle(connection) = *agent {
                assert_eq!(self.holder(), Holder::Connection(ConnectionId(connection)));
                if !self.kernel.gone.get() {
                    assert_eq!(self.in_force(), Some(port(index)), "it is not in force");
                }
            }
        }
    }

    /// Lets the helper finish what it has begun.
    fn settle(&mut self) {
        if self.helper.is_none() {
            self.happen(Event::HelperStarts(Left::All));
        }
        loop {
            if self.kernel.gone.get() {
                self.happen(Event::Restore(false));
            }
            let next = self.events().into_iter().find(|event| match event {
                Event::Handle(_, false) => true,
                Event::Expire(_, refused) => !refused,
                Event::LookAfter(_) => true,
                _ => false,
            });
            match next {
                Some(event) => self.happen(event),
                None => return,
            }
        }
    }
}

/// From here on, with no more disturbance: an agent that wants a policy in force gets that before any grace ends,
/// and once there is no agent nothing is left but what is to be kept, which goes with the user.
fn assert_ends_well(world: &World<'_>) {
    let mut served = world.fork();
    if served.agents.iter().any(|agent| agent.wants()) {
        served.settle();
        for _ in 0..2 {
            let waits = served.agents.iter().position(|a| *a == Agent::Waiting);
            if let Some(agent) = waits
                && !served.agents.iter().any(|a| matches!(a, Agent::Idle(_)))
            {
                served.happen(Event::Connect(agent));
                served.settle();
            }
        }
        assert!(
            served.agents.iter().any(|a| matches!(a, Agent::Idle(_))),
            "no agent gets its policy into force: {:?}",
            served.agents
        );
    }
    let mut left_alone = world.fork();
    for agent in 0..left_alone.agents.len() {
        left_alone.close(agent, Agent::Gone);
    }
    left_alone.successor_due = false;
    left_alone.settle();
    assert!(left_alone.connections.is_empty());
    if let Holder::Kept(grace) = left_alone.holder() {
        let state = &mut left_alone.helper.as_mut().unwrap().state;
        let knows = state.registry.policy(world.bed.uid).is_some();
        let deny = Accounts {
            uids: [world.bed.uid.value()].into(),
            ..Accounts::default()
        };
        let access = Access {
            deny,
            ..Access::default()
        };
        state.gate = Gate::new(access, state.root.spare());
        if knows {
            assert_eq!(left_alone.in_force(), Some(NOBODY), "a proxy without agent");
        }
        left_alone.happen(Event::LookAfter(grace));
    }
    assert_eq!(left_alone.in_force(), None, "a stale policy");
    assert_eq!(left_alone.holder(), Holder::None);
}

/// Visits every state; says the way to the first that is wrong.
fn explore(loss: OnAgentLoss, bounds: Bounds) -> usize {
    let mut bed = Bed::new().unwrap();
    bed.config.on_agent_loss = loss;
    let start = World::new(&bed, bounds);
    let mut ways: Vec<(usize, Option<Event>)> = vec![(0, None)];
    let mut seen = HashMap::from([(start.fingerprint(), 0)]);
    let mut queue = VecDeque::from([(0, start)]);
    while let Some((index, world)) = queue.pop_front() {
        for event in world.events() {
            let mut next = world.fork();
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                next.happen(event);
                let new = !seen.contains_key(&next.fingerprint());
                if new {
                    assert_ends_well(&next);
                }
                new
            }));
            let new = outcome.unwrap_or_else(|_| {
                let mut way = vec![event];
                let mut at = index;
                while let (before, Some(event)) = ways[at] {
                    way.push(event);
                    at = before;
                }
                way.reverse();
                panic!("after {way:?}");
            });
            if new {
                let number = ways.len();
                ways.push((index, Some(event)));
                seen.insert(next.fingerprint(), number);
                queue.push_back((number, next));
            }
        }
    }
    ways.len()
}

/// Whatever becomes of a policy without agent.
fn explore_all(losses: &[OnAgentLoss], bounds: Bounds) -> usize {
    let states = losses.iter().map(|&loss| explore(loss, bounds));
    states.min().unwrap()
}

const EVERY_LOSS: [OnAgentLoss; 3] = [OnAgentLoss::Keep, OnAgentLoss::Direct, OnAgentLoss::Drop];

#[test]
fn two_agents_and_a_helper_that_is_restarted() {
    let states = explore_all(
        &EVERY_LOSS[..2],
        Bounds {
            agents: 2,
            connections: 2,
            updates: false,
            helper_ends: 1,
            refusals: 0,
            flushes: 0,
        },
    );
    assert!(
        states > 5000,
        "only {states} states: something does not happen any more"
    );
}

#[test]
fn one_agent_and_a_kernel_that_refuses() {
    let states = explore_all(
        &EVERY_LOSS,
        Bounds {
            agents: 1,
            connections: 2,
            updates: true,
            helper_ends: 1,
            refusals: 1,
            flushes: 0,
        },
    );
    assert!(
        states > 2500,
        "only {states} states: something does not happen any more"
    );
}

#[test]
fn one_agent_and_a_table_that_others_take_away() {
    let states = explore_all(
        &EVERY_LOSS,
        Bounds {
            agents: 1,
            connections: 2,
            updates: false,
            helper_ends: 1,
            refusals: 0,
            flushes: 1,
        },
    );
    assert!(
        states > 1500,
        "only {states} states: something does not happen any more"
    );
}
