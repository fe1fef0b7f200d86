//! The Varlink interfaces of cgtproxy, and what the two sides of them share: how control groups and
//! proxies are named, how messages are framed, how a method is called and served, how a configuration file is read, what
//! the service manager and the journal are told.
//!
//! `org.cgtproxy.Helper` is what the privileged helper offers to agents, `org.cgtproxy.Agent` what an agent offers to its
//! own user's programs, `org.cgtproxy.Relay` what a relay offers to the agent. The `.varlink` files beside this one are
//! the contract.

pub mod back_off;
pub mod client;
pub mod file;
pub mod interface;
pub mod limits;
pub mod log;
pub mod message;
pub mod name;
pub mod nearest;
pub mod network;
pub mod notify;
pub mod path;
pub mod scheduling;
pub mod service;
pub mod socket;
pub mod stream;
mod strict;
pub mod text;
pub mod usage;
#[cfg(feature = "yaml")]
pub mod yaml;

/// A module with an interface: what is generated from its description, the description, and the name.
macro_rules! interface {
    ($module:ident, $name:literal) => {
        #[doc = concat!("`", $name, "`, as generated from its description.")]
        #[allow(
            missing_docs,
            unused,
            nonstandard_style,
            unreachable_pub,
            rust_2018_idioms
        )]
        #[allow(clippy::all, clippy::unwrap_used)]
        pub mod $module {
            include!(concat!(env!("OUT_DIR"), "/", $name, ".rs"));

            /// The interface's description, as `org.varlink.service.GetInterfaceDescription` returns it.
            pub const DESCRIPTION: &str = include_str!(concat!($name, ".varlink"));
            /// The interface's name.
            pub const INTERFACE: &str = $name;
        }
    };
}

interface!(helper, "org.cgtproxy.Helper");
interface!(agent, "org.cgtproxy.Agent");
interface!(relay, "org.cgtproxy.Relay");

/// Where the helper listens unless it is told otherwise.
pub const HELPER_SOCKET: &str = "/run/cgtproxy/helper.sock";

/// The environment variable that names another socket of the helper: for the helper itself, the agent and the relay.
pub const HELPER_SOCKET_VARIABLE: &str = "CGTPROXY_SOCKET";

/// How wide what `--help` prints may be, in a terminal that is wider than that and where there is none.
pub const HELP_COLUMNS: usize = 100;

/// The uids of system users, from the first to the last of each range: systemd's uids-gids document.
pub const SYSTEM_UIDS: [(u32, u32); 2] = [(1, 999), (61184, 65519)];

/// Who some services run as that have no user of their own, and who the kernel says that it is where a user namespace has
/// no number for somebody.
pub const NOBODY: u32 = 65534;

/// Whether what a user has running is for everybody as far as its uid tells: root's, a system user's or nobody's.
pub fn is_common(uid: u32) -> bool {
    uid == 0 || uid == NOBODY || is_of_system(uid)
}

/// Whether a uid is that of a system user.
pub fn is_of_system(uid: u32) -> bool {
    let mut system = SYSTEM_UIDS.iter();
    system.any(|&(first, last)| (first..=last).contains(&uid))
}
