//! What packages do to a system.

use std::collections::BTreeSet;
use std::path::Path;

use cgtproxy_tests::package::build;
use cgtproxy_tests::sandbox::{Sandbox, proxied, sandbox};
use cgtproxy_tests::system::{System, SystemUser};
use cgtproxy_tests::wait::wait_until;

use crate::{OUT, lines};

const CONFIG: &str = r"
version: 1
tproxies:
  mihomo: {port: 7890}
rules:
  - {match: '/app\.slice$', tproxy: mihomo}
";

const SOCKET: &str = "cgtproxy-helper.socket";

const AGENT: &str = "cgtproxy-agent.service";

/// A system in which a package can be installed as on somebody's machine.
fn boot(sb: &Sandbox, package: &Path) -> System {
    let builder = System::builder(sb).install(|root| {
        std::fs::copy(package, root.join("var/tmp/package")).unwrap();
        // Containers' images have services not started by packages.
        let _ = std::fs::remove_file(root.join("usr/sbin/policy-rc.d"));
    });
    builder.boot()
}

/// What there is that a package may leave behind.
fn snapshot(system: &System) -> BTreeSet<String> {
    let found = system.run(&[
        "find", "/etc", "/usr", "/var", "/run", "/opt", "/srv", "-xdev",
    ]);
    let mut found = lines(&found);
    // The package managers' and systemd's own books, and copies of /etc/passwd and the like, in which the
    // helper's user stays.
    let books = [
        "/var/lib/dpkg",
        "/var/lib/rpm",
        "/var/cache",
        "/var/log",
        "/run/log",
        "/run/systemd",
    ];
    found.retain(|path| !books.iter().any(|book| path.starts_with(book)));
    // What is below the overlay shows through, where rpmbuild may be at work for another test at this moment.
    found.retain(|path| !path.starts_with("/var/tmp/rpm-tmp."));
    found.retain(|path| {
        !path.starts_with("/etc/") || !(path.ends_with('-') || path.ends_with(".lock"))
    });
    found
}

/// What users and the kernel see of an installed package.
fn expect_working(sb: &Sandbox, system: &System, alice: &SystemUser) {
    assert_eq!(system.property(SOCKET, "ActiveState"), "active");
    assert_eq!(
        system.run(&["systemctl", "is-enabled", SOCKET]).trim(),
        "enabled"
    );
    let mode = system.run(&["stat", "-c", "%a", "/run/cgtproxy/helper.sock"]);
    assert_eq!(mode.trim(), "666");
    system.write_config(alice, CONFIG);
    system.run_as(alice, &["systemctl", "--user", "daemon-reload"]);
    system.enable_agent(alice);
    let app = system.app_as(alice, &["cgtproxy-exec", "proxy"]);
    let dropped = system.app_as(alice, &["cgtproxy-exec", "drop"]);
    for to in sb.destinations() {
        assert_eq!(app.tcp(to), proxied("mihomo", to));
        assert!(dropped.udp(to).is_dropped());
    }
    assert!(sb.has_table());
}

fn expect_nothing_in_the_kernel(sb: &Sandbox) {
    assert!(!sb.has_table());
    for family in [4, 6] {
        assert_eq!(sb.mark_rules(family), []);
    }
}

