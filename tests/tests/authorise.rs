//! What a user may name, and what becomes of everything else.

#![allow(clippy::expect_used, reason = "a panic is a failed test")]

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use cgtproxy_helper::cgroup::{Root, RootError, Unavailable};
use cgtproxy_helper::peer::Peer;
use cgtproxy_proto::path::ControlGroupPath;
use cgtproxy_tests::sandbox::{Outcome, direct, sandbox};
use cgtproxy_tests::session::{SOCKET, Session, verdict};
use serde_json::{Value, json};

fn policy(assignments: &Value) -> Value {
    json!({ "proxies": [], "bypass": [], "assignments": assignments })
}

/// Databases that can't be asked say nothing about who is in them, and may be asked again.
#[test]
fn who_can_not_be_looked_up_is_not_said_to_be_nobody() {
    sandbox(|sb| {
        let check = |config| {
            let helper = sb.helper().config(config).argument("--check");
            let mut helper = helper.spawn();
            (helper.wait().code(), helper.log())
        };
        let configs = [
            ("proxy-users:\n- some-user", "2:3", "some-user"),
            ("deny: {groups: [some-group]}", "1:17", "some-group"),
        ];
        for (config, place, _) in configs {
            let (code, log) = check(config);
            assert_eq!(code, Some(78), "{log}");
            assert!(log.contains(&format!("helper.yaml:{place}: ")), "{log}");
            assert!(log.contains("there is no such "), "{log}");
        }
        let script = "touch /run/nobody; chmod 0 /run/nobody
                      printf 'passwd: files\ngroup: files\n' >/run/nsswitch.conf
                      mount --bind /run/nsswitch.conf /etc/nsswitch.conf
                      for database in passwd group; do mount --bind /run/nobody /etc/$database; done";
        sb.run(&["sh", "-ec", script]);
        for (config, place, name) in configs {
            let (code, log) = check(config);
            assert_eq!(code, Some(1), "{log}");
            let message = format!("helper.yaml:{place}: can't look '{name}' up: Permission denied");
            assert!(log.contains(&message), "{log}");
        }
    });
}

#[test]
fn no_spelling_leads_out_of_the_callers_own_subtree() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let (alice, mallory) = (sb.user(1001), sb.user(1002));
        let app = alice.cgroup("app.slice/app-a.scope").app();
        let mut session = Session::of(&mallory);
        session.replace(json!([]), json!([]), json!([]));
        let of_alice = "user.slice/user-1001.slice/user@1001.service";
        for path in [
            "..",
            "../../../user-1001.slice/user@1001.service",
            "app.slice/../../../user-1001.slice/user@1001.service",
            "app.slice/%2e%2e/%2e%2e/%2e%2e/user-1001.slice",
            "./app.slice",
            "/",
            "/user.slice/user-1001.slice/user@1001.service",
            "%2Fuser.slice",
            "//app.slice",
            "app.slice/",
            "app.slice//x",
            "a\u{0}b",
            "a%00b",
            "%",
            "%4",
            "%zz",
        ] {
            let assign = json!([verdict(path, "drop")]);
            for (method, parameters, parameter) in [
                (
                    "ReplacePolicy",
                    policy(&assign),
                    "assignments[0].controlGroup",
                ),
                (
                    "UpdateAssignments",
                    json!({ "assign": assign, "remove": [] }),
                    "assign[0].controlGroup",
                ),
                (
                    "UpdateAssignments",
                    json!({ "assign": [], "remove": [path] }),
                    "remove[0]",
                ),
            ] {
                assert_eq!(
                    session.refusal(method, parameters),
                    (
                        "InvalidParameter".to_owned(),
                        json!({ "parameter": parameter })
                    ),
                    "{path:?}",
                );
            }
        }
        // Well-formed, and simply not there below the caller's own subtree.
        for path in [of_alice, "user@1001.service"] {
            let reply = session.call("ReplacePolicy", policy(&json!([verdict(path, "drop")])));
            assert_eq!(
                reply["skipped"],
                json!([{ "controlGroup": path, "reason": "missing" }]),
            );
        }
        assert_eq!(sb.map_elements("cgroups"), []);
        for to in sb.destinations() {
            assert_eq!(app.tcp(to), direct(to));
        }
    });
}

#[test]
fn long_paths_are_refused_before_they_are_looked_at() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let mut session = Session::of(&sb.user(1001));
        for path in [
            "x".repeat(256),
            "x".repeat(10_000),
            vec!["x"; 2049].join("/"),
        ] {
            let assign = policy(&json!([verdict(&path, "drop")]));
            assert_eq!(
                session.refusal("ReplacePolicy", assign).0,
                "InvalidParameter"
            );
        }
        let longest = "x".repeat(255);
        let reply = session.call("ReplacePolicy", policy(&json!([verdict(&longest, "drop")])));
        assert_eq!(reply["skipped"][0]["reason"], "missing");
    });
}

