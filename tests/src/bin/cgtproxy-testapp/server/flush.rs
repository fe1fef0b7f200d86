//! Pushing packets through: nothing sent before is still under way afterwards.

use std::io::{Error, ErrorKind, Result};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::app::ping::Ping;

/// An echo that is not back by then will not come back.
const DEADLINE: Duration = Duration::from_secs(10);

/// Sends echo requests from each CPU in turn and waits for the replies.
///
/// A packet that crosses a veth or the loopback device waits in the queue of the CPU that sent it,
/// and those queues are first in, first out. An echo that has gone through the same queue and come
/// back proves that what was sent before it has arrived, or never will. A diverted packet passes
/// such a queue more than once, hence more than one echo.
pub(super) fn every_cpu(address: IpAddr) -> Result<()> {
    let everywhere = sched_getaffinity(Pid::from_raw(0))?;
    for cpu in (0..CpuSet::count()).filter(|&cpu| everywhere.is_set(cpu).unwrap_or(false)) {
        let mut here = CpuSet::new();
        here.set(cpu)?;
        sched_setaffinity(Pid::from_raw(0), &here)?;
        for round in 0..3 {
            echo(address, &format!("flush {cpu} {round}"))?;
        }
    }
    sched_setaffinity(Pid::from_raw(0), &everywhere)?;
    Ok(())
}

fn echo(address: IpAddr, token: &str) -> Result<()> {
    let ping = Ping::open(SocketAddr::new(address, 0))?;
    ping.send(token)?;
    let deadline = Instant::now() + DEADLINE;
    while Instant::now() < deadline {
        if ping.receive(Duration::from_millis(200))?.is_some() {
            return Ok(());
        }
    }
    Err(Error::new(
        ErrorKind::TimedOut,
        format!("{address} answers no echo requests any more"),
    ))
}
