//! Every limit at n and at n + 1, through every method.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a panic is a failed test"
)]

use cgtproxy_tests::agent::Agent;
use cgtproxy_tests::sandbox::{Cgroup, direct, sandbox};
use cgtproxy_tests::session::{SOCKET, Session, mapped_ids, verdict};
use cgtproxy_tests::wait::wait_until;
use serde_json::{Value, json};

fn policy(proxies: usize, bypass: usize, cgroups: usize) -> Value {
    let proxies: Vec<_> = (0..proxies)
        .map(|n| json!({ "name": format!("p{n}"), "port": 1000 + n }))
        .collect();
    let bypass: Vec<_> = (0..bypass).map(|n| format!("10.0.{n}.0/24")).collect();
    let assignments: Vec<_> = (0..cgroups)
        .map(|n| verdict(&format!("c{n}"), "drop"))
        .collect();
    json!({ "proxies": proxies, "bypass": bypass, "assignments": assignments })
}

/// What docs/security.md says that the helper's memory stays below, in KiB, without and for each such policy.
const MEMORY: u64 = 64 * 1024;
const MEMORY_EACH: u64 = 8 * 1024;

/// In memory that is the process's own, in KiB: what it shares with others is its program.
fn memory(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let number = line.and_then(|line| line.trim().strip_suffix(" kB"));
    number.and_then(|kib| kib.parse().ok()).expect("a number")
}

#[test]
fn a_policy_of_as_many_control_groups_as_one_may_have_takes_no_more_memory_than_it_may() {
    sandbox(|sb| {
        const MOST: usize = 16 * 1024;
        const USERS: u32 = 2;
        let helper = sb.helper().start();
        let mut sessions = Vec::new();
        let begun = memory(helper.pid());
        for uid in (1001..).take(USERS as usize) {
            let user = sb.user(uid);
            let name = |n: usize| format!("app.slice/app-gnome-org.example.Application-{n}.scope");
            let directory = user.cgroup("app.slice").directory();
            let script = format!(
                "cd {} && seq -f app-gnome-org.example.Application-%g.scope 0 {} | xargs mkdir",
                directory.display(),
                MOST - 1
            );
            user.shell(&script);
            let assignments: Vec<_> = (0..MOST).map(|n| verdict(&name(n), "drop")).collect();
            let mut session = Session::of(&user);
            session.replace(json!([]), json!([]), json!(assignments));
            assert_eq!(session.status()["controlGroups"], json!(MOST));
            sessions.push(session);
        }
        let each = (memory(helper.pid()) - begun) / u64::from(USERS);
        println!("{each} KiB for each");
        assert!(each <= MEMORY_EACH, "{each} KiB for each");
        let peak = helper.peak_memory();
        assert!(
            peak <= MEMORY + u64::from(USERS) * MEMORY_EACH,
            "{peak} KiB"
        );
    });
}

/// Neither it nor what puts it back waits for more answers than there is room for.
#[test]
fn a_policy_of_many_proxies_is_taken_and_restored() {
    sandbox(|sb| {
        let config = "mark-mask: 0xffff0000\nlimits: {proxies: 400}\nown-table: false";
        let _helper = sb.helper().config(config).start();
        let user = sb.user(1001);
        let app = user.cgroup("app.slice").app();
        let proxies: Vec<_> = (0..400)
            .map(|n| {
                json!({
                    "name": format!("p{n}"), "port": 1000 + n, "redirect": true,
                    "dnsHijack": { "ipv4": "127.0.0.1", "port": 1053, "tcp": true },
                })
            })
            .collect();
        let mut session = Session::of(&user);
        session.replace(
            json!(proxies),
            json!([]),
            json!([verdict("app.slice", "drop")]),
        );
        sb.nft("flush ruleset");
        wait_until("the table is back", || sb.has_table());
        session.assign(json!([verdict("app.slice", "dropAll")]));
        for to in sb.destinations() {
            assert!(app.udp(to).is_dropped());
        }
    });
}

