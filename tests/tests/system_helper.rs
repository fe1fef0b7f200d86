//! A helper that can't be started, under a whole systemd.

use cgtproxy_tests::installed::{HELPER, Installed, SOCKET};
use cgtproxy_tests::sandbox::sandbox;
use cgtproxy_tests::wait::wait_until;

const CONFIG: &str = "{version: 1, rules: [{slice: app, drop: all}]}";
const BROKEN: &str = "/run/systemd/system/cgtproxy-helper.service.d/broken.conf";

/// Whoever drops something relies on the table, which systemd has removed when it gives up the socket. What may keep the
/// helper from being started at all is a new C library, or too little memory.
#[test]
fn a_helper_that_can_not_be_started_keeps_its_socket_and_all_that_is_in_force() {
    sandbox(|sb| {
        let installed = Installed::boot(sb, "", |_| {});
        let system = &installed.system;
        let alice = system.alice();
        installed.enable(alice, CONFIG);
        let app = system.desktop_app(alice, "browser");
        installed.wait_in_force(alice);
        sb.expect_all_dropped(&app);

        let script = format!(
            "mkdir -p $(dirname {BROKEN}) && \
             printf '[Service]\\nExecStart=\\nExecStart=/usr/bin/false\\n' > {BROKEN} && \
             systemctl daemon-reload && systemctl kill --signal=KILL {HELPER}"
        );
        system.run(&["sh", "-c", &script]);
        // Whoever waits at the socket has it started again, as the agent does.
        wait_until("it has been started in vain many times", || {
            let restarts = system.property(HELPER, "NRestarts");
            restarts.parse().is_ok_and(|restarts: u32| restarts >= 10)
        });
        assert_eq!(system.run(&["systemctl", "is-active", SOCKET]), "active\n");
        sb.expect_all_dropped(&app);
        // However fast the machine is: no more starts than the socket bears (systemd.socket(5); by default 20 in 2 s).
        assert_eq!(system.property(HELPER, "RestartUSec"), "100ms");
        assert_eq!(system.property(SOCKET, "TriggerLimitIntervalUSec"), "2s");
        assert_eq!(system.property(SOCKET, "TriggerLimitBurst"), "200");

        let script = format!("rm {BROKEN} && systemctl daemon-reload");
        system.run(&["sh", "-c", &script]);
        installed.wait_in_force(alice);
        sb.expect_all_dropped(&app);
    });
}
