//! The daemons' starts and ends.

use std::path::Path;

use cgtproxy_tests::agent::Agent;
use cgtproxy_tests::sandbox::{applications_below, by, direct, sandbox};
use cgtproxy_tests::session::mapped_ids;
use cgtproxy_tests::steady::Steady;
use cgtproxy_tests::wait::wait_until;
use nix::sys::signal::Signal;

use crate::{CONFIG, DROP_EACH, agent, scope};

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