#[test]
fn of_a_policy() {
    sandbox(|sb| {
        let _helper = sb
            .helper()
            .config("limits: {proxies: 2, bypass: 3, control-groups: 4}")
            .start();
        let user = sb.user(1001);
        for n in 0..8 {
            user.cgroup(format!("c{n}"));
        }
        let mut session = Session::of(&user);
        session.call("ReplacePolicy", policy(2, 3, 4));
        for (over, error, limit) in [
            (policy(3, 3, 4), "TooManyProxies", 2),
            (policy(2, 4, 4), "TooManyBypassEntries", 3),
            (policy(2, 3, 5), "TooManyControlGroups", 4),
        ] {
            assert_eq!(
                session.refusal("ReplacePolicy", over),
                (error.to_owned(), json!({ "limit": limit })),
            );
        }
        let one_more = json!({ "assign": [verdict("c4", "drop")], "remove": [] });
        assert_eq!(
            session.refusal("UpdateAssignments", one_more).0,
            "TooManyControlGroups"
        );
        // One for one is no more than before; so is another verdict for the same.
        session.call(
            "UpdateAssignments",
            json!({ "assign": [verdict("c4", "drop"), verdict("c1", "direct")], "remove": ["c0"] }),
        );
        assert_eq!(session.status()["controlGroups"], 4);
        assert_eq!(sb.map_elements("cgroups").len(), 4);
    });
}

/// Drops what is named so, and leaves all else to what it is in.
const DROPS: &str = "version: 1\nrules: [{match: '/dropped[^/]*$', drop: true}]";

/// The problem that an agent's status tells of once it knows this much and has said all there is to say.
#[track_caller]
fn problem_of(agent: &mut Agent, cgroups: usize, without: usize) -> Option<String> {
    let mut problem = None;
    wait_until("the agent to know them all", || {
        let status = agent.status();
        problem = status["problem"].as_str().map(str::to_owned);
        let list = status["controlGroups"].as_array().expect("a list");
        let dropped = list.iter().filter(|group| group["target"] == "drop");
        let (inside, out): (Vec<_>, Vec<_>) = dropped.partition(|g| g["inForce"] == true);
        let waiting = out.iter().filter(|group| group["skipped"] == "noRoom");
        waiting.count() == without && out.len() == without && inside.len() + without == cgroups
    });
    problem
}

#[test]
fn of_an_agent_that_says_what_fits_and_removes_what_has_gone() {
    sandbox(|sb| {
        let _helper = sb.helper().config("limits: {control-groups: 3}").start();
        let user = sb.user(1001);
        let cgroup = |name: &str| user.cgroup(format!("app.slice/{name}"));
        let mut service = user.agent(DROPS).start();
        let mut agent = Agent::of(&user);
        let dropped: Vec<_> = (0..3).map(|n| cgroup(&format!("dropped-{n}"))).collect();
        let apps: Vec<_> = dropped.iter().map(Cgroup::app).collect();
        assert_eq!(problem_of(&mut agent, 3, 0), None);
        // One more inherits, and nothing changes for the others.
        let more = cgroup("dropped-more");
        let app = more.app();
        let problem = problem_of(&mut agent, 4, 1).expect("one has no room");
        let whose = format!("'{}' has no verdict of its own", more.path().display());
        assert!(problem.starts_with(&whose), "{problem}");
        assert!(problem.contains("no more than 3 "), "{problem}");
        service.wait_log(&whose);
        apps.iter().for_each(|app| sb.expect_dropped(app));
        sb.expect(&app, direct);
        // Nor when everything is said anew, when what is less deep comes first.
        service.kill();
        let slice = user.cgroup("dropped.slice");
        let below = user.cgroup("dropped.slice/anything").app();
        service.start_again();
        let mut agent = Agent::of(&user);
        problem_of(&mut agent, 6, 2).expect("two have no room");
        sb.expect_dropped(&below);
        sb.expect(&app, direct);
        drop(below);
        user.cgroup("dropped.slice/anything").remove();
        slice.remove();
        // What is gone is removed and makes room, first for what has waited.
        drop(apps);
        dropped.iter().for_each(Cgroup::remove);
        assert_eq!(problem_of(&mut agent, 1, 0), None);
        assert_eq!(mapped_ids(sb, 1001), [more.id()]);
        sb.expect_dropped(&app);
        assert_eq!(service.log().matches("no verdict of its own").count(), 2);
    });
}

