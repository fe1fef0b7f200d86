//! What a packet costs.

use std::net::UdpSocket;
use std::process::Stdio;

use super::site::{Site, this_program};
use crate::birth::now;
use crate::order::Place;

/// How many packets are sent before they are received, and timed together.
const BLOCK: usize = 64;

impl Site<'_> {
    /// Has an application at that place send blocks of packets to itself: nanoseconds a packet, for each block.
    pub(super) fn packets(&mut self, place: Place, blocks: usize) -> Vec<f64> {
        let directory = self.place(place);
        let output = std::process::Command::new("/run/testbed/bin/cgtproxy-testapp")
            .arg("launch")
            .arg(directory)
            .arg(this_program().get_program())
            .arg("--packets")
            .arg(blocks.to_string())
            .stderr(Stdio::inherit())
            .output()
            .expect("the test application");
        assert!(output.status.success());
        serde_json::from_slice(&output.stdout).expect("JSON")
    }
}

/// Sends datagrams of 64 bytes over the loopback interface, from one connected socket to another, and prints what each
/// block cost: the sending, which takes the packet through all hooks up to the receiver's socket.
pub(crate) fn send_packets(blocks: usize) {
    let receiver = UdpSocket::bind("127.0.0.1:0").expect("a port");
    let sender = UdpSocket::bind("127.0.0.1:0").expect("a port");
    let address = |s: &UdpSocket| s.local_addr().expect("it is bound");
    sender.connect(address(&receiver)).expect("UDP");
    receiver.connect(address(&sender)).expect("UDP");
    let mut buffer = [0; 64];
    let mut costs = Vec::with_capacity(blocks);
    // The first blocks warm the caches.
    for block in 0..blocks + 4 {
        let start = now();
        for _ in 0..BLOCK {
            sender.send(&buffer).expect("it leaves");
        }
        let cost = (now() - start) as f64 / BLOCK as f64;
        for _ in 0..BLOCK {
            receiver.recv(&mut buffer).expect("it arrives");
        }
        if block >= 4 {
            costs.push(cost);
        }
    }
    println!("{}", serde_json::to_string(&costs).expect("numbers"));
}
