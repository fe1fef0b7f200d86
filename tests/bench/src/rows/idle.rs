//! What the daemons use when nothing happens.

use crate::cli::Options;
use crate::order::{Idle, Kind, Mapped, Order};
use crate::report::Report;
use crate::yard::Yard;

const IDLE: &str = "idle";

pub(super) fn run(options: &Options, report: &mut Report) {
    let milliseconds = options.number(60_000, 1000);
    for kind in [Kind::Ours].into_iter().chain(super::original()) {
        let mut yard = Yard::start(kind);
        yard.order::<()>(&Order::Map {
            groups: 30,
            verdict: Mapped::Dropped,
        });
        // What starting left to be done.
        yard.order::<Vec<Idle>>(&Order::Idle { milliseconds: 500 });
        for process in yard.order::<Vec<Idle>>(&Order::Idle { milliseconds }) {
            let name = &process.name;
            let megabytes = |bytes: u64| bytes as f64 / f64::from(1 << 20);
            let minutes = milliseconds as f64 / 60_000.0;
            let wakeups = process.wakeups as f64 / minutes;
            let resident = megabytes(process.resident);
            let threads = process.threads as f64;
            let mut add = |what: &str, unit, value: f64| {
                report.add(IDLE, format!("{name}, {what}"), kind.name(), unit, &[value]);
            };
            add("resident", " MB", resident);
            add("resident, anonymous", " MB", megabytes(process.anonymous));
            add("threads", "", threads);
            add("wake-ups a minute", "", wakeups);
            add("CPU a minute", " ms", process.cpu as f64 / 1e6 / minutes);
            if kind == Kind::Original {
                continue;
            }
            let mut at_most = |what: &str, measured, most, unit| {
                report.at_most(IDLE, format!("{name}, {what}"), measured, most, unit);
            };
            let most = if name == "helper" { 4.0 } else { 5.0 };
            at_most("resident", resident, most, " MB");
            at_most("threads", threads, 1.0, "");
            at_most("wake-ups a minute", wakeups, 0.0, "");
        }
    }
}
