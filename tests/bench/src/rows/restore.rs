//! Another program takes things away.

use crate::cli::Options;
use crate::order::{Kind, Loss, Mapped, Order};
use crate::report::Report;
use crate::yard::Yard;

const RESTORE: &str = "restore";

pub(super) fn run(options: &Options, report: &mut Report) {
    let count = options.number(100, 3);
    for groups in options.number(vec![10, 2000], vec![10]) {
        let mut yard = Yard::start(Kind::Unprotected);
        yard.order::<()>(&Order::Map {
            groups,
            verdict: Mapped::Dropped,
        });
        for (loss, name) in [
            (Loss::Ruleset, "nft flush ruleset"),
            (Loss::Table, "nft delete table"),
            (Loss::Rules, "ip rule flush"),
            (Loss::Routes, "ip route flush"),
            (Loss::Loopback, "lo down and up"),
        ] {
            let times: Vec<u64> = yard.order(&Order::Restore { loss, count });
            let times: Vec<f64> = times.into_iter().map(|t| t as f64 / 1e6).collect();
            let what = format!("{name}, {groups} control groups, all is back");
            let on = Kind::Unprotected.name();
            let summary = report.add(RESTORE, what, on, " ms", &times);
            let what = format!("p99 of {name}, {groups} control groups");
            report.at_most(RESTORE, what, summary.nearly_all(), 100.0, " ms");
        }
    }
}
