//! Agents of ordinary users, with a real helper and a real kernel: what users get for what they
//! write into their files, whatever happens meanwhile.

#![allow(clippy::expect_used, reason = "a panic is a failed test")]

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use cgtproxy_tests::agent::{Agent, wire_path};
use cgtproxy_tests::sandbox::{Cgroup, User, applications_below, by, direct, proxied, sandbox};
use cgtproxy_tests::session::{Session, mapped_ids};
use cgtproxy_tests::steady::Steady;
use cgtproxy_tests::wait::wait_until;
use cgtproxy_tests::wire::Transport::Udp;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// Every application through the proxy, but for some.
const CONFIG: &str = r"
version: 1
tproxies:
  mihomo: {port: 7890}
rules:
  - {match: app-game, direct: true}
  - {match: app-tracker, drop: true}
  - {match: '/app\.slice$', tproxy: mihomo}
";
/// Every application is dropped, by a verdict of its own.
const DROP_EACH: &str = r"
version: 1
rules:
  - {match: '/app-[^/]*\.scope$', drop: true}
";

fn scope(user: &User, name: &str) -> Cgroup {
    user.cgroup(format!("app.slice/app-{name}.scope"))
}

/// Runs `cgtproxy-agent` to its end: its exit status, stdout and stderr.
fn agent(user: &User, arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = user.run("cgtproxy-agent", arguments);
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("it prints UTF-8");
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

#[test]
fn two_users_side_by_side_each_have_their_own_policy() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let (alice, bob) = (sb.user(1001), sb.user(1002));
        let alices = sb.tproxy("alices").uid(1001).port(7890).start();
        let _bobs = sb.tproxy("bobs").uid(1002).port(7892).start();
        let mut first = alice.agent(CONFIG).start();
        let second = bob.agent(&CONFIG.replace("7890", "7892")).start();
        let apps = |user: &User| ["any", "game", "tracker"].map(|name| scope(user, name).app());
        let (of_alice, of_bob) = (apps(&alice), apps(&bob));
        for (user, [any, game, tracker], proxy) in
            [(&alice, &of_alice, "alices"), (&bob, &of_bob, "bobs")]
        {
            let mut agent = Agent::of(user);
            agent.wait_for_verdict(&scope(user, "game"), "direct");
            agent.wait_for_verdict(&scope(user, "tracker"), "drop");
            sb.expect(any, by(proxy));
            sb.expect(game, direct);
            sb.expect_dropped(tracker);
            for to in sb.destinations() {
                assert!(tracker.ping(to.ip()).is_dropped());
                sb.assert_nothing_left_for(to.ip());
            }
        }
        // One changes its policy, then has none at all: nothing happens to the other.
        let before = alices.arrivals().len();
        first.write_config("version: 1\nrules: [{match: '', drop: true}]");
        Agent::of(&alice).wait_for_verdict(alice.service(), "drop");
        sb.expect_dropped(&of_alice[0]);
        sb.expect(&of_bob[0], by("bobs"));
        assert!(first.stop().success());
        sb.expect(&of_alice[2], direct);
        sb.expect(&of_bob[0], by("bobs"));
        sb.expect_dropped(&of_bob[2]);
        assert_eq!(alices.arrivals().len(), before);
        drop(second);
    });
}

#[test]
fn the_agent_has_no_privilege() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let agent = sb.user(1001).agent(CONFIG).start();
        let status = fs::read_to_string(format!("/proc/{}/status", agent.pid())).expect("it runs");
        for set in ["CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert!(
                status.contains(&format!("{set}:\t0000000000000000")),
                "{status}"
            );
        }
        assert!(status.contains("Uid:\t1001\t1001\t1001\t1001"), "{status}");
    });
}

#[test]
fn verdicts_follow_control_groups_as_they_come_and_go() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let alice = sb.user(1001);
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let _agent = alice.agent(CONFIG).start();
        let mut agent = Agent::of(&alice);
        let slice = alice.cgroup("app.slice").id();
        for round in 0..5 {
            // Also deep below, where nothing was before.
            for path in ["app-tracker.scope", "a.slice/b.slice/app-tracker.scope"] {
                let cgroup = alice.cgroup(format!("app.slice/{path}"));
                agent.wait_for_verdict(&cgroup, "drop");
                let mut ids = vec![slice, cgroup.id()];
                ids.sort_unstable();
                assert_eq!(mapped_ids(sb, 1001), ids, "round {round}");
                let app = cgroup.app();
                sb.expect_dropped(&app);
                drop(app);
                cgroup.remove();
                wait_until("its verdict is gone", || mapped_ids(sb, 1001) == [slice]);
            }
            alice.shell("cd /sys/fs/cgroup/user.slice/*/user@1001.service/app.slice; rmdir -p a.slice/b.slice");
        }
    });
}

