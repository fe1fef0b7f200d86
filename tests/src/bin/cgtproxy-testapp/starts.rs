//! Starts programs in control groups of their own, as a service manager does, that send at once: the worst
//! case for whoever has to decide about them in time.
//!
//! A child that does not even execute another program is faster than any that does.

use std::fs::{File, create_dir, remove_dir};
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cgtproxy_tests::wire::{Starts, StartsReport};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, SockaddrStorage, connect, sendto, socket,
};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::lines::{parse, say};

/// linux/sched.h
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// How many of the control groups are kept, so that some still are there when the news of them is read.
const KEPT: usize = 8;

/// Starts as many as it is told to, one after another, and reports what they saw.
pub(crate) fn run(spec: &str) {
    let spec: Starts = parse(spec.as_bytes());
    let mut report = StartsReport::default();
    let mut kept: Vec<PathBuf> = Vec::new();
    for number in 0..spec.others {
        make(&other(&spec, number));
    }
    for number in 0..spec.count {
        if spec.others > 0 {
            let old = other(&spec, number % spec.others);
            remove(&old);
            make(&old);
        }
        let directory = spec.parent.join(format!("{}-{number}.scope", spec.name));
        let begun = Instant::now();
        make(&directory);
        let child = match number % 2 {
            0 => clone_into(&directory, || first_act(&spec)),
            _ => fork_and_enter(&directory, || first_act(&spec)),
        };
        match waitpid(child, None).expect("it is a child of ours") {
            WaitStatus::Exited(_, refused) => report.refused += u64::from(refused.unsigned_abs()),
            other => panic!("a child ended with {other:?}"),
        }
        report.microseconds.push(begun.elapsed().as_micros() as u64);
        kept.push(directory);
        if kept.len() > KEPT {
            remove(&kept.remove(0));
        }
    }
    kept.iter().for_each(|directory| remove(directory));
    (0..spec.others).for_each(|number| remove(&other(&spec, number)));
    say(&report);
}

fn other(spec: &Starts, number: u32) -> PathBuf {
    spec.parent.join(format!("other-{number}.scope"))
}

fn make(directory: &Path) {
    create_dir(directory).unwrap_or_else(|e| panic!("{}: {e}", directory.display()));
}

/// A process that has been waited for may be leaving still.
fn remove(directory: &Path) {
    loop {
        match remove_dir(directory) {
            Err(e) if e.kind() == ErrorKind::ResourceBusy => std::thread::yield_now(),
            result => return result.unwrap_or_else(|e| panic!("{}: {e}", directory.display())),
        }
    }
}

/// A child that is in the control group from its birth.
fn clone_into(directory: &Path, act: impl Fn() -> i32) -> Pid {
    let cgroup = File::open(directory).expect("it was made a moment ago");
    clone3(CLONE_INTO_CGROUP, cgroup.as_raw_fd() as u64, act)
}

/// A child that enters the control group by itself.
fn fork_and_enter(directory: &Path, act: impl Fn() -> i32) -> Pid {
    let procs = directory.join("cgroup.procs");
    clone3(0, 0, || {
        std::fs::write(&procs, "0").unwrap_or_else(|e| panic!("{}: {e}", procs.display()));
        act()
    })
}

/// A child that does this and nothing else.
fn clone3(flags: u64, cgroup: u64, act: impl Fn() -> i32) -> Pid {
    let arguments = libc::clone_args {
        flags,
        pidfd: 0,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: libc::SIGCHLD as u64,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup,
    };
    #[allow(
        unsafe_code,
        reason = "neither nix nor the standard library has clone3(2)"
    )]
    // SAFETY: the arguments live until the call returns. Without CLONE_VM it is a fork, and this process
    // has one thread, so that the child may do whatever the parent may.
    let result = unsafe {
        let size = size_of::<libc::clone_args>();
        libc::syscall(libc::SYS_clone3, &raw const arguments, size)
    };
    match Errno::result(result).expect("a child in that control group") {
        0 => std::process::exit(act()),
        child => Pid::from_raw(child as i32),
    }
}

/// Begins a connection to each destination, sends it a datagram, and tells how many of these the kernel
/// refused. If the child is to get through, it goes on until it does.
fn first_act(spec: &Starts) -> i32 {
    let mut refused = 0;
    let deadline = Instant::now() + Duration::from_secs(30);
    for to in &spec.to {
        let _connection = spec.insist.then_some(()).or_else(|| begin_tcp(*to));
        while send_udp(*to) == Err(Errno::EPERM) {
            refused += 1;
            if !spec.insist {
                break;
            }
            assert!(Instant::now() < deadline, "held for ever");
        }
    }
    // One bit is enough for those that insist, and there is no room for more.
    if spec.insist {
        i32::from(refused > 0)
    } else {
        refused
    }
}

fn family(to: SocketAddr) -> AddressFamily {
    match to {
        SocketAddr::V4(_) => AddressFamily::Inet,
        SocketAddr::V6(_) => AddressFamily::Inet6,
    }
}

/// The socket is closed with the process: nothing is sent a second time.
fn begin_tcp(to: SocketAddr) -> Option<()> {
    let flags = SockFlag::SOCK_NONBLOCK;
    let stream = socket(family(to), SockType::Stream, flags, None).expect("a socket");
    let _ = connect(stream.as_raw_fd(), &SockaddrStorage::from(to));
    std::mem::forget(stream);
    Some(())
}

fn send_udp(to: SocketAddr) -> Result<(), Errno> {
    let datagrams = socket(family(to), SockType::Datagram, SockFlag::empty(), None);
    let datagrams = datagrams.expect("a socket");
    let to = SockaddrStorage::from(to);
    sendto(datagrams.as_raw_fd(), b"early", &to, MsgFlags::empty()).map(|_| ())
}
