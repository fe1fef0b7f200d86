//! Packages: what is in them, and what they do to a system.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a panic is a failed test"
)]

use std::collections::BTreeSet;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use cgtproxy_tests::package::{build, list, workspace};
use cgtproxy_tests::sandbox::{Sandbox, proxied, sandbox};
use cgtproxy_tests::system::{System, SystemUser};
use cgtproxy_tests::wait::wait_until;

const CONFIG: &str = r"
version: 1
tproxies:
  mihomo: {port: 7890}
rules:
  - {match: '/app\.slice$', tproxy: mihomo}
";
const SOCKET: &str = "cgtproxy-helper.socket";
const AGENT: &str = "cgtproxy-agent.service";
const OUT: &str = "/run/testbed/packages";

/// Runs a command of the host's inside the sandbox.
#[track_caller]
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| {
        panic!(
            "can't run {}: {error}",
            command.get_program().to_string_lossy()
        )
    });
    assert!(
        output.status.success(),
        "{command:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn lines(text: &str) -> BTreeSet<String> {
    text.lines().map(str::to_owned).collect()
}

/// All files below a directory, as absolute paths in it.
fn files(directory: &str) -> BTreeSet<String> {
    lines(&run(Command::new("find")
        .arg(directory)
        .args(["-not", "-type", "d", "-printf", "/%P\n"])))
}

/// What documents below a directory link to that is not there.
fn dead_links(root: &str) -> Vec<String> {
    let mut dead = Vec::new();
    for document in files(root).iter().filter(|path| path.ends_with(".md")) {
        let document = format!("{root}{document}");
        let text = std::fs::read_to_string(&document).unwrap();
        let links = text.split("](").skip(1);
        for link in links.map(|rest| rest.split(')').next().unwrap()) {
            let target = link.split('#').next().unwrap();
            let directory = Path::new(&document).parent().unwrap();
            if !link.starts_with("https:") && !directory.join(target).exists() {
                dead.push(format!("{document}: {link}"));
            }
        }
    }
    dead
}

/// The manifest's files as packages have them whose manual pages are compressed.
fn compressed() -> BTreeSet<String> {
    let list = list().into_iter();
    list.map(|path| {
        if path.contains("/man/") {
            format!("{path}.gz")
        } else {
            path
        }
    })
    .collect()
}

/// Builds it twice, in circumstances that should make no difference.
fn twice(kind: &str) -> String {
    let first = build(kind, &format!("{OUT}/1"), &["TZ=Asia/Shanghai"]);
    let second = build(
        kind,
        &format!("{OUT}/2"),
        &["TZ=America/New_York", "LC_ALL=C.UTF-8", "TMPDIR=/run"],
    );
    let [one, two] = [&first, &second].map(|path| std::fs::read(path).unwrap());
    assert!(one == two, "two builds of {} differ", first.display());
    first.to_str().unwrap().to_owned()
}

#[test]
fn the_debian_package_is_clean_and_the_same_each_time() {
    sandbox(|_| {
        let package = twice("deb");
        let root = format!("{OUT}/deb");
        run(Command::new("dpkg-deb").args(["--extract", &package, &root]));
        // What Debian wants to have elsewhere, or otherwise.
        let doc = "/usr/share/doc/cgtproxy";
        let mut expected = compressed();
        for path in [format!("{doc}/CHANGELOG.md"), format!("{doc}/LICENSE")] {
            assert!(expected.remove(&path), "{path}");
        }
        expected = expected
            .into_iter()
            .map(|path| path.replace("/zsh/site-functions/", "/zsh/vendor-completions/"))
            .collect();
        for name in ["changelog.gz", "changelog.Debian.gz", "copyright"] {
            expected.insert(format!("{doc}/{name}"));
        }
        expected.insert("/usr/share/lintian/overrides/cgtproxy".to_owned());
        assert_eq!(files(&root), expected);
        assert_eq!(dead_links(&root), Vec::<String>::new());
        let listed = run(Command::new("dpkg-deb").args(["--contents", &package]));
        let is_ours = |line: &&str| line.ends_with(" ./etc/cgtproxy/");
        let directory = listed.lines().find(is_ours).unwrap();
        assert!(directory.starts_with("drwxr-xr-x root/root"), "{directory}");

        let field = |name: &str| run(Command::new("dpkg-deb").args(["--field", &package, name]));
        assert!(
            field("Depends").contains("libnftnl11 (>="),
            "{}",
            field("Depends")
        );
        let lintian = [
            "--fail-on",
            "error",
            "--display-info",
            "--tag-display-limit",
            "0",
            "--allow-root",
        ];
        let found = run(Command::new("lintian").args(lintian).arg(&package));
        // What is overridden is what would be found.
        assert!(!found.contains("unused-override"), "{found}");
    });
}

