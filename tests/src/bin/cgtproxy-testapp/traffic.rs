//! Traffic that goes on while other things happen: a new socket for each question, so that each
//! one is decided anew.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cgtproxy_tests::wire::{Answer, AppReport, ServerKind, Tally, Transport};
use socket2::Protocol;

use crate::app::{Flow, NO_MARK};

/// How long to wait for an answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between questions, so that a long test does not run out of ports.
const PAUSE: Duration = Duration::from_millis(2);

/// A thread that asks until it is stopped.
pub(crate) struct Traffic {
    tally: Arc<Mutex<Tally>>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Traffic {
    pub(crate) fn start(transport: Transport, to: SocketAddr) -> Self {
        let tally = Arc::new(Mutex::new(Tally::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let (tally, stop) = (Arc::clone(&tally), Arc::clone(&stop));
            move || {
                for count in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let report = ask(transport, to, &format!("traffic {count}"));
                    note(&mut tally.lock().unwrap(), to, report);
                    std::thread::sleep(PAUSE);
                }
            }
        });
        Self {
            tally,
            stop,
            thread,
        }
    }

    /// What happened since the last time.
    pub(crate) fn take(&self) -> Tally {
        std::mem::take(&mut self.tally.lock().unwrap())
    }

    pub(crate) fn stop(self) -> Tally {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the traffic's thread");
        std::mem::take(&mut self.tally.lock().unwrap())
    }
}

/// One question from a new socket.
fn ask(transport: Transport, to: SocketAddr, token: &str) -> std::io::Result<AppReport> {
    let mut flow = match transport {
        Transport::Udp => Flow::udp(to, NO_MARK, None)?,
        Transport::Tcp => {
            let mut flow = Flow::tcp(to, Protocol::TCP, NO_MARK, None)?;
            match flow.step(PATIENCE)? {
                AppReport::Connected => flow,
                other => return Ok(other),
            }
        }
    };
    flow.send(token)?;
    flow.step(PATIENCE)
}

/// Many questions from as many new sockets: all are begun before any answer is read.
pub(crate) fn burst(transport: Transport, to: SocketAddr, count: u32) -> Tally {
    let deadline = Instant::now() + PATIENCE;
    let begin = |number: u32| match transport {
        Transport::Tcp => Flow::tcp(to, Protocol::TCP, NO_MARK, None),
        Transport::Udp => {
            let mut flow = Flow::udp(to, NO_MARK, None)?;
            flow.send(&format!("burst {number}"))?;
            Ok(flow)
        }
    };
    let flows: Vec<_> = (0..count).map(begin).collect();
    let mut tally = Tally::default();
    for (number, flow) in (0..).zip(flows) {
        let left = || deadline.saturating_duration_since(Instant::now());
        let report = flow.and_then(|mut flow| match flow.step(left())? {
            AppReport::Connected => {
                flow.send(&format!("burst {number}"))?;
                flow.step(left())
            }
            other => Ok(other),
        });
        note(&mut tally, to, report);
    }
    tally
}

fn note(tally: &mut Tally, to: SocketAddr, report: std::io::Result<AppReport>) {
    match report {
        Ok(AppReport::Answered(Answer {
            kind,
            by,
            destination,
            ..
        })) => match kind {
            ServerKind::Internet => tally.direct += 1,
            ServerKind::Tproxy if destination != to => tally.misdirected += 1,
            ServerKind::Tproxy => *tally.proxied.entry(by).or_default() += 1,
            ServerKind::Local => *tally.local.entry(by).or_default() += 1,
        },
        Ok(AppReport::Closed) => {
            *tally
                .failed
                .entry(nix::errno::Errno::ECONNRESET as i32)
                .or_default() += 1;
        }
        Ok(_) => tally.silent += 1,
        Err(e) => {
            *tally
                .failed
                .entry(e.raw_os_error().unwrap_or(0))
                .or_default() += 1
        }
    }
}
