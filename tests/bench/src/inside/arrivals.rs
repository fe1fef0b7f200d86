//! Control groups that come one by one, with a process born in each.

use std::ffi::CStr;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use super::site::{PATIENCE, Site};
use crate::birth::{self, now};
use crate::order::{Kind, Nursery, Sample, Starts};

/// Between one and the next, so that what the removal of the first brings about is over: two transactions of a
/// loaded machine.
const SETTLE: Duration = Duration::from_millis(8);

const FIRST_SEND: &CStr = c"/run/first-send";

impl Site<'_> {
    /// From before mkdir(2) until packets of a process that is born there are dropped.
    pub(super) fn latency(&mut self, count: usize) -> Vec<Sample> {
        let patience = match self.kind {
            Kind::None | Kind::Conntrack | Kind::Layout => Duration::ZERO,
            _ => PATIENCE,
        };
        let mut samples = Vec::with_capacity(count);
        for _ in 0..count {
            let name = format!("bench-{}.scope", self.fresh());
            let directory = self.base.join(name);
            let start = now();
            self.make(std::slice::from_ref(&directory));
            let sent = birth::send_at_once(&directory, patience).expect("a process");
            samples.push(Sample {
                first: sent.first - start,
                in_force: sent.dropped.map(|at| at - start),
                left: sent.left,
            });
            self.remove(&directory);
            std::thread::sleep(SETTLE);
        }
        samples
    }

    /// What becomes of the first packet of a program that sends as its first act.
    pub(super) fn first_sends(&mut self, count: usize, nursery: Nursery) -> Starts {
        let path = std::path::Path::new(FIRST_SEND.to_str().expect("ASCII"));
        if !path.exists() {
            let program = include_bytes!(concat!(env!("OUT_DIR"), "/first-send"));
            std::fs::write(path, program).expect("/run is ours");
            std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).expect("ours");
        }
        let place = match nursery {
            Nursery::Matched => self.base.clone(),
            Nursery::Inherits => {
                let slice = self.user.service().directory().join("verdict.slice");
                if !slice.exists() {
                    let before = self.elements();
                    self.user.cgroup("verdict.slice");
                    self.await_count(before + 1);
                }
                slice
            }
        };
        let mut starts = Starts::default();
        for _ in 0..count {
            let name = match nursery {
                Nursery::Matched => format!("bench-{}.scope", self.fresh()),
                Nursery::Inherits => format!("app-{}.scope", self.fresh()),
            };
            let directory = place.join(name);
            self.make(std::slice::from_ref(&directory));
            let born = birth::program(&directory, FIRST_SEND).expect("a process");
            match born.status().expect("it ends") {
                0 => starts.left += 1,
                1 => starts.dropped += 1,
                status => panic!("first-send ended with {status}"),
            }
            self.remove(&directory);
            if nursery == Nursery::Matched {
                std::thread::sleep(SETTLE);
            }
        }
        starts
    }
}
