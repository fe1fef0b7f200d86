//! What neither the standard library nor any crate offers without `unsafe`: waiting for a socket, the socket option
//! `SO_PASSRIGHTS`, and how the C library keeps memory.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::rc::Rc;

use nftnl::nftnl_sys::libc;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// `SO_PASSRIGHTS` (Linux 6.16): include/uapi/asm-generic/socket.h, and arch/sparc's own.
const PASS_RIGHTS: libc::c_int = match cfg!(any(target_arch = "sparc", target_arch = "sparc64")) {
    true => 0x5c,
    false => 83,
};

/// From which size on memory is a mapping of its own: what glibc begins with (`DEFAULT_MMAP_THRESHOLD`, malloc/malloc.c).
#[cfg(target_env = "gnu")]
const MAPPED: libc::c_int = 128 * 1024;

/// Has memory for what is long be a mapping of its own, for as long as this process runs. Such a mapping grows without
/// being copied, and is the kernel's again as soon as it is freed. By itself glibc raises the size from which that is so
/// to that of any mapping that is freed (mallopt(3)). After one long message, all long messages would then lie side by
/// side, and one that has no room to grow leaves a hole behind that no other one fits into.
pub fn map_what_is_long() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it is passed numbers alone, and takes glibc's own lock. It can only fail for numbers that it doesn't know.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED);
    }
}

/// Lets the runtime wait for a netlink socket.
pub(crate) fn watch_netlink(
    socket: netlink_sys::Socket,
) -> io::Result<AsyncFd<netlink_sys::Socket>> {
    // SAFETY: the socket owns its descriptor, gives out the same number for as long as it lives, and
    // closes it when it is dropped, which the returned value does only after it has deregistered it.
    unsafe { AsyncFd::register(socket) }.map_err(Into::into)
}

/// Lets the runtime wait for a socket that others have as well.
pub(crate) fn watch_shared(
    socket: Rc<OwnedFd>,
    interest: Interest,
) -> io::Result<AsyncFd<Rc<OwnedFd>>> {
    // SAFETY: the descriptor is open, and gives out the same number, for as long as anybody has a share in it. The
    // returned value has one, which it drops only after it has deregistered the descriptor.
    unsafe { AsyncFd::register_with_interest(socket, interest) }.map_err(Into::into)
}

/// Has the kernel let nobody send descriptors to this listener, nor to the connections that are made to it from now on
/// (`SO_PASSRIGHTS`, Linux 6.16).
///
/// # Errors
/// As setsockopt(2); `ENOPROTOOPT` where the kernel is older.
pub fn refuse_descriptors(listener: impl AsFd) -> io::Result<()> {
    let no: libc::c_int = 0;
    // SAFETY: the kernel reads as many bytes as it is told that there are, those of `no`.
    let set = unsafe {
        libc::setsockopt(
            listener.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            PASS_RIGHTS,
            (&raw const no).cast(),
            size_of_val(&no) as libc::socklen_t,
        )
    };
    match set {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether the kernel lets nobody send descriptors to this socket. A connection has that from the listener, as it was at
/// connect(2) (unix_stream_connect, net/unix/af_unix.c).
pub(crate) fn refuses_descriptors(connection: impl AsFd) -> bool {
    let mut passes: libc::c_int = 1;
    let mut length = size_of_val(&passes) as libc::socklen_t;
    // SAFETY: the kernel writes no more bytes than it is told that there is room for, those of `passes`, and how many
    // these are to `length`.
    let told = unsafe {
        libc::getsockopt(
            connection.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            PASS_RIGHTS,
            (&raw mut passes).cast(),
            &raw mut length,
        )
    };
    // Older kernels don't know it.
    told == 0 && passes == 0
}
