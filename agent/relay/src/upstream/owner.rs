//! Whose a proxy on this machine is. A port above 1023 is whoever's has taken it, so nothing is sent to a proxy here
//! before the kernel has said who that is (sock_diag(7)).

use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};

use cgtproxy_proto::NOBODY;
use rustix::io::Errno;
use rustix::net::netlink::{SOCK_DIAG, SocketAddrNetlink};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, connect, recv, send, socket_with,
};
use tokio::net::TcpStream;

use super::{any_of_family, canonical, is_here};

/// What is asked for, and what an answer is (linux/netlink.h, linux/sock_diag.h).
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const IPPROTO_TCP: u8 = 6;

/// The length of struct nlmsghdr with struct `inet_diag_req_v2`.
const REQUEST: u32 = 16 + 56;

/// Where in an answer its type is, and what follows the header: the uid of struct `inet_diag_msg`, or an error.
const TYPE: usize = 4;
const ERROR: usize = 16;
const UID: usize = 80;

/// The index of `lo`, over which all is delivered that is for this machine itself, in every network namespace. A socket
/// that is bound to it is found with it alone.
const LOOPBACK: u32 = 1;

/// That a proxy on this machine is not to have what is for the user's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Stranger {
    /// It is somebody else's.
    #[error("what listens at {0} is another user's (uid {1})")]
    Other(SocketAddr, u32),
    /// Its listener is closed, and of the connection the kernel says what it says of those that nobody has.
    #[error("what has listened at {0} does not any more, and whose it was is not known")]
    Unknown(SocketAddr),
}

/// Who has the other end of a connection within this machine; none where there is no such socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Owners {
    /// Who listens there now.
    listener: Option<u32>,
    /// Who has the connection. Before somebody has accepted it, that may be uid 0, whoever is going to.
    connection: Option<u32>,
}

/// Makes sure that what a connection leads to may be the user's proxy, if it is on this machine: one of the user's own,
/// of root's, of a system user's, or of one of `users`.
///
/// # Errors
/// If it is not, or the kernel does not say.
pub(super) fn check(stream: &TcpStream, users: &[u32]) -> io::Result<()> {
    let (at, own) = (stream.peer_addr()?, stream.local_addr()?);
    if !is_here(at) {
        return Ok(());
    }
    let owners = owners(canonical(at), canonical(own)).map_err(|error| {
        io::Error::new(
            error.kind(),
            format!("can't find out who listens at {at}: {error}"),
        )
    })?;
    let user = rustix::process::getuid().as_raw();
    let allowed = |uid| uid == user || users.contains(&uid) || is_common(uid, has_nobody);
    judge(at, owners, allowed).map_err(io::Error::other)
}

/// Whether that is why there is no connection.
pub(super) fn is_why(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|error| error.is::<Stranger>())
}

fn judge(at: SocketAddr, owners: Owners, allowed: impl Fn(u32) -> bool) -> Result<(), Stranger> {
    // If nobody has either, root's rules lead elsewhere what is sent there, to a container for example.
    let found = [owners.listener, owners.connection];
    if let Some(uid) = found.into_iter().flatten().find(|uid| !allowed(*uid)) {
        return Err(Stranger::Other(at, uid));
    }
    match owners {
        // What the kernel itself has accepted for somebody (AF_SMC) looks like this.
        Owners {
            listener: None,
            connection: Some(0),
        } => Err(Stranger::Unknown(at)),
        _ => Ok(()),
    }
}

/// Whether a uid may be that of a proxy that is for everybody.
fn is_common(uid: u32, has_nobody: impl Fn() -> bool) -> bool {
    cgtproxy_proto::is_common(uid) && (uid != NOBODY || has_nobody())
}

/// Whether the user namespace has that user. Where it has not, the kernel says so of all that it has not.
fn has_nobody() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    map.lines().any(|line| {
        let mut numbers = line.split_whitespace().map(str::parse::<u32>);
        let (Some(Ok(first)), _, Some(Ok(count))) =
            (numbers.next(), numbers.next(), numbers.next())
        else {
            return false;
        };
        NOBODY.checked_sub(first).is_some_and(|at| at < count)
    })
}

