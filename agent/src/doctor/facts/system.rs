//! Files below /proc, /run and /etc that everybody may read.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use super::groups::unit_runs;
use super::{Gateway, Inotify, Network, System, Tracked};
use crate::config;
use crate::doctor::Look;

/// Addresses on the internet, of the root server A, to which nothing is sent.
const FAR_V4: Ipv4Addr = Ipv4Addr::new(198, 41, 0, 4);
const FAR_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0x503, 0xba3e, 0, 0, 0, 2, 0x30);

/// The discard service (RFC 863).
const PORT: u16 = 9;

/// Where systemd looks for configuration, the strongest last.
const CONFIGURATION: [&str; 4] = [
    "/usr/lib/systemd",
    "/usr/local/lib/systemd",
    "/run/systemd",
    "/etc/systemd",
];

/// A number in a file.
fn number(file: &str) -> Look<u64> {
    let text = fs::read_to_string(file).map_err(|error| format!("{file}: {error}"))?;
    text.trim()
        .parse()
        .map_err(|_| format!("{file} has no number"))
}

/// The limits of inotify.
///
/// # Errors
/// If they can't be read.
pub(crate) fn inotify() -> Look<Inotify> {
    Ok(Inotify {
        watches: number("/proc/sys/fs/inotify/max_user_watches")?,
        instances: number("/proc/sys/fs/inotify/max_user_instances")?,
    })
}

/// Looks at the network.
pub(crate) fn network() -> Network {
    let off = |interface: &str| {
        let file = format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6");
        number(&file).map(|value| value != 0)
    };
    let bridge = |family: &str| {
        let file = format!("/proc/sys/net/bridge/bridge-nf-call-{family}");
        number(&file).is_ok_and(|value| value != 0)
    };
    Network {
        ipv4_route: route(Ipv4Addr::UNSPECIFIED.into(), FAR_V4.into()),
        ipv6: Path::new("/proc/sys/net/ipv6").exists(),
        ipv6_route: route(Ipv6Addr::UNSPECIFIED.into(), FAR_V6.into()),
        ipv6_off_on_lo: off("lo"),
        ipv6_off: off("all"),
        bridge_filter: (bridge("iptables") || bridge("ip6tables")) && has_bridge(),
        tracked: tracked(),
    }
}

/// How full the kernel's table of connections is.
fn tracked() -> Look<Option<Tracked>> {
    let name = "net.netfilter.nf_conntrack";
    // Where the module is not loaded, nothing is tracked.
    if !Path::new("/proc/sys/net/netfilter/nf_conntrack_max").exists() {
        return Ok(None);
    }
    Ok(Some(Tracked {
        count: sysctl(&format!("{name}_count"))?,
        max: sysctl(&format!("{name}_max"))?,
    }))
}

/// Whether there is a bridge.
fn has_bridge() -> bool {
    let interfaces = fs::read_dir("/sys/class/net").into_iter().flatten();
    let mut interfaces = interfaces.flatten();
    interfaces.any(|interface| is_bridge(&interface.path()))
}

/// Whether the interface with this directory in /sys is a bridge.
fn is_bridge(interface: &Path) -> bool {
    interface.join("bridge").exists()
}

/// Looks at what the configuration's `gateway` rests on.
pub(crate) fn gateway(gateway: &config::Gateway) -> Gateway {
    let interfaces: Vec<&str> = gateway
        .interfaces
        .iter()
        .map(|interface| interface.as_str())
        .filter(|name| Path::new("/sys/class/net").join(name).exists())
        .collect();
    let is_bridge = |name: &&&str| is_bridge(&Path::new("/sys/class/net").join(name));
    Gateway {
        proxy: gateway.proxy.as_str().to_owned(),
        forwarding_off: forwarding_off(&interfaces),
        src_valid_mark: src_valid_mark(&interfaces),
        bridges: interfaces
            .iter()
            .filter(is_bridge)
            .map(|name| (*name).to_owned())
            .collect(),
    }
}

