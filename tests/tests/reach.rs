//! What an ordinary user can reach of a helper and of other users' agents on a machine where they run: one socket.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a panic is a failed test"
)]

use cgtproxy_tests::installed::{AGENT, HELPER, Installed};
use cgtproxy_tests::sandbox::{by, sandbox};
use cgtproxy_tests::session::SOCKET;
use serde_json::{Value, json};

const CONFIG: &str = r"
version: 1
tproxies:
  mihomo: {port: 7890}
rules:
  - {match: '/app\.slice$', tproxy: mihomo}
";

/// What opens something for each purpose, or sends, and fails if that is refused.
const READ: &str = ": <\"$1\"";
const WRITE: &str = ": >>\"$1\"";
const CREATE: &str = "mkdir \"$1/mine\"";
/// As the test application does, which leaves when it has said nothing and the other side has hung up.
const CONNECT: &str =
    "/usr/local/lib/cgtproxy-testbed/cgtproxy-testapp pipe \"$1\" </dev/null >/dev/null";
const LIST: &str = "ls \"$1/\" >/dev/null";

#[test]
fn an_ordinary_user_reaches_the_one_socket_and_nothing_else() {
    sandbox(|sb| {
        let installed = Installed::boot(sb, "", |_| ());
        let (system, alice, bob) = (
            &installed.system,
            installed.system.alice(),
            installed.system.bob(),
        );
        let _mihomo = sb.tproxy("mihomo").uid(alice.uid()).port(7890).start();
        installed.enable(alice, CONFIG);
        installed.wait_in_force(alice);
        let browser = installed.system.desktop_app(alice, "browser");
        installed.expect(&browser, by("mihomo"));

        let may = |script: &str, path: &str| {
            let output = system.output_as(bob, &["sh", "-c", script, "sh", path]);
            output.status.success()
        };
        // Whether the question is one that can be answered otherwise.
        let root_may = |script: &str, path: &str| {
            let output = system.output(&["sh", "-c", script, "sh", path]);
            output.status.success()
        };

        // Everything there is, as root sees it.
        let listed = system.run(&[
            "sh",
            "-c",
            "find /run -path '*cgtproxy*' -printf '%y %p\\n'",
        ]);
        let entries: Vec<(&str, &str)> = listed
            .lines()
            .filter_map(|line| line.split_once(' '))
            .collect();
        let of_alice = |name: &str| format!("/run/user/{}/{name}", alice.uid());
        let sockets = [
            SOCKET,
            &of_alice("cgtproxy/agent.sock"),
            &of_alice("cgtproxy-relay.sock"),
        ];
        for socket in sockets {
            assert!(entries.contains(&("s", socket)), "{socket}: {listed}");
        }
        for (kind, path) in entries {
            match kind {
                "d" => assert!(!may(CREATE, path), "{path}: a directory of one's own"),
                // open(2) of a socket fails for everybody.
                "s" => {
                    assert!(root_may(CONNECT, path), "{path}");
                    assert_eq!(may(CONNECT, path), path == SOCKET, "{path}");
                }
                _ => {
                    assert!(!may(READ, path), "{path} can be read");
                    assert!(!may(WRITE, path), "{path} can be written");
                }
            }
        }

        let helper = system.property(HELPER, "MainPID");
        let agent = system.user_property(alice, AGENT, "MainPID");
        for pid in [helper.trim(), agent.trim()] {
            for directory in ["fd", "fdinfo", "map_files", "cwd", "root"] {
                let path = format!("/proc/{pid}/{directory}");
                assert!(root_may(LIST, &path), "{path}");
                assert!(!may(LIST, &path), "{path} can be listed");
            }
            for file in ["maps", "environ", "mem", "auxv", "stack"] {
                let path = format!("/proc/{pid}/{file}");
                assert!(!may(READ, &path), "{path} can be opened");
            }
            for signal in ["CONT", "STOP", "KILL"] {
                assert!(!may(&format!("kill -{signal} \"$1\""), pid), "{signal}");
            }
        }
        // The snapshot is in the service manager's hands.
        assert!(!may(LIST, "/proc/1/fd"));

        // The helper's netlink sockets, which everybody may know the ports of.
        let inodes = system.run(&["sh", "-c", &format!("ls -l /proc/{}/fd", helper.trim())]);
        let table = system.run_as(bob, &["cat", "/proc/net/netlink"]);
        let rows = table
            .lines()
            .map(|row| row.split_whitespace().collect::<Vec<_>>());
        // sk Eth Pid Groups Rmem Wmem Dump Locks Drops Inode
        let ports: Vec<(&str, &str)> = rows
            .filter(|row| row.len() > 9 && inodes.contains(&format!("socket:[{}]", row[9])))
            .map(|row| match row[1] {
                "0" => ("route", row[2]),
                "12" => ("netfilter", row[2]),
                other => panic!("a netlink socket of protocol {other}"),
            })
            .collect();
        assert!(ports.len() >= 2, "{inodes}{table}");
        for (protocol, port) in ports {
            let send = [
                "/usr/local/lib/cgtproxy-testbed/cgtproxy-testapp",
                "netlink",
                protocol,
                port,
            ];
            assert_eq!(system.run_as(bob, &send).trim(), "EPERM");
            // As root of a namespace that bob made.
            let inside = ["unshare", "--user", "--map-root-user"];
            let inside = [&inside[..], &send].concat();
            assert_eq!(system.run_as(bob, &inside).trim(), "EPERM");
        }

        // What the helper tells bob is about bob, and alice's agent tells bob nothing.
        let call = r#"printf '{"method":"org.cgtproxy.Helper.GetStatus"}\0' | "$1" pipe "$2""#;
        let testapp = "/usr/local/lib/cgtproxy-testbed/cgtproxy-testapp";
        let ask = |socket: &str| system.output_as(bob, &["sh", "-c", call, "sh", testapp, socket]);
        let said = ask(SOCKET).stdout;
        let reply: Value =
            serde_json::from_slice(said.trim_ascii_end().strip_suffix(b"\0").unwrap_or(&said))
                .expect("a reply");
        assert_eq!(reply["parameters"]["session"], "none", "{reply}");
        assert!(!reply.to_string().contains("mihomo"), "{reply}");
        let of_alice = format!("/run/user/{}/cgtproxy/agent.sock", alice.uid());
        let refused = ask(&of_alice);
        let why = String::from_utf8_lossy(&refused.stderr);
        assert!(why.contains("Permission denied"), "{why}");
        assert_eq!(refused.stdout, b"");

        // All is as it was.
        installed.expect(&browser, by("mihomo"));
    });
}

/// Whatever becomes of the permissions of directories and sockets.
#[test]
fn an_agent_and_a_relay_serve_their_user_and_root_alone() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let users = [1001, 1002, 0].map(|uid| sb.user(uid));
        let _relay = users[0].relay().start();
        let _agent = users[0].agent(CONFIG).start();
        sb.run(&["chmod", "-R", "a+rwX", "/run/user/1001"]);
        for (interface, path) in [
            ("org.cgtproxy.Agent", "cgtproxy/agent.sock"),
            ("org.cgtproxy.Relay", "cgtproxy-relay.sock"),
        ] {
            let call = json!({ "method": format!("{interface}.GetStatus"), "parameters": {} });
            for (user, served) in users.iter().zip([true, false, true]) {
                let mut varlink = user.varlink(format!("/run/user/1001/{path}"));
                varlink.send(&call);
                let reply = varlink.receive();
                let answered = reply.is_some_and(|reply| reply.get("error").is_none());
                assert_eq!(answered, served, "{interface}: {}", user.uid());
            }
        }
    });
}
