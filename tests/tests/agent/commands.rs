//! What the commands tell.

use std::fs;

use cgtproxy_tests::agent::Agent;
use cgtproxy_tests::sandbox::{User, sandbox};
use cgtproxy_tests::wait::wait_until;
use serde_json::Value;

use crate::{CONFIG, agent, scope};

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
