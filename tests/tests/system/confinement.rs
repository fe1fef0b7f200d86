//! What the daemons may do and see.

use cgtproxy_tests::confinement::{Tried, assert_confined, assert_users_confined, mounts};
use cgtproxy_tests::installed::{AGENT, HELPER, Installed};
use cgtproxy_tests::sandbox::{by, direct, sandbox};
use cgtproxy_tests::system::{System, SystemUser};
use cgtproxy_tests::wait::{wait_for, wait_until};

use crate::{CONFIG, assert_not_run, start_made_up, text};

/// System calls that take the place of others on 32-bit machines or with other C libraries.
const TWINS: [&str; 6] = [
    "fstat",
    "fstat64",
    "fstatat64",
    "fstatfs64",
    "fcntl64",
    "timerfd_settime64",
];

/// Prints the helper's answer to a call that is so long that what it is read into has to grow a good deal.
const LONG_CALL: &str = r#"
my $helper = IO::Socket::UNIX->new("/run/cgtproxy/helper.sock") or die "connect: $!";
print $helper '{"method": "org.varlink.service.GetInfo", "x": "', "x" x 1000000, "\"}\0";
$helper->flush;
$/ = "\0";
print scalar <$helper>;
"#;

/// What the helper's unit says of families of addresses, tried by root with all capabilities: of itself the helper tries
/// no other.
fn no_socket_but_local_ones_and_netlink(system: &System) {
    // UNIX and netlink; IPv4, IPv6, packets, Bluetooth, the kernel's cryptography, virtual machines.
    let families = ["1", "16", "2", "10", "17", "31", "38", "40"];
    let script = "for (@ARGV) { print socket(my $s, $_, SOCK_RAW, 0) ? 'made' : $!{EAFNOSUPPORT} ? 'no' : 'other', ' ' }";
    let tried = |restriction: &[&str]| {
        let run = ["systemd-run", "--quiet", "--collect", "--pipe", "--wait"];
        let perl = ["perl", "-MSocket", "-MErrno", "-e", script];
        system.run(&[&run, restriction, &perl, &families].concat())
    };
    let of_unit = system.property(HELPER, "RestrictAddressFamilies");
    let restriction = format!("--property=RestrictAddressFamilies={of_unit}");
    assert_eq!(tried(&[&restriction]), "made made no no no no no no ");
    // Without it, the kernel knows the first five at least.
    let without = tried(&[]);
    assert!(
        without.split(' ').take(5).all(|said| said != "no"),
        "{without}"
    );
}

/// All that there is below a directory of the helper's own root, which is to be nothing else than this.
#[track_caller]
fn nothing_else_in(system: &System, pid: &str, directory: &str, known: &[&str]) {
    // Not all of them are there on every machine.
    let there = system.output(&["ls", "-A", &format!("/proc/{pid}/root{directory}")]);
    let there = text(&there.stdout);
    for name in there.split_whitespace() {
        assert!(known.contains(&name), "{directory} has {name}: {there}");
    }
}

/// What the helper sees of the file system, and what becomes of what it does not do.
fn sees_nothing_it_does_not_use(system: &System) {
    let pid = system.property(HELPER, "MainPID");
    // What the unit binds, what the service manager puts there by itself, and where these are.
    let roots = [
        "usr", "lib", "lib64", "etc", "sys", "dev", "proc", "root", "run", "tmp", "var",
    ];
    nothing_else_in(system, &pid, "", &roots);
    nothing_else_in(system, &pid, "/var", &["tmp", "lib"]);
    nothing_else_in(system, &pid, "/var/lib", &["sss"]);
    let run = [
        "cgtproxy-helper",
        "systemd",
        "userdb",
        "host",
        "nslcd",
        "samba",
    ];
    nothing_else_in(system, &pid, "/run", &run);
    // What follows is newer systemd's: which distribution this is, and where it is told that a service is ready.
    let host = ["userdb", "os-release", ".os-release-stage", "notify"];
    nothing_else_in(system, &pid, "/run/host", &host);
    nothing_else_in(
        system,
        &pid,
        "/run/systemd",
        &["incoming", "notify", "userdb", "journal"],
    );
    // Newer systemd lets it log.
    let log = ["dev-log", "socket", "stdout"];
    nothing_else_in(system, &pid, "/run/systemd/journal", &log);
    for empty in ["/root", "/tmp", "/var/tmp"] {
        nothing_else_in(system, &pid, empty, &[]);
    }
    let mounts = mounts(system, &pid);
    for bound in ["/usr", "/etc", "/sys/fs/cgroup"] {
        assert_eq!(mounts.get(bound), Some(&true), "{bound}: {mounts:?}");
    }

    let free = Tried::by_root(system);
    for what in [
        "memory",
        "socket:2",
        "unshare:user",
        "open:/proc/cpuinfo",
        "create:/",
    ] {
        assert_eq!(free.of(what), "ok", "{what}");
    }
    // Its own directory is its root as well, and has a /run for what is bound there.
    let tried = assert_confined(system, HELPER, &["/run"]);
    assert_eq!(tried.of("open:/etc/shadow"), "EACCES");
    // Neither other processes nor what is no process's.
    for what in ["open:/proc/1/stat", "open:/proc/cpuinfo"] {
        assert_eq!(tried.of(what), "ENOENT", "{what}");
    }
}