#[test]
fn names_of_any_bytes_can_be_assigned() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let names: [(&[u8], &str); 7] = [
            (b"with space.scope", "with space.scope"),
            (b"quo\"te'.scope", "quo\"te'.scope"),
            (br"app-org\x2dexample.scope", r"app-org\x2dexample.scope"),
            (b"not-\xff\xfe-utf8", "not-%FF%FE-utf8"),
            (b"100%.scope", "100%25.scope"),
            (b"}; flush ruleset; {", "}; flush ruleset; {"),
            (b"\x1b[2J", "\u{1b}[2J"),
        ];
        let mut session = Session::of(&user);
        session.replace(json!([]), json!([]), json!([]));
        for (bytes, wire) in names {
            let cgroup = user.cgroup("app.slice").child(OsStr::from_bytes(bytes));
            let app = cgroup.app();
            let path = format!("app.slice/{wire}");
            session.assign(json!([verdict(&path, "drop")]));
            for to in sb.destinations() {
                assert_eq!(app.udp(to), Outcome::Forbidden, "{wire:?}");
            }
            session.call(
                "UpdateAssignments",
                json!({ "assign": [], "remove": [path] }),
            );
            for to in sb.destinations() {
                assert_eq!(app.udp(to), direct(to), "{wire:?}");
            }
        }
    });
}

#[test]
fn what_cannot_be_had_is_reported_and_the_rest_of_the_call_holds() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let app = user.cgroup("app.slice/app-a.scope").app();
        // Below the user's subtree, but root's.
        sb.cgroup("user.slice/user-1001.slice/user@1001.service/app.slice/roots.scope");
        let mut session = Session::of(&user);
        let reply = session.call(
            "ReplacePolicy",
            policy(&json!([
                verdict("app.slice/gone.scope", "drop"),
                verdict("app.slice/app-a.scope", "drop"),
                verdict("app.slice/roots.scope", "drop"),
                verdict("app.slice/cgroup.procs", "drop"),
            ])),
        );
        assert_eq!(
            reply["skipped"],
            json!([
                { "controlGroup": "app.slice/cgroup.procs", "reason": "notControlGroup" },
                { "controlGroup": "app.slice/gone.scope", "reason": "missing" },
                { "controlGroup": "app.slice/roots.scope", "reason": "notOwned" },
            ]),
        );
        for to in sb.destinations() {
            assert!(app.udp(to).is_dropped());
        }
    });
}

#[test]
fn a_user_without_a_manager_is_told_so() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let mut session = Session::of(&user);
        user.cgroup("app.slice").remove();
        user.service().remove();
        assert_eq!(
            session.refusal("ReplacePolicy", policy(&json!([]))),
            (
                "NoUserManager".to_owned(),
                json!({ "controlGroup": "user.slice/user-1001.slice/user@1001.service" }),
            ),
        );
    });
}

#[test]
fn wrong_parameters_are_named() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let mut session = Session::of(&sb.user(1001));
        let with = |proxies: Value, bypass: Value, assignments: Value| json!({ "proxies": proxies, "bypass": bypass, "assignments": assignments });
        let p = |name: &str, port: i64| json!([{ "name": name, "port": port }]);
        for (parameters, parameter) in [
            (json!({}), "proxies"),
            (with(json!(1), json!([]), json!([])), "proxies"),
            (with(p("a", 0), json!([]), json!([])), "proxies[0].port"),
            (with(p("a", 65536), json!([]), json!([])), "proxies[0].port"),
            (with(p("a", -1), json!([]), json!([])), "proxies[0].port"),
            (with(p("", 1), json!([]), json!([])), "proxies[0].name"),
            (with(p("a b", 1), json!([]), json!([])), "proxies[0].name"),
            (
                with(p("a; drop", 1), json!([]), json!([])),
                "proxies[0].name",
            ),
            (
                with(p("direct", 1), json!([]), json!([])),
                "proxies[0].name",
            ),
            (
                with(p(&"a".repeat(65), 1), json!([]), json!([])),
                "proxies[0].name",
            ),
            (
                with(json!([]), json!(["10.0.0.0/8", "x"]), json!([])),
                "bypass[1]",
            ),
            (
                with(json!([]), json!(["10.0.0.0/33"]), json!([])),
                "bypass[0]",
            ),
            (
                with(json!([]), json!([]), json!([verdict("a", "nothing")])),
                "assignments[0].verdict",
            ),
            (
                with(json!([]), json!([]), json!([verdict("a", "proxy")])),
                "assignments[0].proxy",
            ),
            (
                with(
                    json!([]),
                    json!([]),
                    json!([{ "controlGroup": "a", "verdict": "drop", "proxy": "p" }]),
                ),
                "assignments[0].proxy",
            ),
        ] {
            assert_eq!(
                session.refusal("ReplacePolicy", parameters.clone()),
                (
                    "InvalidParameter".to_owned(),
                    json!({ "parameter": parameter })
                ),
                "{parameters}",
            );
        }
        let proxies = json!([{ "name": "a", "port": 1 }, { "name": "a", "port": 2 }]);
        assert_eq!(
            session
                .refusal("ReplacePolicy", with(proxies, json!([]), json!([])))
                .0,
            "ProxyExists",
        );
        let unknown = with(
            json!([]),
            json!([]),
            json!([cgtproxy_tests::session::to_proxy("", "b")]),
        );
        assert_eq!(
            session.refusal("ReplacePolicy", unknown),
            ("UnknownProxy".to_owned(), json!({ "name": "b" })),
        );
        assert!(sb.objects_of(1001).is_empty());
    });
}

