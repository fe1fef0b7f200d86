//! Processes that are born in a cgroup: clone3(2) with `CLONE_INTO_CGROUP`, as systemd starts services.
//!
//! Neither the standard library nor nix offers that, so this is the crate's one file with `unsafe`.
//! The child of such a clone has one thread of its parent's: until it executes another program it
//! may only make system calls.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;
use std::time::Duration;

/// `CLONE_INTO_CGROUP` (linux/sched.h).
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// `struct clone_args` (linux/sched.h), as of Linux 5.7.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// The discard port on the loopback interface: where senders send to.
pub(crate) const PORT: u16 = 9;

/// `CLONE_VM | CLONE_VFORK` (linux/sched.h): with its parent's memory, for which the parent waits.
#[cfg(target_arch = "x86_64")]
const BORROWED: u64 = 0x100 | 0x4000;

/// What a sender has seen. Times are nanoseconds of the monotonic clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sent {
    /// When it was about to send for the first time.
    pub(crate) first: u64,
    /// When a packet was dropped; none if that did not happen in time.
    pub(crate) dropped: Option<u64>,
    /// How many packets left before.
    pub(crate) left: u64,
}

impl Sent {
    fn new([first, dropped, left]: [u64; 3]) -> Self {
        Self {
            first,
            dropped: Some(dropped).filter(|&at| at != 0),
            left,
        }
    }
}

/// A process that was born in a cgroup.
pub(crate) struct Born {
    pid: libc::pid_t,
    record: File,
}

/// Nanoseconds of the monotonic clock, which all processes share.
pub(crate) fn now() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is a valid place for the result, and the clock exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned()
}

