//! Where the control groups of a user are.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::io;
use std::ops::{Bound, ControlFlow};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::path::{Path, PathBuf};

use cgtproxy_proto::path::{
    CGROUP2_MOUNTS, CGROUP2_SUPER_MAGIC, ControlGroupPath, InvalidPath, manager_path,
};

use crate::text::printable;

/// Where current systems have it.
pub(crate) const USUAL_ROOT: &str = CGROUP2_MOUNTS[0];

/// How many bytes of a path are shown to a person: from its beginning, and from its end.
const SHOWN: (usize, usize) = (200, 100);

/// There is no cgroup v2.
#[derive(Debug, thiserror::Error)]
#[error("there is no cgroup v2 at {} or {}; boot with systemd.unified_cgroup_hierarchy=1", CGROUP2_MOUNTS[0], CGROUP2_MOUNTS[1])]
pub(crate) struct NoRoot(#[source] pub Option<io::Error>);

/// The control group root of this machine.
///
/// # Errors
/// If cgroup v2 is not where systemd mounts it.
pub(crate) fn find_root() -> Result<PathBuf, NoRoot> {
    let mut failure = None;
    for mount in CGROUP2_MOUNTS {
        match rustix::fs::statfs(mount) {
            Ok(found) if found.f_type as u32 == CGROUP2_SUPER_MAGIC => return Ok(mount.into()),
            Ok(_) => {}
            Err(error) => failure = Some(error.into()),
        }
    }
    Err(NoRoot(failure))
}

/// The control group of version 2 in what proc(5) calls `/proc/PID/cgroup`, from the control group root.
pub(crate) fn of_process(file: &[u8]) -> Option<&[u8]> {
    let path = file
        .split(|&byte| byte == b'\n')
        .find_map(|line| line.strip_prefix(b"0::"))?;
    Some(path.strip_suffix(b" (deleted)").unwrap_or(path))
}

/// The inode of the machine's own control group namespace (`PROC_CGROUP_INIT_INO`, linux/proc_ns.h).
const INITIAL_NAMESPACE: u64 = 0xEFFF_FFFB;

/// Whether a process with this control group may be anywhere, because paths begin elsewhere than the agent's: this is
/// within a control group namespace, as in a container, and the process at its root or outside of it.
pub(crate) fn is_out_of_sight(path: &[u8]) -> bool {
    let namespace = std::fs::metadata("/proc/self/ns/cgroup");
    (path == b"/" || path.starts_with(b"/.."))
        && namespace.is_ok_and(|own| own.ino() != INITIAL_NAMESPACE)
}

/// The part of the control group tree that an agent is in charge of.
#[derive(Debug, Clone)]
pub(crate) struct Subtree {
    root: PathBuf,
    path: ControlGroupPath,
    /// Whether cgroup v2 can be seen at `root`.
    mounted: bool,
}

impl Subtree {
    /// The subtree of a user's service manager, on a machine whose control group root is `root`.
    ///
    /// # Errors
    /// None that can happen.
    pub(crate) fn of_user(root: PathBuf, uid: u32) -> Result<Self, InvalidPath> {
        Ok(Self {
            root,
            path: ControlGroupPath::from_bytes(manager_path(uid).as_bytes())?,
            mounted: true,
        })
    }

    /// All control groups of a machine whose control group root is `root`.
    pub(crate) fn of_machine(root: PathBuf) -> Self {
        Self {
            root,
            path: ControlGroupPath::root(),
            mounted: true,
        }
    }

    /// Whether it is all of a machine's, and not one user's own.
    pub(crate) fn is_machines(&self) -> bool {
        self.path.as_bytes().is_empty()
    }

    /// This subtree on a machine where cgroup v2 can't be seen: only systemd can tell what is in it.
    pub(crate) fn unseen(self) -> Self {
        Self {
            mounted: false,
            ..self
        }
    }

    /// Whether cgroup v2 can be seen at all.
    pub(crate) fn is_mounted(&self) -> bool {
        self.mounted
    }

    /// The path of its root, from the control group root.
    pub(crate) fn path(&self) -> &ControlGroupPath {
        &self.path
    }

    /// The path of its root as rules see it: a slash before each component.
    pub(crate) fn prefix(&self) -> Vec<u8> {
        let path = self.path.as_bytes();
        match path.is_empty() {
            true => Vec::new(),
            false => [b"/", path].concat(),
        }
    }

    /// The directory of a control group.
    pub(crate) fn directory(&self, path: &ControlGroupPath) -> PathBuf {
        let mut directory = self.root.join(self.path.as_path());
        directory.push(path.as_path());
        directory
    }

    /// The directories above the subtree's root, from the control group root down, each with the
    /// name that leads on.
    pub(crate) fn ancestors(&self) -> impl Iterator<Item = (PathBuf, &[u8])> {
        let mut directory = self.root.clone();
        self.path.components().map(move |name| {
            let this = directory.clone();
            directory.push(OsStr::from_bytes(name));
            (this, name)
        })
    }

    /// The control group at a path from the control group root; none if it is not in the subtree.
    pub(crate) fn relative(&self, absolute: &[u8]) -> Option<ControlGroupPath> {
        let rest = absolute.strip_prefix(self.prefix().as_slice())?;
        let rest = match rest {
            [] => rest,
            [b'/', rest @ ..] => rest,
            _ => return None,
        };
        ControlGroupPath::from_bytes(rest.strip_suffix(b"/").unwrap_or(rest)).ok()
    }

    /// The path of a control group from the control group root, as messages have it.
    pub(crate) fn to_wire(&self, path: &ControlGroupPath) -> String {
        let (above, below) = (self.path.to_wire(), path.to_wire());
        match (above.is_empty(), below.is_empty()) {
            (_, true) => format!("/{above}"),
            (true, false) => format!("/{below}"),
            (false, false) => format!("/{above}/{below}"),
        }
    }

    /// The path of a control group from the control group root, for a person: of a long one its beginning and its end.
    pub(crate) fn shown(&self, path: &ControlGroupPath) -> String {
        let whole = self.to_wire(path);
        let is_boundary = |at: &usize| whole.is_char_boundary(*at);
        let before = (0..=SHOWN.0).rev().find(is_boundary).unwrap_or(0);
        let last = whole.len().saturating_sub(SHOWN.1);
        let after = (last..whole.len()).find(is_boundary).unwrap_or(whole.len());
        match (whole.get(..before), whole.get(after..)) {
            (Some(start), Some(end)) if before < after => printable(&format!("{start}…{end}")),
            _ => printable(&whole),
        }
    }

    /// The control group at a path from the control group root, as messages have it.
    pub(crate) fn of_wire(&self, text: &str) -> Option<ControlGroupPath> {
        let text = text.strip_prefix('/')?;
        let text = text.strip_suffix('/').unwrap_or(text);
        let absolute = ControlGroupPath::from_wire(text).ok()?;
        self.relative(&[b"/", absolute.as_bytes()].concat())
    }

    /// The control groups that are there now, as far as they can be listed.
    pub(crate) fn control_groups(&self) -> BTreeSet<ControlGroupPath> {
        let mut found = BTreeSet::new();
        // What can't be listed is there all the same.
        let _ = self.walk(|path, _| {
            found.insert(path);
            ControlFlow::Continue(())
        });
        found
    }

    /// Tells of each control group and its id, those above before those below, until `tell` breaks off.
    ///
    /// # Errors
    /// If one of them can't be listed, after all others.
    pub(crate) fn walk(
        &self,
        mut tell: impl FnMut(ControlGroupPath, u64) -> ControlFlow<()>,
    ) -> io::Result<()> {
        let root = ControlGroupPath::root();
        let id = std::fs::metadata(self.directory(&root))?.ino();
        if tell(root.clone(), id).is_break() {
            return Ok(());
        }
        let mut failure = None;
        let mut stack = vec![root];
        while let Some(path) = stack.pop() {
            let entries = match std::fs::read_dir(self.directory(&path)) {
                Ok(entries) => entries.flatten(),
                // It has gone meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => {
                    failure = Some(error);
                    continue;
                }
            };
            for entry in entries.filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir())) {
                if let Ok(path) = path.join(entry.file_name().as_bytes()) {
                    if tell(path.clone(), entry.ino()).is_break() {
                        return Ok(());
                    }
                    stack.push(path);
                }
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// The login sessions beside the user's service manager, by the names of their units, with their directories.
    pub(crate) fn sessions(&self) -> BTreeMap<String, PathBuf> {
        let Some(slice) = self.path.parent() else {
            return BTreeMap::new();
        };
        let directory = self.root.join(slice.as_path());
        let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
        let named = entries.map(|e| (e.file_name().to_string_lossy().into_owned(), e.path()));
        named.filter(|(name, _)| is_session(name)).collect()
    }

    /// The control group root.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }
}

/// All control groups below one in a map, parents before children.
pub(crate) fn descendants<'a, V>(
    groups: &'a BTreeMap<ControlGroupPath, V>,
    path: &'a ControlGroupPath,
) -> impl Iterator<Item = &'a ControlGroupPath> + 'a {
    // Not from the path itself on: between it and its children come all the siblings whose
    // names begin with its name. No name is smaller than this one. A path that is too long for
    // a child has none.
    let first = path.join(b"\x01").ok().into_iter();
    first
        .flat_map(move |first| {
            groups
                .range::<ControlGroupPath, _>((Bound::Included(&first), Bound::Unbounded))
                .map(|(path, _)| path)
        })
        .take_while(move |other| other.is_within(path))
}

