//! Failures and signals in the middle of what a service does, by strace(1).

use std::fs::{self, File};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::sandbox::Service;
use crate::wait::wait_until;

/// Where strace says that it is attached.
const SAYS: &str = "/run/strace";

/// A system call of a service that is tampered with, for as long as this lives.
pub struct Injection(Child);

impl Injection {
    /// Does to one of the calls of this name what `--inject` of strace(1) says.
    ///
    /// # Panics
    /// When strace can't be started.
    #[must_use]
    pub fn of(service: &Service, call: &str, what: &str) -> Self {
        let tracer = Command::new("strace")
            .args(["-o", "/dev/null", "-e", &format!("trace={call}")])
            .args(["-e", &format!("inject={call}:{what}")])
            .args(["-p", &service.pid().to_string()])
            .stdin(Stdio::null())
            .stderr(File::create(SAYS).expect("/run is ours"))
            .spawn()
            .expect("strace is installed");
        let this = Self(tracer);
        wait_until("strace is attached", || {
            let says = fs::read_to_string(SAYS).expect("it is being written");
            says.contains(" attached")
        });
        this
    }
}

impl Drop for Injection {
    fn drop(&mut self) {
        // It lets go of the process then.
        let _ = kill(Pid::from_raw(self.0.id().cast_signed()), Signal::SIGTERM);
        let _ = self.0.wait();
    }
}
