//! Control groups that come and go.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::Permissions;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use cgtproxy_proto::path::CGROUP2_MOUNTS;
use rustix::process::Signal;
use tempfile::TempDir;

use crate::CONFIG;
use crate::world::World;

#[test]
fn says_what_differs_and_nothing_else() {
    let mut world = World::new(CONFIG);
    world.make(&["app.slice", "app.slice/a.scope", "app.slice/drop-1"]);
    world.helper.start();
    let _agent = world.agent();
    world
        .helper
        .wait_for(&[("app.slice", "p"), ("app.slice/drop-1", "drop")]);
    // These inherit: nobody hears of them, and nothing has to be waited for.
    world.make(&["app.slice/b.scope", "other.slice", "other.slice/c.scope"]);
    world.make(&["app.slice/b.scope/free-2"]);
    world.remove(&["app.slice/a.scope"]);
    world.helper.wait_for(&[
        ("app.slice", "p"),
        ("app.slice/drop-1", "drop"),
        ("app.slice/b.scope/free-2", "direct"),
    ]);
    world.remove(&["app.slice/b.scope/free-2", "app.slice/drop-1"]);
    world.helper.wait_for(&[("app.slice", "p")]);
    let calls = world.helper.books().calls.clone();
    assert_eq!(calls[0], "ReplacePolicy");
    // One for the new one, and one or two for the removed ones.
    assert!((3..=4).contains(&calls.len()), "{calls:?}");
}

#[test]
fn a_path_that_is_made_again_is_assigned_again() {
    let mut world = World::new(CONFIG);
    world.make(&["drop-1"]);
    world.helper.start();
    let _agent = world.agent();
    world.helper.wait_for(&[("drop-1", "drop")]);
    for _ in 0..1000 {
        world.remove(&["drop-1"]);
        world.make(&["drop-1"]);
    }
    // The books know it by its inode, as the kernel does. Two in a row have different ones here,
    // because the first is still watched when the second is made.
    world.helper.wait_for(&[("drop-1", "drop")]);
}

#[test]
fn loses_none_of_a_burst_and_leaves_none_behind() {
    let mut world = World::new(CONFIG);
    world.helper.start();
    let agent = world.agent();
    world.notified("READY=1");
    let names: Vec<String> = (0..2500)
        .flat_map(|n| [format!("drop-{n}"), format!("drop-{n}/free-x")])
        .collect();
    for name in &names {
        world.make(&[name]);
    }
    world
        .helper
        .wait("all of them", |books| books.held.len() == names.len());
    assert_eq!(agent.status().controlGroups.len(), names.len() + 1);
    for name in names.iter().rev() {
        world.remove(&[name]);
    }
    world.helper.wait_for(&[]);
    assert_eq!(agent.status().controlGroups.len(), 1);
}

#[test]
fn survives_what_inotify_can_not_tell() {
    let mut world = World::new(CONFIG);
    world.make(&["drop-gone", "x", "x/drop-stays"]);
    world.helper.start();
    let mut agent = world.agent();
    world.notified("READY=1");
    agent.signal(Signal::STOP);
    // More than fs.inotify.max_queued_events, which is 16384 unless somebody has raised it.
    let limit = std::fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap();
    let limit: usize = limit.trim().parse().unwrap();
    for _ in 0..=limit / 2 {
        world.make(&["noise"]);
        world.remove(&["noise"]);
    }
    world.remove(&["drop-gone", "x/drop-stays"]);
    world.make(&["x/drop-stays", "x/deep", "x/deep/drop-new"]);
    agent.signal(Signal::CONT);
    agent.says("more happened at once");
    world
        .helper
        .wait_for(&[("x/drop-stays", "drop"), ("x/deep/drop-new", "drop")]);
    // And goes on.
    world.make(&["x/deep/drop-newer"]);
    world.helper.wait_for(&[
        ("x/drop-stays", "drop"),
        ("x/deep/drop-new", "drop"),
        ("x/deep/drop-newer", "drop"),
    ]);
}

#[test]
fn survives_its_root_going_and_coming() {
    let mut world = World::new(CONFIG);
    world.make(&["drop-1"]);
    world.helper.start();
    let agent = world.agent();
    world.helper.wait_for(&[("drop-1", "drop")]);
    // All of user.slice, and back.
    std::fs::remove_dir_all(world.cgroups.join("user.slice")).unwrap();
    agent.wait("nothing", |status| status.controlGroups.is_empty());
    std::fs::create_dir_all(&world.subtree).unwrap();
    world.make(&["app.slice", "app.slice/drop-2"]);
    world
        .helper
        .wait_for(&[("app.slice", "p"), ("app.slice/drop-2", "drop")]);
}

