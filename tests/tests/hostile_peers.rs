//! Peers of the helper's who are not what an agent is: they send what nobody wants, come as many, or are gone already.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a panic is a failed test"
)]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use cgtproxy_tests::sandbox::{HelperBuilder, Sandbox, User, sandbox};
use cgtproxy_tests::session::{SOCKET, Session, mapped_ids, mapped_ids_now, verdict};
use cgtproxy_tests::wait::wait_until;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const LOUD: u32 = 1001;
const QUIET: u32 = 1002;

/// The loud one may not use the helper at all.
const DENY: &str = "deny: {users: [1001]}";

/// A change of the quiet user's, which does not take long.
fn one_change(sb: &Sandbox, quiet: &User) {
    let start = Instant::now();
    let mut session = Session::of(quiet);
    quiet.cgroup("app.slice/app-a.scope");
    let drop = verdict("app.slice/app-a.scope", "drop");
    session.replace(json!([]), json!([]), json!([drop]));
    assert_eq!(mapped_ids(sb, QUIET).len(), 1);
    let elapsed = start.elapsed();
    assert!(elapsed < Duration::from_secs(15), "{elapsed:?}");
}

/// What docs/security.md says that the helper's memory stays below while one user holds messages open, in KiB.
const MEMORY: u64 = (64 + 8) * 1024;

/// Whether this kernel lets nobody send descriptors where they are not wanted (Linux 6.16).
fn kernel_refuses_descriptors() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("it is Linux");
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut number = || numbers.next().and_then(|n| n.parse::<u32>().ok());
    (number(), number()) >= (Some(6), Some(16))
}

/// Whoever closes such a socket last sleeps for days.
fn lingering(sb: &Sandbox, config: &str) {
    let _helper = sb.helper().config(config).start();
    let loud = sb.user(LOUD).cgroup("app.slice/app-loud.scope").app();
    let given = loud.give_away(SOCKET, 4);
    assert!(!kernel_refuses_descriptors() || given == 0, "{given}");
    one_change(sb, &sb.user(QUIET));
}

#[test]
fn sockets_that_linger_halt_nobody() {
    sandbox(|sb| lingering(sb, ""));
}

#[test]
fn sockets_that_linger_of_who_may_not_connect_halt_nobody() {
    sandbox(|sb| lingering(sb, DENY));
}

/// These were sent before the helper could say that it wants none.
fn lingering_in_the_backlog(sb: &Sandbox, config: &str) {
    const GIVEN: u32 = 40;
    let listener = HelperBuilder::bind();
    let loud = sb.user(LOUD).cgroup("app.slice/app-loud.scope").app();
    assert_eq!(loud.give_away(SOCKET, GIVEN), u64::from(GIVEN));
    let mut helper = sb.helper().config(config).listener(listener).start();
    one_change(sb, &sb.user(QUIET));
    // All of them have come by now, and one line says so.
    let log = helper.log();
    assert_eq!(log.matches("has sent descriptors").count(), 1, "{log}");
    // It ends, too.
    assert!(helper.stop().success());
}

#[test]
fn sockets_that_linger_and_wait_to_be_accepted_halt_nobody() {
    sandbox(|sb| lingering_in_the_backlog(sb, ""));
}

#[test]
fn sockets_that_linger_and_wait_to_be_refused_halt_nobody() {
    sandbox(|sb| lingering_in_the_backlog(sb, DENY));
}

/// Where they would be too many, the next helper has none of them any more.
#[test]
fn a_helper_that_keeps_too_many_of_them_open_ends() {
    sandbox(|sb| {
        let listener = HelperBuilder::bind();
        let loud = sb.user(LOUD).cgroup("app.slice/app-loud.scope").app();
        assert_eq!(loud.give_away(SOCKET, 70), 70);
        let mut helper = sb.helper().listener(listener).start();
        one_change(sb, &sb.user(QUIET));
        assert!(!helper.wait().success());
        helper.wait_log("starting again");
        // What is in the kernel stays.
        assert_eq!(mapped_ids(sb, QUIET).len(), 1);
        helper.start_again();
        one_change(sb, &sb.user(QUIET));
    });
}

