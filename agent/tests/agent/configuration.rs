//! Configurations that change.

use std::fs::Permissions;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use cgtproxy_proto::agent::GetStatus_Reply;
use cgtproxy_proto::service::Fault;
use rustix::process::Signal;
use serde_json::json;

use crate::CONFIG;
use crate::fake::fault;
use crate::world::{Agent, World};

const OTHER: &str = "version: 1\nrules: [{match: 'one$', drop: all}]\n";

#[test]
fn a_change_takes_effect_in_one_call() {
    let mut world = World::new(CONFIG);
    world.make(&["drop-1", "one", "two"]);
    world.helper.start();
    let agent = world.agent();
    world.helper.wait_for(&[("drop-1", "drop")]);
    let calls = world.helper.books().calls.len();
    world.write(OTHER);
    world.helper.wait_for(&[("one", "drop-all")]);
    assert_eq!(world.helper.books().calls.len(), calls + 1);
    // Written in place, too.
    std::fs::write(&world.config, OTHER.replace("one", "two")).unwrap();
    world.helper.wait_for(&[("two", "drop-all")]);
    agent.in_force("two");
    assert_eq!(agent.explain("two").rule, Some(1));
}

#[test]
fn a_broken_one_is_refused_and_the_old_one_stays() {
    let mut world = World::new(CONFIG);
    world.make(&["drop-1"]);
    world.helper.start();
    let mut agent = world.agent();
    world.notified("READY=1");
    world.write("version: 1\nrules:\n  - match: '('\n    drop: true\n");
    agent.says("config.yaml:3:13: bad regular expression: unclosed group");
    agent.wait("the error", |s| {
        s.configError
            .as_deref()
            .is_some_and(|e| e.contains("config.yaml:3:13"))
    });
    // It stays for what comes later.
    world.make(&["drop-2"]);
    world
        .helper
        .wait_for(&[("drop-1", "drop"), ("drop-2", "drop")]);
    world.write(OTHER);
    world.make(&["one"]);
    world.helper.wait_for(&[("one", "drop-all")]);
    assert_eq!(agent.status().configError, None);
    // A file that vanishes takes nothing out of force.
    std::fs::remove_file(&world.config).unwrap();
    agent.says("there is no file");
    agent.in_force("one");
    world.write(CONFIG);
    world
        .helper
        .wait_for(&[("drop-1", "drop"), ("drop-2", "drop")]);
}

/// What an administrator allows may be less than a configuration has.
fn too_many_proxies() -> Fault {
    fault("TooManyProxies", json!({ "limit": 3 }))
}

/// An agent with a configuration in force, and another one in the file, which the helper refuses so many times.
fn refused(refusal: &Fault, times: usize) -> (World, Agent) {
    let mut world = World::new(CONFIG);
    world.make(&["drop-1", "one"]);
    world.helper.start();
    let agent = world.agent();
    world.helper.wait_for(&[("drop-1", "drop")]);
    let refusals = std::iter::repeat_n(refusal.clone(), times);
    world.helper.books().faults.extend(refusals);
    world.write(OTHER);
    (world, agent)
}

#[test]
fn one_that_the_helper_refuses_is_taken_back() {
    let (world, mut agent) = refused(&too_many_proxies(), 1);
    agent.says("no more than 3 proxies per user; the old configuration stays");
    world.make(&["drop-2"]);
    world
        .helper
        .wait_for(&[("drop-1", "drop"), ("drop-2", "drop")]);
    let status = agent.wait("all in force", |s| {
        s.controlGroups.iter().all(|g| g.inForce)
    });
    assert!(
        status
            .configError
            .unwrap()
            .contains("no more than 3 proxies")
    );
    assert!(status.connected && status.controlGroups.iter().all(|g| g.inForce));
    // Told to try again, it does.
    agent.signal(Signal::HUP);
    world.helper.wait_for(&[("one", "drop-all")]);
    assert_eq!(agent.status().configError, None);
}

