//! Programs of others that run in the sandbox: servers of the distribution's.

use std::fs::{self, File};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::Arc;

use super::launch::Launch;
use super::world::World;
use crate::wait::wait_until;

/// A running program. Dropped, it is killed.
pub struct Program {
    child: Child,
    log: PathBuf,
}

impl Program {
    #[track_caller]
    pub(crate) fn start(world: &Arc<World>, launch: Launch, argv: &[&str]) -> Self {
        let (program, arguments) = argv.split_first().expect("a program");
        let path = world.new_log(program.rsplit('/').next().unwrap_or(program));
        let log = File::create(&path).expect("a file in our own directory");
        let child = launch
            .command(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a descriptor"))
            .stderr(log)
            .spawn()
            .unwrap_or_else(|e| panic!("cannot start {program}: {e}"));
        Self { child, log: path }
    }

    /// Waits until somebody listens there.
    ///
    /// # Panics
    /// When nobody does.
    #[track_caller]
    pub fn listening(self, at: SocketAddr) -> Self {
        wait_until("somebody to listen", || TcpStream::connect(at).is_ok());
        self
    }

    /// All it has written to stdout and stderr.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Kills it.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.kill();
    }
}
