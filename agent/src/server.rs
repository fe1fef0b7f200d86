//! Serves `org.cgtproxy.Agent` to the user's own programs.

use std::cell::RefCell;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use cgtproxy_proto::agent::{
    self as wire, AwaitTarget_Args, AwaitTarget_Reply, Explain_Args, Explain_Reply,
    GetStatus_Reply, GetTargets_Reply,
};
use cgtproxy_proto::limits::PATH_BYTES;
use cgtproxy_proto::path::ControlGroupPath;
use cgtproxy_proto::service::{
    Answer, Fault, Identity, Parameters, Service, no_parameters, parameters, reply,
};
use cgtproxy_proto::socket::{Error, Socket};
use serde_json::json;
use tokio::time::{Instant, timeout_at};

use crate::config::Scope;
use crate::policy::Target;
use crate::relay;
use crate::state::{Agent, Awaited, Link, State};
use crate::systemd::runtime_directory;
use crate::view;
use crate::watch::Watcher;

/// The longest call: a path, escaped, and what is around it.
const MESSAGE_BYTES: usize = 8 * PATH_BYTES;

/// How many programs may be connected at once.
const CONNECTIONS: usize = 64;

/// Where the system's agent listens.
const SYSTEM_SOCKET: &str = "/run/cgtproxy-agent-system/agent.sock";

/// How long a caller waits for a verdict that does not get into the kernel.
const PATIENCE: Duration = Duration::from_secs(4);

/// How long a caller waits for a helper that is not there: long enough for one that restarts.
const HELPER_PATIENCE: Duration = Duration::from_secs(1);

/// Where the agent of a user listens.
pub(crate) fn default_socket(scope: Scope) -> PathBuf {
    if scope == Scope::System {
        return SYSTEM_SOCKET.into();
    }
    runtime_directory().join("cgtproxy/agent.sock")
}

/// Listens on `path`. A socket on which nobody listens any more is replaced. A directory that is not there is made, for
/// this user alone; one that is there stays as it is, for it may be everybody's.
///
/// # Errors
/// If somebody listens on it, or it can't be made.
pub(crate) fn listen(path: &Path) -> Result<Socket, Error> {
    if let Some(directory) = path.parent() {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(|source| Error::listen(path, source))?;
    }
    Socket::listen(path, "another agent of this user")
}

/// Serves for ever. To be run within a `LocalSet`.
pub(crate) async fn run(socket: &Socket, agent: &Rc<Agent>, watcher: &Rc<RefCell<Watcher>>) {
    let connection = || Connection {
        agent: agent.clone(),
        watcher: watcher.clone(),
    };
    socket.serve(CONNECTIONS, MESSAGE_BYTES, connection).await;
}

/// One program that is connected.
struct Connection {
    agent: Rc<Agent>,
    watcher: Rc<RefCell<Watcher>>,
}

impl Connection {
    fn status(&self) -> GetStatus_Reply {
        let state = self.agent.state();
        let groups: Vec<_> = state
            .tree()
            .iter()
            .filter_map(|path| view::control_group(&state, path))
            .collect();
        let (awaits, problem) = match &state.link {
            Link::Connected => (None, state.problem()),
            // What is wrong with it has a place of its own.
            Link::Waiting(Awaited::Configuration(_)) => (
                Some(wire::Awaited::configuration),
                Some(Awaited::CONFIGURATION.into()),
            ),
            Link::Waiting(Awaited::ControlGroup(_)) => {
                (Some(wire::Awaited::controlGroup), state.link.problem())
            }
            Link::Broken(_) => (None, state.link.problem()),
        };
        let (source, watching) = (state.source(), &state.watching);
        GetStatus_Reply {
            version: env!("CARGO_PKG_VERSION").into(),
            connected: state.link == Link::Connected,
            awaits,
            problem,
            generation: state.generation,
            config: source.file.as_deref().map(view::file),
            configError: state.config_error().map(str::to_owned),
            monitors: Some(watching.by.iter().map(|&by| by.to_owned()).collect()),
            monitorProblem: watching.problem.clone(),
            targets: view::targets(&source.config, &state.relay, &groups),
            controlGroups: groups,
            rules: Some(view::rules(&source.config)),
        }
    }

