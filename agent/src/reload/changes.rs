//! Tells when the configuration's file changes, whether or not it is there yet.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use inotify::{EventMask, Inotify, WatchDescriptor, Watches};
use tokio::net::unix::pipe::Receiver;
use tokio::time::Instant;

use super::way::{Wanted, way};
use crate::config;
use crate::text::{chain, printable};
use crate::timing::sleep_until;
use crate::watch::inotify::{Event, Events};

/// How long whoever makes a file may take to open it, which is one system call.
const OPENING: Duration = Duration::from_millis(200);

/// Tells when a file changes, whether or not it is there yet.
#[derive(Debug)]
pub(super) struct Changes {
    path: PathBuf,
    /// When to read a file that was made, unless somebody has it open by then.
    made: Option<Instant>,
    /// How many have it open, as far as events tell.
    open: usize,
    inotify: Option<(Watches, Events)>,
    /// Tells of mounts, while a link leads to nothing: inotify does not say what is mounted over a directory.
    mounts: Option<Receiver>,
    /// The directories that are watched, by the numbers of their watches.
    watched: HashMap<i32, Watched>,
    /// It was said that there are no watches left.
    said: bool,
}

/// A directory that is watched.
#[derive(Debug)]
struct Watched {
    watch: WatchDescriptor,
    directory: PathBuf,
    names: HashSet<OsString>,
    missing: bool,
}

/// What tells when something is mounted or unmounted: see proc_pid_mountinfo(5).
fn watch_mounts() -> io::Result<Receiver> {
    // It is no pipe, but the runtime waits for it as for one; of another file it does not without unsafe code.
    Receiver::from_file_unchecked(File::open("/proc/self/mountinfo")?)
}

/// Returns when something has been mounted or unmounted, and once at first.
async fn mounted(mounts: Option<&Receiver>) {
    let Some(mounts) = mounts else {
        return std::future::pending().await;
    };
    match mounts.readable().await {
        // It can be read at any time: what counts is that the kernel says so once more.
        Ok(()) => {
            let _ = mounts.try_io(|| Err::<(), _>(io::ErrorKind::WouldBlock.into()));
        }
        Err(_) => std::future::pending().await,
    }
}

impl Changes {
    /// Watches a file.
    pub(super) fn watch(path: &Path) -> Self {
        let open = || {
            let inotify = Inotify::init()?;
            Ok::<_, io::Error>((inotify.watches(), Events::new(inotify)?))
        };
        let inotify = open()
            .inspect_err(|error| {
                let why = chain(error);
                tracing::warn!("can't watch the configuration: {why}; reload it with SIGHUP");
            })
            .ok();
        let mut changes = Self {
            // It fails where there is no working directory any more, and nothing in it either.
            path: std::path::absolute(path).unwrap_or_else(|_| path.to_owned()),
            made: None,
            open: 0,
            inotify,
            mounts: None,
            watched: HashMap::new(),
            said: false,
        };
        changes.arm();
        changes
    }

    /// Watches the directories that lead to the file, which is read after that.
    pub(super) fn arm(&mut self) {
        (self.made, self.open) = (None, 0);
        match config::link_to_nothing(&self.path) {
            Some(_) if self.mounts.is_none() => {
                self.mounts = watch_mounts()
                    .inspect_err(|error| tracing::debug!("can't watch mounts: {}", chain(error)))
                    .ok();
            }
            Some(_) => {}
            None => self.mounts = None,
        }
        let mut before = way(&self.path);
        loop {
            self.watch_all(&before);
            // Nothing tells of what was changed before it was watched.
            let now = way(&self.path);
            if now == before {
                return;
            }
            before = now;
        }
    }

    /// Watches these directories and no others.
    fn watch_all(&mut self, way: &BTreeMap<PathBuf, Wanted>) {
        let Some((watches, _)) = &mut self.inotify else {
            return;
        };
        let mut old = std::mem::take(&mut self.watched);
        let mut failure = None;
        // If there are no watches for all, then for those that are needed most.
        let (named, others): (Vec<_>, Vec<_>) = way.iter().partition(|(_, i)| !i.names.is_empty());
        for (directory, interest) in named.into_iter().chain(others) {
            let watch = match watches.add(directory, interest.mask()) {
                Ok(watch) => watch,
                Err(error) => {
                    // What has gone meanwhile is looked for again, and not all that is on the way may be read.
                    let gone = [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory];
                    if !gone.contains(&error.kind()) && !interest.names.is_empty() {
                        failure = Some((directory, error));
                    }
                    continue;
                }
            };
            let id = watch.get_watch_descriptor_id();
            old.remove(&id);
            let watched = Watched {
                watch,
                directory: directory.clone(),
                names: interest.names.clone(),
                missing: interest.missing,
            };
            self.watched.insert(id, watched);
        }
        for Watched { watch, .. } in old.into_values() {
            // Fails where the kernel has forgotten it by itself.
            let _ = watches.remove(watch);
        }
        if let Some((directory, error)) = &failure
            && !self.said
        {
            tracing::warn!(
                "can't watch '{}' for changes of the configuration: {}; reload it with SIGHUP",
                printable(&directory.to_string_lossy()),
                chain(error)
            );
        }
        self.said = failure.is_some();
    }

