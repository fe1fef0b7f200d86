//! TCP connections.

use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::Duration;

use rustix::net::sockopt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout};

use crate::conntrack;
use crate::copy;
use crate::relay::Entry;
use crate::upstream::{self, Error, Stream};

/// How long to wait after accept(2) failed.
const BACK_OFF: Duration = Duration::from_millis(50);

/// How long a connection may be silent before its ends are asked whether they are there still.
const KEEPALIVE: Duration = Duration::from_secs(120);

/// How long conntrack remembers a silent connection of which one side has ended, by the kernel's own default
/// (net/netfilter/nf_conntrack_proto_tcp.c). One that is open it remembers for days.
const CLOSE_WAIT: Duration = Duration::from_secs(60);

/// Accepts connections until the proxy is gone.
pub(crate) async fn run(listener: TcpListener, at: SocketAddr, entry: Rc<Entry>) {
    while let Some((stream, permit)) = accept(&listener, &entry).await {
        tokio::task::spawn_local(serve(stream, at, entry.clone(), permit));
    }
}

/// The next connection that there is room for; none any more once the proxy is gone.
pub(crate) async fn accept(
    listener: &TcpListener,
    entry: &Entry,
) -> Option<(TcpStream, OwnedSemaphorePermit)> {
    let mut told = false;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = entry.gone.cancelled() => return None,
        };
        match accepted {
            Ok((stream, _)) => match entry.shared.connections.clone().try_acquire_owned() {
                Ok(permit) => return Some((stream, permit)),
                Err(_) => {
                    let limit = entry.shared.limit;
                    tracing::debug!("refused a connection: there are {limit} already");
                    reset(&stream);
                }
            },
            Err(error) => {
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!("can't accept a connection, and tries on: {error}");
                }
                tokio::time::sleep(BACK_OFF).await;
            }
        }
    }
}

/// Counts something for as long as it lives.
pub(crate) struct Counted<'a>(&'a Cell<usize>);

impl<'a> Counted<'a> {
    pub(crate) fn new(count: &'a Cell<usize>) -> Self {
        count.set(count.get() + 1);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get().saturating_sub(1));
    }
}

async fn serve(
    mut client: TcpStream,
    at: SocketAddr,
    entry: Rc<Entry>,
    _permit: OwnedSemaphorePermit,
) {
    let _open = Counted::new(&entry.open);
    entry.count();
    let carried = tokio::select! {
        carried = carry(&mut client, at, &entry) => carried,
        () = entry.gone.cancelled() => false,
    };
    if !carried {
        reset(&client);
    }
}

/// Returns whether both sides ended the connection in order.
async fn carry(client: &mut TcpStream, at: SocketAddr, entry: &Entry) -> bool {
    let target = original(client, at).and_then(|original| entry.target(original));
    let Some(target) = target else {
        return false;
    };
    let upstream = entry.upstream();
    let began = Instant::now();
    // On the heap, for as long as it takes: an open connection holds half as much without it.
    let connecting = Box::pin(async {
        let mut connecting = Box::pin(upstream.connect(&target));
        match timeout(upstream::SILENCE, connecting.as_mut()).await {
            Ok(connected) => connected,
            Err(_) => {
                entry.reached(&upstream, began, Err(&Error::Silent));
                connecting.await
            }
        }
    });
    let connected = tokio::select! {
        connected = connecting => connected,
        () = copy::broken(client) => {
            tracing::trace!("who wanted a connection to {target} gave up");
            return false;
        }
    };
    let (mut server, early) = match connected {
        Ok(connected) => {
            entry.reached(&upstream, began, Ok(()));
            upstream.prepare();
            connected
        }
        Err(error) => {
            entry.reached(&upstream, began, Err(&error));
            tracing::debug!(
                "no connection to {target} through '{}': {error}",
                upstream.name
            );
            return false;
        }
    };
    let carried = async {
        if !early.is_empty() {
            tokio::io::AsyncWriteExt::write_all(client, &early).await?;
        }
        copy::carry(client, &mut server).await
    };
    let carried = carried.await;
    if let Err(error) = &carried {
        tracing::trace!("the connection to {target} broke: {error}");
        if let Stream::Tcp(server) = &server {
            reset(server);
        }
    }
    carried.is_ok()
}

/// Where the application wanted to go that has come to a listener at this address; none if nobody sent the connection
/// here: there is nothing to carry that on to.
pub(crate) fn original(client: &TcpStream, at: SocketAddr) -> Option<SocketAddr> {
    let original: SocketAddr = match at {
        SocketAddr::V4(_) => sockopt::ip_original_dst(client).ok()?.into(),
        SocketAddr::V6(_) => sockopt::ipv6_original_dst(client).ok()?.into(),
    };
    (original != at).then_some(original)
}

/// What is worth a packet to the sender is worth one here, and ends that are gone are found out. What is accepted at a
/// listener with these options has them too.
pub(crate) fn set_options(socket: impl AsFd) -> io::Result<()> {
    sockopt::set_tcp_nodelay(&socket, true)?;
    sockopt::set_socket_keepalive(&socket, true)?;
    sockopt::set_tcp_keepidle(&socket, KEEPALIVE)?;
    Ok(())
}

/// The same for a listener whose connections are translated on their way here. One that conntrack has forgotten is not
/// translated any more: what the application gets then comes from nobody it knows, and it answers with a reset. So each
/// is asked twice in the time that one lasts of which either side has ended. The interval counts as well: it is the
/// time from one question to the next, 75 seconds by default (tcp(7)).
pub(crate) fn set_listener_options(listener: impl AsFd) -> io::Result<()> {
    set_options(&listener)?;
    let remembered = conntrack::timeout("tcp_timeout_close_wait", CLOSE_WAIT);
    let often = (remembered / 2).clamp(Duration::from_secs(1), KEEPALIVE);
    sockopt::set_tcp_keepidle(&listener, often)?;
    sockopt::set_tcp_keepintvl(&listener, often)?;
    Ok(())
}

/// Makes the end of a connection a reset.
pub(crate) fn reset(stream: &TcpStream) {
    if let Err(error) = stream.set_zero_linger() {
        tracing::debug!("can't reset a connection: {error}");
    }
}
