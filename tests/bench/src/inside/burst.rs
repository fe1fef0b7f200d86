//! Many control groups at once.

use std::path::PathBuf;
use std::time::Duration;

use super::daemons::computed;
use super::site::{PATIENCE, Site};
use crate::birth::now;
use crate::order::{Burst, Kind};

impl Site<'_> {
    /// Makes control groups as quickly as one process can, waits until the kernel has a verdict for each, and
    /// removes them again. Nested ones are in a slice each.
    pub(super) fn burst(&mut self, groups: usize, nested: bool) -> Burst {
        let (mut made, mut slices) = (Vec::new(), Vec::new());
        for _ in 0..groups {
            let number = self.fresh();
            let scope = format!("bench-{number}.scope");
            if nested {
                let slice = self.base.join(format!("part-{number}.slice"));
                made.push(slice.clone());
                made.push(slice.join(scope));
                slices.push(slice);
            } else {
                made.push(self.base.join(scope));
            }
        }
        let before = self.elements();
        let computed_before = self.computed();
        let start = now();
        self.make(&made);
        let mkdir = now() - start;
        self.poll(start, |count| count >= before + groups);
        let in_force = now() - start;
        let cpu = self.computed() - computed_before;

        self.wait_idle();
        let has = self.elements();
        let computed_before = self.computed();
        let start = now();
        let directories: Vec<&PathBuf> = made.iter().rev().collect();
        for directory in directories {
            self.remove(directory);
        }
        let rmdir = now() - start;
        self.poll(start, |count| count <= before);
        let gone = now() - start;
        let cpu_removal = self.computed() - computed_before;
        self.wait_idle();
        let left = self.elements();
        Burst {
            mkdir,
            in_force,
            missing: (before + groups).saturating_sub(has),
            cpu,
            rmdir,
            gone,
            stale: left.saturating_sub(before),
            cpu_removal,
        }
    }

    /// Counts elements until it is enough, or until nothing has changed for two seconds.
    pub(super) fn poll(&self, start: u64, enough: impl Fn(usize) -> bool) -> usize {
        if matches!(self.kind, Kind::None | Kind::Conntrack | Kind::Layout) {
            return self.elements();
        }
        let (mut last, mut changed) = (usize::MAX, now());
        loop {
            let count = self.elements();
            if enough(count) || now() - start > PATIENCE.as_nanos() as u64 {
                return count;
            }
            if count != last {
                (last, changed) = (count, now());
            } else if now() - changed > 2_000_000_000 {
                return count;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// What the daemons have computed so far, in nanoseconds.
    fn computed(&self) -> u64 {
        let processes = self.processes();
        processes.iter().map(|&(_, pid)| computed(pid)).sum()
    }

    /// Waits until the daemons have not computed anything for a while.
    pub(super) fn wait_idle(&self) {
        let mut before = self.computed();
        loop {
            std::thread::sleep(Duration::from_millis(20));
            let after = self.computed();
            if after == before {
                return;
            }
            before = after;
        }
    }
}
