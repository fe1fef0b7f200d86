//! Answers DNS queries with addresses that stand for names: who uses the address has the proxy look the
//! name up.

mod answer;

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::time::{Instant, timeout};

use crate::conntrack;
use crate::entry::Entry;
use crate::sockets::reset;
use crate::tcp;

pub(crate) use answer::answer;
#[cfg(any(test, fuzzing))]
pub(crate) use answer::with_known_type;

/// The longest query that is looked at, in bytes: a name, and what EDNS adds.
const QUERY_BYTES: usize = 1500;

/// How long a connection may be silent.
const SILENCE: Duration = Duration::from_secs(10);

/// How long to wait after accept(2) failed.
const BACK_OFF: Duration = Duration::from_millis(50);

/// How many queries may wait for the helper at once.
const WAITING: usize = 256;

/// How long the helper's word about a client is good for. Programs ask for both addresses of a name at once, and some ask
/// everything from one socket.
const GOOD_FOR: Duration = Duration::from_secs(10);

/// About how many clients it is remembered.
const CLIENTS: usize = 1024;

/// Clients whose queries the kernel has redirected here, and until when they are known. Unless somebody empties the kernel's
/// table of connections, or it is full, nobody else can be taken for one: the kernel remembers them for longer, and whoever
/// sends to the listener from the same address and port is given another port meanwhile.
#[derive(Debug)]
struct Clients {
    good_for: Duration,
    until: RefCell<HashMap<SocketAddr, Instant>>,
}

impl Clients {
    fn new() -> Self {
        // Before the kernel does, where somebody has told it to be quick.
        let kernel = conntrack::timeout("udp_timeout", Duration::from_secs(30));
        Self {
            good_for: GOOD_FOR.min(kernel / 2),
            until: RefCell::default(),
        }
    }

    fn know(&self, client: SocketAddr) -> bool {
        let until = self.until.borrow();
        until.get(&client).is_some_and(|at| Instant::now() < *at)
    }

    fn add(&self, client: SocketAddr) {
        let mut until = self.until.borrow_mut();
        let now = Instant::now();
        if until.len() >= CLIENTS {
            until.retain(|_, at| now < *at);
        }
        if until.len() < CLIENTS {
            until.insert(client, now + self.good_for);
        }
    }
}

/// Answers queries over UDP until the proxy is gone.
pub(crate) async fn run_udp(socket: Rc<UdpSocket>, entry: Rc<Entry>) {
    let waiting = std::sync::Arc::new(tokio::sync::Semaphore::new(WAITING));
    let clients = Rc::new(Clients::new());
    let mut buffer = [0; QUERY_BYTES];
    loop {
        let received = tokio::select! {
            received = socket.recv_from(&mut buffer) => received,
            () = entry.gone.cancelled() => return,
        };
        let (query, client) = match received {
            Ok((length, client)) => (buffer.get(..length).unwrap_or_default().to_vec(), client),
            Err(error) => {
                tracing::debug!("can't receive a query: {error}");
                tokio::time::sleep(BACK_OFF).await;
                continue;
            }
        };
        if clients.know(client) {
            reply(&socket, &entry, &query, client).await;
            continue;
        }
        let Ok(permit) = waiting.clone().try_acquire_owned() else {
            continue;
        };
        let (socket, entry, clients) = (socket.clone(), entry.clone(), clients.clone());
        tokio::task::spawn_local(async move {
            let _permit = permit;
            let Ok(listener) = socket.local_addr() else {
                return;
            };
            let originals = &entry.shared.dns_originals;
            let turn = originals.next_turn().await;
            // Whoever sends to the port unasked would learn names, or use them up. Another query may have been asked about
            // meanwhile.
            if !clients.know(client) {
                if originals.find_in(turn, listener, client).await.is_err() {
                    return;
                }
                clients.add(client);
            }
            reply(&socket, &entry, &query, client).await;
        });
    }
}

async fn reply(socket: &UdpSocket, entry: &Entry, query: &[u8], client: SocketAddr) {
    if let Some(answer) = answer_for(entry, query)
        && let Err(error) = socket.send_to(&answer, client).await
    {
        tracing::debug!("can't answer a query: {error}");
    }
}