/// What the helper can't do for the moment is tried again, and the old configuration is kept up meanwhile.
#[test]
fn one_that_is_refused_for_what_passes_is_tried_again() {
    let refusal = fault("KernelRefused", json!({ "message": "out of memory" }));
    let (world, mut agent) = refused(&refusal, 3);
    agent.says("out of memory; the old configuration stays until it is tried again");
    world.helper.wait_for(&[("one", "drop-all")]);
    agent.in_force("one");
    assert_eq!(agent.status().configError, None);
    assert_eq!(agent.count("out of memory"), 1);
}

#[test]
fn one_that_is_refused_is_tried_when_it_is_saved_again() {
    let (world, mut agent) = refused(&too_many_proxies(), 1);
    agent.says("the old configuration stays");
    world.write(OTHER);
    world.helper.wait_for(&[("one", "drop-all")]);
    agent.in_force("one");
    assert_eq!(agent.status().configError, None);
}

/// The administrator may have raised a limit.
#[test]
fn one_that_is_refused_is_tried_in_the_next_session() {
    let (mut world, mut agent) = refused(&too_many_proxies(), 1);
    agent.says("the old configuration stays");
    world.helper.stop();
    agent.wait("the loss", |s| !s.connected);
    // The first call brings back what was in force, the second one tries.
    world.helper.start();
    world.helper.wait_for(&[("one", "drop-all")]);
    agent.in_force("one");
    let calls = world.helper.books().calls.clone();
    assert_eq!(calls, ["ReplacePolicy", "ReplacePolicy"]);
    assert_eq!(agent.status().configError, None);
}

/// The one that the helper refuses is not the one that is in the file by then.
#[test]
fn one_that_is_written_while_another_is_refused_is_tried() {
    let mut world = World::new(CONFIG);
    world.make(&["drop-1", "one", "two"]);
    world.helper.start();
    let agent = world.agent();
    world.helper.wait_for(&[("drop-1", "drop")]);
    {
        let mut books = world.helper.books();
        books.paused = true;
        books.faults.push_back(too_many_proxies());
    }
    let calls = world.helper.books().calls.len();
    world.write(OTHER);
    world
        .helper
        .wait("the first", |books| books.calls.len() > calls);
    world.write(&OTHER.replace("one", "two"));
    agent.wait("the second to be read", |s| {
        let two = s.controlGroups.iter().find(|g| g.path.ends_with("/two"));
        two.is_some_and(|two| two.target == "drop-all")
    });
    world.helper.resume();
    world.helper.wait_for(&[("two", "drop-all")]);
    agent.in_force("two");
    assert_eq!(agent.status().configError, None);
}

#[test]
fn a_signal_reloads_and_the_service_manager_hears_of_it() {
    let mut world = World::new(CONFIG);
    world.helper.start();
    let agent = world.agent();
    world.notified("READY=1");
    agent.signal(Signal::HUP);
    world.notified("RELOADING=1");
    world.notified("READY=1");
    assert_eq!(
        world.helper.books().calls,
        ["ReplacePolicy", "ReplacePolicy"]
    );
    // With a broken file and without a helper the reload ends as well.
    world.write("version: 3");
    agent.signal(Signal::HUP);
    world.notified("RELOADING=1");
    world.notified("READY=1");
    world.helper.stop();
    agent.wait("the loss", |s| !s.connected);
    agent.signal(Signal::HUP);
    world.notified("RELOADING=1");
    world.notified("READY=1");
}

#[test]
fn the_service_manager_is_told_of_a_file_that_is_not_in_force() {
    let mut world = World::new(CONFIG);
    world.make(&["drop-1"]);
    world.helper.start();
    let agent = world.agent();
    world.status_becomes("In force");
    let mistake = "In force; config.yaml has a mistake in line 3";
    // Nobody has asked for it to be loaded.
    world.write("version: 1\nrules:\n  - match: '('\n    drop: true\n  - nonsense: 1\n");
    world.status_becomes(mistake);
    agent.signal(Signal::HUP);
    world.notified("RELOADING=1");
    world.status_becomes(mistake);
    world.notified("READY=1");
    world.write("version: 1\nrules: []\n\nnonsense: 1\n");
    world.status_becomes(&mistake.replace('3', "4"));
    world.write(OTHER);
    world.status_becomes("In force");
    std::fs::remove_file(&world.config).unwrap();
    let file = world.config.display();
    world.status_becomes(&format!("In force; there is no file {file}"));
    // One that the helper refuses.
    world.helper.books().faults.push_back(too_many_proxies());
    world.write(CONFIG);
    world.status_becomes(
        "In force, and not what the file says now: the administrator allows no more than 3 proxies per user",
    );
    agent.signal(Signal::HUP);
    world.status_becomes("In force");
}

