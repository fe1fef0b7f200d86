//! The product's daemons, as a test wants them: configured, then started.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;

use super::cgroup::Cgroup;
use super::launch::Launch;
use super::network::state_dir;
use super::service::{SOCKET, Service, Spec, write_atomically};
use super::user::User;
use super::world::World;

/// The uid the helper has in the sandbox: a system user, not root.
pub const HELPER_UID: u32 = 990;

/// A helper to be.
pub type HelperBuilder = Builder<Helper>;
/// An agent to be.
pub type AgentBuilder = Builder<Agent>;
/// A relay to be.
pub type RelayBuilder = Builder<Relay>;

/// A daemon to be.
pub struct Builder<D> {
    world: Arc<World>,
    daemon: D,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
}

/// Which daemon it is, and what only that one can be told.
pub trait Daemon {
    /// How it is started, before a test's own arguments and variables.
    fn spec(self) -> Spec;
}

impl<D: Daemon> Builder<D> {
    fn new(world: &Arc<World>, daemon: D) -> Self {
        Self {
            world: Arc::clone(world),
            daemon,
            arguments: Vec::new(),
            environment: Vec::new(),
        }
    }

    /// With another argument.
    pub fn argument(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.arguments.push(argument.as_ref().to_owned());
        self
    }

    /// With a variable.
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.environment
            .push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Starts it; it is ready when this returns.
    ///
    /// # Panics
    /// When it does not get ready.
    #[track_caller]
    pub fn start(self) -> Service {
        let mut service = self.spawn();
        service.wait_ready();
        service
    }

    /// Starts it without waiting for it to be ready.
    pub fn spawn(self) -> Service {
        let mut spec = self.daemon.spec();
        spec.arguments.extend(self.arguments);
        spec.environment.extend(self.environment);
        Service::spawn(&self.world, spec)
    }
}

/// The helper.
pub struct Helper {
    cgroup: Cgroup,
    config: Option<String>,
    listener: Option<UnixListener>,
}

impl HelperBuilder {
    pub(crate) fn helper(world: &Arc<World>) -> Self {
        let path = Path::new("system.slice/cgtproxy-helper.service");
        let helper = Helper {
            cgroup: Cgroup::create(world, path, 0),
            config: None,
            listener: None,
        };
        Self::new(world, helper)
    }

    /// With a socket that was there before it, as it has one from systemd.
    pub fn listener(mut self, listener: UnixListener) -> Self {
        self.daemon.listener = Some(listener);
        self
    }

    /// Makes such a socket, where everybody connects who connects to a helper.
    ///
    /// # Panics
    /// When there is one already.
    pub fn bind() -> UnixListener {
        let directory = Path::new(SOCKET).parent().expect("it is in a directory");
        fs::create_dir_all(directory).expect("/run is ours");
        let listener = UnixListener::bind(SOCKET).expect("nobody listens there yet");
        fs::set_permissions(SOCKET, fs::Permissions::from_mode(0o666)).unwrap();
        listener
    }

    /// With that text for its configuration.
    pub fn config(mut self, yaml: &str) -> Self {
        self.daemon.config = Some(yaml.to_owned());
        self
    }
}

impl Daemon for Helper {
    fn spec(self) -> Spec {
        let directory = Path::new(SOCKET).parent().expect("it is in a directory");
        fs::create_dir_all(directory).expect("/run is ours");
        chown(directory, Some(HELPER_UID), Some(HELPER_UID)).expect("root may give away");
        let mut arguments: Vec<OsString> = vec!["--socket".into(), SOCKET.into()];
        let config = with_udp_verdicts(self.config).map(|text| {
            let path = state_dir("etc").join("helper.yaml");
            write_atomically(&path, &text, 0);
            arguments.extend(["--config".into(), path.clone().into()]);
            path
        });
        let wrapper = self
            .listener
            .as_ref()
            .map_or_else(Vec::new, |_| activated());
        Spec {
            program: "cgtproxy-helper",
            stdin: self.listener.map(OwnedFd::from),
            arguments,
            environment: Vec::new(),
            launch: Launch::root()
                .uid(HELPER_UID)
                .capabilities(&["net_admin"])
                .cgroup(&self.cgroup.directory()),
            config,
            uid: 0,
            wrapper,
        }
    }
}

