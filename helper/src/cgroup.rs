//! Control groups: from a path in a message to the id by which nftables knows them.
//!
//! A path becomes an [`OwnedControlGroup`] only here, below the subtree of a [`Peer`].

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use cgtproxy_proto::path::{CGROUP2_MOUNTS, CGROUP2_SUPER_MAGIC, ControlGroupPath, manager_path};
use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat, Statx, StatxFlags, fstat, fstatfs, open,
    openat2, statx,
};
use rustix::io::Errno;

use crate::peer::{Peer, Uid};
use crate::spare::{Room, Spare};

mod id;

pub use id::{ControlGroupId, OwnedControlGroup, Slices, Top};

/// The deepest level at which a control group can have a verdict of its own. nftables could match 255 (nft_socket_init,
/// net/netfilter/nft_socket.c), but the rules look at every level at which any user has a verdict, and nobody has a
/// use for that many: an application is at level 5, and a container in a container at level 12.
pub(crate) const DEEPEST_LEVEL: u32 = 20;

/// openat2(2) gives up with EAGAIN when something is renamed or mounted meanwhile.
const OPEN_ATTEMPTS: usize = 16;

/// Why a control group can't be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// It is not there (any more).
    #[error("there is no such control group")]
    Missing,
    /// It belongs to root, or it is a user's subtree and belongs to another user.
    #[error("the control group belongs to another user")]
    NotOwned,
    /// The path leads to something else, or out of the subtree.
    #[error("the path does not lead to a control group")]
    NotControlGroup,
    /// The kernel does not let it be opened.
    #[error("the control group can't be opened")]
    Unreadable,
    /// No rule looks that deep.
    #[error("the control group is more than {DEEPEST_LEVEL} levels deep")]
    TooDeep,
    /// The kernel lacks memory or file descriptors, or others rename too much meanwhile. That says
    /// nothing about the control group.
    #[error("the kernel can't open control groups at the moment")]
    Later,
}

/// Why there is no control group root.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// It can't be opened.
    #[error("can't open the control group root '{path}'")]
    Open {
        /// Where it should be.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It is something else.
    #[error("'{path}' is not the root of a cgroup v2 hierarchy")]
    NotControlGroup {
        /// What was tried.
        path: PathBuf,
    },
    /// cgroup v2 is at none of the usual places.
    #[error(
        "there is no cgroup v2 hierarchy at /sys/fs/cgroup or /sys/fs/cgroup/unified; --cgroup-root names another place"
    )]
    NotFound,
}

impl RootError {
    /// Whether there is nothing of the kind at that place.
    fn is_absence(&self) -> bool {
        match self {
            Self::Open { source, .. } => source.kind() == io::ErrorKind::NotFound,
            Self::NotControlGroup { .. } | Self::NotFound => true,
        }
    }
}

/// The root of the cgroup v2 hierarchy.
#[derive(Debug, Clone)]
pub struct Root {
    directory: Rc<OwnedFd>,
    spare: Spare,
    /// The mount that it is on, by the number that statx(2) gives it; none before Linux 5.8.
    mount: Option<u64>,
}

impl Root {
    /// Opens `path`, or else the place where cgroup v2 is mounted.
    ///
    /// # Errors
    /// If there is no cgroup v2 hierarchy.
    pub fn open(path: Option<&Path>) -> Result<Self, RootError> {
        if let Some(path) = path {
            return Self::open_at(path);
        }
        Self::open_one_of(&CGROUP2_MOUNTS.map(Path::new))
    }

    fn open_one_of(paths: &[&Path]) -> Result<Self, RootError> {
        let mut why = RootError::NotFound;
        for path in paths {
            match Self::open_at(path) {
                Ok(root) => return Ok(root),
                // There may be one, then.
                Err(error) if !error.is_absence() && matches!(why, RootError::NotFound) => {
                    why = error;
                }
                Err(_) => {}
            }
        }
        Err(why)
    }

