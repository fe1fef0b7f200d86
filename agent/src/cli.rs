//! The command line of cgtproxy-agent.

use std::path::PathBuf;
use std::process::ExitCode;

use cgtproxy_proto::nearest::nearest;
use cgtproxy_proto::usage;
use cgtproxy_proto::{HELP_COLUMNS, HELPER_SOCKET, HELPER_SOCKET_VARIABLE};
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, Parser, Subcommand};

use crate::config::Scope;

/// What ends every help.
const EXIT_STATUS: &str =
    "Exit status: 0 if all went well, 2 if the command line is wrong, 1 otherwise.";

/// What comes behind that in a long help, and is a section of the manual page.
const ENVIRONMENT: &str = "Environment:\n\
\x20 CGTPROXY_LOG, LOG_LEVEL  how much is said: error, warn, info, debug or trace\n\
\x20 NO_COLOR  if it is not empty, nothing is printed in colours\n\
\x20 TERM  the terminal; if it is 'dumb' or not set, nothing is printed in colours either\n\
\x20 CGTPROXY_SOCKET  where the helper listens, unless there is --socket\n\
\x20 XDG_CONFIG_HOME  where cgtproxy/config.yaml is; without it ~/.config\n\
\x20 XDG_RUNTIME_DIR  where the sockets of the agent, the relay and systemd are; without it /run/user/UID\n\
\x20 DBUS_SESSION_BUS_ADDRESS  the bus by which systemd is reached if not by its own socket\n\
\x20 XDG_CURRENT_DESKTOP  the desktop, for doctor\n\
\x20 all_proxy, ALL_PROXY, https_proxy, HTTPS_PROXY, http_proxy  the proxy, where there is no configuration";

/// Decides which of your applications go direct, are dropped or go through a proxy
///
/// Reads ~/.config/cgtproxy/config.yaml, watches the control groups of your applications and has
/// cgtproxy-helper put their verdicts into the kernel. Needs no privilege. Without a command it runs
/// until it is told to stop, as the user service cgtproxy-agent.service does.
///
/// Messages go to standard error. CGTPROXY_LOG or LOG_LEVEL says how many: error, warn, info, debug
/// or trace.
#[derive(Debug, Parser)]
#[command(
    name = "cgtproxy-agent",
    version,
    max_term_width = HELP_COLUMNS,
    after_help = EXIT_STATUS,
    after_long_help = format!("{EXIT_STATUS}\n\n{ENVIRONMENT}")
)]
pub struct Arguments {
    /// Read the configuration from this file instead of ~/.config/cgtproxy/config.yaml
    #[arg(short, long, value_name = "FILE", global = true)]
    pub(crate) config: Option<PathBuf>,

    /// Be the system's agent, or ask it: /etc/cgtproxy/config.yaml, for every control group there is
    ///
    /// Only root runs it, as the system service cgtproxy-agent-system.service does. Users' own
    /// configurations come before it, except for rules with 'enforce: true'.
    #[arg(long, global = true)]
    pub(crate) system: bool,

    /// Where the helper listens
    #[arg(long, value_name = "PATH", env = HELPER_SOCKET_VARIABLE, default_value = HELPER_SOCKET, global = true)]
    pub(crate) socket: PathBuf,

    /// Where cgroup v2 is mounted, if not at /sys/fs/cgroup or /sys/fs/cgroup/unified
    #[arg(long, value_name = "DIR", global = true)]
    pub(crate) cgroup_root: Option<PathBuf>,

    /// What to do
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

impl Arguments {
    /// Reads the command line.
    ///
    /// # Errors
    /// With what is left to do if it is wrong, or asks for help: that was printed, and the process ends with this status.
    pub(crate) fn of_process() -> Result<Self, ExitCode> {
        let arguments = Self::try_parse().and_then(Self::with_one_file);
        arguments.map_err(|error| {
            let error = suggest(error, &Self::command());
            usage::end(&error, usage::WRONG, usage::FAILED)
        })
    }

    /// Refuses a second file to check. clap sees no conflict where the option stands before the command.
    fn with_one_file(self) -> Result<Self, clap::Error> {
        match &self.command {
            Some(
                Command::Check {
                    file: Some(_),
                    what: None,
                }
                | Command::Check {
                    what: Some(Check::Config { file: Some(_) }),
                    ..
                },
            ) if self.config.is_some() => Err(Self::command().error(
                ErrorKind::ArgumentConflict,
                "a file to check and --config are one too many: leave one of them out",
            )),
            _ => Ok(self),
        }
    }

