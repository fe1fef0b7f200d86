//! The administrator's configuration, /etc/cgtproxy/helper.yaml.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cgtproxy_proto::file;
use cgtproxy_proto::limits::MESSAGE_BYTES;
use cgtproxy_proto::nearest::nearest;
use cgtproxy_proto::yaml::{self, Node, Place, SyntaxError, Value};
use nix::errno::Errno;
use nix::unistd::{Group, User};

use crate::access::{Access, Accounts};
use crate::mark::MarkRange;
use crate::nft::UdpVerdicts;

/// Where the configuration is unless `--config` says otherwise. It may be absent.
pub const DEFAULT_PATH: &str = "/etc/cgtproxy/helper.yaml";

/// All keys of the file.
pub const KEYS: &[&str] = &[
    "mark-mask",
    "route-table",
    "rule-priority",
    "grace-seconds",
    "on-agent-loss",
    "own-table",
    "udp-verdicts",
    "proxy-users",
    "allow",
    "deny",
    "limits",
];

/// All keys of `limits`.
pub const LIMIT_KEYS: &[&str] = &[
    "connections",
    "message-bytes",
    "calls-per-second",
    "proxies",
    "bypass",
    "control-groups",
];

const ACCOUNT_KEYS: &[&str] = &["users", "groups"];

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

/// What is wrong in a file, what would be right, and where.
#[derive(Debug)]
struct Wrong {
    place: Place,
    message: String,
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

impl Wrong {
    fn new(node: &Node, message: impl Into<String>) -> Self {
        Self {
            place: node.place,
            message: message.into(),
        }
    }