/// Answers queries over TCP until the proxy is gone.
pub(crate) async fn run_tcp(listener: TcpListener, at: SocketAddr, entry: Rc<Entry>) {
    while let Some((stream, permit)) = tcp::accept(&listener, &entry).await {
        let entry = entry.clone();
        tokio::task::spawn_local(async move {
            let _permit = permit;
            converse(stream, at, &entry).await;
        });
    }
}

async fn converse(mut stream: TcpStream, at: SocketAddr, entry: &Entry) {
    if tcp::original(&stream, at).is_none() {
        return reset(&stream);
    }
    serve(&mut stream, entry).await;
}

/// Answers what is asked until the proxy is gone.
async fn serve(stream: &mut TcpStream, entry: &Entry) {
    let talked = tokio::select! {
        talked = talk(stream, entry) => talked,
        () = entry.gone.cancelled() => return reset(stream),
    };
    if let Err(error) = talked
        && error.kind() != io::ErrorKind::UnexpectedEof
    {
        tracing::debug!("a DNS connection broke: {error}");
    }
}

async fn talk(stream: &mut TcpStream, entry: &Entry) -> io::Result<()> {
    // RFC 1035, 4.2.2: two bytes for the length.
    while let Ok(length) = timeout(SILENCE, stream.read_u16()).await {
        let length = usize::from(length?);
        // As over UDP: who says that 64 KiB will follow and sends nothing holds no memory.
        if length > QUERY_BYTES {
            break;
        }
        let mut query = vec![0; length];
        match timeout(SILENCE, stream.read_exact(&mut query)).await {
            Ok(read) => read?,
            Err(_) => break,
        };
        let Some(answer) = answer_for(entry, &query) else {
            break;
        };
        let length = u16::try_from(answer.len()).unwrap_or(u16::MAX);
        let message = [&length.to_be_bytes()[..], &answer].concat();
        stream.write_all(&message).await?;
    }
    Ok(())
}

