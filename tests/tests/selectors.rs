//! Rules that name applications, units and slices, in control groups that are named as launchers do it.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a panic is a failed test"
)]

use cgtproxy_tests::agent::Agent;
use cgtproxy_tests::installed::Installed;
use cgtproxy_tests::sandbox::{App, by, direct, sandbox};
use cgtproxy_tests::wait::wait_until;
use serde_json::Value;

const CONFIG: &str = r"
version: 1
tproxies:
  mihomo: {port: 7890}
rules:
  - {app: [org.telegram.desktop, 'google-*'], tproxy: mihomo}
  - {unit: tracker, drop: true}
  - {slice: background, drop: true}
";

#[test]
fn applications_are_found_whoever_started_them() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let alice = sb.user(1001);
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let _agent = alice.agent(CONFIG).start();
        let mut agent = Agent::of(&alice);
        let cases: [(&str, &str); 11] = [
            (
                "app.slice/app-flatpak-org.telegram.desktop-2268265498.scope",
                "mihomo",
            ),
            (
                "app.slice/app-gnome-org.telegram.desktop-4711.scope",
                "mihomo",
            ),
            (
                "app.slice/app-org.telegram.desktop@58166e96f84e44d3a9cf9b573621dc19.service",
                "mihomo",
            ),
            (
                "app.slice/app-DDE-org.telegram.desktop@0a1b2c.service",
                "mihomo",
            ),
            (
                "app.slice/app-org.telegram.desktop@autostart.service",
                "mihomo",
            ),
            (
                r"app.slice/app-google\x2dchrome@51f94eb073924ad1a30a08b2f1314900.service",
                "mihomo",
            ),
            ("app.slice/app-google-chrome-4242.scope", "mihomo"),
            ("app.slice/app-org.telegram.desktop2-1.scope", "direct"),
            // Not a unit, but what a unit has made: it is not what it calls itself.
            (
                "app.slice/own.service/app-org.telegram.desktop-1.scope",
                "direct",
            ),
            ("app.slice/tracker.service", "drop"),
            ("background.slice/indexer.service", "drop"),
        ];
        let groups = cases.map(|(path, target)| (alice.cgroup(path), target));
        let apps: Vec<(App, &str)> = groups
            .iter()
            .map(|(group, target)| (group.app(), *target))
            .collect();
        for (group, target) in &groups {
            agent.wait_for_verdict(group, target);
        }
        for (app, target) in &apps {
            match *target {
                "mihomo" => sb.expect(app, by("mihomo")),
                "drop" => sb.expect_dropped(app),
                _ => sb.expect(app, direct),
            }
        }
        // What there is, with the processes that the kernel says are there.
        let output = alice.run("cgtproxy-agent", &["apps", "--json"]);
        let listed: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let applications = listed["applications"].as_array().expect("a list");
        let of = |id: &str| applications.iter().filter(|a| a["id"] == id).count();
        assert_eq!(
            (of("org.telegram.desktop"), of("google-chrome")),
            (5, 1),
            "{listed}"
        );
        for application in applications {
            assert_eq!(
                application["executables"][0], "cgtproxy-testapp",
                "{listed}"
            );
        }
    });
}

#[test]
fn an_application_that_systemd_started_is_proxied() {
    sandbox(|sb| {
        let installed = Installed::boot(sb, "", |_| ());
        let system = &installed.system;
        let alice = system.alice();
        let _mihomo = sb.tproxy("mihomo").uid(alice.uid()).port(7890).start();
        installed.enable(alice, CONFIG);
        let start = |unit: &str, more: &[&str]| {
            let unit = format!("--unit={unit}");
            let by = [
                "systemd-run",
                "--user",
                "--quiet",
                "--collect",
                "--slice=app.slice",
                &unit,
            ];
            system.app_as(alice, &[&by[..], more].concat())
        };
        let service = ["--pipe", "--wait"];
        let telegram = start("app-org.telegram.desktop@7a1c.service", &service);
        let scope = start("app-flatpak-org.telegram.desktop-77.scope", &["--scope"]);
        let chrome = start(r"app-google\x2dchrome@1.service", &service);
        let other = start("app-org.gnome.Evince@7a1c.service", &service);
        let tracker = start("tracker.service", &service);
        let settled = |unit: &str, target: &str| {
            wait_until(unit, || {
                let said = system.run_as(alice, &["cgtproxy-agent", "explain", "--json", unit]);
                let said: Value = serde_json::from_str(&said).expect("JSON");
                let group = &said["controlGroup"];
                group["target"] == target && group["inForce"] == true
            });
        };
        settled("app-org.telegram.desktop@7a1c.service", "mihomo");
        settled("app-flatpak-org.telegram.desktop-77.scope", "mihomo");
        settled(r"app-google\x2dchrome@1.service", "mihomo");
        settled("tracker.service", "drop");
        for app in [&telegram, &scope, &chrome] {
            sb.expect(app, by("mihomo"));
        }
        sb.expect(&other, direct);
        sb.expect_dropped(&tracker);
        // A login session is beside the user's service manager.
        let shell = system.app_as(alice, &[]);
        let said = system.run_as(alice, &["cgtproxy-agent", "apps"]);
        assert!(
            said.contains("org.telegram.desktop  mihomo  rule 1"),
            "{said}"
        );
        assert!(
            said.contains("session-testbed.scope: cgtproxy-testapp\n"),
            "{said}"
        );
        sb.expect(&shell, direct);
    });
}
