//! Root's agent in a whole system, with the original's own example for its configuration, unedited.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a panic is a failed test"
)]

use std::path::Path;

use cgtproxy_tests::confinement::assert_confined;
use cgtproxy_tests::sandbox::{App, Sandbox, Server, by, direct, sandbox};
use cgtproxy_tests::steady::Steady;
use cgtproxy_tests::system::{System, SystemUser};
use cgtproxy_tests::wait::wait_until;
use serde_json::Value;

/// See tests/data/README.md.
const ORIGINAL: &str = include_str!("../data/original-example.yaml");
/// The port that it names.
const PORT: u16 = 7893;
const CONFIG: &str = "/etc/cgtproxy/config.yaml";
const AGENT: &str = "cgtproxy-agent-system.service";
const PROXY: &str = "clash-meta";
const PROXY_UNIT: &str = "clash-meta.service";

/// As its package has it, but for the program: the test bed puts a server into its control group.
const CLASH_META: &str = "[Service]\nUser=clash-meta\nExecStart=/bin/sleep infinity\n";

const USERS_CONFIG: &str = r"
version: 1
tproxies:
  own: {port: 7891}
rules:
  - {match: app-own, tproxy: own}
  - {match: app-open, direct: true}
";

/// The system with the configuration and its proxy in place.
fn boot(sb: &Sandbox) -> (System, Server) {
    let install = |root: &Path| {
        let write = |path: &str, text: &str| {
            let path = root.join(path.trim_start_matches('/'));
            std::fs::create_dir_all(path.parent().expect("a file")).expect("the overlay is ours");
            std::fs::write(path, text).expect("the overlay is ours");
        };
        write(CONFIG, ORIGINAL);
        write("/etc/systemd/system/clash-meta.service", CLASH_META);
        write("/etc/sysusers.d/clash-meta.conf", "u clash-meta -\n");
    };
    let system = System::builder(sb)
        .install_project()
        .install(install)
        .boot();
    system.run(&["systemd-sysusers", "clash-meta.conf"]);
    system.run(&["systemctl", "start", PROXY_UNIT]);
    let uid = system.run(&["id", "-u", "clash-meta"]);
    let proxy = sb
        .tproxy(PROXY)
        .uid(uid.trim().parse().expect("a uid"))
        .cgroup(&system.unit_cgroup(PROXY_UNIT))
        .port(PORT)
        .start();
    system.run(&[
        "systemctl",
        "enable",
        "--now",
        "cgtproxy-helper.socket",
        AGENT,
    ]);
    (system, proxy)
}

/// An application as a desktop starts it.
fn scope(system: &System, user: &SystemUser, slice: &str, name: &str) -> App {
    let (slice, unit) = (format!("--slice={slice}"), format!("--unit={name}"));
    let by = ["systemd-run", "--user", "--quiet", "--collect", "--scope"];
    system.app_as(user, &[&by[..], &[&slice, &unit]].concat())
}

fn service(system: &System, name: &str) -> App {
    let unit = format!("--unit={name}");
    let by = ["systemd-run", "--quiet", "--collect", "--pipe", "--wait"];
    system.app(&[&by[..], &[&unit]].concat())
}

