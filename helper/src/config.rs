//! The administrator's configuration, /etc/cgtproxy/helper.yaml.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cgtproxy_proto::file;
use cgtproxy_proto::limits::MESSAGE_BYTES;
use cgtproxy_proto::yaml::{self, Node, Place, Value};

use crate::access::Access;
use crate::mark::MarkRange;
use crate::nft::UdpVerdicts;

mod accounts;
mod reader;

use accounts::{Account, accounts, users_and_groups};
use reader::{Entry, Wrong, boolean, number, set_all, wrong_value};

/// Where the configuration is unless `--config` says otherwise. It may be absent.
const DEFAULT_PATH: &str = "/etc/cgtproxy/helper.yaml";

/// The letters 'cg' as a number: others mostly choose small ones.
const ROUTE_TABLE: u32 = 0x6367;

/// Small, so that it comes before other programs' rules.
const RULE_PRIORITY: u32 = 800;

/// An agent that is started again is back by then.
const GRACE: Duration = Duration::from_secs(5);

/// What becomes of a user's policy when the agent is gone and does not come back within the grace.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OnAgentLoss {
    /// What is dropped or held stays so, and the rest is as if the user had no policy.
    #[default]
    Keep,
    /// Nothing stays.
    Direct,
    /// Everything is dropped, whatever the policy said.
    Drop,
}

impl fmt::Display for OnAgentLoss {
    /// What is in force after that loss.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Keep => "what is dropped stays so, the rest is as without a policy",
            Self::Direct => "everything is as without a policy",
            Self::Drop => "everything is dropped",
        })
    }
}

/// How much one user may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections that are open at the same time.
    pub connections: usize,
    /// Bytes of messages that are not whole, not dealt with or not answered yet, on all of them. One whole message must fit.
    pub message_bytes: usize,
    /// Calls in a second, in the long run.
    pub calls_per_second: usize,
    /// Proxies in a policy.
    pub proxies: usize,
    /// Bypass entries in a policy.
    pub bypass: usize,
    /// Control groups with a verdict of their own.
    pub control_groups: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 16,
            message_bytes: 2 * MESSAGE_BYTES,
            calls_per_second: 100,
            proxies: 16,
            bypass: 1024,
            control_groups: 16384,
        }
    }
}

/// What the file means.
#[derive(Debug, Clone)]
pub struct Config {
    /// The bits of packet and connection marks that are ours.
    pub marks: MarkRange,
    /// The number of the routing table whose only route leads to lo.
    pub route_table: u32,
    /// The priority of the `ip rule` that looks this table up.
    pub rule_priority: u32,
    /// How long a policy outlives its agent's connection.
    pub grace: Duration,
    /// What becomes of the policy after the grace.
    pub on_agent_loss: OnAgentLoss,
    /// Whether to protect the table from other programs where the kernel can.
    pub own_table: bool,
    /// What UDP that no proxy has taken goes by.
    pub udp_verdicts: UdpVerdicts,
    /// Uids besides the user's own whose proxies may receive diverted packets; root is one of them.
    pub proxy_uids: Vec<u32>,
    /// Who may use the helper.
    pub access: Access,
    /// How much one user may have.
    pub limits: Limits,
}

impl Default for Config {
    /// What holds where there is no file.
    fn default() -> Self {
        Self {
            marks: MarkRange::default(),
            route_table: ROUTE_TABLE,
            rule_priority: RULE_PRIORITY,
            grace: GRACE,
            on_agent_loss: OnAgentLoss::default(),
            own_table: true,
            udp_verdicts: UdpVerdicts::default(),
            proxy_uids: vec![0],
            access: Access::default(),
            limits: Limits::default(),
        }
    }
}

const ANY_NUMBER: &str = "a number from 0 to 4294967295";

/// Why a configuration is refused.
#[derive(Debug)]
pub struct Error {
    path: PathBuf,
    problem: Problem,
}

/// What is wrong with a configuration file.
#[derive(Debug)]
enum Problem {
    /// There is no such file.
    Absent,
    /// The file can't be read.
    Unreadable(io::Error),
    /// A link leads to where nothing is seen.
    Nowhere { link: PathBuf, target: PathBuf },
    /// Something in the file is wrong.
    Wrong(Wrong),
    /// A database can't be asked for the name that stands there.
    Unknown {
        place: Place,
        name: String,
        source: io::Error,
    },
}

