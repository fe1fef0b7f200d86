//! Who is on the other end of a connection.

use std::fmt;
use std::io;

use tokio::net::UnixStream;

/// A user's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Uid(u32);

impl Uid {
    /// Root, whose policy is the machine's.
    pub const ROOT: Self = Self(0);

    /// The number.
    #[must_use]
    pub fn value(self) -> u32 {
        self.0
    }

    /// Reads the number back out of the name of an nftables object; none if it is not written as
    /// [`fmt::Display`] writes it.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        let uid = Self(name.parse().ok()?);
        (uid.to_string() == name).then_some(uid)
    }

    /// One that was found in the kernel's own table.
    pub(crate) fn found(uid: u32) -> Self {
        Self(uid)
    }

    /// A number for a test.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn for_test(uid: u32) -> Self {
        Self(uid)
    }
}

impl fmt::Display for Uid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Whose use counts together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Account {
    /// The use of one user, who can have a policy.
    User(Uid),
    /// The use of all users who can't, for want of a service manager. One user may have thousands of uids (subuid(5)), and
    /// none of them has more to ask than what the helper says to everybody.
    Others,
}

/// The process at the other end of a connection. All authority of a call comes from this value,
/// and the only way to make one is to ask the kernel.
#[derive(Debug)]
pub struct Peer {
    uid: Uid,
}

impl Peer {
    /// Who opened this connection, by SO_PEERCRED (unix(7)): the credentials at the time of
    /// connect(2), which can't be changed afterwards. Users who don't exist in this user namespace are all the same one,
    /// the overflow uid (65534, user_namespaces(7)), who has no service manager.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn of(stream: &UnixStream) -> io::Result<Self> {
        let uid = stream.peer_cred()?.uid();
        if uid == u32::MAX {
            return Err(io::Error::other("the peer has no uid"));
        }
        Ok(Self { uid: Uid(uid) })
    }

    /// Any user, for a test of what comes after asking the kernel.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn for_test(uid: Uid) -> Self {
        Self { uid }
    }

    /// The peer's uid.
    #[must_use]
    pub fn uid(&self) -> Uid {
        self.uid
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_only_numbers_that_it_writes() {
        assert_eq!(Uid::from_name("1000"), Some(Uid(1000)));
        for name in ["", "01000", "+1", "-1", "1000-x", "4294967296", " 1"] {
            assert_eq!(Uid::from_name(name), None, "{name:?}");
        }
    }
}
