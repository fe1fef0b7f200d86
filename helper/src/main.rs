//! cgtproxy-helper: owns the nftables table of cgtproxy, its routing rules and its marks, on behalf of users' agents.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use cgtproxy_helper::cgroup::{Root, RootError};
use cgtproxy_helper::cli::Arguments;
use cgtproxy_helper::config::{self, Config};
use cgtproxy_helper::kernel::Linux;
use cgtproxy_helper::mark::MarkRange;
use cgtproxy_helper::monitor::Monitor;
use cgtproxy_helper::nft::{self, Inherited, Nftables, Records, Settings};
use cgtproxy_helper::peer::Uid;
use cgtproxy_helper::route::{self, Family, Routing};
use cgtproxy_helper::server::Server;
use cgtproxy_helper::snapshot::{self, Snapshot};
use cgtproxy_helper::state::State;
use cgtproxy_helper::sys::{map_what_is_long, refuse_descriptors};
use cgtproxy_proto::text::chain;
use cgtproxy_proto::{log, notify, scheduling, socket, usage};
use clap::Parser;
use listenfd::ListenFd;
use rustix::io::Errno;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

/// The exit status for a wrong configuration (sysexits.h): starting again would not help, and the
/// unit says so.
const EX_CONFIG: u8 = 78;

/// How long the helper takes to end where systemd has the socket, if starting again would not help. The agents that wait
/// there have it started again at once, and a socket whose service is started too often (`TriggerLimitBurst=`,
/// systemd.socket(5)) is given up, with everything that its unit then removes.
const PAUSE: Duration = Duration::from_secs(5);

