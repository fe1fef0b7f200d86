//! Users and groups, as the machine knows them.

use cgtproxy_tests::installed::{AGENT, HELPER, Installed};
use cgtproxy_tests::sandbox::{by, sandbox};
use cgtproxy_tests::system::{System, SystemUser};
use cgtproxy_tests::wait::wait_until;

use crate::{CONFIG, start_made_up, text};

/// Commands that change users and groups put other files in the place of those that the helper has seen.
#[test]
fn whoever_comes_to_be_in_a_denied_group_is_denied() {
    sandbox(|sb| {
        let installed = Installed::boot(sb, "", |_| ());
        let system = &installed.system;
        let (alice, bob) = (system.alice(), system.bob());
        system.run(&["groupadd", "unproxied"]);
        installed.configure_helper("deny: {groups: [unproxied]}");
        installed.enable(alice, CONFIG);
        installed.wait_in_force(alice);
        system.run(&["usermod", "--append", "--groups", "unproxied", "cgt-bob"]);
        system.write_config(bob, CONFIG);
        // It waits for the helper.
        let start = [
            "systemctl",
            "--user",
            "start",
            "--no-block",
            "cgtproxy-agent",
        ];
        system.run_as(bob, &start);
        wait_until_denied(system, bob);
        system.run(&["gpasswd", "--delete", "cgt-bob", "unproxied"]);
        installed.wait_in_force(bob);
    });
}

/// Waits until a user's agent has been told that it may not use the helper.
#[track_caller]
fn wait_until_denied(system: &System, user: &SystemUser) {
    wait_until("the user is told", || {
        let output = system.output_as(user, &["cgtproxy-agent", "status"]);
        text(&output.stdout).contains("the administrator does not allow this user")
    });
}

#[test]
fn users_and_groups_that_systemd_alone_knows_are_like_others() {
    sandbox(|sb| {
        let installed = Installed::boot(sb, "", |_| ());
        let system = &installed.system;
        let (alice, bob) = (system.alice(), system.bob());
        start_made_up(&installed);
        let uid = system.run(&["id", "-u", "made-up"]);
        let uid = uid.trim().parse().expect("a uid");
        let _mihomo = sb.tproxy("mihomo").uid(uid).port(7890).start();
        installed.enable(alice, CONFIG);
        sb.expect(&system.desktop_app(alice, "browser"), by("mihomo"));
        // A group that is in a file of systemd's, and who is in it.
        let script = "mkdir -p /run/userdb && cd /run/userdb &&
                      echo '{\"groupName\": \"unproxied\", \"gid\": 60321}' >unproxied.group &&
                      ln -s unproxied.group 60321.group && echo '{}' >cgt-bob:unproxied.membership";
        system.run(&["sh", "-c", script]);
        installed.configure_helper("deny: {groups: [unproxied]}");
        system.run(&["systemctl", "restart", HELPER]);
        installed.wait_in_force(alice);
        system.write_config(bob, CONFIG);
        let start = ["systemctl", "--user", "start", "--no-block", AGENT];
        system.run_as(bob, &start);
        wait_until_denied(system, bob);
        system.run(&["rm", "/run/userdb/cgt-bob:unproxied.membership"]);
        installed.wait_in_force(bob);
    });
}
