//! A control group comes: when does its traffic obey, and what leaves before?

use crate::cli::Options;
use crate::order::{Kind, Mapped, Nursery, Order, Sample, Starts};
use crate::report::Report;
use crate::yard::Yard;

/// What was published of the original on this kernel, measured with another harness; microseconds.
const ORIGINAL: (f64, f64) = (665.0, 4600.0);
const LATENCY: &str = "latency";
const FIRST_SEND: &str = "first-send";

pub(super) fn latency(options: &Options, report: &mut Report) {
    let mut yards = super::yards(&[Kind::None, Kind::Floor, Kind::Ours]);
    let (rounds, count) = options.number((25, 40), (2, 5));
    let others = options.number(2000, 100);
    let mut summaries = Vec::new();
    for (groups, among) in [(0, "alone".to_owned()), (others, format!("among {others}"))] {
        for yard in &mut yards {
            yard.order::<()>(&Order::Map {
                groups,
                verdict: Mapped::Dropped,
            });
        }
        let mut samples = vec![Vec::new(); yards.len()];
        for _ in 0..rounds {
            for (yard, samples) in yards.iter_mut().zip(&mut samples) {
                samples.extend(yard.order::<Vec<Sample>>(&Order::Latency { count }));
            }
        }
        for (yard, samples) in yards.iter().zip(&samples) {
            let name = yard.kind.name();
            let mut add = |what: String, of: fn(&Sample) -> u64| {
                let micros: Vec<f64> = samples.iter().map(|s| of(s) as f64 / 1000.0).collect();
                report.add(LATENCY, what, name, " µs", &micros)
            };
            if yard.kind == Kind::None {
                add(format!("mkdir to first send, {among}"), |s| s.first);
                continue;
            }
            // How much of it is not the verdict: before the process is there, nothing shows that it is in force.
            add(format!("mkdir to first send, {among}"), |s| s.first);
            let lost = samples.iter().filter(|s| s.in_force.is_none()).count();
            assert_eq!(lost, 0, "{name}: {lost} control groups never got a verdict");
            let what = format!("mkdir to verdict in force, {among}");
            let summary = add(what, |s| s.in_force.unwrap_or(0));
            summaries.push(((yard.kind, groups), summary));
            let at_once = samples.iter().filter(|s| s.left == 0).count();
            let what = format!("first send is dropped already, {among}");
            report.add_share(LATENCY, what, name, at_once, samples.len());
        }
    }
    let of = |kind, groups| {
        let found = summaries.iter().find(|(of, _)| *of == (kind, groups));
        found.map(|(_, summary)| *summary)
    };
    let measured = |kind, groups| of(kind, groups).expect("it was measured");
    let (floor, floor_among) = (measured(Kind::Floor, 0), measured(Kind::Floor, others));
    let (ours, ours_among) = (measured(Kind::Ours, 0), measured(Kind::Ours, others));
    let (original, whose) = match of(Kind::Original, 0) {
        Some(measured) => ((measured.median, measured.nearly_all()), "the original's"),
        None => (ORIGINAL, "the original's (published)"),
    };
    report.at_most(
        LATENCY,
        format!("median, a third of {whose}"),
        ours.median,
        original.0 / 3.0,
        " µs",
    );
    report.at_most(
        LATENCY,
        format!("p99, a quarter of {whose}"),
        ours.nearly_all(),
        original.1 / 4.0,
        " µs",
    );
    report.at_most(
        LATENCY,
        "median against the floor's (to aim for)",
        ours.median / floor.median,
        1.5,
        "×",
    );
    report.at_most(
        LATENCY,
        format!("median among {others} against alone"),
        ours_among.median / ours.median,
        1.1,
        "×",
    );
    report.at_most(
        LATENCY,
        format!("p99 among {others} against alone"),
        ours_among.nearly_all() / ours.nearly_all(),
        1.1,
        "×",
    );
    report.at_most(
        LATENCY,
        format!("the floor's median among {others} against alone"),
        floor_among.median / floor.median,
        1.1,
        "×",
    );
}

pub(super) fn first_send(options: &Options, report: &mut Report) {
    let mut yards = super::yards(&[Kind::Floor, Kind::Ours, Kind::Closed]);
    let (rounds, count) = options.number((20, 100), (1, 20));
    let others = options.number(2000, 100);
    for (groups, among) in [(0, "alone".to_owned()), (others, format!("among {others}"))] {
        let mut sums = vec![Starts::default(); yards.len()];
        for yard in &mut yards {
            yard.order::<()>(&Order::Map {
                groups,
                verdict: Mapped::Dropped,
            });
        }
        // What is never to happen is looked for more often.
        let rounds_of = |kind| rounds * if kind == Kind::Closed { 5 } else { 1 };
        for round in 0..rounds_of(Kind::Closed) {
            let due = |(yard, _): &(&mut Yard, _)| round < rounds_of(yard.kind);
            for (yard, sum) in yards.iter_mut().zip(&mut sums).filter(due) {
                let nursery = Nursery::Matched;
                add(sum, yard.order(&Order::FirstSend { count, nursery }));
            }
        }
        for (yard, sum) in yards.iter().zip(sums) {
            let all = sum.left + sum.dropped;
            let share = share(report, &among, yard.kind, sum);
            let most = match yard.kind {
                Kind::Ours => 0.1,
                Kind::Closed => 0.0,
                _ => continue,
            };
            let what = format!("leaks, {}, {among}, of {all}", yard.kind.name());
            report.at_most(FIRST_SEND, what, share, most, " %");
        }
    }
    // Without a pause: nothing has to be told to the kernel.
    let (rounds, count) = options.number((100, 100), (2, 50));
    let mut sum = Starts::default();
    for _ in 0..rounds {
        let nursery = Nursery::Inherits;
        add(
            &mut sum,
            yards[1].order(&Order::FirstSend { count, nursery }),
        );
    }
    let all = sum.left + sum.dropped;
    let share = share(report, "in a slice that has the verdict", Kind::Ours, sum);
    report.at_most(
        FIRST_SEND,
        format!("leaks in a slice that has the verdict, of {all}"),
        share,
        0.0,
        " %",
    );
}

fn add(sum: &mut Starts, more: Starts) {
    sum.left += more.left;
    sum.dropped += more.dropped;
}

/// Per cent of the first packets that left.
fn share(report: &mut Report, what: &str, kind: Kind, starts: Starts) -> f64 {
    let (left, all) = (starts.left, starts.left + starts.dropped);
    report.add_share(FIRST_SEND, format!("leaks, {what}"), kind.name(), left, all)
}