#[test]
fn a_catch_all_is_one_element_and_what_inherits_causes_no_update() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let alice = sb.user(1001);
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let config =
            "version: 1\ntproxies: {mihomo: {port: 7890}}\nrules: [{match: '', tproxy: mihomo}]";
        for name in ["a", "b", "c"] {
            scope(&alice, name);
        }
        let _agent = alice.agent(config).start();
        let mut agent = Agent::of(&alice);
        assert_eq!(mapped_ids(sb, 1001), [alice.service().id()]);
        let before = (
            agent.generation(),
            Session::of(&alice).status()["generation"].clone(),
        );
        for number in 0..50 {
            let cgroup = scope(&alice, &format!("new-{number}"));
            // From its first packet, without a word to the helper.
            let tally = cgroup.app().burst(Udp, sb.destinations()[0], 20);
            assert_eq!(tally.proxied.get("mihomo"), Some(&20), "{tally:?}");
            agent.wait_for_verdict(&cgroup, "mihomo");
            if number % 2 == 0 {
                cgroup.remove();
            }
        }
        let after = (
            agent.generation(),
            Session::of(&alice).status()["generation"].clone(),
        );
        assert_eq!(after, before);
        assert_eq!(mapped_ids(sb, 1001), [alice.service().id()]);
    });
}

#[test]
fn five_thousand_control_groups_in_a_burst_are_all_found_and_all_forgotten() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let alice = sb.user(1001);
        let service = alice.service().directory();
        let service = service.to_str().expect("ASCII");
        let _agent = alice.agent(DROP_EACH).start();
        let mut agent = Agent::of(&alice);
        for round in 0..2 {
            // Half of them side by side, half of them below others that are just as new.
            alice.shell(&format!(
                "cd {service}/app.slice
                 {{
                     seq -f app-%g.scope 2500
                     for i in $(seq 25); do seq -f a-$i.slice/b.slice/app-%g.scope 100; done
                 }} | xargs mkdir -p"
            ));
            let made = applications_below(&alice.service().directory());
            assert_eq!(made.len(), 5000);
            wait_until("all of them are in the kernel", || {
                mapped_ids(sb, 1001) == made
            });
            let last = alice.cgroup("app.slice/a-25.slice/b.slice/app-100.scope");
            agent.wait_for_verdict(&last, "drop");
            sb.expect_dropped(&last.app_as(1001));
            let status = agent.status();
            let target = &status["targets"][1];
            assert_eq!(
                (&target["name"], &target["controlGroups"]),
                (&json!("drop"), &json!(5000))
            );
            // The test's own application may still be leaving it.
            last.remove();
            alice.shell(&format!(
                "cd {service}/app.slice
                 find . -name 'app-*.scope' | xargs rmdir
                 rmdir a-*/b.slice a-*"
            ));
            wait_until("all of them are forgotten", || {
                mapped_ids(sb, 1001).is_empty()
            });
            let left = agent.status()["controlGroups"].clone();
            let left: Vec<_> = left.as_array().expect("a list").iter().collect();
            assert_eq!(left.len(), 3, "round {round}: {left:?}");
        }
    });
}

#[test]
fn the_same_path_a_thousand_times_ends_with_the_right_id() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let alice = sb.user(1001);
        let _agent = alice.agent(DROP_EACH).start();
        let directory = alice.cgroup("app.slice").directory();
        let script = "cd DIR; for i in $(seq 1000); do mkdir app-a.scope; rmdir app-a.scope; done; mkdir app-a.scope";
        alice.shell(&script.replace("DIR", directory.to_str().expect("ASCII")));
        let cgroup = scope(&alice, "a");
        wait_until("the last one is in the kernel", || {
            mapped_ids(sb, 1001) == [cgroup.id()]
        });
        Agent::of(&alice).wait_for_verdict(&cgroup, "drop");
        sb.expect_dropped(&cgroup.app());
        // Nothing that is still under way takes it back.
        let other = scope(&alice, "b");
        Agent::of(&alice).wait_for_verdict(&other, "drop");
        let mut both = [cgroup.id(), other.id()];
        both.sort_unstable();
        assert_eq!(mapped_ids(sb, 1001), both);
    });
}