#[test]
fn without_a_file_all_goes_direct_until_there_is_one() {
    let mut world = World::new("");
    world.make(&[
        "drop-1",
        "cgtproxy.slice",
        "cgtproxy.slice/cgtproxy-drop.slice",
    ]);
    world.helper.start();
    let mut agent = world.agent();
    agent.says("everything goes direct");
    world
        .helper
        .wait_for(&[("cgtproxy.slice/cgtproxy-drop.slice", "drop")]);
    assert_eq!(agent.status().config, None);
    world.write(CONFIG);
    world.helper.wait_for(&[
        ("drop-1", "drop"),
        ("cgtproxy.slice/cgtproxy-drop.slice", "drop"),
    ]);
    assert_eq!(agent.status().config.as_deref(), world.config.to_str());
    assert_eq!(agent.count("everything goes direct"), 1);
}

#[test]
fn one_that_is_migrated_to_its_place_is_loaded() {
    let mut world = World::new("");
    world.make(&["drop-1"]);
    world.helper.start();
    std::fs::create_dir_all(world.config.parent().unwrap()).unwrap();
    let mut agent = world.agent();
    agent.says("the policy is in force");
    let old = world.path().join("old.yaml");
    std::fs::write(&old, CONFIG).unwrap();
    // However late the agent looks.
    agent.signal(Signal::STOP);
    let mut command = world.command();
    command.arg("migrate").arg(&old);
    command.arg("--output").arg(&world.config);
    let (code, _, said) = crate::world::output(command);
    assert_eq!(code, Some(0), "{said}");
    agent.signal(Signal::CONT);
    world.helper.wait_for(&[("drop-1", "drop")]);
    assert_eq!(agent.status().config.as_deref(), world.config.to_str());
}

#[test]
fn one_that_can_not_be_read_is_read_when_it_can() {
    let mut world = World::new(CONFIG);
    world.make(&["drop-1", "one"]);
    world.helper.start();
    let mut agent = world.agent();
    world.helper.wait_for(&[("drop-1", "drop")]);
    let new = world.config.with_extension("new");
    std::fs::write(&new, OTHER).unwrap();
    let mode = |path: &Path, mode| {
        std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    };
    mode(&new, 0);
    std::fs::rename(&new, &world.config).unwrap();
    agent.says("can't read");
    mode(&world.config, 0o600);
    world.helper.wait_for(&[("one", "drop-all")]);
    agent.in_force("one");
    assert_eq!(agent.status().configError, None);
}

#[test]
fn a_file_that_is_a_link_is_followed() {
    let mut world = World::new("");
    world.make(&["drop-1", "one"]);
    let real = world.path().join("dotfiles");
    std::fs::create_dir_all(&real).unwrap();
    std::fs::write(real.join("a.yaml"), CONFIG).unwrap();
    std::fs::create_dir_all(world.config.parent().unwrap()).unwrap();
    symlink(real.join("a.yaml"), &world.config).unwrap();
    world.helper.start();
    let _agent = world.agent();
    world.helper.wait_for(&[("drop-1", "drop")]);
    std::fs::write(real.join("a.yaml"), OTHER).unwrap();
    world.helper.wait_for(&[("one", "drop-all")]);
    std::fs::write(real.join("b.yaml"), CONFIG).unwrap();
    std::fs::remove_file(&world.config).unwrap();
    symlink(real.join("b.yaml"), &world.config).unwrap();
    world.helper.wait_for(&[("drop-1", "drop")]);
}

/// Makes a link, or lets it lead elsewhere, as `ln -sfn` does.
fn link(target: &str, at: &Path) {
    let new = at.with_extension("new");
    symlink(target, &new).unwrap();
    std::fs::rename(new, at).unwrap();
}