#[test]
fn of_one_users_part_of_roots_policy() {
    sandbox(|sb| {
        let _helper = sb.helper().config("limits: {control-groups: 8}").start();
        let root = sb.user(0);
        let config = DROPS.replace("drop: true", "drop: true, enforce: true");
        let service = root.agent(&config).argument("--system").start();
        let mut agent = Agent(root.varlink("/run/cgtproxy-agent-system/agent.sock"));
        let (alice, bob) = (sb.user(1001), sb.user(1002));
        let of_alice = |n: u32| alice.cgroup(format!("app.slice/dropped-{n}"));
        let of_bob = |n: u32| bob.cgroup(format!("app.slice/dropped-{n}"));
        // Half of all there is room for, and not one more.
        let flood: Vec<_> = (0..4).map(of_alice).collect();
        assert_eq!(problem_of(&mut agent, 4, 0), None);
        let more: Vec<_> = (4..40).map(of_alice).collect();
        let problem = problem_of(&mut agent, 40, 36).expect("most have no room");
        let user = "user.slice/user-1001.slice/user@1001.service/";
        assert!(problem.starts_with(&format!("'/{user}")), "{problem}");
        assert!(problem.contains("' and 35 more have no verdict of their own"));
        sb.expect_dropped(&flood[3].app());
        // It has the verdict of what it is in, in which its user could have left it.
        sb.expect(&more[0].app(), direct);
        // There is room for others, and in the end for what no user makes.
        let (first, second) = (of_bob(1), of_bob(2));
        problem_of(&mut agent, 42, 36);
        sb.expect_dropped(&first.app());
        sb.expect_dropped(&second.app());
        let third = of_bob(3);
        problem_of(&mut agent, 43, 37);
        let web = sb.cgroup("system.slice/dropped.service");
        problem_of(&mut agent, 44, 37);
        sb.expect_dropped(&web.app());
        assert_eq!(mapped_ids(sb, 0).len(), 7);
        // Root's file is loaded all the same.
        service.write_config(&config.replace("drop: true, e", "drop: all, e"));
        wait_until("the other rules are in force", || {
            let status = agent.status();
            let list = status["controlGroups"].as_array().expect("a list");
            let is = |group: &&Value| group["target"] == "drop-all" && group["inForce"] == true;
            list.iter().filter(is).count() == 7
        });
        service.write_config(&config);
        problem_of(&mut agent, 44, 37);
        // And what alice gives back others get.
        flood.iter().chain(&more).for_each(Cgroup::remove);
        assert_eq!(problem_of(&mut agent, 4, 0), None);
        sb.expect_dropped(&third.app());
        assert_eq!(mapped_ids(sb, 0).len(), 4);
    });
}

#[test]
fn a_policy_of_as_many_control_groups_as_one_may_have_is_one_call() {
    sandbox(|sb| {
        const MOST: usize = 16 * 1024;
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let directory = user.cgroup("app.slice").directory();
        let script = format!(
            "cd {} && seq -f dropped-org.example.an-application-with-a-long-name-%g.scope {MOST} \
             | xargs mkdir",
            directory.display(),
        );
        user.shell(&script);
        let _agent = user.agent(DROPS).start();
        let status = Session::of(&user).status();
        assert_eq!(status["controlGroups"], json!(MOST));
        assert_eq!(status["generation"], json!(1));
    });
}

/// One user may have thousands of uids, and everybody waits for the databases of users and groups.
#[test]
fn of_whom_the_databases_are_asked_about() {
    sandbox(|sb| {
        // Debian's static accounts: games is user 5 in group 60.
        let config = "allow: {users: [1001], groups: [60]}";
        let _helper = sb.helper().config(config).start();
        let (named, member) = (sb.user(1001), sb.user(5));
        Session::of(&member).status();
        for user in [&named, &member] {
            user.cgroup("app.slice").remove();
            user.service().remove();
        }
        // It needs no group.
        Session::of(&named).status();
        assert_eq!(
            member.varlink(SOCKET).receive(),
            Some(json!({
                "error": "org.varlink.service.PermissionDenied", "parameters": {},
            })),
        );
    });
}