    fn open_at(path: &Path) -> Result<Self, RootError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let failed = |error: Errno| RootError::Open {
            path: path.to_owned(),
            source: error.into(),
        };
        let root = open(path, flags, Mode::empty()).map_err(failed)?;
        if file_system(&root).map_err(failed)? != CGROUP2_SUPER_MAGIC {
            return Err(RootError::NotControlGroup {
                path: path.to_owned(),
            });
        }
        Self::at(root).map_err(failed)
    }

    fn at(directory: OwnedFd) -> Result<Self, Errno> {
        let found = statx(&directory, c"", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?;
        Ok(Self {
            spare: Spare::of(&directory),
            directory: Rc::new(directory),
            mount: mount(&found),
        })
    }

    /// Directories of whatever file system this is stand for control groups.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn for_test(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self::at(open(path, flags, Mode::empty())?)?)
    }

    /// The descriptors that are kept back for calls. Opening control groups takes them by itself.
    #[must_use]
    pub fn spare(&self) -> Spare {
        self.spare.clone()
    }

    /// Opens the peer's user@UID.service, or for root the control group root itself.
    ///
    /// # Errors
    /// If there is none, as for a user without a user manager.
    pub fn subtree(&self, peer: &Peer) -> Result<Subtree, Unavailable> {
        self.subtree_again(peer, None)
    }

    /// Opens the peer's subtree, whose control group was `before` at the last call: if it still is, the slices that it is
    /// in are known.
    ///
    /// # Errors
    /// As [`Self::subtree`].
    pub fn subtree_again(&self, peer: &Peer, before: Option<Top>) -> Result<Subtree, Unavailable> {
        let mut room = None;
        let (path, directory, found) = self.open_subtree(peer.uid(), &mut room)?;
        let level = level(0, &path)?;
        if peer.uid() != Uid::ROOT && found.st_uid != peer.uid().value() {
            return Err(Unavailable::NotOwned);
        }
        let cgroup = OwnedControlGroup {
            id: ControlGroupId(found.st_ino),
            level,
        };
        let known = before.filter(|before| before.cgroup == cgroup);
        let slices = known.and_then(|known| known.slices);
        let slices = slices.or_else(|| slices_above(peer.uid(), &directory));
        let top = Top::new(cgroup).within(slices);
        Ok(Subtree {
            directory,
            opened: RefCell::new(Opened { parent: None, room }),
            mount: self.mount,
            top,
            uid: peer.uid(),
            spare: self.spare(),
        })
    }

    /// Whether this is a user's user@UID.service. True if the kernel can't tell at the moment.
    #[must_use]
    pub fn has_subtree(&self, uid: Uid, id: ControlGroupId) -> bool {
        match self.open_subtree(uid, &mut None) {
            Ok((_, _, found)) => found.st_ino == id.0,
            Err(why) => matches!(why, Unavailable::Later | Unavailable::Unreadable),
        }
    }

    /// The slices that a user's user@UID.service is in, if this is it.
    #[must_use]
    pub fn slices(&self, uid: Uid, id: ControlGroupId) -> Option<Slices> {
        let (_, directory, found) = self.open_subtree(uid, &mut None).ok()?;
        slices_above(uid, &directory).filter(|_| found.st_ino == id.0)
    }

    fn open_subtree(
        &self,
        uid: Uid,
        room: &mut Option<Room>,
    ) -> Result<(ControlGroupPath, OwnedFd, Stat), Unavailable> {
        let path = ControlGroupPath::from_bytes(subtree_path(uid).as_bytes())
            .map_err(|_| Unavailable::NotControlGroup)?;
        let directory = open_beneath(&self.directory, &path, &self.spare, room)?;
        let found = fstat(&directory).map_err(unavailable)?;
        Ok((path, directory, found))
    }
}

/// Where systemd puts a user's manager, from the control group root. Root's subtree is the whole machine.
#[must_use]
pub fn subtree_path(uid: Uid) -> String {
    if uid == Uid::ROOT {
        return String::new();
    }
    manager_path(uid.value())
}

