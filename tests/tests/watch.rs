//! How agents notice control groups where inotify does not tell of all of them.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a panic is a failed test"
)]

use std::fs;

use cgtproxy_tests::agent::Agent;
use cgtproxy_tests::sandbox::{App, Sandbox, Server, Service, User, applications_below, sandbox};
use cgtproxy_tests::session::mapped_ids;
use cgtproxy_tests::steady::Steady;
use cgtproxy_tests::wait::wait_until;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// Every application is dropped, by a verdict of its own, but for one that goes through a proxy.
const DROP_EACH: &str = "
version: 1
tproxies: {mihomo: {port: 7890}}
rules: [{match: app-steady, tproxy: mihomo}, {match: '/app-[^/]*$', drop: true}]
";
/// No application is dropped.
const DROP_NONE: &str = "
version: 1
tproxies: {mihomo: {port: 7890}}
rules: [{match: app-steady, tproxy: mihomo}]
";
/// What is said when there are no watches left.
const EXHAUSTED: &str = "raise fs.inotify.max_user_watches with sysctl";

/// Traffic of the application that goes through a proxy, as it does whatever becomes of the others.
struct Through<'a> {
    sb: &'a Sandbox,
    steady: Steady,
    _app: App,
    _proxy: Server,
}

impl<'a> Through<'a> {
    /// Starts it; the user's agent runs, and there is no other application yet.
    #[track_caller]
    fn start(sb: &'a Sandbox, user: &User) -> Self {
        let proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let cgroup = user.cgroup("session.slice/app-steady.scope");
        wait_for_all(sb, user, 0);
        let app = cgroup.app();
        Self {
            sb,
            steady: Steady::start(sb, &app),
            _app: app,
            _proxy: proxy,
        }
    }

    /// Insists that every question since the last time has gone through the proxy.
    #[track_caller]
    fn assert_none_strayed(&self) {
        self.steady.assert_none_strayed(self.sb, &["mihomo"]);
    }
}

/// Waits until the kernel has exactly the applications that there are: so many, and the one with traffic.
#[track_caller]
fn wait_for_all(sb: &Sandbox, user: &User, count: usize) {
    let made = applications_below(&user.service().directory());
    assert_eq!(made.len(), count + 1);
    wait_until("all of them, and no others, are in the kernel", || {
        mapped_ids(sb, 1001) == made
    });
}

/// Waits until the status tells of these monitors, and of a problem with that text or of none.
#[track_caller]
fn wait_for_status(agent: &mut Agent, monitors: &[&str], problem: Option<&str>) {
    let mut status = Value::Null;
    wait_until("the status to say how it stands", || {
        status = agent.status();
        let said = status["monitorProblem"].as_str();
        let same = match (said, problem) {
            (Some(said), Some(problem)) => said.contains(problem),
            (said, problem) => said == problem,
        };
        same && status["monitors"] == json!(monitors)
    });
}

fn in_slice(user: &User, script: &str) {
    let slice = user.cgroup("app.slice").directory();
    user.shell(&format!("cd {} && {script}", slice.display()));
}

/// Control groups come, go and come again, side by side and in each other.
#[track_caller]
fn churn(sb: &Sandbox, user: &User) {
    for _ in 0..2 {
        in_slice(
            user,
            "seq -f app-%g.scope 100 | xargs mkdir; mkdir -p a.slice/b.slice;
             seq -f a.slice/b.slice/app-%g.scope 100 | xargs mkdir",
        );
        wait_for_all(sb, user, 200);
        // The same paths, and other control groups.
        in_slice(
            user,
            "for i in $(seq 100); do rmdir app-$i.scope a.slice/b.slice/app-$i.scope
             mkdir app-$i.scope a.slice/b.slice/app-$i.scope; done",
        );
        wait_for_all(sb, user, 200);
        let last = user.cgroup("app.slice/a.slice/b.slice/app-100.scope");
        let to = sb.destinations()[0];
        assert!(last.app_as(1001).udp(to).is_dropped());
        sb.assert_nothing_left_for(to.ip());
        last.remove();
        in_slice(
            user,
            "find . -name 'app-*.scope' | xargs rmdir; rmdir a.slice/b.slice a.slice",
        );
        wait_for_all(sb, user, 0);
    }
}

#[test]
fn with_all_watches_used_up_everything_is_still_found() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let alice = sb.user(1001);
        in_slice(&alice, "mkdir -p deep.slice/er.slice/app-early.scope");
        // For the six directories that lead to the configuration, those above the subtree, and three of it.
        let service = alice.agent(DROP_EACH).watches(13).start();
        wait_until("the one that was there is in the kernel", || {
            mapped_ids(sb, 1001) == applications_below(&alice.service().directory())
        });
        in_slice(&alice, "rmdir deep.slice/er.slice/app-early.scope");
        let through = Through::start(sb, &alice);
        churn(sb, &alice);
        let mut agent = Agent::of(&alice);
        wait_for_status(&mut agent, &["inotify"], Some("no watches left"));
        assert_eq!(service.log().matches(EXHAUSTED).count(), 1);
        // The configuration is watched all the same.
        service.write_config(DROP_NONE);
        service.wait_log("loaded ");
        service.write_config(DROP_EACH);
        // It is all over as soon as somebody raises the limit.
        sb.limit_watches(service.pid(), 10_000);
        wait_for_status(&mut agent, &["inotify"], None);
        churn(sb, &alice);
        assert_eq!(service.log().matches(EXHAUSTED).count(), 1);
        through.assert_none_strayed();
    });
}

