//! Agents of ordinary users, with a real helper and a real kernel: what users get for what they
//! write into their files, whatever happens meanwhile.

#![allow(clippy::expect_used, reason = "a panic is a failed test")]

mod commands;
mod configuration;
mod control_groups;
mod life;

use std::fs;

use cgtproxy_tests::agent::Agent;
use cgtproxy_tests::sandbox::{Cgroup, User, by, direct, sandbox};

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