#[test]
fn the_rpm_package_has_the_same_files_and_is_the_same_each_time() {
    sandbox(|_| {
        let package = twice("rpm");
        let query = |what: &[&str]| run(Command::new("rpm").arg("-qp").args(what).arg(&package));
        let packaged = lines(&query(&[
            "--queryformat",
            "[%{FILEMODES:perms} %{FILENAMES}\n]",
        ]));
        let is_file = |line: &str| line.starts_with('-').then(|| line[11..].to_owned());
        let regular: BTreeSet<_> = packaged.iter().filter_map(|line| is_file(line)).collect();
        assert_eq!(regular, compressed());
        let documents = query(&["--docfiles"]);
        assert!(
            documents.contains("/usr/share/doc/cgtproxy/README.md"),
            "{documents}"
        );
        assert_eq!(
            query(&["--licensefiles"]),
            "/usr/share/doc/cgtproxy/LICENSE\n\
             /usr/share/doc/cgtproxy/third-party-licenses\n"
        );
        let directory = "drwxr-xr-x /etc/cgtproxy";
        assert!(packaged.contains(directory), "{packaged:?}");
        let needed = query(&["--requires"]);
        assert!(needed.contains("libnftnl.so.11"), "{needed}");
    });
}

#[test]
fn the_package_for_arch_has_the_same_files() {
    sandbox(|_| {
        let arch = workspace().join("packaging/arch");
        for script in ["PKGBUILD", "cgtproxy.install"] {
            run(Command::new("bash").arg("-n").arg(arch.join(script)));
        }
        // What makepkg does with it once everything is built, with 'make' as the program that installs.
        std::fs::create_dir_all(OUT).unwrap();
        build("tarball", OUT, &[]);
        let script = r#"
            set -eu
            . "$1/packaging/arch/PKGBUILD"
            version=$(sed -n '/^\[workspace\.package\]/,/^$/s/^version = "\(.*\)"$/\1/p' "$1/Cargo.toml")
            [ "$pkgver" = "$version" ]
            [ -e "$1/packaging/arch/$install" ]
            cd "$2"
            ln -s "$1" "$pkgname-$pkgver"
            pkgdir=$2/pkg
            make() {
                command make -s BUILDDIR=/run/testbed/stripped PAPERSDIR=/run/testbed/papers "$@"
            }
            package
        "#;
        let workspace = workspace();
        run(Command::new("bash")
            .args(["-c", script, "bash"])
            .args([workspace.as_os_str(), OUT.as_ref()]));
        let mut expected: BTreeSet<_> = list()
            .into_iter()
            .map(|path| path.replace("/usr/libexec/", "/usr/lib/cgtproxy/"))
            .collect();
        for name in ["LICENSE", "third-party-licenses"] {
            expected.insert(format!("/usr/share/licenses/cgtproxy/{name}"));
        }
        assert_eq!(files(&format!("{OUT}/pkg")), expected);
        assert!(Path::new(&format!("{OUT}/pkg/etc/cgtproxy")).is_dir());
    });
}

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

