//! The sockets that daemons listen on, made in place of one that nobody listens on any more; and how a user's own
//! programs are served there.

use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{SendFlags, send};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

use crate::service::{Fault, Service, serve_stream};
use crate::text::chain;

/// How long to wait after accept(2) failed.
const BACK_OFF: Duration = Duration::from_millis(100);

/// Why a socket can't be listened on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Somebody else listens on it.
    #[error("{who} listens on {}", .path.display())]
    InUse {
        /// Who that is: another program of this kind.
        who: &'static str,
        /// The socket.
        path: PathBuf,
    },
    /// It can't be made.
    #[error("can't listen on {}", .path.display())]
    Listen {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl Error {
    /// Making the socket, or its directory, failed.
    #[must_use]
    pub fn listen(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        Self::Listen { path, source }
    }
}

/// A socket that is listened on, for its user and root alone.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    /// What is to be removed in the end, if nobody has handed the socket over.
    _name: Option<Name>,
}

/// A socket's name in the file system, which is removed with this, unless it is another socket's by then.
#[derive(Debug)]
pub struct Name {
    path: PathBuf,
    /// By what to know it again.
    inode: Option<u64>,
    /// Held for as long as it is listened on: see [`lock`].
    _lock: File,
}

impl Socket {
    /// Listens on `path`, in a directory that nobody else may write to. A socket on which nobody listens any more is
    /// replaced. To be called within a runtime. `who` is whom an error names if somebody listens on it.
    ///
    /// # Errors
    /// If somebody listens on it, or it can't be made.
    pub fn listen(path: &Path, who: &'static str) -> Result<Self, Error> {
        let (listener, name) = bind(path, 0o600, who)?;
        let socket = Self::handed_over(listener).map_err(|source| Error::listen(path, source))?;
        Ok(Self {
            _name: Some(name),
            ..socket
        })
    }

    /// One that the service manager listens on, and has handed over. To be called within a runtime.
    ///
    /// # Errors
    /// If the runtime can't wait for it.
    pub fn handed_over(listener: std::os::unix::net::UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self {
            listener: UnixListener::from_std(listener)?,
            _name: None,
        })
    }

    /// Serves programs of its user's and root's, at most `connections` at once, with messages of at most `limit` bytes:
    /// each by a service of its own. Who comes beyond that is told so. It does so for ever. To be run within a `LocalSet`.
    pub async fn serve<S: Service + 'static>(
        &self,
        connections: usize,
        limit: usize,
        mut service: impl FnMut() -> S,
    ) {
        let slots = Arc::new(Semaphore::new(connections));
        let own = rustix::process::geteuid().as_raw();
        let mut said = false;
        loop {
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => {
                    said = false;
                    stream
                }
                Err(error) => {
                    if !std::mem::replace(&mut said, true) {
                        tracing::warn!("can't accept connections: {}", chain(&error));
                    }
                    tokio::time::sleep(BACK_OFF).await;
                    continue;
                }
            };
            match stream.peer_cred() {
                Ok(peer) if peer.uid() == own || peer.uid() == 0 => {}
                _ => continue,
            }
            if let Ok(slot) = slots.clone().try_acquire_owned() {
                let mut service = service();
                tokio::task::spawn_local(async move {
                    if let Err(error) = serve_stream(stream, limit, &mut service).await {
                        tracing::debug!("a connection ended: {}", chain(&error));
                    }
                    drop(slot);
                });
            } else {
                refuse(&stream, S::too_many_connections(connections));
            }
            // Those that are open have their turn before another one is: whoever connects as fast as it goes must not
            // keep them waiting.
            tokio::task::yield_now().await;
        }
    }
}

/// Says why, and closes with the connection. Its buffer is empty, so that there is room, and nobody to wait for: the runtime,
/// which may not know that yet, is not asked.
fn refuse(stream: &UnixStream, fault: Fault) {
    let message = fault.into_message();
    if let Err(error) = send(
        stream,
        message.as_bytes(),
        SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
    ) {
        tracing::debug!("can't refuse a connection: {error}");
    }
}