#[test]
fn a_configuration_is_swapped_while_the_agent_runs() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let alice = sb.user(1001);
        let _one = sb.tproxy("one").uid(1001).port(7891).start();
        let _two = sb.tproxy("two").uid(1001).port(7892).start();
        let config = |target: &str| {
            format!(
                "version: 1\ntproxies: {{one: {{port: 7891}}, two: {{port: 7892}}}}\n\
                 rules: [{{match: /app-a, {target}}}]"
            )
        };
        let service = alice.agent(&config("tproxy: one")).start();
        let file = alice.home().join(".config/cgtproxy/config.yaml");
        let mut agent = Agent::of(&alice);
        let cgroup = scope(&alice, "a");
        let app = cgroup.app();
        agent.wait_for_verdict(&cgroup, "one");
        let [v4, v6] = sb.destinations();
        let open = [app.open_tcp(v4), app.open_tcp(v6)].map(|o| o.expect("the proxy answers"));
        sb.expect(&app, by("one"));
        // As an editor does that makes a new file.
        service.write_config(&config("tproxy: two"));
        agent.wait_for_verdict(&cgroup, "two");
        sb.expect(&app, by("two"));
        // As an editor does that writes into the old one.
        fs::write(&file, config("direct: true")).expect("root may write");
        agent.wait_for_verdict(&cgroup, "direct");
        sb.expect(&app, direct);
        // As a manager of dotfiles does.
        let real = alice.home().join("dotfiles.yaml");
        fs::write(&real, config("tproxy: one")).expect("root may write");
        let link = file.with_extension("link");
        std::os::unix::fs::symlink(&real, &link).expect("root may write");
        fs::rename(&link, &file).expect("in the same directory");
        agent.wait_for_verdict(&cgroup, "one");
        fs::write(&real, config("tproxy: two")).expect("root may write");
        agent.wait_for_verdict(&cgroup, "two");
        sb.expect(&app, by("two"));
        // Connections go on as they began, until they are dropped.
        for (open, to) in open.iter().zip([v4, v6]) {
            assert_eq!(open.ask(), proxied("one", to));
        }
        fs::write(&real, config("drop: true")).expect("root may write");
        agent.wait_for_verdict(&cgroup, "drop");
        sb.expect_dropped(&app);
        for open in &open {
            assert!(open.ask().is_dropped());
        }
    });
}

#[test]
fn a_configuration_edited_over_and_over_loses_no_packet() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let alice = sb.user(1001);
        let _one = sb.tproxy("one").uid(1001).port(7891).start();
        let _two = sb.tproxy("two").uid(1001).port(7892).start();
        let config = |target: &str, proxies: &str| {
            format!(
                "version: 1\ntproxies: {{{proxies}}}\nrules: [{{match: /app.slice$, tproxy: {target}}}]"
            )
        };
        let both = "one: {port: 7891}, two: {port: 7892}";
        let service = alice.agent(&config("one", both)).start();
        let slice = alice.cgroup("app.slice");
        let app = scope(&alice, "a").app();
        let traffic = Steady::start(sb, &app);
        let mut agent = Agent::of(&alice);
        for _ in 0..100 {
            for target in ["two", "one"] {
                service.write_config(&config(target, both));
                agent.wait_for_verdict(&slice, target);
            }
            traffic.assert_none_strayed(sb, &["one", "two"]);
        }
    });
}

#[test]
fn sighup_reloads_and_says_when_that_is_done() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let alice = sb.user(1001);
        let mut service = alice.agent(DROP_EACH).start();
        service.forget_notifications();
        let before = Agent::of(&alice).generation();
        service.reload();
        service.wait_notification("RELOADING=1");
        service.wait_ready();
        assert!(Agent::of(&alice).generation() > before);
        // A broken file ends the reload as well.
        service.write_config("version: 2");
        service.wait_log("the old configuration stays in force");
        service.forget_notifications();
        service.reload();
        service.wait_notification("RELOADING=1");
        service.wait_ready();
        assert!(service.is_running());
    });
}

#[test]
fn a_broken_configuration_is_refused_and_the_old_one_stays() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let alice = sb.user(1001);
        let service = alice.agent(DROP_EACH).start();
        let mut agent = Agent::of(&alice);
        let cgroup = scope(&alice, "a");
        agent.wait_for_verdict(&cgroup, "drop");
        let app = cgroup.app();
        let generation = agent.generation();
        service.write_config("version: 1\nrules:\n  - {match: 'app-(', direct: true}\n");
        service.wait_log("the old configuration stays in force");
        let log = service.log();
        assert!(log.contains("/.config/cgtproxy/config.yaml:3:"), "{log}");
        sb.expect_dropped(&app);
        let status = agent.status();
        let error = status["configError"].as_str().expect("it says so");
        assert!(error.contains("config.yaml:3:"), "{error}");
        assert_eq!(status["connected"], true);
        assert_eq!(status["generation"], generation);
        let (code, shown, _) = self::agent(&alice, &["status"]);
        assert!(
            code == Some(0) && shown.contains("not in force: "),
            "{shown}"
        );
        // New ones are still judged by the old rules.
        let later = scope(&alice, "later");
        agent.wait_for_verdict(&later, "drop");
        sb.expect_dropped(&later.app());
        // So they are when the file is gone.
        fs::remove_file(alice.home().join(".config/cgtproxy/config.yaml")).expect("it is there");
        wait_until("it notices", || {
            agent.status()["configError"]
                .as_str()
                .is_some_and(|e| e != error)
        });
        sb.expect_dropped(&app);
        service.write_config("version: 1\nrules: []");
        agent.wait_for_verdict(&cgroup, "direct");
        assert_eq!(agent.status()["configError"], Value::Null);
        sb.expect(&app, direct);
    });
}

