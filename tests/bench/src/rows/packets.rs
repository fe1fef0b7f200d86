//! What a packet costs, beside what it costs without any ruleset.

use crate::cli::Options;
use crate::order::{Kind, Mapped, Order, Place};
use crate::report::Report;
use crate::stats::median;
use crate::yard::Yard;

const PACKETS: &str = "packets";

/// One line of the comparison.
struct Case {
    what: String,
    kind: Kind,
    /// Which of the yards.
    yard: usize,
    place: Place,
    /// One median for each round, and what of it is more than without a ruleset.
    costs: Vec<f64>,
    added: Vec<f64>,
    at: Option<f64>,
}

/// Where packets are sent from, and what that is called.
const PLACES: [(Place, &str); 3] = [
    (Place::Direct, "direct application"),
    (Place::Unmatched, "unmatched application"),
    (Place::NoSession, "no session"),
];

/// The yards.
const NONE: usize = 0;
const CONNTRACK: usize = 1;
const LAYOUT: usize = 2;
const OURS: usize = 3;
const LAYOUT_MANY: usize = 4;
const OURS_MANY: usize = 5;
const DROPPING: usize = 6;
const DROPPING_MANY: usize = 7;
const DROPPING_DEEP: usize = 8;

pub(super) fn run(options: &Options, report: &mut Report) {
    let few = 10;
    let many = options.number(10_000, 200);
    let (senders, rounds, blocks) = options.number((20, 25, 8), (2, 2, 8));
    let mut yards = [
        Kind::None,
        Kind::Conntrack,
        Kind::Layout,
        Kind::Ours,
        Kind::Layout,
        Kind::Ours,
        Kind::Ours,
        Kind::Ours,
        Kind::Ours,
    ]
    .map(Yard::start);
    let mut cases = Vec::new();
    let mut case = |what: String, yard: usize, place, at| {
        cases.push(Case {
            what,
            kind: yards[yard].kind,
            yard,
            place,
            costs: Vec::new(),
            added: Vec::new(),
            at,
        });
    };
    for yard in [NONE, CONNTRACK] {
        case("any application".into(), yard, Place::NoSession, None);
    }
    for (groups, pair) in [(few, [LAYOUT, OURS]), (many, [LAYOUT_MANY, OURS_MANY])] {
        for yard in pair {
            for (place, name) in PLACES {
                let what = format!("{name}, {groups} control groups");
                case(what, yard, place, Some(groups as f64));
            }
        }
    }
    for (groups, yard) in [(few, DROPPING), (many, DROPPING_MANY)] {
        for (place, name) in PLACES {
            let what = format!("{name}, {groups} control groups that are dropped");
            case(what, yard, place, None);
        }
    }
    let deep = format!("direct application at level 12, {few} control groups that are dropped");
    case(deep, DROPPING_DEEP, Place::DirectDeep, None);
    for (yard, groups, verdict) in [
        (LAYOUT, few, Mapped::Proxied),
        (OURS, few, Mapped::Proxied),
        (LAYOUT_MANY, many, Mapped::Proxied),
        (OURS_MANY, many, Mapped::Proxied),
        (DROPPING, few, Mapped::Dropped),
        (DROPPING_MANY, many, Mapped::Dropped),
        (DROPPING_DEEP, few, Mapped::Dropped),
    ] {
        yards[yard].order::<()>(&Order::Map { groups, verdict });
    }

    // Many short rounds, so that what is compared is near in time; and several processes for each case, since where
    // its memory happens to be makes one slower than another by more than a chain costs.
    for sender in 0..senders {
        for _ in 0..rounds {
            for case in &mut cases {
                let packets = Order::Packets {
                    place: case.place,
                    blocks,
                    sender,
                };
                let costs: Vec<f64> = yards[case.yard].order(&packets);
                case.costs.push(median(&costs));
            }
        }
    }
    let none = cases[0].costs.clone();
    for case in &mut cases {
        let costs = case.costs.iter().zip(&none);
        case.added = costs.map(|(cost, none)| cost - none).collect();
    }
    for case in &cases {
        if case.kind == Kind::None {
            report.add(PACKETS, &case.what, case.kind.name(), " ns", &case.costs);
        } else {
            let what = format!("added: {}", case.what);
            report.add_at(PACKETS, what, case.kind.name(), " ns", &case.added, case.at);
        }
    }
    targets(report, &cases, many);
}

fn targets(report: &mut Report, cases: &[Case], many: usize) {
    let added = |yard: usize, place: Place| {
        let case = cases.iter().find(|c| (c.yard, c.place) == (yard, place));
        median(&case.expect("it was measured").added)
    };
    let conntrack = added(CONNTRACK, Place::NoSession);
    for (place, name) in PLACES {
        let theirs = added(LAYOUT, place);
        let mut against = |ours: f64, name: &str| {
            let what = format!("{name}, against the original's layout");
            report.at_most(PACKETS, what, ours / theirs, 0.5, "×");
            let what = format!("{name}, beyond conntrack");
            let ratio = (ours - conntrack) / (theirs - conntrack);
            report.at_most(PACKETS, what, ratio, 1.0 / 3.0, "×");
        };
        against(added(OURS, place), name);
        let dropping = added(DROPPING, place);
        against(dropping, &format!("{name} while others are dropped"));
        // Where nothing is dropped, packets of open connections look nothing up.
        let what = format!("{name} while others are dropped, {many} control groups against 10");
        let ratio = added(DROPPING_MANY, place) / dropping;
        report.at_most(PACKETS, what, ratio, 1.1, "×");
    }
    let [deep, level_5] = [
        (DROPPING_DEEP, Place::DirectDeep),
        (DROPPING, Place::Direct),
    ]
    .map(|(yard, place)| added(yard, place));
    let what = "level 12 against level 5 while others are dropped";
    report.at_most(PACKETS, what, deep / level_5, 1.1, "×");
}