/// What becomes of what a user's daemons do not do.
fn users_daemons_can_do_nothing_else(system: &System, user: &SystemUser) {
    let free = Tried::by_user(system, user);
    for what in ["memory", "socket:2", "socket:10", "unshare:user"] {
        assert_eq!(free.of(what), "ok", "{what}");
    }
    assert_ne!(free.of("socket:17"), "EAFNOSUPPORT");
    assert_users_confined(system, user, AGENT, false);
    assert_users_confined(system, user, "cgtproxy-relay.service", true);
}

#[test]
fn the_daemons_are_confined_and_clean_up_after_themselves() {
    sandbox(|sb| {
        let installed = Installed::boot(sb, "", |_| ());
        let system = &installed.system;
        let alice = system.alice();
        let _mihomo = sb.tproxy("mihomo").uid(alice.uid()).port(7890).start();
        assert!(
            !sb.has_table(),
            "a helper that nobody has asked for anything does not run"
        );
        installed.enable(alice, CONFIG);
        let browser = system.desktop_app(alice, "browser");
        sb.expect(&browser, by("mihomo"));

        let of = |pid: String| {
            let status = system.run(&["cat", &format!("/proc/{pid}/status")]);
            move |name: &str| {
                let line = status
                    .lines()
                    .find_map(|l| l.strip_prefix(name)?.strip_prefix(":\t"));
                line.unwrap_or_else(|| panic!("no {name}: {status}"))
                    .to_owned()
            }
        };
        let helper = of(system.property(HELPER, "MainPID"));
        assert!(
            helper("Uid").split('\t').all(|uid| uid != "0"),
            "{}",
            helper("Uid")
        );
        assert!(
            helper("Gid").split('\t').all(|gid| gid != "0"),
            "{}",
            helper("Gid")
        );
        let net_admin = "0000000000001000";
        for set in ["CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(helper(set), net_admin, "{set}");
        }
        let agent = of(system.user_property(alice, AGENT, "MainPID"));
        for set in ["CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(agent(set), "0000000000000000", "{set}");
        }
        assert_eq!(agent("Uid"), vec![alice.uid().to_string(); 4].join("\t"));
        for daemon in [&helper as &dyn Fn(&str) -> String, &agent] {
            assert_eq!(daemon("NoNewPrivs"), "1");
            assert_eq!(daemon("Seccomp"), "2");
        }
        users_daemons_can_do_nothing_else(system, alice);
        // Their sandboxes let them have short slices, by which they go before programs that compute.
        for pid in [
            system.property(HELPER, "MainPID"),
            system.user_property(alice, AGENT, "MainPID"),
        ] {
            let sched = system.run(&["cat", &format!("/proc/{pid}/sched")]);
            let slice = sched.lines().find_map(|l| l.strip_prefix("se.slice"));
            let slice = slice.and_then(|l| l.trim_start_matches([' ', ':']).parse().ok());
            assert_eq!(slice, Some(100_000), "{sched}");
        }
        let analysis = system.run(&["systemd-analyze", "security", "--no-pager", HELPER]);
        let verdict = analysis.lines().last().expect("a verdict");
        let exposure = verdict
            .split_whitespace()
            .find_map(|word| word.parse::<f64>().ok());
        assert!(
            exposure.is_some_and(|exposure| exposure <= 1.4),
            "{analysis}"
        );
        no_socket_but_local_ones_and_netlink(system);
        sees_nothing_it_does_not_use(system);
        let mode = system.run(&["stat", "-c", "%a", "/run/cgtproxy/helper.sock"]);
        assert_eq!(mode.trim(), "666");

        for round in 0..2 {
            assert!(sb.has_table());
            assert_eq!(sb.mark_rules(4).len() + sb.mark_rules(6).len(), 2);
            let table = sb.mark_rules(4)[0].table.clone();
            assert!(!sb.routes(4, &table).is_empty() && !sb.routes(6, &table).is_empty());
            system.run(&["systemctl", "stop", "cgtproxy-helper.socket"]);
            assert!(!sb.has_table(), "round {round}");
            for family in [4, 6] {
                assert_eq!(sb.mark_rules(family), [], "round {round}");
                assert_eq!(
                    sb.routes(family, &table),
                    Vec::<String>::new(),
                    "round {round}"
                );
            }
            assert!(
                !system
                    .output(&["test", "-e", "/run/cgtproxy/helper.sock"])
                    .status
                    .success()
            );
            sb.expect(&browser, direct);
            let output =
                system.output_as(alice, &["cgtproxy-exec", "proxy", "touch", "/tmp/was-run"]);
            assert_not_run(
                system,
                &output,
                "the target is not in force: no helper listens",
            );
            // The agent comes back by itself.
            system.run(&["systemctl", "start", "cgtproxy-helper.socket"]);
            installed.wait_in_force(alice);
            sb.expect(&browser, by("mihomo"));
        }
        // Nothing of all this was worth an error.
        assert_eq!(
            system.run(&["systemctl", "--failed", "--plain", "--no-legend"]),
            ""
        );
        let failed = ["systemctl", "--user", "--failed", "--plain", "--no-legend"];
        assert_eq!(system.run_as(alice, &failed), "");
    });
}

