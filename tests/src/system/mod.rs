//! The whole system: systemd booted as the first process of namespaces inside a fast sandbox.
//!
//! Its network is the sandbox's machine, so that everything the sandbox offers to watch packets
//! (destinations, servers, records, nftables) is there as well.

mod boot;
mod image;
mod user;

use std::path::{Path, PathBuf};
use std::process::{Child, Output};
use std::sync::Arc;

pub use user::SystemUser;

use crate::command::{output_with_input, run};
use crate::package;
use crate::sandbox::{App, CGROUP_ROOT, Cgroup, Sandbox, World};

/// The whole subtree of cgroups that the system has for its own, as the sandbox sees it.
const CGROUP: &str = "/sys/fs/cgroup/system";
/// Where the system finds the test bed's own binaries.
const BIN: &str = "/usr/local/lib/cgtproxy-testbed";

/// A system to be.
pub struct SystemBuilder<'a> {
    sandbox: &'a Sandbox,
    image: image::Image,
}

impl SystemBuilder<'_> {
    /// Puts things into the system's root before it boots: the closure gets the directory.
    pub fn install(self, install: impl FnOnce(&Path)) -> Self {
        install(self.image.root());
        self
    }

    /// Installs the project as its README says, `make install DESTDIR=… PREFIX=/usr`, with the
    /// binaries that are under test.
    ///
    /// # Panics
    /// When that fails.
    #[track_caller]
    pub fn install_project(self) -> Self {
        let destination = format!("DESTDIR={}", self.image.root().display());
        package::make("install", &[&destination, "PREFIX=/usr"]);
        // What a package does once its files are there.
        let root = format!("--root={}", self.image.root().display());
        run(&["systemd-sysusers", &root, "cgtproxy.conf"]);
        self
    }

    /// Boots, and returns when all of it is up, the users' service managers included.
    ///
    /// # Panics
    /// When it does not come up, with what it said.
    #[track_caller]
    pub fn boot(self) -> System {
        let Self { sandbox, image } = self;
        let (supervisor, init) = boot::boot(image.root());
        let system = System {
            world: sandbox.world(),
            supervisor,
            init,
            users: image.users(),
        };
        boot::wait_for_users(&system);
        system
    }
}

/// A booted system with two ordinary users who have no session but linger, so that their service
/// managers run. Dropped, it is killed; it goes with its sandbox in any case.
pub struct System {
    world: Arc<World>,
    supervisor: Child,
    init: u32,
    users: [SystemUser; 2],
}

