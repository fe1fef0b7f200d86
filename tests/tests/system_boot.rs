//! The whole system proves itself, with a ruleset written by hand.

#![allow(clippy::expect_used, reason = "a panic is a failed test")]

use cgtproxy_tests::sandbox::{Outcome, direct, proxied, sandbox};
use cgtproxy_tests::system::System;
use cgtproxy_tests::wire::Transport;

#[test]
fn a_system_boots_with_two_users_and_their_service_managers() {
    sandbox(|sb| {
        let system = System::boot(sb);
        assert_eq!(
            system.run(&["systemctl", "is-system-running"]).trim(),
            "running"
        );
        assert_eq!(system.run(&["cat", "/proc/1/comm"]).trim(), "systemd");
        for user in [system.alice(), system.bob()] {
            let state = system.run_as(user, &["systemctl", "--user", "is-system-running"]);
            assert_eq!(state.trim(), "running");
            assert_eq!(
                system.run_as(user, &["id", "-u"]).trim(),
                user.uid().to_string()
            );
            let session = system.run_as(user, &["cat", "/proc/self/cgroup"]);
            assert!(session.contains("0::/user.slice/user-"), "{session}");
            assert!(
                system
                    .cgroup_directory(&user.service())
                    .join("app.slice")
                    .exists()
            );
        }
        // A unit of a user's, and what it says.
        let run = [
            "systemd-run",
            "--user",
            "--wait",
            "--quiet",
            "--unit=hello",
            "echo",
            "well met",
        ];
        system.run_as(system.alice(), &run);
        assert!(
            system
                .user_journal(system.alice(), "hello.service")
                .contains("well met")
        );
        // The host's sysctls are out of reach, the network's are the machine's own.
        assert!(
            !system
                .output(&["sh", "-c", "echo 1 > /proc/sys/kernel/sysrq"])
                .status
                .success()
        );
        system.run(&["sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"]);
    });
}

#[test]
fn applications_under_a_user_s_manager_are_told_apart_by_their_slice() {
    sandbox(|sb| {
        let system = System::boot(sb);
        let alice = system.alice();
        let by = |name: &str| system.app_in_slice(alice, &format!("{name}.slice"), name);
        let (plain, dropped, diverted) = (by("app"), by("dropped"), by("diverted"));
        let _proxy = sb.tproxy("clash").uid(alice.uid()).port(7890).start();
        let service = alice.service();
        let service = service.trim_start_matches('/');
        let rules = format!(
            "table inet cgtproxy {{
                 chain output {{
                     type route hook output priority mangle
                     ct direction reply return
                     socket cgroupv2 level 4 \"{service}/dropped.slice\" drop
                     socket cgroupv2 level 4 \"{service}/diverted.slice\" \
                         meta l4proto {{ tcp, udp }} meta mark set 1
                 }}
                 chain prerouting {{
                     type filter hook prerouting priority mangle
                     iif lo meta mark 1 meta l4proto {{ tcp, udp }} tproxy to :7890
                 }}
             }}"
        );
        // By a process of the system's: it is the system's cgroup root that levels count from.
        std::fs::write(system.root().join("run/rules.nft"), rules).expect("root may write");
        system.run(&["nft", "-f", "/run/rules.nft"]);
        for family in ["-4", "-6"] {
            let table = ["table", "100"];
            system.run(&[&["ip", family, "rule", "add", "fwmark", "1"], &table[..]].concat());
            let route = [
                "ip", family, "route", "add", "local", "default", "dev", "lo",
            ];
            system.run(&[&route, &table[..]].concat());
        }
        for to in sb.destinations() {
            for transport in [Transport::Tcp, Transport::Udp] {
                assert_eq!(diverted.ask(transport, to), proxied("clash", to));
                assert!(dropped.ask(transport, to).is_dropped());
            }
            assert!(dropped.ping(to.ip()).is_dropped());
            sb.assert_nothing_left_for(to.ip());
            assert_eq!(plain.tcp(to), direct(to));
            assert_eq!(plain.udp(to), direct(to));
            assert_ne!(plain.ping(to.ip()), Outcome::Silent);
        }
    });
}
