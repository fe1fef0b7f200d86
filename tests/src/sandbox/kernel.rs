//! What the kernel has: nftables, rules and routes.

use std::net::IpAddr;
use std::os::fd::AsRawFd;

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};
use serde_json::Value;

use super::{App, Outcome, Sandbox, network, proxied};
use crate::command::{output_with_input, run, run_with_input};

/// An element of a verdict map.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Element {
    /// The key as nft prints it: for a cgroup, its path from the cgroup root without a leading
    /// slash, or its id if it is gone.
    pub key: String,
    /// As in a ruleset: `return`, `goto proxy-1000-mihomo`, …; or a number, in a map of those.
    pub verdict: String,
    /// What the element has counted, if it counts.
    pub packets: Option<u64>,
}

/// A rule of the routing policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Lower is earlier.
    pub priority: u64,
    /// The mark it looks for, as `ip` prints it, e.g. `0x1000000/0x1000000`.
    pub mark: Option<String>,
    /// The table it looks things up in.
    pub table: String,
    /// Who made it.
    pub protocol: Option<String>,
}

impl Sandbox {
    /// Changes how many inotify watches the user namespace of a process may have, which must not be
    /// that of the machine.
    ///
    /// # Panics
    /// When that can't be done.
    #[track_caller]
    pub fn limit_watches(&self, pid: u32, count: u32) {
        let testapp = "/run/testbed/bin/cgtproxy-testapp";
        self.run(&[testapp, "watches", &pid.to_string(), &count.to_string()]);
    }

