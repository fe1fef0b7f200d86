//! Whatever the rules and whatever the tree: what becomes of packets is what the agent says of the control group.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a panic is a failed test"
)]

use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::Path;

use cgtproxy_tests::agent::{Agent, wire_path};
use cgtproxy_tests::amount;
use cgtproxy_tests::sandbox::{Cgroup, direct, proxied, sandbox};
use serde_json::json;

/// How many policies are tried, unless CGTPROXY_TEST_POLICIES says otherwise.
const POLICIES: u64 = 6;

const SLICES: [&str; 7] = [
    "app.slice",
    "x.slice",
    "x.slice/x-y.slice",
    "x.slice/x-y.slice/x-y-z.slice",
    "app.slice/app-a.slice",
    "cgtproxy-drop.slice",
    "cgtproxy-p0.slice",
];
const UNITS: [&str; 5] = [
    "app-a-1.scope",
    "app-b@2.service",
    "foo.service",
    "app-a\\x2db-3.scope",
    "",
];
const BELOW: [&str; 4] = ["", "sub", "sub/deep", "app-a-9.scope/sub"];
const SELECTORS: [&str; 20] = [
    "match: ''",
    "match: /a",
    "match: '/app-a-[^/]*$'",
    "match: '/deep$'",
    "match: '\\.scope'",
    "match: '\\.scope$'",
    "match: '^/user\\.slice/user-\\d+\\.slice/user@\\d+\\.service/x\\.slice'",
    "match: '^/user\\.slice/user-\\d+\\.slice/user@\\d+\\.service/app\\.slice/[^/]*$'",
    "match: '/sub(/|$)'",
    "match: 'service$'",
    "app: a",
    "app: [b, 'a-b']",
    "app: '*'",
    "unit: foo",
    "unit: '*.scope'",
    "unit: ['app-a-9.scope', 'app-b@*']",
    "slice: x",
    "slice: x-y",
    "slice: ['x-y-*', app-a]",
    "slice: app",
];
const TARGETS: [&str; 5] = [
    "tproxy: p0",
    "proxy: p1",
    "direct: true",
    "drop: true",
    "drop: all",
];

/// Numbers that follow from a seed (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) % end as u64).expect("it is below")
    }

    fn of<'a>(&mut self, list: &[&'a str]) -> &'a str {
        list[self.below(list.len())]
    }

    /// A configuration, and whether its bypass list has all destinations of IPv4 in it.
    fn config(&mut self, number: u64) -> (String, bool) {
        let bypassed = self.below(3) == 0;
        let bypass = if bypassed { "0.0.0.0/0" } else { "10.0.0.0/8" };
        let mut text = format!(
            "version: 1\nstart: {}\nexec-slices: {}\nbypass: [{bypass}]\n\
             tproxies: {{p0: {{port: 7890}}, p1: {{port: 7891}}, n{number}: {{port: 7892}}}}\n\
             rules:\n- {{match: '/marker$', tproxy: n{number}}}\n",
            self.of(&["open", "closed"]),
            self.of(&["true", "false"]),
        );
        for _ in 0..self.below(6) {
            text += &format!("- {{{}, {}}}\n", self.of(&SELECTORS), self.of(&TARGETS));
        }
        (text, bypassed)
    }
}

/// Another one in each run, unless CGTPROXY_TEST_SEED says which: that of a run that has failed.
fn seed() -> u64 {
    let given = amount::given("CGTPROXY_TEST_SEED");
    given.unwrap_or_else(|| RandomState::new().build_hasher().finish())
}

#[test]
fn packets_go_where_the_agent_says() {
    let policies = amount::given("CGTPROXY_TEST_POLICIES").unwrap_or(POLICIES);
    sandbox(|sb| {
        let seed = seed();
        eprintln!("CGTPROXY_TEST_SEED={seed}");
        let mut random = Random(seed);
        let _helper = sb.helper().start();
        let alice = sb.user(1001);
        let _proxies = ["p0", "p1"]
            .iter()
            .zip([7890, 7891])
            .map(|(name, port)| sb.tproxy(name).uid(1001).port(port).start())
            .collect::<Vec<_>>();
        let agent = alice.agent("version: 1\n").start();
        let mut interface = Agent::of(&alice);
        let marker = alice.cgroup("other.slice/marker");
        let mut groups: Vec<Cgroup> = Vec::new();
        for number in 0..policies {
            let (config, bypassed) = random.config(number);
            // Some come before the configuration, and others after it.
            let when = random.below(10);
            for turn in 0..10 {
                if turn == when {
                    agent.write_config(&config);
                }
                let many = groups.len() > 16;
                if (many || random.below(3) == 0) && !groups.is_empty() {
                    let gone = groups.swap_remove(random.below(groups.len()));
                    if std::fs::remove_dir(gone.directory()).is_err() {
                        groups.push(gone);
                    }
                    continue;
                }
                let path = Path::new(random.of(&SLICES))
                    .join(random.of(&UNITS))
                    .join(random.of(&BELOW));
                let group = alice.cgroup(path.to_str().expect("text").trim_end_matches('/'));
                if !groups.iter().any(|other| other.path() == group.path()) {
                    groups.push(group);
                }
            }
            interface.wait_for_verdict(&marker, &format!("n{number}"));
            for group in &groups {
                let path = wire_path(&group.path());
                let explained = interface.call("Explain", json!({ "controlGroup": path }));
                let target = explained["controlGroup"]["target"]
                    .as_str()
                    .expect("a name");
                // What is dropped altogether is no target of cgtproxy-exec.
                interface.wait_for_verdict(group, target.trim_end_matches("-all"));
                let app = group.app();
                for to in sb.destinations() {
                    let outcome = app.udp(to);
                    let says = format!("{path} {target} {outcome:?}\n{config}{explained}");
                    match target {
                        "drop" | "drop-all" if !(bypassed && to.is_ipv4() && target == "drop") => {
                            assert!(outcome.is_dropped(), "{says}");
                        }
                        "p0" | "p1" if !(bypassed && to.is_ipv4()) => {
                            assert_eq!(outcome, proxied(target, to), "{says}");
                        }
                        _ => assert_eq!(outcome, direct(to), "{says}"),
                    }
                }
            }
        }
    });
}
