//! The system's root: the host's, with an overlay that leaves out what makes the host this one.

use std::collections::HashSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use super::BIN;
use super::user::SystemUser;
use crate::command::run;

/// What the host must have, by the Debian package that brings it: any of the paths will do.
const NEEDED: [(&str, &[&str]); 6] = [
    ("systemd", &["/lib/systemd/systemd"]),
    ("dbus", &["/usr/bin/dbus-daemon", "/usr/bin/dbus-broker"]),
    ("dbus-user-session", &["/usr/lib/systemd/user/dbus.socket"]),
    (
        "libpam-systemd",
        &[
            "/usr/lib/*/security/pam_systemd.so",
            "/lib/*/security/pam_systemd.so",
        ],
    ),
    ("nftables", &["/usr/sbin/nft"]),
    ("iproute2", &["/usr/bin/ip", "/sbin/ip", "/usr/sbin/ip"]),
];

/// Units that want hardware, or a terminal.
const MASKED: [&str; 8] = [
    "systemd-udevd.service",
    "systemd-udevd-kernel.socket",
    "systemd-udevd-control.socket",
    "systemd-udev-trigger.service",
    "getty@tty1.service",
    "console-getty.service",
    "systemd-networkd-wait-online.service",
    "systemd-firstboot.service",
];

/// A root that can be booted.
pub(super) struct Image {
    root: PathBuf,
    users: [SystemUser; 2],
}

impl Image {
    #[track_caller]
    pub(super) fn create() -> Self {
        insist_on_packages();
        let root = mount_overlay();
        forget_the_host(&root);
        let users = add_users(&root);
        let bin = root.join(BIN.trim_start_matches('/'));
        fs::create_dir_all(&bin).expect("the overlay is ours");
        run(&[
            "mount",
            "--bind",
            "/run/testbed/bin",
            bin.to_str().expect("made of ASCII"),
        ]);
        Self { root, users }
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn users(&self) -> [SystemUser; 2] {
        self.users.clone()
    }
}

#[track_caller]
fn insist_on_packages() {
    let missing: Vec<_> = NEEDED
        .iter()
        .filter(|(_, paths)| !paths.iter().any(|path| exists(path)))
        .map(|(package, _)| *package)
        .collect();
    assert!(
        missing.is_empty(),
        "to boot a system the host must have these Debian packages, which are missing: {}",
        missing.join(" ")
    );
}

/// Whether there is such a file; one component may be `*`.
fn exists(path: &str) -> bool {
    match path.split_once("/*/") {
        None => Path::new(path).exists(),
        Some((parent, rest)) => fs::read_dir(parent)
            .is_ok_and(|entries| entries.flatten().any(|e| e.path().join(rest).exists())),
    }
}

/// What is written goes to memory.
fn mount_overlay() -> PathBuf {
    let base = Path::new("/run/testbed/system");
    fs::create_dir_all(base).expect("/run is ours");
    run(&["mount", "-t", "tmpfs", "tmpfs", "/run/testbed/system"]);
    for name in ["upper", "work", "root"] {
        fs::create_dir(base.join(name)).expect("the tmpfs is ours");
        fs::set_permissions(base.join(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
    let root = base.join("root");
    let options = "lowerdir=/,upperdir=/run/testbed/system/upper,workdir=/run/testbed/system/work";
    run(&[
        "mount",
        "-t",
        "overlay",
        "overlay",
        "-o",
        options,
        root.to_str().unwrap(),
    ]);
    root
}

/// A system with the host's packages and none of its services, disks or journals.
fn forget_the_host(root: &Path) {
    let etc = root.join("etc");
    let system = etc.join("systemd/system");
    // What the administrator enabled, and what runs by System V init scripts.
    empty(&system);
    for level in 0..=6 {
        empty(&etc.join(format!("rc{level}.d")));
    }
    empty(&etc.join("rcS.d"));
    empty(&root.join("var/lib/systemd/linger"));
    write(&etc.join("fstab"), "");
    write(
        &etc.join("machine-id"),
        "00000000000000000000636774707278\n",
    );
    write(&etc.join("hostname"), "testbed\n");
    write(
        &etc.join("systemd/journald.conf.d/testbed.conf"),
        "[Journal]\nStorage=volatile\n",
    );
    for unit in MASKED {
        symlink("/dev/null", system.join(unit)).expect("just emptied");
    }
    symlink(
        "/lib/systemd/system/multi-user.target",
        system.join("default.target"),
    )
    .unwrap();
}

/// Two users the host has not.
fn add_users(root: &Path) -> [SystemUser; 2] {
    let passwd = fs::read_to_string(root.join("etc/passwd")).expect("the host has users");
    let group = fs::read_to_string(root.join("etc/group")).expect("the host has groups");
    let taken: HashSet<&str> = passwd
        .lines()
        .chain(group.lines())
        .filter_map(|line| line.split(':').nth(2))
        .collect();
    let mut free = (2001..).filter(|uid: &u32| !taken.contains(uid.to_string().as_str()));
    ["cgt-alice", "cgt-bob"].map(|name| {
        let uid = free.next().expect("there are many");
        let user = SystemUser::new(name, uid);
        let home = user.home();
        append(
            &root.join("etc/passwd"),
            &format!("{name}:x:{uid}:{uid}::{home}:/bin/sh\n"),
        );
        append(&root.join("etc/group"), &format!("{name}:x:{uid}:\n"));
        append(
            &root.join("etc/shadow"),
            &format!("{name}:*:19000:0:99999:7:::\n"),
        );
        let directory = root.join(home.trim_start_matches('/'));
        fs::create_dir_all(&directory).expect("the overlay is ours");
        chown(&directory, Some(uid), Some(uid)).expect("root may give away");
        write(&root.join("var/lib/systemd/linger").join(name), "");
        user
    })
}

fn empty(directory: &Path) {
    if directory.exists() {
        fs::remove_dir_all(directory).expect("the overlay is ours");
    }
    fs::create_dir_all(directory).expect("the overlay is ours");
}

fn write(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().expect("a file")).expect("the overlay is ours");
    // The host's may be a link to somewhere.
    let _ = fs::remove_file(path);
    fs::write(path, text).expect("the overlay is ours");
}

fn append(path: &Path, line: &str) {
    let mut file = fs::File::options()
        .append(true)
        .create(true)
        .open(path)
        .expect("ours");
    file.write_all(line.as_bytes())
        .expect("the overlay is ours");
}
