//! One connection is one session: how it begins, is taken over, and ends.

#![allow(clippy::expect_used, reason = "a panic is a failed test")]

use cgtproxy_tests::sandbox::{Sandbox, direct, proxied, sandbox};
use cgtproxy_tests::session::{Session, mapped_ids, to_proxy, verdict};
use cgtproxy_tests::wait::wait_until;
use serde_json::json;

#[test]
fn a_second_agent_is_told_so() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let (mut first, mut second) = (Session::of(&user), Session::of(&user));
        let nothing = json!({ "proxies": [], "bypass": [], "assignments": [] });
        assert_eq!(second.refusal("RemovePolicy", json!({})).0, "NoSession");
        let update = json!({ "assign": [], "remove": [] });
        assert_eq!(
            second.refusal("UpdateAssignments", update.clone()).0,
            "NoSession"
        );
        first.replace(json!([]), json!([]), json!([verdict("", "drop")]));
        assert_eq!(
            second.refusal("ReplacePolicy", nothing.clone()).0,
            "SessionExists"
        );
        assert_eq!(second.refusal("UpdateAssignments", update).0, "NoSession");
        assert_eq!(second.refusal("RemovePolicy", json!({})).0, "NoSession");
        assert_eq!(second.status()["session"], "active");
        // Its own user's status is all that another user sees.
        let mut other = Session::of(&sb.user(1002));
        assert_eq!(other.status()["session"], "none");
        assert_eq!(other.status()["controlGroups"], 0);
        first.call("RemovePolicy", json!({}));
        second.call("ReplacePolicy", nothing);
    });
}

#[test]
fn its_end_removes_exactly_its_own_objects_after_the_grace() {
    sandbox(|sb| {
        // Long enough to see it.
        let _helper = sb.helper().config("grace-seconds: 5").start();
        let (user, other) = (sb.user(1001), sb.user(1002));
        let app = user.cgroup("app.slice/app-a.scope").app();
        let others_app = other.cgroup("app.slice/app-a.scope").app();
        let mut session = Session::of(&user);
        let mut stays = Session::of(&other);
        let proxies = json!([{ "name": "p", "port": 7890 }]);
        session.replace(
            proxies.clone(),
            json!(["10.0.0.0/8"]),
            json!([to_proxy("", "p")]),
        );
        stays.replace(proxies, json!(["10.0.0.0/8"]), json!([verdict("", "drop")]));
        let before = sb.objects_of(1002);
        drop(session);
        assert_eq!(Session::of(&user).status()["session"], "grace");
        assert_ne!(sb.objects_of(1001), Vec::<String>::new());
        wait_until("the grace is over", || sb.objects_of(1001).is_empty());
        assert_eq!(Session::of(&user).status()["session"], "none");
        assert_eq!(sb.objects_of(1002), before);
        for to in sb.destinations() {
            assert_eq!(app.tcp(to), direct(to));
            assert!(others_app.udp(to).is_dropped());
        }
    });
}

#[test]
fn a_restarted_agent_takes_over_without_a_gap() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let app = user.cgroup("app.slice/app-a.scope").app();
        let take_over = || {
            let mut session = Session::of(&user);
            session.replace(
                json!([{ "name": "mihomo", "port": 7890 }]),
                json!([]),
                json!([to_proxy("", "mihomo")]),
            );
            session
        };
        let mut session = take_over();
        let destinations = sb.destinations();
        let connections =
            destinations.map(|to| [app.open_tcp(to).expect("it opens"), app.open_udp(to)]);
        let traffic = destinations.map(|to| app.traffic(cgtproxy_tests::wire::Transport::Udp, to));
        for _ in 0..20 {
            drop(session);
            session = take_over();
            for (to, connections) in destinations.iter().zip(&connections) {
                for connection in connections {
                    assert_eq!(connection.ask(), proxied("mihomo", *to));
                }
            }
        }
        for (traffic, to) in traffic.into_iter().zip(destinations) {
            traffic.next(1);
            traffic.stop();
            sb.assert_nothing_left_for(to.ip());
        }
    });
}