    /// Whose agent it is about.
    pub(crate) fn scope(&self) -> Scope {
        match self.system {
            true => Scope::System,
            false => Scope::User,
        }
    }
}

/// What to check.
#[derive(Debug, Subcommand)]
pub(crate) enum Check {
    /// Find everything that is wrong with a configuration
    Config {
        /// The file, or '-' for standard input; by default the file that the agent reads
        file: Option<PathBuf>,
    },

    /// Find what is in the way, as 'cgtproxy-agent doctor' does
    Permission {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the agent (what happens without a command)
    ///
    /// SIGHUP loads the configuration again, as does a change of the file; one that is wrong is
    /// refused and the old one stays in force. SIGTERM and SIGINT remove all rules;
    /// SIGUSR1 leaves them for the few seconds in which another agent can take them over, as when
    /// the service is restarted.
    Run,

    /// Find everything that is wrong with a configuration
    ///
    /// Prints all findings with their places in the file. The exit status is 1 if there are errors,
    /// and 0 if there are none or only warnings.
    #[command(args_conflicts_with_subcommands = true)]
    Check {
        /// The file, or '-' for standard input; by default the file that the agent reads
        file: Option<PathBuf>,
        /// What to check; without it, the configuration
        #[command(subcommand)]
        what: Option<Check>,
    },

    /// Find what is in the way
    ///
    /// Looks at everything that diverted packets need: the helper, the agent, control groups, the
    /// kernel, routing, packet marks, the proxies' sockets and name resolution. Needs no privilege and
    /// changes nothing. Each finding says what is wrong, what it does to you, and how to mend it.
    /// The exit status is 1 if there are errors, and 0 if there are none or only warnings and notes.
    Doctor {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },

    /// Show what the running agent does
    ///
    /// Shows whether the helper is connected, the targets, and every control group with its verdict
    /// and the number of the rule that gives it. The exit status is 0 if the agent has answered, also if what it
    /// says is that it is not connected.
    Status {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },

    /// List the applications that run, with their ids and targets
    ///
    /// The id is what a rule's 'app' takes. Says too which programs have no control group of their own, so
    /// that no rule can be about them alone, and what to do about that. When no agent runs, says what the
    /// configuration means for them.
    Apps {
        /// Show units that belong to no application too, such as the desktop's services; a rule names them by 'unit'
        #[arg(short, long)]
        all: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },

    /// Turn a configuration of cgproxy or of the original cgtproxy into one for this agent
    ///
    /// Takes cgproxy's config.json, and a cgtproxy configuration with regular expressions that spell out
    /// what 'app', 'unit' and 'slice' say. Prints the new one, and on standard error each thing that could not
    /// be carried over, with what to do instead.
    Migrate {
        /// The old configuration, or '-' for standard input
        file: PathBuf,
        /// Write to this file instead of standard output, which is '-'
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
        /// Replace the file that --output names
        #[arg(short, long, requires = "output")]
        force: bool,
    },

    /// Say which rule gives a control group its verdict
    ///
    /// Says also which other control group it inherits the verdict from, if it does, and whether the verdict is
    /// in the kernel. When no agent runs, says what the configuration means for it.
    Explain {
        /// A control group as a directory, as a path from the control group root or from the user
        /// manager's control group; the number of a process; the name of a unit, where that of a service needs
        /// no suffix; or the id of an application
        #[arg(value_name = "PATH|PID|UNIT")]
        what: std::ffi::OsString,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// Adds to what is wrong with this process's command line what may have been meant. clap's own suggestions would be
/// linked into the helper, too.
pub(crate) fn suggest(error: clap::Error, command: &clap::Command) -> clap::Error {
    let words = std::env::args_os().skip(1);
    let words: Vec<String> = words
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    suggest_for(error, command, &words)
}

fn suggest_for(mut error: clap::Error, command: &clap::Command, words: &[String]) -> clap::Error {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        _ => None,
    };
    let (wrong_command, wrong_option) = (
        text(ContextKind::InvalidSubcommand),
        text(ContextKind::InvalidArg),
    );
    let own = words.iter().fold(command, |command, word| {
        command.find_subcommand(word).unwrap_or(command)
    });
    let is_command = |name: &String| own.find_subcommand(name).is_some();
    match (error.kind(), wrong_command, wrong_option) {
        // clap takes whatever follows a command's own value for the name of another command.
        (ErrorKind::ArgumentConflict, Some(wrong), _) if !is_command(&wrong) => {
            let mut unexpected = clap::Error::new(ErrorKind::UnknownArgument).with_cmd(own);
            unexpected.insert(ContextKind::InvalidArg, ContextValue::String(wrong));
            if let Some(usage) = error.get(ContextKind::Usage) {
                unexpected.insert(ContextKind::Usage, usage.clone());
            }
            error = unexpected;
        }
        (ErrorKind::InvalidSubcommand, Some(wrong), _) => {
            let names = own.get_subcommands().map(clap::Command::get_name);
            if let Some(near) = nearest(&wrong, names) {
                let near = ContextValue::Strings(vec![near.to_owned()]);
                error.insert(ContextKind::SuggestedSubcommand, near);
            }
        }
        (ErrorKind::UnknownArgument, _, Some(wrong)) if wrong.starts_with("--") => {
            // It would not be right as a value either.
            error.remove(ContextKind::Suggested);
            let name = wrong.trim_start_matches('-');
            let general = command
                .get_arguments()
                .filter(|argument| argument.is_global_set());
            let options = own.get_arguments().chain(general);
            let names = options.filter_map(clap::Arg::get_long);
            let has =
                |one: &&clap::Command| one.get_arguments().any(|a| a.get_long() == Some(name));
            // It may stand before the command whose it is.
            let of_another = Some(own).filter(has).or(own.get_subcommands().find(has));
            if of_another.is_none()
                && let Some(near) = nearest(name, names.chain(["help"]))
            {
                let near = ContextValue::String(format!("--{near}"));
                error.insert(ContextKind::SuggestedArg, near);
            } else if let Some(sub) = of_another {
                let exists = format!("'{} {wrong}' exists", sub.get_name()).into();
                error.insert(
                    ContextKind::Suggested,
                    ContextValue::StyledStrs(vec![exists]),
                );
            }
        }
        _ => {}
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(words: &[&str]) -> String {
        let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
        let program = std::iter::once("cgtproxy-agent".to_owned());
        let arguments = Arguments::try_parse_from(program.chain(words.iter().cloned()));
        let error = arguments.and_then(Arguments::with_one_file).unwrap_err();
        suggest_for(error, &Arguments::command(), &words).to_string()
    }

    #[test]
    fn a_second_file_is_not_taken_for_a_command() {
        let error = error(&["check", "a", "b"]);
        assert!(
            error.starts_with("error: unexpected argument 'b' found\n\nUsage: "),
            "{error}"
        );
    }

    #[test]
    fn one_file_is_checked_at_a_time() {
        for words in [
            &["check", "--config", "a", "b"][..],
            &["--config", "a", "check", "b"],
            &["check", "config", "--config", "a", "b"],
            &["--config", "a", "check", "config", "b"],
        ] {
            let error = error(words);
            assert!(
                error.contains("leave one of them out"),
                "{words:?}: {error}"
            );
        }
    }

    #[test]
    fn says_what_may_have_been_meant() {
        for (words, tip) in [
            (&["chek"][..], Some("a similar subcommand exists: 'check'")),
            (
                &["status", "--jsn"],
                Some("a similar argument exists: '--json'"),
            ),
            (
                &["apps", "--sytem"],
                Some("a similar argument exists: '--system'"),
            ),
            (
                &["--confg", "x"],
                Some("a similar argument exists: '--config'"),
            ),
            (&["check", "--json"], Some("'permission --json' exists")),
            (&["--json", "status"], Some("'status --json' exists")),
            (&["check", "a", "b"], None),
            (&["check", "--nonsense"], None),
            (&["nonsense"], None),
            (&["status", "-x"], None),
        ] {
            let error = error(words);
            match tip {
                Some(tip) => assert!(
                    error.contains(&format!("tip: {tip}\n")),
                    "{words:?}: {error}"
                ),
                None => assert!(!error.contains("tip:"), "{words:?}: {error}"),
            }
        }
    }
}