/// A user's user@UID.service, or for root the control group root, as it is now. Opened anew for every call: when
/// the user's manager is started again, it is another control group of the same name.
///
/// Nothing that is reached from here is on another file system. [`Root`] is on cgroup v2, every directory is opened
/// from there without crossing a mount (`RESOLVE_NO_XDEV`), and a mount shows one file system for as long as it
/// exists. So no single control group has to be asked what it is on (fstatfs(2)).
#[derive(Debug)]
pub struct Subtree {
    directory: OwnedFd,
    opened: RefCell<Opened>,
    mount: Option<u64>,
    top: Top,
    uid: Uid,
    spare: Spare,
}

/// What a subtree has open.
#[derive(Debug)]
struct Opened {
    /// The directory that the last control group was in: those that follow are often in the same one.
    parent: Option<(ControlGroupPath, OwnedFd)>,
    /// Had to be made for it or for the subtree's own, and is taken back after both are closed.
    room: Option<Room>,
}

impl Subtree {
    /// Where it begins.
    #[must_use]
    pub fn top(&self) -> Top {
        self.top
    }

    /// The control group at a path below.
    ///
    /// # Errors
    /// If it is not there, or root's.
    pub fn open(&self, path: &ControlGroupPath) -> Result<OwnedControlGroup, Unavailable> {
        let level = level(self.top.level(), path)?;
        let Some((parent, name)) = path.split_last() else {
            return Ok(self.top.cgroup);
        };
        let mut opened = self.opened.borrow_mut();
        let Opened { parent: last, room } = &mut *opened;
        let directory = if parent.is_empty() {
            &self.directory
        } else {
            let parent = match last.take() {
                Some(last) if last.0.as_bytes() == parent => last,
                other => {
                    // Not one descriptor more than are kept back.
                    drop(other);
                    let parent = path.parent().ok_or(Unavailable::NotControlGroup)?;
                    let directory = open_beneath(&self.directory, &parent, &self.spare, room)?;
                    (parent, directory)
                }
            };
            &last.insert(parent).1
        };
        // A name is one component and none of '.' and '..', a link is not followed, and a mount that lies over the
        // directory has another number than the one on which it all began. So this is what openat2(2) would lead to.
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let fields = StatxFlags::TYPE | StatxFlags::UID | StatxFlags::INO | StatxFlags::MNT_ID;
        let found = statx(directory, name, flags, fields).map_err(unavailable)?;
        let is_directory = FileType::from_raw_mode(found.stx_mode.into()) == FileType::Directory;
        match (mount(&found), self.mount) {
            _ if !is_directory => Err(Unavailable::NotControlGroup),
            (Some(there), Some(here)) if there != here => Err(Unavailable::NotControlGroup),
            (Some(_), Some(_)) => below(self.uid, found.stx_uid, found.stx_ino, level),
            // The kernel does not tell mounts apart.
            _ => {
                *last = None;
                let opened = open_beneath(&self.directory, path, &self.spare, room)?;
                let found = fstat(&opened).map_err(unavailable)?;
                below(self.uid, found.st_uid, found.st_ino, level)
            }
        }
    }
}

fn level(base: u32, path: &ControlGroupPath) -> Result<u32, Unavailable> {
    let level = u32::try_from(path.depth()).map_or(u32::MAX, |depth| base.saturating_add(depth));
    match level > DEEPEST_LEVEL {
        true => Err(Unavailable::TooDeep),
        false => Ok(level),
    }
}

/// One below a user's subtree. A container's control groups belong to subordinate uids of the user's, which only a database
/// tells from others. But whoever is there has it from the user, or from root, and without a verdict of its own it has that
/// of what it is in, which the user chooses. Root's is left at that.
fn below(uid: Uid, owner: u32, id: u64, level: u32) -> Result<OwnedControlGroup, Unavailable> {
    if uid != Uid::ROOT && owner == Uid::ROOT.value() {
        return Err(Unavailable::NotOwned);
    }
    let id = ControlGroupId(id);
    Ok(OwnedControlGroup { id, level })
}

/// What a user's user@UID.service is in, which is where its path has led.
fn slices_above(uid: Uid, service: &OwnedFd) -> Option<Slices> {
    let above = |path| {
        let found = statx(service, path, AtFlags::NO_AUTOMOUNT, StatxFlags::INO).ok()?;
        Some(ControlGroupId(found.stx_ino))
    };
    let slices = || {
        Some(Slices {
            own: above(c"..")?,
            users: above(c"../..")?,
        })
    };
    (uid != Uid::ROOT).then(slices).flatten()
}

