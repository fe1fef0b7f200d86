//! An ordinary user of the machine.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::Arc;

use super::builder::{AgentBuilder, RelayBuilder};
use super::cgroup::Cgroup;
use super::launch::{Launch, binary};
use super::program::Program;
use super::varlink::Varlink;
use super::world::World;

/// A user with a login session: a delegated cgroup subtree, a home and a runtime directory. There
/// is no entry in /etc/passwd.
#[derive(Clone)]
pub struct User {
    world: Arc<World>,
    uid: u32,
    service: Cgroup,
}

impl User {
    pub(crate) fn create(world: &Arc<World>, uid: u32) -> Self {
        let slice = PathBuf::from(format!("user.slice/user-{uid}.slice"));
        Cgroup::create(world, &slice, 0);
        let service = Cgroup::create(world, &slice.join(format!("user@{uid}.service")), uid);
        service.child("app.slice");
        for parent in ["/run/home", "/run/user"] {
            let directory = Path::new(parent).join(uid.to_string());
            fs::create_dir_all(&directory).expect("/run is ours");
            fs::set_permissions(&directory, fs::Permissions::from_mode(0o700)).unwrap();
            chown(&directory, Some(uid), Some(uid)).expect("root may give away");
        }
        Self {
            world: Arc::clone(world),
            uid,
            service,
        }
    }

    /// The number.
    pub fn uid(&self) -> u32 {
        self.uid
    }

    /// The user's home directory.
    pub fn home(&self) -> PathBuf {
        PathBuf::from(format!("/run/home/{}", self.uid))
    }

    /// The top of the subtree that belongs to the user: `user@UID.service`.
    pub fn service(&self) -> &Cgroup {
        &self.service
    }

    /// A cgroup of the user's, by its path below `user@UID.service`; what is missing is made.
    pub fn cgroup(&self, path: impl AsRef<OsStr>) -> Cgroup {
        self.service.child(path)
    }

    /// The user's agent with that config, to be started.
    pub fn agent(&self, config: &str) -> AgentBuilder {
        AgentBuilder::agent(&self.world, self, config)
    }

    /// The user's relay, to be started.
    pub fn relay(&self) -> RelayBuilder {
        RelayBuilder::relay(&self.world, self)
    }

    /// Starts a program that is no part of the product as the user, in that cgroup. Dropped, it is
    /// killed.
    ///
    /// # Panics
    /// When there is no such program.
    #[track_caller]
    pub fn program(&self, cgroup: &Cgroup, argv: &[&str]) -> Program {
        Program::start(&self.world, self.launch_in(cgroup), argv)
    }

    /// Starts a server of the test bed's own as the user, in a cgroup of its own: `socks`, `speaker` and the
    /// like, with its arguments. Dropped, it is killed.
    ///
    /// # Panics
    /// When there is no such program.
    #[track_caller]
    pub fn server(&self, role: &[&str]) -> Program {
        let program = binary("cgtproxy-testapp");
        let program = program.to_str().expect("a path of our own");
        let cgroup = self.cgroup(format!("app.slice/server-{}.scope", self.world.number()));
        self.program(&cgroup, &[&[program], role].concat())
    }

    /// What a program says that runs to its end as the user in that cgroup, and succeeds.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn output(&self, cgroup: &Cgroup, argv: &[&str]) -> String {
        let (program, arguments) = argv.split_first().expect("a program");
        let output = self
            .launch_in(cgroup)
            .command(program)
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .unwrap_or_else(|e| panic!("cannot run {program}: {e}"));
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{argv:?}: {said}{errors}");
        said
    }

    /// Runs one of the product's binaries as the user, to its end, in a cgroup of its own.
    pub fn run<S: AsRef<OsStr>>(&self, program: &str, arguments: &[S]) -> Output {
        let cgroup = self.cgroup(format!("app.slice/run-{}.scope", self.world.number()));
        let output = self
            .launch_in(&cgroup)
            .command(binary(program))
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .unwrap_or_else(|e| panic!("cannot run {program}: {e}"));
        cgroup.remove();
        output
    }

    /// Runs a shell script as the user that must succeed, outside of the user's own subtree, and
    /// returns its stdout.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn shell(&self, script: &str) -> String {
        let output = self
            .launch_in(&self.session())
            .command("/bin/sh")
            .args(["-euc", script])
            .stdin(Stdio::null())
            .output()
            .expect("there is a shell");
        assert!(
            output.status.success(),
            "`{script}` failed ({}): {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// A connection to a Varlink service whose peer is this user. The peer's process is in a login
    /// session, so that it does not keep the user's service from being removed.
    pub fn varlink(&self, socket: impl AsRef<Path>) -> Varlink {
        Varlink::connect(&self.launch_in(&self.session()), socket.as_ref())
    }

    pub(crate) fn session(&self) -> Cgroup {
        let session = format!("user.slice/user-{}.slice/session-1.scope", self.uid);
        Cgroup::create(&self.world, Path::new(&session), 0)
    }

    pub(crate) fn launch_in(&self, cgroup: &Cgroup) -> Launch {
        Launch::root().uid(self.uid).cgroup(&cgroup.directory())
    }
}