#[test]
fn the_originals_example_works_unedited() {
    sandbox(|sb| {
        let (system, _proxy) = boot(sb);
        let alice = system.alice();
        // The catch-all, for a service, for what users start, and for what is in no unit's control group.
        sb.expect(&service(&system, "web"), by(PROXY));
        sb.expect(&system.app_as(alice, &[]), by(PROXY));
        let browser = scope(&system, alice, "app.slice", "app-gnome-firefox-7.scope");
        sb.expect(&browser, by(PROXY));
        // What the proxy itself sends does not come back to it.
        let own = system.unit_cgroup(PROXY_UNIT);
        sb.expect(&own.app(), direct);
        // The slices, as the example's comments tell to use them, and an application.
        let of_slice = |name: &str| {
            let (slice, unit) = (
                format!("cgtproxy-{name}.slice"),
                format!("run-{name}.scope"),
            );
            scope(&system, alice, &slice, &unit)
        };
        let (open, dropped, through) = (of_slice("direct"), of_slice("drop"), of_slice("proxy"));
        let parsec = "app-gnome-com.parsecgaming.parsec-42.scope";
        let parsec = scope(&system, alice, "app.slice", parsec);
        system.wait_in_force(None);
        sb.expect(&open, direct);
        sb.expect_dropped(&dropped);
        sb.expect(&through, by(PROXY));
        sb.expect(&parsec, direct);

        it_tells(&system, alice);
        it_has_no_privilege(&system);

        // Users' own verdicts win, and what users say nothing about is the system's.
        let _own = sb.tproxy("own").uid(alice.uid()).port(7891).start();
        system.write_config(alice, USERS_CONFIG);
        let (by_rule, goes) = (
            scope(&system, alice, "app.slice", "app-own-1.scope"),
            scope(&system, alice, "app.slice", "app-open-1.scope"),
        );
        system.enable_agent(alice);
        system.wait_in_force(Some(alice));
        sb.expect(&by_rule, by("own"));
        sb.expect(&goes, direct);
        sb.expect(&browser, by(PROXY));
        sb.expect(&parsec, direct);
        let bobs = scope(&system, system.bob(), "app.slice", "app-own-1.scope");
        sb.expect(&bobs, by(PROXY));
        users_are_told(&system, alice);

        // What is enforced no user overrides.
        let rule = "rules:\n  - {match: app-open, drop: true, enforce: true}\n";
        let enforcing = ORIGINAL.replacen("rules:\n", rule, 1);
        system.run(&[
            "sh",
            "-c",
            "printf %s \"$1\" >\"$2.new\" && mv \"$2.new\" \"$2\"",
            "sh",
            &enforcing,
            CONFIG,
        ]);
        system.run(&["systemctl", "reload", AGENT]);
        let in_force = |group: &str| {
            let arguments = ["cgtproxy-agent", "--system", "explain", "--json", group];
            let output = system.output(&arguments);
            let said: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
            let said = &said["controlGroup"];
            said["inForce"] == true && said["target"] == "drop"
        };
        wait_until("the rule to be in force", || in_force("app-open-1.scope"));
        sb.expect_dropped(&goes);
        sb.expect(&by_rule, by("own"));
        // Nor by a name: a relay that sends for one user is that user's agent's business.
        let scope = format!("{}/app.slice/app-open-1.scope", alice.service());
        let named = format!("{scope}/cgtproxy-relay.service");
        let cgroup = system.cgroup(&named);
        wait_until("it to be known", || in_force(&named));
        sb.expect_dropped(&cgroup.app());

        // Without the user's agent the system's verdict holds.
        system.run_as(alice, &["systemctl", "--user", "stop", "cgtproxy-agent"]);
        sb.expect(&by_rule, by(PROXY));
        sb.expect_dropped(&goes);
    });
}

/// The commands about the machine's agent, with `--system`.
fn it_tells(system: &System, alice: &SystemUser) {
    let agent = |arguments: &[&str]| {
        let command = [&["cgtproxy-agent", "--system"], arguments].concat();
        system.run(&command)
    };
    let json = |arguments: &[&str]| -> Value {
        serde_json::from_str(&agent(&[arguments, &["--json"]].concat())).expect("JSON")
    };
    // What is ignored is said, and nothing else is amiss.
    let checked = agent(&["check"]);
    assert!(checked.contains(": 3 warnings\n"), "{checked}");
    let status = agent(&["status"]);
    assert!(
        status.contains("connected\n") && status.contains(CONFIG),
        "{status}"
    );
    let explained = agent(&["explain", PROXY_UNIT]);
    assert!(
        explained.contains("/system.slice/clash-meta.service\n  goes direct\n  Rule 1 matches it."),
        "{explained}"
    );
    let drop = format!(
        "{}/cgtproxy.slice/cgtproxy-drop.slice/run-drop.scope",
        alice.service()
    );
    let explained = json(&["explain", &drop]);
    assert_eq!(explained["controlGroup"]["target"], "drop", "{explained}");
    assert_eq!(explained["controlGroup"]["rule"], 3, "{explained}");
    let apps = json(&["apps"]);
    let list = apps["applications"].as_array().expect("a list");
    let parsec = list
        .iter()
        .find(|app| app["id"] == "com.parsecgaming.parsec");
    let target = parsec.map(|app| &app["controlGroup"]["target"]);
    assert_eq!(target, Some(&Value::from("direct")), "{apps}");
    // The sandbox has things to say about itself; none of them about this.
    let doctor = system.output(&["cgtproxy-agent", "--system", "doctor"]);
    let said = String::from_utf8_lossy(&doctor.stdout).into_owned();
    for of_users in [
        "--user",
        "service manager",
        "may not have",
        "sent through itself",
        "not running",
    ] {
        assert!(!said.contains(of_users), "{said}");
    }
    assert!(said.contains("1 proxy ready"), "{said}");
    // Without its own agent a user is told by 'doctor' and asked to start it; root's is not the user's.
    let output = system.output_as(alice, &["cgtproxy-agent", "--system", "status"]);
    assert!(!output.status.success(), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("only root may ask"), "{said}");
    let doctor = system.output_as(alice, &["cgtproxy-agent", "--system", "doctor"]);
    let said = String::from_utf8_lossy(&doctor.stdout).into_owned();
    assert!(
        said.contains("only root may ask it") && !said.contains("[agent-"),
        "{said}"
    );
}

