//! Asks the user's agent which targets there are, and when the kernel holds a verdict.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cgtproxy_proto::agent::{
    AwaitTarget_Args, AwaitTarget_Reply, ErrorKind, GetTargets_Args, GetTargets_Reply,
};
use cgtproxy_proto::client::CallError;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::connection::{ConnectError, Connection};

/// How long the agent may take to answer, and to get a verdict into the kernel.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// How long the agent may be without a helper: long enough for one that restarts.
const HELPER_PATIENCE: Duration = Duration::from_secs(1);

/// How long nobody may listen: an agent that is restarted is not there for some milliseconds.
const RESTART: Duration = Duration::from_millis(300);

/// How soon the agent is asked again.
const AGAIN: Duration = Duration::from_millis(10);

/// What to do without an agent, for a person.
const START: &str = "start it with 'systemctl --user enable --now cgtproxy-agent'";

/// Why nobody could say that a target is in force.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// Nobody listens.
    #[error("cgtproxy-agent is not running; {START}, or use --no-wait to do without it")]
    NotRunning,
    /// The same, for who wants to know what only an agent knows.
    #[error("cgtproxy-agent is not running; {START}")]
    NotRunningToList,
    /// Root has no agent for cgtproxy-exec.
    #[error(
        "root has no targets of its own, and no cgtproxy-agent that knows any: as a user, say \
         'cgtproxy-exec TARGET sudo COMMAND'"
    )]
    Root,
    /// Its socket is there, but of no use.
    #[error("can't connect to cgtproxy-agent at {}", .socket.display())]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The agent has no helper, or no configuration yet, or the helper did not take the verdict.
    #[error(
        "the target is not in force: {0}; look at 'cgtproxy-agent status', or use --no-wait to do without it"
    )]
    NotConnected(String),
    /// The configuration has no such target.
    #[error("there is no target '{}'; known: {}", .name.escape_debug(), .known.join(", "))]
    UnknownTarget {
        /// What was asked for.
        name: String,
        /// What there is.
        known: Vec<String>,
    },
    /// Something else gives the slice its verdict.
    #[error(
        "the target of {control_group} is '{target}'; does your configuration say \
         'exec-slices: false'?"
    )]
    OtherTarget {
        /// Where this process is.
        control_group: String,
        /// The target it has.
        target: String,
    },
    /// The agent did not see the control group, or did not get its verdict into the kernel.
    #[error(
        "cgtproxy-agent did not get the target into the kernel within {} seconds; \
         look at 'cgtproxy-agent status'",
        PATIENCE.as_secs()
    )]
    Timeout,
    /// The agent does not say which targets there are.
    #[error("cgtproxy-agent gave no answer within {} seconds", PATIENCE.as_secs())]
    NoAnswer,
    /// As many programs are connected to it as may be.
    #[error("cgtproxy-agent serves no more than {0} programs at once")]
    TooManyConnections(i64),
    /// The agent does not know what this program wants.
    #[error(
        "the cgtproxy-agent that runs is of another version; 'systemctl --user try-restart \
         cgtproxy-agent' runs the one that is installed"
    )]
    OtherVersion,
    /// The agent gave no usable answer.
    #[error("cgtproxy-agent gave no answer")]
    Call(#[source] CallError),
}

impl From<ConnectError> for Error {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::NotRunning if rustix::process::getuid().is_root() => Self::Root,
            ConnectError::NotRunning => Self::NotRunning,
            ConnectError::Failed { socket, source } => Self::Connect { socket, source },
        }
    }
}

/// What is asked of the user's agent.
#[derive(Debug)]
pub(crate) struct Agent {
    connection: Connection,
    socket: PathBuf,
}

impl Agent {
    /// Connects to the agent at `socket`.
    pub(crate) async fn connect(socket: PathBuf) -> Result<Self, Error> {
        Ok(Self {
            connection: Connection::open(socket.clone()).await?,
            socket,
        })
    }

    /// The same, and if nobody listens there yet, to one that is being restarted.
    pub(crate) async fn await_and_connect(socket: PathBuf) -> Result<Self, Error> {
        let connection = open(&socket).await?;
        Ok(Self { connection, socket })
    }

    /// Calls a method, and calls it again if the agent ends meanwhile and another one takes its place.
    async fn call<A: Serialize + Clone, R: DeserializeOwned>(
        &mut self,
        method: &str,
        arguments: A,
    ) -> Result<R, Error> {
        let again = arguments.clone();
        match self.connection.call(method, arguments).await {
            Err(CallError::Closed | CallError::Io(_)) => {
                self.connection = open(&self.socket).await?;
                let answer = self.connection.call(method, again).await;
                answer.map_err(Error::Call)
            }
            answer => answer.map_err(Error::Call),
        }
    }