#[test]
fn a_broken_configuration_at_the_start_is_waited_out() {
    const BROKEN: &str = "version: 1\nruls: []\n";
    sandbox(|sb| {
        let helper = sb.helper().config("grace-seconds: 60").start();
        let alice = sb.user(1001);
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let mut service = alice.agent(BROKEN).spawn();
        service.wait_log("config.yaml:2:1: unknown key 'ruls'");
        let waits = || {
            wait_until("it waits", || {
                let (_, status, _) = agent(&alice, &["status"]);
                status.contains("not connected: waiting for the configuration to be fixed\n")
                    && status.contains("not in force: /run/home/1001/.config/cgtproxy/config.yaml:2:1: unknown key 'ruls'")
            });
        };
        waits();
        let app = scope(&alice, "any").app();
        sb.expect(&app, direct);
        assert_eq!(sb.objects_of(1001), Vec::<String>::new());
        assert!(!service.has_notified("READY=1"));
        service.write_config(CONFIG);
        service.wait_ready();
        sb.expect(&app, by("mihomo"));
        let tracker = scope(&alice, "tracker");
        Agent::of(&alice).wait_for_verdict(&tracker, "drop");
        let tracker = tracker.app();
        let (traffic, rules) = (Steady::start(sb, &app), sb.objects_of(1001));

        // What an agent leaves that was killed is not taken away by one that waits, nor when that one is stopped.
        let held = || {
            traffic.assert_proxied("mihomo");
            traffic.assert_none_strayed(sb, &["mihomo"]);
            sb.expect_dropped(&tracker);
            assert_eq!(sb.objects_of(1001), rules);
        };
        service.write_config(BROKEN);
        service.kill();
        service.begin_again();
        waits();
        held();
        assert!(service.stop().success());
        held();
        service.begin_again();
        waits();
        held();
        assert!(!service.has_notified("READY=1"));
        service.write_config(CONFIG);
        service.wait_ready();
        held();
        assert!(
            !helper.log().contains("removed the policy"),
            "{}",
            helper.log()
        );
    });
}

#[test]
fn without_a_file_everything_is_direct_until_there_is_one() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let alice = sb.user(1001);
        let service = alice.agent("").without_config().start();
        let app = scope(&alice, "a").app();
        sb.expect(&app, direct);
        assert_eq!(service.log().matches("everything goes direct").count(), 1);
        alice.shell("mkdir -p ~/.config/cgtproxy");
        alice.shell("printf '%s' 'version: 1\nrules: [{match: app-a, drop: true}]' > ~/.config/cgtproxy/config.yaml");
        Agent::of(&alice).wait_for_verdict(&scope(&alice, "a"), "drop");
        sb.expect_dropped(&app);
    });
}

#[test]
fn a_configuration_on_what_is_mounted_later_is_waited_for() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let alice = sb.user(1001);
        let vault = alice.home().join("vault");
        alice.shell(
            "mkdir -p ~/vault ~/.config/cgtproxy && ln -s ~/vault/config.yaml ~/.config/cgtproxy/",
        );
        let mut service = alice.agent("").without_config().spawn();
        service.wait_log("is a link to");
        assert!(!service.has_notified("READY=1"));
        // It is in another file system, which gets there with it in one step.
        let mounted = vault.to_str().expect("a path in UTF-8");
        sb.run(&["mkdir", "/run/vault"]);
        fs::write(
            "/run/vault/config.yaml",
            "version: 1\nrules: [{match: app-a, drop: true}]",
        )
        .expect("/run is the sandbox's");
        sb.run(&["chmod", "-R", "a+rX", "/run/vault"]);
        sb.run(&["mount", "--bind", "/run/vault", mounted]);
        service.wait_ready();
        Agent::of(&alice).wait_for_verdict(&scope(&alice, "a"), "drop");
        sb.run(&["umount", mounted]);
    });
}

