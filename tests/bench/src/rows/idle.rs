//! What the daemons use when nothing happens.

use std::collections::BTreeMap;

use crate::cli::Options;
use crate::order::{Idle, Kind, Mapped, Order};
use crate::report::Report;
use crate::yard::Yard;

const IDLE: &str = "idle";

pub(super) fn run(options: &Options, report: &mut Report) {
    let milliseconds = options.number(60_000, 1000);
    // How much of a program is in memory differs from start to start.
    let starts = options.number(9, 2);
    for kind in [Kind::Ours].into_iter().chain(super::original()) {
        let uses = std::thread::scope(|scope| {
            let started: Vec<_> = (0..starts)
                .map(|_| scope.spawn(|| idle(kind, milliseconds)))
                .collect();
            let idled = started.into_iter().map(|one| one.join().expect("no panic"));
            idled.flatten().collect::<Vec<Idle>>()
        });
        let mut processes: BTreeMap<&str, Vec<&Idle>> = BTreeMap::new();
        for one in &uses {
            processes.entry(&one.name).or_default().push(one);
        }
        for (name, uses) in processes {
            let minutes = milliseconds as f64 / 60_000.0;
            let mut add = |what: &str, unit, of: &dyn Fn(&Idle) -> f64| {
                let values: Vec<f64> = uses.iter().map(|idle| of(idle)).collect();
                report.add(IDLE, format!("{name}, {what}"), kind.name(), unit, &values)
            };
            let megabytes = |bytes: u64| bytes as f64 / f64::from(1 << 20);
            let resident = add("resident", " MB", &|idle| megabytes(idle.resident));
            add("resident, anonymous", " MB", &|idle| {
                megabytes(idle.anonymous)
            });
            let threads = add("threads", "", &|idle| idle.threads as f64);
            let wakeups = add("wake-ups a minute", "", &|idle| {
                idle.wakeups as f64 / minutes
            });
            add("CPU a minute", " ms", &|idle| {
                idle.cpu as f64 / 1e6 / minutes
            });
            if kind == Kind::Original {
                continue;
            }
            let mut at_most = |what: &str, measured, most, unit| {
                report.at_most(IDLE, format!("{name}, {what}"), measured, most, unit);
            };
            let most = if name == "helper" { 4.0 } else { 5.0 };
            at_most("resident", resident.median, most, " MB");
            at_most("threads", threads.max, 1.0, "");
            at_most("wake-ups a minute", wakeups.max, 0.0, "");
        }
    }
}

/// Starts it, and looks at what it uses once it has nothing to do any more.
fn idle(kind: Kind, milliseconds: u64) -> Vec<Idle> {
    let mut yard = Yard::start(kind);
    yard.order::<()>(&Order::Map {
        groups: 30,
        verdict: Mapped::Dropped,
    });
    // What starting left to be done.
    yard.order::<Vec<Idle>>(&Order::Idle { milliseconds: 500 });
    yard.order(&Order::Idle { milliseconds })
}
