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
            let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it is alive");
            let field = |name: &str| -> u64 {
                let line = status.lines().find_map(|line| line.strip_prefix(name));
                let value = line.and_then(|l| l.split_whitespace().next());
                value
                    .and_then(|v| v.parse().ok())
                    .expect("the kernel says it")
            };
            Idle {
                name: name.to_owned(),
                resident: field("VmRSS:") << 10,
                anonymous: field("RssAnon:") << 10,
                threads: field("Threads:"),
                wakeups: after.1 - before.1,
                cpu: after.0 - before.0,
            }
        });
        uses.collect()
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
