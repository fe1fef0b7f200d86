//! The user's configuration file: what it means, once what was typed has been found right.

mod environment;
mod finding;
mod migrate;
mod mount_point;
mod read;
mod reader;
mod upstream;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use cgtproxy_proto::file;
use cgtproxy_proto::interface::InterfaceName;
use cgtproxy_proto::name::ProxyName;
use cgtproxy_proto::network::{FAKE_IPV4, FAKE_IPV6};

use crate::policy::{DEFAULT_PROXY, ExecSlices, Rules, Start, Target};

pub(crate) use cgtproxy_proto::network::Network;
pub(crate) use cgtproxy_proto::yaml;
pub(crate) use environment::Environment;
pub(crate) use finding::{Findings, Severity};
pub(crate) use migrate::migrate;
pub(crate) use read::read;
pub(crate) use upstream::{Scheme, Upstream};

/// Whose configuration it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    /// A user's: about that user's own control groups.
    User,
    /// Root's: about all control groups of the machine, and what it forwards.
    System,
}

impl Scope {
    /// What to call its agent.
    pub(crate) fn agent(self) -> &'static str {
        match self {
            Self::User => "cgtproxy-agent",
            Self::System => "the system's cgtproxy-agent",
        }
    }
}

/// The file that the configuration is in.
#[derive(Debug, Clone)]
pub(crate) struct ConfigFile {
    /// Where it is.
    pub path: PathBuf,
    /// The user named it, so it must be there.
    pub explicit: bool,
    /// Whose it is.
    pub scope: Scope,
}

/// What is forwarded, and where it goes. In the system's configuration only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Gateway {
    /// The network interfaces that the machines behind this one are at.
    pub interfaces: Vec<InterfaceName>,
    /// The tproxy that forwarded traffic goes to.
    pub proxy: Rc<ProxyName>,
}

/// How connections get to a proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Means {
    /// The proxy is a TPROXY server on this port of this machine.
    Tproxy(NonZeroU16),
    /// Connections are redirected to this port of this machine.
    Redirect(NonZeroU16),
    /// The relay carries them on to a proxy elsewhere.
    Relay {
        /// The proxy.
        upstream: Upstream,
        /// DNS queries are answered with addresses that stand for names.
        fake_dns: bool,
    },
}

/// A proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Proxy {
    /// The proxy's name.
    pub name: Rc<ProxyName>,
    /// How connections get to it.
    pub means: Means,
    /// TCP goes direct.
    pub no_tcp: bool,
    /// UDP goes direct.
    pub no_udp: bool,
    /// IPv4 goes direct.
    pub no_ipv4: bool,
    /// IPv6 goes direct.
    pub no_ipv6: bool,
    /// Where DNS queries go, whatever the proxy leaves out.
    pub dns_hijack: Option<DnsHijack>,
}

/// The DNS server that answers in place of the one that is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DnsHijack {
    /// For queries over IPv4.
    pub ipv4: Option<Ipv4Addr>,
    /// For queries over IPv6.
    pub ipv6: Option<Ipv6Addr>,
    /// The server's port.
    pub port: NonZeroU16,
    /// DNS over TCP too.
    pub tcp: bool,
    /// Queries to stubs on the loopback interface too.
    pub loopback: bool,
}

/// By what control groups are noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Monitor {
    /// By inotify; and where that can't be, by what systemd tells.
    #[default]
    Auto,
    /// By inotify alone.
    Inotify,
    /// By what systemd tells over D-Bus alone.
    Dbus,
}

/// Networks of addresses that stand for names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct FakeAddresses {
    /// The network of IPv4 addresses; none: the relay's own choice.
    pub ipv4: Option<Network>,
    /// The network of IPv6 addresses; none: the relay's own choice.
    pub ipv6: Option<Network>,
}

impl FakeAddresses {
    /// The network of IPv4 and that of IPv6, as an address and the length of its prefix.
    pub(crate) fn networks(&self) -> [(IpAddr, u8); 2] {
        let (ipv4, prefix4) = self.ipv4.and_then(Network::ipv4).unwrap_or(FAKE_IPV4);
        let (ipv6, prefix6) = self.ipv6.and_then(Network::ipv6).unwrap_or(FAKE_IPV6);
        [(ipv4.into(), prefix4), (ipv6.into(), prefix6)]
    }
}

/// What a configuration file means.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    /// The proxies, in the order of the file.
    pub proxies: Vec<Proxy>,
    /// Networks of addresses that stand for names, if they are not the relay's default ones.
    pub fake_addresses: FakeAddresses,
    /// Destinations that no proxy and no drop touches.
    pub bypass: Vec<Network>,
    /// What decides about verdicts.
    pub rules: Rc<Rules>,
    /// By what control groups are noticed.
    pub monitor: Monitor,
    /// What is forwarded; none: that is left alone.
    pub gateway: Option<Gateway>,
}

impl Config {
    /// What holds without a file: everything goes direct, but for what a user's cgtproxy-exec drops.
    pub(crate) fn without_file(scope: Scope) -> Self {
        let users = scope == Scope::User;
        Self {
            proxies: Vec::new(),
            fake_addresses: FakeAddresses::default(),
            bypass: Vec::new(),
            rules: Rc::new(Rules {
                users,
                exec_slices: users.then(|| ExecSlices::new([])),
                rules: Vec::new(),
                start: Start::Open,
            }),
            monitor: Monitor::default(),
            gateway: None,
        }
    }

