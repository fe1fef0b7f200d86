//! The session with the helper.

use cgtproxy_proto::helper::SkipReason;
use rustix::process::Signal;
use serde_json::json;

use crate::CONFIG;
use crate::fake::fault;
use crate::world::World;

#[test]
fn is_ready_when_the_helper_has_everything() {
    let mut world = World::new(CONFIG);
    world.make(&["drop-1"]);
    world.helper.start();
    world.helper.books().paused = true;
    let agent = world.agent();
    world.helper.wait("a call", |books| !books.calls.is_empty());
    assert!(!world.is_notified("READY=1"));
    assert!(!agent.status().connected);
    assert!(!agent.explain("drop-1").inForce);
    world.helper.resume();
    world.notified("READY=1");
    let status = agent.status();
    assert!(status.connected && status.generation == 1 && status.problem.is_none());
    agent.in_force("drop-1");
    let books = world.helper.books();
    let proxies: Vec<_> = books
        .proxies
        .iter()
        .map(|p| (p.name.as_str(), p.port, p.noUdp))
        .collect();
    assert_eq!(proxies, [("p", 7893, Some(true)), ("q", 7894, Some(false))]);
    assert_eq!(books.bypass, ["10.0.0.0/8", "fe80::/10"]);
}

#[test]
fn merges_what_happens_during_a_call() {
    let mut world = World::new(CONFIG);
    world.helper.start();
    let agent = world.agent();
    world.notified("READY=1");
    world.helper.books().paused = true;
    world.make(&["drop-1"]);
    world
        .helper
        .wait("the call", |books| books.calls.len() == 2);
    world.make(&["drop-2", "drop-3", "drop-4"]);
    world.remove(&["drop-3"]);
    agent.wait("4 control groups", |status| {
        status.controlGroups.len() == 4
            && status
                .controlGroups
                .iter()
                .all(|g| !g.path.ends_with("drop-3"))
    });
    world.helper.resume();
    world
        .helper
        .wait_for(&[("drop-1", "drop"), ("drop-2", "drop"), ("drop-4", "drop")]);
    let calls = world.helper.books().calls.clone();
    assert_eq!(
        calls,
        ["ReplacePolicy", "UpdateAssignments", "UpdateAssignments"]
    );
}

#[test]
fn replaces_everything_when_the_helper_comes_back() {
    let mut world = World::new(CONFIG);
    world.make(&["drop-1", "drop-2"]);
    world.helper.start();
    let mut agent = world.agent();
    world
        .helper
        .wait_for(&[("drop-1", "drop"), ("drop-2", "drop")]);
    for _ in 0..3 {
        world.helper.stop();
        agent.wait("the loss", |status| !status.connected);
        assert!(!agent.explain("drop-2").inForce);
        world.remove(&["drop-1"]);
        world.make(&["drop-1", "drop-3"]);
        world.helper.start();
        world
            .helper
            .wait_for(&[("drop-1", "drop"), ("drop-2", "drop"), ("drop-3", "drop")]);
        world.remove(&["drop-3"]);
        world
            .helper
            .wait_for(&[("drop-1", "drop"), ("drop-2", "drop")]);
    }
    // However often it tried.
    assert!(agent.count("no helper listens") <= 3);
}

#[test]
fn waits_for_a_helper_that_comes_later() {
    let mut world = World::new(CONFIG);
    world.make(&["drop-1"]);
    let mut agent = world.agent();
    assert!(agent.says("no helper listens on").starts_with("<4>"));
    world.helper.start();
    world.notified("READY=1");
    world.helper.wait_for(&[("drop-1", "drop")]);
}

#[test]
fn removes_its_policy_in_the_end() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut world = World::new(CONFIG);
        world.make(&["drop-1"]);
        world.helper.start();
        let mut agent = world.agent();
        world.helper.wait_for(&[("drop-1", "drop")]);
        agent.signal(signal);
        let status = agent.process.wait().unwrap();
        assert_eq!(status.code(), Some(0));
        world.notified("STOPPING=1");
        assert_eq!(world.helper.books().calls.last().unwrap(), "RemovePolicy");
        assert!(!world.path().join("run/cgtproxy/agent.sock").exists());
    }
    // Without a helper there is nothing to remove.
    let world = World::new(CONFIG);
    let mut agent = world.agent();
    agent.says("no helper listens");
    assert_eq!(agent.stop().code(), Some(0));
}

