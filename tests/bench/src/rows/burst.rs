//! Thousands of control groups at once, and their removal.

use crate::cli::Options;
use crate::order::{Burst, Kind, Order};
use crate::report::Report;
use crate::stats::median;
use crate::yard::Yard;

const BURST: &str = "burst";

pub(super) fn run(options: &Options, report: &mut Report) {
    let groups = options.number(5000, 300);
    let rounds = options.number(5, 1);
    for nested in [false, true] {
        let shape = if nested { "nested" } else { "flat" };
        // The floor looks at one directory.
        let mut kinds = vec![Kind::None, Kind::Ours];
        if !nested {
            kinds.push(Kind::Floor);
        }
        kinds.extend(super::original());
        let mut yards: Vec<Yard> = kinds.into_iter().map(Yard::start).collect();
        let mut bursts: Vec<Vec<Burst>> = vec![Vec::new(); yards.len()];
        for _ in 0..rounds {
            for (yard, bursts) in yards.iter_mut().zip(&mut bursts) {
                bursts.push(yard.order(&Order::Burst { groups, nested }));
            }
        }
        let unwatched: Vec<f64> = bursts[0].iter().map(|b| b.mkdir as f64).collect();
        let unwatched = median(&unwatched);
        for (yard, bursts) in yards.iter().zip(&bursts) {
            let of = |field: fn(&Burst) -> f64| -> Vec<f64> { bursts.iter().map(field).collect() };
            let name = yard.kind.name();
            let what = |what: &str| format!("{groups} {shape}, {what}");
            report.add(
                BURST,
                what("mkdir"),
                name,
                " ms",
                &of(|b| b.mkdir as f64 / 1e6),
            );
            if yard.kind == Kind::None {
                report.add(
                    BURST,
                    what("rmdir"),
                    name,
                    " ms",
                    &of(|b| b.rmdir as f64 / 1e6),
                );
                continue;
            }
            report.add(
                BURST,
                what("all in force"),
                name,
                " ms",
                &of(|b| b.in_force as f64 / 1e6),
            );
            report.add(
                BURST,
                what("rmdir"),
                name,
                " ms",
                &of(|b| b.rmdir as f64 / 1e6),
            );
            report.add(
                BURST,
                what("all gone"),
                name,
                " ms",
                &of(|b| b.gone as f64 / 1e6),
            );
            let each = groups as f64 * 1000.0;
            let cpu: Vec<f64> = bursts.iter().map(|b| b.cpu as f64 / each).collect();
            report.add(BURST, what("daemons' CPU for each"), name, " µs", &cpu);
            let cpu: Vec<f64> = bursts.iter().map(|b| b.cpu_removal as f64 / each).collect();
            report.add(
                BURST,
                what("daemons' CPU for each removal"),
                name,
                " µs",
                &cpu,
            );
            report.add(
                BURST,
                what("never in force"),
                name,
                "",
                &of(|b| b.missing as f64),
            );
            report.add(
                BURST,
                what("left for ever"),
                name,
                "",
                &of(|b| b.stale as f64),
            );
            if yard.kind == Kind::Ours {
                let sum =
                    |field: fn(&Burst) -> usize| bursts.iter().map(field).sum::<usize>() as f64;
                report.at_most(
                    BURST,
                    format!("{shape}, never in force"),
                    sum(|b| b.missing),
                    0.0,
                    "",
                );
                report.at_most(
                    BURST,
                    format!("{shape}, left for ever"),
                    sum(|b| b.stale),
                    0.0,
                    "",
                );
                let ratio = median(&of(|b| b.in_force as f64 / b.mkdir as f64));
                report.at_most(
                    BURST,
                    format!("{shape}, all in force against mkdir"),
                    ratio,
                    1.5,
                    "×",
                );
                let ratio = median(&of(|b| b.in_force as f64)) / unwatched;
                let what = format!("{shape}, all in force against mkdir that nobody watches");
                report.at_most(BURST, what, ratio, 1.5, "×");
            }
        }
    }
}