#[test]
fn the_debian_package_installs_enabled_upgrades_and_leaves_nothing_when_purged() {
    sandbox(|sb| {
        let package = build("deb", OUT, &[]);
        let system = boot(sb, &package);
        let alice = system.alice();
        let _mihomo = sb.tproxy("mihomo").uid(alice.uid()).port(7890).start();
        // The original's, which nobody has taken away yet.
        let original = "mkdir -p /etc/cgtproxy && echo 'version: 1' >/etc/cgtproxy/config.yaml";
        system.run(&["sh", "-c", original]);
        let before = snapshot(&system);
        system.run(&["dpkg", "--install", "/var/tmp/package"]);
        expect_working(sb, &system, alice);
        let installed = system.run(&["dpkg", "--listfiles", "cgtproxy"]);
        for path in lines(&installed) {
            system.run(&["test", "-e", &path]);
        }
        let configured = "echo 'grace-seconds: 4' >/etc/cgtproxy/helper.yaml";
        system.run(&["sh", "-c", configured]);

        // What nobody has chosen stays as it is where presets are applied, which on Debian enable everything else.
        for (of, unit) in [
            ("--system", "cgtproxy-agent-system.service"),
            ("--global", AGENT),
            ("--global", "cgtproxy-relay.socket"),
        ] {
            system.run(&["systemctl", of, "preset", unit]);
            let enabled = system.output(&["systemctl", of, "is-enabled", unit]);
            let enabled = String::from_utf8_lossy(&enabled.stdout).into_owned();
            assert_eq!(enabled.trim(), "disabled", "{unit}");
        }
        // The unit that alice's manager has read is older than what an upgrade brings.
        let unit = "/usr/lib/systemd/user/cgtproxy-agent.service";
        system.run(&["touch", "--date=@1", unit]);
        system.run_as(alice, &["systemctl", "--user", "daemon-reload"]);

        // An upgrade, to the same version: another helper takes over, and a choice stays one.
        let helper = || system.property("cgtproxy-helper.service", "MainPID");
        let old = helper();
        let open: Vec<_> = {
            let app = system.app_as(alice, &["cgtproxy-exec", "proxy"]);
            system.run(&["dpkg", "--install", "/var/tmp/package"]);
            sb.destinations()
                .map(|to| (app.tcp(to), proxied("mihomo", to)))
                .into()
        };
        for (is, should) in open {
            assert_eq!(is, should);
        }
        wait_until("another helper runs", || helper() != old && helper() != "0");
        wait_until("alice's manager has read the new unit", || {
            system.user_property(alice, AGENT, "NeedDaemonReload") == "no"
        });
        system.run(&["systemctl", "disable", SOCKET]);
        system.run(&["dpkg", "--install", "/var/tmp/package"]);
        let enabled = system.output(&["systemctl", "is-enabled", SOCKET]);
        assert_eq!(String::from_utf8_lossy(&enabled.stdout).trim(), "disabled");
        system.run(&["systemctl", "enable", SOCKET]);

        system.run(&["dpkg", "--remove", "cgtproxy"]);
        expect_nothing_in_the_kernel(sb);
        assert_eq!(system.property(SOCKET, "ActiveState"), "inactive");
        let agent = system.user_property(alice, AGENT, "ActiveState");
        assert_eq!(agent, "inactive");
        system.run(&["test", "-e", "/etc/cgtproxy/helper.yaml"]);
        for program in ["/usr/bin/cgtproxy-agent", "/usr/libexec/cgtproxy-helper"] {
            system.run(&["test", "!", "-e", program]);
        }

        system.run(&["dpkg", "--purge", "cgtproxy"]);
        let after = snapshot(&system);
        let left: Vec<_> = after.difference(&before).collect();
        assert_eq!(left, Vec::<&String>::new());
        let lost: Vec<_> = before.difference(&after).collect();
        assert_eq!(lost, Vec::<&String>::new());
        assert_eq!(
            system.run(&["systemctl", "--failed", "--plain", "--no-legend"]),
            ""
        );
        // The one thing that stays.
        let user = system.run(&["getent", "passwd", "cgtproxy-helper"]);
        assert!(user.contains("nologin"), "{user}");
    });
}

