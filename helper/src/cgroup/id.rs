//! Control groups by the id and the level by which nftables knows them.

/// A control group's id: the inode number of its directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ControlGroupId(pub(super) u64);

impl ControlGroupId {
    /// The id as an nftables key.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 8] {
        self.0.to_ne_bytes()
    }

    /// The id of an nftables key.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 8]) -> Self {
        Self(u64::from_ne_bytes(bytes))
    }
}

/// A control group that was a user's, or below the user's, when it was opened on that user's behalf. Everything is
/// root's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OwnedControlGroup {
    pub(super) id: ControlGroupId,
    pub(super) level: u32,
}

impl OwnedControlGroup {
    /// Its id.
    #[must_use]
    pub fn id(&self) -> ControlGroupId {
        self.id
    }

    /// Its depth below the control group root.
    #[must_use]
    pub fn level(&self) -> u32 {
        self.level
    }

    /// One that an earlier helper opened: the kernel's own table has it.
    pub(crate) fn found(id: ControlGroupId, level: u32) -> Self {
        Self { id, level }
    }

    /// Any control group, for a test of what comes after opening one.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn for_test(id: u64, level: u32) -> Self {
        Self {
            id: ControlGroupId(id),
            level,
        }
    }
}

/// The slices that a user's user@UID.service is in, beside those of whatever else the user has started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slices {
    /// `user.slice`, at level 1.
    pub users: ControlGroupId,
    /// `user-UID.slice`, at level 2.
    pub own: ControlGroupId,
}

/// Where a subtree begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Top {
    pub(super) cgroup: OwnedControlGroup,
    pub(super) slices: Option<Slices>,
}

impl Top {
    /// A control group of which it is not known what it is in.
    #[must_use]
    pub fn new(cgroup: OwnedControlGroup) -> Self {
        Self {
            cgroup,
            slices: None,
        }
    }

    /// The control group: the user's user@UID.service, or for the system's policy the root.
    #[must_use]
    pub fn cgroup(&self) -> OwnedControlGroup {
        self.cgroup
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> ControlGroupId {
        self.cgroup.id
    }

    /// Its depth below the control group root.
    #[must_use]
    pub fn level(&self) -> u32 {
        self.cgroup.level
    }

    /// What it is in. None for the root, or if it is not known. A control group never comes to be in another one.
    #[must_use]
    pub fn slices(&self) -> Option<Slices> {
        self.slices
    }

    /// This control group, with the slices that it was found to be in.
    #[must_use]
    pub fn within(self, slices: Option<Slices>) -> Self {
        Self { slices, ..self }
    }

    /// Any, for a test of what comes after opening it.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn for_test(id: u64, level: u32) -> Self {
        Self::new(OwnedControlGroup::for_test(id, level))
    }
}