/// What a user's own commands say of what the system policy decides.
fn users_are_told(system: &System, alice: &SystemUser) {
    let explain = |unit: &str| system.run_as(alice, &["cgtproxy-agent", "explain", unit]);
    let of_nobody = explain("app-gnome-firefox-7.scope");
    assert!(
        of_nobody.contains("is left to the system policy"),
        "{of_nobody}"
    );
    let status = system.run_as(alice, &["cgtproxy-agent", "status"]);
    let row = status
        .lines()
        .find(|line| line.ends_with("/app-gnome-firefox-7.scope"));
    assert!(
        row.is_some_and(|row| row.starts_with("system policy ")),
        "{status}"
    );
    // To root they come before what is not enforced.
    let seen = system.run(&["cgtproxy-agent", "--system", "explain", "app-own-1.scope"]);
    assert!(
        seen.contains("unless that user's own rules decide"),
        "{seen}"
    );
    let of_rule = explain("app-own-1.scope");
    assert!(
        of_rule.contains("goes through 'own'\n")
            && of_rule.contains("only where it has 'enforce: true'"),
        "{of_rule}"
    );
}

fn it_has_no_privilege(system: &System) {
    let pid = system.property(AGENT, "MainPID");
    let status = system.run(&["cat", &format!("/proc/{pid}/status")]);
    let is = |name: &str| {
        let line = status
            .lines()
            .find_map(|l| l.strip_prefix(name)?.strip_prefix(":\t"));
        line.unwrap_or_else(|| panic!("no {name}: {status}"))
            .to_owned()
    };
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(is(set), "0000000000000000", "{set}");
    }
    assert_eq!(
        (is("NoNewPrivs"), is("Seccomp")),
        ("1".to_owned(), "2".to_owned())
    );
    // No network, and no file but its own, what is private to it and what is no file of the machine's.
    let interfaces = system.run(&["cat", &format!("/proc/{pid}/net/dev")]);
    let names = interfaces.lines().filter_map(|line| line.split_once(':'));
    assert_eq!(Vec::from_iter(names.map(|(name, _)| name.trim())), ["lo"]);
    assert_confined(system, AGENT, &[]);
    let analysis = system.run(&["systemd-analyze", "security", "--no-pager", AGENT]);
    let verdict = analysis.lines().last().expect("a verdict");
    let exposure = verdict
        .split_whitespace()
        .find_map(|word| word.parse::<f64>().ok());
    assert!(
        exposure.is_some_and(|exposure| exposure <= 1.2),
        "{analysis}"
    );
}

#[test]
fn restarts_and_kills_of_the_machines_agent_leave_no_gap() {
    sandbox(|sb| {
        let (system, _proxy) = boot(sb);
        let alice = system.alice();
        let web = service(&system, "web");
        let dropped = scope(&system, alice, "cgtproxy-drop.slice", "run-drop.scope");
        system.wait_in_force(None);
        let traffic = Steady::start(sb, &web);
        let holds = || {
            traffic.assert_proxied(PROXY);
            traffic.assert_none_strayed(sb, &[PROXY]);
            sb.expect_dropped(&dropped);
        };
        holds();
        let pid = || system.property(AGENT, "MainPID");
        for disruption in [
            &["systemctl", "restart", AGENT][..],
            &["systemctl", "kill", "--signal=KILL", AGENT],
            &["systemctl", "restart", "cgtproxy-helper.service"],
        ] {
            eprintln!("{disruption:?}");
            let before = pid();
            system.run(disruption);
            holds();
            if disruption.contains(&AGENT) {
                wait_until("another process has taken its place", || {
                    let now = pid();
                    now != before && now != "0"
                });
            }
            system.wait_in_force(None);
            holds();
        }
        drop(traffic);
        system.run(&["systemctl", "stop", AGENT]);
        sb.expect(&web, direct);
        sb.expect(&dropped, direct);
        assert_eq!(
            system.run(&["systemctl", "--failed", "--plain", "--no-legend"]),
            ""
        );
    });
}