#[test]
fn the_rpm_package_installs_works_and_leaves_nothing_when_removed() {
    sandbox(|sb| {
        let package = build("rpm", OUT, &[]);
        let system = boot(sb, &package);
        let alice = system.alice();
        let _mihomo = sb.tproxy("mihomo").uid(alice.uid()).port(7890).start();
        let before = snapshot(&system);
        // What it needs is installed by another package manager here.
        system.run(&["rpm", "--install", "--nodeps", "/var/tmp/package"]);
        system.run(&["systemctl", "enable", "--now", SOCKET]);
        expect_working(sb, &system, alice);
        let for_all = ["cgtproxy-agent.service", "cgtproxy-relay.socket"];
        system.run(&[&["systemctl", "--global", "enable"], &for_all[..]].concat());
        system.run(&["rpm", "--erase", "cgtproxy"]);
        let agent = system.user_property(alice, AGENT, "ActiveState");
        assert_eq!(agent, "inactive");
        expect_nothing_in_the_kernel(sb);
        let after = snapshot(&system);
        let left: Vec<_> = after.difference(&before).collect();
        assert_eq!(left, Vec::<&String>::new());
        assert_eq!(
            system.run(&["systemctl", "--failed", "--plain", "--no-legend"]),
            ""
        );
    });
}

/// What a user may write into a unit of theirs, so that stopping it takes for ever.
const NEVER_STOPS: &str = r"
[Unit]
JobRunningTimeoutSec=infinity
[Service]
ExecStop=/bin/sleep infinity
TimeoutStopSec=infinity
";

#[test]
fn users_do_not_keep_the_package_from_being_removed() {
    sandbox(|sb| {
        let package = build("deb", OUT, &[]);
        let system = boot(sb, &package);
        system.run(&["dpkg", "--install", "/var/tmp/package"]);
        let script = "d=~/.config/systemd/user/cgtproxy-agent.service.d && mkdir -p $d && printf %s \"$1\" >$d/own.conf";
        let alice = system.alice();
        system.run_as(alice, &["sh", "-c", script, "sh", NEVER_STOPS]);
        for user in [alice, system.bob()] {
            system.run_as(user, &["systemctl", "--user", "daemon-reload"]);
            let start = ["systemctl", "--user", "start", "cgtproxy-agent"];
            system.run_as(user, &start);
        }
        assert!(sb.has_table());
        // The other one's manager does not answer at all.
        let manager = format!("user@{}.service", system.bob().uid());
        let stop = ["--kill-whom=main", "--signal=STOP", &manager];
        system.run(&[&["systemctl", "kill"], &stop[..]].concat());
        // It ends by itself. What would not end is ended here, so that the test does.
        system.run(&["timeout", "120", "dpkg", "--remove", "cgtproxy"]);
        expect_nothing_in_the_kernel(sb);
        for unit in [SOCKET, "cgtproxy-helper.service"] {
            assert_eq!(system.property(unit, "ActiveState"), "inactive");
        }
    });
}

/// The original's daemon goes on working until somebody ends it.
#[test]
fn packages_start_nothing_beside_the_original_and_say_so() {
    sandbox(|sb| {
        let system = boot(sb, &build("deb", OUT, &[]));
        let rpm = build("rpm", OUT, &[]);
        std::fs::copy(rpm, system.root().join("var/tmp/rpm")).unwrap();
        let unit = "[Service]\nExecStart=/bin/sleep infinity\n";
        let file = system.root().join("etc/systemd/system/cgtproxy.service");
        std::fs::write(file, unit).unwrap();
        system.run(&["systemctl", "daemon-reload"]);
        system.run(&["systemctl", "start", "cgtproxy.service"]);
        let install = || system.run(&["dpkg", "--install", "/var/tmp/package"]);
        let is_said = |said: &str| {
            assert!(said.contains("cgtproxy.service, the daemon"), "{said}");
            assert!(
                said.contains("/usr/share/doc/cgtproxy/docs/moving.md"),
                "{said}"
            );
        };
        is_said(&install());
        assert_eq!(system.property(SOCKET, "ActiveState"), "inactive");
        system.run(&["systemctl", "is-enabled", SOCKET]);
        system.run(&["systemctl", "stop", "cgtproxy.service"]);
        let said = install();
        assert!(!said.contains("the daemon"), "{said}");
        assert_eq!(system.property(SOCKET, "ActiveState"), "active");

        system.run(&["dpkg", "--purge", "cgtproxy"]);
        system.run(&["systemctl", "start", "cgtproxy.service"]);
        is_said(&system.run(&["rpm", "--install", "--nodeps", "/var/tmp/rpm"]));
    });
}
