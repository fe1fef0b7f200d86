//! The machine's network, and the internet at the other end of its uplink.
//!
//! The internet is one network namespace that takes every address for its own, answers echo
//! requests, runs an echo server, and counts each packet that comes in, whatever it is.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use serde_json::Value;

use super::launch::Launch;
use super::server::Control;
use crate::command::{run, run_with_input};
use crate::wait::wait_until;
use crate::wire::{Listen, ServerKind, ServerSpec, Transport};

/// The machine's addresses on its uplink.
pub const MACHINE_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
/// The machine's addresses on its uplink.
pub const MACHINE_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1));
/// The next hop.
pub const INTERNET_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2));
/// The next hop.
pub const INTERNET_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2));
/// The machine's network device.
pub const UPLINK: &str = "uplink";
/// Where the internet answers, on TCP and UDP: http, https, domain and one of no meaning.
pub const PORTS: [u16; 4] = [80, 443, 53, 9999];
/// Where it answers TCP and, on kernels that have it, MPTCP.
pub const MULTIPATH_PORT: u16 = 9998;

/// The namespace the internet is in.
pub(crate) const NETNS: &str = "/run/netns/internet";

/// In every network namespace: anybody may send echo requests, and no error message is held back for
/// there being many.
pub(crate) const SYSCTLS: &str = "\
cd /proc/sys/net
echo 0 2147483647 > ipv4/ping_group_range
echo 0 > ipv4/icmp_ratelimit
echo 0 > ipv6/icmp/ratelimit
for c in all default lo; do echo 0 > ipv4/conf/$c/rp_filter; echo 0 > ipv6/conf/$c/accept_dad; done
";

/// Packets of one kind that have reached the internet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// Who sent them.
    pub source: IpAddr,
    /// The number of the protocol: 1 and 58 ICMP, 6 TCP, 17 UDP, 132 SCTP.
    pub protocol: u8,
    /// How many there were.
    pub packets: u64,
}

/// A directory of the test bed's own inside the sandbox.
pub(crate) fn state_dir(name: &str) -> PathBuf {
    let path = PathBuf::from("/run/testbed").join(name);
    std::fs::create_dir_all(&path).expect("/run is ours");
    path
}

/// Makes links, addresses, routes and the record of arrivals.
///
/// Neighbours are told, not found: the uplink carries only what a test sends. The internet's
/// catch-all is in its table `local`, which makes any address good for any socket there; the
/// machine's own addresses are in the same table, more specific.
pub(crate) fn build() {
    run(&["ip", "netns", "add", "internet"]);
    let machine = "\
link set lo up
link add uplink address 02:00:00:00:00:01 type veth peer name machine address 02:00:00:00:00:02 \
 netns internet
address add 192.0.2.1/24 dev uplink
address add 2001:db8::1/64 dev uplink nodad
link set uplink up
neighbour add 192.0.2.2 lladdr 02:00:00:00:00:02 dev uplink nud permanent
neighbour add 2001:db8::2 lladdr 02:00:00:00:00:02 dev uplink nud permanent
route add default via 192.0.2.2
route add default via 2001:db8::2
";
    let internet = "\
link set lo up
address add 192.0.2.2/24 dev machine
address add 2001:db8::2/64 dev machine nodad
link set machine up
neighbour add 192.0.2.1 lladdr 02:00:00:00:00:01 dev machine nud permanent
neighbour add 2001:db8::1 lladdr 02:00:00:00:00:01 dev machine nud permanent
route add unicast 192.0.2.1/32 dev machine table local
route add unicast 2001:db8::1/128 dev machine table local
route add local 0.0.0.0/0 dev lo table local
route add local ::/0 dev lo table local
";
    run(&["sh", "-ec", SYSCTLS]);
    run(&["nsenter", "--net=/run/netns/internet", "sh", "-ec", SYSCTLS]);
    run_with_input(&["ip", "-batch", "-"], machine);
    run_with_input(&["ip", "-netns", "internet", "-batch", "-"], internet);
    await_own(None, MACHINE_V6);
    run_with_input(
        &["nsenter", "--net=/run/netns/internet", "nft", "-f", "-"],
        // At ingress: even what the internet's own stack would throw away is seen.
        "table netdev record {
             set v4 {
                 typeof ip daddr . ip saddr . meta l4proto
                 size 65535
                 flags dynamic
             }
             set v6 {
                 typeof ip6 daddr . ip6 saddr . meta l4proto
                 size 65535
                 flags dynamic
             }
             chain arrivals {
                 type filter hook ingress device \"machine\" priority 0
                 meta protocol ip add @v4 { ip daddr . ip saddr . meta l4proto counter }
                 meta protocol ip6 add @v6 { ip6 daddr . ip6 saddr . meta l4proto counter }
             }
         }",
    );
}

/// Starts the server that answers for every address.
pub(crate) fn start_internet() -> Control {
    let any = [
        IpAddr::from(Ipv4Addr::UNSPECIFIED),
        IpAddr::from(Ipv6Addr::UNSPECIFIED),
    ];
    let mut listen = Vec::new();
    for transport in [Transport::Tcp, Transport::Udp] {
        for port in PORTS {
            listen.extend(any.map(|ip| Listen {
                transport,
                address: SocketAddr::new(ip, port),
                multipath: false,
            }));
        }
    }
    listen.extend(any.map(|ip| Listen {
        transport: Transport::Tcp,
        address: SocketAddr::new(ip, MULTIPATH_PORT),
        multipath: true,
    }));
    let spec = ServerSpec {
        name: "internet".into(),
        kind: ServerKind::Internet,
        listen,
    };
    Control::start(Launch::root().on_internet(), &spec)
}

/// Returns when an address of IPv6 in this namespace, or here, is its own. The kernel adds the local route a moment after
/// the address, and until then has no socket for what comes in for it.
pub(crate) fn await_own(netns: Option<&str>, address: IpAddr) {
    let mut show = vec!["ip", "-6"];
    if let Some(netns) = netns {
        show.extend(["-netns", netns]);
    }
    show.extend(["route", "show", "table", "local"]);
    let route = format!("local {address} ");
    wait_until("an address to be the namespace's own", || {
        run(&show).lines().any(|line| line.starts_with(&route))
    });
}

/// What the record says about one destination.
pub(crate) fn deliveries(destination: IpAddr) -> Vec<Delivery> {
    let set = if destination.is_ipv4() { "v4" } else { "v6" };
    let text = run(&[
        "nsenter",
        "--net=/run/netns/internet",
        "nft",
        "--json",
        "--numeric-protocol",
        "list",
        "set",
        "netdev",
        "record",
        set,
    ]);
    let listing: Value = serde_json::from_str(&text).expect("nft prints JSON");
    let elements = listing["nftables"][1]["set"]["elem"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    elements
        .iter()
        .map(|element| &element["elem"])
        .filter(|e| parse_ip(&e["val"]["concat"][0]) == destination)
        .map(|e| Delivery {
            source: parse_ip(&e["val"]["concat"][1]),
            protocol: parse_protocol(&e["val"]["concat"][2]),
            packets: e["counter"]["packets"].as_u64().expect("a counter"),
        })
        .collect()
}

fn parse_ip(value: &Value) -> IpAddr {
    value
        .as_str()
        .and_then(|s| s.parse().ok())
        .unwrap_or_else(|| panic!("no address: {value}"))
}

fn parse_protocol(value: &Value) -> u8 {
    value
        .as_u64()
        .and_then(|n| n.try_into().ok())
        .unwrap_or_else(|| panic!("no number: {value}"))
}