#[test]
fn the_same_path_again_gets_the_new_id() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let mut session = Session::of(&user);
        session.replace(json!([]), json!([]), json!([]));
        let mut last = 0;
        for round in 0..1000 {
            let cgroup = user.cgroup("app.slice/app-a.scope");
            session.assign(json!([verdict("app.slice/app-a.scope", "drop")]));
            last = cgroup.id();
            if round < 999 {
                cgroup.remove();
            }
        }
        assert_eq!(mapped_ids(sb, 1001), [last]);
        let app = user.cgroup("app.slice/app-a.scope").app();
        assert!(app.udp(sb.destinations()[0]).is_dropped());
    });
}

#[test]
fn levels_are_there_only_while_they_are_used() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let levels = || {
            let rules = sb.run(&["nft", "list", "chain", "inet", "cgtproxy", "user-verdicts"]);
            rules
                .split("level ")
                .skip(1)
                .map(|rest| {
                    rest.split(' ')
                        .next()
                        .expect("a number")
                        .parse()
                        .expect("a number")
                })
                .collect::<Vec<u32>>()
        };
        user.cgroup("a/b/c");
        let mut session = Session::of(&user);
        session.replace(json!([]), json!([]), json!([verdict("a/b", "drop")]));
        assert_eq!(levels(), [5]);
        session.assign(json!([verdict("", "drop"), verdict("a/b/c", "direct")]));
        assert_eq!(levels(), [6, 5, 3]);
        session.call(
            "UpdateAssignments",
            json!({ "assign": [], "remove": ["a/b", "a/b/c"] }),
        );
        // What starts next is often what has just ended.
        assert_eq!(levels(), [6, 5, 3]);
        session.assign(json!([verdict("", "direct")]));
        assert_eq!(levels(), [3]);
        // One more may stay for whoever needs it next.
        session.assign(json!([verdict("a/b", "drop")]));
        session.call(
            "UpdateAssignments",
            json!({ "assign": [], "remove": ["a/b"] }),
        );
        assert_eq!(levels(), [5, 3]);
        session.call("RemovePolicy", json!({}));
        assert_eq!(levels(), Vec::<u32>::new());
    });
}

#[test]
fn verdicts_are_found_however_deep_control_groups_are() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        // user@1001.service is at level 3.
        let at = |level: usize| vec!["x"; level - 3].join("/");
        let app = |level: usize| user.cgroup(at(level)).app();
        let apps = [5, 8, 9, 12, 20, 21].map(|level| (level, app(level)));
        let mut session = Session::of(&user);
        let dropped = |levels: &[usize]| {
            for (level, app) in &apps {
                for to in sb.destinations() {
                    match levels.contains(level) {
                        true => assert!(app.udp(to).is_dropped(), "{level}"),
                        false => assert_eq!(app.udp(to), direct(to), "{level}"),
                    }
                }
            }
        };
        let replace = |session: &mut Session, verdicts: &[(usize, &str)]| {
            let assignment = |(level, what): &(usize, &str)| verdict(&at(*level), what);
            let all: Vec<_> = verdicts.iter().map(assignment).collect();
            session.replace(json!([]), json!([]), json!(all));
        };
        replace(&mut session, &[(5, "drop")]);
        dropped(&[5, 8, 9, 12, 20, 21]);
        replace(&mut session, &[(8, "drop"), (12, "direct")]);
        dropped(&[8, 9]);
        replace(&mut session, &[(20, "drop"), (5, "drop"), (9, "direct")]);
        dropped(&[5, 8, 20, 21]);
        replace(&mut session, &[(9, "drop")]);
        dropped(&[9, 12, 20, 21]);
        let too_deep = json!({ "assign": [verdict(&at(21), "drop")], "remove": [] });
        let skipped = &session.call("UpdateAssignments", too_deep)["skipped"];
        assert_eq!(skipped[0]["reason"], "tooDeep");
        dropped(&[9, 12, 20, 21]);
    });
}

