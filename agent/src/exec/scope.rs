//! Moves this process, or another one, into a scope of its own, by asking the user's systemd over D-Bus.

use std::fmt;
use std::fs;
use std::io;
use std::time::{Duration, SystemTime};

use zbus::message::Type;
use zbus::{MatchRule, MessageStream, OwnedObjectPath, Variant};

use crate::subtree;
use crate::systemd::{Address, BUS, BUS_PATH, MANAGER, MANAGER_PATH, Manager, SYSTEMD, next, said};

/// How long systemd may take for all of it; it needs a few milliseconds.
const PATIENCE: Duration = Duration::from_secs(10);

/// How much of the command's name is repeated in the scope's.
const COMMAND_BYTES: usize = 64;

/// A property of a unit that is to be started, as `StartTransientUnit` takes it.
type Property<'a> = (&'a str, Variant<'a>);

/// A process that is to be moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Process {
    /// This one.
    This,
    /// The one with this number in this PID namespace.
    Other(u32),
}

impl Process {
    /// What is in `/proc/PID/cgroup` of this process.
    pub(crate) fn control_groups(self) -> io::Result<Vec<u8>> {
        match self {
            // /proc may be that of another PID namespace, where this process's number is another one's.
            Self::This => fs::read("/proc/self/cgroup"),
            Self::Other(pid) => fs::read(format!("/proc/{pid}/cgroup")),
        }
    }

    /// The number to ask systemd by.
    fn number(self) -> u32 {
        match self {
            // systemd takes the number of the caller from the bus: it may have another PID namespace.
            Self::This => 0,
            Self::Other(pid) => pid,
        }
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::This => f.write_str("this process"),
            Self::Other(pid) => write!(f, "process {pid}"),
        }
    }
}

/// Why a process is not in a scope.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// No bus led to the user's systemd.
    #[error("can't reach your systemd user manager (is this a login session?){}", attempts(.0))]
    NoManager(Vec<(String, zbus::Error)>),
    /// It refused to make the scope.
    #[error("systemd does not start {scope}: {}", said(.answer))]
    Refused {
        /// The scope's name.
        scope: String,
        /// What systemd said.
        answer: zbus::Error,
    },
    /// It made the scope, but could not move the process into it.
    #[error("systemd could not move {process} into {scope}: the job ended as '{result}'")]
    Failed {
        /// The process.
        process: Process,
        /// The scope's name.
        scope: String,
        /// How systemd calls the outcome.
        result: String,
    },
    /// systemd knows the processes by other numbers.
    #[error(
        "can't move process {0} from within a PID namespace, because systemd knows it by another number: run \
         cgtproxy-exec outside of the sandbox or container"
    )]
    Namespace(u32),
    /// Nothing tells where the process is.
    #[error("can't find the control group of {process}")]
    ControlGroup {
        /// The process.
        process: Process,
        /// What the kernel said.
        source: io::Error,
    },
    /// It moved another process into the scope.
    #[error(
        "{process} is not in {scope}: something between it and systemd, such as a sandbox's proxy for D-Bus, made \
         systemd move another process"
    )]
    Elsewhere {
        /// The process.
        process: Process,
        /// The scope's name.
        scope: String,
    },
    /// It did not answer.
    #[error("your systemd user manager did not answer within {} seconds", PATIENCE.as_secs())]
    Timeout,
}

/// What was tried, one address after the other, for a person.
fn attempts(attempts: &[(String, zbus::Error)]) -> String {
    attempts
        .iter()
        .map(|(address, error)| format!("; {address}: {}", said(error)))
        .collect()
}

/// Connects to a systemd that is there.
async fn connect(address: &Address) -> zbus::Result<Manager> {
    let manager = address.open().await?;
    // Without a subscriber systemd sends no signals. It also tells whether it is there at all.
    manager.call("Subscribe", &()).await?;
    Ok(manager)
}

/// Whether systemd has the same numbers of processes as this process.
async fn has_our_numbers(manager: &Manager) -> zbus::Result<bool> {
    let name = manager.connection.unique_name();
    let name = name.map(|name| name.as_str()).unwrap_or_default();
    let call = manager.connection.call_method(
        Some(BUS),
        BUS_PATH,
        Some(BUS),
        "GetConnectionUnixProcessID",
        &name,
    );
    let number: u32 = call.await?.body().deserialize()?;
    Ok(number == std::process::id())
}

