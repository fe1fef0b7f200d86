//! A user who wants to harm: whatever they send, everybody else keeps what is theirs, and the helper its
//! bounds.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a panic is a failed test"
)]

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use cgtproxy_tests::agent::Agent;
use cgtproxy_tests::sandbox::{Sandbox, direct, proxied, sandbox};
use cgtproxy_tests::session::{SOCKET, Session, mapped_ids, mapped_ids_now, to_proxy, verdict};
use cgtproxy_tests::steady::Steady;
use cgtproxy_tests::wait::wait_until;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// How many connections one user may have unless the administrator says otherwise.
const CONNECTIONS: usize = 16;

/// How often the quiet user changes something while the other one is loud.
const ROUNDS: usize = 8;

/// A call that everybody may make.
const STATUS: &str = "org.cgtproxy.Helper.GetStatus";

const LOUD: u32 = 1001;
const QUIET: u32 = 1002;

/// What docs/security.md says that the helper's memory stays below while one user holds half a message open, in
/// KiB.
const MEMORY: u64 = (64 + 8) * 1024;

/// Tells threads to end once it is dropped, a failed test's too: a scope waits for them.
struct EndOf<'a>(&'a AtomicBool);

impl Drop for EndOf<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The most memory that a process has ever had, in KiB.
fn peak(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    number.and_then(|kib| kib.parse().ok()).expect("a number")
}

/// The quiet user goes about their business: a new verdict, and a packet that shows it.
fn one_change(sb: &Sandbox, session: &mut Session, round: usize) {
    let user = sb.user(QUIET);
    let name = format!("app.slice/app-{round}.scope");
    let app = user.cgroup(&name).app();
    session.assign(json!([to_proxy(&name, "quiet")]));
    for to in sb.destinations() {
        assert_eq!(app.tcp(to), proxied("quiet", to));
    }
}

fn quiet_session(sb: &Sandbox) -> Session {
    let mut session = Session::of(&sb.user(QUIET));
    session.replace(
        json!([{ "name": "quiet", "port": 7000 }]),
        json!([]),
        json!([]),
    );
    session
}

/// How many bytes the helper has not read yet, of so many connections.
fn unread(sb: &Sandbox) -> usize {
    let connections = sb.run(&["ss", "-xnH", "src", SOCKET]);
    // Netid State Recv-Q Send-Q …
    let bytes = |line: &str| line.split_whitespace().nth(2)?.parse::<usize>().ok();
    connections.lines().filter_map(bytes).sum()
}

/// All of it waits when the helper begins, and none of it for the rate: what it answers the flood tells whether the
/// call that came last had its turn before.
#[test]
fn a_flood_of_calls_takes_no_turn_from_others() {
    sandbox(|sb| {
        /// Fewer than have been saved up, those included by which connections begin.
        const EACH: usize = 120;
        /// How often each connection may have its turn before one that came after all of them.
        const TURNS: usize = 4;
        let call = b"{\"method\":\"org.cgtproxy.Helper.GetStatus\"}\0";
        let helper = sb.helper().start();
        let loud = sb.user(LOUD);
        let mut flood: Vec<Session> = (0..CONNECTIONS).map(|_| Session::of(&loud)).collect();
        let mut root = Session::of(&sb.user(0));
        for session in flood.iter_mut().chain([&mut root]) {
            assert_eq!(session.status()["systemPolicy"], false);
        }
        helper.signal(Signal::SIGSTOP);
        for session in &mut flood {
            session.0.send_bytes(&call.repeat(EACH));
        }
        let bytes = CONNECTIONS * EACH * call.len();
        wait_until("the flood waits", || unread(sb) == bytes);
        root.0.send(&json!({
            "method": "org.cgtproxy.Helper.ReplacePolicy",
            "parameters": { "proxies": [], "bypass": [], "assignments": [] },
        }));
        wait_until("the other call waits too", || unread(sb) > bytes);
        helper.signal(Signal::SIGCONT);
        let reply = root.0.receive().expect("a reply");
        assert_eq!(reply.get("error"), None, "{reply}");
        for session in &mut flood {
            let mut before = 0;
            for _ in 0..EACH {
                let reply = session.0.receive().expect("a reply");
                match reply["parameters"]["systemPolicy"].as_bool() {
                    Some(there) => before += usize::from(!there),
                    None => panic!("{reply}"),
                }
            }
            assert!(before <= TURNS, "{before} turns");
        }
    });
}