/// The levels that a chain compares the control group of a packet's socket at, and how many of those comparisons
/// lead to another chain.
fn compared(sb: &Sandbox, chain: &str) -> (Vec<u32>, usize) {
    let rules = sb.run(&["nft", "list", "chain", "inet", "cgtproxy", chain]);
    let deep = match chain {
        "output" => "goto user-verdicts-deep".into(),
        chain => format!("goto {chain}-deep"),
    };
    let mut levels = Vec::new();
    let mut elsewhere = 0;
    // What closed sockets have still to say meets one rule more, and nobody else does.
    let closed = "socket wildcard 0 ";
    for rule in rules.lines().filter(|rule| !rule.contains(closed)) {
        let mut comparisons = rule.split("socket cgroupv2 level ").skip(1);
        if let Some(comparison) = comparisons.next() {
            let level = comparison.split_whitespace().next();
            levels.push(level.and_then(|level| level.parse().ok()).expect("a level"));
            elsewhere += usize::from(rule.ends_with(&deep));
        }
        assert_eq!(comparisons.next(), None, "{rule}");
    }
    (levels, elsewhere)
}

#[test]
fn however_deep_control_groups_are_the_packets_of_others_are_compared_eight_times_at_most() {
    sandbox(|sb| {
        const MOST: usize = 8;
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let at = |level: u32| vec!["x"; level as usize - 3].join("/");
        let verdicts = |levels: std::ops::RangeInclusive<u32>| {
            let all: Vec<_> = levels
                .map(|level| {
                    user.cgroup(at(level));
                    verdict(&at(level), "drop")
                })
                .collect();
            json!(all)
        };
        let mut session = Session::of(&user);
        // With nothing below that, there is nowhere else to look.
        session.replace(json!([]), json!([]), verdicts(3..=8));
        for chain in ["output", "user-verdicts"] {
            let (levels, elsewhere) = compared(sb, chain);
            assert_eq!((levels.len(), elsewhere), (6, 0), "{chain}: {levels:?}");
        }
        session.replace(json!([]), json!([]), verdicts(3..=20));
        for chain in ["output", "user-verdicts"] {
            let (mut levels, elsewhere) = compared(sb, chain);
            assert!(levels.len() <= MOST, "{chain}: {levels:?}");
            assert_eq!(elsewhere, 1, "{chain}");
            levels.sort_unstable();
            // One question tells whether a socket is deeper than that.
            assert_eq!(levels, [3, 4, 5, 6, 7, 8, 9], "{chain}");
        }
        let (mut deep, _) = compared(sb, "user-verdicts-deep");
        deep.sort_unstable();
        assert_eq!(deep, Vec::from_iter(3..=20));
        // Root's own levels are the machine's, and come in addition.
        let mut root = Session::of(&sb.user(0));
        root.replace(
            json!([]),
            json!([]),
            json!([verdict("user.slice", "direct")]),
        );
        let (levels, _) = compared(sb, "user-verdicts");
        assert!(levels.len() <= MOST, "{levels:?}");
        // They are no more for root's verdicts on a user's control groups that are deep.
        let mut paths = vec![String::new(), "user.slice".into()];
        paths.push("user.slice/user-1001.slice".into());
        paths.push("user.slice/user-1001.slice/user@1001.service".into());
        let deep: Vec<_> = (4..=20)
            .map(|level| format!("{}/{}", paths[3], at(level)))
            .collect();
        paths.extend(deep);
        let all: Vec<_> = paths
            .iter()
            .map(|path| {
                let mut verdict = verdict(path, "direct");
                verdict["enforce"] = json!(true);
                verdict
            })
            .collect();
        root.replace(json!([]), json!([]), json!(all));
        for chain in ["enforced", "system"] {
            let (mut levels, elsewhere) = compared(sb, chain);
            levels.sort_unstable();
            assert_eq!((levels, elsewhere), (Vec::from_iter(0..=9), 1), "{chain}");
            let (mut deep, _) = compared(sb, &format!("{chain}-deep"));
            deep.sort_unstable();
            assert_eq!(deep, Vec::from_iter(0..=20), "{chain}");
        }
    });
}

