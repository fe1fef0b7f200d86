//! What another program takes away, and how soon it is back.

use std::time::{Duration, Instant};

use super::site::{PATIENCE, Site, nft};
use crate::birth::now;
use crate::order::Loss;

/// Between one time and the next.
const SETTLE: Duration = Duration::from_millis(20);

impl Site<'_> {
    /// From before the other program is started until what it has taken away is back.
    pub(super) fn restore(&self, loss: Loss, count: usize) -> Vec<u64> {
        let elements = self.elements();
        let once = |_| {
            let start = now();
            match loss {
                Loss::Ruleset => {
                    nft("flush ruleset");
                    self.poll(start, |count| count >= elements);
                }
                Loss::Rules => {
                    for family in ["-4", "-6"] {
                        self.sandbox.run(&["ip", family, "rule", "flush"]);
                    }
                    self.await_rules();
                }
            }
            let back = now() - start;
            std::thread::sleep(SETTLE);
            back
        };
        (0..count).map(once).collect()
    }

    fn await_rules(&self) {
        let started = Instant::now();
        while [4, 6]
            .into_iter()
            .any(|family| self.sandbox.mark_rules(family).is_empty())
        {
            assert!(started.elapsed() < PATIENCE, "the rules are not back");
        }
    }
}
