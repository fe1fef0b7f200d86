//! The machine's cgroup tree.

use std::ffi::OsStr;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::unistd::{Gid, Uid, setfsgid, setfsuid};

use super::app::App;
use super::launch::Launch;
use super::world::World;
use crate::wait::wait_until;

/// Where the machine's cgroup tree is mounted.
pub const ROOT: &str = "/sys/fs/cgroup";

/// What systemd hands over to whom it delegates a cgroup, besides the directory.
const DELEGATED: [&str; 3] = ["cgroup.procs", "cgroup.threads", "cgroup.subtree_control"];

/// The ids of the cgroups below this directory that are named like applications, `app-…`, in
/// ascending order. What ends while it looks is none.
pub fn applications_below(top: &Path) -> Vec<u64> {
    let mut ids = Vec::new();
    let mut left = vec![top.to_path_buf()];
    while let Some(directory) = left.pop() {
        // It may be gone, or go while it is read.
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            // Of a directory that is there; a cgroup has no links.
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            if !metadata.is_dir() {
                continue;
            }
            if entry.file_name().as_encoded_bytes().starts_with(b"app-") {
                ids.push(metadata.ino());
            }
            left.push(entry.path());
        }
    }
    ids.sort_unstable();
    ids
}

/// A cgroup on the machine. It stays when this value is dropped.
#[derive(Clone)]
pub struct Cgroup {
    world: Arc<World>,
    /// Relative to the root.
    path: PathBuf,
    uid: u32,
}

impl Cgroup {
    /// Makes it and those above it that are missing, all of them owned by that uid.
    pub(crate) fn create(world: &Arc<World>, path: &Path, uid: u32) -> Self {
        let mut directory = PathBuf::from(ROOT);
        for component in path.components() {
            let parent = fs::metadata(&directory).expect("it was there a moment ago");
            directory.push(component);
            // In what is the user's own, the user makes it, so that it never belongs to root.
            let result = if uid != 0 && parent.uid() == uid {
                create_dir_as(uid, &directory)
            } else {
                fs::create_dir(&directory)
            };
            match result {
                Ok(()) if uid != parent.uid() => delegate(&directory, uid),
                Ok(()) => {}
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                Err(e) => panic!("cannot make the cgroup {}: {e}", directory.display()),
            }
        }
        Self {
            world: Arc::clone(world),
            path: path.to_owned(),
            uid,
        }
    }

    /// Its path from the cgroup root, beginning with a slash: what a rule's `match` sees.
    pub fn path(&self) -> PathBuf {
        Path::new("/").join(&self.path)
    }

    /// Its directory.
    pub fn directory(&self) -> PathBuf {
        Path::new(ROOT).join(&self.path)
    }

    /// Its id, which is what nftables knows it by.
    pub fn id(&self) -> u64 {
        fs::metadata(self.directory())
            .expect("the cgroup exists")
            .ino()
    }

    /// The cgroup of that name below it, made if missing, for the same owner.
    pub fn child(&self, name: impl AsRef<OsStr>) -> Self {
        Self::create(&self.world, &self.path.join(name.as_ref()), self.uid)
    }

    /// An application in it, of its owner.
    pub fn app(&self) -> App {
        self.app_as(self.uid)
    }

    /// An application in it, of somebody else; root may send raw packets.
    pub fn app_as(&self, uid: u32) -> App {
        App::start(
            &self.world,
            Launch::root().uid(uid).cgroup(&self.directory()),
        )
    }

    /// An application in it, of its owner, who has these capabilities, named as setpriv names them.
    pub fn app_with(&self, capabilities: &[&'static str]) -> App {
        let launch = Launch::root().uid(self.uid).capabilities(capabilities);
        App::start(&self.world, launch.cgroup(&self.directory()))
    }

    /// Removes it, which must have no children; processes that were just killed may still be
    /// leaving.
    ///
    /// # Panics
    /// When something lives in it.
    #[track_caller]
    pub fn remove(&self) {
        let directory = self.directory();
        wait_until(
            &format!("{} to be empty", directory.display()),
            || match fs::remove_dir(&directory) {
                Ok(()) => true,
                Err(e) if e.kind() == ErrorKind::ResourceBusy => false,
                Err(e) => panic!("cannot remove the cgroup {}: {e}", directory.display()),
            },
        );
    }
}

/// Makes a directory as somebody else would. This concerns the calling thread only.
fn create_dir_as(uid: u32, directory: &Path) -> std::io::Result<()> {
    let (own_gid, own_uid) = (setfsgid(Gid::from_raw(uid)), setfsuid(Uid::from_raw(uid)));
    let result = fs::create_dir(directory);
    setfsuid(own_uid);
    setfsgid(own_gid);
    result
}

/// Hands a cgroup over, as systemd does.
pub(crate) fn delegate(directory: &Path, uid: u32) {
    chown(directory, Some(uid), Some(uid)).expect("root may give away");
    for file in DELEGATED {
        chown(directory.join(file), Some(uid), Some(uid)).expect("root may give away");
    }
}