#[test]
fn a_user_manager_that_starts_again_is_followed() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let mut session = Session::of(&user);
        session.replace(json!([]), json!([]), json!([verdict("", "drop")]));
        user.cgroup("app.slice").remove();
        user.service().remove();
        let user = sb.user(1001);
        let app = user.cgroup("app.slice/app-a.scope").app();
        session.assign(json!([verdict("", "drop")]));
        for to in sb.destinations() {
            assert!(app.udp(to).is_dropped());
        }
        assert_eq!(sb.map_elements("users").len(), 1);
    });
}

#[test]
fn five_thousand_control_groups_come_and_go() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let paths: Vec<_> = (0..5000)
            .map(|n| format!("app.slice/app-{n}.scope"))
            .collect();
        let cgroups: Vec<_> = paths.iter().map(|path| user.cgroup(path)).collect();
        let mut session = Session::of(&user);
        let all: Vec<_> = paths.iter().map(|path| verdict(path, "drop")).collect();
        session.replace(json!([]), json!([]), json!(all));
        let mut ids: Vec<_> = cgroups.iter().map(|cgroup| cgroup.id()).collect();
        ids.sort_unstable();
        assert_eq!(mapped_ids(sb, 1001), ids);
        session.call(
            "UpdateAssignments",
            json!({ "assign": [], "remove": paths }),
        );
        assert!(mapped_ids(sb, 1001).is_empty());
    });
}

/// Which base chains there are that not everybody needs.
fn optional_chains(sb: &Sandbox) -> Vec<String> {
    let optional = [
        "delivery",
        "input",
        "output-nat",
        "postrouting",
        "prerouting",
        "prerouting-nat",
    ];
    let mut chains = sb.chains();
    chains.retain(|chain| optional.contains(&chain.as_str()));
    chains.sort();
    chains
}

#[test]
fn packets_pass_no_base_chain_before_somebody_needs_it() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        assert!(optional_chains(sb).is_empty());
        let user = sb.user(1001);
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let app = user.cgroup("app.slice").app();
        let mut session = Session::of(&user);
        let proxied_by = |proxy| json!([to_proxy("app.slice", proxy)]);
        session.replace(json!([]), json!([]), json!([verdict("app.slice", "drop")]));
        assert!(optional_chains(sb).is_empty());

        let mut proxy = json!({ "name": "mihomo", "port": 7890 });
        session.replace(json!([proxy]), json!([]), proxied_by("mihomo"));
        assert_eq!(optional_chains(sb), ["delivery", "postrouting"]);
        for to in sb.destinations() {
            assert_eq!(app.tcp(to), proxied("mihomo", to));
            assert_eq!(app.udp(to), proxied("mihomo", to));
        }

        proxy["dnsHijack"] = json!({ "ipv4": "127.0.0.1", "port": 1053, "tcp": true });
        session.replace(json!([proxy]), json!([]), proxied_by("mihomo"));
        let all = [
            "delivery",
            "input",
            "output-nat",
            "postrouting",
            "prerouting-nat",
        ];
        assert_eq!(optional_chains(sb), all);
        // Open connections may need them.
        session.replace(json!([]), json!([]), json!([]));
        assert_eq!(optional_chains(sb), all);

        let mut system = Session::of(&sb.user(0));
        system.replace(json!([]), json!([]), json!([]));
        assert!(optional_chains(sb).contains(&"prerouting".to_owned()));
    });
}