/// What is passed over in silence may be what somebody relies on.
#[test]
fn nothing_that_a_call_says_is_ignored() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        user.cgroup("app.slice");
        let refuses = |session: &mut Session, method: &str, parameters: Value, parameter: &str| {
            assert_eq!(
                session.refusal(method, parameters.clone()),
                (
                    "InvalidParameter".to_owned(),
                    json!({ "parameter": parameter })
                ),
                "{method} {parameters}",
            );
        };
        let proxy = |name: &str, value: Value| {
            let proxy = json!({ "name": "p", "port": 1, name: value });
            json!({ "proxies": [proxy], "bypass": [], "assignments": [] })
        };
        let update = |assign: Value, remove: Value| json!({ "assign": assign, "remove": remove });
        let mut session = Session::of(&user);
        session.replace(json!([]), json!([]), json!([verdict("app.slice", "drop")]));
        let drop = verdict("app.slice", "drop");
        let same = verdict("app%2Eslice", "direct");
        let holds = json!({ "controlGroup": "", "verdict": "drop", "holds": true });
        for (method, parameters, parameter) in [
            (
                "UpdateAssignments",
                update(json!([drop, holds]), json!([])),
                "assign[1].holds",
            ),
            (
                "ReplacePolicy",
                proxy("noIPv6", json!(true)),
                "proxies[0].noIPv6",
            ),
            ("RemovePolicy", json!({ "force": false }), "force"),
            ("GetStatus", json!({ "uid": 0 }), "uid"),
            ("Diagnose", json!({ "uid": 0 }), "uid"),
            // One control group has one verdict.
            (
                "UpdateAssignments",
                update(json!([drop, same]), json!([])),
                "assign[1].controlGroup",
            ),
            (
                "UpdateAssignments",
                update(json!([]), json!(["app.slice", "x", "app%2eslice"])),
                "remove[2]",
            ),
            (
                "UpdateAssignments",
                update(json!([drop]), json!(["x", "app%2eslice"])),
                "remove[1]",
            ),
            // Objects have names, lists have not.
            ("UpdateAssignments", json!([[], []]), "parameters"),
            ("UpdateAssignments", json!(5), "parameters"),
            ("GetStatus", json!([]), "parameters"),
            (
                "UpdateAssignments",
                update(
                    json!([["app.slice", "direct", null, null, null, null, null]]),
                    json!([]),
                ),
                "assign[0]",
            ),
            // There is nobody who would answer.
            (
                "ReplacePolicy",
                proxy("dnsHijack", json!({ "port": 53 })),
                "proxies[0].dnsHijack",
            ),
        ] {
            refuses(&mut session, method, parameters, parameter);
        }
        // Which a later interface has.
        let mut later = drop.clone();
        later["later"] = Value::Null;
        session.call(
            "UpdateAssignments",
            json!({ "assign": [later], "remove": [], "later": null }),
        );
        // The first name can't be read, and is told as that of what it is in.
        session.0.send_bytes(
            b"{\"method\":\"org.cgtproxy.Helper.UpdateAssignments\",\"parameters\":{\"assign\":[{\"\\ud800\":1}]}}\0",
        );
        let reply = session.0.receive().expect("a reply");
        assert_eq!(reply["parameters"], json!({ "parameter": "assign[0]" }));
        let mut call = user.varlink(SOCKET);
        call.send_bytes(b"[\"org.cgtproxy.Helper.GetStatus\",null,null,null]\0");
        assert_eq!(call.receive(), None);
        let mut root = Session::of(&sb.user(0));
        let mut all = verdict("user.slice", "drop");
        all["enforceHold"] = json!(true);
        let policy = json!({ "proxies": [], "bypass": [], "assignments": [all.clone()] });
        refuses(
            &mut root,
            "ReplacePolicy",
            policy,
            "assignments[0].enforceHold",
        );
        all["hold"] = json!(true);
        root.replace(json!([]), json!([]), json!([all]));
    });
}

