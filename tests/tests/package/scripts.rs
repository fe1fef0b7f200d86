//! What packages' scripts ask of systemd.

use std::process::Command;

use cgtproxy_tests::package::{list, workspace};
use cgtproxy_tests::sandbox::sandbox;

use crate::{lines, run, write_tool};

/// What the scripts of Arch's package call, of which nothing happens.
const CALLED: &str = r#"
    vercmp() {
        [ "$1" = "$2" ] && echo 0 && return
        [ "$(printf '%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ] && echo -1 || echo 1
    }
    systemctl() { echo "systemctl $*"; return "${FAILING:-0}"; }
    . "$1"
    shift
    "$@"
"#;

#[test]
fn the_package_for_arch_takes_over_from_the_original_and_restarts_under_its_own_units() {
    sandbox(|_| {
        // As where systemd runs, which nothing here asks.
        std::fs::create_dir_all("/run/systemd/system").unwrap();
        let install = workspace().join("packaging/arch/cgtproxy.install");
        let said = |words: &[&str]| {
            let mut command = Command::new("bash");
            command.args(["-c", CALLED, "bash"]).arg(&install);
            run(command.args(words))
        };
        let disabled = "systemctl disable --now cgtproxy.service\n";
        assert_eq!(said(&["pre_upgrade", "0.4.0-1", "0.3.3-1"]), disabled);
        let moved = said(&["post_upgrade", "0.4.0-1", "0.3.3-1"]);
        assert!(moved.contains("direct"), "{moved}");
        let document = "/usr/share/doc/cgtproxy/docs/moving.md";
        assert!(moved.contains(document), "{moved}");
        assert!(list().iter().any(|path| path == document));

        assert_eq!(said(&["pre_upgrade", "0.4.1-1", "0.4.0-1"]), "");
        // Where nothing runs, as where a root is made, nothing can be stopped.
        std::fs::remove_dir("/run/systemd/system").unwrap();
        let only_disabled = "systemctl disable cgtproxy.service\n";
        assert_eq!(said(&["pre_upgrade", "0.4.0-1", "0.3.3-1"]), only_disabled);
        let removed = said(&["pre_remove", "0.4.0-1"]);
        assert!(!removed.contains("--now"), "{removed}");
        let all_users = "systemctl --global disable cgtproxy-agent.service cgtproxy-relay.socket\n";
        assert!(removed.contains(all_users), "{removed}");
        std::fs::create_dir("/run/systemd/system").unwrap();
        let restarted = "systemctl daemon-reload\n\
             systemctl try-restart cgtproxy-helper.service cgtproxy-agent-system.service\n";
        let upgrade = ["post_upgrade", "0.4.1-1", "0.4.0-1"];
        assert_eq!(said(&upgrade), restarted);
        // As where the system policy's configuration has an error: pacman would say that the package's script failed.
        let mut command = Command::new("bash");
        command.args(["-c", CALLED, "bash"]).arg(&install);
        assert_eq!(run(command.args(upgrade).env("FAILING", "1")), restarted);
    });
}

/// The manager of a user who is just logging in ends by a signal that it does not know yet what to do with.
#[test]
fn every_package_tells_managers_that_run_of_its_units_and_no_others() {
    for script in [
        "Makefile",
        "packaging/debian/postinst",
        "packaging/cgtproxy.spec",
    ] {
        let text = std::fs::read_to_string(workspace().join(script)).unwrap();
        let (before, _) = text.split_once("--signal=SIGHUP").unwrap();
        let (_, asked) = before.rsplit_once("systemctl list-units").unwrap();
        assert!(
            asked.contains(" --state=active 'user@*.service' "),
            "{script}: {asked}"
        );
    }
}

/// The scripts that run when a package is removed.
const REMOVING: [&str; 4] = [
    "Makefile",
    "packaging/debian/prerm",
    "packaging/cgtproxy.spec",
    "packaging/arch/cgtproxy.install",
];

/// How one of these scripts stops users' agents, in words.
fn stopping_of_users(script: &str) -> String {
    let text = std::fs::read_to_string(workspace().join(script)).unwrap();
    let start = text
        .find("systemctl list-units --plain --no-legend 'user@")
        .unwrap();
    let rest = &text[start..];
    let end = rest.find("wait").expect("it waits for what it begins") + "wait".len();
    // Make has `$` twice, and everything on one line.
    let plain = rest[..end].replace("$$", "$").replace("\\\n", "\n");
    let words = plain.split([' ', '\t', '\n', ';']);
    let words: Vec<_> = words.filter(|word| !word.is_empty()).collect();
    words.join(" ")
}

/// In place of systemctl: three users' managers, of which each answers once all of them are asked, and never ends.
const MANAGERS: &str = r#"#!/bin/sh
case $1 in
list-units) printf 'user@%s.service loaded active running of a user\n' 1001 1002 1003 ;;
--user)
    shift
    echo "$*" >>/run/asked/words
    while [ "$(wc -l </run/asked/words)" -lt 3 ]; do sleep 0.1; done
    echo "$* $(readlink "/proc/$$/fd/2")" >>/run/asked/together
    exec sleep infinity
    ;;
esac
"#;

/// In place of timeout, time is up when all of them are asked.
const TIMEOUT: &str = r#"#!/bin/sh
shift
"$@" &
while ! [ -e /run/asked/together ] || [ "$(wc -l </run/asked/together)" -lt 3 ]; do sleep 0.1; done
kill $!
"#;

/// Somebody's manager may take as long as it likes, and users' agents are stopped all the same, side by side.
#[test]
fn every_package_stops_all_users_agents_at_once_and_waits_for_none_for_long() {
    sandbox(|_| {
        let [first, others @ ..] = REMOVING.map(stopping_of_users);
        for (other, script) in others.iter().zip(&REMOVING[1..]) {
            assert_eq!(*other, first, "{script}");
        }
        assert!(first.contains(" timeout 15 systemctl --user "), "{first}");
        for path in list() {
            if let Some(unit) = path.strip_prefix("/usr/lib/systemd/user/") {
                assert!(first.contains(unit), "{unit}: {first}");
            }
        }
        std::fs::create_dir_all("/run/tools").unwrap();
        std::fs::create_dir_all("/run/asked").unwrap();
        write_tool("systemctl", MANAGERS);
        write_tool("timeout", TIMEOUT);
        let prerm = std::fs::read_to_string(workspace().join(REMOVING[1])).unwrap();
        let start = prerm.find("    systemctl list-units").unwrap();
        let end = prerm.find("    deb-systemd-invoke stop").unwrap();
        run(Command::new("sh")
            .args(["-ec", &prerm[start..end]])
            .env("PATH", "/run/tools:/usr/bin:/bin"));
        let asked = lines(&std::fs::read_to_string("/run/asked/together").unwrap());
        let asked: Vec<_> = asked
            .iter()
            .map(|words| {
                // What asks may outlive all of this, and whoever reads what the script says would wait for it.
                assert!(words.ends_with(" /dev/null"), "{words}");
                words.split(' ').next().unwrap()
            })
            .collect();
        let managers = ["--machine=1001@", "--machine=1002@", "--machine=1003@"];
        assert_eq!(asked, managers);
    });
}