#[test]
fn an_agent_that_is_killed_and_restarted_leaves_no_gap() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let alice = sb.user(1001);
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let mut service = alice.agent(CONFIG).start();
        let app = scope(&alice, "a").app();
        let traffic = Steady::start(sb, &app);
        for round in 0..10 {
            service.kill();
            traffic.assert_proxied("mihomo");
            // What starts meanwhile and inherits is right from the start, too.
            let new = scope(&alice, &format!("while-{round}")).app();
            sb.expect(&new, by("mihomo"));
            service.start_again();
            traffic.assert_proxied("mihomo");
            let tracker = scope(&alice, &format!("tracker-{round}"));
            Agent::of(&alice).wait_for_verdict(&tracker, "drop");
            sb.expect_dropped(&tracker.app());
        }
        traffic.assert_none_strayed(sb, &["mihomo"]);
    });
}

#[test]
fn an_agent_that_makes_room_for_another_leaves_no_gap() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let alice = sb.user(1001);
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let mut service = alice.agent(CONFIG).start();
        let app = scope(&alice, "a").app();
        let traffic = Steady::start(sb, &app);
        for _ in 0..5 {
            service.signal(Signal::SIGUSR1);
            assert_eq!(service.wait().code(), Some(0));
            assert!(!Path::new("/run/user/1001/cgtproxy/agent.sock").exists());
            traffic.assert_proxied("mihomo");
            service.start_again();
            traffic.assert_proxied("mihomo");
        }
        traffic.assert_none_strayed(sb, &["mihomo"]);
    });
}

#[test]
fn a_helper_that_is_killed_and_restarted_leaves_no_gap() {
    sandbox(|sb| {
        let mut helper = sb.helper().start();
        let alice = sb.user(1001);
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let service = alice.agent(CONFIG).start();
        let mut agent = Agent::of(&alice);
        let app = scope(&alice, "a").app();
        let tracker = scope(&alice, "tracker");
        agent.wait_for_verdict(&tracker, "drop");
        let tracker = tracker.app();
        let traffic = Steady::start(sb, &app);
        for round in 0..10 {
            helper.kill();
            wait_until("the agent notices", || agent.status()["connected"] == false);
            traffic.assert_proxied("mihomo");
            sb.expect_dropped(&tracker);
            // What happens meanwhile is caught up with.
            let later = scope(&alice, &format!("tracker-{round}"));
            helper.start_again();
            agent.wait_for_verdict(&later, "drop");
            assert_eq!(agent.status()["connected"], true);
            sb.expect_dropped(&later.app());
            sb.expect_dropped(&tracker);
            traffic.assert_proxied("mihomo");
        }
        traffic.assert_none_strayed(sb, &["mihomo"]);
        assert!(
            service
                .log()
                .contains("no helper listens on /run/cgtproxy/helper.sock")
        );
    });
}

#[test]
fn a_configuration_edited_while_there_is_no_helper_holds_once_there_is() {
    sandbox(|sb| {
        let mut helper = sb.helper().start();
        let alice = sb.user(1001);
        let service = alice.agent(DROP_EACH).start();
        let mut agent = Agent::of(&alice);
        let cgroup = scope(&alice, "a");
        agent.wait_for_verdict(&cgroup, "drop");
        let app = cgroup.app();
        helper.kill();
        service.write_config("version: 1\nrules: [{match: app-b, drop: true}]");
        service.wait_log("loaded ");
        let other = scope(&alice, "b").app();
        sb.expect_dropped(&app);
        helper.start_again();
        agent.wait_for_verdict(&scope(&alice, "b"), "drop");
        sb.expect_dropped(&other);
        sb.expect(&app, direct);
    });
}

#[test]
fn sigterm_removes_the_rules_and_is_a_success() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let alice = sb.user(1001);
        let mut service = alice.agent(DROP_EACH).start();
        let cgroup = scope(&alice, "a");
        let socket = Path::new("/run/user/1001/cgtproxy/agent.sock");
        for round in 0..3 {
            Agent::of(&alice).wait_for_verdict(&cgroup, "drop");
            assert!(socket.exists());
            assert_eq!(service.stop().code(), Some(0), "round {round}");
            assert_eq!(sb.objects_of(1001), Vec::<String>::new());
            sb.expect(&cgroup.app(), direct);
            assert!(!socket.exists());
            assert!(service.has_notified("STOPPING=1"));
            service.start_again();
        }
    });
}