/// Where the sockets of the user's programs are (XDG Base Directory Specification). Programs that
/// switch users often leave the variable unset, and the directory is where systemd makes it.
#[must_use]
pub fn runtime_directory() -> PathBuf {
    std::env::var_os("XDG_RUNTIME_DIR")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .unwrap_or_else(|| {
            let uid = rustix::process::getuid();
            format!("/run/user/{}", uid.as_raw()).into()
        })
}

/// Where a user's relay listens unless it is told otherwise.
#[must_use]
pub fn of_relay() -> PathBuf {
    runtime_directory().join("cgtproxy-relay.sock")
}

/// Listens on `path` with these permissions, in a directory that nobody else may write to. A socket on which nobody
/// listens any more is replaced. `who` is whom an error names if somebody listens on it.
///
/// # Errors
/// If somebody listens on it, or it can't be made.
pub fn bind(
    path: &Path,
    mode: u32,
    who: &'static str,
) -> Result<(std::os::unix::net::UnixListener, Name), Error> {
    let in_use = || Error::InUse {
        who,
        path: path.to_owned(),
    };
    let lock = lock(path).map_err(|error| match error {
        TryLockError::WouldBlock => in_use(),
        TryLockError::Error(source) => Error::listen(path, source),
    })?;
    // It may be the service manager's.
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(in_use());
    }
    match make(path, mode) {
        Ok(listener) => Ok((listener, Name::of(path, lock))),
        // Somebody who takes no lock was faster.
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Err(in_use()),
        Err(source) => Err(Error::listen(path, source)),
    }
}

/// Makes a socket in place of what is there.
fn make(path: &Path, mode: u32) -> io::Result<std::os::unix::net::UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = std::os::unix::net::UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    Ok(listener)
}

/// Takes the lock of a socket, so that of programs that start at once none takes away what another has just made. Its
/// file stays, for whoever removed it might remove one that somebody else waits for.
fn lock(socket: &Path) -> Result<File, TryLockError> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(socket.with_extension("lock"))
        .map_err(TryLockError::Error)?;
    file.try_lock()?;
    Ok(file)
}

fn inode(path: &Path) -> Option<u64> {
    std::fs::symlink_metadata(path).ok().map(|m| m.ino())
}

impl Name {
    fn of(path: &Path, lock: File) -> Self {
        Self {
            path: path.to_owned(),
            inode: inode(path),
            _lock: lock,
        }
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        let inode = inode(&self.path);
        if inode.is_some() && inode == self.inode {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    fn runtime() -> tokio::runtime::Runtime {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        builder.enable_io().build().unwrap()
    }

    /// Whether another one has left its socket or not.
    #[test]
    fn of_programs_that_start_at_once_one_listens() {
        const PROGRAMS: usize = 4;
        let runtime = runtime();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.sock");
        for round in 0..300 {
            if round % 2 == 1 {
                drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
            }
            let barrier = Barrier::new(PROGRAMS);
            let listen = || {
                let _runtime = runtime.enter();
                barrier.wait();
                Socket::listen(&path, "another program")
            };
            let sockets: Vec<_> = std::thread::scope(|scope| {
                let programs: Vec<_> = (0..PROGRAMS).map(|_| scope.spawn(listen)).collect();
                programs.into_iter().map(|p| p.join().unwrap()).collect()
            });
            let listening = sockets.iter().filter(|s| s.is_ok()).count();
            assert_eq!(listening, 1, "in round {round}: {sockets:?}");
            std::os::unix::net::UnixStream::connect(&path).unwrap();
            let others = sockets.iter().filter_map(|s| s.as_ref().err());
            let in_use = |error: &Error| matches!(error, Error::InUse { .. });
            assert!(others.into_iter().all(in_use), "{sockets:?}");
        }
    }

    #[test]
    fn a_socket_goes_with_its_program_but_not_that_of_another_one() {
        let runtime = runtime();
        let _runtime = runtime.enter();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.sock");
        drop(Socket::listen(&path, "another program").unwrap());
        assert!(!path.exists());
        let former = Socket::listen(&path, "another program").unwrap();
        std::fs::rename(&path, directory.path().join("elsewhere")).unwrap();
        let _another = std::os::unix::net::UnixListener::bind(&path).unwrap();
        drop(former);
        assert!(path.exists());
    }
}
