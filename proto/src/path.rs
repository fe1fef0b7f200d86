//! Paths of control groups, and how they travel in messages.

use std::borrow::{Borrow, Cow};
use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::rc::Rc;

use crate::limits::{COMPONENT_BYTES, PATH_BYTES};

/// What statfs(2) says of cgroup v2 (linux/magic.h).
pub const CGROUP2_SUPER_MAGIC: u32 = 0x6367_7270;

/// Where systemd mounts cgroup v2: alone, or beside the v1 hierarchies of a hybrid machine.
pub const CGROUP2_MOUNTS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// Where systemd puts a user's service manager, from the control group root.
#[must_use]
pub fn manager_path(uid: u32) -> String {
    format!("user.slice/user-{uid}.slice/user@{uid}.service")
}

/// The path of a control group relative to some root: components without `.`, `..` or NUL, joined by
/// single slashes. The empty path is that root itself.
///
/// A name in cgroupfs is any bytes but `/` and NUL, and JSON has only Unicode: in messages `%` and every
/// byte that is not part of valid UTF-8 is written `%XX`.
///
/// Several tables hold one path: a clone is the same bytes once more.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ControlGroupPath(Rc<[u8]>);

/// Why a path cannot name a control group below a root.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPath {
    /// It begins with a slash.
    #[error("the path is absolute")]
    Absolute,
    /// Two slashes in a row, or one at the end.
    #[error("the path has an empty component")]
    EmptyComponent,
    /// A component is `.` or `..`.
    #[error("the path has a component '.' or '..'")]
    Dots,
    /// A NUL byte.
    #[error("the path has a NUL byte")]
    Nul,
    /// Longer than [`PATH_BYTES`], or a component longer than [`COMPONENT_BYTES`].
    #[error(
        "the path is longer than {PATH_BYTES} bytes or a component longer than {COMPONENT_BYTES}"
    )]
    TooLong,
    /// A `%` without two hexadecimal digits after it.
    #[error("a '%' in the path is not followed by two hexadecimal digits")]
    Escape,
}

/// In a map, a path is found by its bytes too, such as [`ControlGroupPath::split_last`] has them.
impl Borrow<[u8]> for ControlGroupPath {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}

impl ControlGroupPath {
    /// The root itself.
    #[must_use]
    pub fn root() -> Self {
        Self::default()
    }