fn answer_for(entry: &Entry, query: &[u8]) -> Option<Vec<u8>> {
    answer(
        query,
        &mut entry.shared.fakes.borrow_mut(),
        entry.left_out.get(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::{Shared, Wanted};
    use crate::fake::{Fakes, LeftOut};
    use crate::original::Originals;
    use crate::original::tests::{Known, helper, tell};
    use crate::relay::Relay;
    use crate::upstream::{Protocol, Upstream};
    use answer::tests::query_of;
    use simple_dns::{CLASS, Packet, TYPE};
    use tokio::net::UnixListener;
    use tokio::task::LocalSet;

    /// A relay with one proxy, which asks that helper.
    fn relay(originals: Originals) -> Relay {
        let relay = Relay::new(Shared::new(1, originals, Fakes::new(None)));
        let wanted = Wanted {
            upstream: Upstream::new("own".into(), Protocol::Http, "there".into(), 1, None),
            fake_dns: true,
            left_out: LeftOut::default(),
            preferred_port: None,
            preferred_dns_port: None,
        };
        relay.configure(vec![wanted]).unwrap();
        relay
    }

    /// An application's connection that it serves.
    async fn served(relay: &Relay) -> TcpStream {
        let entry = relay.entry("own").unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let application = TcpStream::connect(address).await.unwrap();
        let (mut stream, _) = listener.accept().await.unwrap();
        tokio::task::spawn_local(async move { serve(&mut stream, &entry).await });
        application
    }

    /// Time stands still but for who waits for it.
    #[tokio::test(start_paused = true)]
    async fn a_connection_that_says_nothing_more_ends() {
        let test = async {
            let relay = relay(Originals::new("/nonexistent".into()));
            // Nothing, and a part of a length and of a query.
            for said in [&[][..], &[0], &[0, 12], &[0, 12, 1]] {
                let mut application = served(&relay).await;
                application.write_all(said).await.unwrap();
                let began = tokio::time::Instant::now();
                let ended = timeout(2 * SILENCE, application.read_u8()).await;
                ended.expect("it ends").unwrap_err();
                assert_eq!(began.elapsed().as_secs(), SILENCE.as_secs(), "{said:?}");
            }
        };
        LocalSet::new().run_until(test).await;
    }

    /// Time stands still but for who waits for it.
    #[tokio::test(start_paused = true)]
    async fn no_more_queries_wait_for_the_helper_than_may() {
        let test = async {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("helper.sock");
            // The kernel connects; nobody answers yet.
            let helper = UnixListener::bind(&path).unwrap();
            let relay = relay(Originals::new(path));
            let entry = relay.entry("own").unwrap();
            let socket = Rc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
            let application = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            application
                .connect(socket.local_addr().unwrap())
                .await
                .unwrap();
            let client = application.local_addr().unwrap();
            tokio::task::spawn_local(run_udp(socket.clone(), entry));
            let query = query_of("example.org", TYPE::A, CLASS::IN);
            for _ in 0..WAITING + 50 {
                application.send(&query).await.unwrap();
                while rustix::io::ioctl_fionread(&*socket).unwrap() > 0 {
                    tokio::task::yield_now().await;
                }
            }
            let known = Known::default();
            known
                .borrow_mut()
                .insert(client, "192.0.2.1:53".parse().unwrap());
            tokio::task::spawn_local(tell(helper, known));
            let mut answer = [0; 100];
            let mut answers = 0;
            while let Ok(answer) = timeout(SILENCE, application.recv(&mut answer)).await {
                answer.unwrap();
                answers += 1;
            }
            assert_eq!(answers, WAITING);
            // There is room again.
            application.send(&query).await.unwrap();
            let answer = timeout(SILENCE, application.recv(&mut answer)).await;
            answer.expect("it is answered").unwrap();
        };
        LocalSet::new().run_until(test).await;
    }

    /// Time stands still but for who waits for it.
    #[tokio::test(start_paused = true)]
    async fn the_helper_is_asked_about_a_socket_and_not_about_each_of_its_queries() {
        let test = async {
            let directory = tempfile::tempdir().unwrap();
            let known = Known::default();
            let relay = relay(helper(directory.path(), &known));
            let entry = relay.entry("own").unwrap();
            let socket = Rc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
            tokio::task::spawn_local(run_udp(socket.clone(), entry));
            let application = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            let listener = socket.local_addr().unwrap();
            application.connect(listener).await.unwrap();
            let client = application.local_addr().unwrap();
            let is_answered = async || {
                let query = query_of("example.org", TYPE::A, CLASS::IN);
                application.send(&query).await.unwrap();
                let mut answer = [0; 100];
                timeout(Duration::from_secs(1), application.recv(&mut answer))
                    .await
                    .is_ok()
            };
            assert!(!is_answered().await, "nobody has redirected it");
            known
                .borrow_mut()
                .insert(client, "192.0.2.1:53".parse().unwrap());
            assert!(is_answered().await);
            // The helper is not asked again, for a while.
            known.borrow_mut().clear();
            for _ in 0..3 {
                assert!(is_answered().await);
            }
            tokio::time::advance(GOOD_FOR).await;
            assert!(!is_answered().await, "it is asked again");
        };
        LocalSet::new().run_until(test).await;
    }

    #[test]
    fn no_more_clients_are_remembered_than_there_is_room_for() {
        let clients = Clients {
            good_for: GOOD_FOR,
            until: RefCell::default(),
        };
        let client = |number: usize| {
            let port = u16::try_from(number).unwrap();
            SocketAddr::from(([127, 0, 0, 1], port))
        };
        for number in 0..=CLIENTS {
            clients.add(client(number));
        }
        assert!(clients.know(client(0)) && !clients.know(client(CLIENTS)));
        // Those that are not known any more make room.
        for at in clients.until.borrow_mut().values_mut() {
            *at = Instant::now();
        }
        clients.add(client(CLIENTS));
        assert!(clients.know(client(CLIENTS)));
        assert_eq!(clients.until.borrow().len(), 1);
    }

    #[tokio::test]
    async fn a_connection_ends_with_its_proxy() {
        let test = async {
            let relay = relay(Originals::new("/nonexistent".into()));
            let mut application = served(&relay).await;
            let query = Packet::new_query(7).build_bytes_vec().unwrap();
            let length = u16::try_from(query.len()).unwrap();
            application.write_u16(length).await.unwrap();
            application.write_all(&query).await.unwrap();
            assert_eq!(application.read_u16().await.unwrap(), 12);
            application.read_exact(&mut [0; 12]).await.unwrap();
            relay.configure(Vec::new()).unwrap();
            let ended = timeout(SILENCE / 2, application.read_u8()).await;
            let error = ended.expect("it ends at once").unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        };
        LocalSet::new().run_until(test).await;
    }
}
