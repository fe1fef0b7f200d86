//! `start: closed`: nothing leaves from a control group before its own verdict is in the kernel.
//!
//! CGTPROXY_TEST_STARTS says how many programs are started; 1,000 unless it does.

#![allow(clippy::expect_used, reason = "a panic is a failed test")]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use cgtproxy_tests::agent::Agent;
use cgtproxy_tests::amount;
use cgtproxy_tests::sandbox::{
    Outcome, PORTS, Sandbox, Server, Service, User, by, direct, proxied, sandbox,
};
use cgtproxy_tests::session::{Session, to_proxy, verdict};
use cgtproxy_tests::wait::wait_until;
use cgtproxy_tests::wire::{Starts, StartsReport, Transport};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

/// What is in `app.slice` itself goes direct; each application in it is decided by its name.
const CONFIG: &str = r"
version: 1
start: closed
tproxies:
  mihomo: {port: 7890}
rules:
  - {match: /app-dropped, drop: true}
  - {match: /app-proxied, tproxy: mihomo}
  - {match: /app-direct, direct: true}
";

fn count() -> u32 {
    amount::given("CGTPROXY_TEST_STARTS").unwrap_or(1000)
}

/// Starts programs whose first act is to send to these, as the user's service manager would.
fn start(user: &User, spec: &Starts) -> StartsReport {
    let spec = serde_json::to_string(spec).expect("plain data");
    let output = user.run("cgtproxy-testapp", &["starts", &spec]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    serde_json::from_slice(&output.stdout).expect("a report")
}

fn starts(user: &User, name: &str, count: u32, others: u32, to: &[SocketAddr]) -> Starts {
    Starts {
        parent: user.cgroup("app.slice").directory(),
        name: name.to_owned(),
        count,
        others,
        to: to.to_vec(),
        insist: false,
    }
}

#[track_caller]
fn assert_nothing_left(sb: &Sandbox, to: &[SocketAddr]) {
    for to in to {
        sb.assert_nothing_left_for(to.ip());
    }
}

fn percentile(times: &mut [u64], part: usize) -> u64 {
    times.sort_unstable();
    times
        .get(times.len() * part / 100)
        .copied()
        .unwrap_or_default()
}

#[test]
fn no_packet_leaves_before_its_verdict() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let _agent = user.agent(CONFIG).start();
        let count = count();
        let to = sb.destinations();
        let report = start(&user, &starts(&user, "app-dropped", count, 2000, &to));
        // Each of them has tried, twice, and been refused.
        assert_eq!(report.refused, u64::from(count) * 2);
        assert_nothing_left(sb, &to);
        // What is to be proxied goes to the proxy once it is released, and never past it.
        let to = sb.destinations();
        let mut insisting = starts(&user, "app-proxied", count / 10, 0, &to);
        insisting.insist = true;
        let mut report = start(&user, &insisting);
        assert_nothing_left(sb, &to);
        let (half, most) = (
            percentile(&mut report.microseconds, 50),
            percentile(&mut report.microseconds, 99),
        );
        println!("from mkdir to the first packet through the proxy: p50 {half} µs, p99 {most} µs");
        // The slice itself is not held, nor is what is there and known.
        let inner = user.cgroup("app.slice").app();
        let known = user.cgroup("app.slice/app-proxied.scope").app();
        Agent::of(&user).wait_for_verdict(&user.cgroup("app.slice/app-proxied.scope"), "mihomo");
        for to in sb.destinations() {
            assert_eq!(inner.udp(to), direct(to));
            assert_eq!(known.tcp(to), proxied("mihomo", to));
        }
    });
}

#[test]
fn an_open_start_is_what_lets_packets_out() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let agent = user.agent(&CONFIG.replace("closed", "open")).start();
        let to = sb.destinations();
        // Without news of what starts, the agent is as late as it can be.
        let pid = Pid::from_raw(agent.pid() as i32);
        kill(pid, Signal::SIGSTOP).expect("it runs");
        let report = start(&user, &starts(&user, "app-dropped", 10, 0, &to));
        assert_eq!(report.refused, 0);
        for to in to {
            // Ten datagrams, ten times the beginning of a connection.
            let left = sb.deliveries(to.ip());
            let packets = |number| {
                let of_it = left.iter().filter(|delivery| delivery.protocol == number);
                of_it.map(|delivery| delivery.packets).sum::<u64>()
            };
            assert_eq!(packets(17), 10, "{left:?}");
            assert!(packets(6) >= 10, "{left:?}");
        }
    });
}