#[test]
fn the_tarball_installs_and_uninstalls_and_is_the_same_each_time() {
    sandbox(|_| {
        let archive = twice("tarball");
        run(Command::new("tar").args(["-C", OUT, "-xf", &archive]));
        let unpacked = Path::new(&archive).file_name().unwrap().to_str().unwrap();
        let unpacked = format!("{OUT}/{}", unpacked.strip_suffix(".tar.gz").unwrap());
        let root = format!("{OUT}/root");
        let install = |what: &str| {
            // Nothing of the repository's, wherever one is.
            run(Command::new(format!("{unpacked}/packaging/install"))
                .arg(what)
                .env_clear()
                .env("PATH", std::env::var_os("PATH").unwrap())
                .env("PREFIX", "/usr")
                .env("DESTDIR", &root)
                .current_dir("/"));
        };
        install("install");
        assert_eq!(files(&root), list().into_iter().collect());
        assert_eq!(dead_links(&root), Vec::<String>::new());
        let version = run(Command::new(format!("{root}/usr/bin/cgtproxy-agent")).arg("--version"));
        let instructions = std::fs::read_to_string(format!("{unpacked}/INSTALL")).unwrap();
        let version = version.trim().replace("cgtproxy-agent", "cgtproxy");
        assert!(
            instructions.starts_with(&version),
            "{version}: {instructions}"
        );
        assert!(instructions.contains("libnftnl.so.11"), "{instructions}");
        assert!(!instructions.contains('@'), "{instructions}");
        install("uninstall");
        assert_eq!(files(&root), BTreeSet::new());
    });
}

#[test]
fn installing_puts_directories_where_files_name_them() {
    sandbox(|_| {
        let root = format!("{OUT}/root");
        let directories = [
            &format!("DESTDIR={root}"),
            "PREFIX=/opt/x",
            "BINDIR=/opt/y/bin",
            "LIBEXECDIR=/opt/x/lib/cgtproxy",
        ];
        cgtproxy_tests::package::make("install", &directories);
        let read = |path: &str| std::fs::read_to_string(format!("{root}{path}")).unwrap();
        let unit = read("/opt/x/lib/systemd/system/cgtproxy-helper.service");
        assert!(
            unit.contains("\nExecStart=/opt/x/lib/cgtproxy/cgtproxy-helper\n"),
            "{unit}"
        );
        let unit = read("/opt/x/lib/systemd/user/cgtproxy-agent.service");
        assert!(
            unit.contains("\nExecStart=/opt/y/bin/cgtproxy-agent\n"),
            "{unit}"
        );
        let functions = read("/opt/x/share/cgtproxy/cgtproxy-exec.sh");
        assert!(functions.contains(" /opt/x/share/cgtproxy/"), "{functions}");
        cgtproxy_tests::package::make("uninstall", &directories);
        assert_eq!(files(&root), BTreeSet::new());
        for own in ["lib/cgtproxy", "share/cgtproxy", "share/doc/cgtproxy"] {
            assert!(!Path::new(&format!("{root}/opt/x/{own}")).exists(), "{own}");
        }
    });
}

/// In place of systemctl and systemd-sysusers, which says what it is asked. The original's daemon runs, and of two users'
/// managers one is just starting.
const SAYS: &str = r#"#!/bin/sh
case "$*" in
*--state=active*) echo 'user@1001.service loaded active running of a user' ;;
list-units*) printf 'user@%s.service loaded %s of a user\n' 1001 'active running' 1002 'activating start' ;;
*) echo "${0##*/} $*" >>/run/said ;;
esac
"#;

/// As the scripts of packages do.
#[test]
fn installing_from_source_tells_managers_of_it_and_restarts_what_runs() {
    sandbox(|_| {
        run(Command::new("mount").args(["-t", "tmpfs", "tmpfs", "/usr/local"]));
        for directory in ["/run/tools", "/run/systemd/system", "/run/cgtproxy"] {
            std::fs::create_dir_all(directory).unwrap();
        }
        for name in ["systemctl", "systemd-sysusers"] {
            write_tool(name, SAYS);
        }
        let path = ["PATH=/run/tools:/usr/bin:/bin"];
        let said = || {
            let said = std::fs::read_to_string("/run/said").unwrap();
            std::fs::remove_file("/run/said").unwrap();
            said
        };
        let told = cgtproxy_tests::package::make("install", &path);
        assert_eq!(
            said(),
            "systemd-sysusers /usr/local/lib/sysusers.d/cgtproxy.conf\n\
             systemctl daemon-reload\n\
             systemctl kill --kill-whom=main --signal=SIGHUP user@1001.service\n\
             systemctl try-restart cgtproxy-helper.service cgtproxy-agent-system.service\n\
             systemctl is-active --quiet cgtproxy.service\n"
        );
        assert!(told.contains("cgtproxy.service, the daemon"), "{told}");
        let document = "/usr/local/share/doc/cgtproxy/docs/moving.md";
        assert!(told.contains(document), "{told}");
        assert!(Path::new(document).exists());

        cgtproxy_tests::package::make("uninstall", &path);
        let said = said();
        let all_users = "systemctl --global disable cgtproxy-agent.service cgtproxy-relay.socket\n";
        assert!(said.contains(all_users), "{said}");
        assert_eq!(files("/usr/local"), BTreeSet::new());
        for own in [
            "/run/cgtproxy",
            "/usr/local/share/doc/cgtproxy",
            "/usr/local/share/cgtproxy",
        ] {
            assert!(!Path::new(own).exists(), "{own}");
        }
    });
}