fn unavailable(error: Errno) -> Unavailable {
    match error {
        Errno::NOENT | Errno::NODEV => Unavailable::Missing,
        Errno::NOTDIR | Errno::LOOP | Errno::XDEV | Errno::NAMETOOLONG | Errno::INVAL => {
            Unavailable::NotControlGroup
        }
        Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::AGAIN | Errno::INTR => {
            Unavailable::Later
        }
        error => {
            tracing::debug!("can't open a control group: {error}");
            Unavailable::Unreadable
        }
    }
}

/// Opens a directory below another one, on the same mount. Takes what is kept back when there are no descriptors
/// left.
fn open_beneath(
    directory: &OwnedFd,
    path: &ControlGroupPath,
    spare: &Spare,
    room: &mut Option<Room>,
) -> Result<OwnedFd, Unavailable> {
    let name = if path.as_bytes().is_empty() {
        Path::new(".")
    } else {
        path.as_path()
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    let mut result = Err(Errno::AGAIN);
    for _ in 0..OPEN_ATTEMPTS {
        result = openat2(directory, name, flags, Mode::empty(), resolve);
        match result {
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(Errno::MFILE) if room.is_none() => *room = Some(spare.make_room()),
            _ => break,
        }
    }
    result.map_err(unavailable)
}

/// The mount that a file was found on, if the kernel says that.
fn mount(found: &Statx) -> Option<u64> {
    let told = found.stx_mask & StatxFlags::MNT_ID.bits() != 0;
    told.then_some(found.stx_mnt_id)
}

fn file_system(directory: impl AsFd) -> Result<u32, Errno> {
    Ok(fstatfs(directory)?.f_type as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::model::Bed;

    #[test]
    #[cfg_attr(miri, ignore = "makes a link")]
    fn what_can_not_be_opened_is_not_said_to_be_absent() {
        let name = format!("cgtproxy-loop-{}", std::process::id());
        let link = std::env::temp_dir().join(name);
        std::os::unix::fs::symlink(&link, &link).unwrap();
        let (absent, other) = (Path::new("/no/such/directory"), Path::new("/"));
        let error = Root::open_one_of(&[absent, &link, other]).unwrap_err();
        assert!(
            matches!(&error, RootError::Open { path, .. } if *path == link),
            "{error:?}"
        );
        std::fs::remove_file(&link).unwrap();
        let error = Root::open_one_of(&[absent, other]).unwrap_err();
        assert!(matches!(error, RootError::NotFound), "{error:?}");
    }

    #[test]
    #[cfg_attr(miri, ignore = "makes directories")]
    fn a_subtree_that_is_another_users_is_nobodys() {
        let bed = Bed::new().unwrap();
        // Whoever runs this test has it, and not that user.
        let user = Uid::for_test(bed.uid.value() + 1);
        std::fs::create_dir_all(bed.directory.join(subtree_path(user))).unwrap();
        let found = bed.root.subtree(&Peer::for_test(user));
        assert_eq!(found.unwrap_err(), Unavailable::NotOwned);
    }

    #[test]
    #[cfg_attr(miri, ignore = "makes directories")]
    fn what_a_control_group_is_in_is_not_asked_again() {
        let bed = Bed::new().unwrap();
        let peer = Peer::for_test(bed.uid);
        let top = bed.subtree.top();
        assert!(top.slices().is_some());
        let again = |before| bed.root.subtree_again(&peer, Some(before)).unwrap().top();
        // Who asked would be told of others.
        let (users, own) = (ControlGroupId(1), ControlGroupId(2));
        let known = top.within(Some(Slices { users, own }));
        assert_eq!(again(known), known);
        // What is not known is asked, and of another control group of this name nothing is known.
        assert_eq!(again(top.within(None)), top);
        let other = Top::for_test(u64::MAX, top.level()).within(known.slices());
        assert_eq!(again(other), top);
    }
}