    /// Takes a path as the file system has it.
    ///
    /// # Errors
    /// If it could name anything but a control group below the root.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, InvalidPath> {
        if bytes.is_empty() {
            return Ok(Self::root());
        }
        if bytes.starts_with(b"/") {
            return Err(InvalidPath::Absolute);
        }
        if bytes.len() > PATH_BYTES {
            return Err(InvalidPath::TooLong);
        }
        bytes.split(|&b| b == b'/').try_for_each(component)?;
        Ok(Self(bytes.into()))
    }

    /// Takes a path as a message has it.
    ///
    /// # Errors
    /// As [`Self::from_bytes`], or if an escape sequence is broken.
    pub fn from_wire(text: &str) -> Result<Self, InvalidPath> {
        // No escaped path is longer than this; do not copy what is refused anyway.
        if text.len() > 3 * PATH_BYTES {
            return Err(InvalidPath::TooLong);
        }
        if !text.contains('%') {
            return Self::from_bytes(text.as_bytes());
        }
        let mut bytes = Vec::with_capacity(text.len());
        let mut rest = text.bytes();
        while let Some(byte) = rest.next() {
            if byte != b'%' {
                bytes.push(byte);
                continue;
            }
            let mut digit = || rest.next().and_then(|d| char::from(d).to_digit(16));
            match (digit(), digit()) {
                (Some(high), Some(low)) => bytes.push((high * 16 + low) as u8),
                _ => return Err(InvalidPath::Escape),
            }
        }
        Self::from_bytes(&bytes)
    }

    /// The path as a message has it.
    #[must_use]
    pub fn to_wire(&self) -> String {
        self.as_wire().into_owned()
    }

    /// The path as a message has it: nearly always just its bytes.
    #[must_use]
    pub fn as_wire(&self) -> Cow<'_, str> {
        match std::str::from_utf8(&self.0) {
            Ok(text) if !text.contains('%') => Cow::Borrowed(text),
            _ => Cow::Owned(self.escaped()),
        }
    }

    fn escaped(&self) -> String {
        let mut text = String::with_capacity(self.0.len());
        for chunk in self.0.utf8_chunks() {
            for c in chunk.valid().chars() {
                if c == '%' {
                    text.push_str("%25");
                } else {
                    text.push(c);
                }
            }
            for byte in chunk.invalid() {
                text.push_str(&format!("%{byte:02X}"));
            }
        }
        text
    }

    /// The path as the file system has it.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The path as the file system has it. Opening the empty path needs `.` instead.
    #[must_use]
    pub fn as_path(&self) -> &Path {
        Path::new(OsStr::from_bytes(&self.0))
    }

    /// How many components it has: its depth below the root.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.components().count()
    }

    /// Its components, from the root down.
    pub fn components(&self) -> impl DoubleEndedIterator<Item = &[u8]> {
        self.0.split(|&b| b == b'/').filter(|c| !c.is_empty())
    }

    /// Its last component; none for the root.
    #[must_use]
    pub fn name(&self) -> Option<&[u8]> {
        self.split_last().map(|(_, name)| name)
    }

    /// The control group that this one is in; none for the root.
    #[must_use]
    pub fn parent(&self) -> Option<Self> {
        let (parent, _) = self.split_last()?;
        Some(Self(parent.into()))
    }

    /// The path of the control group that this one is in, and its name there; none for the root.
    #[must_use]
    pub fn split_last(&self) -> Option<(&[u8], &[u8])> {
        let mut parts = self.0.rsplitn(2, |&b| b == b'/');
        let name = parts.next().filter(|name| !name.is_empty())?;
        Some((parts.next().unwrap_or_default(), name))
    }

    /// The control group `name` in this one.
    ///
    /// # Errors
    /// If `name` is not one component, or the whole becomes too long.
    pub fn join(&self, name: &[u8]) -> Result<Self, InvalidPath> {
        if name.is_empty() || name.contains(&b'/') {
            return Err(InvalidPath::EmptyComponent);
        }
        let mut bytes = Vec::with_capacity(self.0.len() + 1 + name.len());
        bytes.extend_from_slice(&self.0);
        if !bytes.is_empty() {
            bytes.push(b'/');
        }
        bytes.extend_from_slice(name);
        if bytes.len() > PATH_BYTES {
            return Err(InvalidPath::TooLong);
        }
        component(name)?;
        Ok(Self(bytes.into()))
    }

    /// Whether this is `other` or below it.
    #[must_use]
    pub fn is_within(&self, other: &Self) -> bool {
        other.0.is_empty()
            || self
                .0
                .strip_prefix(&*other.0)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
    }
}

/// What a component must be, but for slashes.
fn component(name: &[u8]) -> Result<(), InvalidPath> {
    match name {
        b"" => Err(InvalidPath::EmptyComponent),
        b"." | b".." => Err(InvalidPath::Dots),
        _ if name.contains(&0) => Err(InvalidPath::Nul),
        _ if name.len() > COMPONENT_BYTES => Err(InvalidPath::TooLong),
        _ => Ok(()),
    }
}