    /// Returns when the file may have another content.
    pub(super) async fn next(&mut self) {
        loop {
            let Some((_, events)) = &mut self.inotify else {
                return std::future::pending().await;
            };
            let batch = tokio::select! {
                // What tells that somebody has opened the file counts before that it is time.
                biased;
                batch = events.next() => batch,
                () = sleep_until(self.made) => {
                    self.made = None;
                    // Whoever has made an empty one is about to write to it, however late.
                    let complete = |m: Metadata| m.is_file() && m.len() > 0;
                    if std::fs::metadata(&self.path).is_ok_and(complete) {
                        self.arm();
                        return;
                    }
                    continue;
                }
                () = mounted(self.mounts.as_ref()) => {
                    self.arm();
                    return;
                }
            };
            match batch {
                Ok(batch) => {
                    let counts = batch.iter().any(|event| self.counts(event));
                    if counts {
                        self.arm();
                        return;
                    }
                }
                Err(error) => {
                    tracing::warn!("can't watch the configuration any more: {}", chain(&error));
                    self.inotify = None;
                }
            }
        }
    }

    /// Whether the file may have another content. That of one that was made may show later only.
    fn counts(&mut self, event: &Event) -> bool {
        if event.mask.contains(EventMask::Q_OVERFLOW) {
            return true;
        }
        let Some(watched) = self.watched.get(&event.watch) else {
            return false;
        };
        if event.mask.contains(EventMask::MODIFY) {
            return false;
        }
        let name = OsStr::from_bytes(&event.name);
        if event
            .mask
            .intersects(EventMask::OPEN | EventMask::CLOSE_NOWRITE)
        {
            if watched.names.contains(name) {
                self.open = match event.mask.contains(EventMask::OPEN) {
                    true => self.open + 1,
                    false => self.open.saturating_sub(1),
                };
                // Whoever has made the file writes it, and closes it later. Who only reads it says nothing of that.
                self.made = (self.open == 0).then(|| Instant::now() + OPENING);
            }
            return false;
        }
        // The directory itself is not there any more, or is not what leads to the file.
        if event.name.is_empty() {
            return true;
        }
        if !watched.names.contains(name) {
            return false;
        }
        if !event.mask.contains(EventMask::CREATE) || event.mask.contains(EventMask::ISDIR) {
            return true;
        }
        // A link is complete at once.
        let made = std::fs::symlink_metadata(watched.directory.join(name));
        if made.is_ok_and(|made| made.is_symlink()) {
            return true;
        }
        // So is a file with link(2), but one that is made to be written is empty still. One that was there when it was
        // looked for has been read since.
        if watched.missing {
            self.made = Some(Instant::now() + OPENING);
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsRawFd;

    use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};
    use rustix::io::Errno;

    use super::*;

    /// The directory that is watched is not always there when the next one is made in it.
    #[tokio::test]
    async fn a_file_is_seen_however_many_directories_are_made_for_it() {
        for round in 0..300 {
            let home = tempfile::tempdir().unwrap();
            let path = home.path().join("a/b/c/d/e/config.yaml");
            let mut changes = Changes::watch(&path);
            let write = {
                let path = path.clone();
                std::thread::spawn(move || {
                    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                    std::fs::write(&path, "version: 1\n").unwrap();
                })
            };
            while !path.exists() {
                let next = tokio::time::timeout(Duration::from_secs(20), changes.next());
                next.await
                    .unwrap_or_else(|_| panic!("not seen in round {round}"));
            }
            write.join().unwrap();
        }
    }

    fn write(path: &Path) {
        std::fs::write(path, "version: 1\n").unwrap();
    }

    /// Longer than anybody waits for anything, on a clock that goes on as soon as nothing else does.
    const FOREVER: Duration = Duration::from_secs(24 * 60 * 60);

    async fn is_told(changes: &mut Changes) -> bool {
        tokio::time::timeout(FOREVER, changes.next()).await.is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn a_file_that_was_made_under_another_name_is_seen() {
        let home = tempfile::tempdir().unwrap();
        let at = |path: &str| home.path().join(path);
        let path = at("config.yaml");
        let mut changes = Changes::watch(&path);
        // The other name has gone by the time that anybody looks.
        write(&at("other"));
        std::fs::hard_link(at("other"), &path).unwrap();
        std::fs::remove_file(at("other")).unwrap();
        assert!(is_told(&mut changes).await);
        std::fs::remove_file(&path).unwrap();
        assert!(is_told(&mut changes).await);
        // Nor does it matter that somebody has read it at once.
        write(&at("other"));
        std::fs::hard_link(at("other"), &path).unwrap();
        std::fs::read(&path).unwrap();
        assert!(is_told(&mut changes).await);
        std::fs::remove_file(&path).unwrap();
        assert!(is_told(&mut changes).await);
        // It had none: see O_TMPFILE in open(2).
        let (flags, mode) = (OFlags::TMPFILE | OFlags::WRONLY, Mode::RUSR);
        let mut file = match rustix::fs::open(home.path(), flags, mode) {
            Ok(file) => File::from(file),
            // Not every file system has it.
            Err(Errno::OPNOTSUPP) => return,
            Err(error) => panic!("{error}"),
        };
        file.write_all(b"version: 1\n").unwrap();
        let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
        rustix::fs::linkat(CWD, unnamed, CWD, &path, AtFlags::SYMLINK_FOLLOW).unwrap();
        assert!(is_told(&mut changes).await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_file_that_is_being_written_is_waited_for() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("config.yaml");
        let mut changes = Changes::watch(&path);
        for at_once in [false, true] {
            let mut file = File::create(&path).unwrap();
            assert!(at_once || !is_told(&mut changes).await);
            file.write_all(b"version: 1\nru").unwrap();
            std::fs::read(&path).unwrap();
            assert!(!is_told(&mut changes).await);
            file.write_all(b"les: []\n").unwrap();
            drop(file);
            assert!(is_told(&mut changes).await);
            std::fs::remove_file(&path).unwrap();
            assert!(is_told(&mut changes).await);
        }
        // Nobody has anything in it yet.
        rustix::fs::mknodat(
            CWD,
            &path,
            FileType::RegularFile,
            Mode::RUSR | Mode::WUSR,
            0,
        )
        .unwrap();
        assert!(!is_told(&mut changes).await);
        write(&path);
        assert!(is_told(&mut changes).await);
    }

    /// How many events there are, and whether any counts.
    fn told(changes: &mut Changes) -> (usize, bool) {
        let (_, events) = changes.inotify.as_mut().unwrap();
        let batch = events.fetch().unwrap();
        (batch.len(), batch.iter().any(|event| changes.counts(event)))
    }

    #[tokio::test]
    async fn what_happens_beside_the_way_is_nothing() {
        let home = tempfile::tempdir().unwrap();
        let at = |path: &str| home.path().join(path);
        std::fs::create_dir_all(at("real/a/b")).unwrap();
        let bustle = |directory: &str| {
            let (one, other) = (at(directory).join("one"), at(directory).join("other"));
            write(&one);
            std::fs::rename(&one, &other).unwrap();
            std::fs::remove_file(&other).unwrap();
            std::fs::create_dir(&one).unwrap();
            std::fs::remove_dir(&one).unwrap();
        };
        write(&at("real/a/b/config.yaml"));
        let mut changes = Changes::watch(&at("real/a/b/config.yaml"));
        bustle("");
        bustle("real");
        bustle("real/a");
        assert_eq!(told(&mut changes), (0, false), "nobody is woken");
        bustle("real/a/b");
        assert!(!told(&mut changes).1);
        // A link that leads on may lead elsewhere.
        std::os::unix::fs::symlink("real/a", at("link")).unwrap();
        let mut changes = Changes::watch(&at("link/b/config.yaml"));
        bustle("real");
        bustle("real/a");
        assert_eq!(told(&mut changes), (0, false), "nobody is woken");
        bustle("");
        assert!(!told(&mut changes).1);
        std::fs::rename(at("link"), at("elsewhere")).unwrap();
        assert!(told(&mut changes).1);
    }

    #[tokio::test]
    async fn what_leads_to_the_file_no_more_is_left_alone() {
        let home = tempfile::tempdir().unwrap();
        let at = |path: &str| home.path().join(path);
        std::fs::create_dir(at("a")).unwrap();
        write(&at("a/config.yaml"));
        let mut changes = Changes::watch(&at("a/config.yaml"));
        std::fs::rename(at("a"), at("b")).unwrap();
        changes.next().await;
        // That the watch has ended.
        assert!(!told(&mut changes).1);
        write(&at("b/config.yaml"));
        std::fs::rename(at("b"), at("c")).unwrap();
        std::fs::create_dir(at("a")).unwrap();
        changes.next().await;
        assert_eq!(told(&mut changes), (0, false));
        write(&at("a/config.yaml"));
        changes.next().await;
    }

    #[tokio::test]
    async fn links_in_a_circle_are_waited_for() {
        let home = tempfile::tempdir().unwrap();
        let at = |path: &str| home.path().join(path);
        std::os::unix::fs::symlink("b", at("a")).unwrap();
        std::fs::create_dir(at("x")).unwrap();
        std::os::unix::fs::symlink("x/../a/.", at("b")).unwrap();
        let mut changes = Changes::watch(&at("a/config.yaml"));
        assert_eq!(told(&mut changes), (0, false));
        std::fs::remove_file(at("b")).unwrap();
        changes.next().await;
        std::fs::create_dir(at("b")).unwrap();
        changes.next().await;
        write(&at("b/config.yaml"));
        changes.next().await;
    }
}
