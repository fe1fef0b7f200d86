//! What a service's unit leaves it, tried by a program that is confined as the service is.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::system::{System, SystemUser};

/// Where the system finds what is tried.
const SCRIPT: &str = "/etc/confined.pl";
/// Where a unit writes what came of it: the journal may not know any more which unit it was that wrote.
const SAID: &str = "confined.txt";

/// Tries, and says for each what came of it: `ok`, or the name of the error. The arguments are the numbers of two system
/// calls, mmap(2) and unshare(2).
const TRY: &str = r#"
use Errno; use Fcntl; use Socket;
my ($mmap, $unshare) = @ARGV;
sub said { my ($what, $done) = @_; my ($error) = grep { $!{$_} } keys %!; print "$what ", $done ? "ok" : $error, "\n" }
said("open:$_", sysopen(my $f, $_, O_RDONLY)) for "/proc/1/stat", "/proc/cpuinfo", "/dev/kmsg", "/etc/shadow";
said("socket:$_", socket(my $s, $_, SOCK_DGRAM, 0)) for 1, 2, 10, 17;
said("memory", syscall($mmap, 0, 4096, 7, 0x22, -1, 0) != -1);
open(my $mounts, "<", "/proc/self/mountinfo") or die "mountinfo: $!";
my %seen;
for (grep { !$seen{$_}++ } map { (split)[4] } <$mounts>) {
    next if m{^/proc/} || m{cgtproxy-testbed};
    said("create:$_", sysopen(my $f, "$_/tried-$$", O_WRONLY | O_CREAT | O_EXCL));
}
for (["user", 0x10000000], ["mount", 0x00020000], ["network", 0x40000000]) {
    said("unshare:$$_[0]", syscall($unshare, $$_[1]) != -1);
}
"#;

/// Where a service has a file system of its own, or what is no file of the machine's.
const PRIVATE: [&str; 7] = [
    "/dev/pts",
    "/dev/shm",
    "/dev/hugepages",
    "/dev/mqueue",
    "/proc",
    "/tmp",
    "/var/tmp",
];

/// What came of it, by what was tried.
pub struct Tried(BTreeMap<String, String>);

impl Tried {
    /// Tries as root, with nothing taken away.
    ///
    /// # Panics
    /// When that can't be done.
    #[track_caller]
    pub fn by_root(system: &System) -> Self {
        write(system);
        let [mmap, unshare] = numbers();
        Self::read(&system.run(&["perl", SCRIPT, mmap, unshare]))
    }

    /// Tries as a user, with nothing taken away.
    ///
    /// # Panics
    /// When that can't be done.
    #[track_caller]
    pub fn by_user(system: &System, user: &SystemUser) -> Self {
        write(system);
        let [mmap, unshare] = numbers();
        Self::read(&system.run_as(user, &["perl", SCRIPT, mmap, unshare]))
    }

    /// Tries with all that this unit of the system's has of confinement: the unit itself, with another program.
    ///
    /// # Panics
    /// When that can't be done.
    #[track_caller]
    fn by(system: &System, unit: &str) -> Self {
        write(system);
        let text = system.run(&["systemctl", "cat", "--no-pager", unit]);
        let probe = format!("confined-{unit}");
        let install = "printf %s \"$1\" >\"/run/systemd/system/$2\" && systemctl daemon-reload";
        system.run(&["sh", "-c", install, "sh", &probe_of(&text, unit), &probe]);
        system.run(&["systemctl", "start", &probe]);
        Self::read(&system.run(&["cat", &format!("/run/{SAID}")]))
    }

    /// Tries with all that this unit of a user's has of confinement.
    ///
    /// # Panics
    /// When that can't be done.
    #[track_caller]
    fn by_users(system: &System, user: &SystemUser, unit: &str) -> Self {
        write(system);
        let text = system.run_as(user, &["systemctl", "--user", "cat", "--no-pager", unit]);
        // The directory is the daemon's, under a name that the copy would share.
        let text: String = text
            .split_inclusive('\n')
            .filter(|line| !line.starts_with("RuntimeDirectory"))
            .collect();
        let probe = format!("confined-{unit}");
        let install = "units=$XDG_RUNTIME_DIR/systemd/user && mkdir -p \"$units\" &&
                       printf %s \"$1\" >\"$units/$2\" && systemctl --user daemon-reload";
        system.run_as(
            user,
            &["sh", "-c", install, "sh", &probe_of(&text, unit), &probe],
        );
        system.run_as(user, &["systemctl", "--user", "start", &probe]);
        let said = format!("/run/user/{}/{SAID}", user.uid());
        Self::read(&system.run_as(user, &["cat", &said]))
    }

    fn read(said: &str) -> Self {
        let pairs = said.lines().filter_map(|line| line.split_once(' '));
        let owned = pairs.map(|(what, came)| (what.to_owned(), came.to_owned()));
        let this = Self(owned.collect());
        // The last of all.
        assert!(this.0.contains_key("unshare:network"), "{said}");
        this
    }

    /// What came of one of them.
    ///
    /// # Panics
    /// When it was not tried.
    #[track_caller]
    pub fn of(&self, what: &str) -> &str {
        let came = self.0.get(what);
        came.unwrap_or_else(|| panic!("{what} was not tried: {:?}", self.0))
    }

