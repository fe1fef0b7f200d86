//! Loads the configuration: at the start, when the file changes and when the agent is told to.

mod changes;
mod way;

use std::cell::RefCell;
use std::io;
use std::path::Path;

use tokio::signal::unix::Signal;

use crate::config::{
    self, Config, ConfigFile, Environment, Findings, LoadError, Loaded, Scope, Severity,
};
use crate::notify;
use crate::otherwise::Otherwise;
use crate::state::{Agent, FileError, Source};
use crate::text::{chain, printable};
use crate::watch::Watcher;

use changes::Changes;

/// The loader's state.
#[derive(Debug)]
pub(crate) struct Loader {
    file: ConfigFile,
    /// What was in the file when it was read last; none if it was not there.
    last: Option<Vec<u8>>,
    changes: Changes,
}

impl Loader {
    /// Loads the configuration for the first time. From then on its file is watched: before the
    /// control groups, which may leave no watches over. If it is wrong, the last value says how, and the source is
    /// nobody's configuration: a right one is waited for.
    ///
    /// # Errors
    /// If the user named a file that is not there.
    pub(crate) fn start(file: ConfigFile) -> Result<(Self, Source, Option<FileError>), LoadError> {
        let changes = Changes::watch(&file.path);
        let mut loader = Self {
            file,
            last: None,
            changes,
        };
        let path = loader.file.path.clone();
        let scope = loader.file.scope;
        let loaded = match config::read_file(&path) {
            Ok(bytes) => {
                let loaded = config::parse(&path, &bytes, scope);
                loader.last = Some(bytes);
                loaded
            }
            Err(LoadError::Missing(_)) if !loader.file.explicit => {
                let config = without_file(&path, scope);
                return Ok((loader, Source { config, file: None }, None));
            }
            Err(error @ LoadError::Missing(_)) => return Err(error),
            Err(error) => Err(error),
        };
        let (config, why) = match loaded {
            Ok(Loaded { config, findings }) => {
                log(&findings);
                (config, None)
            }
            Err(error) => (Config::without_file(scope), Some(say(&error))),
        };
        let file = Some(path);
        Ok((loader, Source { config, file }, why))
    }

    /// Loads the file again and puts it into force, if it has changed or `always`.
    fn reload(&mut self, agent: &Agent, always: bool) {
        let path = &self.file.path;
        // Whoever saves one again that was taken back means it to be tried.
        let unchanged_is_fine = !always && !agent.state().is_postponed();
        let bytes = match config::read_file(path) {
            Ok(bytes) if unchanged_is_fine && self.last.as_ref() == Some(&bytes) => return,
            Ok(bytes) => bytes,
            Err(error) => {
                let said = agent.state().file_error().map(|error| error.whole.clone());
                match &error {
                    // There is none still.
                    LoadError::Missing(_) if self.last.is_none() && said.is_none() => return,
                    error if !always && said.is_some_and(|said| said == chain(error)) => return,
                    _ => {}
                }
                // To go direct because an editor took the file away for a moment would be a leak.
                self.last = None;
                return refuse(agent, &error);
            }
        };
        let loaded = config::parse(path, &bytes, self.file.scope);
        self.last = Some(bytes);
        match loaded {
            Ok(Loaded { config, findings }) => {
                log(&findings);
                let name = printable(&path.to_string_lossy());
                tracing::info!("loaded {name}");
                agent.replace_config(Source {
                    config,
                    file: Some(path.clone()),
                });
            }
            Err(error) => refuse(agent, &error),
        }
    }
}

/// What holds without a file at `path`, which is logged.
fn without_file(path: &Path, scope: Scope) -> Config {
    let name = printable(&path.to_string_lossy());
    let goes = Otherwise::new(scope, 0, None, None).goes();
    // Those are the proxies of users' programs, and the relay that leads to them is a user's.
    let environment = Environment::read(|name| {
        let users = scope == Scope::User;
        users.then(|| std::env::var(name).ok()).flatten()
    });
    for (variable, why) in environment.unusable {
        tracing::warn!("the proxy in {variable} can't be used: {why}");
    }
    let config = match environment.proxy {
        Some((variable, upstream)) => {
            tracing::info!(
                "there is no {name}: everything {goes}, and 'cgtproxy-exec proxy' uses {upstream}, which {variable} \
                 names"
            );
            Config::with_proxy(upstream)
        }
        None => {
            tracing::info!("there is no {name}: everything {goes}");
            None
        }
    };
    config.unwrap_or_else(|| Config::without_file(scope))
}

/// Logs why there is no configuration, and returns it.
fn say(error: &LoadError) -> FileError {
    let LoadError::Invalid(findings) = error else {
        let why = chain(error);
        tracing::error!("{why}");
        return FileError {
            short: why.clone(),
            whole: why,
        };
    };
    log(findings);
    FileError {
        whole: findings.errors_in_one_line(),
        short: first_mistake(findings),
    }
}

/// Logs what was found in a file.
pub(crate) fn log(findings: &Findings) {
    for (severity, line) in findings.lines() {
        match severity {
            Severity::Error => tracing::error!("{line}"),
            Severity::Warning => tracing::warn!("{line}"),
        }
    }
}

/// Logs why there is no other configuration, and keeps the old one, if there is one.
fn refuse(agent: &Agent, error: &LoadError) {
    let why = say(error);
    agent.state_mut().keep_config(why);
    if agent.state().awaited_configuration().is_none() {
        tracing::error!("the old configuration stays in force");
    }
    // The session tells the service manager.
    agent.wake();
}

/// Where the first of all mistakes is.
fn first_mistake(findings: &Findings) -> String {
    let file = findings.file.file_name().unwrap_or_default();
    let file = printable(&file.to_string_lossy());
    let mut errors = findings
        .list
        .iter()
        .filter(|f| f.severity == Severity::Error);
    match errors.find_map(|finding| finding.place) {
        Some(place) => format!("{file} has a mistake in line {}", place.line),
        None => format!("{file} has a mistake"),
    }
}

/// Reloads when the file changes or `hangup` comes, for ever.
pub(crate) async fn run(
    mut loader: Loader,
    agent: &Agent,
    watcher: &RefCell<Watcher>,
    mut hangup: Signal,
) -> io::Result<()> {
    loop {
        tokio::select! {
            received = hangup.recv() => {
                if received.is_none() {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                if agent.state_mut().readiness.begin_reload() {
                    notify::reloading();
                }
                // Whoever asks for a reload may have raised a limit of inotify's.
                {
                    let mut watcher = watcher.borrow_mut();
                    watcher.forget_what_was_said();
                    agent.state_mut().said.forget();
                    watcher.scan(&mut *agent.state_mut());
                }
                loader.changes.arm();
                loader.reload(agent, true);
                // The session ends the reload once the helper has taken the configuration.
                agent.wake();
            }
            () = loader.changes.next() => loader.reload(agent, false),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn without_a_file_the_machine_has_no_policy_of_a_user() {
        let home = tempfile::tempdir().unwrap();
        let rules = |scope| {
            let file = ConfigFile {
                path: home.path().join("config.yaml"),
                explicit: false,
                scope,
            };
            let (_, source, _) = Loader::start(file).unwrap();
            source.config.rules.clone()
        };
        let (user, system) = (rules(Scope::User), rules(Scope::System));
        assert!(user.users && user.exec_slices.is_some());
        assert!(!system.users && system.exec_slices.is_none());
    }
}
