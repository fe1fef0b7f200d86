//! cgtproxy-exec: runs a command in the slice of a target, or moves a running process there.
//!
//! To run a command this process moves itself and then becomes the command, so terminal, environment, working
//! directory, arguments, exit status and signals need no passing on. Three things differ for a command
//! from having been started by the caller itself: its control group, that `SIGPIPE` is not ignored
//! even if the caller ignores it, and that standard input, output and error are `/dev/null` where the
//! caller has closed them. (The Rust runtime has changed that before `main`. `exec` puts `SIGPIPE`
//! back to its default; a `/dev/null` of the caller's looks the same as one of the runtime's.)

mod agent;
mod cli;
mod scope;

use std::collections::HashSet;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use cgtproxy_proto::name::{InvalidProxyName, ProxyName};
use cgtproxy_proto::path::ControlGroupPath;
use cgtproxy_proto::usage;
use clap::{CommandFactory, Parser};

pub use cli::Options;

use agent::{Agent, Error as AgentError};
use cli::Action;
use scope::{Error as ScopeError, Process, ScopeUnit};

use crate::cli::suggest;
use crate::config;
use crate::server::default_socket;
use crate::subtree;
use crate::systemd::{Address, runtime_directory};
use crate::text::chain;

/// The exit status if something goes wrong before the command is run, as env(1) has it.
const FAILED: u8 = 125;
/// The exit status if the command can't be run.
const NOT_EXECUTABLE: u8 = 126;
/// The exit status if there is no such command.
const NOT_FOUND: u8 = 127;

/// Why nothing was run or moved.
#[derive(Debug, thiserror::Error)]
enum Error {
    /// The runtime could not be set up.
    #[error("can't start")]
    Runtime(#[source] io::Error),
    /// The agent does not say that the target is in force.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// No slice can have the target's name.
    #[error("'{}' is no target", .name.escape_debug())]
    Name {
        /// The target's name.
        name: String,
        /// What is wrong with it.
        source: InvalidProxyName,
    },
    /// systemd reads dashes in a slice's name as a path, which can have no empty component.
    #[error(
        "no slice can be named after '{0}', because systemd allows neither '--' nor a '-' at the end: \
         the proxy needs another name in your configuration to be used with cgtproxy-exec"
    )]
    Slice(String),
    /// There is none to be moved.
    #[error("there is no process {0}")]
    NoProcess(u32),
    /// The user's systemd can't move it.
    #[error("your systemd can't move process {0}, which is another user's")]
    OthersProcess(u32),
    /// systemd did not move the process.
    #[error(transparent)]
    Scope(#[from] ScopeError),
    /// Nobody can read the targets.
    #[error("can't write")]
    Write(#[source] io::Error),
    /// The command could not be run.
    #[error("can't run {command:?}")]
    Exec {
        /// The command.
        command: OsString,
        /// What the kernel said.
        source: io::Error,
    },
}

impl Error {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Exec { source, .. } if source.kind() == io::ErrorKind::NotFound => NOT_FOUND,
            Self::Exec { .. } => NOT_EXECUTABLE,
            _ => FAILED,
        }
    }
}

/// The program. Does not return if it becomes a command.
pub fn main() -> ExitCode {
    let options = match Options::try_parse() {
        Ok(options) => options,
        Err(error) => {
            let error = suggest(error, &Options::command());
            // clap's own status for a wrong command line could be the command's.
            return usage::end(&error, FAILED, FAILED);
        }
    };
    match run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(chain(&error));
            ExitCode::from(error.exit_code())
        }
    }
}

/// Says something to the person who typed the command.
fn say(message: impl fmt::Display) {
    // There is nobody to tell if the standard error is closed.
    let _ = writeln!(io::stderr(), "cgtproxy-exec: {message}");
}

