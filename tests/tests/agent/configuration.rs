//! The file: changed, broken, missing.

use std::fs;

use cgtproxy_tests::agent::Agent;
use cgtproxy_tests::sandbox::{by, direct, proxied, sandbox};
use cgtproxy_tests::steady::Steady;
use cgtproxy_tests::wait::wait_until;
use serde_json::Value;

use crate::{CONFIG, DROP_EACH, agent, scope};

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
