//! TCP connections.

use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use rustix::net::sockopt;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout};

use crate::copy;
use crate::entry::Entry;
use crate::sockets::reset;
use crate::upstream::{self, Error, Stream};

/// How long to wait after accept(2) failed.
const BACK_OFF: Duration = Duration::from_millis(50);

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
    // Whatever ends it.
    reset(&client);
    tokio::select! {
        () = carry(&mut client, at, &entry) => {}
        () = entry.gone.cancelled() => {}
    }
}

async fn carry(client: &mut TcpStream, at: SocketAddr, entry: &Entry) {
    let target = original(client, at).and_then(|original| entry.target(original));
    let Some(target) = target else {
        return;
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
            return;
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
            return;
        }
    };
    if let Err(error) = carry_on(client, &mut server, &early).await {
        tracing::trace!("the connection to {target} broke: {error}");
    }
}

/// Carries bytes both ways until both sides have ended in order. Whatever else ends that is a reset for both, be it the
/// end of this process: half of an answer is not to look like all of it.
async fn carry_on(client: &mut TcpStream, server: &mut Stream, early: &[u8]) -> io::Result<()> {
    reset(client);
    reset(server.tcp());
    client.write_all(early).await?;
    copy::carry(client, server).await?;
    // What they have not taken yet, the kernel still sends.
    sockopt::set_socket_linger(&*client, None)?;
    sockopt::set_socket_linger(server.tcp(), None)?;
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::tests::{Ends, connect_within, ends};
    use tokio::io::AsyncReadExt;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (ours, theirs) = tokio::join!(TcpStream::connect(address), listener.accept());
        (ours.unwrap(), theirs.unwrap().0)
    }

    /// A connection to a server, and what the server's end of it goes over.
    async fn connect(tls: Option<&Ends>) -> (Stream, TcpStream) {
        let (ours, theirs) = pair().await;
        let Some(tls) = tls else {
            return (Stream::Tcp(ours), theirs);
        };
        let (ours, theirs) = connect_within(tls, ours, theirs).await;
        (ours, theirs.into_inner().0)
    }

    /// How a connection ends, whatever is said before.
    async fn end(stream: &TcpStream) -> io::Result<()> {
        loop {
            stream.readable().await?;
            match stream.try_read(&mut [0; 1024]) {
                Ok(0) => return Ok(()),
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                _ => {}
            }
        }
    }

    async fn assert_reset(stream: &TcpStream) {
        let error = end(stream).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn what_is_broken_off_is_reset_for_both() {
        let tls = ends();
        for tls in [None, Some(&tls)] {
            for by_application in [true, false] {
                let (mut client, mut ours) = pair().await;
                let (mut server, theirs) = connect(tls).await;
                client.write_all(b"the first half").await.unwrap();
                let carried = carry_on(&mut ours, &mut server, b"early");
                if by_application {
                    let give_up = async {
                        theirs.readable().await.unwrap();
                        client.set_zero_linger().unwrap();
                        drop(client);
                    };
                    tokio::join!(carried, give_up).0.unwrap_err();
                    drop((ours, server));
                } else {
                    // As when the relay ends.
                    tokio::select! {
                        biased;
                        carried = carried => unreachable!("{carried:?}"),
                        readable = theirs.readable() => readable.unwrap(),
                    }
                    drop((ours, server));
                    assert_reset(&client).await;
                }
                assert_reset(&theirs).await;
            }
        }
    }

    #[tokio::test]
    async fn what_ended_in_order_arrives_after_it_is_closed() {
        let (mut client, mut ours) = pair().await;
        let (mut server, mut theirs) = connect(None).await;
        // More than either side has read when both have ended, and less than what the sockets hold.
        let said = vec![b'x'; 60_000];
        for stream in [&mut client, &mut theirs] {
            stream.write_all(&said).await.unwrap();
            stream.shutdown().await.unwrap();
        }
        carry_on(&mut ours, &mut server, b"").await.unwrap();
        drop((ours, server));
        for mut stream in [client, theirs] {
            let mut heard = Vec::new();
            stream.read_to_end(&mut heard).await.unwrap();
            assert!(heard == said);
        }
    }
}
