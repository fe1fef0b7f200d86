//! cgtproxy-agent: what its commands do.

mod apps;
mod check;
mod client;
mod doctor;
mod explain;
mod migrate;
mod status;
mod table;

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use cgtproxy_proto::agent::GetStatus_Reply;
use cgtproxy_proto::client::CallError;
use cgtproxy_proto::file;
use cgtproxy_proto::log;
use cgtproxy_proto::path::InvalidPath;
use tokio::runtime::Runtime;

use crate::cli::{Arguments, Check, Command};
use crate::config::{self, Config, ConfigFile, LoadError, Scope};
use crate::doctor::facts;
use crate::otherwise::Otherwise;
use crate::relay;
use crate::run::{self, Options};
use crate::server;
use crate::subtree::{self, Subtree};
use crate::text::{chain, printable};

/// The original's name for the variable that says how much is logged.
const OLD_LOG_VARIABLE: &str = "LOG_LEVEL";

/// What names standard input in place of a file.
const STANDARD_INPUT: [&str; 2] = ["-", "/dev/stdin"];

/// The system configuration.
const SYSTEM_CONFIG: &str = "/etc/cgtproxy/config.yaml";

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
enum Error {
    /// The agent can't run.
    #[error(transparent)]
    Run(#[from] run::Error),
    /// There is no cgroup v2.
    #[error(transparent)]
    NoRoot(#[from] subtree::NoRoot),
    /// This user can have no control group.
    #[error("this user can have no control group")]
    Subtree(#[from] InvalidPath),
    /// There is no home directory to look for the configuration in.
    #[error("there is no home directory; name the configuration with --config")]
    NoHome,
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] LoadError),
    /// Nobody listens.
    #[error(
        "cgtproxy-agent is not running; start it with \
         'systemctl --user enable --now cgtproxy-agent'"
    )]
    NotRunning,
    /// Nobody listens for the machine.
    #[error(
        "the system's cgtproxy-agent is not running; start it with \
         'systemctl enable --now cgtproxy-agent-system'"
    )]
    SystemNotRunning,
    /// What root's session with the helper is.
    #[error(
        "root has no agent but the system's: add --system, or run this as the user whose applications it is about"
    )]
    RootIsTheSystem,
    /// The helper would take it for the user's own.
    #[error("only root runs the system's agent; leave out --system")]
    SystemIsRoots,
    /// Its directory is root's.
    #[error("only root may ask the system's cgtproxy-agent: use 'sudo cgtproxy-agent --system'")]
    SystemIsAskedByRoot,
    /// The agent's socket is of no use.
    #[error("can't connect to cgtproxy-agent at {}", .path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The agent gave no answer.
    #[error("cgtproxy-agent gave no answer")]
    Call(#[source] CallError),
    /// As many programs are connected to the agent as may be.
    #[error("cgtproxy-agent serves no more than {0} programs at once")]
    TooManyConnections(i64),
    /// The agent gave none in so many seconds.
    #[error("cgtproxy-agent gave no answer within {0} seconds")]
    NoAnswer(u64),
    /// The agent's answers are about another file.
    #[error(
        "cgtproxy-agent is running with {own} and not with {}: leave out --config, or stop the agent first",
        .named.display()
    )]
    OtherFile {
        /// The agent's own file.
        own: String,
        /// The file that the command line names.
        named: PathBuf,
    },
    /// There is no such control group, process or unit.
    #[error("{0}")]
    NotFound(String),
    /// A file is not to be overwritten.
    #[error("{} is there already; --force replaces it", .0.display())]
    Exists(PathBuf),
    /// A file can't be written.
    #[error("can't write {}", .file.display())]
    Write {
        /// The file.
        file: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Output failed.
    #[error("can't write the output")]
    Output(#[from] io::Error),
    /// The kernel gives no event queue.
    #[error("can't start")]
    Start(#[source] io::Error),
}

/// The program.
pub fn main() -> ExitCode {
    let arguments = match Arguments::of_process() {
        Ok(arguments) => arguments,
        Err(status) => return status,
    };
    log::init(&[log::VARIABLE, OLD_LOG_VARIABLE]);
    run(arguments).unwrap_or_else(|error| {
        tracing::error!("{}", chain(&error));
        ExitCode::FAILURE
    })
}

/// Does what was asked for.
fn run(arguments: Arguments) -> Result<ExitCode, Error> {
    let about_one = matches!(
        arguments.command,
        Some(
            Command::Doctor { .. }
                | Command::Status { .. }
                | Command::Apps { .. }
                | Command::Explain { .. }
                | Command::Check {
                    what: Some(Check::Permission { .. }),
                    ..
                }
        )
    );
    // There is no such agent, no manager and no application that they could be about.
    if about_one {
        not_roots_own(&arguments)?;
    }
    let result = match &arguments.command {
        None | Some(Command::Run) => {
            run::run(options(&arguments)?)?;
            Ok(ExitCode::SUCCESS)
        }
        Some(
            Command::Check { file, what: None }
            | Command::Check {
                what: Some(Check::Config { file }),
                ..
            },
        ) => check_config(&arguments, file.as_ref()),
        Some(
            Command::Doctor { json }
            | Command::Check {
                what: Some(Check::Permission { json }),
                ..
            },
        ) => doctor::run(&arguments, *json),
        Some(Command::Status { json }) => status::run(&arguments, *json),
        Some(Command::Apps { all, json }) => apps::run(&arguments, *all, *json),
        Some(Command::Migrate {
            file,
            output,
            force,
        }) => migrate::run(file, output.as_deref(), *force),
        Some(Command::Explain { what, json }) => explain::run(&arguments, what, *json),
    };
    match result {
        // Whoever reads has seen enough.
        Err(Error::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            Ok(ExitCode::SUCCESS)
        }
        result => result,
    }
}

/// What waits for the daemons' answers.
fn runtime() -> Result<Runtime, Error> {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().build().map_err(Error::Start)
}

/// What to type for the agent.
fn program(scope: Scope) -> &'static str {
    match scope {
        Scope::User => "cgtproxy-agent",
        Scope::System => "sudo cgtproxy-agent --system",
    }
}

/// What becomes of what no rule of this agent's decides, as far as the helper tells.
fn otherwise(arguments: &Arguments, agent: Option<&GetStatus_Reply>) -> Result<Otherwise, Error> {
    let helper = runtime()?.block_on(facts::helper_status(&arguments.socket));
    let uid = rustix::process::getuid().as_raw();
    Ok(Otherwise::new(
        arguments.scope(),
        uid,
        helper.as_ref(),
        agent,
    ))
}

/// What is said where no agent runs, of what is shown all the same.
fn nothing_is_in_force(otherwise: &Otherwise) -> String {
    let agent = otherwise.scope().agent();
    if otherwise.is_connected() {
        return format!(
            "{agent} runs and can't be asked: what is in force may be something else; see '{} doctor'.",
            program(otherwise.scope())
        );
    }
    match otherwise.left() {
        Some(left) => format!("{agent} is not running: this is not in force. {left}"),
        None => format!("{agent} is not running: nothing of this is in force."),
    }
}

/// What there is to say to somebody who takes what is in force for what the file says; none if it is that.
fn older(status: &GetStatus_Reply, otherwise: &Otherwise) -> Option<String> {
    status.configError.as_ref()?;
    let agent = program(otherwise.scope());
    Some(match otherwise.waits() {
        true => format!(
            "The agent waits for the configuration file to be fixed: see '{agent} check'. {}",
            otherwise.idle()
        ),
        false => format!(
            "The configuration file is not in force: this is what was loaded before. '{agent} status' says why."
        ),
    })
}

/// Whether there may be colours on standard output.
fn colours() -> bool {
    log::colours(&io::stdout())
}

/// Prints what a status goes with, which is the same if whoever reads has seen enough.
fn print(text: &[u8]) -> Result<(), Error> {
    let mut out = io::stdout().lock();
    match out.write_all(text).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => Ok(written?),
    }
}