/// Nobody's message makes much more of itself than it is, however many things it names.
#[test]
fn of_lists_and_nothing_is_made_of_longer_ones() {
    sandbox(|sb| {
        const MOST: usize = 16 * 1024;
        let helper = sb.helper().start();
        let user = sb.user(1001);
        user.cgroup("app.slice");
        let names = |count: usize| (0..count).map(|n| format!("{n:05x}")).collect::<Vec<_>>();
        let remove = |count: usize| json!({ "assign": [], "remove": names(count) });
        let bypass = |count: usize| {
            let bypass = vec!["::"; count];
            json!({ "proxies": [], "bypass": bypass, "assignments": [] })
        };
        let limit = |error: &str, limit: usize| (error.to_owned(), json!({ "limit": limit }));
        let begun = helper.peak_memory();
        let mut session = Session::of(&user);
        let without = session.refusal("UpdateAssignments", remove(500_000));
        assert_eq!(without.0, "NoSession");
        assert_eq!(
            session.refusal("ReplacePolicy", bypass(800_000)),
            limit("TooManyBypassEntries", 1024)
        );
        session.replace(json!([]), json!([]), json!([verdict("app.slice", "drop")]));
        assert_eq!(
            session.refusal("UpdateAssignments", remove(500_000)),
            limit("TooManyControlGroups", MOST)
        );
        let taken = helper.peak_memory() - begun;
        println!("{taken} KiB");
        assert!(taken <= MEMORY_EACH, "{taken} KiB");
        session.call("UpdateAssignments", remove(MOST));
        assert_eq!(
            session.refusal("UpdateAssignments", remove(MOST + 1)),
            limit("TooManyControlGroups", MOST)
        );
        assert_eq!(session.status()["controlGroups"], 1);
    });
}

/// What one message has left behind does not make room for the next, nor do messages that come beside each other leave
/// holes.
#[test]
fn long_messages_take_no_more_memory_than_they_are_long_and_give_it_back() {
    sandbox(|sb| {
        const LENGTH: usize = 3 * 1024 * 1024;
        let helper = sb.helper().start();
        let user = sb.user(1001);
        let half = vec![b'x'; LENGTH];
        let (begun, own) = (helper.peak_memory(), memory(helper.pid()));
        for _ in 0..2 {
            let mut whole = user.varlink(SOCKET);
            whole.send_bytes(&[&half[..], b"\0"].concat());
            assert_eq!(whole.receive(), None);
        }
        let mut both = [user.varlink(SOCKET), user.varlink(SOCKET)];
        for piece in half.chunks(128 * 1024) {
            for connection in &mut both {
                connection.send_bytes(piece);
                // The answer to another one tells that this has been read.
                Session::of(&user).status();
            }
        }
        let taken = helper.peak_memory() - begun;
        println!("{taken} KiB");
        assert!(taken <= MEMORY_EACH, "{taken} KiB");
        assert!(taken >= 2 * LENGTH as u64 / 1024, "not all is read");
        drop(both);
        wait_until("what they took is given back", || {
            memory(helper.pid()) < own + 1024
        });
    });
}

#[test]
fn of_connections() {
    sandbox(|sb| {
        let _helper = sb.helper().config("limits: {connections: 3}").start();
        let (user, other) = (sb.user(1001), sb.user(1002));
        let mut open: Vec<_> = (0..3)
            .map(|_| {
                let mut session = Session::of(&user);
                session.status();
                session
            })
            .collect();
        let mut refused = user.varlink(SOCKET);
        assert_eq!(
            refused.receive(),
            Some(json!({
                "error": "org.cgtproxy.Helper.TooManyConnections", "parameters": { "limit": 3 },
            })),
        );
        assert_eq!(refused.receive(), None);
        // Another user has a limit of their own, and a closed connection makes room.
        Session::of(&other).status();
        let mut last = open.pop().expect("three are open");
        last.0.finish();
        assert_eq!(last.0.receive(), None);
        Session::of(&user).status();
    });
}

/// Who comes beyond the limit is told so, and is not left waiting.
#[test]
fn of_programs_that_talk_to_an_agent_or_a_relay() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let _relay = user.relay().start();
        let _agent = user.agent(DROPS).start();
        for (interface, path, most) in [
            ("org.cgtproxy.Agent", "cgtproxy/agent.sock", 64),
            ("org.cgtproxy.Relay", "cgtproxy-relay.sock", 16),
        ] {
            let socket = format!("/run/user/1001/{path}");
            let status = format!("{interface}.GetStatus");
            let mut open: Vec<_> = (0..most)
                .map(|_| {
                    let mut varlink = user.varlink(&socket);
                    let reply = varlink.call(&status, json!({}));
                    assert_eq!(reply.get("error"), None, "{reply}");
                    varlink
                })
                .collect();
            for _ in 0..20 {
                let mut refused = user.varlink(&socket);
                assert_eq!(
                    refused.receive(),
                    Some(json!({
                        "error": format!("{interface}.TooManyConnections"), "parameters": { "limit": most },
                    })),
                );
                assert_eq!(refused.receive(), None);
            }
            if most == 64 {
                let sentence = "cgtproxy-agent serves no more than 64 programs at once\n";
                for (program, argument) in
                    [("cgtproxy-exec", "--list"), ("cgtproxy-agent", "status")]
                {
                    let output = user.run(program, &[argument]);
                    let said = String::from_utf8_lossy(&output.stderr);
                    assert!(!output.status.success(), "{program}");
                    assert!(said.ends_with(sentence), "{said}");
                }
            }
            // Those that are open are served, and one that is closed makes room.
            let reply = open[0].call(&status, json!({}));
            assert_eq!(reply.get("error"), None, "{reply}");
            open[0].finish();
            assert_eq!(open[0].receive(), None);
            wait_until("room for another one", || {
                let mut varlink = user.varlink(&socket);
                varlink.call(&status, json!({})).get("error").is_none()
            });
        }
    });
}

