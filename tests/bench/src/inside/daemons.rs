//! What the daemons use.

use std::fs;
use std::time::Duration;

use super::site::Site;
use crate::order::Idle;

impl Site<'_> {
    /// Looks at the daemons, leaves them alone for a while, and looks again.
    pub(super) fn idle(&self, milliseconds: u64) -> Vec<Idle> {
        let processes = self.processes();
        let before: Vec<_> = processes.iter().map(|&(_, pid)| scheduled(pid)).collect();
        std::thread::sleep(Duration::from_millis(milliseconds));
        let uses = processes.iter().zip(before).map(|(&(name, pid), before)| {
            let after = scheduled(pid);
            let status = Status::of(pid);
            Idle {
                name: name.to_owned(),
                resident: status.bytes("VmRSS:"),
                anonymous: status.bytes("RssAnon:"),
                threads: status.number("Threads:"),
                wakeups: after.1 - before.1,
                cpu: after.0 - before.0,
            }
        });
        uses.collect()
    }
}

/// A process's `status`, proc_pid_status(5).
pub(super) struct Status(String);

impl Status {
    pub(super) fn of(pid: u32) -> Self {
        Self(fs::read_to_string(format!("/proc/{pid}/status")).expect("it is alive"))
    }

    fn number(&self, name: &str) -> u64 {
        let line = self.0.lines().find_map(|line| line.strip_prefix(name));
        let value = line.and_then(|line| line.split_whitespace().next());
        let value = value.and_then(|value| value.parse().ok());
        value.expect("the kernel says it")
    }

    pub(super) fn bytes(&self, name: &str) -> u64 {
        self.number(name) << 10
    }
}

/// Nanoseconds that a process has computed.
pub(super) fn computed(pid: u32) -> u64 {
    scheduled(pid).0
}

/// Nanoseconds that a process has computed, and how often it was given a processor: of all its threads.
fn scheduled(pid: u32) -> (u64, u64) {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("it is alive");
    let mut sum = (0, 0);
    for task in tasks.flatten() {
        // A thread may end in between.
        let Ok(text) = fs::read_to_string(task.path().join("schedstat")) else {
            continue;
        };
        let mut words = text
            .split_whitespace()
            .map(|w| w.parse::<u64>().expect("a number"));
        sum.0 += words.next().unwrap_or(0);
        sum.1 += words.nth(1).unwrap_or(0);
    }
    sum
}
