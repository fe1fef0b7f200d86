//! What the bench and the processes that measure, each in a sandbox of its own, say to each other: one JSON value a
//! line.

use serde::{Deserialize, Serialize};

/// What runs in a sandbox, or does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Kind {
    /// No ruleset and no daemon.
    None,
    /// A ruleset that does nothing but have the kernel track connections, as any firewall does.
    Conntrack,
    /// The least that a program in user space can do.
    Floor,
    /// The ruleset of the original cgtproxy, written by hand.
    Layout,
    /// The original cgtproxy itself.
    Original,
    /// cgtproxy.
    Ours,
    /// cgtproxy with `start: closed`.
    Closed,
    /// cgtproxy with `own-table: false`, as on kernels that protect no table.
    Unprotected,
    /// The same, with as many calls a second as anybody may make at most.
    Unlimited,
    /// cgtproxy with a proxy elsewhere, and cgtproxy-relay.
    Relay,
}

impl Kind {
    /// What it is called in tables.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Conntrack => "conntrack alone",
            Self::Floor => "floor",
            Self::Layout => "the original's layout",
            Self::Original => "the original",
            Self::Ours => "cgtproxy",
            Self::Closed => "cgtproxy, start: closed",
            Self::Unprotected => "cgtproxy, own-table: false",
            Self::Unlimited => "cgtproxy, calls-per-second: 1000000",
            Self::Relay => "cgtproxy-relay",
        }
    }
}

/// Where an application is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Place {
    /// In a control group that a rule makes direct, in a slice that is proxied; at level 5.
    Direct,
    /// The same, at level 12.
    DirectDeep,
    /// In a user's session, and no rule is about it.
    Unmatched,
    /// In no user's session.
    NoSession,
    /// In a slice that is proxied.
    Proxied,
}

/// How an application gets to where it wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Way {
    /// It is diverted to the TPROXY server.
    Diverted,
    /// It connects to that server.
    Straight,
    /// It speaks SOCKS5 to the SOCKS5 server.
    Spoken,
    /// It knows nothing, and somebody else speaks SOCKS5: cgtproxy-relay, or the TPROXY server.
    Carried,
}

/// Which processors are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Cores {
    /// As the kernel likes it.
    All,
    /// One by applications and servers, another by what is between them.
    Apart,
    /// One by everything.
    One,
}

/// What an application does.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) enum Task {
    /// Receive so many bytes: MB/s.
    Bulk { bytes: u64 },
    /// Connect, ask and receive an answer, over and over: microseconds each.
    Requests { count: usize },
    /// The same for several at once, so often in all: connections a second.
    Rush { count: usize },
    /// Connect so often and keep all connections until it is told to end.
    Hold { connections: usize },
    /// Exchange so many datagrams with several destinations: round trips a second.
    Datagrams { count: usize },
}

/// Into which control groups processes are born that send at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Nursery {
    /// A new one each time, for which there is a rule.
    Matched,
    /// A new one each time, in a slice that has the verdict already.
    Inherits,
}

/// What another program takes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Loss {
    /// `nft flush ruleset`.
    Ruleset,
    /// `nft delete table`, of the helper's.
    Table,
    /// `ip rule flush`.
    Rules,
    /// `ip route flush table`, of the helper's.
    Routes,
    /// `ip link set lo down`, and up again.
    Loopback,
}

/// What becomes of control groups that are only there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Mapped {
    /// What they send is dropped.
    Dropped,
    /// What they send goes to the proxy.
    Proxied,
}

/// What is to be measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Order {
    /// Make control groups with this verdict of their own until there are so many with any.
    Map { groups: usize, verdict: Mapped },
    /// Have a process born in a new control group and look when its traffic obeys: [`Sample`]s.
    Latency { count: usize },
    /// Have a static program executed in a new control group whose first act is a send: [`Starts`].
    FirstSend { count: usize, nursery: Nursery },
    /// Make and remove many control groups as quickly as possible: [`Burst`].
    Burst { groups: usize, nested: bool },
    /// Start the agent: [`Start`].
    Start,
    /// Send datagrams over the loopback interface: nanoseconds for each block's packets. Another `sender` is another
    /// process, on another processor.
    Packets {
        place: Place,
        blocks: usize,
        sender: usize,
    },
    /// Have an application do something beyond a relay: numbers, as its task has them.
    Errand { way: Way, cores: Cores, task: Task },
    /// Have an application hold connections through the relay, which are idle or whose ends don't read: [`Held`].
    Hold { connections: usize, stuck: bool },
    /// Let the daemons idle: [`Idle`]s.
    Idle { milliseconds: u64 },
    /// Simulate so many users' agents in all, each with so many control groups.
    Users { users: u32, groups: usize },
    /// Change a verdict of one simulated user's, over and over: microseconds each.
    Updates { count: usize },
    /// Have another user flood the helper.
    BeginFlood,
    /// Have them stop: how many calls were answered a second.
    EndFlood,
    /// Take something away and look when it is back, over and over: nanoseconds from before that is begun.
    Restore { loss: Loss, count: usize },
    /// What the daemons use.
    Use,
}

/// Nanoseconds from before mkdir(2).
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Sample {
    /// To the first send of the process that was born there.
    pub(crate) first: u64,
    /// To the first packet that was dropped.
    pub(crate) in_force: Option<u64>,
    /// How many packets left before.
    pub(crate) left: u64,
}

/// What became of the first packets of programs.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Starts {
    pub(crate) left: usize,
    pub(crate) dropped: usize,
}

/// A burst of control groups. Times are nanoseconds.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Burst {
    /// What making the directories took.
    pub(crate) mkdir: u64,
    /// From the first mkdir(2) until all were in force, or until it was given up.
    pub(crate) in_force: u64,
    /// How many never got a verdict.
    pub(crate) missing: usize,
    /// What the daemons computed meanwhile.
    pub(crate) cpu: u64,
    /// What removing the directories took.
    pub(crate) rmdir: u64,
    /// From the first rmdir(2) until their elements were gone.
    pub(crate) gone: u64,
    /// How many elements stayed.
    pub(crate) stale: usize,
    /// What the daemons computed while they were removed.
    pub(crate) cpu_removal: u64,
}

/// A start of an agent, in nanoseconds from before execve(2).
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Start {
    /// Until the traffic of the last control group obeyed.
    pub(crate) in_force: u64,
    /// Until `READY=1`.
    pub(crate) ready: u64,
}

/// What the relay uses, in bytes.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Held {
    pub(crate) resident: u64,
    /// Shared with no file.
    pub(crate) anonymous: u64,
}

/// What a daemon uses.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Idle {
    pub(crate) name: String,
    /// Resident, in bytes.
    pub(crate) resident: u64,
    /// Resident and shared with no file, in bytes.
    pub(crate) anonymous: u64,
    pub(crate) threads: u64,
    /// How often it was given a processor meanwhile.
    pub(crate) wakeups: u64,
    /// Nanoseconds that it computed meanwhile.
    pub(crate) cpu: u64,
}
