//! `AwaitTarget`, on which cgtproxy-exec relies.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use cgtproxy_proto::agent::{AwaitTarget_Args, AwaitTarget_Reply};
use cgtproxy_proto::client::CallError;
use serde_json::{Value, json};

use crate::CONFIG;
use crate::world::{Agent, World};

pub(crate) fn await_target(agent: &Agent, path: &str, target: &str) -> Result<(), (String, Value)> {
    let arguments = AwaitTarget_Args {
        controlGroup: path.into(),
        target: target.into(),
    };
    match agent.call::<AwaitTarget_Reply>("AwaitTarget", arguments) {
        Ok(_) => Ok(()),
        Err(CallError::Fault(fault)) => Err((
            fault.name.rsplit('.').next().unwrap().into(),
            fault.parameters,
        )),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn answers_when_the_helper_has_it() {
    let mut world = World::new(CONFIG);
    world.helper.start();
    let agent = world.agent();
    world.notified("READY=1");
    world.helper.books().paused = true;
    let slice = "cgtproxy.slice/cgtproxy-proxy.slice";
    world.make(&["cgtproxy.slice", slice, &format!("{slice}/a.scope")]);
    let path = format!("{}/{slice}/a.scope", world.prefix);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            world
                .helper
                .wait("the call", |books| books.calls.len() == 2);
            std::thread::sleep(Duration::from_millis(50));
            world.helper.resume();
        });
        for name in ["proxy", "p"] {
            assert_eq!(await_target(&agent, &path, name), Ok(()));
            assert_eq!(world.helper.books().held[slice].0, "p");
        }
        waiting.join().unwrap();
    });
    let other = await_target(&agent, &path, "q").unwrap_err();
    assert_eq!(
        other,
        (
            "OtherTarget".into(),
            json!({ "controlGroup": path, "target": "p" })
        )
    );
    let group = agent.explain("a.scope");
    assert!(group.execSlice && group.inForce && group.rule.is_none());
}

/// Where root has a policy for the machine, nothing said is not the same as "direct".
#[test]
fn direct_is_waited_for_as_well() {
    let mut world = World::new(CONFIG);
    world.helper.start();
    let agent = world.agent();
    world.notified("READY=1");
    world.helper.books().paused = true;
    let slice = "cgtproxy.slice/cgtproxy-direct.slice";
    world.make(&["other.slice", "cgtproxy.slice", slice]);
    let path = format!("{}/{slice}", world.prefix);
    world
        .helper
        .wait("the call", |books| books.calls.len() == 2);
    let group = agent.explain(&path);
    assert!(group.execSlice && !group.inForce);
    // What nobody says anything about needs nothing in the kernel.
    assert!(agent.explain("other.slice").inForce);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            // Longer than it takes to answer at once.
            std::thread::sleep(Duration::from_millis(200));
            world.helper.resume();
        });
        assert_eq!(await_target(&agent, &path, "direct"), Ok(()));
        assert!(world.helper.books().held.contains_key(slice));
        waiting.join().unwrap();
    });
}

#[test]
fn says_why_not() {
    let mut world = World::new(CONFIG);
    world.make(&["drop-1"]);
    let mut agent = world.agent();
    agent.says("no helper listens");
    let path = format!("{}/drop-1", world.prefix);
    let (name, parameters) = await_target(&agent, &path, "drop").unwrap_err();
    assert_eq!(name, "NotConnected");
    assert!(
        parameters["problem"]
            .as_str()
            .unwrap()
            .contains("no helper listens")
    );
    world.helper.start();
    world.notified("READY=1");
    assert_eq!(await_target(&agent, &path, "drop"), Ok(()));
    let (name, parameters) = await_target(&agent, &path, "nothing").unwrap_err();
    assert_eq!(name, "UnknownTarget");
    assert_eq!(
        parameters["known"],
        json!(["direct", "drop", "proxy", "p", "q"])
    );
    for path in [
        format!("{path}x"),
        "/other".into(),
        "x".into(),
        format!("{path}/.."),
    ] {
        let error = await_target(&agent, &path, "drop").unwrap_err();
        assert_eq!(error.0, "ControlGroupNotFound");
    }
}

#[test]
fn who_drops_everything_drops() {
    let mut world = World::new(&CONFIG.replace("drop: true", "drop: all"));
    world.make(&["drop-1"]);
    world.helper.start();
    let agent = world.agent();
    world.notified("READY=1");
    let path = format!("{}/drop-1", world.prefix);
    assert_eq!(await_target(&agent, &path, "drop"), Ok(()));
    assert_eq!(world.helper.books().held["drop-1"].0, "drop-all");
}

#[test]
fn waits_for_a_helper_that_restarts() {
    let mut world = World::new(CONFIG);
    world.make(&["drop-1"]);
    world.helper.start();
    let agent = world.agent();
    world.notified("READY=1");
    world.helper.stop();
    agent.wait("the loss", |s| !s.connected);
    let path = format!("{}/drop-1", world.prefix);
    let helper = &mut world.helper;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(50));
            helper.start();
        });
        assert_eq!(await_target(&agent, &path, "drop"), Ok(()));
    });
}

#[test]
fn serves_its_user_alone() {
    let mut world = World::new(CONFIG);
    world.helper.start();
    let agent = world.agent();
    world.notified("READY=1");
    let directory = world.path().join("run/cgtproxy");
    let mode = |path: &std::path::Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&directory), 0o700);
    assert_eq!(mode(&directory.join("agent.sock")), 0o600);
    // A socket that a killed agent left is no obstacle.
    drop(agent);
    assert!(directory.join("agent.sock").exists());
    let agent = world.agent();
    world.notified("READY=1");
    assert!(agent.status().connected);
}