#[test]
fn it_is_ready_once_its_first_full_state_is_in_the_kernel() {
    sandbox(|sb| {
        let mut helper = sb.helper().start();
        let alice = sb.user(1001);
        let service = alice.service().directory();
        let service = service.to_str().expect("ASCII");
        alice.shell(&format!(
            "cd {service}/app.slice; seq -f app-%g.scope 3000 | xargs mkdir"
        ));
        let made = applications_below(&alice.service().directory());
        let mut service = alice.agent(DROP_EACH).start();
        assert_eq!(mapped_ids(sb, 1001), made);
        // And without a helper it waits.
        service.stop();
        helper.stop();
        drop(helper);
        service = alice.agent(DROP_EACH).spawn();
        service.wait_log("no helper listens on /run/cgtproxy/helper.sock; trying again");
        let (code, shown, _) = agent(&alice, &["status"]);
        assert_eq!(code, Some(0));
        assert!(
            shown.contains("not connected: no helper listens"),
            "{shown}"
        );
        assert!(!service.has_notified("READY=1"));
        let _helper = sb.helper().start();
        service.wait_ready();
        assert_eq!(mapped_ids(sb, 1001), made);
        // It said so once, not at every attempt.
        assert_eq!(service.log().matches("no helper listens").count(), 1);
    });
}

#[test]
fn no_helper_at_the_start_and_not_even_its_directory() {
    sandbox(|sb| {
        let alice = sb.user(1001);
        let mut service = alice.agent(DROP_EACH).spawn();
        service.wait_log("no helper listens on /run/cgtproxy/helper.sock; trying again");
        let cgroup = scope(&alice, "a");
        assert!(!service.has_notified("READY=1"));
        let _helper = sb.helper().start();
        service.wait_ready();
        assert_eq!(mapped_ids(sb, 1001), [cgroup.id()]);
    });
}

/// What an agent says of another one's socket.
const LISTENS: &str = "another agent of this user listens on /run/user/1001/cgtproxy/agent.sock";

#[test]
fn a_service_waits_until_another_agent_has_ended() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let alice = sb.user(1001);
        let mut first = alice.agent(DROP_EACH).start();
        let mut service = alice.agent(DROP_EACH).spawn();
        service.wait_notification(&format!("STATUS={LISTENS}"));
        service.wait_log(LISTENS);
        let mut another = alice.agent(DROP_EACH).spawn();
        another.wait_log(LISTENS);
        assert!(another.stop().success());
        assert!(first.stop().success());
        service.wait_ready();
        assert_eq!(service.log().matches(LISTENS).count(), 1);
        Agent::of(&alice).wait_for_verdict(&scope(&alice, "a"), "drop");
    });
}

#[test]
fn a_second_agent_is_refused_with_a_clear_message() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let alice = sb.user(1001);
        let mut first = alice.agent(DROP_EACH).start();
        let app = scope(&alice, "a");
        // One that is started by hand.
        let (code, _, log) = agent(&alice, &[]);
        assert_eq!(code, Some(1));
        assert!(log.contains(LISTENS), "{log}");
        // One that does not see the first one's socket.
        let elsewhere = alice.home().join("runtime");
        let mut third = alice
            .agent(DROP_EACH)
            .env("XDG_RUNTIME_DIR", &elsewhere)
            .spawn();
        assert_eq!(third.wait().code(), Some(1));
        let log = third.log();
        assert!(
            log.contains("another agent of this user is connected to the helper"),
            "{log}"
        );
        assert!(!third.has_notified("READY=1"));
        // The first one has noticed nothing.
        assert!(first.is_running());
        Agent::of(&alice).wait_for_verdict(&app, "drop");
        sb.expect_dropped(&app.app());
    });
}