    /// What holds without a user's file where the environment names a proxy: everything goes direct, but
    /// `cgtproxy-exec proxy` uses it.
    pub(crate) fn with_proxy(upstream: Upstream) -> Option<Self> {
        let name: Rc<ProxyName> = Rc::new(DEFAULT_PROXY.parse().ok()?);
        let fake_dns = upstream.scheme != Scheme::Socks5;
        let config = Self::without_file(Scope::User);
        Some(Self {
            rules: Rc::new(Rules {
                exec_slices: Some(ExecSlices::new([&name])),
                ..Rules::clone(&config.rules)
            }),
            proxies: vec![Proxy {
                name,
                means: Means::Relay { upstream, fake_dns },
                no_tcp: false,
                no_udp: false,
                no_ipv4: false,
                no_ipv6: false,
                dns_hijack: None,
            }],
            ..config
        })
    }

    /// The target of this name; `proxy` is the first proxy unless one has that name.
    pub(crate) fn target(&self, name: &str) -> Option<Target> {
        match name {
            "direct" => Some(Target::Direct),
            "drop" => Some(Target::Drop),
            _ => {
                let named = self.proxies.iter().find(|p| p.name.as_str() == name);
                let first = || self.proxies.first().filter(|_| name == DEFAULT_PROXY);
                let proxy = named.or_else(first)?;
                Some(Target::Proxy(proxy.name.clone()))
            }
        }
    }

    /// The names of all targets.
    pub(crate) fn target_names(&self) -> Vec<String> {
        target_names(self.proxies.iter().map(|p| p.name.to_string()).collect())
    }
}

/// The names of all targets, given those of the proxies: the first one has another name, unless that is taken.
fn target_names(proxies: Vec<String>) -> Vec<String> {
    let mut names: Vec<_> = ["direct", "drop"].map(str::to_owned).into();
    if !proxies.is_empty() && proxies.iter().all(|name| name != DEFAULT_PROXY) {
        names.push(DEFAULT_PROXY.to_owned());
    }
    names.extend(proxies);
    names
}

/// Why a file gave no configuration.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoadError {
    /// There is no such file.
    #[error("there is no file {}", .0.display())]
    Missing(PathBuf),
    /// A link on the way to it leads to nothing, which may be there later: a file system that is yet to be mounted.
    #[error("there is no file {}: {} is a link to {}, and nothing is there", .file.display(), .link.display(), .target.display())]
    Nowhere {
        /// The file.
        file: PathBuf,
        /// The link.
        link: PathBuf,
        /// Where the link leads.
        target: PathBuf,
    },
    /// The file can't be read.
    #[error("can't read {}", .file.display())]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file is no configuration.
    #[error("{}", .0.errors_in_one_line())]
    Invalid(Findings),
}

/// A file as it was read.
#[derive(Debug)]
pub(crate) struct Loaded {
    /// What the file means.
    pub config: Config,
    /// Warnings, for there are no errors.
    pub findings: Findings,
}

/// The file's bytes, but not more than a configuration may have.
///
/// # Errors
/// If there is no such file, it is a link to nothing, or it can't be read.
pub(crate) fn read_file(path: &Path) -> Result<Vec<u8>, LoadError> {
    let unreadable = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => match link_to_nothing(path) {
            Some((link, target)) => LoadError::Nowhere {
                file: path.to_owned(),
                link,
                target,
            },
            None => LoadError::Missing(path.to_owned()),
        },
        _ => LoadError::Unreadable {
            file: path.to_owned(),
            source,
        },
    };
    file::read(path).map_err(unreadable)
}

/// The link on the way to a file that leads to nothing, and where it leads.
pub(crate) fn link_to_nothing(file: &Path) -> Option<(PathBuf, PathBuf)> {
    let last = file
        .ancestors()
        .find(|path| path.symlink_metadata().is_ok())?;
    if last.exists() {
        return None;
    }
    let target = last.read_link().ok()?;
    Some((last.to_owned(), target))
}

/// Loads a configuration file.
///
/// # Errors
/// If there is none, it can't be read or anything in it is wrong.
pub(crate) fn load(file: &Path, scope: Scope) -> Result<Loaded, LoadError> {
    parse(file, &read_file(file)?, scope)
}

/// Makes a configuration of the bytes of `file`.
///
/// # Errors
/// If anything in them is wrong.
pub(crate) fn parse(file: &Path, bytes: &[u8], scope: Scope) -> Result<Loaded, LoadError> {
    let (config, findings) = read(file, bytes, scope);
    match config {
        Some(config) => Ok(Loaded { config, findings }),
        None => Err(LoadError::Invalid(findings)),
    }
}

#[cfg(test)]
mod tests {
    use super::target_names;

    #[test]
    fn the_first_proxy_has_two_names() {
        let names = |names: &[&str]| target_names(names.iter().map(|&n| n.to_owned()).collect());
        assert_eq!(names(&[]), ["direct", "drop"]);
        assert_eq!(names(&["a", "b"]), ["direct", "drop", "proxy", "a", "b"]);
        assert_eq!(names(&["a", "proxy"]), ["direct", "drop", "a", "proxy"]);
    }
}