    /// Insists that what no daemon needs was refused, each by what is to refuse it.
    ///
    /// # Panics
    /// When something was not.
    #[track_caller]
    fn assert_refused(&self) {
        for (what, how) in [
            // Packets as they are on the wire.
            ("socket:17", "EAFNOSUPPORT"),
            ("unshare:user", "EPERM"),
            ("unshare:mount", "EPERM"),
            ("unshare:network", "EPERM"),
        ] {
            assert_eq!(self.of(what), how, "{what}");
        }
        // Memory that can be written and executed: refused by a filter of system calls, or by the kernel itself, which newer
        // systemd asks for that (PR_SET_MDWE).
        let memory = self.of("memory");
        assert!(["EPERM", "EACCES"].contains(&memory), "memory: {memory}");
        // The question is one that can be answered otherwise.
        assert_eq!(self.of("socket:1"), "ok");
    }

    /// Insists on what came of sockets of IPv4 and IPv6.
    ///
    /// # Panics
    /// When something else did.
    #[track_caller]
    fn assert_internet(&self, came: &str) {
        for family in ["socket:2", "socket:10"] {
            assert_eq!(self.of(family), came, "{family}");
        }
    }

    /// The places of mounts where a file could be made.
    fn written(&self) -> BTreeSet<&str> {
        let made = self.0.iter().filter(|(_, came)| *came == "ok");
        made.filter_map(|(what, _)| what.strip_prefix("create:"))
            .collect()
    }
}

/// Insists that a service can write to no file but those in its own directory in /run, in places that are private to it,
/// and in these others, and that what nobody confined needs is refused. Returns what else was tried.
///
/// # Panics
/// When it can.
#[track_caller]
pub fn assert_confined(system: &System, unit: &str, others: &[&str]) -> Tried {
    let name = unit.trim_end_matches(".service");
    let private = |place: &str| PRIVATE.contains(&place) || others.contains(&place);
    let own = format!("/run/{name}");
    // By which it could ask to be told that memory is short: since systemd 254.
    let pressure = format!(
        "/sys/fs/cgroup{}/memory.pressure",
        system.property(unit, "ControlGroup")
    );
    let mounts = mounts(system, &system.property(unit, "MainPID"));
    for (place, read_only) in &mounts {
        let may = *read_only
            || Path::new(place).starts_with(&own)
            || private(place)
            || *place == pressure;
        assert!(may, "{place} is not read-only: {mounts:?}");
    }
    let tried = Tried::by(system, unit);
    tried.assert_refused();
    tried.assert_internet("EAFNOSUPPORT");
    assert_eq!(tried.of("open:/dev/kmsg"), "ENOENT");
    let own = format!("/run/confined-{name}");
    for place in tried.written() {
        assert!(place == own || private(place), "{place}");
    }
    tried
}

/// Insists that what no daemon needs is refused to a user's service, and sockets of IPv4 and IPv6 as well, unless it is
/// one for the `internet`.
///
/// # Panics
/// When it is not.
#[track_caller]
pub fn assert_users_confined(system: &System, user: &SystemUser, unit: &str, internet: bool) {
    let tried = Tried::by_users(system, user, unit);
    tried.assert_refused();
    tried.assert_internet(if internet { "ok" } else { "EAFNOSUPPORT" });
}

/// A copy of a unit, by its text, that runs what tries in the place of its program.
fn probe_of(text: &str, unit: &str) -> String {
    let name = unit.trim_end_matches(".service");
    let not_copied = [
        "Type",
        "Exec",
        "Restart",
        "FileDescriptor",
        "Timeout",
        "JobRunning",
        "Requires",
        "Wants",
        "After",
        "Before",
        "Condition",
        "StartLimit",
        "RuntimeDirectoryPreserve",
        "[Install]",
        "WantedBy",
        "Also",
        "#",
    ];
    let copy: String = text
        .lines()
        .filter(|line| !not_copied.iter().any(|key| line.starts_with(key)))
        .map(|line| match line.starts_with("User=") {
            true => format!("{line}\n"),
            false => format!("{}\n", line.replace(name, &format!("confined-{name}"))),
        })
        .collect();
    let [mmap, unshare] = numbers();
    copy + &format!(
        "Type=oneshot\nStandardOutput=truncate:%t/{SAID}\nExecStart=/usr/bin/perl {SCRIPT} {mmap} {unshare}\n"
    )
}

fn write(system: &System) {
    let file = system.root().join(SCRIPT.trim_start_matches('/'));
    std::fs::write(file, TRY).expect("the overlay is ours");
}

/// Those of mmap(2) and unshare(2).
fn numbers() -> [&'static str; 2] {
    match std::env::consts::ARCH {
        "x86_64" => ["9", "272"],
        // asm-generic/unistd.h
        _ => ["222", "97"],
    }
}

/// The mounts that a process of the system sees, and whether each is read-only. Of those at one place, the last is seen.
///
/// # Panics
/// When there is no such process.
#[track_caller]
pub fn mounts(system: &System, pid: &str) -> BTreeMap<String, bool> {
    let table = system.run(&["cat", &format!("/proc/{pid}/mountinfo")]);
    let mount = |line: &str| {
        // number, parent's number, device, root, place, options
        let fields: Vec<&str> = line.split(' ').collect();
        let read_only = fields[5].split(',').any(|option| option == "ro");
        (fields[4].to_owned(), read_only)
    };
    // What the test bed has mounted there.
    let own = |place: &str| Path::new(place).starts_with("/usr/local/lib/cgtproxy-testbed");
    let all = table.lines().map(mount);
    all.filter(|(place, _)| !own(place)).collect()
}