/// Why the helper can't run.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Config(#[from] config::Error),
    #[error(transparent)]
    Root(#[from] RootError),
    #[error(transparent)]
    Nftables(#[from] nft::Error),
    #[error(transparent)]
    Route(#[from] route::Error),
    #[error("can't use the socket that systemd handed over")]
    ActivatedSocket(#[source] io::Error),
    #[error(transparent)]
    Socket(#[from] socket::Error),
    #[error("can't listen to the kernel's announcements")]
    Monitor(#[source] io::Error),
    #[error(
        "users have sent descriptors over more connections than can be kept open; starting again"
    )]
    TooManyParked,
    #[error("can't start")]
    Runtime(#[source] io::Error),
}

impl Error {
    /// Whether it will be so if it is tried again at once: with this configuration, these databases, this kernel, these
    /// rights and limits, or another helper.
    fn is_lasting(&self) -> bool {
        matches!(
            self,
            Self::Config(_)
                | Self::Root(_)
                | Self::Nftables(
                    nft::Error::Socket(_)
                        | nft::Error::NotCapable(_)
                        | nft::Error::Owned(_)
                        | nft::Error::Base(_)
                )
                | Self::Route(_)
                | Self::Monitor(_)
                | Self::Runtime(_)
        )
    }
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return usage::end(&error, usage::WRONG, usage::FAILED),
    };
    // sd_listen_fds(3). It is not said any more once the socket is taken.
    let activated = std::env::var_os("LISTEN_FDS").is_some();
    log::init(&[log::VARIABLE]);
    let result = match arguments {
        Arguments { check: true, .. } => check(&arguments),
        Arguments { remove: true, .. } => remove(&arguments),
        _ => run(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let message = chain(&error);
            tracing::error!("{message}");
            if error.is_lasting() && activated {
                notify::status(&message);
                std::thread::sleep(PAUSE);
            }
            match error {
                Error::Config(error) if error.is_of_the_file() => ExitCode::from(EX_CONFIG),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

/// Loads the configuration, and does nothing with it.
fn check(arguments: &Arguments) -> Result<(), Error> {
    Config::load(arguments.config.as_deref())?;
    Ok(())
}

fn remove(arguments: &Arguments) -> Result<(), Error> {
    // The table has one name whatever the file says, and what else there is mostly goes by the defaults.
    let (config, wrong) = match Config::load(arguments.config.as_deref()) {
        Ok(config) => (config, None),
        Err(error) => (Config::default(), Some(error)),
    };
    if wrong.is_some() {
        tracing::warn!(
            "the configuration can't be used; a routing rule and route are removed only where they are by default"
        );
    }
    remove_by(config.marks, config.route_table, config.rule_priority)?;
    wrong.map_or(Ok(()), |error| Err(error.into()))
}

/// Removes the table, and the routing rules and routes of these marks, this routing table and this priority.
fn remove_by(marks: MarkRange, route_table: u32, rule_priority: u32) -> Result<(), Error> {
    Nftables::remove(marks)?;
    let routing = Routing::open(marks, route_table, rule_priority)?;
    for family in [Family::Ipv4, Family::Ipv6] {
        routing.remove(family)?;
    }
    Ok(())
}

fn run(arguments: &Arguments) -> Result<(), Error> {
    map_what_is_long();
    if let Err(error) = scheduling::take_short_turns() {
        tracing::debug!("can't ask for short slices: {error}");
    }
    let config = Config::load(arguments.config.as_deref())?;
    let root = Root::open(arguments.cgroup_root.as_deref())?;
    // The socket comes first: two helpers would fight over the table, and one socket is what
    // tells them apart on a kernel that does not protect the table.
    let (listener, own_name, stored) = listener(&arguments.socket)?;
    // What is set up is what is removed in the end. The file may be another one by then.
    let (marks, route_table, rule_priority) =
        (config.marks, config.route_table, config.rule_priority);
    let routing = Routing::open(marks, route_table, rule_priority)?;
    let (snapshot, mut records) = Snapshot::open(stored, marks);
    records.locate(|uid, subtree| root.slices(uid, subtree));
    let (nftables, left) = open_table(&config, &records)?;
    drop(records);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Error::Runtime)?;
    let served = tokio::task::LocalSet::new().block_on(&runtime, async {
        let listener = tokio::net::UnixListener::from_std(listener).map_err(Error::Runtime)?;
        let told_to_stop = told_to_stop().map_err(Error::Runtime)?;
        let monitor = Monitor::open(route_table, nftables.port(), !nftables.owned())
            .map_err(Error::Monitor)?;
        let (mut state, graces) =
            State::new(config, root, Linux::new(nftables, routing), snapshot, left)?;
        if !state.ipv6() {
            tracing::info!(
                "the kernel has no IPv6, or it is switched off on lo: only IPv4 is diverted"
            );
        }
        if !state.table_owned() && state.restore_lost_table()? {
            tracing::info!("the table 'inet cgtproxy' was removed by another program; restored it");
        }
        let shutdown = CancellationToken::new();
        let server = Server::new(Rc::new(RefCell::new(state)), shutdown.clone());
        for (uid, grace) in graces {
            server.await_grace(uid, grace);
        }
        server.guard(monitor);
        notify::ready();
        let too_many_parked = too_many_parked(&server);
        let ((), ended) = tokio::join!(server.run(listener), async {
            let ended = tokio::select! {
                () = told_to_stop => Ok(()),
                () = too_many_parked, if own_name.is_none() => Err(Error::TooManyParked),
            };
            notify::stopping();
            shutdown.cancel();
            ended
        });
        ended
    });
    // With systemd's socket the next helper goes on where this one stops, and stopping the socket unit removes
    // everything. Without it, nothing else would remove what is in the kernel.
    if let Some(name) = own_name {
        let removed = remove_by(marks, route_table, rule_priority);
        // Not before that: whoever listens next has made a table of its own.
        drop(name);
        removed?;
    }
    served
}

/// Takes the table over, or makes it, as the configuration says.
fn open_table(
    config: &Config,
    records: &Records,
) -> Result<(Nftables, BTreeMap<Uid, Inherited>), nft::Error> {
    let settings = Settings {
        marks: config.marks,
        proxy_uids: config.proxy_uids.clone(),
        own: config.own_table,
        udp_verdicts: config.udp_verdicts,
    };
    let (nftables, left) = Nftables::open(settings, records)?;
    if config.own_table && !nftables.owned() {
        tracing::info!(
            "the kernel can't protect the table 'inet cgtproxy' from other programs (Linux 6.9 can)"
        );
    }
    Ok((nftables, left))
}

/// Returns what is ready once somebody tells this process to stop.
fn told_to_stop() -> io::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// Returns once too many connections can't be closed, but not so soon that systemd gives the socket up.
fn too_many_parked(server: &Server) -> impl Future<Output = ()> + use<> {
    let (parked, earliest) = (server.parked(), Instant::now() + PAUSE);
    async move {
        parked.too_many().await;
        sleep_until(earliest).await;
    }
}

/// The listening socket, its name if that is to be removed in the end, and the snapshot of an earlier helper.
fn listener(path: &Path) -> Result<(UnixListener, Option<socket::Name>, Option<File>), Error> {
    let (handed_over, stored) = activation().map_err(Error::ActivatedSocket)?;
    let (listener, own_name) = match handed_over {
        Some(listener) => (listener, None),
        None => {
            let (listener, name) = listen(path)?;
            (listener, Some(name))
        }
    };
    match refuse_descriptors(&listener) {
        // Before Linux 6.16 each connection sees to it by itself.
        Err(error) if error.raw_os_error() == Some(Errno::NOPROTOOPT.raw_os_error()) => {}
        refused => refused.map_err(Error::Runtime)?,
    }
    listener.set_nonblocking(true).map_err(Error::Runtime)?;
    Ok((listener, own_name, stored))
}

/// What the service manager hands over: the listening socket, and the snapshot of an earlier helper.
fn activation() -> io::Result<(Option<UnixListener>, Option<File>)> {
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut activated = ListenFd::from_env();
    let (mut listener, mut stored) = (None, None);
    let mut names = names.split(':');
    for index in 0..activated.len() {
        if names.next() != Some(snapshot::NAME) {
            listener = listener.or(activated.take_unix_listener(index)?);
        } else if let Some(number) = activated.take_raw_fd(index)? {
            // Opened again by its path: to own a descriptor that is a bare number would take unsafe code.
            let path = format!("/proc/self/fd/{number}");
            match File::options().read(true).write(true).open(path) {
                Ok(file) => stored = Some(file),
                Err(error) => {
                    tracing::warn!("can't open the snapshot of an earlier helper: {error}");
                }
            }
        }
    }
    Ok((listener, stored))
}

/// Listens on a socket of our own, in place of one that nobody listens on any more.
fn listen(path: &Path) -> Result<(UnixListener, socket::Name), socket::Error> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).map_err(|source| socket::Error::listen(path, source))?;
    }
    // Anybody may connect: what a peer may do depends on its uid.
    socket::bind(path, 0o666, "another helper")
}