#[test]
fn an_agent_that_is_late_or_gone_lets_nothing_out() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let mut agent = user.agent(CONFIG).start();
        let to = sb.destinations();
        kill(Pid::from_raw(agent.pid() as i32), Signal::SIGSTOP).expect("it runs");
        for name in ["app-direct", "app-proxied", "app-anything"] {
            let report = start(&user, &starts(&user, name, 10, 0, &to));
            assert_eq!(report.refused, 20);
        }
        agent.kill();
        let report = start(&user, &starts(&user, "app-direct", 10, 0, &to));
        assert_eq!(report.refused, 20);
        assert_nothing_left(sb, &to);
        // The next one releases what it finds.
        let early = user.cgroup("app.slice/app-direct.scope").app();
        let [held, _] = sb.destinations();
        assert!(early.udp(held).is_dropped());
        agent.start_again();
        Agent::of(&user).wait_for_verdict(&user.cgroup("app.slice/app-direct.scope"), "direct");
        assert_eq!(early.udp(held), direct(held));
    });
}

/// What an application sees of it.
#[test]
fn a_connection_that_was_held_is_made_when_it_is_released() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let agent = user.agent(CONFIG).start();
        let pid = Pid::from_raw(agent.pid() as i32);
        kill(pid, Signal::SIGSTOP).expect("it runs");
        let early = user.cgroup("app.slice/app-direct.scope").app();
        let [to, other] = sb.destinations();
        assert_eq!(early.udp(other), Outcome::Forbidden);
        sb.assert_nothing_left_for(other.ip());
        let tally = std::thread::scope(|scope| {
            let begun = Instant::now();
            let connecting = scope.spawn(|| early.burst(Transport::Tcp, to, 1));
            // The first packet has been sent, and dropped, when its socket is waiting for an answer.
            wait_until("a connection to be tried", || {
                sb.run(&["ss", "-Htn", "state", "syn-sent"])
                    .contains(&PORTS[0].to_string())
            });
            sb.assert_nothing_left_for(to.ip());
            kill(pid, Signal::SIGCONT).expect("it is there");
            let tally = connecting.join().expect("it ends");
            println!("a connection that was held took {:?}", begun.elapsed());
            // The kernel tries again after 1, 3 and 7 s: who needs a fourth attempt was held when the verdict was there.
            assert!(begun.elapsed() < Duration::from_secs(15));
            tally
        });
        assert_eq!((tally.direct, tally.total()), (1, 1));
    });
}

#[test]
fn what_always_inherits_is_not_held_and_needs_no_transaction() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let config = "version: 1\nstart: closed\ntproxies: {mihomo: {port: 7890}}\nrules:\n\
                      - {match: '^/user\\.slice/user-\\d+\\.slice/user@\\d+\\.service/background\\.slice/', drop: true}\n\
                      - {match: '/app\\.slice', tproxy: mihomo}\n";
        let agent = user.agent(config).start();
        let before = Agent::of(&user).generation();
        kill(Pid::from_raw(agent.pid() as i32), Signal::SIGSTOP).expect("it runs");
        // Nobody has to hear of it.
        let app = user.cgroup("app.slice/app-new.scope").app();
        for to in sb.destinations() {
            assert_eq!(app.udp(to), proxied("mihomo", to));
        }
        let held = user.cgroup("background.slice/b.service").app();
        let [to, _] = sb.destinations();
        assert!(held.udp(to).is_dropped());
        kill(Pid::from_raw(agent.pid() as i32), Signal::SIGCONT).expect("it is there");
        let mut agent = Agent::of(&user);
        agent.wait_for_verdict(&user.cgroup("background.slice/b.service"), "drop");
        // One transaction for the slice and the service in it, at most two; none for the application.
        assert!(agent.generation() - before <= 2);
    });
}

#[test]
fn too_many_control_groups_stay_held_and_the_status_says_why() {
    sandbox(|sb| {
        let _helper = sb.helper().config("limits: {control-groups: 6}").start();
        let user = sb.user(1001);
        let _agent = user.agent(CONFIG).start();
        let apps: Vec<_> = (0..6)
            .map(|number| {
                user.cgroup(format!("app.slice/app-direct-{number}.scope"))
                    .app()
            })
            .collect();
        let mut agent = Agent::of(&user);
        wait_until("the agent to say so", || {
            let problem = agent.status()["problem"].to_string();
            problem.contains("start: closed") && problem.contains("no more than 6")
        });
        let held = apps.iter().filter(|app| {
            let [to, _] = sb.destinations();
            app.udp(to).is_dropped()
        });
        assert!(held.count() > 0);
        // The helper holds what it took.
        let session = Session::of(&user).status();
        assert_eq!(session["session"], json!("active"));
    });
}

/// The machine's policy: everything goes to a proxy, where nobody says otherwise.
fn company(sb: &Sandbox) -> Session {
    let mut root = Session::of(&sb.user(0));
    root.replace(
        json!([{ "name": "company", "port": 7891 }]),
        json!([]),
        json!([to_proxy("", "company")]),
    );
    root
}