#[test]
fn leaves_nothing_when_it_is_stopped_between_two_sessions() {
    let mut world = World::new(CONFIG);
    world.make(&["drop-1"]);
    world.helper.start();
    let mut agent = world.agent();
    world.helper.wait_for(&[("drop-1", "drop")]);
    world.helper.stop();
    agent.wait("the loss", |status| !status.connected);
    agent.signal(Signal::TERM);
    world.notified("STOPPING=1");
    world.helper.start();
    assert_eq!(agent.process.wait().unwrap().code(), Some(0));
    let calls = world.helper.books().calls.clone();
    assert_eq!(calls, ["ReplacePolicy", "RemovePolicy"]);
    assert!(world.helper.books().proxies.is_empty());
}

#[test]
fn says_that_its_policy_stays_if_it_can_not_remove_it() {
    // No helper is there any more, or it does not answer.
    for silent in [false, true] {
        let mut world = World::new(CONFIG);
        world.make(&["drop-1"]);
        world.helper.start();
        let mut agent = world.agent();
        world.helper.wait_for(&[("drop-1", "drop")]);
        if silent {
            world.helper.books().paused = true;
            world.make(&["drop-2"]);
            world
                .helper
                .wait("the call", |books| books.calls.len() == 2);
        } else {
            world.helper.stop();
            agent.wait("the loss", |status| !status.connected);
        }
        agent.signal(Signal::TERM);
        agent.says("<4>the policy could not be removed");
        assert_eq!(agent.process.wait().unwrap().code(), Some(0));
    }
}

#[test]
fn a_second_service_starts_when_the_first_agent_has_ended() {
    let mut world = World::new(CONFIG);
    world.helper.start();
    let first = world.agent();
    world.notified("READY=1");
    let mut second = world.agent();
    second.says("another agent of this user listens on");
    drop(first);
    world.notified("READY=1");
}

#[test]
fn an_agent_whose_session_somebody_else_has_gives_up_at_the_start() {
    let mut world = World::new(CONFIG);
    world.helper.start();
    for _ in 0..1000 {
        world
            .helper
            .books()
            .faults
            .push_back(fault("SessionExists", json!({})));
    }
    let mut agent = world.agent();
    agent.says("<3>another agent of this user is connected to the helper");
    assert_eq!(agent.process.wait().unwrap().code(), Some(1));
    // One that goes away in time is waited for.
    world.helper.books().faults.truncate(2);
    let _agent = world.agent();
    world.notified("READY=1");
}

#[test]
fn says_again_what_was_refused() {
    let mut world = World::new(CONFIG);
    world.make(&["drop-1"]);
    world.helper.start();
    world.helper.books().faults.extend([
        fault("KernelRefused", json!({ "message": "out of\x1b memory" })),
        fault("NoMarksLeft", json!({})),
        fault("NoUserManager", json!({ "controlGroup": "user.slice" })),
    ]);
    let mut agent = world.agent();
    agent.says("the kernel refused the policy: out of\\u{1b} memory");
    agent.says("all packet marks");
    agent.says("the helper finds no control group user.slice");
    world.helper.wait_for(&[("drop-1", "drop")]);
    world.notified("READY=1");
    // An update as well, and what comes meanwhile is not forgotten.
    let refused = fault("KernelRefused", json!({ "message": "no room" }));
    let faults = [refused.clone(), refused];
    world.helper.books().faults.extend(faults);
    world.make(&["drop-2"]);
    agent.says("the kernel refused the policy: no room");
    world.make(&["drop-3"]);
    world
        .helper
        .wait_for(&[("drop-1", "drop"), ("drop-2", "drop"), ("drop-3", "drop")]);
    agent.wait("no problem", |status| {
        status.connected && status.problem.is_none()
    });
    // Nor does the service manager go on saying so.
    world.notified("STATUS=the kernel refused the policy: no room");
    world.status_becomes("In force");
    // The control group of the user's service manager, without which there is nothing to hold a policy for.
    world.remove(&["drop-1", "drop-2", "drop-3"]);
    world.remove(&[""]);
    world.notified("STATUS=waiting for the control group");
    world.make(&[""]);
    world.status_becomes("In force");
}

