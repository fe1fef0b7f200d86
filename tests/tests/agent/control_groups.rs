//! Control groups that come and go.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use cgtproxy_tests::agent::{Agent, wire_path};
use cgtproxy_tests::sandbox::{Cgroup, applications_below, sandbox};
use cgtproxy_tests::session::{Session, mapped_ids};
use cgtproxy_tests::wait::wait_until;
use cgtproxy_tests::wire::Transport::Udp;
use serde_json::{Value, json};

use crate::{CONFIG, DROP_EACH, agent, scope};

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
