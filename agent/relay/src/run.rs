//! The relay itself, from start to end.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use cgtproxy_proto::socket::{self, Socket, of_relay};
use cgtproxy_proto::text::chain;
use cgtproxy_proto::{log, notify, usage};
use clap::Parser;
use listenfd::ListenFd;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::LocalSet;
use tokio::time::Instant;

use crate::cli::Arguments;
use crate::entry::Shared;
use crate::fake::Fakes;
use crate::original::Originals;
use crate::relay::Relay;
use crate::service;

/// How often what stands for which name is written down.
const SAVE: Duration = Duration::from_secs(5);

/// How many times as long as that takes nothing is written again: everything else waits meanwhile.
const SAVE_PAUSE: u32 = 20;

/// How many threads look up names of proxies, which is all that blocks. Some of them may hang; there are none without need.
const LOOKUPS: usize = 32;

/// Why the relay can't run.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("can't use the socket that systemd handed over")]
    ActivatedSocket(#[source] io::Error),
    #[error(transparent)]
    Socket(#[from] socket::Error),
    #[error("can't start")]
    Start(#[source] io::Error),
}

/// The program.
pub fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return usage::end(&error, usage::WRONG, usage::FAILED),
    };
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
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(LOOKUPS)
        .build()
        .map_err(Error::Start)?;
    let served = LocalSet::new().block_on(&runtime, serve(arguments, handed_over));
    // Nobody waits for names that are being looked up.
    runtime.shutdown_background();
    served
}

async fn serve(arguments: &Arguments, handed_over: Option<UnixListener>) -> Result<(), Error> {
    let socket = socket(arguments, handed_over)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(Error::Start)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::Start)?;
    let shared = Shared::new(
        arguments.connections as usize,
        Originals::new(arguments.helper.clone()),
        Fakes::new(names_file()),
    );
    let relay = Rc::new(Relay::new(shared));
    notify::ready();
    let save = async {
        let mut pause = SAVE;
        loop {
            tokio::time::sleep(pause).await;
            let began = Instant::now();
            relay.save();
            pause = SAVE.max(SAVE_PAUSE * began.elapsed());
        }
    };
    tokio::select! {
        () = service::run(&socket, &relay, service::LINGER) => {}
        () = save => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    notify::stopping();
    relay.save();
    Ok(())
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

/// The socket that systemd has handed over, or one of our own.
fn socket(arguments: &Arguments, handed_over: Option<UnixListener>) -> Result<Socket, Error> {
    if let Some(listener) = handed_over {
        return Socket::handed_over(listener).map_err(Error::ActivatedSocket);
    }
    let path = arguments.socket.clone().unwrap_or_else(of_relay);
    Ok(Socket::listen(&path, "another relay")?)
}
