//! How soon the kernel gives this process a processor when something has happened.
#![allow(unsafe_code)]

use std::io;

/// How long this process is to compute at a time when others want to, in nanoseconds: the least that the kernel takes
/// (sched_setattr(2)).
const SLICE: u64 = 100_000;

/// `struct sched_attr` as of its first version, `SCHED_ATTR_SIZE_VER0` (linux/sched/types.h).
#[repr(C)]
#[derive(Debug, Default)]
struct Attributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    /// For ordinary processes the slice.
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// Asks for short slices. On Linux 6.12 and newer a process that has them, and wakes up, goes before one that computes
/// and has longer ones (`PREEMPT_SHORT`, kernel/sched/features.h). Otherwise it waits for the other's slice to end,
/// some milliseconds, in which an application that has just started has sent its first packets. It gets no more
/// of the processor by it, and needs no privilege. Older kernels don't look at it, and what an administrator
/// has said of this process's priority stays as it is.
///
/// # Errors
/// As sched_setattr(2); in a sandbox that does not allow it, that it is not permitted.
pub fn take_short_turns() -> io::Result<()> {
    let mut attributes = Attributes::default();
    let size = size_of::<Attributes>();
    let this_thread = 0;
    // SAFETY: the kernel writes at most `size` bytes to the structure, which is that long, and any bytes are valid
    // in all of its fields.
    let got = unsafe {
        libc::syscall(
            libc::SYS_sched_getattr,
            this_thread,
            &raw mut attributes,
            size,
            0,
        )
    };
    if got != 0 {
        return Err(io::Error::last_os_error());
    }
    let ordinary = [libc::SCHED_OTHER, libc::SCHED_BATCH];
    if !ordinary
        .map(i32::cast_unsigned)
        .contains(&attributes.policy)
    {
        return Ok(());
    }
    attributes.runtime = SLICE;
    // SAFETY: the kernel reads as many bytes as the structure says that it has, `size` (the call above has set it).
    let set = unsafe {
        libc::syscall(
            libc::SYS_sched_setattr,
            this_thread,
            &raw const attributes,
            0,
        )
    };
    match set {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A number of this thread's that the kernel's scheduler knows.
    fn scheduler(name: &str) -> u64 {
        let text = std::fs::read_to_string("/proc/thread-self/sched").unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let value = line.unwrap().split(':').next_back();
        value.unwrap().trim().parse().unwrap()
    }

    /// Whether this is Linux 6.12 or newer.
    fn slices_can_be_asked_for() -> bool {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        let mut numbers = release.split(|c: char| !c.is_ascii_digit());
        let mut number = || numbers.next().unwrap().parse::<u32>().unwrap();
        (number(), number()) >= (6, 12)
    }

    #[test]
    fn slices_are_short_and_nothing_else_is_changed() {
        // Slices are a thread's own.
        std::thread::spawn(|| {
            rustix::process::nice(3).unwrap();
            let before = scheduler("prio");
            take_short_turns().unwrap();
            if slices_can_be_asked_for() {
                assert_eq!(scheduler("se.slice"), SLICE);
            }
            assert_eq!((scheduler("prio"), scheduler("policy")), (before, 0));
        })
        .join()
        .unwrap();
    }
}