impl From<Wrong> for Problem {
    fn from(wrong: Wrong) -> Self {
        Self::Wrong(wrong)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        match &self.problem {
            Problem::Absent => write!(f, "there is no file '{path}'"),
            Problem::Unreadable(_) => write!(f, "can't read '{path}'"),
            Problem::Nowhere { link, target } => write!(
                f,
                "can't read '{path}': '{}' is a link to '{}', and the helper sees nothing there; \
                 its unit shows it /etc and /usr, and what BindReadOnlyPaths= adds",
                link.display(),
                target.display()
            ),
            Problem::Wrong(Wrong { place, message }) => {
                write!(f, "{path}:{}:{}: {message}", place.line, place.column)
            }
            Problem::Unknown { place, name, .. } => write!(
                f,
                "{path}:{}:{}: can't look '{name}' up",
                place.line, place.column
            ),
        }
    }
}

impl Error {
    /// Whether the file is to blame: another try with the same one would come to nothing.
    #[must_use]
    pub fn is_of_the_file(&self) -> bool {
        !matches!(self.problem, Problem::Unknown { .. })
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.problem {
            Problem::Unreadable(source) | Problem::Unknown { source, .. } => Some(source),
            _ => None,
        }
    }
}

impl Config {
    /// Reads `path`, or the default file if there is one.
    ///
    /// # Errors
    /// If the file that was named is absent, or either is wrong.
    pub fn load(path: Option<&Path>) -> Result<Self, Error> {
        match path {
            Some(path) => {
                let absent = || Error {
                    path: path.to_owned(),
                    problem: Problem::Absent,
                };
                Self::parse_bytes(&read(path)?.ok_or_else(absent)?, path)
            }
            None => Self::load_if_there(Path::new(DEFAULT_PATH)),
        }
    }

    fn load_if_there(path: &Path) -> Result<Self, Error> {
        Self::parse_bytes(&read(path)?.unwrap_or_default(), path)
    }

    #[cfg(any(test, fuzzing))]
    pub(crate) fn parse(text: &str, path: &Path) -> Result<Self, Error> {
        Self::parse_bytes(text.as_bytes(), path)
    }

    fn parse_bytes(bytes: &[u8], path: &Path) -> Result<Self, Error> {
        let root = yaml::text(bytes).and_then(yaml::parse);
        let root = root.map_err(|error| Wrong::from(error).into());
        root.and_then(|root| Self::of(&root))
            .map_err(|problem| Error {
                path: path.to_owned(),
                problem,
            })
    }

    fn of(root: &Node) -> Result<Self, Problem> {
        let mut config = Self::default();
        if !matches!(root.value, Value::Null) {
            set_all(&mut config, root, None, &ENTRIES)?;
        }
        config.proxy_uids.sort_unstable();
        config.proxy_uids.dedup();
        Ok(config)
    }
}

/// All keys of the file, and what each of them sets.
const ENTRIES: [Entry<Config>; 11] = [
    ("mark-mask", |config, node, key| {
        let mask = number(node, key, ANY_NUMBER, |_| true)?;
        config.marks = MarkRange::new(mask)
            .map_err(|why| Wrong::new(node, format!("'{key}' is {mask:#010x}: {why}")))?;
        Ok(())
    }),
    ("route-table", |config, node, key| {
        let wanted = "another number: 0 and 253 to 255 are the system's own tables";
        // 253 to 255 are the tables default, main and local (linux/rtnetlink.h).
        let allowed = |table: &u32| !matches!(table, 0 | 253..=255);
        config.route_table = number(node, key, wanted, allowed)?;
        Ok(())
    }),
    ("rule-priority", |config, node, key| {
        let wanted = "a number from 1 to 32765, between the rules for the tables local and main";
        // Rule 0 looks the local table up, 32766 the main one.
        let allowed = |priority: &u32| (1..32766).contains(priority);
        config.rule_priority = number(node, key, wanted, allowed)?;
        Ok(())
    }),
    ("grace-seconds", |config, node, key| {
        let seconds: u32 = number(node, key, ANY_NUMBER, |_| true)?;
        config.grace = Duration::from_secs(seconds.into());
        Ok(())
    }),
    ("on-agent-loss", |config, node, key| {
        config.on_agent_loss = on_agent_loss(node, key)?;
        Ok(())
    }),
    ("own-table", |config, node, key| {
        config.own_table = boolean(node, key)?;
        Ok(())
    }),
    ("udp-verdicts", |config, node, key| {
        config.udp_verdicts = udp_verdicts(node, key)?;
        Ok(())
    }),
    ("proxy-users", |config, node, key| {
        let uids = accounts(node, key, Account::User)?;
        config.proxy_uids.extend(uids);
        Ok(())
    }),
    ("allow", |config, node, key| {
        config.access.allow = Some(users_and_groups(node, key)?);
        Ok(())
    }),
    ("deny", |config, node, key| {
        config.access.deny = users_and_groups(node, key)?;
        Ok(())
    }),
    ("limits", |config, node, key| {
        set_all(&mut config.limits, node, Some(key), &LIMITS)
    }),
];

