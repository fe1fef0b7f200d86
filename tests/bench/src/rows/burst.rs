//! Thousands of control groups at once, and their removal.

use crate::cli::Options;
use crate::order::{Burst, Kind, Order};
use crate::report::Report;
use crate::stats::median_ratio;

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
        let mut yards = super::yards(&kinds);
        let mut bursts: Vec<Vec<Burst>> = vec![Vec::new(); yards.len()];
        for _ in 0..rounds {
            for (yard, bursts) in yards.iter_mut().zip(&mut bursts) {
                bursts.push(yard.order(&Order::Burst { groups, nested }));
            }
        }
        let unwatched: Vec<f64> = bursts[0].iter().map(|b| b.mkdir as f64).collect();
        let mut each = Vec::new();
        for (yard, bursts) in yards.iter().zip(&bursts) {
            let name = yard.kind.name();
            let mut add = |what: &str, unit, of: &dyn Fn(&Burst) -> f64| {
                let values: Vec<f64> = bursts.iter().map(of).collect();
                report.add(
                    BURST,
                    format!("{groups} {shape}, {what}"),
                    name,
                    unit,
                    &values,
                )
            };
            add("mkdir", " ms", &|b| b.mkdir as f64 / 1e6);
            add("rmdir", " ms", &|b| b.rmdir as f64 / 1e6);
            if yard.kind == Kind::None {
                continue;
            }
            // Otherwise it is how long somebody waited for what did not come.
            if bursts.iter().all(|b| b.missing == 0) {
                add("all in force", " ms", &|b| b.in_force as f64 / 1e6);
            }
            if bursts.iter().all(|b| b.stale == 0) {
                add("all gone", " ms", &|b| b.gone as f64 / 1e6);
            }
            // Also for those that never got a verdict: who loses them is not the dearer for that.
            let each_of = |cpu: u64| cpu as f64 / groups as f64 / 1000.0;
            let cpu = add("CPU for each", " µs", &|b| each_of(b.cpu));
            each.push((yard.kind, cpu.median));
            add("CPU for each removal", " µs", &|b| each_of(b.cpu_removal));
            add("never in force", "", &|b| b.missing as f64);
            add("left for ever", "", &|b| b.stale as f64);
            if yard.kind == Kind::Ours {
                targets(report, shape, bursts, &unwatched);
            }
        }
        let of = |kind| each.iter().find(|(k, _)| *k == kind).map(|(_, each)| each);
        if let (Some(ours), Some(original)) = (of(Kind::Ours), of(Kind::Original)) {
            let what = format!("{shape}, CPU for each, against the original");
            report.at_most(BURST, what, ours / original, 1.0 / 3.0, "×");
        }
    }
}

fn targets(report: &mut Report, shape: &str, bursts: &[Burst], unwatched: &[f64]) {
    let of = |field: fn(&Burst) -> f64| -> Vec<f64> { bursts.iter().map(field).collect() };
    let mut at_most = |what: &str, measured, most, unit| {
        report.at_most(BURST, format!("{shape}, {what}"), measured, most, unit);
    };
    at_most(
        "never in force",
        of(|b| b.missing as f64).iter().sum(),
        0.0,
        "",
    );
    at_most(
        "left for ever",
        of(|b| b.stale as f64).iter().sum(),
        0.0,
        "",
    );
    let in_force = of(|b| b.in_force as f64);
    let ratio = median_ratio(&in_force, &of(|b| b.mkdir as f64));
    at_most("all in force against mkdir", ratio, 1.5, "×");
    let ratio = median_ratio(&in_force, unwatched);
    at_most(
        "all in force against mkdir that nobody watches",
        ratio,
        1.5,
        "×",
    );
}