/// Root's watches are for other programs too, and for everybody's control groups.
#[test]
fn one_user_uses_up_no_more_of_roots_watches_than_are_left_for_others() {
    sandbox(|sb| {
        const MOST: usize = 120;
        /// What is watched besides: the way to the configuration.
        const BESIDES: usize = 10;
        let _helper = sb.helper().start();
        let (root, alice, bob) = (sb.user(0), sb.user(1001), sb.user(1002));
        let slice = bob.cgroup("app.slice");
        let most = u32::try_from(MOST).expect("a few");
        let system = root.agent(DROP_EACH).argument("--system").watches(most);
        let service = system.start();
        // The agent has descriptors twice, to wait for them.
        let list = format!(
            "sort -u /proc/{}/fdinfo/* | grep '^inotify wd'",
            service.pid()
        );
        let watched = || sb.run(&["sh", "-c", &list]).lines().count();
        in_slice(&alice, "mkdir $(seq -f other-%g.scope 200) app-last.scope");
        let mut agent = Agent(root.varlink("/run/cgtproxy-agent-system/agent.sock"));
        wait_for_status(&mut agent, &["inotify"], Some("than are left for others"));
        service.wait_log("is looked at every now and then: one user's");
        // It has its verdict all the same.
        wait_until("the last one is in the kernel", || {
            mapped_ids(sb, 0) == applications_below(&alice.service().directory())
        });
        let of_alice = watched();
        assert!(of_alice <= MOST / 2 + BESIDES, "{of_alice}");
        // There are watches for others.
        in_slice(&bob, "mkdir -p app.slice/app-other.scope");
        wait_until("those of another one are watched", || watched() > of_alice);
        drop(slice);
        assert_eq!(service.log().matches("is looked at every now").count(), 1);
        assert!(!service.log().contains(EXHAUSTED));
        in_slice(&alice, "rmdir other-*.scope");
        wait_for_status(&mut agent, &["inotify"], None);
    });
}

#[test]
fn without_inotify_and_without_a_bus_everything_is_still_found() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let alice = sb.user(1001);
        let config = |monitor: &str| format!("{DROP_EACH}monitor: {monitor}\n");
        let service = alice.agent(&config("dbus")).start();
        let mut agent = Agent::of(&alice);
        let through = Through::start(sb, &alice);
        churn(sb, &alice);
        wait_for_status(&mut agent, &[], Some("systemd can't be followed"));
        let complaint = "can't follow systemd over D-Bus";
        assert_eq!(service.log().matches(complaint).count(), 1);
        // And while it changes.
        for monitor in ["inotify", "auto", "dbus", "auto"] {
            in_slice(&alice, "mkdir -p x.slice/app-before.scope");
            service.write_config(&config(monitor));
            in_slice(&alice, "mkdir x.slice/app-after.scope");
            wait_for_all(sb, &alice, 2);
            let (monitors, problem) = match monitor {
                "dbus" => (&[][..], Some("systemd can't be followed")),
                _ => (&["inotify"][..], None),
            };
            wait_for_status(&mut agent, monitors, problem);
            in_slice(&alice, "rmdir x.slice/app-*");
            wait_for_all(sb, &alice, 0);
            through.assert_none_strayed();
        }
    });
}

/// More events than inotify's queue takes.
fn overflow(user: &User, service: &Service) {
    let limit = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").expect("Linux");
    let limit: usize = limit.trim().parse().expect("a number");
    service.signal(Signal::SIGSTOP);
    let noise = user.cgroup("app.slice").directory().join("noise");
    for _ in 0..=limit / 2 {
        fs::create_dir(&noise).expect("root may make it");
        fs::remove_dir(&noise).expect("nobody is in it");
    }
}

#[test]
fn what_does_not_fit_into_the_queue_is_looked_for() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let alice = sb.user(1001);
        let service = alice.agent(DROP_EACH).start();
        let through = Through::start(sb, &alice);
        in_slice(
            &alice,
            "mkdir app-gone.scope app-stays.scope app-another.scope",
        );
        wait_for_all(sb, &alice, 3);
        overflow(&alice, &service);
        in_slice(
            &alice,
            "rmdir app-gone.scope app-another.scope
             mkdir -p app-another.scope new.slice/er.slice/app-new.scope",
        );
        service.signal(Signal::SIGCONT);
        service.wait_log("more happened at once than inotify could tell");
        wait_for_all(sb, &alice, 3);
        churn_again(sb, &alice);
        through.assert_none_strayed();
    });
}

