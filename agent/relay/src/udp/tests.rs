use super::*;
use crate::entry::{Shared, WAITING_BYTES, Wanted};
use crate::fake::{Fakes, LeftOut};
use crate::original::Originals;
use crate::original::tests::{Known, helper};
use crate::relay::Relay;
use crate::upstream::Protocol;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::LocalSet;

/// A relay for that server, its listener, and a socket that is connected to it.
async fn bed(
    limit: usize,
    originals: Originals,
    upstream: Upstream,
) -> (Rc<Entry>, Rc<UdpSocket>, UdpSocket) {
    let relay = Relay::new(Shared::new(limit, originals, Fakes::new(None)));
    bed_of(&relay, upstream).await
}

/// The same of a relay that is there.
async fn bed_of(relay: &Relay, upstream: Upstream) -> (Rc<Entry>, Rc<UdpSocket>, UdpSocket) {
    configure(relay, upstream);
    let entry = relay.entry("own").unwrap();
    let listener = Rc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
    let application = socket_to(&listener).await;
    (entry, listener, application)
}

fn configure(relay: &Relay, upstream: Upstream) {
    let wanted = Wanted {
        upstream,
        fake_dns: false,
        left_out: LeftOut::default(),
        preferred_port: None,
        preferred_dns_port: None,
    };
    relay.configure(vec![wanted]).unwrap();
}

async fn socket_to(listener: &UdpSocket) -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let to = listener.local_addr().unwrap();
    socket.connect(to).await.unwrap();
    socket
}

pub(super) const TIMEOUTS: Timeouts = Timeouts {
    short: Duration::from_secs(30),
    long: Duration::from_secs(120),
};

/// Time stands still but for who waits for it.
#[tokio::test(start_paused = true)]
async fn a_flow_that_goes_elsewhere_now_begins_anew() {
    let test = async {
        let directory = tempfile::tempdir().unwrap();
        let known = Known::default();
        let originals = helper(directory.path(), &known);
        let upstream = Upstream::new("own".into(), Protocol::Http, "there".into(), 1, None);
        let (entry, listener, application) = bed(2, originals, upstream).await;
        let client = application.local_addr().unwrap();
        let (flows, associations) = (Flows::default(), Rc::default());
        let say = |to: &str| known.borrow_mut().insert(client, to.parse().unwrap());
        let Shared {
            originals, lookups, ..
        } = &*entry.shared;
        let timeouts = Timeouts {
            short: 2 * RECHECK_AT_LATEST,
            ..TIMEOUTS
        };
        let send = async || {
            application.send(b"?").await.unwrap();
            listener.readable().await.unwrap();
            receive(&listener, &entry, timeouts, &flows, &associations);
        };
        let flow = async || {
            send().await;
            while lookups.available_permits() < 1 || originals.turn().is_none() {
                tokio::task::yield_now().await;
            }
            let flow = flows.borrow().get(&client).cloned();
            flow.map(|flow| flow.original.get().unwrap().destination.to_string())
        };
        say("192.0.2.1:1");
        assert_eq!(flow().await.as_deref(), Some("192.0.2.1:1"));
        say("192.0.2.2:2");
        assert_eq!(flow().await.as_deref(), Some("192.0.2.1:1"), "not yet");
        tokio::time::advance(RECHECK).await;
        // Nor while others ask.
        let turn = originals.turn();
        send().await;
        tokio::task::yield_now().await;
        drop(turn);
        assert!(flows.borrow().contains_key(&client));
        assert_eq!(flow().await, None);
        assert_eq!(flow().await.as_deref(), Some("192.0.2.2:2"));
        // Where they always do, it waits for its turn.
        say("192.0.2.3:3");
        let asked = (originals.turn(), lookups.clone().try_acquire_owned());
        tokio::time::advance(RECHECK_AT_LATEST).await;
        send().await;
        tokio::task::yield_now().await;
        assert_eq!(entry.shared.recheck.available_permits(), 0);
        drop(asked);
        while originals.turn().is_none() {
            tokio::task::yield_now().await;
        }
        assert_eq!(flow().await.as_deref(), Some("192.0.2.3:3"));
        // Without a change it stays.
        let before = flows.borrow().get(&client).map(Rc::as_ptr);
        tokio::time::advance(RECHECK).await;
        assert_eq!(flow().await.as_deref(), Some("192.0.2.3:3"));
        assert_eq!(flows.borrow().get(&client).map(Rc::as_ptr), before);
        assert_eq!(entry.shared.flows.available_permits(), 1);
    };
    LocalSet::new().run_until(test).await;
}

