//! The relay as systemd runs it, in a whole system.

#![allow(clippy::expect_used, reason = "a panic is a failed test")]

use std::net::SocketAddr;

use cgtproxy_tests::installed::Installed;
use cgtproxy_tests::proxies::tinyproxy;
use cgtproxy_tests::relayed::came_from_the_internet;
use cgtproxy_tests::sandbox::{App, INTERNET_V4, Outcome, Sandbox, direct, sandbox};
use cgtproxy_tests::steady::Steady;
use cgtproxy_tests::system::SystemUser;
use cgtproxy_tests::wait::{wait_for, wait_until};
use cgtproxy_tests::wire::Transport::{Tcp, Udp};

const RELAY: &str = "cgtproxy-relay.service";

/// What `systemd-analyze security` may find at most, in tenths: a user's manager can't give a file system of its own.
const EXPOSURE: u32 = 65;

/// Everything, the relay's own packets too if that were possible.
const CONFIG: &str = "version: 1\nproxies: {own: {upstream: 'socks5://192.0.2.2:1080'}}\n\
                      rules: [{match: /, proxy: own}]\n";

/// Insists that whoever is asked is asked by the proxy, in the end, and by nobody else.
#[track_caller]
fn expect_proxied(sb: &Sandbox, app: &App) {
    for to in sb.destinations() {
        for transport in [Tcp, Udp] {
            // How long relay and proxy take, the bed can't know.
            wait_for("an answer through the proxy", || {
                let outcome = app.ask(transport, to);
                came_from_the_internet(&outcome, to).then_some(())
            });
        }
        sb.assert_nothing_left_for(to.ip());
    }
}

fn relay_is(installed: &Installed<'_>, user: &SystemUser, state: &str) -> bool {
    installed.system.user_property(user, RELAY, "ActiveState") == state
}

#[test]
fn without_a_configuration_the_environments_proxy_is_there() {
    sandbox(|sb| {
        let _server = sb.socks_server(SocketAddr::new(INTERNET_V4, 1080));
        let installed = Installed::boot(sb, "", |_| {});
        let system = &installed.system;
        let (alice, bob) = (system.alice(), system.bob());
        let variable = "ALL_PROXY=socks5://192.0.2.2:1080";
        system.run_as(alice, &["systemctl", "--user", "set-environment", variable]);
        for user in [alice, bob] {
            system.enable_agent(user);
        }
        expect_proxied(sb, &system.app_as(alice, &["cgtproxy-exec", "proxy"]));
        let app = system.app_as(alice, &["cgtproxy-exec", "direct"]);
        for to in sb.destinations() {
            assert_eq!(app.tcp(to), direct(to));
        }
        assert!(relay_is(&installed, alice, "active"));
        // Whose environment names none has no target of that name, and no relay.
        let output = system.output_as(bob, &["cgtproxy-exec", "proxy", "true"]);
        assert!(!output.status.success());
        assert!(relay_is(&installed, bob, "inactive"));
    });
}

#[test]
fn the_environments_http_proxy_is_used_too() {
    const PAGE: &str = "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhello\n";
    sandbox(|sb| {
        let _server = tinyproxy(sb, "");
        let _pages = sb.listener(8000, PAGE);
        let installed = Installed::boot(sb, "", |_| {});
        let system = &installed.system;
        let (alice, bob) = (system.alice(), system.bob());
        // As people write them. Nobody is at the other one.
        let environments = [
            (alice, &["http_proxy=192.0.2.2:3128"][..]),
            (
                bob,
                &[
                    "http_proxy=http://192.0.2.2:1",
                    "HTTPS_PROXY=http://192.0.2.2:3128/",
                ],
            ),
        ];
        for (user, variables) in environments {
            let set = ["systemctl", "--user", "set-environment"];
            system.run_as(user, &[&set, variables].concat());
            system.enable_agent(user);
            for to in sb.destinations() {
                let page = format!("http://{}/", SocketAddr::new(to.ip(), 8000));
                // To curl itself it is a page like any other.
                let curl = ["curl", "--silent", "--show-error", "--noproxy", "*", &page];
                let by = ["cgtproxy-exec", "proxy"];
                assert_eq!(system.run_as(user, &[&by[..], &curl].concat()), "hello\n");
                sb.assert_nothing_left_for(to.ip());
                // Without, it goes where it went.
                assert_eq!(system.run_as(user, &curl), "hello\n");
                assert!(!sb.deliveries(to.ip()).is_empty());
            }
            let app = system.app_as(user, &["cgtproxy-exec", "proxy"]);
            for to in sb.destinations() {
                assert_eq!(app.udp(to), Outcome::Forbidden, "no HTTP proxy carries UDP");
                sb.assert_nothing_left_for(to.ip());
            }
        }
    });
}