#[test]
fn a_flood_of_calls_waits_for_its_rate_and_nobody_else_does() {
    sandbox(|sb| {
        const FLOOD: usize = 6_000;
        let _helper = sb.helper().start();
        let _proxy = sb.tproxy("quiet").uid(QUIET).port(7000).start();
        let mut quiet = quiet_session(sb);
        let (answered, over) = (AtomicUsize::new(0), AtomicBool::new(false));
        let loud = sb.user(LOUD);
        thread::scope(|scope| {
            for _ in 0..CONNECTIONS {
                let mut session = Session::of(&loud);
                let (answered, over) = (&answered, &over);
                scope.spawn(move || {
                    let call = b"{\"method\":\"org.cgtproxy.Helper.GetStatus\"}\0";
                    let flood = call.repeat(FLOOD / CONNECTIONS);
                    session.0.send_bytes(&flood);
                    // Some have all their turns early, and nothing to wait for then.
                    for _ in 0..FLOOD / CONNECTIONS {
                        if over.load(Ordering::Relaxed) {
                            break;
                        }
                        if session.0.receive().is_some() {
                            answered.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
            for round in 0..ROUNDS {
                one_change(sb, &mut quiet, round);
            }
            over.store(true, Ordering::Relaxed);
        });
        // The flood was not over when the quiet user was done.
        let answered = answered.into_inner();
        assert!(answered < FLOOD, "{answered}");
    });
}

#[test]
fn ten_thousand_connections_are_refused_but_for_those_that_one_may_have() {
    sandbox(|sb| {
        const CROWD: u32 = 10_000;
        let helper = sb.helper().start();
        let _proxy = sb.tproxy("quiet").uid(QUIET).port(7000).start();
        let mut quiet = quiet_session(sb);
        let loud = sb.user(LOUD);
        let app = loud.cgroup("app.slice/app-loud.scope").app();
        let before = helper.open_descriptors();
        thread::scope(|scope| {
            let crowd = scope.spawn(|| app.crowd(SOCKET, STATUS, CROWD));
            for round in 0..ROUNDS {
                one_change(sb, &mut quiet, round);
            }
            let crowd = crowd.join().expect("it is told");
            let allowed = u32::try_from(CONNECTIONS).expect("a few");
            let refused = crowd.refused.get("org.cgtproxy.Helper.TooManyConnections");
            assert_eq!(crowd.answered, allowed, "{crowd:?}");
            assert_eq!(refused, Some(&(CROWD - allowed)), "{crowd:?}");
        });
        // All of them are still there, at the other end.
        assert_eq!(helper.open_descriptors(), before + CONNECTIONS as u64);
        one_change(sb, &mut quiet, ROUNDS);
        let kib = peak(helper.pid());
        assert!(kib < MEMORY, "the helper held {kib} KiB");
        drop(app);
        wait_until("the user may connect again", || {
            loud.varlink(SOCKET)
                .call(STATUS, json!({}))
                .get("error")
                .is_none()
        });
    });
}

#[test]
fn whoever_connects_calls_and_hangs_up_as_fast_as_it_goes_disturbs_nobody() {
    sandbox(|sb| {
        const CALLS: usize = 64;
        const FLOOD: u64 = 1_500;
        let helper = sb.helper().start();
        let _proxy = sb.tproxy("quiet").uid(QUIET).port(7000).start();
        let mut quiet = quiet_session(sb);
        let app = sb.user(LOUD).cgroup("app.slice/app-loud.scope").app();
        app.flood(SOCKET, STATUS, CALLS);
        let mut round = 0;
        while round < ROUNDS || app.flooded() < FLOOD {
            one_change(sb, &mut quiet, round);
            round += 1;
        }
        assert_eq!(mapped_ids(sb, 1002).len(), round);
        let kib = peak(helper.pid());
        assert!(kib < MEMORY, "the helper held {kib} KiB");
    });
}

#[test]
fn whoever_connects_and_hangs_up_as_fast_as_it_goes_has_no_more_open_than_may_be() {
    sandbox(|sb| {
        const FLOOD: u64 = 20_000;
        // Those that the user may have, those that are just being refused, and what the helper has open itself.
        const OPEN: usize = 10 * CONNECTIONS;
        let helper = sb.helper().start();
        let _proxy = sb.tproxy("quiet").uid(QUIET).port(7000).start();
        let mut quiet = quiet_session(sb);
        let app = sb.user(LOUD).cgroup("app.slice/app-loud.scope").app();
        app.flood(SOCKET, STATUS, 0);
        let open = || std::fs::read_dir(format!("/proc/{}/fd", helper.pid())).expect("it runs");
        let (mut round, mut most) = (0, 0);
        while round < ROUNDS || app.flooded() < FLOOD {
            one_change(sb, &mut quiet, round);
            most = most.max(open().count());
            round += 1;
        }
        assert!(most < OPEN, "{most} descriptors were open");
    });
}

/// The kernel takes the longer for a dump, the more rules there are.
#[test]
fn others_rules_are_looked_at_for_a_short_time_however_many_there_are() {
    sandbox(|sb| {
        const RULES: usize = 60_000;
        let _helper = sb.helper().start();
        let _proxy = sb.tproxy("quiet").uid(QUIET).port(7000).start();
        let mut loud = Session::of(&sb.user(LOUD));
        let table = |rules: String| format!("table ip other {{\nchain c {{\n{rules}}}\n}}\n");
        sb.nft(&table("meta mark set 0x01000000\n".to_owned()));
        let written = json!([{ "table": "ip other", "bits": 0xff00_0000_u32 }]);
        assert_eq!(loud.call("Diagnose", json!({}))["markWriters"], written);
        sb.nft(&table("counter ip daddr 192.0.2.9 drop\n".repeat(RULES)));
        wait_until("what was found before is forgotten", || {
            loud.call("Diagnose", json!({}))["markWriters"].is_null()
        });
        // What was begun is no answer to anything else.
        let mut quiet = quiet_session(sb);
        for round in 0..ROUNDS {
            one_change(sb, &mut quiet, round);
        }
    });
}

#[test]
fn an_agent_that_is_killed_again_and_again_leaves_no_gap_and_disturbs_nobody() {
    sandbox(|sb| {
        const CONFIG: &str = r"
version: 1
tproxies:
  loud: {port: 7001}
rules:
  - {match: app-dropped, drop: true}
  - {match: '/app\.slice$', tproxy: loud}
";
        let _helper = sb.helper().start();
        let _proxies = [
            sb.tproxy("quiet").uid(QUIET).port(7000).start(),
            sb.tproxy("loud").uid(LOUD).port(7001).start(),
        ];
        let mut quiet = quiet_session(sb);
        let loud = sb.user(LOUD);
        let dropped = loud.cgroup("app.slice/app-dropped.scope");
        let mut agent = loud.agent(CONFIG).start();
        Agent::of(&loud).wait_for_verdict(&dropped, "drop");
        let (app, dropped) = (loud.cgroup("app.slice/app-a.scope").app(), dropped.app());
        let traffic = Steady::start(sb, &app);
        for round in 0..ROUNDS {
            // Now before it has said anything, now in the middle of it, now when all is said.
            if round % 3 == 2 {
                agent.wait_ready();
            } else if round % 3 == 1 {
                one_change(sb, &mut quiet, round);
            }
            agent.kill();
            agent.begin_again();
            for to in sb.destinations() {
                assert!(dropped.udp(to).is_dropped());
            }
        }
        agent.wait_ready();
        traffic.assert_proxied("loud");
        traffic.assert_none_strayed(sb, &["loud"]);
        one_change(sb, &mut quiet, ROUNDS);
    });
}

#[test]
fn half_messages_hold_no_more_than_a_user_may_have() {
    sandbox(|sb| {
        let helper = sb.helper().start();
        let _proxy = sb.tproxy("quiet").uid(QUIET).port(7000).start();
        let mut quiet = quiet_session(sb);
        let loud = sb.user(LOUD);
        let half = vec![b'['; 3 * 1024 * 1024];
        let mut held = Vec::new();
        let mut refused = 0;
        for _ in 0..CONNECTIONS {
            let mut session = loud.varlink(SOCKET);
            session.send_bytes(&half);
            // The next connection tells that this one has been read as far as it is.
            Session::of(&sb.user(QUIET)).status();
            held.push(session);
        }
        for session in &mut held {
            session.finish();
            if let Some(reply) = session.receive() {
                assert_eq!(
                    reply,
                    json!({
                        "error": "org.cgtproxy.Helper.TooManyBytes",
                        "parameters": { "limit": 8 * 1024 * 1024 },
                    })
                );
                refused += 1;
            }
        }
        assert!(refused >= CONNECTIONS - 3, "{refused} were refused");
        one_change(sb, &mut quiet, 0);
        let kib = peak(helper.pid());
        assert!(kib < MEMORY, "the helper held {kib} KiB");
    });
}

#[test]
fn long_rubbish_costs_its_own_connection_and_no_memory() {
    sandbox(|sb| {
        let helper = sb.helper().start();
        let _proxy = sb.tproxy("quiet").uid(QUIET).port(7000).start();
        let mut quiet = quiet_session(sb);
        let loud = sb.user(LOUD);
        let mut brackets = vec![b'['; 1024 * 1024];
        brackets.push(0);
        let nested = format!(
            "{{\"method\":\"org.cgtproxy.Helper.ReplacePolicy\",\"parameters\":{}}}\0",
            "{\"proxies\":".repeat(100_000)
        );
        for rubbish in [&brackets[..], nested.as_bytes(), &[0; 4096]] {
            let mut session = loud.varlink(SOCKET);
            session.send_bytes(rubbish);
            assert_eq!(session.receive(), None);
        }
        // A million of something that is well-formed, and a million that is too many bytes.
        for (item, error) in [
            ("0", "org.cgtproxy.Helper.TooManyControlGroups"),
            (
                "{\"controlGroup\":\"a\",\"verdict\":\"drop\"}",
                "org.cgtproxy.Helper.MessageTooLarge",
            ),
        ] {
            let items = format!("{item},").repeat(1_000_000);
            let call = format!(
                "{{\"method\":\"org.cgtproxy.Helper.UpdateAssignments\",\"parameters\":\
                 {{\"assign\":[{items}{item}],\"remove\":[]}}}}\0"
            );
            // Without a session nobody looks at it.
            let mut session = Session::of(&loud);
            session.replace(json!([]), json!([]), json!([]));
            session.0.send_bytes(call.as_bytes());
            let reply = session.0.receive().expect("a reply");
            assert_eq!(reply["error"], error);
        }
        one_change(sb, &mut quiet, 0);
        let kib = peak(helper.pid());
        assert!(kib < MEMORY, "the helper held {kib} KiB");
    });
}

#[test]
fn agents_in_a_loop_leave_nothing_and_disturb_nobody() {
    sandbox(|sb| {
        let _helper = sb.helper().config("grace-seconds: 0").start();
        let _proxy = sb.tproxy("quiet").uid(QUIET).port(7000).start();
        let mut quiet = quiet_session(sb);
        let loud = sb.user(LOUD);
        let victim = loud.cgroup("app.slice/app-x.scope");
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        let mut session = Session::of(&loud);
                        let policy = json!({
                            "proxies": [{ "name": "loud", "port": 7001 }], "bypass": [],
                            "assignments": [to_proxy("app.slice/app-x.scope", "loud")],
                        });
                        // Whether another of the four has the session does not matter.
                        session.0.call("org.cgtproxy.Helper.ReplacePolicy", policy);
                    }
                });
            }
            for round in 0..ROUNDS {
                one_change(sb, &mut quiet, round);
            }
            over.store(true, Ordering::Relaxed);
        });
        let app = victim.app();
        wait_until("the loud user's rules are gone", || {
            sb.objects_of(LOUD).is_empty()
        });
        for to in sb.destinations() {
            assert_eq!(app.tcp(to), direct(to));
        }
        assert_eq!(mapped_ids(sb, 1002).len(), ROUNDS);
    });
}