/// Puts a script into /run/tools.
fn write_tool(name: &str, script: &str) {
    let path = Path::new("/run/tools").join(name);
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
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

/// As where the system's manager refuses what it is asked.
#[test]
fn uninstalling_removes_everything_whatever_systemctl_says() {
    sandbox(|_| {
        run(Command::new("mount").args(["-t", "tmpfs", "tmpfs", "/opt"]));
        cgtproxy_tests::package::make("install", &["PREFIX=/opt/x", "DESTDIR=/"]);
        assert!(!files("/opt").is_empty());
        std::fs::create_dir_all("/run/tools").unwrap();
        std::fs::create_dir_all("/run/systemd/system").unwrap();
        let refuses = "#!/bin/sh\n[ $1 = cat ] || [ $1 = list-units ]\n";
        write_tool("systemctl", refuses);
        let path = "PATH=/run/tools:/usr/bin:/bin";
        let makefile = workspace().join("Makefile");
        Command::new("make")
            .args(["-s", "-f"])
            .arg(makefile)
            .args(["uninstall", "PREFIX=/opt/x", path])
            .current_dir(workspace())
            .output()
            .unwrap();
        assert_eq!(files("/opt"), BTreeSet::new());
    });
}

#[test]
fn nothing_is_installed_where_the_helper_would_not_find_itself() {
    sandbox(|_| {
        // As where /usr/local is in /var.
        for directory in ["/usr/local", "/etc/systemd/system"] {
            run(Command::new("mount").args(["-t", "tmpfs", "tmpfs", directory]));
        }
        std::os::unix::fs::symlink("/run/elsewhere", "/usr/local/libexec").unwrap();
        // What is built, and by it what is looked for.
        build("tarball", OUT, &[]);
        let install = || {
            Command::new(workspace().join("packaging/install"))
                .arg("install")
                .env_clear()
                .env("PATH", std::env::var_os("PATH").unwrap())
                .env("BUILDDIR", "/run/testbed/stripped")
                .env("PAPERSDIR", "/run/testbed/papers")
                .output()
                .unwrap()
        };
        let refused = install();
        let said = String::from_utf8_lossy(&refused.stderr);
        assert!(!refused.status.success(), "{said}");
        assert!(said.contains("BindReadOnlyPaths=/run/elsewhere"), "{said}");
        assert!(!Path::new("/run/elsewhere").exists());
        assert!(!Path::new("/usr/local/bin").exists());

        let drop_in = Path::new("/etc/systemd/system/cgtproxy-helper.service.d");
        std::fs::create_dir(drop_in).unwrap();
        let shown = "[Service]\nBindReadOnlyPaths=/opt /run/elsewhere\n";
        std::fs::write(drop_in.join("directories.conf"), shown).unwrap();
        std::fs::create_dir("/run/elsewhere").unwrap();
        let installed = install();
        assert!(installed.status.success(), "{installed:?}");
        assert!(Path::new("/run/elsewhere/cgtproxy-helper").exists());
    });
}

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
    let script = "mkdir -p ~/.config/cgtproxy && printf %s \"$1\" >~/.config/cgtproxy/config.yaml";
    system.run_as(alice, &["sh", "-c", script, "sh", CONFIG]);
    system.run_as(alice, &["systemctl", "--user", "daemon-reload"]);
    system.run_as(
        alice,
        &["systemctl", "--user", "enable", "--now", "cgtproxy-agent"],
    );
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