#[test]
fn of_a_message_to_an_agent_or_a_relay() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let _relay = user.relay().start();
        let _agent = user.agent(DROPS).start();
        for (interface, path, most) in [
            ("org.cgtproxy.Agent", "cgtproxy/agent.sock", 8 * 4095),
            ("org.cgtproxy.Relay", "cgtproxy-relay.sock", 4 * 1024 * 1024),
        ] {
            let mut varlink = user.varlink(format!("/run/user/1001/{path}"));
            varlink.send_bytes(&status_of_length(interface, most));
            assert_eq!(varlink.receive().expect("a reply").get("error"), None);
            varlink.send_bytes(&status_of_length(interface, most + 1));
            assert_eq!(
                varlink.receive(),
                Some(json!({
                    "error": format!("{interface}.MessageTooLarge"), "parameters": { "limit": most },
                })),
            );
            assert_eq!(varlink.receive(), None);
        }
    });
}

/// A call of so many bytes.
fn status_of_length(interface: &str, length: usize) -> Vec<u8> {
    let start = format!("{{\"method\":\"{interface}.GetStatus\",\"x\":\"");
    let end = "\"}\0";
    let padding = "x".repeat(length + 1 - start.len() - end.len());
    [&*start, &padding, end].concat().into_bytes()
}

#[test]
fn of_a_message() {
    sandbox(|sb| {
        const LIMIT: usize = 4 * 1024 * 1024;
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let message = |length| status_of_length("org.cgtproxy.Helper", length);
        let mut varlink = user.varlink(SOCKET);
        varlink.send_bytes(&message(LIMIT));
        assert_eq!(varlink.receive().expect("a reply").get("error"), None);
        varlink.send_bytes(&message(LIMIT + 1));
        assert_eq!(
            varlink.receive(),
            Some(json!({
                "error": "org.cgtproxy.Helper.MessageTooLarge", "parameters": { "limit": LIMIT },
            })),
        );
        assert_eq!(varlink.receive(), None);
        Session::of(&user).status();
    });
}

#[test]
fn of_marks() {
    sandbox(|sb| {
        // Two bits for numbers: three proxies on the whole machine.
        let _helper = sb.helper().config("mark-mask: 0x00000700").start();
        let (one, two) = (sb.user(1001), sb.user(1002));
        let (mut first, mut second) = (Session::of(&one), Session::of(&two));
        first.call("ReplacePolicy", policy(2, 0, 0));
        second.call("ReplacePolicy", policy(1, 0, 0));
        assert_eq!(
            second.refusal("ReplacePolicy", policy(2, 0, 0)).0,
            "NoMarksLeft"
        );
        assert_eq!(second.status()["proxies"].as_array().map(Vec::len), Some(1));
        first.call("RemovePolicy", json!({}));
        second.call("ReplacePolicy", policy(3, 0, 0));
        let marks: Vec<_> = sb.map_elements("deliver").into_iter().collect();
        assert_eq!(marks.len(), 3);
    });
}

#[test]
fn of_who_may_use_it() {
    sandbox(|sb| {
        let config = "allow: {users: [1001, 1002]}\ndeny: {users: [1002]}";
        let _helper = sb.helper().config(config).start();
        Session::of(&sb.user(1001)).status();
        for uid in [1002, 1003] {
            let mut refused = sb.user(uid).varlink(SOCKET);
            assert_eq!(
                refused.receive(),
                Some(json!({
                    "error": "org.varlink.service.PermissionDenied", "parameters": {},
                })),
            );
            assert_eq!(refused.receive(), None);
        }
        // An agent says so, and goes on trying: the administrator may think better of it.
        let agent = sb.user(1003).agent("version: 1").spawn();
        agent.wait_log("the administrator does not allow this user to use the helper");
    });
}