/// The variables of sysctl that would have to be 1 for the kernel to forward what comes in on these interfaces.
fn forwarding_off(interfaces: &[&str]) -> Look<Vec<String>> {
    let mut off = Vec::new();
    // IPv4 goes by the variable of the interface, which this one sets for all.
    if Path::new("/proc/sys/net/ipv4").exists() {
        let own = of_interfaces(interfaces, "forwarding", 0)?;
        match sysctl("net.ipv4.ip_forward")? {
            0 if interfaces.is_empty() || !own.is_empty() => {
                off.push("net.ipv4.ip_forward".to_owned());
            }
            _ => off.extend(own),
        }
    }
    if Path::new("/proc/sys/net/ipv6").exists() {
        let name = "net.ipv6.conf.all.forwarding";
        off.extend((sysctl(name)? == 0).then(|| name.to_owned()));
    }
    Ok(off)
}

/// The variables `src_valid_mark` that are 1 for packets from these interfaces.
fn src_valid_mark(interfaces: &[&str]) -> Look<Vec<String>> {
    let all = [&["all"], interfaces].concat();
    of_interfaces(&all, "src_valid_mark", 1)
}

/// The variables of sysctl of IPv4 with this name that have this value, of these interfaces.
fn of_interfaces(interfaces: &[&str], name: &str, value: u64) -> Look<Vec<String>> {
    let mut found = Vec::new();
    for interface in interfaces {
        // A dot in its name is a slash for sysctl(8).
        let variable = format!("net.ipv4.conf.{}.{name}", interface.replace('.', "/"));
        if sysctl(&variable)? == value {
            found.push(variable);
        }
    }
    Ok(found)
}

/// The value of a variable, by its name for sysctl(8).
fn sysctl(name: &str) -> Look<u64> {
    let swapped = |c| match c {
        '.' => '/',
        '/' => '.',
        other => other,
    };
    let path: String = name.chars().map(swapped).collect();
    number(&format!("/proc/sys/{path}"))
}

/// Whether there is a way there: a socket is connected, which sends nothing.
fn route(from: IpAddr, to: IpAddr) -> Look<bool> {
    let socket = match UdpSocket::bind(SocketAddr::new(from, 0)) {
        Ok(socket) => socket,
        Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => return Ok(false),
        Err(error) if is(&error, rustix::io::Errno::AFNOSUPPORT) => return Ok(false),
        Err(error) => return Err(error.to_string()),
    };
    match socket.connect(SocketAddr::new(to, PORT)) {
        Ok(()) => Ok(true),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NetworkUnreachable
                    | io::ErrorKind::HostUnreachable
                    | io::ErrorKind::AddrNotAvailable
            ) =>
        {
            Ok(false)
        }
        Err(error) => Err(error.to_string()),
    }
}

fn is(error: &io::Error, errno: rustix::io::Errno) -> bool {
    rustix::io::Errno::from_io_error(error) == Some(errno)
}

/// Looks at the rest of the machine.
pub(crate) fn system(root: &Path) -> System {
    System {
        linux: linux(),
        v1_network_controllers: fs::read_to_string("/proc/cgroups")
            .map(|text| v1_network_controllers(&text))
            .or_else(|error| match error.kind() {
                // A kernel without version 1.
                io::ErrorKind::NotFound => Ok(Vec::new()),
                _ => Err(error.to_string()),
            }),
        nsswitch: text_of("/etc/nsswitch.conf"),
        resolv: text_of("/etc/resolv.conf"),
        resolved: UnixStream::connect("/run/systemd/resolve/io.systemd.Resolve").is_ok(),
        nscd: UnixStream::connect("/var/run/nscd/socket").is_ok() && nscd_looks_up_names(),
        networkd: unit_runs(root, "systemd-networkd.service"),
        networkd_removes_rules: networkd_configuration()
            .map(|texts| removes_rules(texts.iter().map(String::as_str)))
            .map_err(|error| error.to_string()),
        original: unit_runs(root, "cgtproxy.service"),
    }
}

/// What is in a file that need not be there.
fn text_of(path: &str) -> Look<String> {
    match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        read => read.map_err(|error| error.to_string()),
    }
}

/// Whether nscd answers queries for names of hosts, as far as its configuration can be read: nscd.conf(5).
fn nscd_looks_up_names() -> bool {
    fs::read_to_string("/etc/nscd.conf").is_ok_and(|text| caches_hosts(&text))
}

/// Without a line about it nscd does not. The last one counts.
fn caches_hosts(text: &str) -> bool {
    let mut caches = false;
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default();
        let words: Vec<_> = line.split_whitespace().collect();
        if let ["enable-cache", "hosts", value] = words[..] {
            caches = value == "yes";
        }
    }
    caches
}

