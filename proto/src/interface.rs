//! Names of network interfaces.

use std::fmt;
use std::str::FromStr;

/// The longest name of an interface, in bytes (`IFNAMSIZ`, linux/if.h, less its NUL).
const NAME_BYTES: usize = 15;

/// The name of a network interface other than lo, as the kernel could have one (`dev_valid_name`,
/// net/core/dev.c).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InterfaceName(String);

/// Why a text can't be the name of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidInterfaceName {
    /// Empty, or longer than a name may be.
    #[error("an interface's name has 1 to {NAME_BYTES} bytes")]
    Length,
    /// The name `.` or `..`, or one with a character that names can't have.
    #[error("an interface's name has no '/', no ':' and no space, and is not '.' or '..'")]
    Character,
    /// The loopback interface: what comes in there is the machine's own.
    #[error("nothing is forwarded from lo")]
    Loopback,
}

impl InterfaceName {
    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for InterfaceName {
    type Err = InvalidInterfaceName;

    fn from_str(text: &str) -> Result<Self, InvalidInterfaceName> {
        if text.is_empty() || text.len() > NAME_BYTES {
            return Err(InvalidInterfaceName::Length);
        }
        let refused = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
        if text == "." || text == ".." || text.contains(refused) {
            return Err(InvalidInterfaceName::Character);
        }
        if text == "lo" {
            return Err(InvalidInterfaceName::Loopback);
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_what_the_kernel_takes() {
        for name in [
            "br0",
            "enp3s0.100",
            "wlan0",
            "veth-abc_1",
            "x",
            "fifteen-bytes-x",
        ] {
            assert_eq!(name.parse::<InterfaceName>().unwrap().as_str(), name);
        }
        for (name, why) in [
            ("", InvalidInterfaceName::Length),
            ("sixteen-bytes-xx", InvalidInterfaceName::Length),
            (".", InvalidInterfaceName::Character),
            ("..", InvalidInterfaceName::Character),
            ("a/b", InvalidInterfaceName::Character),
            ("eth0:1", InvalidInterfaceName::Character),
            ("a b", InvalidInterfaceName::Character),
            ("a\0", InvalidInterfaceName::Character),
            ("lo", InvalidInterfaceName::Loopback),
        ] {
            assert_eq!(name.parse::<InterfaceName>(), Err(why), "{name:?}");
        }
    }
}
