//! The programs that the test beds run inside a sandbox, in one binary:
//! the sandbox's own init, a launcher, servers, applications, and a pipe to a Unix socket.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "whatever goes wrong in a test bed is a failed test, and a panic is how one says so"
)]

mod app;
mod boot;
mod http;
mod init;
mod launch;
mod lines;
mod netlink;
mod pipe;
mod server;
mod socks;
mod speaker;
mod starts;
mod traffic;
mod watches;

use std::ffi::OsString;
use std::time::Duration;

const USAGE: &str = "usage: cgtproxy-testapp sandbox CGROUP BIN-DIR CMD… | init BIN-DIR CMD… \
                     | launch CGROUP CMD… | boot CGROUP ROOT NOTIFY-SOCKET | boot-init ROOT NOTIFY-SOCKET \
                     | serve JSON | socks ADDRESS | http ADDRESS | speaker ADDRESS JSON | fleeting ADDRESS | bound ADDRESS \
                     | echo ADDRESS | late ADDRESS MILLISECONDS | listener ADDRESS GREETING | app | starts JSON \
                     | pipe SOCKET | watches PID COUNT | netlink PROTOCOL PORT";

fn main() {
    let mut arguments = std::env::args_os().skip(1);
    let role = arguments.next().expect(USAGE);
    let rest: Vec<OsString> = arguments.collect();
    match (role.to_str(), rest.as_slice()) {
        (Some("sandbox"), [cgroup, bin, command @ ..]) => init::sandbox(cgroup, bin, command),
        (Some("init"), [bin, command @ ..]) => init::init(bin, command),
        (Some("launch"), [cgroup, command @ ..]) => launch::launch(cgroup, command),
        (Some("boot"), [cgroup, root, notify]) => boot::boot(cgroup, root, notify),
        (Some("boot-init"), [root, notify]) => boot::boot_init(root, notify),
        (Some("serve"), [spec]) => server::serve(spec.to_str().expect("JSON is UTF-8")),
        (Some("socks"), [address]) => socks::serve(address.to_str().expect("an address")),
        (Some("http"), [address]) => http::serve(address.to_str().expect("an address")),
        (Some("speaker"), [address, speech]) => {
            let speech = lines::parse(speech.to_str().expect("JSON is UTF-8").as_bytes());
            speaker::serve(address.to_str().expect("an address"), &speech);
        }
        (Some("fleeting"), [address]) => speaker::fleeting(address.to_str().expect("an address")),
        (Some("bound"), [address]) => speaker::bound(address.to_str().expect("an address")),
        (Some("echo"), [address]) => speaker::echo(address.to_str().expect("an address")),
        (Some("late"), [address, milliseconds]) => {
            let milliseconds = milliseconds.to_str().and_then(|text| text.parse().ok());
            speaker::late(
                address.to_str().expect("an address"),
                Duration::from_millis(milliseconds.expect("a number")),
            );
        }
        (Some("listener"), [address, greeting]) => speaker::listen(
            address.to_str().expect("an address"),
            greeting.to_str().expect("text"),
        ),
        (Some("app"), []) => app::run(),
        (Some("starts"), [spec]) => starts::run(spec.to_str().expect("JSON is UTF-8")),
        (Some("pipe"), [socket]) => pipe::run(socket),
        (Some("netlink"), [protocol, port]) => netlink::send(protocol, port),
        (Some("watches"), [pid, count]) => watches::limit(pid, count),
        _ => panic!("{USAGE}"),
    }
}
