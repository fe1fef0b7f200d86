//! Containers without root: control groups and processes of subordinate uids, below a user's service manager.

#![allow(clippy::expect_used, reason = "a panic is a failed test")]

use std::os::unix::fs::chown;

use cgtproxy_tests::agent::Agent;
use cgtproxy_tests::sandbox::{Cgroup, User, by, direct, sandbox};

/// One of the uids that newuidmap may have given to a container of the user's (subuid(5)).
const SUBORDINATE: u32 = 100_000;

/// Any control group may have one in it that a rule selects, so each has to have a verdict of its own.
const CONFIG: &str = r"
version: 1
start: closed
tproxies:
  mihomo: {port: 7890}
rules:
  - {match: /proxied\.service$, tproxy: mihomo}
  - {match: /dropped\.service$, drop: true}
";

/// A control group in a container, as its root has made it.
fn inside(user: &User, path: &str) -> Cgroup {
    let cgroup = user.cgroup(path);
    for entry in ["", "cgroup.procs", "cgroup.subtree_control"] {
        let path = cgroup.directory().join(entry);
        chown(path, Some(SUBORDINATE), Some(SUBORDINATE)).expect("root may give away");
    }
    cgroup
}

#[test]
fn control_groups_of_subordinate_uids_have_verdicts_of_their_own() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        // As of 'podman run --userns=keep-id --network=host --systemd=always', which distrobox uses.
        let scope = "user.slice/libpod-0123abcd.scope";
        let container = inside(&user, &format!("{scope}/container"));
        let service = |name| inside(&user, &format!("{scope}/container/system.slice/{name}"));
        let (proxied, dropped) = (service("proxied.service"), service("dropped.service"));
        let _agent = user.agent(CONFIG).start();
        let mut agent = Agent::of(&user);
        for (cgroup, target) in [
            (&container, "direct"),
            (&proxied, "mihomo"),
            (&dropped, "drop"),
        ] {
            agent.wait_for_verdict(cgroup, target);
        }
        let shell = container.app_as(SUBORDINATE);
        sb.expect(&shell, direct);
        sb.expect(&proxied.app_as(SUBORDINATE + 1), by("mihomo"));
        sb.expect_dropped(&dropped.app_as(SUBORDINATE + 2));
        // What the user runs inside, by its own uid.
        sb.expect(&container.app(), direct);
    });
}

#[test]
fn explain_does_not_guess_from_within_a_control_group_namespace() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let user = sb.user(1001);
        let _agent = user
            .agent("version: 1\nrules: [{unit: 'libpod-*.scope', drop: true}]\n")
            .start();
        let container = user.cgroup("user.slice/libpod-0123abcd.scope/container");
        Agent::of(&user).wait_for_verdict(&container, "drop");
        // As in a container: what is the user's own is the same, and the tree ends where the container's begins, or is
        // the machine's.
        let enter = format!("echo $$ >{}/cgroup.procs", container.directory().display());
        let explain = "exec setpriv --reuid 1001 --clear-groups env XDG_RUNTIME_DIR=/run/user/1001 \
                       /run/testbed/bin/cgtproxy-agent explain $$ 2>&1";
        for tree in [
            "umount -l /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup",
            "true",
        ] {
            let inside = format!("{tree} && {explain}");
            let script = format!("{enter}; unshare --cgroup --mount sh -c '{inside}' || true");
            let said = sb.run(&["sh", "-ec", &script]);
            assert!(said.contains("within a control group namespace"), "{said}");
            assert!(!said.contains("direct"), "{said}");
        }
    });
}
