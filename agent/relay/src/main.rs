//! cgtproxy-relay: carries redirected connections on to SOCKS5 and HTTP proxies.

#![forbid(unsafe_code)]

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use cgtproxy_proto::text::chain;
use cgtproxy_proto::{log, notify};
use cgtproxy_relay::cli::Arguments;
use cgtproxy_relay::fake::Fakes;
use cgtproxy_relay::original::Originals;
use cgtproxy_relay::relay::{Relay, Shared};
use cgtproxy_relay::service;
use clap::Parser;
use listenfd::ListenFd;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::LocalSet;

/// How often what stands for which name is written down.
const SAVE: Duration = Duration::from_secs(5);

/// How many threads look up names of proxies, which is all that blocks.
const LOOKUPS: usize = 8;

/// Why the relay can't run.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("can't use the socket that systemd handed over")]
    ActivatedSocket(#[source] io::Error),
    #[error("there is no XDG_RUNTIME_DIR: name a socket with --socket")]
    NoRuntimeDirectory,
    #[error("another relay listens on {}", .0.display())]
    InUse(PathBuf),
    #[error("can't listen on {}", .path.display())]
    Listen { path: PathBuf, source: io::Error },
    #[error("can't start")]
    Start(#[source] io::Error),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    log::init(&[log::VARIABLE]);
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), Error> {
    let handed_over = ListenFd::from_env()
        .take_unix_listener(0)
        .map_err(Error::ActivatedSocket)?;
    let (listener, own) = match handed_over {
        Some(listener) => (listener, None),
        None => {
            let path = match &arguments.socket {
                Some(path) => path.clone(),
                None => default_socket().ok_or(Error::NoRuntimeDirectory)?,
            };
            (listen(&path)?, Some(path))
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(LOOKUPS)
        .build()
        .map_err(Error::Start)?;
    let served = LocalSet::new().block_on(&runtime, serve(arguments, listener));
    if let Some(path) = own {
        let _ = std::fs::remove_file(path);
    }
    served
}

async fn serve(arguments: &Arguments, listener: UnixListener) -> Result<(), Error> {
    let mut terminate = signal(SignalKind::terminate()).map_err(Error::Start)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::Start)?;
    listener.set_nonblocking(true).map_err(Error::Start)?;
    let listener = tokio::net::UnixListener::from_std(listener).map_err(Error::Start)?;
    let shared = Shared::new(
        arguments.connections as usize,
        Originals::new(arguments.helper.clone()),
        Fakes::new(names_file()),
    );
    let relay = Rc::new(Relay::new(shared));
    notify::ready();
    let save = async {
        loop {
            tokio::time::sleep(SAVE).await;
            relay.save();
        }
    };
    tokio::select! {
        () = service::run(listener, relay.clone(), service::LINGER) => {}
        () = save => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    notify::stopping();
    relay.save();
    Ok(())
}

fn default_socket() -> Option<PathBuf> {
    Some(directory("XDG_RUNTIME_DIR")?.join("cgtproxy-relay.sock"))
}

/// Where what stands for which name is written down: systemd's StateDirectory=, or as XDG has it.
fn names_file() -> Option<PathBuf> {
    let state = directory("STATE_DIRECTORY").or_else(|| {
        let home = || Some(directory("HOME")?.join(".local/state"));
        Some(directory("XDG_STATE_HOME").or_else(home)?.join("cgtproxy"))
    });
    Some(state?.join("names"))
}

fn directory(variable: &str) -> Option<PathBuf> {
    let directory = PathBuf::from(std::env::var_os(variable)?);
    directory.is_absolute().then_some(directory)
}

/// Listens on a socket of our own, in place of one that nobody listens on any more.
fn listen(path: &Path) -> Result<UnixListener, Error> {
    let failed = |source| Error::Listen {
        path: path.to_owned(),
        source,
    };
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(Error::InUse(path.to_owned()));
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    let private = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(path, private).map_err(failed)?;
    Ok(listener)
}
