//! What a policy is made of: what users and root say of control groups, proxies and destinations.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU16;
use std::rc::Rc;

use cgtproxy_proto::interface::InterfaceName;
use cgtproxy_proto::name::ProxyName;
use serde::{Deserialize, Serialize};

use super::rule::Protocol;
use crate::cgroup::DEEPEST_LEVEL;
use crate::mark::Mark;
use crate::route::Family;

/// What happens to packets of a control group's sockets.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// They leave as if cgtproxy were not there.
    Direct,
    /// None leaves but to bypassed destinations.
    Drop,
    /// None leaves.
    DropAll,
    /// TCP and UDP go to this proxy, which the layout has.
    Proxy(ProxyName),
    /// They leave as if the policy said nothing about the control group nor about what it is in: what no rule decides,
    /// where that has to be said, and what went to a proxy whose agent is gone.
    Undecided,
}

impl Verdict {
    /// Those that every policy has, whatever its proxies are.
    pub(super) const COMMON: [Self; 4] = [Self::Direct, Self::Drop, Self::DropAll, Self::Undecided];
}

/// What the machine's own UDP goes by that no proxy has taken. That which a proxy has taken stays with it in any case.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum UdpVerdicts {
    /// The verdict at the first datagram that the kernel knows of, whoever sent it. Later ones cost no look-up.
    #[default]
    PerConversation,
    /// The verdict of each datagram's own sender.
    PerDatagram,
}

/// Which part of an element users' own policies can't change. In the system's policy only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Enforced {
    /// Nothing.
    Nothing,
    /// What it holds, but not its verdict.
    Hold,
    /// All of it.
    All,
}

/// What is said about a control group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Element {
    /// What happens to packets of its own sockets, and of those below it unless they are held.
    pub verdict: Verdict,
    /// Control groups below it that have no element of their own send nothing.
    pub hold: bool,
    /// Which part of it users' own policies can't change.
    pub enforced: Enforced,
}

impl Element {
    /// Whether anything is dropped or held.
    #[must_use]
    pub fn holds_back(&self) -> bool {
        self.hold || matches!(self.verdict, Verdict::Drop | Verdict::DropAll)
    }
}

impl From<Verdict> for Element {
    /// Nothing below it is held, and nothing enforced.
    fn from(verdict: Verdict) -> Self {
        Self {
            verdict,
            hold: false,
            enforced: Enforced::Nothing,
        }
    }
}

/// A chain for control groups whose sockets have a verdict and below which everything is held. It is
/// for all of them that are at one level and have one verdict.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hold {
    /// The level of what is held: the one below these control groups.
    pub level: u32,
    /// What happens to packets of these control groups' own sockets. None: users' own policies decide about them, and
    /// then the system's.
    pub verdict: Option<Verdict>,
}

impl Hold {
    /// Whether all users can have one chain for it: it leads to nothing of any of them.
    #[must_use]
    pub fn is_common(&self) -> bool {
        !matches!(self.verdict, Some(Verdict::Proxy(_)))
    }

    /// The chain that the number of an element at `level` leads to, if it needs one: where nothing leaves anyway
    /// there is nothing to hold, and what is deeper than `DEEPEST_LEVEL` is never told apart from its parent.
    #[must_use]
    pub fn of(level: u32, element: &Element) -> Option<Self> {
        let leaves = || element.verdict != Verdict::DropAll || element.enforced == Enforced::Hold;
        let wanted = element.hold && leaves() && level < DEEPEST_LEVEL;
        wanted.then(|| Self {
            level: level + 1,
            verdict: Some(element.verdict.clone()),
        })
    }

    /// The chain that an element at `level` leads to before users' own policies, if it needs one for that.
    #[must_use]
    pub fn before_users(level: u32, element: &Element) -> Option<Self> {
        let hold = Self::of(level, element).filter(|_| element.enforced == Enforced::Hold);
        hold.map(|hold| Self {
            verdict: None,
            ..hold
        })
    }

    /// All chains that an element at `level` leads to.
    pub fn all_of(level: u32, element: &Element) -> impl Iterator<Item = Self> {
        let chains = [Self::of(level, element), Self::before_users(level, element)];
        chains.into_iter().flatten()
    }
}

