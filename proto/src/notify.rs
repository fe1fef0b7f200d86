//! What a daemon tells the service manager (sd_notify(3)); without one, nothing.
//!
//! Nobody waits for the manager to read it. What does not fit into its queue is told when there is room, in order, by
//! a task of the program's runtime; of what is told again meanwhile, only the last is left.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixDatagram;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, connect, send, sendmsg, socket_with,
};
use rustix::time::{ClockId, clock_gettime};
use tokio::io::Interest;
use tokio::runtime::Handle;

/// The variable that says where the service manager listens.
pub const VARIABLE: &str = "NOTIFY_SOCKET";

/// What there is still to tell.
static REST: Mutex<Rest> = Mutex::new(Rest {
    messages: VecDeque::new(),
    telling: false,
});

struct Rest {
    messages: VecDeque<Message>,
    /// A task is at it.
    telling: bool,
}

struct Message {
    text: String,
    file: Option<OwnedFd>,
}

impl Message {
    /// What it is about.
    fn kind(&self) -> &str {
        self.text.split('=').next().unwrap_or_default()
    }

    fn send(&self, socket: impl AsFd) -> io::Result<()> {
        write(
            socket.as_fd(),
            &self.text,
            self.file.as_ref().map(AsFd::as_fd),
        )
    }
}

/// The daemon does its work, or does it again after [`reloading`].
pub fn ready() {
    told(tell("READY=1".to_owned(), None));
}

/// A sentence for `systemctl status`.
pub fn status(text: &str) {
    // A line is an assignment.
    told(tell(format!("STATUS={}", text.replace('\n', " ")), None));
}

/// The configuration is being loaded; [`ready`] ends it.
pub fn reloading() {
    let now = clock_gettime(ClockId::Monotonic);
    let microseconds = now.tv_sec * 1_000_000 + now.tv_nsec / 1000;
    let text = format!("RELOADING=1\nMONOTONIC_USEC={microseconds}");
    told(tell(text, None));
}

/// The daemon ends.
pub fn stopping() {
    told(tell("STOPPING=1".to_owned(), None));
}

/// Has the service manager keep a file for the next process, in place of the one of that name that it has.
///
/// # Errors
/// If nobody can be told.
pub fn store(name: &str, file: BorrowedFd<'_>) -> io::Result<()> {
    tell(format!("FDSTOREREMOVE=1\nFDNAME={name}"), None)?;
    tell(format!("FDSTORE=1\nFDNAME={name}"), Some(file))
}

fn told(told: io::Result<()>) {
    if let Err(error) = told {
        tracing::warn!("can't notify the service manager: {error}");
    }
}

fn tell(text: String, file: Option<BorrowedFd<'_>>) -> io::Result<()> {
    if std::env::var_os(VARIABLE).is_none() {
        return Ok(());
    }
    let mut rest = rest();
    if rest.messages.is_empty() && !rest.telling {
        match write(open()?.as_fd(), &text, file) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            told => return told,
        }
    }
    let file = file.map(|file| file.try_clone_to_owned()).transpose()?;
    let message = Message { text, file };
    rest.messages
        .retain(|earlier| earlier.kind() != message.kind());
    rest.messages.push_back(message);
    // What is told before there is a runtime waits for what comes after.
    if !rest.telling
        && let Ok(runtime) = Handle::try_current()
    {
        rest.telling = true;
        drop(runtime.spawn(tell_the_rest()));
    }
    Ok(())
}

async fn tell_the_rest() {
    while let Some(message) = next() {
        let told = async {
            let socket = tokio::net::UnixDatagram::from_std(UnixDatagram::from(open()?))?;
            socket
                .async_io(Interest::WRITABLE, || message.send(&socket))
                .await
        };
        // Whoever does not listen any more misses nothing.
        let _ = told.await;
    }
}

fn next() -> Option<Message> {
    let mut rest = rest();
    let message = rest.messages.pop_front();
    rest.telling = message.is_some();
    message
}

fn rest() -> MutexGuard<'static, Rest> {
    REST.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A socket that leads to the service manager, and never blocks.
fn open() -> io::Result<OwnedFd> {
    let name = std::env::var_os(VARIABLE).unwrap_or_default();
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
    connect(&socket, &address(&name)?)?;
    Ok(socket)
}

fn address(name: &OsStr) -> io::Result<SocketAddrUnix> {
    let address = match name.as_bytes() {
        [b'@', rest @ ..] => SocketAddrUnix::new_abstract_name(rest),
        path => SocketAddrUnix::new(path),
    };
    Ok(address?)
}

fn write(socket: BorrowedFd<'_>, text: &str, file: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let Some(file) = file else {
        send(socket, text.as_bytes(), SendFlags::NOSIGNAL)?;
        return Ok(());
    };
    let files = [file];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&files));
    let text = [IoSlice::new(text.as_bytes())];
    sendmsg(socket, &text, &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}
