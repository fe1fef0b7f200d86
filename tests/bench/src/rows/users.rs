//! Many users, and one who means harm.

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
    let mut none = Yard::start(Kind::None);
    let crowded = format!("one of {users}");
    let [mut alone, mut crowd] =
        [(1, "the only user"), (users, &*crowded)].map(|(users, whose)| {
            let mut yard = Yard::start(Kind::Ours);
            yard.order::<()>(&Order::Users { users, groups });
            User {
                whose,
                yard,
                updates: Vec::new(),
                added: Vec::new(),
            }
        });
    for sender in 0..rounds {
        let packets = Order::Packets {
            place: Place::Direct,
            blocks,
            sender,
        };
        let without = median(&none.order::<Vec<f64>>(&packets));
        for user in [&mut alone, &mut crowd] {
            let updates: Vec<f64> = user.yard.order(&Order::Updates { count });
            user.updates.extend(updates);
            let costs: Vec<f64> = user.yard.order(&packets);
            user.added.push(median(&costs) - without);
        }
    }
    let [alone_takes, crowd_takes] = [&alone, &crowd].map(|user| {
        let mut add = |what: &str, unit, samples| {
            let what = format!("{what}, {}", user.whose);
            report
                .add(USERS, what, Kind::Ours.name(), unit, samples)
                .median
        };
        let update = add("update", " µs", &user.updates);
        let packet = "added: packet of a direct application";
        (update, add(packet, " ns", &user.added))
    });
    let what = format!("median of updates, {crowded} against alone");
    report.at_most(USERS, what, crowd_takes.0 / alone_takes.0, 2.0, "×");
    let what = format!("added to a packet, {crowded} against alone");
    report.at_most(USERS, what, crowd_takes.1 / alone_takes.1, 1.1, "×");
    for process in crowd.yard.order::<Vec<Idle>>(&Order::Use) {
        if process.name == "helper" {
            let resident = process.resident as f64 / f64::from(1 << 20);
            let what = format!("helper's memory, {users} users with {groups} control groups each");
            report.add(USERS, &*what, Kind::Ours.name(), " MB", &[resident]);
            report.at_most(USERS, what, resident, 64.0, " MB");
        }
    }
}

/// A user, alone or among many.
struct User<'a> {
    whose: &'a str,
    yard: Yard,
    updates: Vec<f64>,
    added: Vec<f64>,
}

/// Whoever floods has 20 seconds' worth of calls at first, which the first round uses up, and then as many as the limit
/// lets by. With the highest limit each round is a flood.
pub(super) fn flood(options: &Options, report: &mut Report) {
    let (rounds, count) = options.number((15, 40), (1, 10));
    let mut floods = [Kind::Ours, Kind::Unlimited].map(|kind| Flooded {
        yard: Yard::start(kind),
        updates: Vec::new(),
        rates: Vec::new(),
    });
    for Flooded { yard, .. } in &mut floods {
        let (users, groups) = (1, 50);
        yard.order::<()>(&Order::Users { users, groups });
    }
    let updates = Order::Updates { count };
    let mut quiet = Vec::new();
    for _ in 0..rounds {
        for flooded in &mut floods {
            quiet.extend(flooded.yard.order::<Vec<f64>>(&updates));
            flooded.yard.order::<()>(&Order::BeginFlood);
            let times: Vec<f64> = flooded.yard.order(&updates);
            flooded.updates.extend(times);
            flooded.rates.push(flooded.yard.order(&Order::EndFlood));
        }
    }
    let on = Kind::Ours.name();
    let quiet = report.add(FLOOD, "update, quiet", on, " µs", &quiet);
    for Flooded {
        yard,
        updates,
        rates,
    } in &floods
    {
        let on = yard.kind.name();
        let what = "calls of the flood answered a second";
        let rate = report.add(FLOOD, what, on, "", rates);
        assert!(rate.min > 0.0, "the flood did not reach the helper");
        let what = "update, while another user floods";
        let flooded = report.add(FLOOD, what, on, " µs", updates);
        let what = match yard.kind {
            Kind::Unlimited => "p99 of updates, flooded without a limit against quiet",
            _ => "p99 of updates, flooded against quiet",
        };
        report.at_most(
            FLOOD,
            what,
            flooded.nearly_all() / quiet.nearly_all(),
            3.0,
            "×",
        );
    }
}

/// A machine on which one user floods, now and then.
struct Flooded {
    yard: Yard,
    /// What another user's updates took meanwhile.
    updates: Vec<f64>,
    rates: Vec<f64>,
}