#[test]
fn links_on_the_way_are_followed_wherever_they_lead() {
    let mut world = World::new("");
    world.make(&["drop-1", "one"]);
    world.helper.start();
    let at = |path: &str| world.path().join(path);
    for directory in ["homes/1", "homes/2/cgtproxy", "dots/1", "dots/2", "dots/3"] {
        std::fs::create_dir_all(at(directory)).unwrap();
    }
    link("homes/1", &at("home"));
    link("../../dots/now", &at("homes/1/cgtproxy"));
    link("1", &at("dots/now"));
    link("real.yaml", &at("dots/1/config.yaml"));
    std::fs::write(at("dots/1/real.yaml"), CONFIG).unwrap();
    std::fs::write(at("dots/2/config.yaml"), OTHER).unwrap();
    std::fs::write(at("dots/3/config.yaml"), OTHER).unwrap();
    std::fs::write(at("homes/2/cgtproxy/config.yaml"), CONFIG).unwrap();
    let _agent = world.agent();
    let (first, second) = ([("drop-1", "drop")], [("one", "drop-all")]);
    world.helper.wait_for(&first);
    // From the last one to the first one.
    link("2", &at("dots/now"));
    world.helper.wait_for(&second);
    std::fs::write(at("dots/2/config.yaml"), CONFIG).unwrap();
    world.helper.wait_for(&first);
    link("../../dots/3", &at("homes/1/cgtproxy"));
    world.helper.wait_for(&second);
    link("homes/2", &at("home"));
    world.helper.wait_for(&first);
    std::fs::write(at("homes/2/cgtproxy/config.yaml"), OTHER).unwrap();
    world.helper.wait_for(&second);
}

#[test]
fn a_directory_that_another_one_replaces_is_followed() {
    let mut world = World::new(CONFIG);
    world.make(&["drop-1", "one"]);
    world.helper.start();
    let _agent = world.agent();
    let (first, second) = ([("drop-1", "drop")], [("one", "drop-all")]);
    world.helper.wait_for(&first);
    // That of the file, and what that is in.
    let own = world.config.parent().unwrap();
    for directory in [own, own.parent().unwrap()] {
        std::fs::rename(directory, directory.with_extension("old")).unwrap();
        world.write(OTHER);
        world.helper.wait_for(&second);
        std::fs::write(&world.config, CONFIG).unwrap();
        world.helper.wait_for(&first);
    }
}

#[test]
fn a_directory_that_is_made_anew_is_followed() {
    let mut world = World::new(CONFIG);
    world.make(&["drop-1", "one"]);
    world.helper.start();
    let agent = world.agent();
    let (first, second) = ([("drop-1", "drop")], [("one", "drop-all")]);
    world.helper.wait_for(&first);
    let own = world.config.parent().unwrap();
    // Somebody may be in it still: the kernel does not call it deleted before they leave.
    for somebody in [None, Some(std::fs::File::open(own).unwrap())] {
        std::fs::remove_file(&world.config).unwrap();
        let missing = |s: &GetStatus_Reply| s.configError.is_some();
        agent.wait("no file", missing);
        std::fs::remove_dir(own).unwrap();
        world.write(OTHER);
        world.helper.wait_for(&second);
        drop(somebody);
        std::fs::write(&world.config, CONFIG).unwrap();
        world.helper.wait_for(&first);
    }
}

#[test]
fn a_file_that_the_user_names_must_be_there() {
    let world = World::new("");
    let mut command = world.command();
    command.args(["--config", "/nonexistent/c.yaml"]);
    let (code, _, said) = crate::world::output(command);
    assert_eq!(
        (code, said.as_str()),
        (Some(1), "error: there is no file /nonexistent/c.yaml\n")
    );
}