/// Whether a unit is a session of logind's.
pub(crate) fn is_session(unit: &str) -> bool {
    unit.starts_with("session-") && unit.ends_with(".scope")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_login_sessions() {
        assert!(is_session("session-c2.scope"));
        assert!(!is_session("session.slice"));
    }

    #[test]
    fn knows_what_is_in_it() {
        let subtree = Subtree::of_user("/cg".into(), 7).unwrap();
        let base = "/user.slice/user-7.slice/user@7.service";
        for (text, path) in [
            (base.to_owned(), Some("")),
            (format!("{base}/"), Some("")),
            (format!("{base}/a/b"), Some("a/b")),
            (format!("{base}/a%25"), Some("a%25")),
            (format!("{base}x"), None),
            (format!("{base}/../x"), None),
            ("/user.slice".into(), None),
            ("a".into(), None),
        ] {
            let found = subtree.of_wire(&text);
            assert_eq!(
                found.as_ref().map(|p| p.to_wire()).as_deref(),
                path,
                "{text}"
            );
            if let Some(found) = found {
                assert_eq!(subtree.to_wire(&found), text.trim_end_matches('/'));
            }
        }
        let above: Vec<_> = subtree
            .ancestors()
            .map(|(d, n)| (d, n.to_owned()))
            .collect();
        assert_eq!(above[0], ("/cg".into(), b"user.slice".to_vec()));
        assert_eq!(above[2].0, Path::new("/cg/user.slice/user-7.slice"));
        assert_eq!(above[2].1, b"user@7.service");
        let a = ControlGroupPath::from_bytes(b"a").unwrap();
        assert_eq!(subtree.shown(&a), format!("{base}/a"));
        let long =
            ControlGroupPath::from_wire(&format!("{}/b", "ä".repeat(100)).repeat(9)).unwrap();
        let shown = subtree.shown(&long);
        assert!(
            shown.starts_with(&format!("{base}/ää")) && shown.ends_with("äää/b"),
            "{shown}"
        );
        assert!(shown.len() <= SHOWN.0 + SHOWN.1 + "…".len(), "{shown}");
        assert_eq!(subtree.directory(&a), Path::new(&format!("/cg{base}/a")));
    }
}
