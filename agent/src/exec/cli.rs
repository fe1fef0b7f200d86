//! What is typed on the command line of cgtproxy-exec.

use std::ffi::OsString;

use cgtproxy_proto::HELP_COLUMNS;
use clap::Parser;

/// What ends every help.
const END: &str = "Exit status: that of COMMAND, or 125 if cgtproxy-exec itself fails, 126 if COMMAND can't be run, \
                   127 if it is not found.\n\n\
                   Examples:\n  \
                   cgtproxy-exec proxy curl https://example.org\n  \
                   cgtproxy-exec direct ssh host\n  \
                   cgtproxy-exec drop make test";

/// What comes behind that in a long help, and is a section of the manual page.
const ENVIRONMENT: &str = "Environment:\n\
\x20 XDG_RUNTIME_DIR  where the sockets of the agent and of systemd are; without it /run/user/UID\n\
\x20 DBUS_SESSION_BUS_ADDRESS  the bus by which systemd is reached if not by its own socket";

/// Runs a command whose traffic goes where TARGET says, whatever the rules in your configuration
/// say about it.
///
/// The command runs in cgtproxy-TARGET.slice of your systemd user manager, with this terminal,
/// environment and working directory. It is started only once the kernel knows where its packets
/// go, so that none leaves by another way. A standard input, output or error that is closed is /dev/null
/// for the command.
#[derive(Debug, Parser)]
#[command(
    name = "cgtproxy-exec",
    version,
    max_term_width = HELP_COLUMNS,
    override_usage = "cgtproxy-exec [--no-wait] TARGET COMMAND [ARGUMENT]...\n       \
                      cgtproxy-exec [--no-wait] --pid PID TARGET\n       \
                      cgtproxy-exec --list",
    after_help = END,
    after_long_help = format!("{END}\n\n{ENVIRONMENT}")
)]
pub struct Options {
    /// Go ahead even if nobody can say that the target is in force. A target that the agent does not know is still
    /// refused
    #[arg(long)]
    pub(crate) no_wait: bool,

    /// Move this process of yours instead of running a command. Its children stay where they are,
    /// and sockets it has open keep the target they had
    #[arg(
        long,
        value_name = "PID",
        value_parser = process,
        conflicts_with = "command"
    )]
    pub(crate) pid: Option<u32>,

    /// Print the names of all targets, one a line
    #[arg(long, exclusive = true)]
    pub(crate) list: bool,

    /// direct, drop, the name of a proxy in your configuration, or 'proxy' for the first of them
    #[arg(required_unless_present = "list")]
    pub(crate) target: Option<String>,

    /// The command and its arguments
    #[arg(
        value_name = "COMMAND",
        required_unless_present_any = ["pid", "list"],
        num_args = 1..,
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    pub(crate) command: Vec<OsString>,
}

/// The number of a process.
fn process(text: &str) -> Result<u32, String> {
    let number = text.parse().ok().filter(|&number| number > 0);
    number.ok_or_else(|| "it is not the number of a process, which 'ps' shows as PID".to_owned())
}

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Become this command, with these arguments.
    Run(OsString, Vec<OsString>),
    /// Move this process.
    Move(u32),
}

impl Options {
    /// The target and what to do there; none if the targets are to be listed.
    pub(crate) fn meaning(self) -> Option<(String, Action)> {
        let action = match self.pid {
            Some(pid) => Action::Move(pid),
            None => {
                let mut words = self.command.into_iter();
                Action::Run(words.next()?, words.collect())
            }
        };
        Some((self.target?, action))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use clap::error::ErrorKind;

    fn parse(args: &[&str]) -> Result<Options, ErrorKind> {
        Options::try_parse_from(std::iter::once("cgtproxy-exec").chain(args.iter().copied()))
            .map_err(|error| error.kind())
    }

    #[test]
    fn what_follows_the_target_is_the_commands() {
        for (args, command) in [
            (&["p", "ls"][..], &["ls"][..]),
            (&["p", "ls", "-l", "--all"], &["ls", "-l", "--all"]),
            (&["p", "ls", "--no-wait"], &["ls", "--no-wait"]),
            (&["p", "ls", "--pid", "7"], &["ls", "--pid", "7"]),
            (&["p", "ls", "--list"], &["ls", "--list"]),
            (&["p", "ls", "--help"], &["ls", "--help"]),
            (&["p", "ls", "--version", "-h"], &["ls", "--version", "-h"]),
            (&["p", "ls", "--", "-l"], &["ls", "--", "-l"]),
            (&["p", "ls", "", "a b"], &["ls", "", "a b"]),
            (&["p", "--", "ls"], &["ls"]),
            (&["--", "p", "ls"], &["ls"]),
        ] {
            let options = parse(args).unwrap();
            assert!(!options.no_wait, "{args:?}");
            let (target, action) = options.meaning().unwrap();
            let Action::Run(program, arguments) = action else {
                panic!("{args:?}: {action:?}");
            };
            assert_eq!(target, "p", "{args:?}");
            assert_eq!(program, command[0], "{args:?}");
            assert_eq!(arguments, command[1..], "{args:?}");
        }
    }

    #[test]
    fn options_stand_before_the_target() {
        assert!(parse(&["--no-wait", "p", "ls"]).unwrap().no_wait);
        assert!(parse(&["--nonsense", "p", "ls"]).is_err());
    }

    #[test]
    fn a_process_takes_the_place_of_a_command() {
        let meaning = |args| parse(args).unwrap().meaning();
        let moved = Some(("p".to_owned(), Action::Move(7)));
        assert_eq!(meaning(&["--pid", "7", "p"]), moved);
        assert_eq!(meaning(&["--pid=7", "--no-wait", "--", "p"]), moved);
        assert!(parse(&["--pid", "7", "p", "ls"]).is_err());
        for pid in ["0", "-1", "x", ""] {
            assert!(parse(&["--pid", pid, "p"]).is_err(), "{pid:?}");
        }
        let error = Options::try_parse_from(["cgtproxy-exec", "--pid", "x", "p"]).unwrap_err();
        let said = "invalid value 'x' for '--pid <PID>': it is not the number of a process, which 'ps' shows as PID";
        assert!(error.to_string().contains(said), "{error}");
    }

    #[test]
    fn targets_are_listed_alone() {
        let options = parse(&["--list"]).unwrap();
        assert!(options.list);
        assert_eq!(options.meaning(), None);
        assert!(parse(&["--list", "p", "ls"]).is_err());
    }

    #[test]
    fn target_and_command_are_needed() {
        for args in [&[][..], &["p"], &["--pid", "7"], &["--no-wait", "p"]] {
            let kind = parse(args).unwrap_err();
            assert_eq!(kind, ErrorKind::MissingRequiredArgument, "{args:?}");
        }
    }

    #[test]
    fn is_well_formed() {
        use clap::CommandFactory;
        Options::command().debug_assert();
    }
}
