//! What happens inside a sandbox: orders come in on the standard input, measurements go out.

mod arrivals;
mod burst;
mod client;
mod daemons;
mod held;
mod packets;
mod relay;
mod restore;
mod site;
mod socks;
mod start;
mod users;

use std::process::ExitCode;

use cgtproxy_tests::sandbox::Sandbox;
use serde::Serialize;

use crate::order::{Kind, Order};
pub(crate) use client::Errand;
pub(crate) use packets::send_packets;
pub(crate) use relay::serve as serve_relay;
use site::Site;
pub(crate) use socks::serve as serve_socks;
pub(crate) use start::become_program;

/// Measures until nobody asks for more.
pub(crate) fn measure(sandbox: &Sandbox, kind: Kind) -> ExitCode {
    let mut site = Site::set_up(sandbox, kind);
    say(&"ready");
    for line in std::io::stdin().lines() {
        let line = line.expect("a line");
        let order = serde_json::from_str(&line).expect("an order");
        match order {
            Order::Map { groups, verdict } => say(&site.map(groups, verdict)),
            Order::Latency { count } => say(&site.latency(count)),
            Order::FirstSend { count, nursery } => say(&site.first_sends(count, nursery)),
            Order::Burst { groups, nested } => say(&site.burst(groups, nested)),
            Order::Start => say(&site.start()),
            Order::Packets {
                place,
                blocks,
                sender,
            } => say(&site.packets(place, blocks, sender)),
            Order::Errand { way, cores, task } => say(&site.errand(way, cores, task)),
            Order::Hold { connections, stuck } => say(&site.hold(connections, stuck)),
            Order::Idle { milliseconds } => say(&site.idle(milliseconds)),
            Order::Users { users, groups } => say(&site.add_users(users, groups)),
            Order::Updates { count } => say(&site.updates(count)),
            Order::BeginFlood => say(&site.begin_flood()),
            Order::EndFlood => say(&site.end_flood()),
            Order::Restore { loss, count } => say(&site.restore(loss, count)),
            Order::Use => say(&site.idle(0)),
        }
    }
    ExitCode::SUCCESS
}

fn say(what: &impl Serialize) {
    println!("{}", serde_json::to_string(what).expect("it is JSON"));
}