/// The entries of the helper's list of system calls, without those that another architecture has in
/// place of one that is listed beside it.
fn system_calls_of_the_unit() -> Vec<String> {
    let unit = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../systemd/cgtproxy-helper.service"
    );
    let unit = std::fs::read_to_string(unit).expect("the unit is there");
    let lists = unit
        .lines()
        .filter_map(|line| line.strip_prefix("SystemCallFilter="));
    let entries = lists.flat_map(str::split_whitespace);
    entries
        .filter(|entry| !TWINS.contains(entry))
        .map(str::to_owned)
        .collect()
}

#[test]
fn the_helper_may_make_no_system_call_that_it_does_not_make() {
    sandbox(|sb| {
        let installed = Installed::boot(sb, "", |_| ());
        let system = &installed.system;
        let alice = system.alice();
        let _mihomo = sb.tproxy("mihomo").uid(alice.uid()).port(7890).start();
        installed.enable(alice, CONFIG);
        start_made_up(&installed);
        let dies_without = |entry: Option<&str>| {
            system.run(&["systemctl", "stop", "cgtproxy-helper.socket"]);
            wait_until("the agent knows", || {
                system.agent_status(Some(alice))["connected"] == false
            });
            let without = entry.map(|entry| format!("SystemCallFilter=~{entry}"));
            let without = without.unwrap_or_default();
            // What is not allowed kills, so that nothing is overlooked; but for what the dynamic linker looks for, and
            // libcap when nss-systemd is loaded, and newer nss-systemd with its sockets (attributes), which do without.
            let script = format!(
                "mkdir -p /run/systemd/system/{HELPER}.d && printf '%s\\n' '[Service]' \
                 'Restart=no' 'SystemCallErrorNumber=kill' \
                 'SystemCallFilter=access faccessat prctl fgetxattr fsetxattr' '{without}' \
                 >/run/systemd/system/{HELPER}.d/without.conf && systemctl daemon-reload && \
                 systemctl reset-failed {HELPER} cgtproxy-helper.socket && \
                 systemctl start cgtproxy-helper.socket && systemctl --no-block start {HELPER}"
            );
            let deaths = || system.journal(HELPER).matches("status=31/SYS").count();
            let before = deaths();
            system.run(&["sh", "-c", &script]);
            // Without it the helper dies, at its start, when the agent comes back, when it is sent much, or when it takes
            // over what the one before it left; or it does not: then the agent's policy gets into force, and so on.
            let died = wait_for("the helper is dead or at work", || {
                if deaths() > before {
                    return Some(true);
                }
                (system.agent_status(Some(alice))["connected"] == true).then_some(false)
            });
            let answers = || {
                !system
                    .output_as(alice, &["perl", "-MIO::Socket::UNIX", "-e", LONG_CALL])
                    .stdout
                    .is_empty()
            };
            let restarts = || {
                system
                    .output(&["systemctl", "restart", HELPER])
                    .status
                    .success()
            };
            died || !answers() || !restarts()
        };
        assert!(
            !dies_without(None),
            "the helper needs more than its unit has"
        );
        let entries = system_calls_of_the_unit();
        let not_needed: Vec<_> = entries
            .into_iter()
            .filter(|entry| !dies_without(Some(entry)))
            .collect();
        assert!(
            not_needed.is_empty(),
            "the helper does not need {not_needed:?}"
        );
    });
}