#[test]
fn datagrams_that_wait_have_room_for_one_flow_and_for_all() {
    let originals = Originals::new("/nonexistent".into());
    let shared = Shared::new(1, originals, Fakes::new(None));
    let held = |waiting: &Waiting| {
        waiting
            .bytes
            .as_ref()
            .map_or(0, |bytes| bytes.num_permits())
    };
    let fill = |bytes| {
        let mut waiting = Waiting::new(shared.waiting.clone());
        for _ in 0..2 * WAITING {
            waiting.push(&vec![0; bytes]);
        }
        waiting
    };
    // Many small ones, few large ones, and one of the largest with another.
    assert_eq!(fill(0).datagrams.len(), WAITING);
    for (bytes, expected) in [(10_000, 13), (60_000, 2), (DATAGRAM - OVERHEAD, 2)] {
        let waiting = fill(bytes);
        assert_eq!(waiting.datagrams.len(), expected, "{bytes}");
        assert_eq!(held(&waiting), expected * (bytes + OVERHEAD));
        assert!(held(&waiting) <= FLOW_BYTES);
    }
    assert_eq!(shared.waiting.available_permits(), WAITING_BYTES);
    // So many flows that are full, and none more.
    let mut flows: Vec<_> = (0..WAITING_BYTES / FLOW_BYTES)
        .map(|_| fill(DATAGRAM - OVERHEAD))
        .collect();
    assert_eq!(flows.iter().map(held).sum::<usize>(), WAITING_BYTES);
    assert!(fill(0).datagrams.is_empty());
    flows.pop();
    assert_eq!(fill(DATAGRAM - OVERHEAD).datagrams.len(), 2);
}

#[tokio::test]
async fn strangers_take_no_room_of_flows() {
    const LIMIT: usize = 4;
    let test = async {
        let directory = tempfile::tempdir().unwrap();
        let originals = helper(directory.path(), &Known::default());
        let upstream = Upstream::new("own".into(), Protocol::Http, "there".into(), 1, None);
        let (entry, listener, _) = bed(LIMIT, originals, upstream).await;
        let (flows, associations) = (Flows::default(), Rc::default());
        for _ in 0..3 * LIMIT {
            let stranger = socket_to(&listener).await;
            stranger.send(b"?").await.unwrap();
            listener.readable().await.unwrap();
            receive(&listener, &entry, TIMEOUTS, &flows, &associations);
            assert_eq!(flows.borrow().len(), 1, "the helper is asked");
            while !flows.borrow().is_empty() {
                tokio::task::yield_now().await;
            }
        }
        assert_eq!(entry.shared.flows.available_permits(), LIMIT);
        assert_eq!(entry.shared.lookups.available_permits(), LIMIT / 2);
        assert_eq!(entry.shared.waiting.available_permits(), WAITING_BYTES);
        // Nor do those of whom nothing is known yet take all of it.
        let mut strangers = Vec::new();
        for _ in 0..2 * LIMIT {
            let stranger = socket_to(&listener).await;
            stranger.send(b"?").await.unwrap();
            strangers.push(stranger);
        }
        while flows.borrow().len() < LIMIT / 2 {
            receive(&listener, &entry, TIMEOUTS, &flows, &associations);
        }
        receive(&listener, &entry, TIMEOUTS, &flows, &associations);
        assert_eq!(flows.borrow().len(), LIMIT / 2);
    };
    LocalSet::new().run_until(test).await;
}

/// When the flow of an application that sends each second begins, if an HTTP proxy is to carry it.
async fn beginnings(originals: Originals, known: &Known) -> Vec<u64> {
    let upstream = Upstream::new("own".into(), Protocol::Http, "there".into(), 1, None);
    let (entry, listener, application) = bed(2, originals, upstream).await;
    let client = application.local_addr().unwrap();
    known
        .borrow_mut()
        .insert(client, "192.0.2.1:1".parse().unwrap());
    let (flows, associations) = (Flows::default(), Rc::default());
    let mut last: Weak<Flow> = Weak::new();
    let mut seconds = Vec::new();
    for second in 0..90 {
        application.send(b"are you there?").await.unwrap();
        listener.readable().await.unwrap();
        receive(&listener, &entry, TIMEOUTS, &flows, &associations);
        let flow = flows.borrow().values().next().unwrap().clone();
        if last.as_ptr() != Rc::as_ptr(&flow) {
            seconds.push(second);
            last = Rc::downgrade(&flow);
        }
        while matches!(*flow.state.borrow(), State::Waiting(_)) {
            tokio::task::yield_now().await;
        }
        assert!(matches!(*flow.state.borrow(), State::Failed(_)));
        tokio::time::advance(Duration::from_secs(1)).await;
    }
    seconds
}

/// Time stands still but for who waits for it.
#[tokio::test(start_paused = true)]
async fn one_that_failed_begins_anew_ever_later_however_much_is_sent() {
    let test = async {
        let known = Known::default();
        let away = Originals::new("/nonexistent".into());
        assert_eq!(beginnings(away, &known).await, [0, 1, 3, 7, 15, 31, 61]);
        // What the proxy has refused it will not carry soon.
        let directory = tempfile::tempdir().unwrap();
        let there = helper(directory.path(), &known);
        assert_eq!(beginnings(there, &known).await, [0, 30, 60]);
    };
    LocalSet::new().run_until(test).await;
}

