//! Loads the configuration: at the start, when the file changes and when the agent is told to.

use std::cell::RefCell;
use std::collections::HashSet;
use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use inotify::{EventMask, Inotify, WatchMask, Watches};
use tokio::signal::unix::Signal;

use crate::config::{self, Config, Environment, Findings, LoadError, Loaded, Scope, Severity};
use crate::notify;
use crate::state::{Agent, Source};
use crate::text::{chain, printable};
use crate::watch::Watcher;
use crate::watch::inotify::{Event, Events};

/// The file that the configuration is in.
#[derive(Debug, Clone)]
pub struct ConfigFile {
    /// Where it is.
    pub path: PathBuf,
    /// The user named it, so it must be there.
    pub explicit: bool,
    /// Whose it is.
    pub scope: Scope,
}

/// The loader's state.
#[derive(Debug)]
pub struct Loader {
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
    pub fn start(file: ConfigFile) -> Result<(Self, Source, Option<String>), LoadError> {
        let changes = Changes::watch(&file.path);
        let mut loader = Self {
            file,
            last: None,
            changes,
        };
        let path = loader.file.path.clone();
        let bytes = match config::read_file(&path) {
            Ok(bytes) => bytes,
            Err(LoadError::Missing(_)) if !loader.file.explicit => {
                let name = printable(&path.to_string_lossy());
                let environment = Environment::read(|name| std::env::var(name).ok());
                for (variable, why) in environment.unusable {
                    tracing::warn!("the proxy in {variable} can't be used: {why}");
                }
                let config = match environment.proxy {
                    Some((variable, upstream)) => {
                        tracing::info!(
                            "there is no {name}: everything goes direct, and 'cgtproxy-exec proxy' uses {upstream}, \
                             which {variable} names"
                        );
                        Config::with_proxy(upstream)
                    }
                    None => {
                        tracing::info!("there is no {name}: everything goes direct");
                        None
                    }
                };
                let config = config.unwrap_or_else(Config::without_file);
                return Ok((loader, Source { config, file: None }, None));
            }
            Err(error @ LoadError::Missing(_)) => return Err(error),
            Err(error) => {
                let why = say(&error);
                let source = Source {
                    config: Config::without_file(),
                    file: Some(path),
                };
                return Ok((loader, source, Some(why)));
            }
        };
        let loaded = config::parse(&path, &bytes, loader.file.scope);
        loader.last = Some(bytes);
        let (config, why) = match loaded {
            Ok(Loaded { config, findings }) => {
                log(&findings);
                (config, None)
            }
            Err(error) => (Config::without_file(), Some(say(&error))),
        };
        let file = Some(path);
        Ok((loader, Source { config, file }, why))
    }

    /// Loads the file again and puts it into force, if it has changed or `always`.
    fn reload(&mut self, agent: &Agent, always: bool) {
        let path = &self.file.path;
        let bytes = match config::read_file(path) {
            Ok(bytes) if !always && self.last.as_ref() == Some(&bytes) => return,
            Ok(bytes) => bytes,
            Err(LoadError::Missing(_)) if self.last.is_none() => return,
            Err(error) => {
                // To go direct because an editor took the file away for a moment would be a leak.
                self.last = None;
                return refuse(agent, say(&error));
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
            Err(error) => refuse(agent, say(&error)),
        }
    }
}

/// Logs why there is no configuration, and returns it in one line.
fn say(error: &LoadError) -> String {
    if let LoadError::Invalid(findings) = error {
        log(findings);
        return findings.errors_in_one_line();
    }
    let why = chain(error);
    tracing::error!("{why}");
    why
}

/// Logs what was found in a file.
pub fn log(findings: &Findings) {
    for (severity, line) in findings.lines() {
        match severity {
            Severity::Error => tracing::error!("{line}"),
            Severity::Warning => tracing::warn!("{line}"),
        }
    }
}

/// Keeps the old configuration, if there is one, for a reason that has been logged.
fn refuse(agent: &Agent, why: String) {
    agent.state_mut().config_error = Some(why);
    match agent.state().awaited_configuration() {
        // It tells the service manager.
        Some(_) => agent.wake(),
        None => {
            tracing::error!("the old configuration stays in force");
            agent.tell();
        }
    }
}

/// Reloads when the file changes or `hangup` comes, for ever.
pub async fn run(
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
                // Before it was ready there is nothing that it could be ready with again.
                if agent.state().ready {
                    notify::reloading();
                    agent.state_mut().reloading = true;
                }
                // Whoever asks for a reload may have raised a limit of inotify's.
                {
                    let mut watcher = watcher.borrow_mut();
                    watcher.forget_what_was_said();
                    watcher.scan(&mut *agent.state_mut());
                }
                loader.reload(agent, true);
                loader.changes.arm();
                // The session ends the reload once the helper has taken the configuration.
                agent.wake();
            }
            () = loader.changes.next() => loader.reload(agent, false),
        }
    }
}