#[test]
fn waits_for_a_user_manager_that_is_not_there_yet() {
    let mut world = World::new(CONFIG);
    std::fs::remove_dir_all(world.cgroups.join("user.slice")).unwrap();
    world.helper.start();
    let agent = world.agent();
    world.notified("STATUS=waiting for the control group /user.slice/");
    assert!(agent.status().problem.unwrap().contains("waiting"));
    std::fs::create_dir_all(&world.subtree).unwrap();
    world.make(&["drop-1"]);
    world.helper.wait_for(&[("drop-1", "drop")]);
}

#[test]
fn names_are_bytes() {
    let mut world = World::new(CONFIG);
    world.helper.start();
    let agent = world.agent();
    let name = OsStr::from_bytes(b"drop-\xff \"'%\\x2d\x1b[2J\n");
    std::fs::create_dir(world.subtree.join(name)).unwrap();
    let wire = "drop-%FF \"'%25\\x2d\x1b[2J\n";
    world.helper.wait_for(&[(wire, "drop")]);
    agent.in_force(&format!("{}/{wire}", world.prefix));
    std::fs::remove_dir(world.subtree.join(name)).unwrap();
    world.helper.wait_for(&[]);
}

#[test]
fn a_name_too_long_for_a_message_harms_nobody() {
    let mut world = World::new(CONFIG);
    world.helper.start();
    let _agent = world.agent();
    world.notified("READY=1");
    // Deeper than a path may be: made step by step, as somebody would who means harm.
    let script = r#"cd "$1" && n=$(printf '%0200d' 0) && for i in $(seq 30); do mkdir $n && cd $n; done && mkdir drop-x"#;
    let made = Command::new("bash")
        .args(["-c", script, "bash"])
        .arg(&world.subtree)
        .status()
        .unwrap();
    assert!(made.success());
    world.make(&["drop-1"]);
    world.helper.wait_for(&[("drop-1", "drop")]);
}