#[test]
fn what_no_rule_decides_goes_the_machines_way_once_it_is_released() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let _company = sb.tproxy("company").uid(0).port(7891).start();
        let _root = company(sb);
        let user = sb.user(1001);
        let _agent = user.agent(CONFIG).start();
        for path in ["app.slice", "app.slice/app-anything.scope"] {
            let cgroup = user.cgroup(path);
            let app = cgroup.app();
            Agent::of(&user).wait_for_verdict(&cgroup, "direct");
            sb.expect(&app, by("company"));
        }
        // Which is something else than what a rule has go direct.
        let cgroup = user.cgroup("app.slice/app-direct.scope");
        let app = cgroup.app();
        Agent::of(&user).wait_for_verdict(&cgroup, "direct");
        sb.expect(&app, direct);
    });
}

#[test]
fn what_goes_direct_by_a_rule_does_not_go_the_machines_way_first() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let _company = sb.tproxy("company").uid(0).port(7891).start();
        let _root = company(sb);
        let user = sb.user(1001);
        let config = "version: 1\nstart: closed\nrules: [{match: /app-direct, direct: true}]\n";
        let agent = user.agent(config).start();
        let pid = Pid::from_raw(agent.pid() as i32);
        kill(pid, Signal::SIGSTOP).expect("it runs");
        let cgroup = user.cgroup("app.slice/app-direct.scope");
        let app = cgroup.app();
        sb.expect_dropped(&app);
        kill(pid, Signal::SIGCONT).expect("it is there");
        Agent::of(&user).wait_for_verdict(&cgroup, "direct");
        sb.expect(&app, direct);
    });
}

/// The machine's agent, and a user whose own policy has everything go direct.
struct Machine {
    user: User,
    agent: Service,
    _session: Session,
    _company: Server,
    _helper: Service,
}

impl Machine {
    fn start(sb: &Sandbox, rules: &str) -> Self {
        let helper = sb.helper().start();
        let company = sb.tproxy("company").uid(0).port(7891).start();
        let user = sb.user(1001);
        let mut session = Session::of(&user);
        session.replace(json!([]), json!([]), json!([verdict("", "direct")]));
        let config = format!(
            "version: 1\nstart: closed\ntproxies: {{company: {{port: 7891}}}}\nrules: [{rules}]\n"
        );
        let agent = sb.user(0).agent(&config).argument("--system").start();
        Self {
            user,
            agent,
            _session: session,
            _company: company,
            _helper: helper,
        }
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.agent.pid() as i32), signal).expect("it is there");
    }

    /// An application that starts while the agent stands still is held, though its user's own verdict is in the
    /// kernel. What becomes of it then.
    #[track_caller]
    fn holds(&self, sb: &Sandbox, name: &str, then: impl Fn(SocketAddr) -> Outcome) {
        self.signal(Signal::SIGSTOP);
        let app = self.user.cgroup(format!("app.slice/{name}.scope")).app();
        sb.expect_dropped(&app);
        self.signal(Signal::SIGCONT);
        wait_until("it to be decided about", || {
            let [to, _] = sb.destinations();
            app.udp(to) == then(to)
        });
        sb.expect(&app, then);
    }
}

#[test]
fn what_may_be_enforced_is_held_before_its_user_has_a_say() {
    sandbox(|sb| {
        let machine = Machine::start(
            sb,
            "{match: /app-taken, tproxy: company, enforce: true}, {match: /app-asked, tproxy: company}",
        );
        machine.holds(sb, "app-taken", |to| proxied("company", to));
        // Whoever it turns out not to be about, too.
        machine.holds(sb, "app-asked", direct);
        machine.holds(sb, "app-other", direct);
        // Who is there already is not held.
        sb.expect(&machine.user.cgroup("app.slice").app(), direct);
    });
}

#[test]
fn what_is_enforced_and_what_is_not_are_not_the_same_verdict() {
    sandbox(|sb| {
        let machine = Machine::start(
            sb,
            "{match: /app-taken, tproxy: company, enforce: true}, {match: '', tproxy: company}",
        );
        machine.holds(sb, "app-taken", |to| proxied("company", to));
        sb.expect(&machine.user.cgroup("app.slice").app(), direct);
    });
}

#[test]
fn what_its_user_decides_again_is_held_until_that_is_so() {
    sandbox(|sb| {
        let machine = Machine::start(
            sb,
            "{match: /app-free, tproxy: company}, {match: '', tproxy: company, enforce: true}",
        );
        machine.holds(sb, "app-free", direct);
        let slice = machine.user.cgroup("app.slice").app();
        sb.expect(&slice, by("company"));
    });
}

#[test]
fn what_nothing_is_enforced_about_is_its_users() {
    sandbox(|sb| {
        let machine = Machine::start(sb, "{match: /app-asked, tproxy: company}");
        machine.signal(Signal::SIGSTOP);
        for name in ["app-asked", "app-other"] {
            let app = machine.user.cgroup(format!("app.slice/{name}.scope")).app();
            sb.expect(&app, direct);
        }
        // Who has no policy is held.
        let other = sb.user(1002).cgroup("app.slice/app-asked.scope").app();
        sb.expect_dropped(&other);
        machine.signal(Signal::SIGCONT);
        wait_until("it to be decided about", || {
            let [to, _] = sb.destinations();
            other.udp(to) == proxied("company", to)
        });
    });
}