/// As fork(2), with the child in `cgroup`: None in the child.
///
/// # Safety
/// The child must call nothing that another thread of the parent may hold a lock for: it makes
/// system calls, and executes a program or ends.
unsafe fn clone_into(cgroup: BorrowedFd<'_>) -> io::Result<Option<libc::pid_t>> {
    let mut arguments = CloneArgs {
        flags: CLONE_INTO_CGROUP,
        exit_signal: libc::SIGCHLD as u64,
        cgroup: cgroup.as_raw_fd().cast_unsigned().into(),
        ..CloneArgs::default()
    };
    // SAFETY: the arguments are a valid structure of the given size. Without CLONE_VM the child
    // goes on with a copy of this stack.
    let result =
        unsafe { libc::syscall(libc::SYS_clone3, &raw mut arguments, size_of::<CloneArgs>()) };
    match result {
        0 => Ok(None),
        1.. => Ok(Some(result as libc::pid_t)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives birth, in this cgroup, to a process that sends datagrams to [`PORT`] until one is dropped or
/// `patience` is over, with a pause after each.
pub(crate) fn sender(cgroup: &Path, patience: Duration, pause: Duration) -> io::Result<Born> {
    let directory = File::open(cgroup)?;
    let (reader, writer) = nix::unistd::pipe()?;
    // SAFETY: the child makes system calls, with a pointer to what lives in this frame, and ends.
    let pid = unsafe {
        match clone_into(directory.as_fd())? {
            None => {
                let seen = send(patience, pause);
                libc::write(writer.as_raw_fd(), seen.as_ptr().cast(), size_of_val(&seen));
                libc::_exit(0)
            }
            Some(pid) => pid,
        }
    };
    Ok(Born {
        pid,
        record: File::from(reader),
    })
}

/// What a child does that has its parent's memory.
#[cfg(target_arch = "x86_64")]
struct Errand {
    patience: Duration,
    seen: [u64; 3],
}

/// As [`sender`] without a pause, and waits for it: a process that has nothing of its own, and is there
/// as soon as one can be. To copy this program's memory for it would take longer than a verdict does.
pub(crate) fn send_at_once(cgroup: &Path, patience: Duration) -> io::Result<Sent> {
    #[cfg(not(target_arch = "x86_64"))]
    return sender(cgroup, patience, Duration::ZERO)?.sent();
    #[cfg(target_arch = "x86_64")]
    {
        let directory = File::open(cgroup)?;
        let mut stack = vec![0_u128; 1 << 10];
        let mut errand = Errand {
            patience,
            seen: [0; 3],
        };
        let arguments = CloneArgs {
            flags: CLONE_INTO_CGROUP | BORROWED,
            exit_signal: libc::SIGCHLD as u64,
            stack: stack.as_mut_ptr() as u64,
            stack_size: size_of_val(&*stack) as u64,
            cgroup: directory.as_raw_fd().cast_unsigned().into(),
            ..CloneArgs::default()
        };
        let result: i64;
        // SAFETY: the arguments are a valid structure of the given size. The child goes on behind the system call with
        // all registers but rax and the stack pointer, which is at the end of `stack`, aligned as a call needs it. It
        // calls `run` and does not come back; all that it writes to is its stack, errno and `errand`, and meanwhile
        // this thread waits (CLONE_VFORK).
        unsafe {
            std::arch::asm!(
                "syscall",
                "test rax, rax",
                "jnz 2f",
                "mov rdi, r12",
                "call r13",
                "ud2",
                "2:",
                inlateout("rax") libc::SYS_clone3 => result,
                in("rdi") &raw const arguments,
                in("rsi") size_of::<CloneArgs>(),
                in("r12") &raw mut errand,
                in("r13") run as extern "C" fn(*mut Errand) -> !,
                lateout("rcx") _,
                lateout("r11") _,
            );
        }
        if result < 0 {
            return Err(io::Error::from_raw_os_error(-result as i32));
        }
        let born = Born {
            pid: result as libc::pid_t,
            record: File::open("/dev/null")?,
        };
        born.status()?;
        Ok(Sent::new(errand.seen))
    }
}

#[cfg(target_arch = "x86_64")]
extern "C" fn run(errand: *mut Errand) -> ! {
    // SAFETY: whoever calls this has an errand that nobody else looks at meanwhile. System calls with what lives there.
    unsafe {
        let errand = &mut *errand;
        errand.seen = send(errand.patience, Duration::ZERO);
        libc::_exit(0)
    }
}

/// Gives birth, in this cgroup, to a process that becomes a program without arguments at once.
pub(crate) fn program(cgroup: &Path, program: &CStr) -> io::Result<Born> {
    let directory = File::open(cgroup)?;
    let arguments = [program.as_ptr(), std::ptr::null()];
    let environment = [std::ptr::null()];
    // SAFETY: the child makes two system calls; all three pointers are to NUL-terminated memory.
    let pid = unsafe {
        match clone_into(directory.as_fd())? {
            None => {
                libc::execve(program.as_ptr(), arguments.as_ptr(), environment.as_ptr());
                libc::_exit(127)
            }
            Some(pid) => pid,
        }
    };
    Ok(Born {
        pid,
        record: File::open("/dev/null")?,
    })
}

impl Born {
    /// Waits until it has ended and says what it has seen.
    pub(crate) fn sent(mut self) -> io::Result<Sent> {
        let mut bytes = [0; 24];
        self.record.read_exact(&mut bytes)?;
        self.status()?;
        let word = |n: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[8 * n..8 * n + 8]);
            u64::from_ne_bytes(word)
        };
        Ok(Sent::new([word(0), word(1), word(2)]))
    }

    /// Waits until it has ended and returns its exit status.
    pub(crate) fn status(&self) -> io::Result<i32> {
        let pid = nix::unistd::Pid::from_raw(self.pid);
        match nix::sys::wait::waitpid(pid, None)? {
            nix::sys::wait::WaitStatus::Exited(_, status) => Ok(status),
            other => Err(io::Error::other(format!("{other:?}"))),
        }
    }
}

/// Sends, and returns when the first time was, when a packet was dropped (0: never), and how many left before. Nothing
/// but system calls: this is in the child of a clone.
fn send(patience: Duration, pause: Duration) -> [u64; 3] {
    let address = libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: PORT.to_be(),
        sin_addr: libc::in_addr {
            s_addr: u32::from(std::net::Ipv4Addr::LOCALHOST).to_be(),
        },
        sin_zero: [0; 8],
    };
    let pause = libc::timespec {
        tv_sec: 0,
        tv_nsec: pause.subsec_nanos().into(),
    };
    // SAFETY: system calls with pointers to what lives in this frame, and to a string that is
    // part of the program.
    unsafe {
        let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
        let first = now();
        let give_up = first + patience.as_nanos() as u64;
        let mut seen = [first, 0, 0];
        loop {
            let sent = libc::sendto(
                socket,
                c"x".as_ptr().cast(),
                1,
                0,
                (&raw const address).cast(),
                size_of::<libc::sockaddr_in>() as libc::socklen_t,
            );
            let after = now();
            if sent < 0 && *libc::__errno_location() == libc::EPERM {
                seen[1] = after;
                break;
            }
            if after > give_up {
                break;
            }
            seen[2] += 1;
            if pause.tv_nsec > 0 {
                libc::nanosleep(&raw const pause, std::ptr::null_mut());
            }
        }
        seen
    }
}
