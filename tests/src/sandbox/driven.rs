//! A process that is told what to do, one line of JSON at a time.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::wait::DEADLINE;

pub(crate) struct Driven {
    name: String,
    child: Child,
    orders: ChildStdin,
    reports: Receiver<String>,
}

impl Driven {
    pub(crate) fn start(name: &str, command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("cannot start {name}: {e}"));
        let orders = child.stdin.take().expect("piped");
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        let (sender, reports) = channel();
        // A thread of its own, so that waiting for a report can have a deadline.
        std::thread::spawn(move || {
            for line in stdout.lines() {
                let Ok(line) = line else { return };
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self {
            name: name.to_owned(),
            child,
            orders,
            reports,
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    #[track_caller]
    pub(crate) fn ask<R: DeserializeOwned>(&mut self, order: &impl Serialize) -> R {
        let mut line = serde_json::to_vec(order).expect("orders are plain data");
        line.push(b'\n');
        self.orders
            .write_all(&line)
            .unwrap_or_else(|e| panic!("{} is gone: {e}", self.name));
        self.receive()
    }

    #[track_caller]
    pub(crate) fn receive<R: DeserializeOwned>(&self) -> R {
        let line = self
            .reports
            .recv_timeout(DEADLINE)
            .unwrap_or_else(|e| panic!("no report from {}: {e}", self.name));
        serde_json::from_str(&line)
            .unwrap_or_else(|e| panic!("not a report of {}: {line} ({e})", self.name))
    }
}

impl Drop for Driven {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