#[test]
fn what_there_is_no_room_for_is_not_said_again_and_again() {
    let mut world = World::new(CONFIG);
    world.make(&["drop-1"]);
    world.helper.start();
    let mut agent = world.agent();
    world.helper.wait_for(&[("drop-1", "drop")]);
    let limit = fault("TooManyControlGroups", json!({ "limit": 1 }));
    world.helper.books().faults.push_back(limit);
    world.make(&["drop-2"]);
    let line = agent.says("drop-2' has no verdict of its own: the administrator allows no more");
    assert!(line.starts_with("<4>") && line.contains("no more than 1 control groups"));
    world.make(&["drop-3"]);
    let status = agent.wait("both", |s| {
        let without = s.controlGroups.iter().filter(|g| g.skipped.is_some());
        without.count() == 2
    });
    let problem = status.problem.unwrap();
    assert!(problem.contains("drop-2' and 1 more have no verdict of their own"));
    let group = agent.explain("drop-3");
    assert!(!group.inForce && group.skipped.as_deref() == Some("noRoom"));
    agent.in_force("drop-1");
    // What is gone is removed, and makes room.
    world.remove(&["drop-1"]);
    world.helper.wait_for(&[("drop-2", "drop")]);
    world.remove(&["drop-3"]);
    let status = agent.wait("no problem", |status| status.problem.is_none());
    assert!(status.controlGroups.iter().all(|g| g.skipped.is_none()));
    let calls = world.helper.books().calls.clone();
    let (replace, update) = ("ReplacePolicy", "UpdateAssignments");
    assert_eq!(calls, [replace, update, replace, update, update]);
    assert_eq!(agent.count("no verdict of its own"), 1);
}

#[test]
fn a_helper_that_forgot_the_session_is_told_everything() {
    let mut world = World::new(CONFIG);
    world.make(&["drop-1"]);
    world.helper.start();
    let _agent = world.agent();
    world.helper.wait_for(&[("drop-1", "drop")]);
    {
        let mut books = world.helper.books();
        books.session = false;
        books.held.clear();
    }
    world.make(&["drop-2"]);
    world
        .helper
        .wait_for(&[("drop-1", "drop"), ("drop-2", "drop")]);
}

#[test]
fn remembers_what_was_passed_over() {
    let mut world = World::new(CONFIG);
    world.helper.start();
    world.helper.books().skip.extend([
        ("drop-1".to_owned(), SkipReason::missing),
        ("drop-2".to_owned(), SkipReason::notOwned),
    ]);
    let mut agent = world.agent();
    world.make(&["drop-1", "drop-2"]);
    agent.says("drop-2': it belongs to root");
    let status = agent.wait("both skipped", |s| {
        s.controlGroups
            .iter()
            .filter(|g| g.skipped.is_some())
            .count()
            == 2
    });
    assert!(status.controlGroups[1..].iter().all(|g| !g.inForce));
    world.helper.books().skip.clear();
    world.remove(&["drop-1"]);
    world.make(&["drop-1"]);
    world.helper.wait_for(&[("drop-1", "drop")]);
    assert!(agent.explain("drop-1").skipped.is_none());
}

#[test]
fn a_session_that_the_helper_has_ended_is_a_loss_like_any_other() {
    let mut world = World::new(CONFIG);
    world.helper.start();
    let mut agent = world.agent();
    world.notified("READY=1");
    world.helper.books().session = false;
    world.make(&["drop-1"]);
    let why = "the helper has ended the session";
    assert!(agent.says(why).starts_with("<4>"));
    world.notified(&format!("STATUS={why}"));
    world.helper.wait_for(&[("drop-1", "drop")]);
    agent.in_force("drop-1");
}
