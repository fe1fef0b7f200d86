//! Moves this process into a scope of its own, by asking the user's systemd over D-Bus.

use std::time::{Duration, SystemTime};

use zbus::message::Type;
use zbus::{MatchRule, MessageStream, OwnedObjectPath, Variant};

use crate::systemd::{Address, MANAGER, MANAGER_PATH, Manager, next, said};

/// How long systemd may take for all of it; it needs a few milliseconds.
const PATIENCE: Duration = Duration::from_secs(10);

/// How much of the command's name is repeated in the scope's.
const COMMAND_BYTES: usize = 64;

/// A property of a unit that is to be started, as `StartTransientUnit` takes it.
type Property<'a> = (&'a str, Variant<'a>);

/// Why this process is not in a scope.
#[derive(Debug, thiserror::Error)]
pub enum Error {
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
    #[error("systemd could not move process {pid} into {scope}: the job ended as '{result}'")]
    Failed {
        /// The process.
        pid: u32,
        /// The scope's name.
        scope: String,
        /// How systemd calls the outcome.
        result: String,
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

/// Starts a scope with process `pid` in it, and returns when it is there.
async fn start(manager: &Manager, scope: &Scope, pid: u32) -> Result<(), Error> {
    let refused = |answer| Error::Refused {
        scope: scope.name.clone(),
        answer,
    };
    // Asked for before the job exists, so that its end can't be missed.
    let removed = MatchRule::builder()
        .msg_type(Type::Signal)
        .path(MANAGER_PATH)
        .interface(MANAGER)
        .member("JobRemoved")
        .build()
        .map_err(refused)?;
    let mut removed = MessageStream::for_match_rule(removed, &manager.connection, None)
        .await
        .map_err(refused)?;
    let properties: [Property<'_>; 4] = [
        ("PIDs", Variant::from(vec![pid])),
        ("Slice", Variant::from(&*scope.slice)),
        ("Description", Variant::from(&*scope.description)),
        // Nothing is left behind in a list of failed units.
        ("CollectMode", Variant::from("inactive-or-failed")),
    ];
    let others: [(&str, Vec<Property<'_>>); 0] = [];
    let job: OwnedObjectPath = manager
        .call(
            "StartTransientUnit",
            &(&*scope.name, "fail", &properties[..], &others[..]),
        )
        .await
        .and_then(|reply| reply.body().deserialize())
        .map_err(refused)?;
    while let Some(signal) = next(&mut removed).await {
        let signal = signal.map_err(refused)?;
        let body = signal.body();
        let (_, ended, _, result): (u32, OwnedObjectPath, &str, &str) =
            body.deserialize().map_err(refused)?;
        if ended == job {
            return match result {
                "done" => Ok(()),
                _ => Err(Error::Failed {
                    pid,
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
pub(crate) struct Scope {
    name: String,
    slice: String,
    description: String,
}

impl Scope {
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

    /// Moves process `pid` into this scope.
    ///
    /// # Errors
    /// If the user's systemd can't be reached or does not do it.
    pub(crate) async fn enter(&self, addresses: &[Address], pid: u32) -> Result<(), Error> {
        let entering = async {
            let mut failures = Vec::new();
            for address in addresses {
                match connect(address).await {
                    Ok(manager) => return start(&manager, self, pid).await,
                    Err(error) => failures.push((address.0.clone(), error)),
                }
            }
            Err(Error::NoManager(failures))
        };
        tokio::time::timeout(PATIENCE, entering)
            .await
            .unwrap_or(Err(Error::Timeout))
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
        let a = Scope::new("my-proxy", "/usr/bin/curl", 7);
        let b = Scope::new("my-proxy", "/usr/bin/curl", 7);
        assert!(a.name.starts_with("cgtproxy-exec-curl-7-"), "{}", a.name);
        assert!(a.name.ends_with(".scope"), "{}", a.name);
        assert_ne!(a.name, b.name);
        assert_eq!(a.slice, "cgtproxy-my-proxy.slice");
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
        let longest = Scope::new(&"t".repeat(64), &"x".repeat(300), u32::MAX);
        assert!(longest.name.len() < 256, "{}", longest.name);
    }
}