/// The bytes of a file that the command line names, or those of standard input if that is what it names. It may be a pipe,
/// as that of a shell's `<(COMMAND)`, which no agent would wait for.
fn read(file: &Path) -> Result<Vec<u8>, Error> {
    let is_pipe = || fs::metadata(file).is_ok_and(|named| named.file_type().is_fifo());
    let read = if STANDARD_INPUT.map(Path::new).contains(&file) {
        file::read_from(io::stdin().lock())
    } else if is_pipe() {
        File::open(file).and_then(file::read_from)
    } else {
        return Ok(config::read_file(file)?);
    };
    read.map_err(|source| {
        let file = file.to_owned();
        LoadError::Unreadable { file, source }.into()
    })
}

fn check_config(arguments: &Arguments, file: Option<&PathBuf>) -> Result<ExitCode, Error> {
    if let Some(file) = file {
        return check::run(file, &read(file)?, arguments.scope());
    }
    let file = config_file(arguments)?;
    match config::read_file(&file.path) {
        Ok(bytes) => check::run(&file.path, &bytes, arguments.scope()),
        Err(LoadError::Missing(_)) if !file.explicit => {
            not_roots_own(arguments)?;
            let name = printable(&file.path.to_string_lossy());
            // Nobody is asked, so that it can be said where nothing runs.
            let uid = rustix::process::getuid().as_raw();
            let holds = Otherwise::new(file.scope, uid, None, None).without_file();
            print(format!("there is no file {name}: {holds}\n").as_bytes())?;
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => Err(error.into()),
    }
}

/// Refuses what would be about an agent of root's that is not the machine's.
fn not_roots_own(arguments: &Arguments) -> Result<(), Error> {
    match (arguments.scope(), rustix::process::getuid().is_root()) {
        (Scope::User, true) => Err(Error::RootIsTheSystem),
        _ => Ok(()),
    }
}

fn options(arguments: &Arguments) -> Result<Options, Error> {
    not_roots_own(arguments)?;
    if arguments.system && !rustix::process::getuid().is_root() {
        return Err(Error::SystemIsRoots);
    }
    let mut config = config_file(arguments)?;
    // Whoever asks for it may be in another directory.
    if let Ok(path) = std::path::absolute(&config.path) {
        config.path = path;
    }
    Ok(Options {
        subtree: match own_subtree(arguments) {
            // systemd may tell what can't be seen.
            Err(Error::NoRoot(_)) => usual_subtree(arguments)?.unseen(),
            subtree => subtree?,
        },
        config,
        helper: arguments.socket.clone(),
        socket: server::default_socket(arguments.scope()),
        relay: relay::default_socket(),
    })
}

/// The control groups that this program is about.
fn own_subtree(arguments: &Arguments) -> Result<Subtree, Error> {
    let root = match &arguments.cgroup_root {
        Some(root) => root.clone(),
        None => subtree::find_root()?,
    };
    subtree_at(arguments, root)
}

/// The same where nobody knows the control group root.
fn usual_subtree(arguments: &Arguments) -> Result<Subtree, Error> {
    subtree_at(arguments, subtree::USUAL_ROOT.into())
}

/// The same below this control group root: the machine's, or those of the user that this program runs as.
fn subtree_at(arguments: &Arguments, root: PathBuf) -> Result<Subtree, Error> {
    match arguments.scope() {
        Scope::System => Ok(Subtree::of_machine(root)),
        Scope::User => Ok(Subtree::of_user(root, rustix::process::getuid().as_raw())?),
    }
}

/// The configuration file that is meant.
fn config_file(arguments: &Arguments) -> Result<ConfigFile, Error> {
    if let Some(path) = &arguments.config {
        return Ok(ConfigFile {
            path: path.clone(),
            explicit: true,
            scope: arguments.scope(),
        });
    }
    if arguments.system {
        return Ok(ConfigFile {
            path: SYSTEM_CONFIG.into(),
            explicit: false,
            scope: Scope::System,
        });
    }
    let directories = directories::BaseDirs::new().ok_or(Error::NoHome)?;
    Ok(ConfigFile {
        path: directories.config_dir().join("cgtproxy/config.yaml"),
        explicit: false,
        scope: Scope::User,
    })
}

/// What the configuration file means, and where it is; without one at the usual place, what holds then.
fn config(arguments: &Arguments) -> Result<(Config, Option<PathBuf>), Error> {
    let file = config_file(arguments)?;
    match config::load(&file.path, file.scope) {
        Ok(loaded) => Ok((loaded.config, Some(file.path))),
        Err(LoadError::Missing(_)) if !file.explicit => {
            Ok((Config::without_file(file.scope), None))
        }
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[test]
    fn the_systems_agent_is_about_the_machine_wherever_control_groups_are() {
        let system = Arguments::parse_from(["cgtproxy-agent", "--system"]);
        assert_eq!(usual_subtree(&system).unwrap().prefix(), b"");
        let user = Arguments::parse_from(["cgtproxy-agent"]);
        assert_ne!(usual_subtree(&user).unwrap().prefix(), b"");
    }
}