    fn targets(&self) -> GetTargets_Reply {
        let state = self.agent.state();
        GetTargets_Reply {
            targets: state.source().config.target_names(),
            problem: state.link.problem(),
            configError: state.config_error().map(str::to_owned),
        }
    }

    fn explain(&self, name: &str) -> Result<Explain_Reply, Fault> {
        let found = self.find(name);
        let state = self.agent.state();
        let group = found.and_then(|path| view::control_group(&state, &path));
        let group = group.ok_or_else(|| not_found(name))?;
        let source = state.source();
        Ok(view::explained(
            &source.config,
            source.file.as_deref(),
            group,
        ))
    }

    /// A control group by its path, from the control group root or the subtree's, or its unit.
    fn find(&self, name: &str) -> Option<ControlGroupPath> {
        if name.starts_with('/') {
            let path = self.agent.state().subtree.of_wire(name)?;
            self.look_if_unknown(&path);
            return Some(path);
        }
        let path = ControlGroupPath::from_wire(name).ok()?;
        let state = self.agent.state();
        view::find(state.tree().iter(), &path).cloned()
    }

    /// Word of a control group that was made a moment ago may be on its way.
    fn look_if_unknown(&self, path: &ControlGroupPath) {
        let known = self.agent.state().tree().contains(path);
        if !known {
            self.look(path);
        }
    }

    fn look(&self, path: &ControlGroupPath) {
        {
            let mut state = self.agent.state_mut();
            self.watcher.borrow_mut().look(path, &mut *state);
        }
        // Those who await a target look again after every change. If each look woke them, they would never stop.
        self.agent.wake_if_news();
    }

    async fn await_target(&self, name: &str, target: &str) -> Result<AwaitTarget_Reply, Fault> {
        let path = self.agent.state().subtree.of_wire(name);
        let path = path.ok_or_else(|| not_found(name))?;
        // The slice that the verdict is from may be gone, and another one may have its path: inotify's queue says so.
        self.look(&path);
        let mut changed = self.agent.subscribe();
        let started = Instant::now();
        loop {
            changed.mark_unchanged();
            self.look_if_unknown(&path);
            let (progress, connected) = {
                let state = self.agent.state();
                let connected = state.link == Link::Connected;
                (progress(&state, &path, name, target), connected)
            };
            let problem = match progress {
                Progress::InForce => return Ok(AwaitTarget_Reply {}),
                Progress::Never(fault) => return Err(fault),
                Progress::NotYet(problem) => problem,
            };
            let patience = if connected { PATIENCE } else { HELPER_PATIENCE };
            let news = timeout_at(started + patience, changed.changed()).await;
            if news.is_err() {
                let parameters = json!({ "problem": problem });
                return Err(Fault::new(wire_name(), "NotConnected", parameters));
            }
        }
    }
}

/// How far it is with a control group getting a target.
enum Progress {
    /// The kernel has the verdict.
    InForce,
    /// It is not in the kernel, for this reason, and may come.
    NotYet(String),
    /// It will not come: this is answered.
    Never(Fault),
}

