//! What another program takes away, and how soon it is back.

use std::time::{Duration, Instant};

use super::site::{PATIENCE, Site, nft};
use crate::birth::now;
use crate::order::Loss;

/// Between one time and the next.
const SETTLE: Duration = Duration::from_millis(20);
/// The helper's routing table.
const TABLE: &str = "25447";

impl Site<'_> {
    /// From before the other program is started until what it has taken away is back.
    pub(super) fn restore(&self, loss: Loss, count: usize) -> Vec<u64> {
        let elements = self.elements();
        let once = |_| {
            let start = now();
            match loss {
                Loss::Ruleset => nft("flush ruleset"),
                Loss::Table => nft("delete table inet cgtproxy"),
                Loss::Rules => self.by_families(&["rule", "flush"]),
                Loss::Routes => self.by_families(&["route", "flush", "table", TABLE]),
                Loss::Loopback => {
                    let toggle = "ip link set lo down; ip link set lo up";
                    self.sandbox.run(&["sh", "-c", toggle]);
                }
            }
            match loss {
                Loss::Ruleset | Loss::Table => {
                    let back = self.poll(start, |count| count >= elements);
                    assert!(back >= elements, "{back} of {elements} elements are back");
                }
                Loss::Rules => await_families(|family| !self.sandbox.mark_rules(family).is_empty()),
                Loss::Routes | Loss::Loopback => {
                    await_families(|family| !self.sandbox.routes(family, TABLE).is_empty());
                }
            }
            let back = now() - start;
            std::thread::sleep(SETTLE);
            back
        };
        (0..count).map(once).collect()
    }

    /// Runs an `ip` command for IPv4 and for IPv6.
    fn by_families(&self, command: &[&str]) {
        for family in ["-4", "-6"] {
            self.sandbox.run(&[&["ip", family], command].concat());
        }
    }
}

/// Waits until IPv4 and IPv6 have it back.
fn await_families(back: impl Fn(u8) -> bool) {
    let started = Instant::now();
    while ![4, 6].into_iter().all(&back) {
        assert!(started.elapsed() < PATIENCE, "the routing is not back");
    }
}