/// Tells when a file changes, whether or not it is there yet.
#[derive(Debug)]
struct Changes {
    path: PathBuf,
    inotify: Option<(Watches, Events)>,
    /// Names whose events count.
    names: HashSet<OsString>,
    /// It was said that there are no watches left.
    said: bool,
}

impl Changes {
    fn watch(path: &Path) -> Self {
        let open = || {
            let inotify = Inotify::init()?;
            Ok::<_, io::Error>((inotify.watches(), Events::new(inotify)?))
        };
        let inotify = open()
            .inspect_err(|error| {
                let why = chain(error);
                tracing::warn!("can't watch the configuration: {why}; reload it with SIGHUP");
            })
            .ok();
        let mut changes = Self {
            path: path.to_owned(),
            inotify,
            names: HashSet::new(),
            said: false,
        };
        changes.arm();
        changes
    }

    /// Watches the directories that the file, or what it is a link to, is in or would be in.
    fn arm(&mut self) {
        let Some((watches, _)) = &mut self.inotify else {
            return;
        };
        let mask = WatchMask::CLOSE_WRITE
            | WatchMask::MOVED_TO
            | WatchMask::MOVED_FROM
            | WatchMask::CREATE
            | WatchMask::DELETE
            | WatchMask::ONLYDIR;
        self.names.clear();
        let real = self.path.canonicalize().ok();
        for path in [Some(&self.path), real.as_ref()].into_iter().flatten() {
            let mut above = path.as_path();
            // The directory for it was not there when it was to be watched.
            let mut was_missing = false;
            while let (Some(name), Some(directory)) = (above.file_name(), above.parent()) {
                self.names.insert(name.to_owned());
                let directory = match directory.as_os_str().is_empty() {
                    true => Path::new("."),
                    false => directory,
                };
                match watches.add(directory, mask) {
                    // It was made before what it is in was watched: nothing will tell of it.
                    Ok(_) if was_missing && above.is_dir() => {
                        above = path;
                        was_missing = false;
                        continue;
                    }
                    Ok(_) => {
                        self.said = false;
                        break;
                    }
                    // It may be made.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => was_missing = true,
                    Err(_) if self.said => was_missing = false,
                    Err(error) => {
                        was_missing = false;
                        self.said = true;
                        tracing::warn!(
                            "can't watch '{}' for changes of the configuration: {}; reload it \
                             with SIGHUP",
                            printable(&directory.to_string_lossy()),
                            chain(&error)
                        );
                    }
                }
                above = directory;
            }
        }
    }

    /// Returns when the file may have another content.
    async fn next(&mut self) {
        loop {
            let Some((_, events)) = &mut self.inotify else {
                return std::future::pending().await;
            };
            match events.next().await {
                Ok(batch) => {
                    let counts = batch.iter().any(|event| self.counts(event));
                    if counts {
                        self.arm();
                        return;
                    }
                }
                Err(error) => {
                    tracing::warn!("can't watch the configuration any more: {}", chain(&error));
                    self.inotify = None;
                }
            }
        }
    }

    fn counts(&self, event: &Event) -> bool {
        if event.mask.contains(EventMask::Q_OVERFLOW) {
            return true;
        }
        let name = std::ffi::OsStr::from_bytes(&event.name);
        if !self.names.contains(name) {
            return false;
        }
        // A file that has just been made is empty still: its writer closes it later. A link is
        // complete at once.
        !event.mask.contains(EventMask::CREATE)
            || event.mask.contains(EventMask::ISDIR)
            || std::fs::symlink_metadata(&self.path).is_ok_and(|m| m.is_symlink() || m.nlink() > 1)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// The directory that is watched is not always there when the next one is made in it.
    #[tokio::test]
    async fn a_file_is_seen_however_many_directories_are_made_for_it() {
        for round in 0..300 {
            let home = tempfile::tempdir().unwrap();
            let path = home.path().join("a/b/c/d/e/config.yaml");
            let mut changes = Changes::watch(&path);
            let write = {
                let path = path.clone();
                std::thread::spawn(move || {
                    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                    std::fs::write(&path, "version: 1\n").unwrap();
                })
            };
            while !path.exists() {
                let next = tokio::time::timeout(Duration::from_secs(20), changes.next());
                next.await
                    .unwrap_or_else(|_| panic!("not seen in round {round}"));
            }
            write.join().unwrap();
        }
    }
}
