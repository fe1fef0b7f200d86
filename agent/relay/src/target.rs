//! Where a connection is going.

use std::fmt;
use std::net::SocketAddr;
use std::rc::Rc;

/// The destination of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Target {
    /// An address.
    Address(SocketAddr),
    /// A name, for the proxy to look up, and a port.
    Name(Rc<str>, u16),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            // What is in it was asked for over DNS, by any program.
            Self::Name(name, port) => write!(f, "{}:{port}", name.escape_default()),
        }
    }
}
