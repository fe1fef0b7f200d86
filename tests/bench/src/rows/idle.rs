//! What the daemons use when nothing happens.

use crate::cli::Options;
use crate::order::{Idle, Kind, Order};
use crate::report::Report;
use crate::yard::Yard;

const IDLE: &str = "idle";

pub(super) fn run(options: &Options, report: &mut Report) {
    let milliseconds = options.number(60_000, 1000);
    let mut yard = Yard::start(Kind::Ours);
    yard.order::<()>(&Order::Map { groups: 30 });
    // What starting left to be done.
    yard.order::<Vec<Idle>>(&Order::Idle { milliseconds: 500 });
    for process in yard.order::<Vec<Idle>>(&Order::Idle { milliseconds }) {
        let name = &process.name;
        let megabytes = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let mut add = |what: &str, unit, value: f64| {
            report.add(
                IDLE,
                format!("{name}, {what}"),
                Kind::Ours.name(),
                unit,
                &[value],
            );
        };
        let minutes = milliseconds as f64 / 60_000.0;
        let wakeups = process.wakeups as f64 / minutes;
        add("resident", " MB", megabytes(process.resident));
        add("resident, anonymous", " MB", megabytes(process.anonymous));
        add("threads", "", process.threads as f64);
        add("wake-ups a minute", "", wakeups);
        add("CPU a minute", " ms", process.cpu as f64 / 1e6 / minutes);
        let most = if name == "helper" { 4.0 } else { 5.0 };
        report.at_most(
            IDLE,
            format!("{name}, resident"),
            megabytes(process.resident),
            most,
            " MB",
        );
        report.at_most(
            IDLE,
            format!("{name}, threads"),
            process.threads as f64,
            1.0,
            "",
        );
        report.at_most(IDLE, format!("{name}, wake-ups a minute"), wakeups, 0.0, "");
    }
}
