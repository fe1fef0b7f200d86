//! What is typed on the command line of cgtproxy-exec.

use std::ffi::OsString;

use clap::Parser;

/// Runs a command whose traffic goes where TARGET says, whatever the rules in your configuration
/// say about it.
///
/// The command runs in cgtproxy-TARGET.slice of your systemd user manager, with this terminal,
/// environment and working directory. It is started only once the kernel knows where its packets
/// go, so that none leaves by another way.
#[derive(Debug, Parser)]
#[command(
    name = "cgtproxy-exec",
    version,
    after_help = "Exit status: that of COMMAND, or 125 if cgtproxy-exec itself fails, 126 if COMMAND \
                  can't be run, 127 if it is not found.\n\n\
                  Examples:\n  \
                  cgtproxy-exec proxy curl https://example.org\n  \
                  cgtproxy-exec direct ssh host\n  \
                  cgtproxy-exec drop make test"
)]
pub struct Options {
    /// Run the command even if nobody can say that the target is in force
    #[arg(long)]
    pub no_wait: bool,

    /// direct, drop, the name of a proxy in your configuration, or 'proxy' for the first of them
    pub target: String,

    /// The command and its arguments
    #[arg(
        value_name = "COMMAND",
        required = true,
        num_args = 1..,
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    pub command: Vec<OsString>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<(bool, String, Vec<OsString>), clap::error::ErrorKind> {
        Options::try_parse_from(std::iter::once("cgtproxy-exec").chain(args.iter().copied()))
            .map(|o| (o.no_wait, o.target, o.command))
            .map_err(|e| e.kind())
    }

    #[test]
    fn what_follows_the_target_is_the_commands() {
        for (args, command) in [
            (&["p", "ls"][..], &["ls"][..]),
            (&["p", "ls", "-l", "--all"], &["ls", "-l", "--all"]),
            (&["p", "ls", "--no-wait"], &["ls", "--no-wait"]),
            (&["p", "ls", "--help"], &["ls", "--help"]),
            (&["p", "ls", "--version", "-h"], &["ls", "--version", "-h"]),
            (&["p", "ls", "--", "-l"], &["ls", "--", "-l"]),
            (&["p", "ls", "", "a b"], &["ls", "", "a b"]),
            (&["p", "--", "ls"], &["ls"]),
            (&["--", "p", "ls"], &["ls"]),
        ] {
            let (no_wait, target, parsed) = parse(args).unwrap();
            assert_eq!((no_wait, &*target), (false, "p"), "{args:?}");
            assert_eq!(parsed, command, "{args:?}");
        }
    }

    #[test]
    fn options_stand_before_the_target() {
        let (no_wait, target, command) = parse(&["--no-wait", "p", "ls"]).unwrap();
        assert_eq!((no_wait, &*target), (true, "p"));
        assert_eq!(command, ["ls"]);
        assert!(parse(&["--nonsense", "p", "ls"]).is_err());
    }

    #[test]
    fn target_and_command_are_needed() {
        use clap::error::ErrorKind::MissingRequiredArgument;
        assert_eq!(parse(&[]), Err(MissingRequiredArgument));
        assert_eq!(parse(&["p"]), Err(MissingRequiredArgument));
    }

    #[test]
    fn is_well_formed() {
        use clap::CommandFactory;
        Options::command().debug_assert();
    }
}