fn linux() -> Look<(u32, u32)> {
    let file = "/proc/sys/kernel/osrelease";
    let release = fs::read_to_string(file).map_err(|error| format!("{file}: {error}"))?;
    version(&release).ok_or_else(|| format!("{file} has no version"))
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Those of net_cls and net_prio that have a hierarchy in what proc(5) calls /proc/cgroups.
fn v1_network_controllers(text: &str) -> Vec<String> {
    let mounted = text.lines().filter_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let (name, hierarchy) = (fields.next()?, fields.next()?);
        (matches!(name, "net_cls" | "net_prio") && hierarchy != "0").then(|| name.to_owned())
    });
    mounted.collect()
}

/// The texts of networkd.conf and its drop-ins, in the order in which they count (systemd.syntax(7),
/// networkd.conf(5)): the strongest of each name, main file first, then drop-ins by name.
fn networkd_configuration() -> io::Result<Vec<String>> {
    let mut main = None;
    let mut drop_ins: BTreeMap<std::ffi::OsString, PathBuf> = BTreeMap::new();
    for directory in CONFIGURATION {
        let file = Path::new(directory).join("networkd.conf");
        if file.exists() {
            main = Some(file);
        }
        let entries = match fs::read_dir(Path::new(directory).join("networkd.conf.d")) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for entry in entries {
            let entry = entry?;
            let path = entry.path();
            if path
                .extension()
                .is_some_and(|extension| extension == "conf")
            {
                drop_ins.insert(entry.file_name(), path);
            }
        }
    }
    main.into_iter()
        .chain(drop_ins.into_values())
        .map(fs::read_to_string)
        .collect()
}

/// Whether networkd removes rules that it did not make: what ManageForeignRoutingPolicyRules= says last.
fn removes_rules<'t>(texts: impl Iterator<Item = &'t str>) -> bool {
    let mut removes = true;
    for text in texts {
        let mut section = "";
        for line in text.lines().map(str::trim) {
            if line.starts_with('[') {
                section = line;
            }
            if let Some((key, value)) = line.split_once('=')
                && section == "[Network]"
                && key.trim() == "ManageForeignRoutingPolicyRules"
            {
                let value = value.trim().to_ascii_lowercase();
                match value.as_str() {
                    "" | "1" | "yes" | "y" | "true" | "t" | "on" => removes = true,
                    "0" | "no" | "n" | "false" | "f" | "off" => removes = false,
                    _ => {}
                }
            }
        }
    }
    removes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_linux_versions() {
        assert_eq!(version("6.18.44-fc-v657\n"), Some((6, 18)));
        assert_eq!(version("5.15.0-91-generic"), Some((5, 15)));
        assert_eq!(version("x"), None);
    }

    #[test]
    fn finds_controllers_of_version_1() {
        let text = "#subsys_name\thierarchy\tnum_cgroups\tenabled\n\
                    cpuset\t0\t80\t1\nnet_cls\t4\t1\t1\nnet_prio\t0\t80\t1\n";
        assert_eq!(v1_network_controllers(text), ["net_cls"]);
        assert!(v1_network_controllers("").is_empty());
    }

    #[test]
    fn knows_what_nscd_does() {
        for (text, caches) in [
            ("", false),
            ("\tenable-cache\t\thosts\t\tyes\n", true),
            ("enable-cache passwd yes\n# enable-cache hosts yes\n", false),
            (
                "enable-cache hosts yes\nenable-cache hosts no # names alone\n",
                false,
            ),
        ] {
            assert_eq!(caches_hosts(text), caches, "{text}");
        }
    }

    #[test]
    fn knows_what_networkd_does_with_rules_of_others() {
        let no = "[Network]\nManageForeignRoutingPolicyRules = no\n";
        for (texts, removes) in [
            (&[][..], true),
            (&["[Network]\n#ManageForeignRoutingPolicyRules=no\n"], true),
            (&[no], false),
            (&["[DHCP]\nManageForeignRoutingPolicyRules=no\n"], true),
            (
                &[no, "[Network]\nManageForeignRoutingPolicyRules=yes"],
                true,
            ),
            (&[no, "[Network]\nManageForeignRoutes=yes"], false),
        ] {
            assert_eq!(removes_rules(texts.iter().copied()), removes, "{texts:?}");
        }
    }
}