/// Does what the command line asks for.
fn run(options: Options) -> Result<(), Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .map_err(Error::Runtime)?;
    let wait = !options.no_wait;
    match options.meaning() {
        None => match runtime.block_on(list()) {
            // Whoever reads has seen enough.
            Err(Error::Write(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            listed => listed,
        },
        Some((target, Action::Move(pid))) => {
            let name = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
            let name = String::from_utf8_lossy(name.trim_ascii_end());
            runtime.block_on(enter(&target, &name, Process::Other(pid), wait))?;
            if has_sockets(pid) {
                say(format_args!(
                    "process {pid} has sockets open, which keep the target they had"
                ));
            }
            Ok(())
        }
        Some((target, Action::Run(command, arguments))) => {
            let name = command.to_string_lossy();
            runtime.block_on(enter(&target, &name, Process::This, wait))?;
            // Every descriptor it opened is closed here, and again by the kernel's close-on-exec.
            drop(runtime);
            let source = Command::new(&command).args(arguments).exec();
            Err(Error::Exec { command, source })
        }
    }
}

/// Prints all targets.
async fn list() -> Result<(), Error> {
    let to_list = |error| match error {
        AgentError::NotRunning => AgentError::NotRunningToList,
        error => error,
    };
    let connected = Agent::connect(default_socket(config::Scope::User)).await;
    let mut agent = connected.map_err(to_list)?;
    let mut targets = agent.targets().await.map_err(to_list)?.targets;
    targets.push(String::new());
    let lines = targets.join("\n");
    io::stdout()
        .write_all(lines.as_bytes())
        .map_err(Error::Write)
}

/// Moves a process, called `name`, into the slice of `target`. With `wait`, returns when the
/// kernel holds the verdict.
async fn enter(target: &str, name: &str, process: Process, wait: bool) -> Result<(), Error> {
    let socket = default_socket(config::Scope::User);
    let mut agent = None;
    match wait {
        true => {
            let agent = agent.insert(Agent::await_and_connect(socket).await?);
            agent.check_target(target).await?;
        }
        false => Agent::refuse_unknown_target(socket, target).await?,
    }
    check_name(target)?;
    let session_bus = std::env::var("DBUS_SESSION_BUS_ADDRESS").ok();
    let addresses = Address::all(session_bus.as_deref(), &runtime_directory());
    let pid = match process {
        Process::This => std::process::id(),
        Process::Other(pid) => pid,
    };
    let scope = ScopeUnit::new(target, name, pid);
    let entered = scope.enter(&addresses, process).await;
    match entered {
        // Root without a manager is mostly in another user's session, as under sudo.
        Err(ScopeError::NoManager(_)) if rustix::process::getuid().is_root() => {
            return Err(AgentError::Root.into());
        }
        entered => entered.map_err(|error| refused(error, process))?,
    }
    if let Some(mut agent) = agent {
        let control_group = control_group_of(process)
            .map_err(|source| ScopeError::ControlGroup { process, source })?;
        agent.await_target(&control_group, target).await?;
    }
    Ok(())
}

/// Why a process was not moved, in plain words where it can be seen that it is the process.
fn refused(error: ScopeError, process: Process) -> Error {
    let Process::Other(pid) = process else {
        return error.into();
    };
    let owner = fs::metadata(format!("/proc/{pid}")).map(|process| process.uid());
    match (&error, owner) {
        (ScopeError::Refused { .. }, Err(gone)) if gone.kind() == io::ErrorKind::NotFound => {
            Error::NoProcess(pid)
        }
        (ScopeError::Failed { .. }, Ok(owner)) if owner != rustix::process::getuid().as_raw() => {
            Error::OthersProcess(pid)
        }
        _ => error.into(),
    }
}

/// Whether a process has any socket open that can send packets, as far as that can be told.
fn has_sockets(pid: u32) -> bool {
    let mut local = HashSet::new();
    for kind in LOCAL {
        let table = fs::read(format!("/proc/{pid}/net/{}", kind.0)).unwrap_or_default();
        local.extend(inodes(&String::from_utf8_lossy(&table), kind.1));
    }
    let open = fs::read_dir(format!("/proc/{pid}/fd"));
    open.into_iter().flatten().flatten().any(|descriptor| {
        let file = fs::read_link(descriptor.path()).unwrap_or_default();
        socket(file.as_os_str().as_bytes()).is_some_and(|inode| !local.contains(&inode))
    })
}

/// The kinds of sockets that send no packets: their tables in `/proc/PID/net`, and the column in which those have inodes.
const LOCAL: [(&str, usize); 2] = [("unix", 6), ("netlink", 9)];

/// The inodes in a table of sockets.
fn inodes(table: &str, column: usize) -> impl Iterator<Item = u64> {
    let lines = table.lines();
    lines.filter_map(move |line| line.split_ascii_whitespace().nth(column)?.parse().ok())
}

/// The inode of the socket that a link in `/proc/PID/fd` leads to, if it leads to one.
fn socket(link: &[u8]) -> Option<u64> {
    let inode = link.strip_prefix(b"socket:[")?.strip_suffix(b"]")?;
    std::str::from_utf8(inode).ok()?.parse().ok()
}

/// Fails if no slice can be named after the target.
fn check_name(target: &str) -> Result<(), Error> {
    if matches!(target, "direct" | "drop") {
        return Ok(());
    }
    let name = || target.to_owned();
    if let Err(source) = target.parse::<ProxyName>() {
        return Err(Error::Name {
            name: name(),
            source,
        });
    }
    if target.contains("--") || target.ends_with('-') {
        return Err(Error::Slice(name()));
    }
    Ok(())
}

/// A process's control group, as the agent takes it.
fn control_group_of(process: Process) -> io::Result<String> {
    let file = process.control_groups()?;
    control_group(&file).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, nameless(&file)))
}

