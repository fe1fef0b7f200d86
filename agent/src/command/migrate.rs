//! `cgtproxy-agent migrate`

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::ExitCode;

use super::Error;
use crate::config;

/// Turns a file of another program into a configuration: on standard output, or in a new file.
pub(super) fn run(file: &Path, output: Option<&Path>, force: bool) -> Result<ExitCode, Error> {
    let bytes = config::read_file(file)?;
    let (migrated, findings) = match config::migrate(file, &bytes) {
        Ok((text, findings)) => (Some(text), findings),
        Err(findings) => (None, findings),
    };
    let written = match (&migrated, output) {
        (Some(text), Some(file)) => write(file, text.as_bytes(), force),
        _ => Ok(()),
    };
    let mut err = io::stderr().lock();
    for (severity, line) in findings.lines() {
        // Whoever reads may have seen enough, which changes nothing about the file.
        let _ = writeln!(err, "{}: {line}", severity.name());
    }
    drop(err);
    written?;
    let Some(text) = migrated else {
        return Ok(ExitCode::FAILURE);
    };
    if output.is_none() {
        super::print(text.as_bytes())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes a file, all at once: an agent may be waiting for it. One that it replaces keeps its mode, since there may be
/// passwords in it, and its place, if there is a link to it.
fn write(file: &Path, bytes: &[u8], force: bool) -> Result<(), Error> {
    let failed = |source| Error::Write {
        file: file.to_owned(),
        source,
    };
    let (place, replaced) = match force.then(|| file.canonicalize()) {
        Some(Ok(place)) => {
            let replaced = place.metadata().map_err(failed)?;
            (place, Some(replaced.permissions()))
        }
        _ => (file.to_owned(), None),
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
        if let Some(permissions) = &replaced {
            opened.set_permissions(permissions.clone())?;
        }
        opened.write_all(bytes)?;
        opened.sync_all()?;
        match force {
            true => fs::rename(new, &place),
            // Unlike a renamed file, a link takes nobody's place.
            false => fs::hard_link(new, &place).and_then(|()| fs::remove_file(new)),
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