/// At one path there is now a control group of the user's, now one of root's: one may be looked at, and the other taken.
#[test]
fn a_control_group_that_is_replaced_all_the_time_is_nobody_elses() {
    sandbox(|sb| {
        /// In each of these the next call is made, as soon as one has been taken in the last.
        const PATHS: usize = 128;
        let config = "limits: {calls-per-second: 1000000}";
        let _helper = sb.helper().config(config).start();
        let _proxy = sb.tproxy("quiet").uid(QUIET).port(7000).start();
        let mut quiet = quiet_session(sb);
        let loud = sb.user(LOUD);
        let mut session = Session::of(&loud);
        session.replace(json!([]), json!([]), json!([]));
        let (over, current) = (AtomicBool::new(false), AtomicUsize::new(0));
        let path = |number| format!("race-{number}.scope");
        let (mut not_owned, mut mapped) = (0, BTreeSet::new());
        let roots = thread::scope(|scope| {
            let replacing = scope.spawn(|| {
                let service = format!("user.slice/user-{LOUD}.slice/user@{LOUD}.service");
                let mut roots = BTreeSet::new();
                while !over.load(Ordering::Relaxed) {
                    let path = path(current.load(Ordering::Relaxed));
                    loud.cgroup(&path).remove();
                    let cgroup = sb.cgroup(format!("{service}/{path}"));
                    roots.insert(cgroup.id());
                    cgroup.remove();
                }
                roots
            });
            let _end = EndOf(&over);
            for round in 0..ROUNDS {
                for number in 0..PATHS {
                    current.store(number, Ordering::Relaxed);
                    // Without a pause, until it is the user's.
                    loop {
                        assert!(!replacing.is_finished());
                        let assign = json!([verdict(&path(number), "drop")]);
                        let update = json!({ "assign": assign, "remove": [] });
                        let reply = session.call("UpdateAssignments", update);
                        match reply["skipped"][0]["reason"].as_str() {
                            None => break,
                            Some("notOwned") => not_owned += 1,
                            Some(other) => assert_eq!(other, "missing"),
                        }
                    }
                }
                mapped.extend(mapped_ids(sb, LOUD));
                one_change(sb, &mut quiet, round);
            }
            over.store(true, Ordering::Relaxed);
            replacing.join().expect("it replaces")
        });
        let app = |n| format!("app.slice/app-{n}.scope");
        let of_quiet: BTreeSet<u64> = (0..ROUNDS)
            .map(|n| sb.user(QUIET).cgroup(app(n)).id())
            .collect();
        assert_eq!(mapped.len(), ROUNDS * PATHS);
        assert!(not_owned > PATHS, "{not_owned}");
        for others in [&roots, &of_quiet] {
            assert_eq!(mapped.intersection(others).next(), None);
        }
        assert_eq!(BTreeSet::from_iter(mapped_ids(sb, QUIET)), of_quiet);
    });
}

