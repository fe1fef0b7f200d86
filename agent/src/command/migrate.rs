//! `cgtproxy-agent migrate`

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, fchown};
use std::path::Path;
use std::process::ExitCode;

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use rustix::process::Uid;

use super::Error;
use crate::config;

/// What names standard output in place of a file. (Opened by its name, a file would be written from its beginning, and
/// a pipe of another user's not at all.)
const STANDARD_OUTPUT: [&str; 2] = ["-", "/dev/stdout"];

/// Turns a file of another program into a configuration: on standard output, or in a new file.
pub(super) fn run(file: &Path, output: Option<&Path>, force: bool) -> Result<ExitCode, Error> {
    let bytes = super::read(file)?;
    let output = output.filter(|file| !STANDARD_OUTPUT.map(Path::new).contains(file));
    let (migrated, findings) = match config::migrate(file, &bytes) {
        Ok((text, findings)) => (Some(text), findings),
        Err(findings) => (None, findings),
    };
    let written = match (&migrated, output) {
        (Some(text), Some(file)) => write(file, text.as_bytes(), force),
        _ => Ok(()),
    };
    let mut said = String::new();
    // Writing to a string does not fail.
    let _ = findings.render(&mut said, false);
    // Whoever reads may have seen enough, which changes nothing about the file.
    let _ = io::stderr().write_all(said.as_bytes());
    written?;
    let Some(text) = migrated else {
        return Ok(ExitCode::FAILURE);
    };
    if output.is_none() {
        super::print(text.as_bytes())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes a file, all at once: an agent may be waiting for it. One that it replaces keeps its owner and its mode, since
/// there may be passwords in it, and its place, if there is a link of one's own to it.
fn write(file: &Path, bytes: &[u8], force: bool) -> Result<(), Error> {
    let failed = |source| Error::Write {
        file: file.to_owned(),
        source,
    };
    let own = rustix::process::geteuid();
    if own.is_root()
        && let Some(link) = anothers_link(file)
    {
        let message = format!("{} is another user's link", link.display());
        return Err(failed(io::Error::other(message)));
    }
    if let Some(mut stream) = stream(file, own).map_err(failed)? {
        return stream.write_all(bytes).map_err(failed);
    }
    // Another user's link may lead to a file that they could not write to themselves.
    let place = match fs::symlink_metadata(file) {
        Ok(link) if force && link.uid() == own.as_raw() => match file.canonicalize() {
            Ok(place) => Some(place),
            // As /dev/stderr, which root would put a file in the place of, may lead to a socket.
            Err(_) if file.exists() => {
                return Err(failed(io::Error::other("it leads to what has no name")));
            }
            Err(_) => None,
        },
        _ => None,
    };
    let place = place.unwrap_or_else(|| file.to_owned());
    let replaced = match fs::symlink_metadata(&place) {
        Ok(replaced) if force && replaced.is_file() => Some(replaced),
        // Root could put a file in the place of a device.
        Ok(other) if force && !other.is_symlink() => {
            return Err(failed(io::Error::other("it is not a regular file")));
        }
        _ => None,
    };
    let mut name = place.as_os_str().to_owned();
    name.push(format!(".{}", std::process::id()));
    let new = Path::new(&name);
    let mut opened = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(if replaced.is_some() { 0o600 } else { 0o666 })
        .open(new)
        .map_err(failed)?;
    let mut put = || -> io::Result<()> {
        if let Some(replaced) = &replaced {
            // Nobody else could give it away.
            if own.is_root() {
                fchown(&opened, Some(replaced.uid()), Some(replaced.gid()))?;
            }
            opened.set_permissions(replaced.permissions())?;
        }
        opened.write_all(bytes)?;
        opened.sync_all()?;
        match force {
            true => fs::rename(new, &place),
            false => match renameat_with(CWD, new, CWD, &place, RenameFlags::NOREPLACE) {
                // The file system does not have it. A link takes nobody's place either.
                Err(Errno::INVAL | Errno::NOSYS) => {
                    fs::hard_link(new, &place).and_then(|()| fs::remove_file(new))
                }
                renamed => Ok(renamed?),
            },
        }
    };
    put().map_err(|source| {
        let _ = fs::remove_file(new);
        match source.kind() {
            io::ErrorKind::AlreadyExists => Error::Exists(file.to_owned()),
            _ => failed(source),
        }
    })
}

/// A link that is not root's on the way to where a file is: it may lead into a directory that its owner could not write to
/// themselves, such as /etc/cgtproxy.
fn anothers_link(file: &Path) -> Option<&Path> {
    file.ancestors().skip(1).find(|directory| {
        fs::symlink_metadata(directory)
            .is_ok_and(|found| found.is_symlink() && found.uid() != Uid::ROOT.as_raw())
    })
}

/// A pipe or a device to write to, such as that of a shell's `>(COMMAND)`, in whose place no file is put. A link of
/// another user's is not followed, but for root's.
fn stream(file: &Path, own: Uid) -> io::Result<Option<File>> {
    let leads_there = fs::symlink_metadata(file)
        .is_ok_and(|link| link.uid() == own.as_raw() || link.uid() == Uid::ROOT.as_raw());
    let kind = fs::metadata(file).map(|file| file.file_type());
    let is_stream = kind.is_ok_and(|kind| kind.is_fifo() || kind.is_char_device());
    match leads_there && is_stream {
        true => OpenOptions::new().write(true).open(file).map(Some),
        false => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::{chown, lchown, symlink};

    use super::*;
    use crate::text::chain;

    #[test]
    fn nothing_takes_the_place_of_a_pipe_or_a_socket() {
        let directory = tempfile::tempdir().unwrap();
        let [pipe, link, socket] =
            ["pipe", "link", "socket"].map(|name| directory.path().join(name));
        let made = std::process::Command::new("mkfifo").arg(&pipe).status();
        assert!(made.unwrap().success());
        symlink(&pipe, &link).unwrap();
        for (named, force) in [(&pipe, false), (&pipe, true), (&link, true)] {
            let reader = pipe.clone();
            let reader = std::thread::spawn(move || fs::read(reader).unwrap());
            write(named, b"new", force).unwrap();
            assert_eq!(reader.join().unwrap(), b"new");
        }
        assert!(fs::symlink_metadata(&pipe).unwrap().file_type().is_fifo());
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let error = write(&socket, b"new", true).unwrap_err();
        assert!(
            chain(&error).ends_with(": it is not a regular file"),
            "{error:?}"
        );
        assert!(
            fs::symlink_metadata(&socket)
                .unwrap()
                .file_type()
                .is_socket()
        );
        let (nameless, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let leads = directory.path().join("leads");
        symlink(format!("/proc/self/fd/{}", nameless.as_raw_fd()), &leads).unwrap();
        let error = write(&leads, b"new", true).unwrap_err();
        assert!(
            chain(&error).ends_with(": it leads to what has no name"),
            "{error:?}"
        );
        assert!(leads.is_symlink());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 4);
    }

    /// For root, who may write anywhere.
    #[test]
    fn what_is_another_users_stays_theirs() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let [file, link] = ["file", "link"].map(|name| directory.path().join(name));
        let owner = || fs::metadata(&file).unwrap().uid();
        let other = Some(65534);
        fs::write(&file, "old").unwrap();
        chown(&file, other, other).unwrap();
        symlink(&file, &link).unwrap();
        write(&link, b"new", true).unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"new");
        assert_eq!(owner(), 65534);
        // A link of theirs leads nowhere.
        lchown(&link, other, other).unwrap();
        write(&link, b"newer", true).unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"new");
        assert_eq!(fs::read(&link).unwrap(), b"newer");
        // Nor does one to a directory.
        let [etc, theirs] = ["etc", "theirs"].map(|name| directory.path().join(name));
        fs::create_dir(&etc).unwrap();
        symlink(&etc, &theirs).unwrap();
        write(&theirs.join("config.yaml"), b"new", true).unwrap();
        lchown(&theirs, other, other).unwrap();
        for force in [false, true] {
            for name in ["config.yaml", "new.yaml"] {
                let error = write(&theirs.join(name), b"newer", force).unwrap_err();
                let why = chain(&error);
                assert!(why.ends_with("/theirs is another user's link"), "{why}");
            }
        }
        assert_eq!(fs::read(etc.join("config.yaml")).unwrap(), b"new");
        assert_eq!(fs::read_dir(&etc).unwrap().count(), 1);
    }
}
