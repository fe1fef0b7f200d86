//! What cgtproxy-relay costs an application that could have spoken SOCKS5 itself.

use crate::cli::Options;
use crate::order::{Cores, Held, Kind, Order, Task, Way};
use crate::report::Report;
use crate::stats::median;
use crate::yard::Yard;

const SOCKS: &str = "socks";

/// How many connections the relay takes.
const CONNECTIONS: usize = 8192;

/// One line of the comparison: samples for each of the yards.
struct Case {
    what: &'static str,
    unit: &'static str,
    cores: Cores,
    task: Task,
    samples: [Vec<f64>; 3],
}

pub(super) fn run(options: &Options, report: &mut Report) {
    let (rounds, bytes) = options.number((15, 512 << 20), (1, 8 << 20));
    let (count, datagrams) = options.number((300, 40_000), (20, 500));
    let mut yards = [
        (Yard::start(Kind::None), Way::Spoken),
        (Yard::start(Kind::Relay), Way::Carried),
        (Yard::start(Kind::Ours), Way::Carried),
    ];
    let bulk = Task::Bulk { bytes };
    let requests = Task::Requests { count };
    let rush = Task::Rush { count: 8 * count };
    let datagrams = Task::Datagrams { count: datagrams };
    let case = |what, unit, cores, task| Case {
        what,
        unit,
        cores,
        task,
        samples: Default::default(),
    };
    let mut cases = [
        case("bulk, a core for the relay", " MB/s", Cores::Apart, bulk),
        case("bulk, one core for all", " MB/s", Cores::One, bulk),
        case("connect, ask, answer", " µs", Cores::All, requests),
        case(
            "connect, ask, answer, one core for all",
            " µs",
            Cores::One,
            requests,
        ),
        case("connections a second, 16 at once", "", Cores::All, rush),
        case(
            "datagrams there and back a second, 16 flows",
            "",
            Cores::All,
            datagrams,
        ),
    ];
    for _ in 0..rounds {
        for case in &mut cases {
            let (cores, task) = (case.cores, case.task);
            for ((yard, way), samples) in yards.iter_mut().zip(&mut case.samples) {
                // The TPROXY server knows TCP alone.
                if matches!(task, Task::Datagrams { .. }) && yard.kind == Kind::Ours {
                    continue;
                }
                let way = *way;
                samples.extend(yard.order::<Vec<f64>>(&Order::Errand { way, cores, task }));
            }
        }
    }
    for case in &cases {
        for (samples, (yard, _)) in case.samples.iter().zip(&yards) {
            let name = match yard.kind {
                Kind::None => "SOCKS5 by the application",
                Kind::Ours => "a TPROXY server that speaks SOCKS5",
                kind => kind.name(),
            };
            if !samples.is_empty() {
                report.add(SOCKS, case.what, name, case.unit, samples);
            }
        }
        targets(report, case);
    }
    drop(yards);
    memory(options, report);
}

/// What the relay uses with as many connections as it takes.
fn memory(options: &Options, report: &mut Report) {
    let connections = options.number(CONNECTIONS, 100);
    let megabytes = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    // As docs/how-it-works.md has it.
    let bound = 16.0 + 40.0 * connections as f64 / 1024.0;
    for (stuck, what) in [(false, "idle"), (true, "with slow readers at both ends")] {
        let held: Held = Yard::start(Kind::Relay).order(&Order::Hold { connections, stuck });
        let what = format!("{connections} open connections, {what}");
        let name = Kind::Relay.name();
        for (kind, bytes) in [
            ("resident", held.resident),
            ("resident, anonymous", held.anonymous),
        ] {
            let what = format!("{what}, {kind}");
            report.add(SOCKS, what, name, " MB", &[megabytes(bytes)]);
        }
        report.at_most(
            SOCKS,
            format!("{what}, resident"),
            megabytes(held.resident),
            bound,
            " MB",
        );
    }
}

fn targets(report: &mut Report, case: &Case) {
    let [spoken, relay, tproxy] = [0, 1, 2].map(|n| median(&case.samples[n]));
    match case.task {
        Task::Bulk { .. } => {
            let what = format!("{}, against SOCKS5 by the application", case.what);
            report.at_least(SOCKS, what, relay / spoken, 0.8, "×");
        }
        Task::Requests { .. } => {
            let what = format!("{}, more than SOCKS5 by the application", case.what);
            report.at_most(SOCKS, what, relay - spoken, 150.0, " µs");
        }
        Task::Rush { .. } => {
            let what = format!("{}, against the TPROXY server", case.what);
            report.at_least(SOCKS, what, relay / tproxy, 1.0, "×");
        }
        Task::Datagrams { .. } | Task::Hold { .. } => {}
    }
}
