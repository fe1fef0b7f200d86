//! What a packet costs.

use std::io::{BufRead, BufReader, Write};
use std::net::UdpSocket;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use super::site::{Site, launched_in};
use crate::birth::now;
use crate::order::Place;

/// How many packets are sent before they are received, and timed together.
const BLOCK: usize = 64;

/// How many blocks are sent first, since whatever ran meanwhile has taken the caches.
const WARMING: usize = 2;

/// An application that sends whenever it is told to.
pub(super) struct Sender {
    place: Place,
    number: usize,
    to: Option<ChildStdin>,
    from: BufReader<ChildStdout>,
    child: Child,
}

impl Drop for Sender {
    fn drop(&mut self) {
        // It ends with its input.
        self.to = None;
        let _ = self.child.wait();
    }
}

impl Site<'_> {
    /// Has the application at that place, the one of that number, send blocks of packets to itself: nanoseconds a
    /// packet, for each block.
    pub(super) fn packets(&mut self, place: Place, blocks: usize, number: usize) -> Vec<f64> {
        let is_it = |sender: &Sender| sender.place == place && sender.number == number;
        if !self.senders.iter().any(is_it) {
            self.senders.retain(|sender| sender.place != place);
            let sender = self.sender(place, number);
            self.senders.push(sender);
        }
        let sender = self.senders.iter_mut().find(|sender| is_it(sender));
        let sender = sender.expect("it was just started, if it was not there");
        let to = sender.to.as_mut().expect("nobody has ended it");
        writeln!(to, "{blocks}").expect("it reads");
        let mut line = String::new();
        sender.from.read_line(&mut line).expect("it answers");
        serde_json::from_str(&line).expect("JSON")
    }

    fn sender(&mut self, place: Place, number: usize) -> Sender {
        let mut child = launched_in(&self.place(place))
            .arg("--packets")
            .arg(number.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the test application");
        Sender {
            place,
            number,
            to: child.stdin.take(),
            from: BufReader::new(child.stdout.take().expect("piped")),
            child,
        }
    }
}

/// Sends datagrams of 64 bytes over the loopback interface, from one connected socket to another, as many blocks as each
/// line of the input wants, and prints what each block cost: the sending, which takes the packet through all hooks up to
/// the receiver's socket. Applications of one number are all on the same processor.
pub(crate) fn send_packets(number: usize) {
    stay_on_processor(number);
    let receiver = UdpSocket::bind("127.0.0.1:0").expect("a port");
    let sender = UdpSocket::bind("127.0.0.1:0").expect("a port");
    let address = |s: &UdpSocket| s.local_addr().expect("it is bound");
    sender.connect(address(&receiver)).expect("UDP");
    receiver.connect(address(&sender)).expect("UDP");
    let mut buffer = [0; 64];
    for line in std::io::stdin().lines() {
        let blocks: usize = line.expect("a line").parse().expect("a number");
        let mut costs = Vec::with_capacity(blocks);
        for block in 0..blocks + WARMING {
            let start = now();
            for _ in 0..BLOCK {
                sender.send(&buffer).expect("it leaves");
            }
            let cost = (now() - start) as f64 / BLOCK as f64;
            for _ in 0..BLOCK {
                receiver.recv(&mut buffer).expect("it arrives");
            }
            if block >= WARMING {
                costs.push(cost);
            }
        }
        println!("{}", serde_json::to_string(&costs).expect("numbers"));
    }
}

fn stay_on_processor(number: usize) {
    let this = Pid::from_raw(0);
    let all = sched_getaffinity(this).expect("our own");
    let there: Vec<usize> = (0..CpuSet::count())
        .filter(|&n| all.is_set(n).unwrap_or(false))
        .collect();
    let mut one = CpuSet::new();
    one.set(there[number % there.len()]).expect("it is there");
    sched_setaffinity(this, &one).expect("it is there");
}