    /// Runs a command on the machine, as root, that must succeed.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn run(&self, command: &[&str]) -> String {
        run(command)
    }

    /// Has the kernel forget all connections that it tracks, as `conntrack -F` does.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    pub fn forget_connections(&self) {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkNetFilter,
        )
        .expect("everybody may have one");
        // IPCTNL_MSG_CT_DELETE of NFNL_SUBSYS_CTNETLINK for all families, NLM_F_REQUEST and NLM_F_ACK
        // (linux/netfilter/nfnetlink_conntrack.h).
        let kind = 1_u16 << 8 | 2;
        let mut message = [0_u8; 20];
        message[..4].copy_from_slice(&20_u32.to_ne_bytes());
        message[4..6].copy_from_slice(&kind.to_ne_bytes());
        message[6..8].copy_from_slice(&5_u16.to_ne_bytes());
        let kernel = NetlinkAddr::new(0, 0);
        sendto(socket.as_raw_fd(), &message, &kernel, MsgFlags::empty()).expect("it is sent");
        let mut answer = [0_u8; 1024];
        recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty()).expect("it is answered");
        // The error number of an NLMSG_ERROR.
        assert_eq!(answer[16..20], [0; 4], "the kernel refuses to forget");
    }

    /// Whether the kernel takes the middle of a TCP connection that it does not know for one (`nf_conntrack_tcp_loose`,
    /// Documentation/networking/nf_conntrack-sysctl.rst). It does unless it is told otherwise.
    ///
    /// # Panics
    /// When it can't be told.
    fn pick_up_connections(&self, pick_up: bool) {
        let file = "/proc/sys/net/netfilter/nf_conntrack_tcp_loose";
        let value = u8::from(pick_up);
        self.run(&["sh", "-c", &format!("echo {value} >{file}")]);
    }

    /// Has TCP connections of an application that go through this proxy say something that the kernel takes for packets
    /// of none, and then go on.
    ///
    /// # Panics
    /// When one ends by it, or anything leaves but to the proxy.
    #[track_caller]
    pub fn assert_connections_outlive_what_belongs_to_none(&self, app: &App, proxy: &str) {
        for to in self.destinations() {
            let connection = app.open_tcp(to).expect("it opens");
            assert_eq!(connection.ask(), proxied(proxy, to));
            self.pick_up_connections(false);
            self.forget_connections();
            assert_eq!(connection.ask(), Outcome::Silent);
            self.assert_nothing_left_for(to.ip());
            self.pick_up_connections(true);
            let outcome = Outcome::in_the_end(|| connection.ask());
            assert_eq!(outcome, proxied(proxy, to));
            self.assert_nothing_left_for(to.ip());
        }
    }

    /// Gives the machine an address, as `ip` writes it with the network's length, and returns when it is its own.
    ///
    /// # Panics
    /// When the interface can't have it.
    #[track_caller]
    pub fn add_address(&self, address: &str, interface: &str) {
        let mut command = vec!["ip", "address", "replace", address, "dev", interface];
        let (ip, _) = address.split_once('/').expect("it has a length");
        let ip: IpAddr = ip.parse().expect("it is an address");
        if ip.is_ipv6() {
            command.push("nodad");
        }
        self.run(&command);
        if ip.is_ipv6() {
            network::await_own(None, ip);
        }
    }

    /// Has `ip -6` do this.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn ip6(&self, words: &str) {
        let words: Vec<_> = ["ip", "-6"].into_iter().chain(words.split(' ')).collect();
        self.run(&words);
    }

    /// Feeds a script to nft.
    ///
    /// # Panics
    /// When nft does not take it.
    #[track_caller]
    pub fn nft(&self, script: &str) {
        run_with_input(&["nft", "-f", "-"], script);
    }

    /// Has new connections come from these ports, and returns from which they came before: the first and the last one.
    pub fn use_ports(&self, range: &str) -> String {
        let script = format!(
            "cd /proc/sys/net/ipv4; cat ip_local_port_range; echo {range} >ip_local_port_range"
        );
        self.run(&["sh", "-ec", &script])
    }

    /// Has all new connections come from one port.
    pub fn use_one_port(&self, port: u16) -> String {
        self.use_ports(&format!("{port} {port}"))
    }

    /// A tunnel from the machine to the internet, which the kernel sends nothing through but when it is to.
    pub fn build_tunnel(&self) {
        self.run(&[
            "sh",
            "-ec",
            "ip link add tunnel type vxlan id 1 local 192.0.2.1 remote 192.0.2.2 dev uplink \
                srcport 5000 5001 dstport 4789 noudpcsum
             echo 1 >/proc/sys/net/ipv6/conf/tunnel/disable_ipv6
             echo 1 >/proc/sys/net/ipv4/neigh/tunnel/mcast_solicit
             ip address add 10.99.0.1/24 dev tunnel
             ip link set tunnel up
             ip neighbour add 10.99.0.2 lladdr 02:00:00:00:99:02 dev tunnel nud permanent",
        ]);
    }

    /// Runs `nft --json` with these arguments; none if it fails, which is how nft says that a
    /// thing does not exist.
    pub fn nft_json(&self, arguments: &[&str]) -> Option<Value> {
        let output = output_with_input(&[&["nft", "--json"], arguments].concat(), "");
        output
            .status
            .success()
            .then(|| serde_json::from_slice(&output.stdout).expect("nft prints JSON"))
    }

    /// How many packets a counter in a table of `inet` has counted.
    ///
    /// # Panics
    /// When there is no such counter.
    #[track_caller]
    pub fn counted(&self, table: &str, counter: &str) -> u64 {
        let listing = self.nft_json(&["list", "counter", "inet", table, counter]);
        let listing = listing.expect("a counter");
        let objects = listing["nftables"].as_array().expect("a list");
        let packets = |object: &Value| object["counter"]["packets"].as_u64();
        objects.iter().find_map(packets).expect("a counter")
    }

    /// The elements of a map in the table `inet cgtproxy`, in order; none without such a map.
    pub fn map_elements(&self, map: &str) -> Vec<Element> {
        let listing = self.nft_json(&["list", "map", "inet", "cgtproxy", map]);
        let elements = listing.and_then(|l| l["nftables"][1]["map"]["elem"].as_array().cloned());
        let mut elements: Vec<_> = elements.unwrap_or_default().iter().map(element).collect();
        elements.sort();
        elements
    }

    /// Whether packets of open connections that are not diverted are looked at: what they cost is all that tells.
    pub fn open_connections_are_looked_at(&self) -> bool {
        let chain = self.nft_json(&["list", "chain", "inet", "cgtproxy", "output"]);
        let chain = chain.expect("it is there");
        let rules = chain["nftables"].as_array().expect("objects");
        // Others are about first packets.
        let ends_them = |rule: &Value| {
            let rule = rule.to_string();
            rule.contains("confirmed") && !rule.contains("jump")
        };
        !rules.iter().any(ends_them)
    }

    /// The names of the chains in the table `inet cgtproxy`.
    pub fn chains(&self) -> Vec<String> {
        self.objects("chain")
    }

    /// The names of the maps in the table `inet cgtproxy`.
    pub fn maps(&self) -> Vec<String> {
        self.objects("map")
    }

    /// How many bypass lists the table `inet cgtproxy` has, with a chain and two sets each.
    ///
    /// # Panics
    /// When one lacks something.
    pub fn bypass_lists(&self) -> usize {
        let of = |kind, prefix| -> Vec<u32> {
            let objects = self.objects(kind);
            let numbers = objects.iter().filter_map(|name| name.strip_prefix(prefix));
            numbers.filter_map(|number| number.parse().ok()).collect()
        };
        let chains = of("chain", "drop-");
        assert_eq!(chains, of("set", "bypass4-"));
        assert_eq!(chains, of("set", "bypass6-"));
        chains.len()
    }

    /// What the table `inet cgtproxy` has of a user: the rules and elements that name the uid.
    pub fn objects_of(&self, uid: u32) -> Vec<String> {
        let uid = uid.to_string();
        let listing = output_with_input(&["nft", "-n", "list", "table", "inet", "cgtproxy"], "");
        let text = String::from_utf8_lossy(&listing.stdout);
        let parts = text.split(['\n', ',', '{', '}']).map(str::trim);
        let named = |part: &&str| part.split(|c: char| !c.is_ascii_digit()).any(|n| n == uid);
        parts.filter(named).map(str::to_owned).collect()
    }

    /// Whether the table `inet cgtproxy` exists.
    pub fn has_table(&self) -> bool {
        // As text: nft 1.0.6 prints half a JSON document for a table with a flag it does not know.
        run(&["nft", "list", "tables", "inet"])
            .lines()
            .any(|line| line == "table inet cgtproxy")
    }

    fn objects(&self, kind: &str) -> Vec<String> {
        // All tables' objects, as a listing of the table itself is broken in the same way.
        let listing = self
            .nft_json(&["list", &format!("{kind}s"), "inet"])
            .expect("always there");
        let objects = listing["nftables"].as_array().cloned().unwrap_or_default();
        let names = objects.iter().map(|object| &object[kind]);
        let names = names.filter(|object| object["table"] == "cgtproxy");
        let mut names: Vec<_> = names
            .filter_map(|object| object["name"].as_str().map(str::to_owned))
            .collect();
        names.sort();
        names
    }

    /// The routing policy rules of a family (4 or 6) that look for a mark.
    pub fn mark_rules(&self, family: u8) -> Vec<Rule> {
        let text = run(&["ip", &format!("-{family}"), "-details", "-json", "rule"]);
        let rules: Vec<Value> = serde_json::from_str(&text).expect("ip prints JSON");
        let text = |value: &Value| value.as_str().map(str::to_owned);
        rules
            .iter()
            .filter(|rule| !rule["fwmark"].is_null())
            .map(|rule| Rule {
                priority: rule["priority"].as_u64().expect("a priority"),
                mark: text(&rule["fwmark"]).map(|mark| match text(&rule["fwmask"]) {
                    Some(mask) => format!("{mark}/{mask}"),
                    None => mark,
                }),
                table: text(&rule["table"]).expect("a table"),
                protocol: text(&rule["protocol"]),
            })
            .collect()
    }

    /// The routes of a family (4 or 6) in a table, as `ip` prints them; none without such a table.
    pub fn routes(&self, family: u8, table: &str) -> Vec<String> {
        let family = format!("-{family}");
        let output = output_with_input(&["ip", &family, "route", "show", "table", table], "");
        let text = String::from_utf8_lossy(&output.stdout);
        text.lines().map(|line| line.trim().to_owned()).collect()
    }
}

fn element(pair: &Value) -> Element {
    let (mut key, mut packets) = (&pair[0], None);
    if !key["elem"].is_null() {
        packets = key["elem"]["counter"]["packets"].as_u64();
        key = &key["elem"]["val"];
    }
    let key = key.as_str().map_or_else(|| key.to_string(), str::to_owned);
    let verdict = match pair[1].as_object().and_then(|v| v.iter().next()) {
        Some((name, value)) => match value["target"].as_str() {
            Some(target) => format!("{name} {target}"),
            None => name.clone(),
        },
        // A number.
        None => pair[1].to_string(),
    };
    Element {
        key,
        verdict,
        packets,
    }
}