/// Starts a scope with a process in it, and returns when the process is there.
async fn start(manager: &Manager, scope: &ScopeUnit, process: Process) -> Result<(), Error> {
    let refused = |answer| Error::Refused {
        scope: scope.name.clone(),
        answer,
    };
    if let Process::Other(pid) = process
        && !has_our_numbers(manager).await.map_err(refused)?
    {
        return Err(Error::Namespace(pid));
    }
    // Asked for before the job exists, so that its end can't be missed.
    let removed = MatchRule::builder()
        .msg_type(Type::Signal)
        .sender(SYSTEMD)
        .path(MANAGER_PATH)
        .interface(MANAGER)
        .member("JobRemoved")
        .build()
        .map_err(refused)?;
    let mut removed = MessageStream::for_match_rule(removed, &manager.connection, None)
        .await
        .map_err(refused)?;
    let properties: [Property<'_>; 4] = [
        ("PIDs", Variant::from(vec![process.number()])),
        ("Slice", Variant::from(&*scope.slice)),
        ("Description", Variant::from(&*scope.description)),
        // Nothing is left behind in a list of failed units.
        ("CollectMode", Variant::from("inactive-or-failed")),
    ];
    let others: [(&str, Vec<Property<'_>>); 0] = [];
    let arguments = (&*scope.name, "fail", &properties[..], &others[..]);
    let call = manager.call("StartTransientUnit", &arguments);
    let reply = call.await.map_err(refused)?;
    let job: OwnedObjectPath = reply.body().deserialize().map_err(refused)?;
    while let Some(signal) = next(&mut removed).await {
        let signal = signal.map_err(refused)?;
        // Anybody on the bus may send signals that look like it, sandboxed applications included, and what is sent to
        // this program alone the bus passes on whatever it has asked for.
        if signal.header().sender() != reply.header().sender() {
            continue;
        }
        let body = signal.body();
        let (_, ended, _, result): (u32, OwnedObjectPath, &str, &str) =
            body.deserialize().map_err(refused)?;
        if ended == job {
            return match result {
                "done" => scope.expect(process),
                _ => Err(Error::Failed {
                    process,
                    scope: scope.name.clone(),
                    result: result.to_owned(),
                }),
            };
        }
    }
    Err(refused(zbus::Error::InputOutput(std::sync::Arc::new(
        std::io::ErrorKind::ConnectionReset.into(),
    ))))
}

/// A scope to be started.
#[derive(Debug)]
pub(crate) struct ScopeUnit {
    name: String,
    slice: String,
    description: String,
}

impl ScopeUnit {
    /// A scope for process `pid`, which is going to run `command` for `target`.
    pub(crate) fn new(target: &str, command: &str, pid: u32) -> Self {
        // A process can be moved more than once, and a scope outlives the process that it was made
        // for if others are left in it: the time tells those of one pid apart.
        #[expect(
            clippy::disallowed_methods,
            reason = "a name, by which nothing is decided"
        )]
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        let command = readable(command);
        Self {
            name: format!("cgtproxy-exec-{command}-{pid}-{:x}.scope", now.as_nanos()),
            slice: format!("cgtproxy-{target}.slice"),
            // Arguments are left out: the journal keeps descriptions, and arguments may be secrets.
            description: format!("{command} (cgtproxy-exec {target})"),
        }
    }

    /// Moves a process into this scope.
    ///
    /// # Errors
    /// If the user's systemd can't be reached or does not do it.
    pub(crate) async fn enter(&self, addresses: &[Address], process: Process) -> Result<(), Error> {
        let entering = async {
            let mut failures = Vec::new();
            for address in addresses {
                match connect(address).await {
                    Ok(manager) => return start(&manager, self, process).await,
                    Err(error) => failures.push((address.0.clone(), error)),
                }
            }
            Err(Error::NoManager(failures))
        };
        tokio::time::timeout(PATIENCE, entering)
            .await
            .unwrap_or(Err(Error::Timeout))
    }

    /// Fails unless a process is in this scope.
    fn expect(&self, process: Process) -> Result<(), Error> {
        let file = process
            .control_groups()
            .map_err(|source| Error::ControlGroup { process, source })?;
        match self.is_in(&file) {
            true => Ok(()),
            false => Err(Error::Elsewhere {
                process,
                scope: self.name.clone(),
            }),
        }
    }

    /// Whether this scope is in the path of what `/proc/PID/cgroup` has in it. Within a control group namespace that
    /// path may begin elsewhere.
    fn is_in(&self, file: &[u8]) -> bool {
        let path = subtree::of_process(file).unwrap_or_default();
        let mut components = path.split(|&byte| byte == b'/');
        components.any(|component| component == self.name.as_bytes())
    }
}

/// A command's name as a part of a unit's name that needs no escaping.
fn readable(command: &str) -> String {
    let base = command.rsplit('/').next().unwrap_or_default();
    let mut name: String = base
        .chars()
        .map(|c| match c {
            'A'..='Z' | 'a'..='z' | '0'..='9' | '.' | '_' | '-' => c,
            _ => '_',
        })
        .collect();
    name.truncate(COMMAND_BYTES);
    if name.is_empty() {
        name.push('_');
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_what_runs_and_differ() {
        let a = ScopeUnit::new("my-proxy", "/usr/bin/curl", 7);
        let b = ScopeUnit::new("my-proxy", "/usr/bin/curl", 7);
        assert!(a.name.starts_with("cgtproxy-exec-curl-7-"), "{}", a.name);
        assert!(a.name.ends_with(".scope"), "{}", a.name);
        assert_ne!(a.name, b.name);
        assert_eq!(a.slice, "cgtproxy-my-proxy.slice");
    }

    #[test]
    fn a_scope_is_found_in_every_control_group_namespace() {
        let scope = ScopeUnit::new("drop", "x", 7);
        let name = &scope.name;
        for path in [
            format!("/user.slice/cgtproxy-drop.slice/{name}"),
            format!("/../cgtproxy-drop.slice/{name}"),
            format!("/a/{name}/below"),
        ] {
            let file = format!("1:name=systemd:/x\n0::{path}\n");
            assert!(scope.is_in(file.as_bytes()), "{file}");
        }
        for file in [
            format!("0::/a/{name}x\n"),
            format!("1:name=systemd:/a/{name}\n0::/a\n"),
            "0::/\n".into(),
            String::new(),
        ] {
            assert!(!scope.is_in(file.as_bytes()), "{file}");
        }
    }

    #[test]
    fn any_command_gives_a_valid_name() {
        for (command, name) in [
            ("./a b.sh", "a_b.sh"),
            ("ünï\n", "_n__"),
            ("/", "_"),
            ("", "_"),
            ("a@b:c", "a_b_c"),
            (&*"x".repeat(300), &*"x".repeat(COMMAND_BYTES)),
        ] {
            assert_eq!(readable(command), name, "{command:?}");
        }
        let longest = ScopeUnit::new(&"t".repeat(64), &"x".repeat(300), u32::MAX);
        assert!(longest.name.len() < 256, "{}", longest.name);
    }
}
