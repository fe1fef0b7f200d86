//! The administrator's configuration, /etc/cgtproxy/helper.yaml.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cgtproxy_proto::limits::MESSAGE_BYTES;
use nix::unistd::{Group, User};
use serde::Deserialize;

use crate::access::{Access, Accounts};
use crate::mark::{MarkRange, MaskTooSmall};

/// Where the configuration is unless `--config` says otherwise. It may be absent.
pub const DEFAULT_PATH: &str = "/etc/cgtproxy/helper.yaml";

/// What becomes of a user's policy when the agent is gone and does not come back within the grace.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
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
    /// What is in force then.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Keep => "what is dropped stays so, the rest is as without a policy",
            Self::Direct => "everything is as without a policy",
            Self::Drop => "everything is dropped",
        })
    }
}

/// What the file says, as typed.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct File {
    mark_mask: u32,
    route_table: u32,
    rule_priority: u32,
    grace_seconds: u32,
    on_agent_loss: OnAgentLoss,
    own_table: bool,
    proxy_users: Vec<Reference>,
    allow: Option<References>,
    deny: References,
    limits: Limits,
}

impl Default for File {
    fn default() -> Self {
        Self {
            mark_mask: 0xff00_0000,
            route_table: 0x6367,
            rule_priority: 800,
            grace_seconds: 5,
            on_agent_loss: OnAgentLoss::default(),
            own_table: true,
            proxy_users: Vec::new(),
            allow: None,
            deny: References::default(),
            limits: Limits::default(),
        }
    }
}

/// A user or group by number or name.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "a user or group is a name or a number")]
enum Reference {
    Number(u32),
    Name(String),
}

impl Reference {
    /// The number; [`Error::Unknown`] where there is none.
    fn resolve(self, kind: Kind, path: &Path, key: &'static str) -> Result<u32, Error> {
        let name = match self {
            Self::Number(number) => return Ok(number),
            Self::Name(name) => name,
        };
        kind.number_of(&name).ok_or_else(|| Error::Unknown {
            path: path.to_owned(),
            key,
            what: kind,
            name,
        })
    }
}

/// What a name is one of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A user.
    User,
    /// A group.
    Group,
}

impl Kind {
    /// The number of the user or group of this name, by the database.
    fn number_of(self, name: &str) -> Option<u32> {
        match self {
            Self::User => Some(User::from_name(name).ok()??.uid.as_raw()),
            Self::Group => Some(Group::from_name(name).ok()??.gid.as_raw()),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::User => "user",
            Self::Group => "group",
        })
    }
}

/// Users and groups, by number or name.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct References {
    users: Vec<Reference>,
    groups: Vec<Reference>,
}

impl References {
    fn resolve(self, path: &Path, keys: [&'static str; 2]) -> Result<Accounts, Error> {
        let [users, groups] = keys;
        let (uids, gids) = (self.users.into_iter(), self.groups.into_iter());
        let uids = uids.map(|user| user.resolve(Kind::User, path, users));
        let gids = gids.map(|group| group.resolve(Kind::Group, path, groups));
        Ok(Accounts {
            uids: uids.collect::<Result<_, _>>()?,
            gids: gids.collect::<Result<_, _>>()?,
        })
    }
}

/// How much one user may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
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
    /// What becomes of the policy then.
    pub on_agent_loss: OnAgentLoss,
    /// Whether to protect the table from other programs where the kernel can.
    pub own_table: bool,
    /// Uids besides the user's own whose proxies may receive diverted packets; root is one of them.
    pub proxy_uids: Vec<u32>,
    /// Who may use the helper.
    pub access: Access,
    /// How much one user may have.
    pub limits: Limits,
}

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file can't be read.
    #[error("can't read '{path}'")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A link leads to where nothing is seen.
    #[error(
        "can't read '{path}': '{link}' is a link to '{target}', and the helper sees nothing there; \
         its unit shows it /etc and /usr, and what BindReadOnlyPaths= adds"
    )]
    Nowhere {
        /// The file.
        path: PathBuf,
        /// The link: the file or its directory.
        link: PathBuf,
        /// What it says.
        target: PathBuf,
    },
    /// The file is not a configuration.
    #[error("{path}:{line}:{column}: {message}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where in it, counted from 1.
        line: u64,
        /// Where in the line, in characters, counted from 1.
        column: u64,
        /// What is wrong.
        message: String,
    },
    /// The mask has too few bits.
    #[error("mark-mask {mask:#010x} in '{path}'")]
    Mask {
        /// The file.
        path: PathBuf,
        /// The mask.
        mask: u32,
        /// What is wrong with it.
        source: MaskTooSmall,
    },
    /// A number is one that the system uses itself.
    #[error("{key} {value} in '{path}' is out of range: {allowed}")]
    Range {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// Its value.
        value: u32,
        /// What would be right.
        allowed: &'static str,
    },
    /// A user or group that is named does not exist.
    #[error("{key} in '{path}' has '{name}', and there is no such {what}")]
    Unknown {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// What there is none of.
        what: Kind,
        /// The name.
        name: String,
    },
}