/// Who has the other end of a connection from `own` to `at`. The listener is asked for first: if there is none, every
/// connection of its has been accepted by somebody, or was reset.
fn owners(at: SocketAddr, own: SocketAddr) -> io::Result<Owners> {
    let kept = || SOCKET.lock().unwrap_or_else(PoisonError::into_inner);
    let before = kept().take();
    let socket = before.map_or_else(open, Ok)?;
    let owners = Owners {
        // No connection has this other end, so what is found is what would take one.
        listener: owner(&socket, at, any_of_family(at))?,
        connection: owner(&socket, at, own)?,
    };
    // One that has failed is closed, with what may still come from it.
    *kept() = Some(socket);
    Ok(owners)
}

/// What the kernel is asked by, while nobody asks: to make one takes longer than to ask.
static SOCKET: Mutex<Option<OwnedFd>> = Mutex::new(None);

fn open() -> io::Result<OwnedFd> {
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        Some(SOCK_DIAG),
    )?;
    // Nobody but the kernel can answer then.
    connect(&socket, &SocketAddrNetlink::new(0, 0))?;
    Ok(socket)
}

/// Whose socket it is that has the first address, and the second one as its other end.
fn owner(socket: &OwnedFd, at: SocketAddr, other: SocketAddr) -> io::Result<Option<u32>> {
    send(socket, &request(at, other), SendFlags::empty())?;
    let mut answer = [0; 1024];
    // The kernel has answered when send(2) returns.
    let (_, length) = recv(socket, &mut answer, RecvFlags::DONTWAIT)?;
    read(answer.get(..length).unwrap_or_default())
}