impl fmt::Debug for ControlGroupPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.to_wire())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn refuses_every_way_out() {
        for (text, why) in [
            ("/a", InvalidPath::Absolute),
            ("%2Fa", InvalidPath::Absolute),
            ("..", InvalidPath::Dots),
            ("a/../b", InvalidPath::Dots),
            ("a/%2E%2E/b", InvalidPath::Dots),
            ("a/./b", InvalidPath::Dots),
            ("a//b", InvalidPath::EmptyComponent),
            ("a/", InvalidPath::EmptyComponent),
            ("a\0b", InvalidPath::Nul),
            ("a%00b", InvalidPath::Nul),
            ("%", InvalidPath::Escape),
            ("%4", InvalidPath::Escape),
            ("%zz", InvalidPath::Escape),
            ("%é1", InvalidPath::Escape),
        ] {
            assert_eq!(ControlGroupPath::from_wire(text), Err(why), "{text:?}");
        }
    }

    #[test]
    fn has_limits_at_n_and_one_more() {
        let component = "x".repeat(COMPONENT_BYTES);
        assert!(ControlGroupPath::from_wire(&component).is_ok());
        assert_eq!(
            ControlGroupPath::from_wire(&format!("{component}x")),
            Err(InvalidPath::TooLong)
        );
        let mut path = vec![component; 15].join("/");
        path.push('/');
        path.push_str(&"y".repeat(PATH_BYTES - path.len()));
        assert_eq!(path.len(), PATH_BYTES);
        assert!(ControlGroupPath::from_wire(&path).is_ok());
        path.push('y');
        assert_eq!(
            ControlGroupPath::from_wire(&path),
            Err(InvalidPath::TooLong)
        );
        assert_eq!(
            ControlGroupPath::from_wire(&"x".repeat(1 << 20)),
            Err(InvalidPath::TooLong)
        );
    }

    #[test]
    fn knows_its_place() {
        let path = ControlGroupPath::from_wire("app.slice/app-a.scope").unwrap();
        assert_eq!(path.depth(), 2);
        assert_eq!(path.parent().unwrap().to_wire(), "app.slice");
        assert_eq!(
            path.parent().unwrap().parent().unwrap(),
            ControlGroupPath::root()
        );
        assert_eq!(ControlGroupPath::root().parent(), None);
        assert_eq!(ControlGroupPath::root().depth(), 0);
        let slice = ControlGroupPath::from_wire("app.slice").unwrap();
        assert!(path.is_within(&slice));
        assert!(!slice.is_within(&path));
        assert!(
            !ControlGroupPath::from_wire("app.slice2/x")
                .unwrap()
                .is_within(&slice)
        );
        assert_eq!(slice.join(b"app-a.scope").unwrap(), path);
        assert!(slice.join(b"..").is_err());
        assert!(slice.join(b"a/b").is_err());
    }

    proptest! {
        #[test]
        fn every_file_name_survives_the_wire(
            names in proptest::collection::vec(proptest::collection::vec(1u8.., 1..20), 0..5)
        ) {
            let bytes = names.join(&b'/');
            if let Ok(path) = ControlGroupPath::from_bytes(&bytes) {
                let text = path.to_wire();
                prop_assert_eq!(ControlGroupPath::from_wire(&text).unwrap(), path);
            }
        }

        #[test]
        #[cfg_attr(miri, ignore = "texts that are made of a pattern take minutes")]
        fn no_text_gets_out_of_the_root(text in "\\PC{0,64}") {
            assert_stays_below_the_root(&text);
        }

        #[test]
        fn no_dots_and_slashes_get_out_of_the_root(
            parts in proptest::collection::vec(
                proptest::sample::select(vec!["..", "%2e", "/", "a", "%2F", "%00", "é"]),
                // Miri takes its time.
                0..if cfg!(miri) { 6 } else { 12 },
            )
        ) {
            assert_stays_below_the_root(&parts.concat());
        }
    }

    fn assert_stays_below_the_root(text: &str) {
        if let Ok(path) = ControlGroupPath::from_wire(text) {
            assert!(!path.as_bytes().starts_with(b"/"));
            assert!(
                path.components()
                    .all(|c| c != b".." && c != b"." && !c.contains(&0))
            );
        }
    }
}
