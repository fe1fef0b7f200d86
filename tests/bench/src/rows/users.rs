//! Many users, and one who means harm.

use std::time::Instant;

use crate::cli::Options;
use crate::order::{Idle, Kind, Order, Place};
use crate::report::Report;
use crate::stats::median;
use crate::yard::Yard;

const USERS: &str = "users";
const FLOOD: &str = "flood";

pub(super) fn many(options: &Options, report: &mut Report) {
    let users = options.number(1000, 20);
    let groups = 50;
    let (rounds, count, blocks) = options.number((20, 50, 100), (1, 10, 20));
    let mut alone = Yard::start(Kind::Ours);
    let mut crowd = Yard::start(Kind::Ours);
    alone.order::<()>(&Order::Users { users: 1, groups });
    crowd.order::<()>(&Order::Users { users, groups });
    let crowded = format!("one of {users}");
    let (mut times, mut costs) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    for round in 0..rounds {
        for (n, yard) in [&mut alone, &mut crowd].into_iter().enumerate() {
            times[n].extend(yard.order::<Vec<f64>>(&Order::Updates { count }));
            let packets = Order::Packets {
                place: Place::Direct,
                blocks,
                sender: round,
            };
            let blocks: Vec<f64> = yard.order(&packets);
            costs[n].push(median(&blocks));
        }
    }
    let mut summaries = Vec::new();
    for (n, what) in ["the only user", &crowded].into_iter().enumerate() {
        let on = Kind::Ours.name();
        summaries.push(report.add(USERS, format!("update, {what}"), on, " µs", &times[n]));
        report.add(
            USERS,
            format!("packet of a direct application, {what}"),
            on,
            " ns",
            &costs[n],
        );
    }
    let ratio = summaries[1].median / summaries[0].median;
    report.at_most(
        USERS,
        format!("median of updates, {crowded} against alone"),
        ratio,
        2.0,
        "×",
    );
    let ratio = median(&costs[1]) / median(&costs[0]);
    report.at_most(
        USERS,
        format!("packet, {crowded} against alone"),
        ratio,
        1.1,
        "×",
    );
    for process in crowd.order::<Vec<Idle>>(&Order::Use) {
        if process.name == "helper" {
            let resident = process.resident as f64 / f64::from(1 << 20);
            let what = format!("helper's memory, {users} users with {groups} control groups each");
            report.add(USERS, &*what, Kind::Ours.name(), " MB", &[resident]);
            report.at_most(USERS, what, resident, 64.0, " MB");
        }
    }
}

pub(super) fn flood(options: &Options, report: &mut Report) {
    // Whoever floods has 20 seconds' worth of calls at first, and then as many as the limit lets by.
    for kind in [Kind::Ours, Kind::Unlimited] {
        flood_one(options, report, kind);
    }
}

fn flood_one(options: &Options, report: &mut Report, kind: Kind) {
    let (rounds, count) = options.number((15, 40), (1, 10));
    let mut yard = Yard::start(kind);
    yard.order::<()>(&Order::Users {
        users: 1,
        groups: 50,
    });
    let (mut quiet, mut flooded, mut rates) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        quiet.extend(yard.order::<Vec<f64>>(&Order::Updates { count }));
        yard.order::<u64>(&Order::Flood { on: true });
        let start = Instant::now();
        flooded.extend(yard.order::<Vec<f64>>(&Order::Updates { count }));
        let lasted = start.elapsed().as_secs_f64();
        let answered: u64 = yard.order(&Order::Flood { on: false });
        assert!(answered > 0, "the flood did not reach the helper");
        rates.push(answered as f64 / lasted);
    }
    let on = kind.name();
    report.add(
        FLOOD,
        "calls of the flood answered a second",
        on,
        "",
        &rates,
    );
    let quiet = report.add(FLOOD, "update, quiet", on, " µs", &quiet);
    let flooded = report.add(
        FLOOD,
        "update, while another user floods",
        on,
        " µs",
        &flooded,
    );
    let ratio = flooded.p99 / quiet.p99;
    report.at_most(
        FLOOD,
        match kind {
            Kind::Unlimited => "p99 of updates, flooded without a limit against quiet",
            _ => "p99 of updates, flooded against quiet",
        },
        ratio,
        3.0,
        "×",
    );
}