#[test]
fn names_of_any_kind_are_judged_and_shown() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let alice = sb.user(1001);
        let long = [b"app-".as_slice(), &[b'x'; 245], b".scope"].concat();
        let names: [&[u8]; 9] = [
            b"app-\xff\xfe.scope",
            b"app-with space.scope",
            b"app-\"quoted\" 'twice'.scope",
            b"app-org.gnome.Foo\\x2dBar.scope",
            b"app-%41%.scope",
            b"app-\t\x1b[31m\x7f.scope",
            "app-\u{fc}\u{2603}\u{202e}.scope".as_bytes(),
            b"app-$(reboot)`*?#;&|{}.scope",
            &long,
        ];
        let early = names.map(|name| alice.cgroup("early.slice").child(OsStr::from_bytes(name)));
        let _agent = alice.agent(DROP_EACH).start();
        let late = names.map(|name| alice.cgroup("late.slice").child(OsStr::from_bytes(name)));
        let mut agent = Agent::of(&alice);
        for cgroup in early.iter().chain(&late) {
            agent.wait_for_verdict(cgroup, "drop");
            let to = sb.destinations()[0];
            assert!(
                cgroup.app().udp(to).is_dropped(),
                "{}",
                cgroup.path().display()
            );
            sb.assert_nothing_left_for(to.ip());
        }
        let (code, shown, _) = self::agent(&alice, &["status"]);
        assert_eq!(code, Some(0));
        assert!(
            !shown.contains('\x1b') && !shown.contains('\u{202e}'),
            "{shown:?}"
        );
        let (code, json, _) = self::agent(&alice, &["status", "--json"]);
        assert_eq!(code, Some(0));
        let status: Value = serde_json::from_str(&json).expect("JSON");
        let listed = status["controlGroups"].as_array().expect("a list");
        for cgroup in early.iter().chain(&late) {
            let path = wire_path(&cgroup.path());
            let found = listed.iter().find(|group| group["path"] == path.as_str());
            assert_eq!(
                found.map(|group| &group["target"]),
                Some(&json!("drop")),
                "{path}"
            );
            let output = alice.run(
                "cgtproxy-agent",
                &[OsStr::new("explain"), cgroup.directory().as_os_str()],
            );
            let text = String::from_utf8(output.stdout).expect("UTF-8");
            assert!(text.contains("Rule 1 matches it."), "{path}: {text}");
        }
        let mut all: Vec<_> = early.iter().chain(&late).map(Cgroup::id).collect();
        all.sort_unstable();
        wait_until("only those are left", || mapped_ids(sb, 1001) == all);
        for cgroup in early.iter().chain(&late) {
            cgroup.remove();
        }
        wait_until("none is left", || mapped_ids(sb, 1001).is_empty());
    });
}

/// Everything that `explain` can be asked about, and what it says.
fn explained(user: &User, what: &str) -> (String, Value) {
    let (code, text, errors) = agent(user, &["explain", what]);
    assert_eq!((code, errors.as_str()), (Some(0), ""));
    let (code, json, _) = agent(user, &["explain", "--json", what]);
    assert_eq!(code, Some(0));
    (text, serde_json::from_str(&json).expect("JSON"))
}

#[test]
fn status_and_explain_tell_what_is_so_and_why() {
    sandbox(|sb| {
        let helper = sb.helper().start();
        let alice = sb.user(1001);
        let mut service = alice.agent(CONFIG).start();
        let (any, tracker) = (scope(&alice, "any"), scope(&alice, "tracker"));
        let mut interface = Agent::of(&alice);
        interface.wait_for_verdict(&tracker, "drop");
        interface.wait_for_verdict(&any, "mihomo");
        let app = any.app();
        let base = "/user.slice/user-1001.slice/user@1001.service";

        let (code, shown, errors) = agent(&alice, &["status"]);
        assert_eq!((code, errors.as_str()), (Some(0), ""));
        for line in [
            "Helper:         connected",
            "Configuration:  /run/home/1001/.config/cgtproxy/config.yaml",
            &format!("drop    rule 2              yes       {base}/app.slice/app-tracker.scope"),
            &format!("mihomo  rule 3              yes       {base}/app.slice"),
            &format!("mihomo  rule 3 (inherited)  yes       {base}/app.slice/app-any.scope"),
            &format!("direct  -                   yes       {base}"),
        ] {
            assert!(
                shown.lines().any(|l| l == line),
                "no line {line:?} in:\n{shown}"
            );
        }
        let (_, json, _) = agent(&alice, &["status", "--json"]);
        let status: Value = serde_json::from_str(&json).expect("JSON");
        assert_eq!(status["connected"], true);
        let targets = status["targets"].as_array().expect("a list");
        assert!(
            targets
                .iter()
                .any(|t| t["name"] == "mihomo" && t["port"] == 7890),
            "{json}"
        );

        // By directory, by path, by path in the user's subtree, by unit and by process.
        let directory = any.directory();
        let pid = app.pid().to_string();
        for what in [
            directory.to_str().expect("ASCII"),
            &format!("{base}/app.slice/app-any.scope"),
            "app.slice/app-any.scope",
            "app-any.scope",
            &pid,
        ] {
            let (text, json) = explained(&alice, what);
            assert_eq!(
                text,
                format!(
                    "{base}/app.slice/app-any.scope\n  goes through 'mihomo'\n  \
                     No rule matches it; it inherits from {base}/app.slice, which rule 3 matches.\n  \
                     rule 3 (match: /app\\.slice$), /run/home/1001/.config/cgtproxy/config.yaml:8\n  \
                     The kernel holds this verdict.\n"
                ),
                "{what}"
            );
            assert_eq!(json["agentRunning"], true);
            let group = &json["controlGroup"];
            assert_eq!(group["target"], "mihomo");
            assert_eq!(group["rule"], 3);
            assert_eq!(group["inheritedFrom"], format!("{base}/app.slice"));
            assert_eq!(group["inForce"], true);
        }
        let (text, _) = explained(&alice, "app-tracker.scope");
        assert!(
            text.contains("is dropped") && text.contains("Rule 2 matches it."),
            "{text}"
        );
        let (text, _) = explained(&alice, base);
        assert!(
            text.contains("goes direct") && text.contains("No rule matches it"),
            "{text}"
        );

        for (what, why) in [
            (
                "app-none.scope",
                "there is no control group or unit 'app-none.scope'",
            ),
            ("4194305", "there is no process 4194305"),
            ("/system.slice", "your agent does not decide about it"),
            (
                "/user.slice/user-1002.slice/user@1002.service/x",
                "your agent does not decide about it",
            ),
        ] {
            let (code, text, errors) = agent(&alice, &["explain", what]);
            assert_eq!((code, text.as_str()), (Some(1), ""), "{what}");
            assert!(errors.contains(why), "{what}: {errors}");
        }

        // Without a helper, and without an agent.
        drop(helper);
        wait_until("the agent notices", || {
            interface.status()["connected"] == false
        });
        let (text, json) = explained(&alice, "app-any.scope");
        assert!(
            text.contains("The kernel does not hold this verdict"),
            "{text}"
        );
        assert_eq!(json["controlGroup"]["inForce"], false);
        service.stop();
        let (code, text, errors) = agent(&alice, &["status"]);
        assert_eq!((code, text.as_str()), (Some(1), ""));
        assert!(
            errors.contains("systemctl --user enable --now cgtproxy-agent"),
            "{errors}"
        );
        // What could be a file of the kernel's, as `io.github.Foo.service` could, has a `_` before it in cgroupfs.
        let _escaped = alice.cgroup("app.slice/_io.github.Foo.service");
        for what in ["app-any.scope", "io.github.Foo.service", &pid] {
            let (text, json) = explained(&alice, what);
            assert!(text.contains("goes through 'mihomo'"), "{text}");
            assert!(text.contains("cgtproxy-agent is not running"), "{text}");
            assert_eq!(json["agentRunning"], false);
        }
    });
}