/// A configuration with the `udp-verdicts` that the tests are to be run with, where a test doesn't say which.
fn with_udp_verdicts(config: Option<String>) -> Option<String> {
    let Ok(verdicts) = env::var("CGTPROXY_TEST_UDP_VERDICTS") else {
        return config;
    };
    let config = config.unwrap_or_default();
    if config.contains("udp-verdicts") {
        return Some(config);
    }
    Some(format!("{}\nudp-verdicts: {verdicts}\n", config.trim_end()))
}

/// An agent.
pub struct Agent {
    user: User,
    config: Option<String>,
    in_session: bool,
    watches: Option<u32>,
}

impl AgentBuilder {
    pub(crate) fn agent(world: &Arc<World>, user: &User, config: &str) -> Self {
        let agent = Agent {
            user: user.clone(),
            config: Some(config.to_owned()),
            in_session: false,
            watches: None,
        };
        Self::new(world, agent)
    }

    /// In a login session of the user's, not in the user's own subtree.
    pub fn in_session(mut self) -> Self {
        self.daemon.in_session = true;
        self
    }

    /// With no more than so many inotify watches; see [`Sandbox::limit_watches`](super::Sandbox::limit_watches).
    pub fn watches(mut self, count: u32) -> Self {
        self.daemon.watches = Some(count);
        self
    }

    /// Without a config file, and without being told of one.
    pub fn without_config(mut self) -> Self {
        self.daemon.config = None;
        self
    }
}

impl Daemon for Agent {
    fn spec(self) -> Spec {
        let uid = self.user.uid();
        let cgroup = if self.in_session {
            self.user.session()
        } else {
            self.user.cgroup("app.slice/cgtproxy-agent.service")
        };
        let mut arguments: Vec<OsString> = vec!["run".into(), "--socket".into(), SOCKET.into()];
        let config = self.config.map(|text| {
            let mut path = self.user.home();
            for part in [".config", "cgtproxy"] {
                path.push(part);
                fs::create_dir_all(&path).expect("the user's home");
                chown(&path, Some(uid), Some(uid)).expect("root may give away");
            }
            path.push("config.yaml");
            write_atomically(&path, &text, uid);
            arguments.extend(["--config".into(), path.clone().into()]);
            path
        });
        Spec {
            program: "cgtproxy-agent",
            stdin: None,
            arguments,
            environment: Vec::new(),
            launch: self.user.launch_in(&cgroup),
            config,
            uid,
            wrapper: self
                .watches
                .map_or_else(Vec::new, |count| few_watches(uid, count)),
        }
    }
}

/// A relay.
pub struct Relay {
    user: User,
}

impl RelayBuilder {
    pub(crate) fn relay(world: &Arc<World>, user: &User) -> Self {
        Self::new(world, Relay { user: user.clone() })
    }
}

impl Daemon for Relay {
    fn spec(self) -> Spec {
        let cgroup = self.user.cgroup("session.slice/cgtproxy-relay.service");
        Spec {
            program: "cgtproxy-relay",
            stdin: None,
            arguments: Vec::new(),
            environment: Vec::new(),
            launch: self.user.launch_in(&cgroup),
            config: None,
            uid: self.user.uid(),
            wrapper: Vec::new(),
        }
    }
}

/// A command that runs another one with what it has for its standard input as the socket that the service manager hands
/// over (sd_listen_fds(3)).
fn activated() -> Vec<OsString> {
    let script = "exec 3<&0 </dev/null; export LISTEN_FDS=1 LISTEN_PID=$$; exec \"$@\"";
    ["sh", "-c", script, "sh"].map(OsString::from).to_vec()
}

/// A command that runs another one with no more than so many inotify watches: in a user namespace
/// of its own, in which the user is the same one and has no more rights.
fn few_watches(uid: u32, count: u32) -> Vec<OsString> {
    let script = format!(
        "echo {count} > /proc/sys/user/max_inotify_watches && \
         exec setpriv --inh-caps=-all --ambient-caps=-all \"$@\""
    );
    let map = format!("--map-user={uid}");
    [
        "unshare",
        "--user",
        &map,
        "--keep-caps",
        "sh",
        "-c",
        &script,
        "sh",
    ]
    .map(OsString::from)
    .to_vec()
}
