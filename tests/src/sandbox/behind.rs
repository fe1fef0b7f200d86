//! Networks behind the machine, for which it forwards packets.

use std::ffi::OsStr;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use super::app::App;
use super::launch::Launch;
use super::network::{SYSCTLS, await_own};
use super::outcome::Outcome;
use super::server::ServerBuilder;
use super::world::World;
use crate::command::{run, run_with_input};
use crate::wire::ServerKind;

/// A host behind the machine: a network namespace whose default routes lead there.
pub struct Host {
    world: Arc<World>,
    netns: PathBuf,
    network: u8,
    number: u8,
}

impl Host {
    /// An application on it, of root's.
    pub fn app(&self) -> App {
        App::start(&self.world, Launch::root().netns(&self.netns))
    }

    /// An ordinary service on it, to be told where to listen.
    pub fn service(&self, name: &str) -> ServerBuilder {
        ServerBuilder::new(&self.world, name, ServerKind::Local).netns(&self.netns)
    }

    /// Its addresses, one of each family.
    pub fn addresses(&self) -> [IpAddr; 2] {
        addresses(self.network, self.number)
    }

    /// The machine's addresses in that network.
    pub fn gateways(&self) -> [IpAddr; 2] {
        addresses(self.network, MACHINE)
    }

    /// The outcome of asking that destination directly: nothing is translated on the way.
    pub fn direct(&self, to: SocketAddr) -> Outcome {
        Outcome::Direct {
            seen_as: self.addresses()[usize::from(to.is_ipv6())],
        }
    }

    /// Has new connections of this host come from that port.
    ///
    /// # Panics
    /// When the host can't.
    pub fn use_one_port(&self, port: u16) {
        let script = format!("echo {port} {port} >/proc/sys/net/ipv4/ip_local_port_range");
        self.sh(&script);
    }

    fn sh(&self, script: &str) {
        let enter = format!("--net={}", self.netns.display());
        run(&["nsenter", &enter, "sh", "-ec", script]);
    }

    /// Has new sockets of this host send from that address and port, which are another's.
    ///
    /// # Panics
    /// When the host can't.
    pub fn pretend_to_be(&self, other: SocketAddr) {
        let (ip, port) = (other.ip(), other.port());
        let gateway = self.gateways()[usize::from(ip.is_ipv6())];
        let nodad = if ip.is_ipv6() { "nodad" } else { "" };
        let script = format!(
            "ip address add {ip} dev eth0 {nodad}
             ip route replace default via {gateway} src {ip}"
        );
        self.sh(&script);
        if ip.is_ipv6() {
            await_own(self.netns.file_name().and_then(OsStr::to_str), ip);
        }
        self.use_one_port(port);
    }
}

/// The machine's number in each network.
const MACHINE: u8 = 1;

fn addresses(network: u8, host: u8) -> [IpAddr; 2] {
    [
        Ipv4Addr::new(10, network, 0, host).into(),
        Ipv6Addr::new(0x2001, 0xdb8, 0xff, network.into(), 0, 0, 0, host.into()).into(),
    ]
}

fn link_address(network: u8, host: u8) -> String {
    format!("02:00:00:01:{network:02x}:{host:02x}")
}

/// How hosts are connected to the machine.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wiring {
    /// One host, at the other end of a veth pair.
    Veth,
    /// Each host at a port of a bridge of the machine's, as container engines do it.
    Bridge,
}

/// Makes a network, and has the machine forward. As on the uplink, neighbours are told, not found.
pub(crate) fn build(world: &Arc<World>, interface: &str, wiring: Wiring, count: u8) -> Vec<Host> {
    let network = world.new_network();
    let hosts: Vec<_> = (MACHINE + 1..).take(count.into()).collect();
    let [gateway4, gateway6] = addresses(network, MACHINE);
    let of_machine = link_address(network, MACHINE);

    let mut machine = String::new();
    if wiring == Wiring::Bridge {
        machine += &format!("link add {interface} address {of_machine} type bridge\n");
    }
    for &host in &hosts {
        let name = format!("behind-{network}-{host}");
        run(&["ip", "netns", "add", &name]);
        let (end, own) = match wiring {
            Wiring::Veth => (interface.to_owned(), format!("address {of_machine}")),
            Wiring::Bridge => (format!("port-{network}-{host}"), String::new()),
        };
        let theirs = link_address(network, host);
        machine += &format!(
            "link add {end} {own} type veth peer name eth0 address {theirs} netns {name}\n"
        );
        if wiring == Wiring::Bridge {
            machine += &format!("link set {end} master {interface} up\n");
        }
    }
    machine += &format!(
        "address add {gateway4}/24 dev {interface}\n\
         address add {gateway6}/64 dev {interface} nodad\n\
         link set {interface} up\n"
    );
    let neighbours = |of: u8, device: &str| -> String {
        let others = hosts.iter().copied().chain([MACHINE]).filter(|n| *n != of);
        let lines = others.flat_map(|other| {
            let at = link_address(network, other);
            addresses(network, other).map(|address| {
                format!("neighbour add {address} lladdr {at} dev {device} nud permanent\n")
            })
        });
        lines.collect()
    };
    machine += &neighbours(MACHINE, interface);
    run_with_input(&["ip", "-batch", "-"], &machine);
    await_own(None, gateway6);
    run(&[
        "sh",
        "-ec",
        "cd /proc/sys/net; echo 1 > ipv4/ip_forward; echo 1 > ipv6/conf/all/forwarding",
    ]);

    // More specific than that every address is the internet's own.
    let internet = format!(
        "route add unicast 10.{network}.0.0/24 via 192.0.2.1 dev machine onlink table local\n\
         route add unicast 2001:db8:ff:{network:x}::/64 via 2001:db8::1 dev machine onlink \
         table local\n"
    );
    run_with_input(&["ip", "-netns", "internet", "-batch", "-"], &internet);

    let hosts_of = |host: u8| {
        let name = format!("behind-{network}-{host}");
        let [v4, v6] = addresses(network, host);
        let script = format!(
            "link set lo up\n\
             address add {v4}/24 dev eth0\n\
             address add {v6}/64 dev eth0 nodad\n\
             link set eth0 up\n\
             {}\
             route add default via {gateway4}\n\
             route add default via {gateway6}\n",
            neighbours(host, "eth0")
        );
        let netns = PathBuf::from("/run/netns").join(&name);
        let enter = format!("--net={}", netns.display());
        run(&["nsenter", &enter, "sh", "-ec", SYSCTLS]);
        run_with_input(&["ip", "-netns", &name, "-batch", "-"], &script);
        await_own(Some(&name), v6);
        world.add_host(v4);
        Host {
            world: Arc::clone(world),
            netns,
            network,
            number: host,
        }
    };
    hosts.iter().copied().map(hosts_of).collect()
}