fn request(at: SocketAddr, other: SocketAddr) -> Vec<u8> {
    let family = match at {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let family = u8::try_from(family.as_raw()).unwrap_or_default();
    let mut bytes = Vec::with_capacity(REQUEST as usize);
    bytes.extend(REQUEST.to_ne_bytes());
    bytes.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes.extend(NLM_F_REQUEST.to_ne_bytes());
    // Its number, and who asks.
    bytes.extend([0; 8]);
    bytes.extend([family, IPPROTO_TCP, 0, 0]);
    // In whatever state.
    bytes.extend(u32::MAX.to_ne_bytes());
    bytes.extend(at.port().to_be_bytes());
    bytes.extend(other.port().to_be_bytes());
    for address in [at, other] {
        match address.ip() {
            IpAddr::V4(v4) => {
                bytes.extend(v4.octets());
                bytes.extend([0; 12]);
            }
            IpAddr::V6(v6) => bytes.extend(v6.octets()),
        }
    }
    bytes.extend(LOOPBACK.to_ne_bytes());
    // Whatever its cookie.
    bytes.extend([u8::MAX; 8]);
    bytes
}

fn read(answer: &[u8]) -> io::Result<Option<u32>> {
    let short = || io::Error::from(ErrorKind::InvalidData);
    let after = |at| answer.get(at..).and_then(<[u8]>::first_chunk);
    let kind = answer.get(TYPE..).and_then(<[u8]>::first_chunk);
    match kind.copied().map(u16::from_ne_bytes).ok_or_else(short)? {
        SOCK_DIAG_BY_FAMILY => {
            let uid = after(UID).ok_or_else(short)?;
            Ok(Some(u32::from_ne_bytes(*uid)))
        }
        NLMSG_ERROR => {
            let number = after(ERROR).copied().map(i32::from_ne_bytes);
            match number.and_then(i32::checked_neg).ok_or_else(short)? {
                number if number == Errno::NOENT.raw_os_error() => Ok(None),
                number => Err(io::Error::from_raw_os_error(number)),
            }
        }
        _ => Err(short()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    const AT: &str = "127.0.0.1:1080";

    fn judged(listener: Option<u32>, connection: Option<u32>) -> Result<(), Stranger> {
        let owners = Owners {
            listener,
            connection,
        };
        let allowed = |uid| [1001, 2000].contains(&uid) || is_common(uid, || true);
        judge(AT.parse().unwrap(), owners, allowed)
    }

    #[test]
    fn users_of_the_system_are_told_from_others() {
        for uid in [0, 1, 999, 61184, 65519, 65534] {
            assert!(is_common(uid, || true), "{uid}");
            assert_eq!(is_common(uid, || false), uid != NOBODY, "{uid}");
        }
        for uid in [1000, 61183, 65520, 65533, 65535, 65536, 100_000, u32::MAX] {
            assert!(!is_common(uid, || true), "{uid}");
        }
    }

    #[test]
    fn both_the_listener_and_the_connection_must_be_of_somebody_allowed() {
        let at = AT.parse().unwrap();
        for uid in [0, 990, 1001, 2000] {
            judged(Some(uid), Some(uid)).unwrap();
            // It is not accepted yet, or is gone.
            judged(Some(uid), Some(0)).unwrap();
            judged(Some(uid), None).unwrap();
            // The listener is another one by now.
            let other = Err(Stranger::Other(at, 1002));
            assert_eq!(judged(Some(1002), Some(uid)), other);
            assert_eq!(judged(Some(uid), Some(1002)), other);
        }
        assert_eq!(judged(None, Some(1002)), Err(Stranger::Other(at, 1002)));
        assert_eq!(judged(None, Some(0)), Err(Stranger::Unknown(at)));
        judged(None, Some(1001)).unwrap();
        judged(None, None).unwrap();
    }

    #[test]
    #[cfg_attr(miri, ignore = "needs sockets")]
    fn what_the_kernel_answers_is_read_to_the_letter() {
        let mut found = vec![0; 88];
        found[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        found[80..84].copy_from_slice(&1002_u32.to_ne_bytes());
        assert_eq!(read(&found).unwrap(), Some(1002));
        let error = |number: i32| {
            let mut bytes = vec![0; 36];
            bytes[4..6].copy_from_slice(&NLMSG_ERROR.to_ne_bytes());
            bytes[16..20].copy_from_slice(&number.to_ne_bytes());
            bytes
        };
        assert_eq!(read(&error(-2)).unwrap(), None);
        let refused = read(&error(-1)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::PermissionDenied);
        for wrong in [
            &[][..],
            &found[..83],
            &error(-2)[..19],
            &error(i32::MIN),
            &[0; 88],
        ] {
            read(wrong).unwrap_err();
        }
    }

    /// Who has the other end, as long as somebody listens and afterwards.
    #[tokio::test]
    async fn the_kernel_says_who_listens_and_who_has_accepted() {
        let own = Some(rustix::process::geteuid().as_raw());
        for (listening, at) in [
            ("127.0.0.1:0", "127.0.0.1"),
            ("0.0.0.0:0", "127.0.0.2"),
            ("[::1]:0", "::1"),
            ("[::]:0", "::1"),
            ("[::]:0", "127.0.0.1"),
            ("[::]:0", "::ffff:127.0.0.1"),
        ] {
            let listener = TcpListener::bind(listening).await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let at = SocketAddr::new(at.parse().unwrap(), port);
            let stream = TcpStream::connect(at).await.unwrap();
            let of = |stream: &TcpStream| {
                let own = canonical(stream.local_addr().unwrap());
                owners(canonical(stream.peer_addr().unwrap()), own).unwrap()
            };
            assert_eq!(of(&stream).listener, own, "{listening}");
            check(&stream, &[]).unwrap();
            let accepted = listener.accept().await.unwrap();
            assert_eq!(of(&stream).connection, own, "{listening}");
            drop(listener);
            let alone = Owners {
                listener: None,
                connection: own,
            };
            assert_eq!(of(&stream), alone, "{listening}");
            drop((stream, accepted));
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "needs a file of the system's")]
    fn the_user_namespace_of_the_machine_has_nobody() {
        let map = std::fs::read_to_string("/proc/self/uid_map").unwrap();
        let all = map.split_whitespace().eq(["0", "0", "4294967295"]);
        assert!(!all || has_nobody(), "{map}");
    }
}