/// A user may have thousands of uids (subuid(5)). All connections together would be more than the helper may have open.
#[test]
fn uids_without_a_service_manager_take_as_much_as_one_user() {
    sandbox(|sb| {
        const CONNECTIONS: u32 = 16;
        let _helper = sb.helper().start();
        let mut before = Session::of(&sb.user(QUIET));
        before.status();
        let nowhere = sb.cgroup("user.slice");
        let crowds: Vec<_> = (0..64).map(|n| nowhere.app_as(100_000 + n)).collect();
        let answered = crowds.iter().map(|app| {
            let crowd = app.crowd(SOCKET, "org.cgtproxy.Helper.GetStatus", CONNECTIONS);
            assert_eq!(crowd.closed, 0, "{crowd:?}");
            crowd.answered
        });
        assert_eq!(answered.sum::<u32>(), CONNECTIONS);
        before.status();
        one_change(sb, &sb.user(QUIET));
        // Root has what is root's own.
        let root = sb.cgroup("system.slice").app_as(0);
        let crowd = root.crowd(SOCKET, "org.cgtproxy.Helper.GetStatus", 1);
        assert_eq!(crowd.answered, 1, "{crowd:?}");
    });
}

/// Whether whole messages have to wait, or what is said to them is not read: they count.
#[test]
fn messages_that_wait_hold_no_more_than_a_user_may_have() {
    sandbox(|sb| {
        const LONG: usize = 4_000_000;
        let helper = sb.helper().config("limits: {calls-per-second: 50}").start();
        let mut quiet = Session::of(&sb.user(QUIET));
        let loud = sb.user(LOUD);
        let name = "A".repeat(LONG);
        let message = format!("{{\"method\":\"org.cgtproxy.Helper.{name}\"}}\0");
        let mut sessions: Vec<_> = (0..16).map(|_| loud.varlink(SOCKET)).collect();
        for session in &mut sessions {
            session.send_bytes(message.as_bytes());
            // The next connection tells that this one has been read as far as it is.
            quiet.status();
        }
        let mut over = 0;
        for session in &mut sessions {
            session.finish();
            let reply = session.receive().unwrap_or(Value::Null);
            match reply["error"].as_str() {
                Some("org.cgtproxy.Helper.TooManyBytes") => over += 1,
                Some("org.varlink.service.MethodNotFound") => {
                    assert!(reply.to_string().len() < 1000);
                }
                _ => panic!("{reply}"),
            }
        }
        assert!(over > 0);
        let kib = helper.peak_memory();
        assert!(kib < MEMORY, "the helper held {kib} KiB");
    });
}

/// As of an agent that is stopped before systemd has started the helper, or while the helper has no time: what it asked
/// for waits in the socket.
#[test]
fn what_somebody_wants_who_is_gone_is_not_brought_into_force() {
    sandbox(|sb| {
        let listener = HelperBuilder::bind();
        let call = json!({
            "method": "org.cgtproxy.Helper.ReplacePolicy",
            "parameters": {
                "proxies": [], "bypass": [], "assignments": [verdict("system.slice", "drop")],
            },
        });
        let message = format!("{call}\0");
        let mut gone = UnixStream::connect(SOCKET).expect("somebody listens");
        gone.write_all(message.as_bytes()).expect("there is room");
        drop(gone);
        let config = "grace-seconds: 0";
        let helper = sb.helper().config(config).listener(listener).start();
        // Connections are served in turn.
        one_change(sb, &sb.user(QUIET));
        assert_eq!(mapped_ids_now(sb, 0), None);
        // Nor is what is only to be changed.
        let nothing = json!({
            "method": "org.cgtproxy.Helper.ReplacePolicy",
            "parameters": { "proxies": [], "bypass": [], "assignments": [] },
        });
        let change = json!({
            "method": "org.cgtproxy.Helper.UpdateAssignments",
            "parameters": { "assign": [verdict("system.slice", "drop")], "remove": [] },
        });
        let mut gone = UnixStream::connect(SOCKET).expect("somebody listens");
        write!(gone, "{nothing}\0").expect("there is room");
        let mut reply = [0; 200];
        let length = gone.read(&mut reply).expect("it is served");
        assert!(reply[..length].ends_with(b"}\0"));
        helper.signal(Signal::SIGSTOP);
        write!(gone, "{change}\0").expect("there is room");
        drop(gone);
        helper.signal(Signal::SIGCONT);
        let root = sb.user(0);
        wait_until("the session to be over", || {
            Session::of(&root).status()["session"] == "none"
        });
        assert_eq!(mapped_ids_now(sb, 0), None);
        // Who has only said all that there is to say hears the answer.
        let mut waits = UnixStream::connect(SOCKET).expect("somebody listens");
        waits.write_all(message.as_bytes()).expect("there is room");
        waits.shutdown(Shutdown::Write).expect("it is open");
        let mut reply = String::new();
        waits.read_to_string(&mut reply).expect("it is text");
        assert!(reply.contains("generation"), "{reply}");
    });
}
