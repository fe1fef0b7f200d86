//! Configuration files, as they are read from disk.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;

/// The largest configuration file that is read, in bytes: people write them by hand.
pub const LONGEST: usize = 1 << 20;

/// Reads a configuration file, and waits for nobody: a pipe, a socket or a device is refused.
///
/// # Errors
/// If the kernel refuses, `path` is no regular file, or the file is longer than [`LONGEST`].
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    // Opening a device may make it do something.
    if !std::fs::metadata(path)?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    // Nor does it wait if somebody has put a pipe in its place by now.
    let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
    let file: File = OpenOptions::new()
        .read(true)
        .custom_flags(nonblocking)
        .open(path)?;
    read_from(file)
}

/// Reads a configuration from an open file, such as standard input.
///
/// # Errors
/// If the kernel refuses, or there are more than [`LONGEST`] bytes.
pub fn read_from(file: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(LONGEST as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > LONGEST {
        let message = format!("it is longer than {LONGEST} bytes");
        return Err(io::Error::other(message));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "reads files")]
    fn only_files_of_a_sensible_length_are_read() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let message = |path: &Path| read(path).unwrap_err().to_string();
        std::fs::write(at("right"), "a: 1\n").unwrap();
        assert_eq!(read(&at("right")).unwrap(), b"a: 1\n");
        let kind = read(&at("absent")).unwrap_err().kind();
        assert_eq!(kind, io::ErrorKind::NotFound);
        std::fs::write(at("long"), vec![b'#'; LONGEST]).unwrap();
        assert_eq!(read(&at("long")).unwrap().len(), LONGEST);
        std::fs::write(at("longer"), vec![b'#'; LONGEST + 1]).unwrap();
        assert_eq!(message(&at("longer")), "it is longer than 1048576 bytes");
        let pipe = at("pipe");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &pipe,
            rustix::fs::FileType::Fifo,
            0o600.into(),
            0,
        )
        .unwrap();
        for special in [pipe.as_path(), directory.path(), Path::new("/dev/zero")] {
            assert_eq!(message(special), "it is not a regular file");
        }
    }
}
