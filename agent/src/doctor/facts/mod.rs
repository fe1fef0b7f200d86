//! What is there, whether or not it is as it should be.

mod ask;
mod groups;
mod netlink;
mod system;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use cgtproxy_proto::agent::GetStatus_Reply as AgentStatus;
use cgtproxy_proto::helper::{Diagnose_Reply, GetStatus_Reply as HelperStatus};
use cgtproxy_proto::relay::GetStatus_Reply as RelayStatus;

use super::Look;
use crate::config::Scope;
use crate::otherwise::Otherwise;
use crate::text::quoted;

pub(crate) use ask::{ask_agent, ask_helper, helper_status, read_config};
pub(crate) use groups::{hierarchy, manager, session};
pub(crate) use netlink::{listeners, routing_tables, rules};
pub(crate) use system::{gateway, inotify, network, system};

/// Everything that checks look at.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    /// Whether it is about a user or about the machine.
    pub scope: Scope,
    /// Whose doctor this is.
    pub uid: u32,
    /// The version of this program.
    pub version: &'static str,
    /// Where the helper is looked for.
    pub helper_socket: PathBuf,
    /// The helper.
    pub helper: Helper,
    /// The agent.
    pub agent: Agent,
    /// What the relay says; none if the agent has no proxy that it would carry anything on to.
    pub relay: Option<Look<RelayStatus>>,
    /// Where the configuration is looked for.
    pub config_file: PathBuf,
    /// Whether the command line says so.
    pub config_named: bool,
    /// What is there.
    pub config: ConfigState,
    /// What the configuration's `gateway` rests on; none without one.
    pub gateway: Option<Gateway>,
    /// Where control groups are.
    pub hierarchy: Hierarchy,
    /// The control groups of the user's service manager.
    pub manager: Manager,
    /// The user's login sessions.
    pub session: Session,
    /// Limits of inotify.
    pub inotify: Look<Inotify>,
    /// Who listens on TCP ports, and who takes datagrams from everybody.
    pub listeners: Look<Vec<Listener>>,
    /// Routing rules of both families.
    pub rules: Look<Vec<Rule>>,
    /// Numbers of the routing tables that have a route, with their families.
    pub routing_tables: Look<Vec<(Family, u32)>>,
    /// The network.
    pub network: Network,
    /// The rest of the machine.
    pub system: System,
}

/// What came of asking the helper.
#[derive(Debug, Clone)]
pub(crate) enum Helper {
    /// There is no socket.
    Missing,
    /// Nobody listens on it.
    Dead,
    /// The socket's mode does not let this user in, or that of a directory on the way to it.
    Forbidden {
        /// It is the socket's own.
        in_sight: bool,
    },
    /// Something else is wrong.
    Unreachable(String),
    /// It answered with a declared error: its name and all of it.
    Refuses(String, String),
    /// It answered.
    Answers(Box<HelperStatus>, Look<Diagnose_Reply>),
}

/// What came of asking the agent.
#[derive(Debug, Clone)]
pub(crate) enum Agent {
    /// It is not running.
    NotRunning,
    /// It is the system's, and only root may ask it.
    Roots,
    /// It can't be asked.
    Unreachable(String),
    /// It serves no more programs than these at once.
    Full(i64),
    /// It answered.
    Answers(Box<AgentStatus>),
}

/// What the configuration file is.
#[derive(Debug, Clone)]
pub(crate) enum ConfigState {
    /// There is none, and none was asked for.
    Missing,
    /// It is of no use.
    Wrong(String),
    /// It has these proxies.
    Read(Vec<Proxy>),
}

/// What a proxy is to take, wherever that is known from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Proxy {
    /// Its name.
    pub name: String,
    /// Who takes what goes there.
    pub server: Server,
    /// TCP goes there.
    pub tcp: bool,
    /// UDP goes there.
    pub udp: bool,
    /// IPv4 goes there.
    pub ipv4: bool,
    /// IPv6 goes there.
    pub ipv6: bool,
    /// Where DNS queries go.
    pub dns: Option<Dns>,
}