impl System {
    /// A system to be booted on the sandbox's machine, of which there can be one.
    ///
    /// # Panics
    /// When something that the host must have is missing: it says what.
    #[track_caller]
    pub fn builder(sandbox: &Sandbox) -> SystemBuilder<'_> {
        SystemBuilder {
            sandbox,
            image: image::Image::create(),
        }
    }

    /// Boots a system with nothing of the project in it.
    #[track_caller]
    pub fn boot(sandbox: &Sandbox) -> Self {
        Self::builder(sandbox).boot()
    }

    /// The first of the users.
    pub fn alice(&self) -> &SystemUser {
        &self.users[0]
    }

    /// The second of the users.
    pub fn bob(&self) -> &SystemUser {
        &self.users[1]
    }

    /// The system's root directory, from outside.
    pub fn root(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root", self.init))
    }

    /// The directory of a cgroup, from outside, by its path from the system's cgroup root.
    pub fn cgroup_directory(&self, path: &str) -> PathBuf {
        Path::new(CGROUP).join(path.trim_start_matches('/'))
    }

    /// Runs a command as root that must succeed, and returns its stdout.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn run(&self, command: &[&str]) -> String {
        run(&self.command(None, command))
    }

    /// Runs a command as root and returns what came of it.
    #[track_caller]
    pub fn output(&self, command: &[&str]) -> Output {
        output_with_input(&self.command(None, command), "")
    }

    /// Runs a command as a user that must succeed, and returns its stdout. It runs in a session
    /// scope of the user's, as a shell would.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn run_as(&self, user: &SystemUser, command: &[&str]) -> String {
        run(&self.command(Some(user), command))
    }

    /// Runs a command as a user and returns what came of it.
    #[track_caller]
    pub fn output_as(&self, user: &SystemUser, command: &[&str]) -> Output {
        output_with_input(&self.command(Some(user), command), "")
    }

    /// Starts a test application as a user, by a command that runs another one: nothing, or
    /// `cgtproxy-exec proxy`, or `systemd-run --user --slice=… --pipe`.
    #[track_caller]
    pub fn app_as(&self, user: &SystemUser, by: &[&str]) -> App {
        let testapp = format!("{BIN}/cgtproxy-testapp");
        let command = [by, &[&testapp, "app"]].concat();
        App::start_by(&self.world, &self.command(Some(user), &command))
    }

    /// Starts a test application as a desktop does: by the user's manager, as a unit in `app.slice`.
    #[track_caller]
    pub fn desktop_app(&self, user: &SystemUser, name: &str) -> App {
        self.app_in_slice(user, "app.slice", &format!("app-{name}"))
    }

    /// Starts a test application by the user's manager, as a unit of that name in that slice.
    #[track_caller]
    pub fn app_in_slice(&self, user: &SystemUser, slice: &str, unit: &str) -> App {
        let run = [
            "systemd-run",
            "--user",
            "--quiet",
            "--collect",
            "--pipe",
            "--wait",
        ];
        let (slice, unit) = (format!("--slice={slice}"), format!("--unit={unit}"));
        self.app_as(user, &[&run[..], &[&slice, &unit]].concat())
    }

    /// Starts a test application as root, by a command that runs another one: `systemd-run --pipe`.
    #[track_caller]
    pub fn app(&self, by: &[&str]) -> App {
        let testapp = format!("{BIN}/cgtproxy-testapp");
        let command = [by, &[&testapp, "app"]].concat();
        App::start_by(&self.world, &self.command(None, &command))
    }

    /// The cgroup of a system unit that runs, for what the test bed puts into it.
    pub fn unit_cgroup(&self, unit: &str) -> Cgroup {
        self.cgroup(&self.property(unit, "ControlGroup"))
    }

    /// A cgroup, by its path from the system's cgroup root; what is missing is made, and root's.
    pub fn cgroup(&self, path: &str) -> Cgroup {
        let whole = self.cgroup_directory(path);
        let path = whole.strip_prefix(CGROUP_ROOT).expect("it is below");
        Cgroup::create(&self.world, path, 0)
    }

    /// What a system unit has logged.
    pub fn journal(&self, unit: &str) -> String {
        self.run(&["journalctl", "--sync"]);
        self.run(&["journalctl", "--no-pager", "--output=cat", "--unit", unit])
    }

    /// What a unit of a user's has logged, and the user's manager about it.
    pub fn user_journal(&self, user: &SystemUser, unit: &str) -> String {
        self.run(&["journalctl", "--sync"]);
        // `--user-unit` would mean root's own units.
        let uid = format!("_UID={}", user.uid());
        let (by, about) = (
            format!("_SYSTEMD_USER_UNIT={unit}"),
            format!("USER_UNIT={unit}"),
        );
        let either = [uid.as_str(), &by, "+", &uid, &about];
        self.run(&[&["journalctl", "--no-pager", "--output=cat"], &either[..]].concat())
    }

    /// A property of a system unit.
    pub fn property(&self, unit: &str, name: &str) -> String {
        self.run(&["systemctl", "show", "--value", "--property", name, unit])
            .trim()
            .to_owned()
    }

    /// A property of a unit of a user's.
    pub fn user_property(&self, user: &SystemUser, unit: &str, name: &str) -> String {
        let command = [
            "systemctl",
            "--user",
            "show",
            "--value",
            "--property",
            name,
            unit,
        ];
        self.run_as(user, &command).trim().to_owned()
    }

    /// The whole argument vector for running something inside.
    fn command(&self, user: Option<&SystemUser>, command: &[&str]) -> Vec<String> {
        let launch = |cgroup: &Path| {
            std::fs::create_dir_all(cgroup).expect("a place for the command to live in");
            ["/run/testbed/bin/cgtproxy-testapp", "launch"]
                .map(str::to_owned)
                .into_iter()
                .chain([cgroup.to_str().expect("made of ASCII").to_owned()])
        };
        let target = self.init.to_string();
        let enter = [
            "nsenter", "--target", &target, "--mount", "--uts", "--ipc", "--cgroup",
        ]
        .into_iter()
        .chain(["--pid", "--root", "--wd"]);
        let mut argv: Vec<String> = match user {
            Some(user) => launch(&self.cgroup_directory(&user.session())),
            None => launch(&self.cgroup_directory("testbed.scope")),
        }
        .collect();
        argv.extend(enter.map(str::to_owned));
        argv.extend(["env", "-i"].map(str::to_owned));
        argv.extend(user.map_or_else(user::root_environment, SystemUser::environment));
        if let Some(user) = user {
            argv.extend(user.switch());
        }
        argv.extend(command.iter().map(|&argument| argument.to_owned()));
        argv
    }

    /// Prints what one wants to see when a test has failed.
    fn explain(&self) {
        eprintln!("\n---- the system when the test failed ----");
        for command in [
            &["systemctl", "--no-pager", "list-units", "--failed"][..],
            &[
                "journalctl",
                "--no-pager",
                "--lines=200",
                "--output=short-monotonic",
            ],
        ] {
            let output = self.output(command);
            eprintln!(
                "$ {}\n{}",
                command.join(" "),
                String::from_utf8_lossy(&output.stdout)
            );
        }
        let console = std::fs::read(self.root().join("dev/console")).unwrap_or_default();
        eprintln!("-- console\n{}", String::from_utf8_lossy(&console));
    }
}

impl Drop for System {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.explain();
        }
        // With its supervisor, whose death is the system's.
        let _ = self.supervisor.kill();
        let _ = self.supervisor.wait();
    }
}
