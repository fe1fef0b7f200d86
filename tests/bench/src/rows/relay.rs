//! TCP through a TPROXY server.

use crate::cli::Options;
use crate::order::{Cores, Kind, Order, Task, Way};
use crate::report::Report;
use crate::stats::{median, median_ratio};
use crate::yard::Yard;

const RELAY: &str = "relay";

pub(super) fn run(options: &Options, report: &mut Report) {
    let (rounds, bytes, count) = options.number((15, 256 << 20, 300), (1, 8 << 20, 20));
    let mut yards = [
        (Yard::start(Kind::None), Way::Straight),
        (Yard::start(Kind::Layout), Way::Diverted),
        (Yard::start(Kind::Ours), Way::Diverted),
    ];
    let mut bulk = vec![Vec::new(); yards.len()];
    let mut requests = vec![Vec::new(); yards.len()];
    for _ in 0..rounds {
        for (n, (yard, way)) in yards.iter_mut().enumerate() {
            let mut errand = |task| -> Vec<f64> {
                let (way, cores) = (*way, Cores::All);
                yard.order(&Order::Errand { way, cores, task })
            };
            bulk[n].extend(errand(Task::Bulk { bytes }));
            requests[n].push(errand(Task::Requests { count }));
        }
    }
    for (n, (yard, way)) in yards.iter().enumerate() {
        let name = match way {
            Way::Straight => "connected to the relay, no ruleset",
            _ => yard.kind.name(),
        };
        report.add(RELAY, "bulk", name, " MB/s", &bulk[n]);
        report.add(
            RELAY,
            "connect, ask, answer",
            name,
            " µs",
            &requests[n].concat(),
        );
    }
    let rates: Vec<Vec<f64>> = requests
        .iter()
        .map(|rounds| rounds.iter().map(|times| 1.0 / median(times)).collect())
        .collect();
    for (what, rates) in [("bulk", &bulk), ("requests", &rates)] {
        let [straight, theirs, ours] = [0, 1, 2].map(|n| &rates[n]);
        let mut at_least = |against, most, least| {
            let what = format!("{what}, against {against}");
            report.at_least(RELAY, what, median_ratio(ours, most), least, "×");
        };
        at_least("the original's layout", theirs, 1.0);
        at_least("connecting to the relay", straight, 0.85);
    }
}