/// Where DNS queries go instead of to the server that they ask.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsHijack {
    /// At most one address of each family; queries of a family without one are packets as others.
    pub addresses: Vec<IpAddr>,
    /// The port there.
    pub port: NonZeroU16,
    /// DNS over TCP too.
    pub tcp: bool,
    /// Queries to servers on the loopback interface too, if the address is there as well.
    pub loopback: bool,
    /// Only a socket below the user's own subtree answers. Otherwise any socket may, but for those in other users' slices.
    pub own: bool,
}

/// How packets get to a proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Delivery {
    /// It is a TPROXY server on this TCP and UDP port: packets keep their destination.
    Tproxy(NonZeroU16),
    /// It listens on this TCP and UDP port of 127.0.0.1 and ::1, and packets are sent there; without a
    /// port nobody listens yet.
    Redirect(Option<NonZeroU16>),
}

impl Delivery {
    /// The port; 0 if nobody listens yet.
    #[must_use]
    pub fn port(self) -> u16 {
        match self {
            Self::Tproxy(port) => port.get(),
            Self::Redirect(port) => port.map_or(0, NonZeroU16::get),
        }
    }
}

/// What a proxy does not take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exceptions {
    /// TCP goes direct.
    pub no_tcp: bool,
    /// UDP goes direct.
    pub no_udp: bool,
    /// IPv4 goes direct.
    pub no_ipv4: bool,
    /// IPv6 goes direct.
    pub no_ipv6: bool,
}

impl Exceptions {
    /// Whether the proxy takes this protocol.
    pub(super) fn takes(self, protocol: Protocol) -> bool {
        match protocol {
            Protocol::Tcp => !self.no_tcp,
            Protocol::Udp => !self.no_udp,
        }
    }

    /// Whether the proxy takes this family.
    pub(super) fn takes_family(self, family: Family) -> bool {
        match family {
            Family::Ipv4 => !self.no_ipv4,
            Family::Ipv6 => !self.no_ipv6,
        }
    }
}

/// Networks of fake addresses, which stand for names and which only their proxy knows: an address and the length of the
/// prefix.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fakes {
    /// The IPv4 network.
    pub ipv4: Option<(Ipv4Addr, u8)>,
    /// The IPv6 network.
    pub ipv6: Option<(Ipv6Addr, u8)>,
}

impl Fakes {
    /// Those that there are.
    pub(super) fn networks(self) -> impl Iterator<Item = (IpAddr, u8)> {
        let ipv4 = self.ipv4.map(|(address, prefix)| (address.into(), prefix));
        let ipv6 = self.ipv6.map(|(address, prefix)| (address.into(), prefix));
        [ipv4, ipv6].into_iter().flatten()
    }
}

/// What the machine forwards from these interfaces goes to a proxy too. In the system's policy only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gateway {
    /// Where it comes in.
    pub interfaces: BTreeSet<InterfaceName>,
    /// Where it goes, which the layout has.
    pub proxy: ProxyName,
}

/// A proxy and the mark that leads to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proxy {
    /// In force as long as the proxy is in the user's policy.
    pub mark: Mark,
    /// What the policy says of it.
    pub settings: ProxySettings,
}

/// A proxy as a policy asks for it. The snapshot has it as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProxySettings {
    /// Where it listens.
    pub delivery: Delivery,
    /// What goes direct.
    pub exceptions: Exceptions,
    /// UDP that does not go direct is refused.
    pub reject_udp: bool,
    /// Where DNS queries go, before any of that.
    pub dns_hijack: Option<DnsHijack>,
    /// Fake addresses: what is sent there goes to the proxy or is refused.
    pub fakes: Fakes,
}

impl Proxy {
    /// Whether anything that it takes is translated, so that it has a chain `receive-UID-NAME`.
    pub(super) fn is_translated(&self) -> bool {
        self.settings.dns_hijack.is_some()
            || matches!(self.settings.delivery, Delivery::Redirect(_))
    }
}

/// Destinations that neither a proxy nor a drop touches: ranges in ascending order that neither
/// overlap nor touch, first and last address included. The snapshot has them as they are.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bypass {
    /// IPv4.
    pub ipv4: Vec<(Ipv4Addr, Ipv4Addr)>,
    /// IPv6.
    pub ipv6: Vec<(Ipv6Addr, Ipv6Addr)>,
}

impl Bypass {
    /// Whether it has no destination.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ipv4.is_empty() && self.ipv6.is_empty()
    }
}

/// A bypass list as the table has it: in sets that have its number, once for all users who bypass the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BypassList {
    /// Its number, which no other list has.
    pub number: u32,
    /// What is in it, which is never empty.
    pub destinations: Rc<Bypass>,
}