/// How far it is with the control group at `path`, which the caller calls `name`, getting this target.
fn progress(state: &State, path: &ControlGroupPath, name: &str, target: &str) -> Progress {
    // Nobody knows yet which targets there are.
    if let Some(awaited) = state.awaited_configuration() {
        return Progress::NotYet(awaited.to_string());
    }
    let config = &state.source().config;
    let Some(wanted) = config.target(target) else {
        let parameters = json!({ "name": target, "known": config.target_names() });
        return Progress::Never(Fault::new(wire_name(), "UnknownTarget", parameters));
    };
    let Some(verdict) = state.tree().get(path) else {
        return Progress::Never(not_found(name));
    };
    let has = &verdict.target;
    if *has != wanted && !(wanted == Target::Drop && *has == Target::DropAll) {
        let parameters = json!({ "controlGroup": name, "target": has.name() });
        return Progress::Never(Fault::new(wire_name(), "OtherTarget", parameters));
    }
    if state.in_force(path) {
        return match relay::lacks(state, has) {
            Some(why) => Progress::NotYet(why),
            None => Progress::InForce,
        };
    }
    if let Some(why) = state.link.problem() {
        return Progress::NotYet(why);
    }
    if let Some(reason) = view::skipped(state, path).filter(|reason| *reason != view::NO_ROOM) {
        let why = view::named_sentence(reason);
        return Progress::NotYet(format!("the helper passed it over: {why}"));
    }
    let problem = state.problem();
    Progress::NotYet(problem.unwrap_or_else(|| "the helper does not answer".into()))
}

fn wire_name() -> &'static str {
    wire::INTERFACE
}

fn not_found(name: &str) -> Fault {
    let parameters = json!({ "controlGroup": name });
    Fault::new(wire_name(), "ControlGroupNotFound", parameters)
}

impl Service for Connection {
    const IDENTITY: Identity = Identity {
        product: "cgtproxy-agent",
        version: env!("CARGO_PKG_VERSION"),
        interface: wire::INTERFACE,
        description: wire::DESCRIPTION,
    };

    async fn call(&mut self, method: &str, arguments: Parameters<'_>) -> Result<Answer, Fault> {
        match method {
            "GetStatus" => {
                no_parameters(arguments)?;
                reply(self.status())
            }
            "GetTargets" => {
                no_parameters(arguments)?;
                reply(self.targets())
            }
            "Explain" => {
                let Explain_Args { controlGroup } = parameters(arguments)?;
                reply(self.explain(&controlGroup)?)
            }
            "AwaitTarget" => {
                let AwaitTarget_Args {
                    controlGroup,
                    target,
                } = parameters(arguments)?;
                reply(self.await_target(&controlGroup, &target).await?)
            }
            _ => Err(Self::no_such_method(method)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::config::{Config, Monitor};
    use crate::state::{FileError, Source};
    use crate::subtree::Subtree;
    use crate::watch;

    #[tokio::test]
    async fn leaves_a_directory_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let open = std::fs::Permissions::from_mode(0o1777);
        std::fs::set_permissions(directory.path(), open).unwrap();
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o7777;
        let socket = listen(&directory.path().join("a.sock")).unwrap();
        assert_eq!(mode(directory.path()), 0o1777);
        let own = directory.path().join("own");
        let other = listen(&own.join("a.sock")).unwrap();
        assert_eq!(mode(&own), 0o700);
        drop((socket, other));
    }

    #[tokio::test]
    async fn to_look_for_what_is_not_there_wakes_nobody() {
        let directory = tempfile::tempdir().unwrap();
        let subtree = Subtree::of_machine(directory.path().to_owned());
        let source = Source {
            config: Config::without_file(Scope::User),
            file: None,
        };
        let wrong = FileError {
            whole: "wrong".into(),
            short: "wrong".into(),
        };
        let agent = Rc::new(Agent::new(subtree.clone(), source, Some(wrong)));
        let (_sources, watcher) = watch::open(subtree, Monitor::Inotify);
        let connection = Connection {
            agent: agent.clone(),
            watcher: Rc::new(RefCell::new(watcher)),
        };
        let path = ControlGroupPath::from_wire("a").unwrap();
        connection.look(&path);
        let changed = agent.subscribe();
        connection.look(&path);
        assert!(!changed.has_changed().unwrap());
        std::fs::create_dir(directory.path().join("a")).unwrap();
        connection.look(&path);
        assert!(changed.has_changed().unwrap());
    }
}