/// How connections get to a proxy, and what listens for them on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Server {
    /// A TPROXY server on this port.
    Tproxy(u16),
    /// A server on this port, to which connections are redirected.
    Redirect(u16),
    /// The relay, on ports of its own choice.
    Relay {
        /// It answers DNS queries itself.
        fake_dns: bool,
        /// Where the proxy is that it carries connections on to, if that is at a loopback address.
        here: Option<Here>,
        /// Whose it may be there, beside the user's own, root's and system users'.
        users: Vec<u32>,
    },
}

/// Where a proxy is that the relay reaches on this machine: at one of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Here {
    /// Its address of IPv4.
    pub ipv4: Option<Ipv4Addr>,
    /// Its address of IPv6.
    pub ipv6: Option<Ipv6Addr>,
    /// Its port.
    pub port: u16,
}

impl Server {
    /// The port that the user has to see to; none for the relay's.
    pub(crate) fn port(&self) -> Option<u16> {
        match self {
            Self::Tproxy(port) | Self::Redirect(port) => Some(*port),
            Self::Relay { .. } => None,
        }
    }
}

/// A server for hijacked queries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Dns {
    /// For queries over IPv4.
    pub ipv4: Option<Ipv4Addr>,
    /// For queries over IPv6.
    pub ipv6: Option<Ipv6Addr>,
    /// Its port.
    pub port: u16,
    /// Over TCP too.
    pub tcp: bool,
}

/// How control groups are mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hierarchy {
    /// Version 2 alone.
    Unified,
    /// Version 2 beside version 1.
    Hybrid,
    /// Version 1 alone, or nothing.
    None,
}

/// A user's service manager.
#[derive(Debug, Clone)]
pub(crate) struct Manager {
    /// The path of its control group, from the root.
    pub path: String,
    /// Whose its control group is; none if it is not there.
    pub owner: Look<Option<u32>>,
    /// The control groups in it, itself included: ids and paths as messages have them.
    pub groups: Look<Vec<(u64, String)>>,
    /// Whether this is a container, from where others have other paths.
    pub in_container: bool,
}

/// A user's login sessions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Session {
    /// The desktop, as it calls itself.
    pub desktop: Option<String>,
    /// How many processes with a display are in sessions, outside of the service manager.
    pub graphical: usize,
}

/// Limits of inotify for each user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Inotify {
    /// Watches.
    pub watches: u64,
    /// Descriptors.
    pub instances: u64,
}

/// TCP or UDP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
        })
    }
}

/// An address family.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Family {
    /// IPv4.
    #[default]
    Ipv4,
    /// IPv6.
    Ipv6,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ipv4 => "IPv4",
            Self::Ipv6 => "IPv6",
        })
    }
}

/// A socket that takes connections or datagrams from everybody.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listener {
    /// TCP or UDP.
    pub transport: Transport,
    /// Where.
    pub address: IpAddr,
    /// On which port.
    pub port: u16,
    /// Whose it is.
    pub uid: u32,
    /// It takes IPv6 alone, if it is of IPv6.
    pub only_v6: bool,
    /// Whether it is transparent; none before Linux 5.10.
    pub transparent: Option<bool>,
    /// The id of its control group; none before Linux 5.9.
    pub control_group: Option<u64>,
}

/// A routing rule (`ip rule`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Rule {
    /// Whose packets it is about.
    pub family: Family,
    /// Lower is earlier.
    pub priority: u32,
    /// `not`
    pub inverted: bool,
    /// `fwmark VALUE/MASK`
    pub mark: Option<(u32, u32)>,
    /// It looks at something else too: addresses, interfaces, ports, users.
    pub narrower: bool,
    /// `suppress_prefixlength`: some of the table's routes do not count.
    pub suppressed: bool,
    /// The table that it looks up; none if it does something else.
    pub table: Option<u32>,
}

/// The network of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Network {
    /// There is a way to the internet over IPv4.
    pub ipv4_route: Look<bool>,
    /// The kernel has IPv6.
    pub ipv6: bool,
    /// There is a way to the internet over IPv6.
    pub ipv6_route: Look<bool>,
    /// IPv6 is switched off on lo.
    pub ipv6_off_on_lo: Look<bool>,
    /// IPv6 is switched off on all interfaces.
    pub ipv6_off: Look<bool>,
    /// There is a bridge, and what it carries meets the rules for routed packets (br_netfilter).
    pub bridge_filter: bool,
    /// The connections that the kernel tracks; none if it tracks none at all.
    pub tracked: Look<Option<Tracked>>,
}