impl Config {
    /// Reads `path`, or the default file if there is one.
    ///
    /// # Errors
    /// If the file that was named is absent, or either is wrong.
    pub fn load(path: Option<&Path>) -> Result<Self, Error> {
        match path {
            Some(path) => Self::parse(&read(path)?.ok_or_else(|| absent(path))?, path),
            None => Self::load_if_there(Path::new(DEFAULT_PATH)),
        }
    }

    fn load_if_there(path: &Path) -> Result<Self, Error> {
        Self::parse(&read(path)?.unwrap_or_default(), path)
    }

    /// What holds where there is no file.
    ///
    /// # Errors
    /// If the defaults contradict each other.
    pub fn without_file() -> Result<Self, Error> {
        Self::parse("", Path::new(DEFAULT_PATH))
    }

    pub(crate) fn parse(text: &str, path: &Path) -> Result<Self, Error> {
        let path = path.to_owned();
        let file = match serde_saphyr::from_str::<Option<File>>(text) {
            Ok(file) => file.unwrap_or_default(),
            Err(error) => {
                let (line, column) = error.location().map_or((1, 1), |l| (l.line(), l.column()));
                let message = error.without_snippet().to_string();
                let place = format!(" at line {line}, column {column}");
                return Err(Error::Parse {
                    path,
                    line,
                    column,
                    message: message.strip_suffix(&*place).unwrap_or(&message).into(),
                });
            }
        };
        let marks = match MarkRange::new(file.mark_mask) {
            Ok(marks) => marks,
            Err(source) => {
                return Err(Error::Mask {
                    path,
                    mask: file.mark_mask,
                    source,
                });
            }
        };
        let check = |key, value: usize, is_right, allowed| match is_right {
            true => Ok(()),
            false => Err(Error::Range {
                path: path.clone(),
                key,
                value: u32::try_from(value).unwrap_or(u32::MAX),
                allowed,
            }),
        };
        let (table, priority) = (file.route_table as usize, file.rule_priority as usize);
        // 253 to 255 are the tables default, main and local (linux/rtnetlink.h).
        check(
            "route-table",
            table,
            !matches!(table, 0 | 253..=255),
            "0 and 253 to 255 are the system's own tables",
        )?;
        // Rule 0 looks the local table up, 32766 the main one.
        check(
            "rule-priority",
            priority,
            (1..32766).contains(&priority),
            "a rule between those for the tables local and main has 1 to 32765",
        )?;
        let calls = file.limits.calls_per_second;
        check(
            "limits.calls-per-second",
            calls,
            (1..=1_000_000).contains(&calls),
            "1 to 1000000",
        )?;
        let bytes = file.limits.message_bytes;
        check(
            "limits.message-bytes",
            bytes,
            bytes >= MESSAGE_BYTES + 64 * 1024,
            "one message of the longest length needs 4259840",
        )?;
        let mut proxy_uids = vec![0];
        for user in file.proxy_users {
            proxy_uids.push(user.resolve(Kind::User, &path, "proxy-users")?);
        }
        proxy_uids.sort_unstable();
        proxy_uids.dedup();
        Ok(Self {
            marks,
            route_table: file.route_table,
            rule_priority: file.rule_priority,
            grace: Duration::from_secs(file.grace_seconds.into()),
            on_agent_loss: file.on_agent_loss,
            own_table: file.own_table,
            proxy_uids,
            access: Access {
                allow: file
                    .allow
                    .map(|allow| allow.resolve(&path, ["allow.users", "allow.groups"]))
                    .transpose()?,
                deny: file.deny.resolve(&path, ["deny.users", "deny.groups"])?,
            },
            limits: file.limits,
        })
    }
}

