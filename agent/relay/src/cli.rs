//! What can be typed.

use std::path::PathBuf;

use cgtproxy_proto::{HELP_COLUMNS, HELPER_SOCKET, HELPER_SOCKET_VARIABLE};
use clap::Parser;

/// What ends every help.
const EXIT_STATUS: &str = "Exit status: 0 if it was told to stop or nobody needs it, 2 if the command line is \
                           wrong, 1 otherwise.";

/// What comes behind that in a long help, and is a section of the manual page.
const ENVIRONMENT: &str = "Environment:\n\
\x20 CGTPROXY_LOG  how much is said: error, warn, info, debug or trace\n\
\x20 NO_COLOR  if it is not empty, nothing is printed in colours\n\
\x20 TERM  the terminal; if it is 'dumb' or not set, nothing is printed in colours either\n\
\x20 CGTPROXY_SOCKET  where the helper listens, unless there is --helper\n\
\x20 SSL_CERT_FILE, SSL_CERT_DIR  the certificates to trust in place of the system's\n\
\x20 STATE_DIRECTORY, XDG_STATE_HOME  where the names of fake addresses are kept; without them ~/.local/state";

/// Carries redirected connections on to SOCKS5 and HTTP proxies
///
/// Runs as a user's cgtproxy-relay.service, for 'proxies' in ~/.config/cgtproxy/config.yaml.
/// cgtproxy-agent starts it and tells it which proxies there are: it has no configuration file. Needs no privilege,
/// and ends by itself when no agent has needed it for 30 seconds.
///
/// Messages go to standard error. CGTPROXY_LOG says how many: error, warn, info, debug or trace.
/// SSL_CERT_FILE and SSL_CERT_DIR name the certificates to trust in place of the system's, for 'https'
/// proxies. Which addresses stand for which names is kept in 'names' in $STATE_DIRECTORY, or in
/// ~/.local/state/cgtproxy.
#[derive(Debug, Parser)]
#[command(
    name = "cgtproxy-relay",
    version,
    max_term_width = HELP_COLUMNS,
    after_help = EXIT_STATUS,
    after_long_help = format!("{EXIT_STATUS}\n\n{ENVIRONMENT}")
)]
pub struct Arguments {
    /// Listen for the agent on this socket, unless systemd hands one over
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,

    /// Where the helper listens, who knows where UDP was going
    #[arg(long, value_name = "PATH", env = HELPER_SOCKET_VARIABLE, default_value = HELPER_SOCKET)]
    pub(crate) helper: PathBuf,

    /// How many TCP connections there may be at once, and how many UDP flows
    #[arg(long, value_name = "NUMBER", default_value_t = 8192, value_parser = connections)]
    pub(crate) connections: u32,
}

/// The most connections that may be asked for.
const MOST: u32 = 1_000_000;

/// A number of connections.
fn connections(text: &str) -> Result<u32, String> {
    let number = text
        .parse()
        .ok()
        .filter(|number| (1..=MOST).contains(number));
    number.ok_or_else(|| format!("it is not a number from 1 to {MOST}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_number_of_connections_is_said_in_one_sentence() {
        let parse = |text| Arguments::try_parse_from(["cgtproxy-relay", "--connections", text]);
        assert_eq!(parse("1").unwrap().connections, 1);
        assert_eq!(parse("1000000").unwrap().connections, MOST);
        for text in ["x", "0", "1000001", "99999999999", "1.5", ""] {
            let said = parse(text).unwrap_err().to_string();
            let sentence = format!(
                "error: invalid value '{text}' for '--connections <NUMBER>': it is not a number from 1 to 1000000\n"
            );
            assert!(said.starts_with(&sentence), "{said}");
        }
    }
}