    /// A value is of a wrong kind.
    fn kind(node: &Node, key: &str, wanted: &str) -> Self {
        Self::new(
            node,
            format!("'{key}' is {}; write {wanted}", node.value.kind()),
        )
    }
}

impl From<SyntaxError> for Wrong {
    fn from(error: SyntaxError) -> Self {
        let mut message = error.message;
        if let Some(help) = error.help {
            message = format!("{message}; {help}");
        }
        let place = error.place.unwrap_or(Place { line: 1, column: 1 });
        Self { place, message }
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

    /// What holds where there is no file.
    ///
    /// # Errors
    /// If the defaults contradict each other.
    pub fn without_file() -> Result<Self, Error> {
        Self::parse("", Path::new(DEFAULT_PATH))
    }

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
        let mut mask: u32 = 0xff00_0000;
        let mut place_of_mask = root;
        let (mut route_table, mut rule_priority, mut grace) = (0x6367, 800, 5u32);
        let (mut on_agent_loss, mut own_table) = (OnAgentLoss::default(), true);
        let mut udp_verdicts = UdpVerdicts::default();
        let mut proxy_uids = vec![0];
        let (mut allow, mut deny, mut limits) = (None, Accounts::default(), Limits::default());
        let entries = match root.value {
            Value::Null => Vec::new(),
            _ => entries(root, None, KEYS)?,
        };
        for (key, node) in entries {
            match key {
                "mark-mask" => {
                    mask = number(node, key, ANY_NUMBER, |_| true)?;
                    place_of_mask = node;
                }
                "route-table" => {
                    let wanted = "another number: 0 and 253 to 255 are the system's own tables";
                    // 253 to 255 are the tables default, main and local (linux/rtnetlink.h).
                    let allowed = |table: &u32| !matches!(table, 0 | 253..=255);
                    route_table = number(node, key, wanted, allowed)?;
                }
                "rule-priority" => {
                    let wanted =
                        "a number from 1 to 32765, between the rules for the tables local and main";
                    // Rule 0 looks the local table up, 32766 the main one.
                    let allowed = |priority: &u32| (1..32766).contains(priority);
                    rule_priority = number(node, key, wanted, allowed)?;
                }
                "grace-seconds" => grace = number(node, key, ANY_NUMBER, |_| true)?,
                "on-agent-loss" => on_agent_loss = self::on_agent_loss(node, key)?,
                "own-table" => own_table = boolean(node, key)?,
                "udp-verdicts" => udp_verdicts = self::udp_verdicts(node, key)?,
                "proxy-users" => proxy_uids.extend(accounts(node, key, Account::User)?),
                "allow" => allow = Some(users_and_groups(node, key)?),
                "deny" => deny = users_and_groups(node, key)?,
                _ => limits = self::limits(node, key)?,
            }
        }
        let marks = MarkRange::new(mask).map_err(|why| {
            Wrong::new(place_of_mask, format!("'mark-mask' is {mask:#010x}: {why}"))
        })?;
        proxy_uids.sort_unstable();
        proxy_uids.dedup();
        Ok(Self {
            marks,
            route_table,
            rule_priority,
            grace: Duration::from_secs(grace.into()),
            on_agent_loss,
            own_table,
            udp_verdicts,
            proxy_uids,
            access: Access { allow, deny },
            limits,
        })
    }
}

/// The entries of a map, each of whose keys is known and is there once; `key` is the map's own.
fn entries<'n>(
    node: &'n Node,
    key: Option<&str>,
    known: &[&'static str],
) -> Result<Vec<(&'static str, &'n Node)>, Wrong> {
    let list = || quoted(known);
    let Value::Map(map) = &node.value else {
        let wanted = format!("a map with keys among {}", list());
        return Err(match key {
            Some(key) => Wrong::kind(node, key, &wanted),
            None => Wrong::new(
                node,
                format!("the file is {}; write {wanted}", node.value.kind()),
            ),
        });
    };
    let within = key.map_or_else(String::new, |key| format!(" in '{key}'"));
    let mut found: Vec<(&'static str, &Node, u64)> = Vec::new();
    for (name, value) in map {
        let Value::Text(text) = &name.value else {
            let message = format!(
                "a key{within} is {}; known are {}",
                name.value.kind(),
                list()
            );
            return Err(Wrong::new(name, message));
        };
        let Some(known) = known.iter().find(|known| *known == text) else {
            let help = match nearest(text, known.iter().copied()) {
                Some(near) => format!("did you mean '{near}'?"),
                None => format!("known are {}", list()),
            };
            let message = format!("unknown key '{text}'{within}; {help}");
            return Err(Wrong::new(name, message));
        };
        if let Some((.., line)) = found.iter().find(|(key, ..)| key == known) {
            let message = format!(
                "key '{known}'{within} is there twice, first in line {line}; keep one of them"
            );
            return Err(Wrong::new(name, message));
        }
        found.push((known, value, name.place.line));
    }
    Ok(found
        .into_iter()
        .map(|(key, value, _)| (key, value))
        .collect())
}

/// Names for a sentence.
fn quoted(names: &[&str]) -> String {
    let names: Vec<_> = names.iter().map(|name| format!("'{name}'")).collect();
    names.join(", ")
}

/// A value as it stands in a message.
fn shown(node: &Node) -> String {
    match &node.value {
        Value::Text(text) => format!("'{text}'"),
        Value::Integer(number) => number.to_string(),
        Value::Bool(boolean) => boolean.to_string(),
        other => other.kind().to_owned(),
    }
}

fn wrong_value(node: &Node, key: &str, wanted: &str) -> Wrong {
    Wrong::new(node, format!("'{key}' is {}; write {wanted}", shown(node)))
}

/// What a value is, which `wanted` describes. Quotes make a string of it.
fn scalar<T>(
    node: &Node,
    key: &str,
    wanted: &str,
    of: impl Fn(&Value) -> Option<T>,
) -> Result<T, Wrong> {
    of(&node.value).ok_or_else(|| {
        let unquoted = node.value.without_quotes();
        match (&node.value, unquoted.as_ref().and_then(of)) {
            (Value::Text(text), Some(_)) => {
                let message = format!("'{key}' is a string; write {text} without the quotes");
                Wrong::new(node, message)
            }
            _ => wrong_value(node, key, wanted),
        }
    })
}

/// A number that its type and `allowed` admit, both of which `wanted` describes.
fn number<T: TryFrom<i128>>(
    node: &Node,
    key: &str,
    wanted: &str,
    allowed: impl Fn(&T) -> bool,
) -> Result<T, Wrong> {
    scalar(node, key, wanted, |value| match value {
        Value::Integer(number) => T::try_from(*number).ok().filter(&allowed),
        _ => None,
    })
}

fn boolean(node: &Node, key: &str) -> Result<bool, Wrong> {
    scalar(node, key, "'true' or 'false'", Value::boolean)
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

fn limits(node: &Node, key: &str) -> Result<Limits, Wrong> {
    let mut limits = Limits::default();
    for (limit, node) in entries(node, Some(key), LIMIT_KEYS)? {
        let key = format!("{key}.{limit}");
        let any = || number(node, &key, "a number that is not negative", |_| true);
        match limit {
            "connections" => limits.connections = any()?,
            "proxies" => limits.proxies = any()?,
            "bypass" => limits.bypass = any()?,
            "control-groups" => limits.control_groups = any()?,
            "calls-per-second" => {
                let wanted = "a number from 1 to 1000000";
                let allowed = |calls: &usize| (1..=1_000_000).contains(calls);
                limits.calls_per_second = number(node, &key, wanted, allowed)?;
            }
            _ => {
                let least = MESSAGE_BYTES + 64 * 1024;
                let wanted =
                    format!("at least {least}, which one message of the longest length needs");
                limits.message_bytes = number(node, &key, &wanted, |bytes| *bytes >= least)?;
            }
        }
    }
    Ok(limits)
}

/// What a database has names and numbers of.
#[derive(Debug, Clone, Copy)]
enum Account {
    User,
    Group,
}

impl Account {
    /// What an account is called, and the name of its database.
    fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::User => ("user", "passwd"),
            Self::Group => ("group", "group"),
        }
    }

    /// The number that goes with a name, if there is one.
    fn number(self, name: &str) -> Result<Option<u32>, Errno> {
        let number = match self {
            Self::User => User::from_name(name).map(|user| Some(user?.uid.as_raw())),
            Self::Group => Group::from_name(name).map(|group| Some(group?.gid.as_raw())),
        };
        match number {
            // Some databases say so that there is none (getpwnam_r(3)).
            Err(Errno::ENOENT | Errno::ESRCH) => Ok(None),
            number => number,
        }
    }

    /// The number of the one that an entry names or numbers.
    fn resolve(self, node: &Node, key: &str) -> Result<u32, Problem> {
        let (noun, database) = self.names();
        let unknown = |name: &str, error: Errno| Problem::Unknown {
            place: node.place,
            name: name.to_owned(),
            source: error.into(),
        };
        let number = match &node.value {
            Value::Integer(number) => u32::try_from(*number).ok(),
            Value::Text(name) => match self.number(name).map_err(|e| unknown(name, e))? {
                Some(number) => Some(number),
                None => {
                    let help = match node.value.without_quotes() {
                        Some(Value::Integer(_)) => format!("a {noun}'s number has no quotes"),
                        _ => format!("'getent {database}' lists those there are"),
                    };
                    let message =
                        format!("'{key}' has '{name}', and there is no such {noun}; {help}");
                    return Err(Wrong::new(node, message).into());
                }
            },
            _ => None,
        };
        number.ok_or_else(|| {
            let message = format!(
                "'{key}' has {}; write names or numbers of {noun}s",
                shown(node)
            );
            Wrong::new(node, message).into()
        })
    }
}

/// The numbers of the users or groups in a list.
fn accounts(node: &Node, key: &str, account: Account) -> Result<Vec<u32>, Problem> {
    match &node.value {
        Value::List(items) => items
            .iter()
            .map(|item| account.resolve(item, key))
            .collect(),
        _ => {
            let (noun, _) = account.names();
            let wanted = format!("a list of {noun}s, as in '[NAME, NUMBER]'");
            Err(wrong_value(node, key, &wanted).into())
        }
    }
}

fn users_and_groups(node: &Node, key: &str) -> Result<Accounts, Problem> {
    let mut found = Accounts::default();
    for (entry, node) in entries(node, Some(key), ACCOUNT_KEYS)? {
        let key = format!("{key}.{entry}");
        match entry {
            "users" => found.uids.extend(accounts(node, &key, Account::User)?),
            _ => found.gids.extend(accounts(node, &key, Account::Group)?),
        }
    }
    Ok(found)
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
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "reads files")]
    fn a_link_to_nowhere_is_not_as_good_as_no_file() {
        let directory = std::env::temp_dir().join(format!("cgtproxy-links-{}", std::process::id()));
        std::fs::create_dir_all(directory.join("etc")).unwrap();
        let at = |path: &str| directory.join(path);
        let file = at("etc/helper.yaml");
        let load = |file: &Path| Config::load_if_there(file).map_err(|error| error.to_string());
        assert!(load(&file).is_ok());
        assert!(load(&at("nothing/helper.yaml")).is_ok());
        assert!(Config::load(Some(&file)).is_err());
        symlink("../srv/helper.yaml", &file).unwrap();
        symlink("srv", at("linked")).unwrap();
        for file in [&file, &at("linked/helper.yaml")] {
            let error = load(file).unwrap_err();
            assert!(error.contains("is a link to '"), "{error}");
            assert!(error.contains("srv"), "{error}");
        }
        std::fs::create_dir(at("srv")).unwrap();
        assert!(load(&file).is_err());
        assert!(load(&at("linked/helper.yaml")).is_ok(), "there is no file");
        std::fs::write(at("srv/helper.yaml"), "grace-seconds: 7").unwrap();
        for file in [&file, &at("linked/helper.yaml")] {
            assert_eq!(load(file).unwrap().grace, Duration::from_secs(7));
        }
        std::fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    #[cfg_attr(miri, ignore = "reads files")]
    fn only_a_file_is_read() {
        let load = |path: &str| Config::load(Some(Path::new(path))).unwrap_err();
        let error = load("/no/such/helper.yaml");
        assert_eq!(error.to_string(), "there is no file '/no/such/helper.yaml'");
        for path in ["/dev/zero", "/"] {
            let source = std::error::Error::source(&load(path)).map(ToString::to_string);
            assert_eq!(
                source.as_deref(),
                Some("it is not a regular file"),
                "{path}"
            );
        }
    }

    #[test]
    fn numbers_and_booleans_are_those_of_yaml() {
        let text = "own-table: off\nlimits: {proxies: 0x10, bypass: 1_000}";
        let config = parse(text).unwrap();
        assert!(!config.own_table);
        assert_eq!((config.limits.proxies, config.limits.bypass), (16, 1000));
    }

    fn parse(text: &str) -> Result<Config, Error> {
        Config::parse(text, Path::new("helper.yaml"))
    }

    #[test]
    fn an_empty_file_means_the_defaults() {
        for text in ["", "# nothing\n", "---\n", "{}"] {
            let config = parse(text).unwrap();
            assert_eq!(config.marks.mask(), 0xff00_0000);
            assert_eq!(config.proxy_uids, [0]);
            assert_eq!(config.limits, Limits::default());
            assert_eq!(config.on_agent_loss, OnAgentLoss::Keep);
            assert_eq!(config.udp_verdicts, UdpVerdicts::PerConversation);
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "asks the user database")]
    fn takes_every_key() {
        let config = parse(
            "mark-mask: 0x00f00000\nroute-table: 4000\nrule-priority: 900\ngrace-seconds: 1\n\
             on-agent-loss: drop\nown-table: false\nudp-verdicts: per-datagram\nproxy-users: [daemon, 990, root]\nallow: {users: [daemon, 7], groups: [daemon]}\n\
             deny: {users: [9], groups: [8]}\nlimits: {proxies: 3, control-groups: 10}\n",
        )
        .unwrap();
        assert_eq!(config.marks.mask(), 0x00f0_0000);
        assert_eq!((config.route_table, config.rule_priority), (4000, 900));
        assert_eq!(config.grace, Duration::from_secs(1));
        assert_eq!(config.on_agent_loss, OnAgentLoss::Drop);
        assert!(!config.own_table);
        assert_eq!(config.udp_verdicts, UdpVerdicts::PerDatagram);
        assert_eq!(config.proxy_uids, [0, 1, 990]);
        let allow = config.access.allow.unwrap();
        assert!(allow.uids.contains(&1) && allow.uids.contains(&7) && allow.gids.contains(&1));
        assert!(config.access.deny.gids.contains(&8));
        assert!(config.access.deny.uids.contains(&9));
        assert_eq!(config.limits.proxies, 3);
        assert_eq!(config.limits.bypass, Limits::default().bypass);
    }

    #[test]
    fn takes_every_limit() {
        let all = "limits: {connections: 21, message-bytes: 8388608, calls-per-second: 22, proxies: 23, \
                   bypass: 24, control-groups: 25}";
        let limits = Limits {
            connections: 21,
            message_bytes: 8_388_608,
            calls_per_second: 22,
            proxies: 23,
            bypass: 24,
            control_groups: 25,
        };
        assert_eq!(parse(all).unwrap().limits, limits);
    }

    #[test]
    #[cfg_attr(miri, ignore = "asks the user database")]
    fn says_what_is_wrong() {
        for (text, part) in [
            ("mark-mask: 1", "at least two bits"),
            ("route-table: 254", "system's own"),
            ("rule-priority: 0", "1 to 32765"),
            (
                "proxy-users: [1,\n no-such-user-here]",
                "helper.yaml:2:2: 'proxy-users' has 'no-such-user-here', and there is no such user; 'getent passwd' lists",
            ),
            ("allow: {groups: [no-such-group-here]}", "allow.groups"),
            ("deny: {users: [no-such-user-here]}", "deny.users"),
            ("deny: [daemon]", "helper.yaml:1:7: "),
            ("limits: {calls-per-second: 0}", "calls-per-second"),
            ("limits: {message-bytes: 100}", "message-bytes"),
            (
                "\ngrace: 5",
                "helper.yaml:2:1: unknown key 'grace'; known are 'mark-mask', 'route-table', ",
            ),
            (
                "mark-msk: 5",
                "helper.yaml:1:1: unknown key 'mark-msk'; did you mean 'mark-mask'?",
            ),
            (
                "own-table: on\nown-table: off",
                "helper.yaml:2:1: key 'own-table' is there twice, first in line 1; keep one of them",
            ),
            (
                "\non-agent-loss: kept",
                "helper.yaml:2:16: 'on-agent-loss' is 'kept'; write 'keep', 'direct' or 'drop'",
            ),
            (
                "limits: {proxys: 5}",
                "helper.yaml:1:10: unknown key 'proxys' in 'limits'; did you mean 'proxies'?",
            ),
            ("[", "helper.yaml:1:1: the bracket is not closed; "),
            (
                "x",
                "helper.yaml:1:1: the file is a string; write a map with keys among 'mark-mask', ",
            ),
            (
                "proxy-users: [1, {}]",
                "helper.yaml:1:18: 'proxy-users' has a map; write names or numbers of users",
            ),
            (
                "proxy-users: ['7']",
                "and there is no such user; a user's number has no quotes",
            ),
            (
                "proxy-users: mihomo",
                "helper.yaml:1:14: 'proxy-users' is 'mihomo'; write a list of users, as in '[NAME, NUMBER]'",
            ),
            (
                "allow: [alice]",
                "helper.yaml:1:8: 'allow' is a list; write a map with keys among 'users', 'groups'",
            ),
            (
                "mark-mask: 256M",
                "helper.yaml:1:12: 'mark-mask' is '256M'; write a number from 0 to 4294967295",
            ),
            (
                "mark-mask: 0x00000000",
                "helper.yaml:1:12: 'mark-mask' is 0x00000000: the mark mask needs at least two bits",
            ),
            (
                "own-table: maybe",
                "helper.yaml:1:12: 'own-table' is 'maybe'; write 'true' or 'false'",
            ),
            (
                "udp-verdicts: all",
                "helper.yaml:1:15: 'udp-verdicts' is 'all'; write 'per-conversation' or 'per-datagram'",
            ),
            (
                "grace-seconds: -1",
                "helper.yaml:1:16: 'grace-seconds' is -1; write a number from 0 to ",
            ),
            (
                "limits: {proxies: 0.5}",
                "helper.yaml:1:19: 'limits.proxies' is a fraction; write a number that is not negative",
            ),
            ("---\n---\n", "a second document begins"),
            (
                "limits: {connections: 18446744073709551616}",
                "helper.yaml:1:23: 'limits.connections' is too large a number; write a number that is not negative",
            ),
            (
                "limits: {connections: 1e3}",
                "helper.yaml:1:23: 'limits.connections' is a fraction; write a number that is not negative",
            ),
            ("allow:\n", "'allow' is nothing; write a map"),
            ("deny:\n", "'deny' is nothing; write a map"),
            (
                "grace-seconds: '7'",
                "helper.yaml:1:16: 'grace-seconds' is a string; write 7 without the quotes",
            ),
            (
                "own-table: \"false\"",
                "helper.yaml:1:12: 'own-table' is a string; write false without the quotes",
            ),
            (
                "grace-seconds: '-1'",
                "'grace-seconds' is '-1'; write a number from 0 to 4294967295",
            ),
            (
                "grace-seconds: 'true'",
                "'grace-seconds' is 'true'; write a number from 0 to 4294967295",
            ),
        ] {
            let error = parse(text).unwrap_err();
            let message = error.to_string();
            assert!(message.contains(part), "{text:?}: {message}");
            assert!(message.contains("helper.yaml"), "{text:?}: {message}");
        }
    }
}