#[test]
fn the_relay_runs_when_it_is_needed_and_nothing_leaves_when_it_is_killed() {
    sandbox(|sb| {
        let _server = sb.socks_server(SocketAddr::new(INTERNET_V4, 1080));
        let installed = Installed::boot(sb, "", |_| {});
        let system = &installed.system;
        let alice = system.alice();
        installed.enable(alice, "version: 1\n");
        installed.wait_in_force(alice);
        assert!(relay_is(&installed, alice, "inactive"), "nobody needs it");
        installed.enable(alice, CONFIG);
        wait_until("the relay to run", || relay_is(&installed, alice, "active"));
        let group = system.user_property(alice, RELAY, "ControlGroup");
        assert!(group.ends_with("/session.slice/cgtproxy-relay.service"));
        let app = system.desktop_app(alice, "a");
        expect_proxied(sb, &app);
        // By the proxy's name.
        expect_proxied(sb, &system.app_as(alice, &["cgtproxy-exec", "own"]));
        let steady = Steady::start(sb, &app);
        let pid = || system.user_property(alice, RELAY, "MainPID");
        // More often than systemd lets a unit start by default, of which its socket would fail.
        for signal in ["KILL", "KILL", "KILL", "KILL", "KILL", "KILL", "TERM"] {
            let before = pid();
            let kill = format!("--signal={signal}");
            system.run_as(alice, &["systemctl", "--user", "kill", &kill, RELAY]);
            // It is started by its socket, for the agent.
            wait_until("another relay", || {
                let now = pid();
                now != before && now != "0"
            });
            expect_proxied(sb, &app);
            steady.assert_nothing_left(sb);
        }
        let analyze = ["systemd-analyze", "--user", "security", "--no-pager", RELAY];
        let output = system.output_as(alice, &analyze);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let level = said
            .lines()
            .find(|line| line.contains("Overall exposure level"))
            .and_then(|line| line.rsplit_once(": "))
            .and_then(|(_, rest)| rest.split_whitespace().next())
            .and_then(|number| number.replace('.', "").parse::<u32>().ok());
        assert!(level.is_some_and(|level| level <= EXPOSURE), "{said}");
    });
}

/// The unit lets the relay ask. Where a user namespace has no uids but the user's own, the kernel says `nobody` of all others.
#[test]
fn the_confined_relay_knows_whose_a_proxy_on_this_machine_is() {
    const HERE: &str = "version: 1\nproxies: {own: {upstream: 'socks5://127.0.0.1:1080'}}\n\
                        rules: [{unit: socks, direct: true}, {slice: app, proxy: own}]\n";
    const CONFINE: &str = "d=~/.config/systemd/user/cgtproxy-relay.service.d; mkdir -p $d
                           printf '[Service]\\n%s\\n' \"$@\" > $d/more.conf
                           systemctl --user daemon-reload; systemctl --user restart cgtproxy-relay";
    sandbox(|sb| {
        let installed = Installed::boot(sb, "", |_| {});
        let system = &installed.system;
        let (alice, bob) = (system.alice(), system.bob());
        installed.enable(alice, HERE);
        installed.wait_in_force(alice);
        let app = system.desktop_app(alice, "a");
        let run = ["systemd-run", "--user", "--quiet", "--unit=socks"];
        let socks = ["microsocks", "-i", "127.0.0.1", "-p", "1080"];
        let status = || {
            let output = system.output_as(alice, &["cgtproxy-agent", "status"]);
            String::from_utf8_lossy(&output.stdout).into_owned()
        };
        let confine = |lines: &[&str]| {
            let argv = [&["sh", "-euc", CONFINE, "sh"], lines].concat();
            system.run_as(alice, &argv);
        };
        let number = bob.uid().to_string();
        for who in [&*number, "65534"] {
            if who == "65534" {
                confine(&["PrivateUsers=yes"]);
            }
            for user in [bob, alice] {
                system.run_as(user, &[&run[..], &socks].concat());
                wait_until("what becomes of a connection to be known", || {
                    let [to, _] = sb.destinations();
                    let outcome = app.tcp(to);
                    match user.uid() == alice.uid() {
                        true => matches!(outcome, Outcome::Direct { .. }),
                        false => {
                            assert!(outcome != direct(to), "{who}: {outcome:?}");
                            status().contains(&format!("another user's (uid {who})"))
                        }
                    }
                });
                system.run_as(user, &["systemctl", "--user", "stop", "socks"]);
            }
        }
        // Who can't ask tells nobody anything.
        let families = "RestrictAddressFamilies=";
        confine(&[families, &format!("{families}AF_UNIX AF_INET AF_INET6")]);
        system.run_as(alice, &[&run[..], &socks].concat());
        wait_until("it to be known that nobody answers", || {
            let [to, _] = sb.destinations();
            let outcome = app.tcp(to);
            assert!(outcome != direct(to), "{outcome:?}");
            status().contains("can't find out who listens at 127.0.0.1:1080")
        });
    });
}
