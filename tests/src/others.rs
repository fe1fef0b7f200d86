//! Packages of other programs that are about networks, as Debian has them: put into a system's root
//! before it boots, and never installed on the host, where they would begin to work.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::sandbox::bin_dir;

/// firewalld, ufw and iptables, with what they need and the host has not.
///
/// # Panics
/// When the archives are not there.
#[track_caller]
pub fn install(root: &Path) {
    unpack_all("others", root);
    configure(root);
}

/// Where a sandbox has the servers, once [`server`] has been called.
pub const SERVERS: &str = "/run/servers";

/// A command that runs sshd, stunnel, danted or tinyproxy from where the first one has unpacked them all, with their
/// libraries.
///
/// # Panics
/// When the archives are not there.
#[track_caller]
pub fn server<'a>(program: &'a str, arguments: &[&'a str]) -> Vec<&'a str> {
    let root = Path::new(SERVERS);
    if !root.exists() {
        // Where /lib is a link to usr/lib, the archives have files in both.
        fs::create_dir_all(root.join("usr/lib")).expect("the root is ours");
        symlink("usr/lib", root.join("lib")).expect("the root is ours");
        unpack_all("servers", root);
    }
    let script = "export LD_LIBRARY_PATH=$(echo /run/servers/usr/lib/*-linux-gnu); exec /run/servers$0 \"$@\"";
    [&["sh", "-c", script, program], arguments].concat()
}

#[track_caller]
fn unpack_all(name: &str, root: &Path) {
    let directory = bin_dir()
        .parent()
        .expect("it is in the target directory")
        .join(name);
    let archives = archives(&directory);
    assert!(
        !archives.is_empty(),
        "{} has no packages in it: run `.ci/dependencies test`",
        directory.display()
    );
    for archive in archives {
        unpack(&archive, root);
    }
}

/// What .ci/dependencies has put there.
fn archives(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path());
    paths
        .filter(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .collect()
}

#[track_caller]
fn unpack(archive: &Path, root: &Path) {
    let mut tar = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(archive)
        .stdout(Stdio::piped())
        .spawn()
        .expect("dpkg-deb can be started");
    let status = Command::new("tar")
        // /lib is a link to usr/lib.
        .args(["--extract", "--keep-directory-symlink", "--directory"])
        .arg(root)
        .stdin(tar.stdout.take().expect("piped"))
        .status()
        .expect("tar can be started");
    let read = tar.wait().expect("a child can be waited for");
    assert!(status.success() && read.success(), "{}", archive.display());
}

/// What the packages' scripts would do.
fn configure(root: &Path) {
    for program in ["iptables", "ip6tables"] {
        for suffix in ["", "-save", "-restore"] {
            let link = root.join(format!("usr/sbin/{program}{suffix}"));
            let _ = fs::remove_file(&link);
            symlink("xtables-nft-multi", link).expect("the root is ours");
        }
    }
    // Not "desktop", where users may ask: the one of servers.
    let actions = root.join("usr/share/polkit-1/actions");
    let name = "org.fedoraproject.FirewallD1";
    let link = actions.join(format!("{name}.policy"));
    let _ = fs::remove_file(&link);
    symlink(format!("{name}.server.policy.choice"), link).expect("the root is ours");
    let (from, to) = (root.join("usr/share/ufw"), root.join("etc/ufw"));
    let copy = |from: PathBuf| {
        let name = from.file_name().expect("a file");
        fs::copy(&from, to.join(name)).expect("the root is ours");
    };
    for entry in fs::read_dir(from.join("iptables"))
        .expect("it was unpacked")
        .flatten()
    {
        copy(entry.path());
    }
    for name in ["before.init", "after.init", "ufw.conf"] {
        copy(from.join(name));
    }
}
