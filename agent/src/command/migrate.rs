//! `cgtproxy-agent migrate`

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, fchown};
use std::path::Path;
use std::process::ExitCode;

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::Error;
use crate::config;

/// Turns a file of another program into a configuration: on standard output, or in a new file.
pub(super) fn run(file: &Path, output: Option<&Path>, force: bool) -> Result<ExitCode, Error> {
    let bytes = super::read(file)?;
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
    // Another user's link may lead to a file that they could not write to themselves.
    let own = rustix::process::geteuid();
    let place = match fs::symlink_metadata(file) {
        Ok(link) if force && link.uid() == own.as_raw() => file.canonicalize().ok(),
        _ => None,
    };
    let place = place.unwrap_or_else(|| file.to_owned());
    let replaced = match fs::symlink_metadata(&place) {
        Ok(replaced) if force && replaced.is_file() => Some(replaced),
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{chown, lchown, symlink};

    use super::*;

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
    }
}
