//! A Varlink client that can also be rude.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};

use serde_json::{Value, json};

use super::launch::{Launch, binary};
use crate::wait::DEADLINE;

/// A connection to a Varlink service. Its peer is a process of the user it was made for, so that
/// is the uid the service sees. Dropped, it is closed.
pub struct Varlink {
    child: Child,
    to_service: Option<ChildStdin>,
    from_service: Receiver<Vec<u8>>,
}

impl Varlink {
    pub(crate) fn connect(launch: &Launch, socket: &Path) -> Self {
        let mut child = launch
            .command(binary("cgtproxy-testapp"))
            .arg("pipe")
            .arg(socket)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the test application can be started");
        let to_service = child.stdin.take();
        let mut stdout = BufReader::new(child.stdout.take().expect("piped"));
        let (sender, from_service) = channel();
        std::thread::spawn(move || {
            loop {
                let mut message = Vec::new();
                match stdout.read_until(0, &mut message) {
                    Ok(1..) if sender.send(message).is_ok() => {}
                    _ => return,
                }
            }
        });
        Self {
            child,
            to_service,
            from_service,
        }
    }

    /// Calls a method and returns the whole reply: `{"parameters": …}`, or with an `"error"`.
    ///
    /// # Panics
    /// When there is no reply.
    #[track_caller]
    pub fn call(&mut self, method: &str, parameters: Value) -> Value {
        self.send(&json!({ "method": method, "parameters": parameters }));
        self.receive()
            .unwrap_or_else(|| panic!("{method}: the service closed the connection"))
    }

    /// Sends one message.
    pub fn send(&mut self, message: &Value) {
        let mut bytes = message.to_string().into_bytes();
        bytes.push(0);
        self.send_bytes(&bytes);
    }

    /// Sends whatever one likes. What a service that has hung up does not take is lost.
    pub fn send_bytes(&mut self, bytes: &[u8]) {
        let _ = self
            .to_service
            .as_mut()
            .expect("not finished yet")
            .write_all(bytes);
    }

    /// Closes our half of the connection.
    pub fn finish(&mut self) {
        self.to_service = None;
    }

    /// Waits for a message; none when the service has closed the connection.
    ///
    /// # Panics
    /// When the service says nothing, or something that is not a message.
    #[track_caller]
    pub fn receive(&mut self) -> Option<Value> {
        let mut message = match self.from_service.recv_timeout(DEADLINE) {
            Ok(message) => message,
            Err(RecvTimeoutError::Disconnected) => return None,
            Err(RecvTimeoutError::Timeout) => panic!("the service says nothing"),
        };
        assert_eq!(
            message.pop(),
            Some(0),
            "the service closed in the middle of a message"
        );
        Some(serde_json::from_slice(&message).expect("Varlink is JSON"))
    }
}

impl Drop for Varlink {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