#[test]
fn check_finds_everything_at_once() {
    sandbox(|sb| {
        let alice = sb.user(1001);
        alice.shell("mkdir -p ~/.config/cgtproxy");
        let file = alice.home().join(".config/cgtproxy/config.yaml");
        let name = file.to_str().expect("ASCII");
        fs::write(&file, CONFIG).expect("root may write");
        let (code, shown, errors) = agent(&alice, &["check"]);
        assert_eq!(
            (code, shown.as_str(), errors.as_str()),
            (Some(0), &*format!("{name}: no errors\n"), "")
        );
        let broken = "\
version: 1
tproxie: {}
rules:
  - {match: 'a(b', direct: true}
  - {match: x, tproxy: mihomo}
  - {match: y, direct: true, drop: true}
  - {match: '', direct: true}
  - {match: z, drop: true}
bypass: [10.0.0.0/33]
";
        fs::write(&file, broken).expect("root may write");
        let (code, shown, _) = agent(&alice, &["check", name]);
        assert_eq!(code, Some(1));
        for line in [2, 4, 5, 6, 9] {
            let place = format!("{name}:{line}:");
            assert!(
                shown
                    .lines()
                    .any(|l| l.starts_with(&place) && l.contains(": error: ")),
                "no error in line {line}:\n{shown}"
            );
        }
        assert!(
            shown.contains(&format!("{name}:8:")) && shown.contains("warning"),
            "{shown}"
        );
        assert!(shown.contains("tproxies") && shown.contains('^'), "{shown}");
        let (code, _, errors) = agent(&alice, &["check", "/nowhere.yaml"]);
        assert_eq!(code, Some(1));
        assert!(errors.contains("/nowhere.yaml"), "{errors}");
    });
}

#[test]
fn a_user_manager_that_starts_again_gets_its_policy_again() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let alice = sb.user(1001);
        // Not in the tree that goes.
        let _agent = alice.agent(DROP_EACH).in_session().start();
        let cgroup = scope(&alice, "a");
        Agent::of(&alice).wait_for_verdict(&cgroup, "drop");
        cgroup.remove();
        alice.cgroup("app.slice").remove();
        alice.service().remove();
        let alice = sb.user(1001);
        let cgroup = scope(&alice, "a");
        Agent::of(&alice).wait_for_verdict(&cgroup, "drop");
        sb.expect_dropped(&cgroup.app());
        assert_eq!(mapped_ids(sb, 1001), [cgroup.id()]);
    });
}
