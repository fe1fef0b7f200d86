//! An application: does on the network what the harness tells it, one step at a time.

pub(crate) mod bulk;
mod claim;
mod crowd;
mod flow;
mod gift;
mod hoard;
pub(crate) mod ping;
mod ping_pong;
mod pour;
mod raw;

use std::collections::HashMap;
use std::io::{BufRead, stdin};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cgtproxy_tests::wire::{AppOrder, AppReport};
use socket2::Protocol;

use crate::lines::{parse, say};
use crate::traffic::{self, Traffic};
pub(crate) use flow::{Flow, NO_MARK};

/// Obeys until stdin ends.
pub(crate) fn run() {
    let mut app = App::default();
    say(&AppReport::Done);
    for line in stdin().lock().lines() {
        let Ok(line) = line else { return };
        let report =
            app.obey(parse(line.as_bytes()))
                .unwrap_or_else(|error| match error.raw_os_error() {
                    Some(errno) => AppReport::Failed { errno },
                    None => panic!("{error}"),
                });
        say(&report);
    }
}

#[derive(Default)]
struct App {
    flows: HashMap<u32, Flow>,
    traffic: HashMap<u32, Traffic>,
    /// What sockets are marked with.
    mark: u32,
    /// Connections are of MPTCP.
    multipath: bool,
    /// The interface that sockets are bound to.
    device: Option<String>,
    /// Connections that are only kept.
    crowd: Vec<UnixStream>,
    /// How many calls have been written in vain.
    flooded: Option<Arc<AtomicU64>>,
    /// How many datagrams have been sent, or tried to be.
    poured: Arc<AtomicU64>,
    /// Sockets that only have to stay open.
    kept: Vec<OwnedFd>,
}

impl App {
    fn obey(&mut self, order: AppOrder) -> std::io::Result<AppReport> {
        match order {
            AppOrder::OpenTcp { flow, to } => {
                let protocol = match self.multipath {
                    true => Protocol::MPTCP,
                    false => Protocol::TCP,
                };
                let flow_to = Flow::tcp(to, protocol, self.mark, self.device.as_deref())?;
                self.flows.insert(flow, flow_to);
            }
            AppOrder::OpenUdp { flow, to } => {
                let flow_to = Flow::udp(to, self.mark, self.device.as_deref())?;
                self.flows.insert(flow, flow_to);
            }
            AppOrder::OpenPing { flow, to } => {
                self.flows.insert(flow, Flow::ping(to)?);
            }
            AppOrder::Send { flow, token } => self.flow(flow).send(&token)?,
            AppOrder::Await { flow, patience_ms } => {
                return self
                    .flow(flow)
                    .step(Duration::from_millis(patience_ms.into()));
            }
            AppOrder::Close { flow } => {
                self.flows.remove(&flow);
            }
            AppOrder::Local { flow } => return Ok(AppReport::Local(self.flow(flow).local()?)),
            AppOrder::Multipath => self.multipath = true,
            AppOrder::Device { name } => self.device = Some(name),
            AppOrder::Reset { flow } => {
                if let Some(flow) = self.flows.remove(&flow) {
                    flow.reset()?;
                }
            }
            AppOrder::HearEnd { flow } => return self.flow(flow).hear_end(),
            AppOrder::Raw { protocol, to } => raw::send(protocol, to)?,
            AppOrder::Mark { mark } => self.mark = mark,
            AppOrder::Inject { mark, to, token } => raw::inject(mark, to, &token)?,
            AppOrder::Claim {
                transport,
                from,
                to,
                keep,
            } => {
                let socket = claim::claim(transport, from, to, self.device.as_deref())?;
                if keep {
                    self.kept.push(socket);
                }
            }
            AppOrder::Burst {
                transport,
                to,
                count,
            } => {
                return Ok(AppReport::Tally(traffic::burst(transport, to, count)));
            }
            AppOrder::Crowd {
                path,
                method,
                count,
            } => {
                let (crowd, connections) = crowd::crowd(&path, &method, count)?;
                self.crowd.extend(connections);
                return Ok(AppReport::Crowd(crowd));
            }
            AppOrder::GiveAway { path, count } => {
                return Ok(AppReport::Count(gift::give_away(&path, count)?));
            }
            AppOrder::StartFlood {
                path,
                method,
                calls,
            } => {
                self.flooded = Some(crowd::flood(path, &method, calls));
            }
            AppOrder::Flooded => {
                let flooded = self.flooded.as_ref().expect("no flood");
                return Ok(AppReport::Count(flooded.load(Ordering::Relaxed)));
            }
            AppOrder::Pour { to } => pour::start(to, &self.poured)?,
            AppOrder::Poured => {
                return Ok(AppReport::Count(self.poured.load(Ordering::Relaxed)));
            }
            AppOrder::SendDatagrams {
                to,
                sockets,
                count,
                bytes,
            } => self
                .kept
                .extend(hoard::send_datagrams(to, sockets, count, bytes)?),
            AppOrder::PingPong { to, rounds } => ping_pong::run(&to, rounds)?,
            AppOrder::Bulk { to, bytes } => bulk::run(to, bytes)?,
            AppOrder::HearOut {
                to,
                greeting,
                bytes,
            } => bulk::hear_out(to, &greeting, bytes)?,
            AppOrder::Hoard { to, connections } => {
                self.kept.extend(hoard::hoard(to, connections)?);
            }
            AppOrder::StartTraffic {
                traffic,
                transport,
                to,
            } => {
                self.traffic.insert(traffic, Traffic::start(transport, to));
            }
            AppOrder::Tally { traffic } => {
                return Ok(AppReport::Tally(self.traffic[&traffic].take()));
            }
            AppOrder::StopTraffic { traffic } => {
                let traffic = self.traffic.remove(&traffic).expect("no such traffic");
                return Ok(AppReport::Tally(traffic.stop()));
            }
        }
        Ok(AppReport::Done)
    }

    fn flow(&mut self, flow: u32) -> &mut Flow {
        self.flows.get_mut(&flow).expect("no such flow")
    }
}
