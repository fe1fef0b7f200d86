//! An agent starts where control groups are already.

use crate::cli::Options;
use crate::order::{Kind, Mapped, Order, Start};
use crate::report::Report;
use crate::yard::Yard;

const START: &str = "start";

pub(super) fn run(options: &Options, report: &mut Report) {
    let sizes = options.number(
        vec![(500, 10.0), (2000, 30.0), (10_000, 120.0)],
        vec![(100, 10.0)],
    );
    let rounds = options.number(15, 2);
    for (groups, most) in sizes {
        let mut yard = Yard::start(Kind::Ours);
        // Where an agent runs, it maps them. It is stopped by the first start.
        yard.order::<()>(&Order::Map {
            groups,
            verdict: Mapped::Dropped,
        });
        let starts: Vec<Start> = (0..rounds).map(|_| yard.order(&Order::Start)).collect();
        let of = |field: fn(&Start) -> u64| -> Vec<f64> {
            starts.iter().map(|s| field(s) as f64 / 1e6).collect()
        };
        let at = Some(groups as f64);
        let name = Kind::Ours.name();
        let what = format!("{groups} control groups, in force");
        let summary = report.add_at(START, what, name, " ms", &of(|s| s.in_force), at);
        let what = format!("{groups} control groups, READY=1");
        report.add_at(START, what, name, " ms", &of(|s| s.ready), at);
        let what = format!("{groups} control groups, in force");
        report.at_most(START, what, summary.median, most, " ms");
    }
}
