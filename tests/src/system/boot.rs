//! From an image to a running system.

use std::io::{BufRead, BufReader};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::{CGROUP, System};

/// Booting takes seconds; several at a time on a busy machine take longer.
const DEADLINE: Duration = Duration::from_secs(120);
/// Where systemd says that it is up. It is an abstract socket since files change with the root.
const NOTIFY: &str = "cgtproxy-testbed-boot";

/// Boots and waits for systemd's own word that it is up. Returns its supervisor and the process
/// id of its init.
#[track_caller]
pub(super) fn boot(root: &Path) -> (Child, u32) {
    let address = SocketAddr::from_abstract_name(NOTIFY).expect("a short name");
    let notify = UnixDatagram::bind_addr(&address).expect("one system for each sandbox");
    std::fs::create_dir(CGROUP).expect("one system for each sandbox");
    let mut supervisor = Command::new("/run/testbed/bin/cgtproxy-testapp")
        .args(["boot".as_ref(), CGROUP.as_ref(), root.as_os_str()])
        .arg(format!("@{NOTIFY}"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the test application can be started");
    let mut line = String::new();
    let stdout = supervisor.stdout.take().expect("piped");
    BufReader::new(stdout)
        .read_line(&mut line)
        .expect("a pipe can be read");
    let init = line
        .trim()
        .parse()
        .expect("the supervisor says which process it started");
    if let Err(problem) = wait_ready(&notify, &mut supervisor) {
        let console = std::fs::read(format!("/proc/{init}/root/dev/console")).unwrap_or_default();
        panic!(
            "the system {problem}; its console:\n{}",
            String::from_utf8_lossy(&console)
        );
    }
    (supervisor, init)
}

fn wait_ready(notify: &UnixDatagram, supervisor: &mut Child) -> Result<(), String> {
    notify
        .set_read_timeout(Some(Duration::from_millis(200)))
        .expect("not zero");
    let start = Instant::now();
    loop {
        let mut buffer = [0; 4096];
        let count = notify.recv(&mut buffer).unwrap_or(0);
        if buffer[..count]
            .split(|&b| b == b'\n')
            .any(|line| line == b"READY=1")
        {
            return Ok(());
        }
        if supervisor
            .try_wait()
            .expect("a child can be waited for")
            .is_some()
        {
            return Err("has ended".to_owned());
        }
        if start.elapsed() > DEADLINE {
            return Err(format!("is not up after {DEADLINE:?}"));
        }
    }
}

/// Waits for the users' service managers, and insists that nothing has failed to start.
#[track_caller]
pub(super) fn wait_for_users(system: &System) {
    for user in [system.alice(), system.bob()] {
        // They are on their way because the users linger; this joins the wait.
        system.run(&[
            "systemctl",
            "start",
            &format!("user@{}.service", user.uid()),
        ]);
    }
    let failed = system.run(&["systemctl", "--failed", "--plain", "--no-legend"]);
    assert!(failed.trim().is_empty(), "units failed at boot: {failed}");
}