#[test]
fn says_once_that_the_watches_are_used_up() {
    let mut world = World::new(CONFIG);
    world.make(&["a", "a/b", "a/b/c", "drop-1", "drop-2"]);
    world.helper.start();
    let mut unshare = Command::new("unshare");
    // As whom the test runs, with what it takes to set a limit in there.
    unshare.args(["--user", "--map-current-user", "--keep-caps"]);
    // Those that lead to the configuration, three above the subtree, and two of it.
    let watches = world.config.ancestors().skip(1).count() + 3 + 2;
    let script =
        format!(r#"echo {watches} > /proc/sys/user/max_inotify_watches || exit 77; exec "$@""#);
    let mut agent = world.agent_by(unshare, &script);
    agent.says("raise fs.inotify.max_user_watches");
    world
        .helper
        .wait_for(&[("drop-1", "drop"), ("drop-2", "drop")]);
    assert_eq!(agent.count("raise fs.inotify.max_user_watches"), 1);
    // The root is watched, so what is made in it is still seen.
    world.make(&["drop-3"]);
    world
        .helper
        .wait_for(&[("drop-1", "drop"), ("drop-2", "drop"), ("drop-3", "drop")]);
}

/// While a call to the helper is under way events are left where they are, and somebody connects.
#[test]
fn an_agent_without_descriptors_to_spare_goes_on() {
    let mut world = World::new(CONFIG);
    world.helper.start();
    let mut agent = world.agent();
    world.notified("READY=1");
    let usual = agent.leave_no_descriptors();
    world.helper.books().paused = true;
    world.make(&["drop-1"]);
    world
        .helper
        .wait("the call", |books| books.calls.len() == 2);
    world.make(&["drop-2"]);
    let socket = world.path().join("run/cgtproxy/agent.sock");
    let later: Vec<_> = (0..3)
        .map(|_| UnixStream::connect(&socket).unwrap())
        .collect();
    agent.says("can't accept connections");
    world.helper.resume();
    world
        .helper
        .wait_for(&[("drop-1", "drop"), ("drop-2", "drop")]);
    // What comes when it waits again.
    std::thread::sleep(Duration::from_millis(100));
    world.make(&["drop-3"]);
    let all = [("drop-1", "drop"), ("drop-2", "drop"), ("drop-3", "drop")];
    world.helper.wait_for(&all);
    agent.limit_descriptors(usual);
    drop(later);
    let status = agent.wait("all of them", |s| s.controlGroups.len() == 4);
    assert_eq!(status.monitors, Some(vec!["inotify".into()]));
    assert_eq!(status.monitorProblem, None);
}

/// cgroupfs never tells that a directory is gone through the watch on it: see `watch.rs`.
#[test]
fn leaves_no_watches_behind_on_cgroupfs() {
    let mut mounts = CGROUP2_MOUNTS.into_iter().map(Path::new);
    let root = mounts.find(|mount| mount.join("cgroup.procs").exists());
    let root = root.expect("cgroup v2 is mounted");
    let cgroups = root.join(name_that_is_swept());
    if let Err(error) = std::fs::create_dir(&cgroups) {
        panic!(
            "can't make the control group {} ({error}); this test must run as root",
            cgroups.display()
        );
    }
    let result = std::panic::catch_unwind(|| {
        let directory = TempDir::new().unwrap();
        let mut world = World::in_cgroups(CONFIG, directory, cgroups.clone());
        world.helper.start();
        let agent = world.agent();
        world.notified("READY=1");
        let before = watches(agent.process.id());
        for _ in 0..3 {
            for n in 0..200 {
                world.make(&[&format!("drop-{n}"), &format!("drop-{n}/free-x")]);
            }
            world.helper.wait("all", |books| books.held.len() == 400);
            for n in 0..200 {
                world.remove(&[&format!("drop-{n}/free-x"), &format!("drop-{n}")]);
            }
            world.helper.wait("none", |books| books.held.is_empty());
        }
        assert_eq!(watches(agent.process.id()), before);
    });
    remove_tree(&cgroups);
    result.unwrap();
}

/// What the test beds remove if this process is killed: see `tests/src/host_cgroup.rs`.
fn name_that_is_swept() -> String {
    let namespace = std::fs::metadata("/proc/self/ns/pid").unwrap().ino();
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    // When it was started, the 22nd field. The second is a name in parentheses.
    let (_, fields) = stat.rsplit_once(')').unwrap();
    let start = fields.split_whitespace().nth(19).unwrap();
    let pid = std::process::id();
    format!("cgtproxy-sandbox-{namespace}-{pid}-{start}-watches")
}

/// How many inotify watches a process has. A copy of a descriptor has the same ones.
fn watches(pid: u32) -> usize {
    let files = std::fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap();
    let mut watches = BTreeSet::new();
    for file in files {
        let text = std::fs::read_to_string(file.unwrap().path()).unwrap_or_default();
        let lines = text.lines().filter(|line| line.starts_with("inotify "));
        watches.extend(lines.map(str::to_owned));
    }
    watches.len()
}

/// Removes control groups, whose files can't be removed.
fn remove_tree(directory: &std::path::Path) {
    for child in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        if child.file_type().is_ok_and(|t| t.is_dir()) {
            remove_tree(&child.path());
        }
    }
    let _ = std::fs::remove_dir(directory);
}

/// As those of other users in a container are, which nobody else can look into.
#[test]
fn one_that_may_not_be_read_is_no_reason_to_look_again_and_again() {
    let mut world = World::new(CONFIG);
    world.make(&["closed", "closed/drop-1", "drop-2"]);
    let closed = world.subtree.join("closed");
    let mode = |mode| std::fs::set_permissions(&closed, Permissions::from_mode(mode)).unwrap();
    mode(0);
    world.helper.start();
    let mut agent = world.agent();
    world.helper.wait_for(&[("drop-2", "drop")]);
    agent.says("can't look into '/user.slice");
    // Those that come later as well.
    world.make(&["late"]);
    let status = agent.wait("late", |status| status.controlGroups.len() == 4);
    assert_eq!(status.monitorProblem, None);
    assert_eq!(status.monitors, Some(vec!["inotify".into()]));
    assert_eq!(agent.count("<6>can't look into"), 1);
    // It can neither be watched nor listed, and that is all.
    assert_eq!(agent.count("can't look into"), 2);
    // It is looked at again by whoever is told to, and is still known when it goes.
    mode(0o700);
    agent.signal(Signal::HUP);
    world
        .helper
        .wait_for(&[("drop-2", "drop"), ("closed/drop-1", "drop")]);
    world.remove(&["closed/drop-1", "closed"]);
    world.helper.wait_for(&[("drop-2", "drop")]);
}