/// What one user has made is more than root may say in the time that this takes, and comes before what others make in
/// every order but that of turns.
#[test]
fn a_user_who_makes_many_control_groups_delays_nobody_elses_verdict() {
    sandbox(|sb| {
        /// So many with paths of 3 KiB are many calls, and as much as root may say in twenty seconds.
        const MANY: usize = 1_000;
        const CONFIG: &str = r"
version: 1
rules:
  - {match: '/app-bad[^/]*\.scope$', drop: true, enforce: true}
";
        let helper = sb.helper().config("limits: {calls-per-second: 1}").start();
        let (loud, quiet) = (sb.user(LOUD), sb.user(QUIET));
        let (slice, root) = (quiet.cgroup("app.slice"), sb.user(0));
        let directory = loud.cgroup("app.slice").directory();
        let _agent = root.agent(CONFIG).argument("--system").start();
        let mut agent = Agent(root.varlink("/run/cgtproxy-agent-system/agent.sock"));
        // The agent knows all of them when it makes the next call but one.
        helper.signal(Signal::SIGSTOP);
        loud.shell(&format!(
            "cd {}; for n in $(seq 12); do mkdir {deep}; cd {deep}; done
             seq -f app-bad-%g.scope {MANY} | xargs mkdir",
            directory.display(),
            deep = "d".repeat(250),
        ));
        wait_until("the agent knows them all", || {
            let status = agent.status();
            let list = status["controlGroups"].as_array().expect("a list");
            let is_bad = |group: &&Value| group["target"] == "drop";
            list.iter().filter(is_bad).count() == MANY
        });
        helper.signal(Signal::SIGCONT);
        for round in 0..3 {
            let bad = slice.child(format!("app-bad-{round}.scope"));
            let mut ids = Vec::new();
            wait_until("its verdict is in the kernel", || {
                ids = mapped_ids_now(sb, 0).unwrap_or_default();
                ids.contains(&bad.id())
            });
            assert!(ids.len() < MANY, "others' verdicts came before");
            sb.expect_dropped(&bad.app());
        }
    });
}
