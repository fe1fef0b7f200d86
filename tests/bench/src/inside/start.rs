//! How long an agent takes to start.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::site::{PATIENCE, Site, UID, this_program};
use crate::birth::{self, now};
use crate::order::Start;

/// Between two sends of the process that looks when the verdict is there: it must not take a processor from
/// those that bring it about.
const PAUSE: Duration = Duration::from_micros(200);

impl Site<'_> {
    /// Stops the agent if it runs, starts one, and waits until the traffic of the control group that was made last
    /// obeys.
    pub(super) fn start(&mut self) -> Start {
        if let Some(mut agent) = self.agent.take() {
            agent.stop();
        }
        let last = self.base.join(format!("bench-map-{}.scope", self.number));
        let socket = "/run/testbed/start-notify";
        let _ = std::fs::remove_file(socket);
        let notify = UnixDatagram::bind(socket).expect("/run is ours");
        std::fs::set_permissions(socket, PermissionsExt::from_mode(0o666)).expect("ours");
        notify.set_read_timeout(Some(PATIENCE)).expect("a time");
        let home = self.user.home();
        let mut command = this_program();
        command
            .args(["--become", "/run/testbed/bin/cgtproxy-agent", "run"])
            .args(["--socket", "/run/cgtproxy/helper.sock", "--config"])
            .arg(home.join(".config/cgtproxy/config.yaml"))
            .env_clear()
            .env("HOME", &home)
            .env("XDG_RUNTIME_DIR", format!("/run/user/{UID}"))
            .env("NOTIFY_SOCKET", socket)
            .uid(UID)
            .gid(UID)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let born = birth::sender(&last, PATIENCE, PAUSE).expect("a process");
        let mut agent = command.spawn().expect("the agent can be started");
        let mut line = String::new();
        BufReader::new(agent.stdout.take().expect("piped"))
            .read_line(&mut line)
            .expect("it says when");
        let start: u64 = line.trim().parse().expect("a time");
        let mut buffer = [0; 4096];
        let ready = loop {
            let length = notify.recv(&mut buffer).expect("the agent gets ready");
            if buffer[..length].starts_with(b"READY=1") || find(&buffer[..length], b"\nREADY=1") {
                break now() - start;
            }
        };
        let sent = born.sent().expect("it reports");
        let in_force = sent.dropped.expect("the verdict comes") - start;
        kill(Pid::from_raw(agent.id().cast_signed()), Signal::SIGTERM).expect("it is alive");
        agent.wait().expect("it ends");
        Start { in_force, ready }
    }
}

/// Says what time it is, and becomes a program: so starting one takes from execve(2) on, and not the time in which this
/// large process is copied.
pub(crate) fn become_program(words: &[String]) -> ExitCode {
    let [program, arguments @ ..] = words else {
        return ExitCode::FAILURE;
    };
    println!("{}", now());
    let error = Command::new(program).args(arguments).exec();
    eprintln!("{program}: {error}");
    ExitCode::FAILURE
}

fn find(bytes: &[u8], what: &[u8]) -> bool {
    bytes.windows(what.len()).any(|window| window == what)
}
