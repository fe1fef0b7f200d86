//! Debian's proxies, run on the internet: they ask it from its own addresses.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use crate::others::{SERVERS, server};
use crate::sandbox::{INTERNET_V4, Program, Sandbox};

/// microsocks at port 1080, with more arguments: SOCKS5 without UDP.
#[track_caller]
pub fn microsocks(sandbox: &Sandbox, arguments: &[&str]) -> Program {
    let argv = ["microsocks", "-i", "0.0.0.0", "-p", "1080"];
    sandbox
        .internet_program(&[&argv, arguments].concat())
        .listening(SocketAddr::new(INTERNET_V4, 1080))
}

/// Dante at port 1080 of one of the internet's addresses: SOCKS5 with UDP. Where there is no package of it, the test bed's
/// own server.
#[track_caller]
pub fn dante(sandbox: &Sandbox, at: IpAddr) -> Program {
    let config = format!(
        "logoutput: stderr\n\
         internal: {at} port = 1080\n\
         external: 192.0.2.2\n\
         external: 2001:db8::2\n\
         external.rotation: same-same\n\
         clientmethod: none\nsocksmethod: none\n\
         user.privileged: root\nuser.unprivileged: root\n\
         client pass {{ from: 0/0 to: 0/0 }}\n\
         client pass {{ from: ::/0 to: ::/0 }}\n\
         socks pass {{ from: 0/0 to: 0/0 protocol: tcp udp }}\n\
         socks pass {{ from: 0/0 to: ::/0 protocol: tcp udp }}\n\
         socks pass {{ from: ::/0 to: ::/0 protocol: tcp udp }}\n\
         socks pass {{ from: ::/0 to: 0/0 protocol: tcp udp }}\n"
    );
    fs::write("/run/danted.conf", config).expect("/run is ours");
    let at = SocketAddr::new(at, 1080);
    let danted = server("/usr/sbin/danted", &["-f", "/run/danted.conf"]);
    if !Path::new(SERVERS).join("usr/sbin/danted").exists() {
        return sandbox.socks_server(at);
    }
    sandbox.internet_program(&danted).listening(at)
}

/// tinyproxy at port 3128, with more lines of configuration: HTTP.
#[track_caller]
pub fn tinyproxy(sandbox: &Sandbox, lines: &str) -> Program {
    let config = format!("Port 3128\nListen 192.0.2.2\nTimeout 60\nMaxClients 50\n{lines}\n");
    fs::write("/run/tinyproxy.conf", config).expect("/run is ours");
    sandbox
        .internet_program(&server(
            "/usr/bin/tinyproxy",
            &["-d", "-c", "/run/tinyproxy.conf"],
        ))
        .listening(SocketAddr::new(INTERNET_V4, 3128))
}