/// Time stands still but for who waits for it.
#[tokio::test(start_paused = true)]
async fn an_association_that_is_ended_at_once_is_not_asked_for_with_each_datagram() {
    let test = async {
        let directory = tempfile::tempdir().unwrap();
        let known = Known::default();
        let originals = helper(directory.path(), &known);
        let relay = Relay::new(Shared::new(2, originals, Fakes::new(None)));
        let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = server.local_addr().unwrap().port();
        let asked = Rc::new(Cell::new(0));
        let count = asked.clone();
        tokio::task::spawn_local(async move {
            while let Ok((mut control, _)) = server.accept().await {
                let asked = count.clone();
                tokio::task::spawn_local(async move {
                    control.read_exact(&mut [0; 3]).await.unwrap();
                    control.write_all(&[5, 0]).await.unwrap();
                    // A connection that is made for who comes next may ask for nothing.
                    if control.read_exact(&mut [0; 10]).await.is_ok() {
                        asked.set(asked.get() + 1);
                        let granted = [5, 0, 0, 1, 127, 0, 0, 1, 0, 9];
                        control.write_all(&granted).await.unwrap();
                    }
                });
            }
        });
        let host = "127.0.0.1".into();
        let upstream = Upstream::new("own".into(), Protocol::Socks5, host, port, None);
        let (entry, listener, application) = bed_of(&relay, upstream).await;
        let client = application.local_addr().unwrap();
        known
            .borrow_mut()
            .insert(client, "192.0.2.1:1".parse().unwrap());
        let (flows, associations) = (Flows::default(), Rc::default());
        let mut attempts = Vec::new();
        for second in 0..90 {
            let before = asked.get();
            application.send(b"are you there?").await.unwrap();
            listener.readable().await.unwrap();
            receive(&listener, &entry, TIMEOUTS, &flows, &associations);
            let flow = flows.borrow()[&client].clone();
            let is_over = || match &*flow.state.borrow() {
                State::Waiting(_) => false,
                State::Ready { .. } => flow.is_dead(),
                State::Failed(_) => true,
            };
            while !is_over() {
                tokio::task::yield_now().await;
            }
            if asked.get() > before {
                attempts.push(second);
            }
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        assert_eq!(attempts, [0, 1, 3, 7, 15, 31, 61]);
        let report = &relay.reports()[0];
        assert_eq!(report.problem, None);
        let problem = report.udp_problem.as_deref();
        assert_eq!(problem, Some("it ended the connection"));
    };
    LocalSet::new().run_until(test).await;
}

/// Time stands still but for who waits for it.
#[tokio::test(start_paused = true)]
async fn what_becomes_of_a_former_proxy_is_not_said_of_its_successor() {
    let test = async {
        let directory = tempfile::tempdir().unwrap();
        let known = Known::default();
        let originals = helper(directory.path(), &known);
        let relay = Relay::new(Shared::new(2, originals, Fakes::new(None)));
        // It takes connections and says nothing.
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = silent.local_addr().unwrap().port();
        let leads_to = |port| {
            let host = "127.0.0.1".into();
            Upstream::new("own".into(), Protocol::Socks5, host, port, None)
        };
        let problem = || relay.reports()[0].problem.clone();
        for (another, expected) in [(false, Some("it does not answer")), (true, None)] {
            let (entry, listener, application) = bed_of(&relay, leads_to(port)).await;
            let client = application.local_addr().unwrap();
            known
                .borrow_mut()
                .insert(client, "192.0.2.1:1".parse().unwrap());
            let (flows, associations) = (Flows::default(), Rc::default());
            application.send(b"?").await.unwrap();
            listener.readable().await.unwrap();
            receive(&listener, &entry, TIMEOUTS, &flows, &associations);
            let (_asked, _) = silent.accept().await.unwrap();
            assert_eq!(problem(), None);
            if another {
                configure(&relay, leads_to(1));
            }
            let flow = flows.borrow()[&client].clone();
            while matches!(*flow.state.borrow(), State::Waiting(_)) {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            assert_eq!(problem().as_deref(), expected);
            if another {
                // Nor that it is there.
                let former = Rc::new(leads_to(port));
                entry.reached(&former, Instant::now(), Err(&Error::Ended));
                assert_eq!(problem(), None);
                let now = entry.upstream();
                entry.reached(&now, Instant::now(), Err(&Error::Ended));
                entry.reached(&former, Instant::now(), Ok(()));
                assert!(problem().is_some());
            }
            configure(&relay, leads_to(2));
        }
    };
    LocalSet::new().run_until(test).await;
}