impl Network {
    /// Whether programs can use IPv6.
    pub(crate) fn has_ipv6(&self) -> bool {
        self.ipv6 && self.ipv6_off != Ok(true)
    }
}

/// The kernel's table of connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tracked {
    /// How many are in it.
    pub count: u64,
    /// How many there may be; 0 for any number.
    pub max: u64,
}

/// What the configuration's `gateway` rests on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Gateway {
    /// The name of the proxy.
    pub proxy: String,
    /// The variables of sysctl that would have to be 1 for packets to be forwarded.
    pub forwarding_off: Look<Vec<String>>,
    /// The variables `src_valid_mark` that are 1, for all interfaces or for those of the `gateway`.
    pub src_valid_mark: Look<Vec<String>>,
    /// The interfaces that are bridges.
    pub bridges: Vec<String>,
}

/// The rest of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct System {
    /// Linux's version and patch level.
    pub linux: Look<(u32, u32)>,
    /// Those of net_cls and net_prio that a hierarchy of version 1 has.
    pub v1_network_controllers: Look<Vec<String>>,
    /// What /etc/nsswitch.conf says.
    pub nsswitch: Look<String>,
    /// What /etc/resolv.conf says.
    pub resolv: Look<String>,
    /// systemd-resolved answers to nss-resolve.
    pub resolved: bool,
    /// nscd runs, and looks up names of hosts.
    pub nscd: bool,
    /// systemd-networkd runs.
    pub networkd: Look<bool>,
    /// It removes rules of others.
    pub networkd_removes_rules: Look<bool>,
    /// The daemon of the original cgtproxy runs.
    pub original: Look<bool>,
}

impl Facts {
    /// A command that asks the agent, which is the system's if this one is about that.
    pub(crate) fn command(&self, command: &str) -> String {
        match self.scope {
            Scope::User => format!("cgtproxy-agent {command}"),
            Scope::System => format!("cgtproxy-agent --system {command}"),
        }
    }

    /// A command about the file that this one is about.
    pub(crate) fn file_command(&self, command: &str) -> String {
        if !self.config_named {
            return self.command(command);
        }
        let file = quoted(&self.config_file.to_string_lossy());
        self.command(&format!("--config {file} {command}"))
    }

    /// Whether the agent says that the helper has answered it.
    pub(crate) fn agent_is_connected(&self) -> bool {
        matches!(&self.agent, Agent::Answers(status) if status.connected)
    }

    /// The proxies that matter: those of the file, or those in force if the file is of no use.
    pub(crate) fn proxies(&self) -> Vec<Proxy> {
        match (&self.config, &self.helper) {
            (ConfigState::Read(proxies), _) => proxies.clone(),
            (_, Helper::Answers(status, _)) => {
                status.proxies.iter().filter_map(ask::in_force).collect()
            }
            _ => Vec::new(),
        }
    }

    /// The proxies that the relay carries connections on to.
    pub(crate) fn relayed(&self) -> Vec<Proxy> {
        let mut proxies = self.proxies();
        proxies.retain(|proxy| matches!(proxy.server, Server::Relay { .. }));
        proxies
    }

    /// What the helper has to say about the machine.
    ///
    /// # Errors
    /// Why it says nothing.
    pub(crate) fn diagnosis(&self) -> Look<&Diagnose_Reply> {
        match &self.helper {
            Helper::Answers(_, diagnosis) => diagnosis.as_ref().map_err(Clone::clone),
            _ => Err("only the helper can look at it".to_owned()),
        }
    }

    /// What becomes of what no rule of the agent's decides.
    pub(crate) fn otherwise(&self) -> Otherwise {
        let agent = match &self.agent {
            Agent::Answers(status) => Some(status.as_ref()),
            _ => None,
        };
        Otherwise::new(self.scope, self.uid, self.helper_status(), agent)
    }

    /// What the helper says about itself and this user.
    pub(crate) fn helper_status(&self) -> Option<&HelperStatus> {
        match &self.helper {
            Helper::Answers(status, _) => Some(status),
            _ => None,
        }
    }
}
