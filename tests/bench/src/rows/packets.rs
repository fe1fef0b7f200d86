//! What a packet costs, beside what it costs without any ruleset.

use crate::cli::Options;
use crate::order::{Kind, Order, Place};
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

pub(super) fn run(options: &Options, report: &mut Report) {
    let many = options.number(10_000, 200);
    let (rounds, blocks) = options.number((40, 150), (3, 20));
    let mut yards = vec![
        Yard::start(Kind::None),
        Yard::start(Kind::Conntrack),
        Yard::start(Kind::Layout),
        Yard::start(Kind::Ours),
        Yard::start(Kind::Layout),
        Yard::start(Kind::Ours),
        Yard::start(Kind::Ours),
    ];
    let apps = [
        (Place::Direct, "direct application"),
        (Place::Unmatched, "unmatched application"),
        (Place::NoSession, "no session"),
    ];
    let mut cases = Vec::new();
    let mut case = |what: String, yards: &[Yard], yard: usize, place, at| {
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
    case("any application".into(), &yards, 0, Place::NoSession, None);
    case("any application".into(), &yards, 1, Place::NoSession, None);
    for (groups, first) in [(10, 2), (many, 4)] {
        for yard in [first, first + 1] {
            yards[yard].order::<()>(&Order::Map { groups });
            for (place, name) in apps {
                let what = format!("{name}, {groups} control groups");
                case(what, &yards, yard, place, Some(groups as f64));
            }
        }
    }
    yards[6].order::<()>(&Order::Map { groups: 10 });
    case(
        "direct application at level 12".into(),
        &yards,
        6,
        Place::DirectDeep,
        None,
    );

    for _ in 0..rounds {
        let mut none = f64::NAN;
        for case in &mut cases {
            let place = case.place;
            let costs: Vec<f64> = yards[case.yard].order(&Order::Packets { place, blocks });
            let cost = median(&costs);
            if case.kind == Kind::None {
                none = cost;
            }
            case.costs.push(cost);
            case.added.push(cost - none);
        }
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
    let added = |kind: Kind, place: Place, at: Option<f64>| {
        let case = cases
            .iter()
            .find(|c| (c.kind, c.place, c.at) == (kind, place, at));
        median(&case.expect("it was measured").added)
    };
    let conntrack = added(Kind::Conntrack, Place::NoSession, None);
    for (place, name) in [
        (Place::Direct, "direct application"),
        (Place::Unmatched, "unmatched application"),
        (Place::NoSession, "no session"),
    ] {
        let few = Some(10.0);
        let (ours, theirs) = (
            added(Kind::Ours, place, few),
            added(Kind::Layout, place, few),
        );
        report.at_most(
            PACKETS,
            format!("{name}, against the original's layout"),
            ours / theirs,
            0.5,
            "×",
        );
        let ratio = (ours - conntrack) / (theirs - conntrack);
        report.at_most(
            PACKETS,
            format!("{name}, beyond conntrack"),
            ratio,
            1.0 / 3.0,
            "×",
        );
        let ratio = added(Kind::Ours, place, Some(many as f64)) / ours;
        report.at_most(
            PACKETS,
            format!("{name}, {many} control groups against 10"),
            ratio,
            1.1,
            "×",
        );
    }
    let deep = added(Kind::Ours, Place::DirectDeep, None);
    let flat = added(Kind::Ours, Place::Direct, Some(10.0));
    report.at_most(PACKETS, "level 12 against level 5", deep / flat, 1.1, "×");
}
