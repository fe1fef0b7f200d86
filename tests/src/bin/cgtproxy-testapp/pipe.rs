//! Bytes to and from a Unix socket: whoever is at the other end sees this process as its peer.

use std::ffi::OsStr;
use std::io::{Read, Write, stdin, stdout};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

/// Copies both ways until the peer closes. The end of stdin closes our half only.
pub(crate) fn run(socket: &OsStr) {
    let mut stream = match UnixStream::connect(socket) {
        Ok(stream) => stream,
        Err(error) => {
            eprintln!("cannot connect to {}: {error}", socket.display());
            std::process::exit(1);
        }
    };
    let mut upward = stream.try_clone().unwrap();
    std::thread::spawn(move || {
        copy(&mut stdin().lock(), &mut upward);
        let _ = upward.shutdown(Shutdown::Write);
    });
    copy(&mut stream, &mut stdout().lock());
}

/// Copies until either side has had enough.
fn copy(from: &mut impl Read, to: &mut impl Write) {
    let mut buffer = [0; 65536];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if to
            .write_all(&buffer[..count])
            .and_then(|()| to.flush())
            .is_err()
        {
            return;
        }
    }
}