/// What is in the file; none if there is none. A link to where nothing is to be seen is not that: what it leads to may
/// well be there, and say who is denied.
fn read(path: &Path) -> Result<Option<String>, Error> {
    let source = match std::fs::read_to_string(path) {
        Ok(text) => return Ok(Some(text)),
        Err(source) => source,
    };
    if source.kind() != io::ErrorKind::NotFound {
        return Err(Error::Read {
            path: path.to_owned(),
            source,
        });
    }
    let links = [Some(path), path.parent()].into_iter().flatten();
    for link in links.filter(|link| !link.exists()) {
        if let Ok(target) = std::fs::read_link(link) {
            return Err(Error::Nowhere {
                path: path.to_owned(),
                link: link.to_owned(),
                target,
            });
        }
    }
    Ok(None)
}

fn absent(path: &Path) -> Error {
    Error::Read {
        path: path.to_owned(),
        source: io::ErrorKind::NotFound.into(),
    }
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
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "asks the user database")]
    fn takes_every_key() {
        let config = parse(
            "mark-mask: 0x00f00000\nroute-table: 4000\nrule-priority: 900\ngrace-seconds: 1\n\
             on-agent-loss: drop\nown-table: false\nproxy-users: [daemon, 990, root]\nallow: {users: [daemon, 7], groups: [daemon]}\n\
             deny: {groups: [8]}\nlimits: {proxies: 3, control-groups: 10}\n",
        )
        .unwrap();
        assert_eq!(config.marks.mask(), 0x00f0_0000);
        assert_eq!((config.route_table, config.rule_priority), (4000, 900));
        assert_eq!(config.grace, Duration::from_secs(1));
        assert_eq!(config.on_agent_loss, OnAgentLoss::Drop);
        assert!(!config.own_table);
        assert_eq!(config.proxy_uids, [0, 1, 990]);
        let allow = config.access.allow.unwrap();
        assert!(allow.uids.contains(&1) && allow.uids.contains(&7) && allow.gids.contains(&1));
        assert!(config.access.deny.gids.contains(&8));
        assert_eq!(config.limits.proxies, 3);
        assert_eq!(config.limits.bypass, Limits::default().bypass);
    }

    #[test]
    #[cfg_attr(miri, ignore = "asks the user database")]
    fn says_what_is_wrong() {
        for (text, part) in [
            ("mark-mask: 1", "at least two bits"),
            ("route-table: 254", "system's own"),
            ("rule-priority: 0", "1 to 32765"),
            ("proxy-users: [no-such-user-here]", "no such user"),
            ("allow: {groups: [no-such-group-here]}", "allow.groups"),
            ("deny: {users: [no-such-user-here]}", "deny.users"),
            ("deny: [daemon]", "helper.yaml:1:7: "),
            ("limits: {calls-per-second: 0}", "calls-per-second"),
            ("limits: {message-bytes: 100}", "message-bytes"),
            (
                "\ngrace: 5",
                "helper.yaml:2:1: unknown field `grace`, expected one of mark-mask, ",
            ),
            ("\non-agent-loss: kept", "helper.yaml:2:16: "),
            ("limits: {proxys: 5}", "proxys"),
            ("[", "helper.yaml:1:1: "),
            (
                "proxy-users: [1, {}]",
                "helper.yaml:1:18: a user or group is a name or a number",
            ),
        ] {
            let error = parse(text).unwrap_err();
            let mut message = error.to_string();
            if let Some(source) = std::error::Error::source(&error) {
                message.push_str(&source.to_string());
            }
            assert!(message.contains(part), "{text:?}: {message}");
            assert!(message.contains("helper.yaml"), "{text:?}: {message}");
        }
    }
}
