//! The one cgroup on the host that a sandbox lives in, and which takes everything with it.

use std::fs;
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

const PREFIX: &str = "cgtproxy-sandbox-";

/// A fresh child of the cgroup v2 root. Dropped, it kills whatever is in it and is removed.
pub(crate) struct HostCgroup {
    path: PathBuf,
}

impl HostCgroup {
    /// Makes one, after clearing away what killed test runs left behind.
    pub(crate) fn create() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let root = v2_root();
        sweep(&root);
        let pid = std::process::id();
        let start = start_time(pid).expect("this process is alive");
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = root.join(format!("{}{pid}-{start}-{count}", own_prefix()));
        fs::create_dir(&path).unwrap_or_else(|e| {
            panic!(
                "cannot make the cgroup {} ({e}); the tests must run as root",
                path.display()
            )
        });
        Self { path }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for HostCgroup {
    fn drop(&mut self) {
        clear(&self.path);
    }
}

/// Where the cgroup v2 hierarchy is mounted, on pure v2 and on hybrid machines.
fn v2_root() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("/proc is mounted");
    mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .find(|fields| fields.get(2) == Some(&"cgroup2"))
        .map(|fields| PathBuf::from(fields[1]))
        .expect("cgroup v2 is mounted somewhere on this machine")
}

/// What the names of those begin with whose owners have process ids that mean something here. Containers may have a
/// cgroup root in common, and each its own processes.
fn own_prefix() -> String {
    let namespace = fs::metadata("/proc/self/ns/pid").expect("/proc is mounted");
    format!("{PREFIX}{}-", namespace.ino())
}

/// Removes sandboxes whose owner was killed before it could do so. The owner's start time is part
/// of the name, since process ids come round again.
fn sweep(root: &Path) {
    let prefix = own_prefix();
    for entry in fs::read_dir(root)
        .expect("the cgroup root can be listed")
        .flatten()
    {
        let name = entry.file_name();
        let Some(rest) = name.to_str().and_then(|n| n.strip_prefix(&*prefix)) else {
            continue;
        };
        let mut fields = rest.split('-');
        let pid = fields.next().and_then(|f| f.parse().ok());
        let start = fields.next().and_then(|f| f.parse::<u64>().ok());
        if pid.and_then(start_time) != start || start.is_none() {
            clear(&entry.path());
        }
    }
}

/// When a process was started, in clock ticks since boot.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything, so count from the last one.
    stat.rsplit_once(')')?
        .1
        .split_whitespace()
        .nth(19)?
        .parse()
        .ok()
}

/// Kills and removes. Errors are left alone: someone else may be sweeping the same cgroup, and
/// what remains is swept by the next run.
fn clear(path: &Path) {
    let _ = fs::write(path.join("cgroup.kill"), "1");
    wait_until_empty(path);
    remove_tree(path);
}

fn wait_until_empty(path: &Path) {
    let deadline = Instant::now() + Duration::from_secs(10);
    let Ok(events) = fs::File::open(path.join("cgroup.events")) else {
        return;
    };
    while Instant::now() < deadline {
        // The file is read anew each time: reading is what re-arms its POLLPRI.
        match nix::sys::uio::pread(&events, &mut [0; 1], 0) {
            Ok(_) => {}
            Err(_) => return,
        }
        let Ok(text) = fs::read_to_string(path.join("cgroup.events")) else {
            return;
        };
        if text.contains("populated 0") {
            return;
        }
        let mut fds = [PollFd::new(events.as_fd(), PollFlags::POLLPRI)];
        let _ = poll(&mut fds, PollTimeout::from(200_u16));
    }
}

fn remove_tree(path: &Path) {
    let Ok(directory) = fs::File::open(path) else {
        return;
    };
    // By its descriptor: the whole path may be longer than the kernel takes.
    let here = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()));
    let Ok(entries) = fs::read_dir(&here) else {
        return;
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    // A killed process leaves its cgroup a moment after the cgroup says it is empty.
    for _ in 0..100 {
        match fs::remove_dir(path) {
            Err(e) if e.kind() == ErrorKind::ResourceBusy => {
                std::thread::sleep(Duration::from_millis(5));
            }
            _ => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    /// A process that is killed, whatever becomes of the test.
    struct Orphan(Child);

    impl Drop for Orphan {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    /// In a cgroup of its own, where nobody else looks for anything.
    #[test]
    fn what_a_killed_run_left_behind_is_swept() {
        let bed = HostCgroup::create();
        let own = own_prefix();
        let namespace = fs::metadata("/proc/self/ns/pid").unwrap().ino();
        let pid = std::process::id();
        let start = start_time(pid).unwrap();
        let make = |name: String| {
            let path = bed.path().join(name);
            fs::create_dir_all(path.join("system/user.slice")).unwrap();
            path
        };
        let stale = make(format!("{own}{pid}-{}-0", start - 1));
        let stay = [
            make(format!("{own}{pid}-{start}-0")),
            // Of somebody whose processes can't be seen from here.
            make(format!("{PREFIX}{}-{pid}-{}-0", namespace + 1, start - 1)),
            make("cgtproxy-test-1-1-0".to_owned()),
        ];
        // With a path that is too long for the kernel.
        let mut down = fs::File::open(&stale).unwrap();
        for _ in 0..20 {
            let below = format!("/proc/self/fd/{}/{:0>250}", down.as_raw_fd(), 0);
            fs::create_dir(&below).unwrap();
            down = fs::File::open(below).unwrap();
        }
        let mut orphan = Orphan(Command::new("sleep").arg("600").spawn().unwrap());
        let procs = stale.join("system/cgroup.procs");
        fs::write(procs, orphan.0.id().to_string()).unwrap();
        sweep(bed.path());
        assert!(!stale.exists());
        assert!(!orphan.0.wait().unwrap().success());
        for path in stay {
            assert!(path.exists(), "{}", path.display());
        }
        let path = bed.path().to_owned();
        drop(bed);
        assert!(!path.exists());
    }
}
