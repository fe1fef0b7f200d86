//! What became of a question that an application asked the network.

use std::net::{IpAddr, SocketAddr};

use super::network::{MACHINE_V4, MACHINE_V6};
use crate::wait::wait_for;

/// What became of a question. Nothing in it is guessed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The internet answered.
    Direct {
        /// The address the internet saw it come from.
        seen_as: IpAddr,
    },
    /// The internet answered, at another address than the one that was asked.
    Redirected {
        /// Where it was asked.
        to: SocketAddr,
    },
    /// A TPROXY server answered.
    Proxied {
        /// The name of the server.
        by: String,
        /// Where the application wanted to go, as the server saw it.
        original_destination: SocketAddr,
    },
    /// An ordinary service on the machine answered.
    Local {
        /// The name of the service.
        by: String,
        /// The address it was asked at.
        at: SocketAddr,
    },
    /// The kernel refused to send (EPERM), and nothing reached the internet or any server. That is
    /// what UDP, ICMP and raw sockets see of a drop in an output chain; TCP and ICMPv6 are silent.
    Forbidden,
    /// There was no answer, and nothing reached the internet or any server.
    Silent,
    /// A packet reached the internet; no answer came back.
    LeftUnanswered,
    /// A server was asked, and its answer did not come back.
    AnswerLost,
    /// There is nobody at that port, said an ICMP message or a TCP reset.
    Refused,
    /// An open connection was closed or reset.
    Closed,
    /// Another error.
    Failed {
        /// Its number.
        errno: i32,
    },
}

impl Outcome {
    /// Whether the machine let nothing out, to nobody.
    pub fn is_dropped(&self) -> bool {
        matches!(self, Self::Forbidden | Self::Silent)
    }

    /// What becomes of a question in the end: it is asked until somebody answers, or says that there is nobody. The
    /// sandbox follows packets as far as a relay, and can't know how long that and its proxy take.
    ///
    /// # Panics
    /// When nothing comes back.
    #[track_caller]
    pub fn in_the_end(mut ask: impl FnMut() -> Self) -> Self {
        let came_back = |outcome: &Self| {
            !matches!(
                outcome,
                Self::Silent | Self::LeftUnanswered | Self::AnswerLost
            )
        };
        wait_for("an answer", || Some(ask()).filter(came_back))
    }
}

/// The outcome of asking that destination directly.
pub fn direct(to: SocketAddr) -> Outcome {
    Outcome::Direct {
        seen_as: if to.is_ipv4() { MACHINE_V4 } else { MACHINE_V6 },
    }
}

/// The outcome of asking that destination through that TPROXY server.
pub fn proxied(by: &str, to: SocketAddr) -> Outcome {
    Outcome::Proxied {
        by: by.to_owned(),
        original_destination: to,
    }
}

/// The outcome of asking any destination through that TPROXY server, for [`Sandbox::expect`](super::Sandbox::expect).
pub fn by(proxy: &str) -> impl Fn(SocketAddr) -> Outcome {
    move |to| proxied(proxy, to)
}

/// The outcome of being answered by a service of the machine, at that address.
pub fn local(by: &str, at: SocketAddr) -> Outcome {
    Outcome::Local {
        by: by.to_owned(),
        at,
    }
}