#[test]
fn rubbish_ends_its_own_connection_only() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let other = sb.user(1002);
        let app = other.cgroup("app.slice/app-a.scope").app();
        let mut session = Session::of(&other);
        session.replace(json!([]), json!([]), json!([verdict("", "drop")]));
        let brackets = {
            let mut text = "[".repeat(1 << 20).into_bytes();
            text.push(0);
            text
        };
        for rubbish in [
            &b"\0"[..],
            b"{}\0",
            b"[]\0",
            b"null\0",
            b"\xff\xfe\0",
            b"{\"method\":1}\0",
            b"{\"method\":\"x.y\",\"upgrade\":true}\0",
            &brackets,
        ] {
            let mut rude = user.varlink(SOCKET);
            rude.send_bytes(rubbish);
            assert_eq!(
                rude.receive(),
                None,
                "{:?}",
                &rubbish[..rubbish.len().min(30)]
            );
        }
        // Half a message, held open while everybody else goes on.
        let mut half = user.varlink(SOCKET);
        half.send_bytes(b"{\"method\":");
        for to in sb.destinations() {
            assert!(app.udp(to).is_dropped());
        }
        session.replace(json!([]), json!([]), json!([]));
        half.finish();
        assert_eq!(half.receive(), None);
    });
}

/// This process, as the helper sees one that connects to it.
fn own_peer() -> Peer {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .expect("a runtime");
    let _guard = runtime.enter();
    let (_ours, theirs) = tokio::net::UnixStream::pair().expect("a socket pair");
    Peer::of(&theirs).expect("a peer")
}

#[test]
fn control_groups_are_found_on_pure_and_hybrid_machines_and_where_one_says() {
    sandbox(|sb| {
        sb.cgroup("a");
        let peer = own_peer();
        let path = ControlGroupPath::from_wire("a").expect("a path");
        let open = |root: Result<Root, RootError>| {
            let subtree = root?.subtree(&peer).expect("a subtree");
            let cgroup = subtree.open(&path).expect("a control group");
            assert_eq!(cgroup.level(), 1);
            Ok::<_, RootError>(cgroup)
        };
        let pure = open(Root::open(None)).expect("cgroup v2");
        // What systemd makes of a machine that still has v1 controllers.
        sb.run(&[
            "sh",
            "-c",
            "mount -t tmpfs v1 /sys/fs/cgroup; mkdir /sys/fs/cgroup/unified /run/cgroup
             mount -t cgroup2 v2 /sys/fs/cgroup/unified; mount -t cgroup2 v2 /run/cgroup",
        ]);
        assert_eq!(open(Root::open(None)).expect("cgroup v2"), pure);
        sb.run(&["umount", "/sys/fs/cgroup/unified"]);
        assert!(matches!(open(Root::open(None)), Err(RootError::NotFound)));
        let elsewhere = Root::open(Some("/run/cgroup".as_ref()));
        assert_eq!(open(elsewhere).expect("cgroup v2"), pure);
        let wrong = Root::open(Some("/run".as_ref()));
        assert!(
            matches!(wrong, Err(RootError::NotControlGroup { .. })),
            "{wrong:?}"
        );
        let absent = Root::open(Some("/absent".as_ref()));
        assert!(matches!(absent, Err(RootError::Open { .. })), "{absent:?}");
    });
}

#[test]
fn neither_symbolic_links_nor_mounts_lead_out() {
    sandbox(|sb| {
        let a = sb.cgroup("a");
        let peer = own_peer();
        let root = Root::open(None).expect("a root");
        let subtree = root.subtree(&peer).expect("a subtree");
        let path = |text| ControlGroupPath::from_wire(text).expect("a path");
        // cgroupfs has no symbolic links, so one comes with a file system mounted over a directory.
        let a = a.directory();
        let a = a.to_str().expect("plain ASCII");
        sb.run(&["mount", "-t", "tmpfs", "over", a]);
        sb.run(&[
            "ln",
            "-s",
            "/sys/fs/cgroup/user.slice",
            &format!("{a}/link"),
        ]);
        assert_eq!(subtree.open(&path("a")), Err(Unavailable::NotControlGroup));
        assert_eq!(
            subtree.open(&path("a/link")),
            Err(Unavailable::NotControlGroup)
        );
        sb.run(&["umount", a]);
        // Another cgroup2 mount over it is the same control group, and still out of bounds.
        sb.run(&["mount", "-t", "cgroup2", "over", a]);
        assert_eq!(subtree.open(&path("a")), Err(Unavailable::NotControlGroup));
        assert_eq!(
            subtree.open(&path("a/user.slice")),
            Err(Unavailable::NotControlGroup)
        );
        sb.run(&["umount", a]);
        assert!(subtree.open(&path("a")).is_ok());
    });
}
