//! The command line of cgtproxy-helper.

use std::path::PathBuf;

use cgtproxy_proto::{HELP_COLUMNS, HELPER_SOCKET, HELPER_SOCKET_VARIABLE};
use clap::Parser;

/// What ends every help.
const EXIT_STATUS: &str = "Exit status: 0 if it was told to stop, or has done what --check or --remove says, 2 if the \
                           command line is wrong, 78 if the configuration is, 1 otherwise.";

/// What comes behind that in a long help, and is a section of the manual page.
const ENVIRONMENT: &str = "Environment:\n\
\x20 CGTPROXY_LOG  how much is said: error, warn, info, debug or trace\n\
\x20 NO_COLOR  if it is not empty, nothing is printed in colours\n\
\x20 TERM  the terminal; if it is 'dumb' or not set, nothing is printed in colours either\n\
\x20 CGTPROXY_SOCKET  where the helper listens, unless there is --socket";

/// Owns cgtproxy's nftables table on behalf of users' agents
///
/// One runs on a machine, as cgtproxy-helper.service, and is started by the first call to its socket.
/// Each user's cgtproxy-agent tells it by Varlink what is to happen to packets of that user's control
/// groups; it keeps the nftables table 'inet cgtproxy', the routing rules and the packet marks
/// accordingly, and puts back what other programs take away. Who a caller is it learns from the
/// kernel alone. It needs CAP_NET_ADMIN and nothing else.
///
/// Messages go to standard error. CGTPROXY_LOG says how many: error, warn, info, debug or trace.
#[derive(Debug, Parser)]
#[command(
    name = "cgtproxy-helper",
    version,
    max_term_width = HELP_COLUMNS,
    after_help = EXIT_STATUS,
    after_long_help = format!("{EXIT_STATUS}\n\n{ENVIRONMENT}")
)]
pub struct Arguments {
    /// Listen on this socket, unless systemd hands one over
    #[arg(long, value_name = "PATH", env = HELPER_SOCKET_VARIABLE, default_value = HELPER_SOCKET)]
    pub socket: PathBuf,

    /// Read the configuration from this file instead of /etc/cgtproxy/helper.yaml
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Where cgroup v2 is mounted, if not at /sys/fs/cgroup or /sys/fs/cgroup/unified
    #[arg(long, value_name = "DIR")]
    pub cgroup_root: Option<PathBuf>,

    /// Say the first thing that is wrong with the configuration, and exit: with 0 if nothing is, else with 78
    ///
    /// Touches nothing, and needs no privilege. The helper that runs goes on with the configuration that it has.
    #[arg(long, conflicts_with = "remove")]
    pub check: bool,

    /// Remove the table, the rules and the routes that a helper left, and exit
    #[arg(long)]
    pub remove: bool,
}
