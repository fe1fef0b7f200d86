//! `cgtproxy-agent migrate`

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
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

/// Writes a file, all at once: an agent may be waiting for it.
fn write(file: &Path, bytes: &[u8], force: bool) -> Result<(), Error> {
    let failed = |source| Error::Write {
        file: file.to_owned(),
        source,
    };
    let mut name = file.as_os_str().to_owned();
    name.push(format!(".{}", std::process::id()));
    let new = Path::new(&name);
    let mut opened = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(new)
        .map_err(failed)?;
    let mut put = || -> io::Result<()> {
        opened.write_all(bytes)?;
        opened.sync_all()?;
        match force {
            true => fs::rename(new, file),
            // Unlike a renamed file, a link takes nobody's place.
            false => fs::hard_link(new, file).and_then(|()| fs::remove_file(new)),
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