/// Why the control group that `/proc/PID/cgroup` has in it can't be named to the agent.
fn nameless(file: &[u8]) -> &'static str {
    match subtree::of_process(file) {
        Some(path) if path.starts_with(b"/..") => {
            "it is outside of this control group namespace: run cgtproxy-exec outside of the container, or use \
             --no-wait to do without the agent"
        }
        Some(_) => "its path can't be told to an agent",
        None => "no control group of version 2",
    }
}

/// The control group that `/proc/PID/cgroup` has in it, as the agent takes it.
fn control_group(file: &[u8]) -> Option<String> {
    let path = subtree::of_process(file)?.strip_prefix(b"/")?;
    let path = ControlGroupPath::from_bytes(path).ok()?;
    Some(format!("/{}", path.to_wire()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_control_group_among_those_of_version_1() {
        assert_eq!(
            control_group(b"12:cpu,cpuacct:/user.slice\n1:name=systemd:/init.scope\n0::/a/b%c\n"),
            Some("/a/b%25c".into())
        );
        assert_eq!(control_group(b"0::/\n"), Some("/".into()));
        assert_eq!(control_group(b"1:name=systemd:/init.scope\n"), None);
        // What is outside of this process's control group namespace can't be named.
        assert_eq!(control_group(b"0::/../a\n"), None);
        assert!(nameless(b"0::/../a\n").contains("namespace"));
        assert!(nameless(b"1:name=systemd:/init.scope\n").contains("version 2"));
    }

    #[test]
    fn sockets_are_found_in_the_tables_of_the_kernel() {
        let unix = "Num       RefCount Protocol Flags    Type St Inode Path\n\
                    00000000aa95b18c: 00000002 00000000 00010000 0001 01 17654 /run/a b\n\
                    00000000bb95b18c: 00000003 00000000 00000000 0001 03 17655\n";
        assert!(inodes(unix, 6).eq([17654, 17655]));
        let netlink = "sk               Eth Pid        Groups   Rmem     Wmem     Dump  Locks    Drops    Inode\n\
                       0000000054f2ab3b 0   0          00000000 0        0        0     2        0        4027\n";
        assert!(inodes(netlink, 9).eq([4027]));
        assert_eq!(socket(b"socket:[4027]"), Some(4027));
        assert_eq!(socket(b"pipe:[4027]"), None);
    }

    #[test]
    fn no_name_leads_out_of_the_slice() {
        for name in ["direct", "drop", "proxy", "mihomo", "my-proxy", "v2.ray_1"] {
            assert!(check_name(name).is_ok(), "{name}");
        }
        for name in ["", "a/b", "../a", "a b", "drop-all", "a\n", "a-", "a--b"] {
            assert!(check_name(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn exit_statuses_are_those_of_env() {
        let exec = |kind: io::ErrorKind| Error::Exec {
            command: "x".into(),
            source: kind.into(),
        };
        assert_eq!(exec(io::ErrorKind::NotFound).exit_code(), 127);
        assert_eq!(exec(io::ErrorKind::PermissionDenied).exit_code(), 126);
        assert_eq!(Error::Agent(AgentError::NotRunning).exit_code(), 125);
    }
}
