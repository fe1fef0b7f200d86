//! What `make install` and `make uninstall` do.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use cgtproxy_tests::package::{build, make, workspace};
use cgtproxy_tests::sandbox::sandbox;

use crate::{OUT, files, run, write_tool};

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
        make("install", &directories);
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
        make("uninstall", &directories);
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
        let told = make("install", &path);
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

        make("uninstall", &path);
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

/// As where the system's manager refuses what it is asked.
#[test]
fn uninstalling_removes_everything_whatever_systemctl_says() {
    sandbox(|_| {
        run(Command::new("mount").args(["-t", "tmpfs", "tmpfs", "/opt"]));
        make("install", &["PREFIX=/opt/x", "DESTDIR=/"]);
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