    /// What the agent says of targets. As many programs may be connected to it as there may be, but mostly not for long.
    pub(crate) async fn targets(&mut self) -> Result<GetTargets_Reply, Error> {
        let deadline = Instant::now() + PATIENCE;
        // What there is to say when there is no more time.
        let mut without_answer = Error::NoAnswer;
        loop {
            let call = self.call("GetTargets", GetTargets_Args {});
            let Ok(answer) = timeout_at(deadline, call).await else {
                return Err(without_answer);
            };
            match answer.map_err(fault) {
                Err(refused @ Error::TooManyConnections(_))
                    if Instant::now() + AGAIN < deadline =>
                {
                    without_answer = refused;
                    sleep(AGAIN).await;
                    self.connection = Connection::open(self.socket.clone()).await?;
                }
                answer => return answer,
            }
        }
    }

    /// Fails unless the agent has a target of this name, in force.
    pub(crate) async fn check_target(&mut self, name: &str) -> Result<(), Error> {
        let deadline = Instant::now() + HELPER_PATIENCE;
        loop {
            let reply = self.targets().await?;
            // A wrong name is wrong with or without a helper, and the more useful thing to hear.
            refuse_unknown(name, &reply)?;
            match reply.problem {
                None => return Ok(()),
                Some(problem) if Instant::now() >= deadline => {
                    return Err(Error::NotConnected(problem));
                }
                Some(_) => sleep(AGAIN).await,
            }
        }
    }

    /// Fails if the agent at `socket` can tell that there is no target of this name. One that is not there, or tells
    /// nothing, is done without.
    pub(crate) async fn refuse_unknown_target(socket: PathBuf, name: &str) -> Result<(), Error> {
        let told = async { Self::connect(socket).await?.targets().await };
        match timeout(HELPER_PATIENCE, told).await {
            Ok(Ok(reply)) => refuse_unknown(name, &reply),
            Ok(Err(_)) | Err(_) => Ok(()),
        }
    }

    /// Returns when the kernel holds the verdict `target` for a control group, named by its path
    /// from the control group root.
    pub(crate) async fn await_target(
        &mut self,
        control_group: &str,
        target: &str,
    ) -> Result<(), Error> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let call = self.call::<_, AwaitTarget_Reply>(
                "AwaitTarget",
                AwaitTarget_Args {
                    controlGroup: control_group.to_owned(),
                    target: target.to_owned(),
                },
            );
            let answer = timeout_at(deadline, call)
                .await
                .map_err(|_| Error::Timeout)?;
            match answer {
                Ok(AwaitTarget_Reply {}) => return Ok(()),
                // The control group is a few milliseconds old: word of it may be on its way.
                Err(Error::Call(CallError::Fault(fault)))
                    if matches!(fault.kind(), ErrorKind::ControlGroupNotFound(_)) =>
                {
                    let again = Instant::now() + AGAIN;
                    if again >= deadline {
                        return Err(Error::Timeout);
                    }
                    sleep(again - Instant::now()).await;
                }
                Err(error) => return Err(fault(error)),
            }
        }
    }
}

/// Fails if the agent knows its targets, and this is the name of none of them.
fn refuse_unknown(name: &str, reply: &GetTargets_Reply) -> Result<(), Error> {
    // An agent whose configuration is wrong has those of the one before, if it had one.
    let to_come = reply.configError.is_some() && reply.problem.is_some();
    match to_come || reply.targets.iter().any(|known| known == name) {
        true => Ok(()),
        false => Err(Error::UnknownTarget {
            name: name.to_owned(),
            known: reply.targets.clone(),
        }),
    }
}

/// A connection to the agent at `socket`, which may be about to be there.
async fn open(socket: &Path) -> Result<Connection, Error> {
    let deadline = Instant::now() + RESTART;
    loop {
        match Connection::open(socket.to_owned()).await {
            Err(ConnectError::NotRunning) if Instant::now() < deadline => sleep(AGAIN).await,
            opened => return Ok(opened?),
        }
    }
}

/// A failed call as what it means.
fn fault(error: Error) -> Error {
    let Error::Call(CallError::Fault(fault)) = error else {
        return error;
    };
    match fault.kind() {
        ErrorKind::NotConnected(Some(args)) => Error::NotConnected(args.problem),
        ErrorKind::TooManyConnections(Some(args)) => Error::TooManyConnections(args.limit),
        ErrorKind::OtherTarget(Some(args)) => Error::OtherTarget {
            control_group: args.controlGroup,
            target: args.target,
        },
        ErrorKind::UnknownTarget(Some(args)) => Error::UnknownTarget {
            name: args.name,
            known: args.known,
        },
        _ if fault.is_method_not_found() => Error::OtherVersion,
        _ => Error::Call(CallError::Fault(fault)),
    }
}