/// Control groups are noticed as usual.
#[track_caller]
fn churn_again(sb: &Sandbox, user: &User) {
    in_slice(user, "find . -name 'app-*.scope' | xargs rmdir");
    wait_for_all(sb, user, 0);
    churn(sb, user);
}

#[test]
fn without_descriptors_to_spare_nothing_is_forgotten() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let alice = sb.user(1001);
        let service = alice.agent(DROP_EACH).start();
        let through = Through::start(sb, &alice);
        let with_traffic = mapped_ids(sb, 1001);
        let mut agent = Agent::of(&alice);
        agent.status();
        let open = service.descriptors();
        let usual = service.limit_descriptors(service.descriptors_and(0));
        // What is made at once with what is in it has to be listed. An agent that is quicker than mkdir would hear of
        // each by inotify.
        service.signal(Signal::SIGSTOP);
        in_slice(
            &alice,
            "mkdir -p a.slice/b.slice/app-1.scope c.slice/app-2.scope app-3.scope",
        );
        service.signal(Signal::SIGCONT);
        for _ in 0..20 {
            in_slice(
                &alice,
                "mkdir -p n.slice/o.slice/app-4.scope; rmdir -p n.slice/o.slice/app-4.scope",
            );
        }
        // What needs no descriptor is done first.
        let app = alice.cgroup("app.slice/app-3.scope").id();
        wait_until("the one that was seen is in the kernel", || {
            mapped_ids(sb, 1001) == [&with_traffic[..], &[app]].concat()
        });
        wait_until("nothing is to be done but to list", || {
            let groups = agent.status()["controlGroups"].clone();
            let groups = groups.as_array().expect("a list").clone();
            groups.iter().all(|group| group["inForce"] == true)
        });
        assert_eq!(service.descriptors(), open);
        // Who is connected is served, who comes later waits, and that is said once.
        let mut later = Agent::of(&alice);
        service.wait_log("can't accept connections");
        assert_eq!(agent.status()["connected"], true);
        service.limit_descriptors(usual);
        assert_eq!(later.status()["connected"], true);
        assert_eq!(service.log().matches("can't accept connections").count(), 1);
        wait_for_all(sb, &alice, 3);
        wait_for_status(&mut agent, &["inotify"], None);
        churn_again(sb, &alice);
        through.assert_none_strayed();
    });
}

/// Makes directories in each other with the longest names, below `app.slice`, and does something in the innermost.
fn deep_down(user: &User, script: &str) {
    let down = "n=$(printf %0255d 0); for i in $(seq 15); do mkdir -p $n; cd -P $n; done";
    in_slice(user, &format!("{down}; {script}"));
}

#[test]
fn what_is_made_where_paths_are_too_long_for_the_kernel_is_kept() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let alice = sb.user(1001);
        let service = alice.agent(DROP_EACH).start();
        // As deep as the helper goes, and shorter than messages have it.
        deep_down(&alice, "mkdir app-$(printf %0200d 0)");
        wait_until("the long one is in the kernel", || {
            mapped_ids(sb, 1001).len() == 1
        });
        let long = mapped_ids(sb, 1001);
        // Which looks at everything.
        service.reload();
        in_slice(&alice, "mkdir app-after.scope");
        wait_until("the other one is in the kernel", || {
            let mut ids = mapped_ids(sb, 1001);
            ids.retain(|id| !long.contains(id));
            !ids.is_empty()
        });
        assert_eq!(mapped_ids(sb, 1001).len(), 2);
        let mut agent = Agent::of(&alice);
        wait_for_status(&mut agent, &["inotify"], None);
    });
}

#[test]
fn what_a_user_makes_again_and_again_is_said_once() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let alice = sb.user(1001);
        let mut service = alice.agent(DROP_EACH).start();
        let many = "for i in $(seq 20); do";
        in_slice(&alice, &format!("{many} mkdir -m 000 closed-$i; done"));
        // Deeper than the helper goes.
        let down = format!("{many} mkdir d; cd d; done");
        in_slice(&alice, &format!("{down}; {many} mkdir app-$i; done"));
        deep_down(&alice, &format!("{many} mkdir $(printf %0250d $i); done"));
        let said = [
            "can't look into '",
            "the helper passed over '",
            "can't follow '",
        ];
        for said in said {
            service.wait_log(said);
        }
        in_slice(&alice, "mkdir app-last");
        let last = alice.cgroup("app.slice/app-last");
        Agent::of(&alice).wait_for_verdict(&last, "drop");
        let log = service.log();
        for said in said {
            assert_eq!(log.matches(said).count(), 1, "{said}: {log}");
        }
        assert!(log.lines().all(|line| line.len() < 1024), "{log}");
        // Whoever asks for a reload hears it again.
        service.reload();
        wait_until("it is said again", || {
            service.log().matches(said[0]).count() == 2
        });
        assert!(service.stop().success());
    });
}
