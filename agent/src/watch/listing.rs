//! What is in a control group.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::path::Path;

use cgtproxy_proto::path::{ControlGroupPath, InvalidPath};
use tracing::Level;

use super::known::{Known, is_absence, is_lasting};
use super::watcher::Watcher;
use crate::said::{Kind, say};
use crate::state::Observer;
use crate::text::{chain, printable};

impl Watcher {
    /// This user may not look into a control group, as into those that a container's users have for themselves. To look
    /// again and again would change nothing.
    pub(super) fn say_closed(&mut self, path: &ControlGroupPath, error: &io::Error) {
        let is_news = self.said.is_news(Kind::Closed, path);
        say(is_news, Level::INFO, || {
            let name = self.subtree.shown(path);
            let why = chain(error);
            format!("can't look into '{name}': {why}; what is in it has its verdict")
        });
    }

    /// A control group can't be named.
    pub(super) fn say_unnameable(
        &mut self,
        parent: &ControlGroupPath,
        name: &[u8],
        why: InvalidPath,
    ) {
        let is_news = self.said.is_news(Kind::Unnameable, parent);
        say(is_news, Level::WARN, || {
            let name = printable(&String::from_utf8_lossy(name));
            let above = self.subtree.shown(parent);
            format!(
                "can't follow '{name}' in '{above}': {why}; it has the verdict of what it is in"
            )
        });
    }

    /// Adds the control groups in one to `found`, with their inodes. Returns whether it is known what is in it.
    pub(super) fn list(
        &mut self,
        path: &ControlGroupPath,
        found: &mut Vec<(ControlGroupPath, u64)>,
        observer: &mut dyn Observer,
    ) -> bool {
        let mut children = Vec::new();
        let listed = self.children(path, &mut children);
        let noted = match &listed {
            Ok(()) => {
                self.unlisted.remove(path);
                self.noted.remove(path)
            }
            Err(error) if is_lasting(error) => {
                self.unlisted.remove(path);
                self.say_closed(path, error);
                None
            }
            Err(error) => {
                self.unlisted_why = chain(error);
                if !self.said_unlisted {
                    self.said_unlisted = true;
                    let name = self.subtree.shown(path);
                    tracing::warn!("can't list '{name}': {}; trying again", chain(error));
                }
                self.unlisted.insert(path.clone());
                None
            }
        };
        if let Some(noted) = noted {
            children.sort_unstable();
            let watched = self.is_watched(path);
            for one in noted {
                let there = children.binary_search(&one).is_ok();
                let (child, inode) = one;
                if !there {
                    self.gone(&child, observer);
                } else if !watched {
                    self.note_inode(child, inode);
                }
            }
        }
        found.append(&mut children);
        listed.is_ok()
    }

    /// Notes the inode of a control group that was announced, and that is in one without a watch: nothing reports what
    /// happens before it is looked at itself.
    pub(super) fn note_inode(&mut self, path: ControlGroupPath, inode: u64) {
        let id = Some(inode);
        let known = self.groups.entry(path);
        known.or_insert(Known { watch: None, id });
    }

    /// The control groups in one, with their inodes.
    pub(super) fn children(
        &mut self,
        path: &ControlGroupPath,
        found: &mut Vec<(ControlGroupPath, u64)>,
    ) -> io::Result<()> {
        let directory = self.working_directory.directory(&self.subtree, path);
        // Each directory in it is a link to it, beside the two that every directory has. (File
        // systems that do not count so say 1.)
        match std::fs::symlink_metadata(&directory) {
            Ok(metadata) if metadata.nlink() != 2 => {}
            Err(error) if !is_absence(&error) => return Err(error),
            _ => return Ok(()),
        }
        let entries = match std::fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) if is_absence(&error) => return Ok(()),
            Err(error) => return Err(error),
        };
        // Reading ends early when the directory vanishes meanwhile; its parent tells of that.
        for entry in entries.map_while(Result::ok) {
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                let name: &OsStr = &entry.file_name();
                match path.join(name.as_bytes()) {
                    Ok(child) => found.push((child, entry.ino())),
                    Err(why) => self.say_unnameable(path, name.as_bytes(), why),
                }
            }
        }
        Ok(())
    }
}

/// Whether there are other control groups in a directory than so many, below those in it; yes if in doubt. The kernel
/// keeps count (`cgroup.stat`), so that not every control group has to be asked for itself.
pub(super) fn contains_more_than(directory: &Path, count: usize) -> bool {
    if count == 0 {
        return false;
    }
    let text = std::fs::read_to_string(directory.join("cgroup.stat")).unwrap_or_default();
    let descendants = text
        .lines()
        .find_map(|line| line.strip_prefix("nr_descendants "))
        .and_then(|number| number.parse::<usize>().ok());
    descendants != Some(count)
}
