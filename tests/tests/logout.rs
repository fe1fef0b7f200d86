//! The end of a session: rules hold for as long as anything that they are about is there.

#![allow(clippy::expect_used, reason = "a panic is a failed test")]

use cgtproxy_tests::installed::{AGENT, Installed};
use cgtproxy_tests::sandbox::{App, by, sandbox};
use cgtproxy_tests::steady::Steady;
use cgtproxy_tests::system::SystemUser;
use cgtproxy_tests::wait::wait_until;

const CONFIG: &str = r"
version: 1
tproxies: {mihomo: {port: 7890}}
rules:
  - {unit: 'app-tracker.*', drop: true}
  - {match: '/app\.slice', tproxy: mihomo}
";

/// Logging out stops the service manager, which asks everything to end at once: what takes its time to say goodbye says
/// it as the rules have it.
#[test]
fn applications_that_outlive_their_session_keep_their_rules() {
    sandbox(|sb| {
        let installed = Installed::boot(sb, "grace-seconds: 1", |_| ());
        let system = &installed.system;
        let alice = system.alice();
        let _proxy = sb.tproxy("mihomo").uid(alice.uid()).port(7890).start();
        installed.enable(alice, CONFIG);
        // Asked to end, it goes on.
        let stubborn = |user: &SystemUser, name: &str| -> App {
            let unit = format!("--unit=app-{name}");
            let command = ["systemd-run", "--user", "--quiet", "--collect", "--pipe"];
            let wait = [
                "--wait",
                "--slice=app.slice",
                "--property=KillSignal=SIGCONT",
            ];
            system.app_as(user, &[&command[..], &wait, &[&unit]].concat())
        };
        let browser = stubborn(alice, "browser");
        let tracker = stubborn(alice, "tracker");
        let other = ["systemd-run", "--user", "--unit=other", "sleep", "infinity"];
        system.run_as(alice, &other);
        installed.wait_in_force(alice);
        let traffic = Steady::start(sb, &browser);
        traffic.assert_proxied("mihomo");
        installed.expect_dropped(&tracker);
        let main = |unit: &str| system.user_property(alice, unit, "MainPID");
        let (other, agent) = (main("other"), main(AGENT));
        let runs = |pid: &str| {
            system
                .output(&["test", "-d", &format!("/proc/{pid}")])
                .status
                .success()
        };
        let manager = format!("user@{}.service", alice.uid());
        system.run(&["systemctl", "stop", "--no-block", &manager]);
        wait_until("services of hers end", || !runs(&other));
        traffic.assert_proxied("mihomo");
        installed.expect_dropped(&tracker);
        installed.expect(&browser, by("mihomo"));
        traffic.assert_none_strayed(sb, &["mihomo"]);
        assert!(runs(&agent), "the agent ends with the manager");
        drop((traffic, browser, tracker));
        wait_until("the manager has ended", || {
            system.property(&manager, "ActiveState") == "inactive"
        });
        wait_until("nothing is left of hers", || {
            sb.objects_of(alice.uid()).is_empty()
        });
        assert!(!runs(&agent));
    });
}