/// All keys of `limits`, and what each of them sets.
const LIMITS: [Entry<Limits>; 6] = [
    ("connections", |limits, node, key| {
        limits.connections = any_number(node, key)?;
        Ok(())
    }),
    ("message-bytes", |limits, node, key| {
        let least = MESSAGE_BYTES + 64 * 1024;
        let wanted = format!("at least {least}, which one message of the longest length needs");
        limits.message_bytes = number(node, key, &wanted, |bytes| *bytes >= least)?;
        Ok(())
    }),
    ("calls-per-second", |limits, node, key| {
        let wanted = "a number from 1 to 1000000";
        let allowed = |calls: &usize| (1..=1_000_000).contains(calls);
        limits.calls_per_second = number(node, key, wanted, allowed)?;
        Ok(())
    }),
    ("proxies", |limits, node, key| {
        limits.proxies = any_number(node, key)?;
        Ok(())
    }),
    ("bypass", |limits, node, key| {
        limits.bypass = any_number(node, key)?;
        Ok(())
    }),
    ("control-groups", |limits, node, key| {
        limits.control_groups = any_number(node, key)?;
        Ok(())
    }),
];

/// All keys of the file, and of the maps in it whose keys are its own.
pub fn keys() -> impl Iterator<Item = &'static str> {
    let keys = ENTRIES.iter().map(|(key, _)| *key);
    keys.chain(LIMITS.iter().map(|(key, _)| *key))
}

fn any_number(node: &Node, key: &str) -> Result<usize, Wrong> {
    number(node, key, "a number that is not negative", |_| true)
}

fn on_agent_loss(node: &Node, key: &str) -> Result<OnAgentLoss, Wrong> {
    match &node.value {
        Value::Text(text) if text == "keep" => Ok(OnAgentLoss::Keep),
        Value::Text(text) if text == "direct" => Ok(OnAgentLoss::Direct),
        Value::Text(text) if text == "drop" => Ok(OnAgentLoss::Drop),
        _ => Err(wrong_value(node, key, "'keep', 'direct' or 'drop'")),
    }
}

fn udp_verdicts(node: &Node, key: &str) -> Result<UdpVerdicts, Wrong> {
    match &node.value {
        Value::Text(text) if text == "per-conversation" => Ok(UdpVerdicts::PerConversation),
        Value::Text(text) if text == "per-datagram" => Ok(UdpVerdicts::PerDatagram),
        _ => Err(wrong_value(
            node,
            key,
            "'per-conversation' or 'per-datagram'",
        )),
    }
}

/// What is in the file; none if there is none. A link to where nothing is to be seen is not that: what it leads to may
/// well be there, and say who is denied.
fn read(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    let refuse = |problem| {
        Err(Error {
            path: path.to_owned(),
            problem,
        })
    };
    match file::read(path) {
        Ok(bytes) => return Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return refuse(Problem::Unreadable(error)),
    }
    let links = [Some(path), path.parent()].into_iter().flatten();
    for link in links.filter(|link| !link.exists()) {
        if let Ok(target) = std::fs::read_link(link) {
            return refuse(Problem::Nowhere {
                link: link.to_owned(),
                target,
            });
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests;