#[test]
fn one_that_is_wrong_at_the_start_is_waited_for() {
    const WRONG: &str = "version: 1\nrule: []\n";
    let mut world = World::new(WRONG);
    world.make(&["drop-1", "one"]);
    world.helper.start();
    let mut agent = world.agent();
    agent.says("config.yaml:2:1: unknown key 'rule'");
    agent.says("waiting for the configuration to be fixed");
    let waits = |s: &GetStatus_Reply, place: &str| {
        let error = s.configError.as_deref();
        !s.connected
            && s.problem.as_deref() == Some("waiting for the configuration to be fixed")
            && error.is_some_and(|e| e.contains(place))
    };
    world.notified("STATUS=waiting for the configuration to be fixed: ");
    agent.wait("what it waits for", |s| waits(s, "config.yaml:2:1"));
    let told = agent.targets();
    assert_eq!(told.targets, ["direct", "drop"]);
    let error = told.configError.unwrap();
    let waits_for = format!("waiting for the configuration to be fixed: {error}");
    assert_eq!(told.problem, Some(waits_for));
    // Another mistake, and another file name.
    world.write("version: 1\nrules:\n  - match: '('\n    drop: true\n");
    agent.wait("the other mistake", |s| waits(s, "config.yaml:3:13"));
    world.notified("STATUS=waiting for the configuration to be fixed: ");
    std::fs::remove_file(&world.config).unwrap();
    agent.wait("no file", |s| waits(s, "there is no file"));
    // It is no reload when there is nothing to be ready with again.
    agent.signal(Signal::HUP);
    world.make(&["two"]);
    agent.wait("the new one", |s| s.controlGroups.len() == 4);
    assert!(!world.is_notified("READY=1"));
    assert_eq!(world.helper.books().calls, [] as [&str; 0]);
    assert_eq!(agent.count("the old configuration stays"), 0);
    world.write(CONFIG);
    world.helper.wait_for(&[("drop-1", "drop")]);
    world.notified("READY=1");
    assert_eq!(world.helper.books().calls, ["ReplacePolicy"]);
    let status = agent.wait("it to be in force", |s| s.connected);
    assert_eq!((status.configError, status.problem), (None, None));
    let told = agent.targets();
    assert_eq!((told.configError, told.problem), (None, None));
    // From then on it is as with any other.
    world.write(WRONG);
    agent.says("the old configuration stays in force");
}

#[test]
fn a_link_to_nothing_is_waited_for() {
    let mut world = World::new("");
    world.make(&["drop-1", "one"]);
    world.helper.start();
    let at = |path: &str| world.path().join(path);
    std::fs::create_dir_all(world.config.parent().unwrap()).unwrap();
    symlink(at("vault/config.yaml"), &world.config).unwrap();
    let mut agent = world.agent();
    agent.says("is a link to ");
    agent.says("waiting for the configuration to be fixed");
    world.notified("STATUS=waiting for the configuration to be fixed: ");
    // What is on the way still is not it.
    std::fs::create_dir(at("vault")).unwrap();
    agent.signal(Signal::HUP);
    agent.says("is a link to ");
    assert!(!world.is_notified("READY=1"));
    assert_eq!(world.helper.books().calls, [] as [&str; 0]);
    // Without the link, what is missing is the file.
    std::fs::remove_file(&world.config).unwrap();
    agent.wait("no link", |s| {
        let error = s.configError.as_deref();
        error.is_some_and(|e| e.contains("there is no file") && !e.contains("link"))
    });
    symlink(at("vault/config.yaml"), &world.config).unwrap();
    agent.wait("the link again", |s| {
        let error = s.configError.as_deref();
        error.is_some_and(|e| e.contains("is a link to"))
    });
    std::fs::write(at("vault/config.yaml"), CONFIG).unwrap();
    world.helper.wait_for(&[("drop-1", "drop")]);
    world.notified("READY=1");
    assert_eq!(agent.status().configError, None);
}

#[test]
fn one_that_waits_takes_nothing_away() {
    let mut world = World::new("version: 2");
    world.helper.start();
    let mut agent = world.agent();
    world.notified("STATUS=waiting for the configuration to be fixed: ");
    agent.wait("what it waits for", |s| s.configError.is_some());
    agent.signal(Signal::TERM);
    assert!(agent.process.wait().unwrap().success());
    assert_eq!(world.helper.books().calls, [] as [&str; 0]);
}
