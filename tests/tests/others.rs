//! Beside other programs that change what the helper owns, or what packets pass on their way: the real
//! ones, in a whole system. The table is nobody's, as on kernels before Linux 6.9: where it is protected
//! there is less to lose.

#![allow(clippy::expect_used, reason = "a panic is a failed test")]

use cgtproxy_tests::installed::Installed;
use cgtproxy_tests::others;
use cgtproxy_tests::sandbox::{App, Sandbox, Server, by, direct, sandbox};
use cgtproxy_tests::steady::Steady;
use cgtproxy_tests::wait::wait_until;

const CONFIG: &str = r"
version: 1
tproxies:
  mihomo: {port: 7890}
rules:
  - {match: app-tracker, drop: true}
  - {match: '/app\.slice$', tproxy: mihomo}
";

/// alice's applications with an agent, and bob's without.
struct Bed<'a> {
    sb: &'a Sandbox,
    installed: Installed<'a>,
    browser: App,
    tracker: App,
    bobs: App,
    traffic: Steady,
    _proxy: Server,
}

impl<'a> Bed<'a> {
    fn boot(sb: &'a Sandbox) -> Self {
        let installed = Installed::boot(sb, "own-table: false", others::install);
        let system = &installed.system;
        let (alice, bob) = (system.alice(), system.bob());
        let proxy = sb.tproxy("mihomo").uid(alice.uid()).port(7890).start();
        installed.enable(alice, CONFIG);
        let browser = installed.system.desktop_app(alice, "browser");
        let tracker = installed.system.desktop_app(alice, "tracker");
        let bobs = installed.system.desktop_app(bob, "browser");
        installed.wait_in_force(alice);
        let traffic = Steady::start(sb, &browser);
        let bed = Self {
            sb,
            browser,
            tracker,
            bobs,
            traffic,
            _proxy: proxy,
            installed,
        };
        bed.holds("at first");
        bed
    }

    /// Everything goes where it should go, and not one packet of the proxied traffic has ever left.
    #[track_caller]
    fn holds(&self, what: &str) {
        eprintln!("{what}");
        self.traffic.assert_proxied("mihomo");
        self.traffic.assert_nothing_left(self.sb);
        self.installed.expect(&self.browser, by("mihomo"));
        self.installed.expect_dropped(&self.tracker);
        self.installed.expect(&self.bobs, direct);
    }

    fn run(&self, command: &[&str]) -> String {
        self.installed.system.run(command)
    }
}

#[test]
fn firewalld_that_reloads() {
    sandbox(|sb| {
        let bed = Bed::boot(sb);
        bed.run(&["systemctl", "start", "firewalld.service"]);
        assert_eq!(bed.run(&["firewall-cmd", "--state"]).trim(), "running");
        assert!(sb.run(&["nft", "list", "tables"]).contains("firewalld"));
        bed.holds("firewalld started");
        bed.run(&["firewall-cmd", "--reload"]);
        bed.holds("firewalld reloaded");
        bed.run(&["firewall-cmd", "--complete-reload"]);
        bed.holds("firewalld reloaded completely");
        bed.run(&["systemctl", "restart", "firewalld.service"]);
        bed.holds("firewalld restarted");
        bed.run(&["systemctl", "stop", "firewalld.service"]);
        bed.holds("firewalld stopped");
    });
}

#[test]
fn ufw_that_is_enabled_and_reloads() {
    sandbox(|sb| {
        let bed = Bed::boot(sb);
        bed.run(&["ufw", "--force", "enable"]);
        assert!(bed.run(&["ufw", "status"]).contains("Status: active"));
        bed.holds("ufw enabled");
        bed.run(&["ufw", "allow", "22/tcp"]);
        bed.run(&["ufw", "reload"]);
        bed.holds("ufw reloaded");
        bed.run(&["ufw", "disable"]);
        bed.holds("ufw disabled");
    });
}

/// Unless it is told otherwise (`ManageForeignRoutingPolicyRules=no`), it removes routing rules that are not
/// in its files when it configures a link.
#[test]
fn networkd_that_restarts_and_configures_its_link() {
    sandbox(|sb| {
        let bed = Bed::boot(sb);
        bed.run(&["ip", "link", "add", "lan", "type", "bridge"]);
        let network = "printf '%s\n' '[Match]' 'Name=lan' '[Link]' 'RequiredForOnline=no' '[Network]' \
             'Address=10.99.0.1/24' 'ConfigureWithoutCarrier=yes' '[RoutingPolicyRule]' 'From=10.99.0.0/24' \
             'Table=99' >/etc/systemd/network/lan.network";
        bed.run(&["sh", "-c", network]);
        let set_up = || {
            wait_until("networkd has set its link up", || {
                sb.run(&["ip", "address", "show", "dev", "lan"])
                    .contains("10.99.0.1/24")
                    && sb.run(&["ip", "rule"]).contains("from 10.99.0.0/24")
                    && [4, 6]
                        .iter()
                        .all(|family| sb.mark_rules(*family).len() == 1)
            });
        };
        for round in 0..2 {
            bed.run(&["systemctl", "restart", "systemd-networkd.service"]);
            set_up();
            bed.holds(&format!("networkd restarted, round {round}"));
            // Here it takes our rules away, which is what this is about.
            let before = bed.installed.restored();
            bed.run(&["networkctl", "reconfigure", "lan"]);
            wait_until("the helper has put its rules back", || {
                bed.installed.restored() > before
            });
            set_up();
            bed.holds(&format!(
                "networkd configured its link again, round {round}"
            ));
        }
        bed.run(&["systemctl", "stop", "systemd-networkd.service"]);
        bed.holds("networkd stopped");
    });
}

/// As dockerd writes them (28, with a published port), without the container of the port.
const DOCKER: &str = "\
*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80
COMMIT
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER - [0:0]
:DOCKER-BRIDGE - [0:0]
:DOCKER-CT - [0:0]
:DOCKER-FORWARD - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-ISOLATION-STAGE-2 - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-FORWARD
-A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT
-A DOCKER ! -i docker0 -o docker0 -j DROP
-A DOCKER-BRIDGE -o docker0 -j DOCKER
-A DOCKER-CT -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A DOCKER-FORWARD -j DOCKER-CT
-A DOCKER-FORWARD -j DOCKER-ISOLATION-STAGE-1
-A DOCKER-FORWARD -j DOCKER-BRIDGE
-A DOCKER-FORWARD -i docker0 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
-A DOCKER-ISOLATION-STAGE-2 -j RETURN
-A DOCKER-USER -j RETURN
COMMIT
";

/// Not by a dockerd, which wants images and a container runtime: its rules, by hand, and a network namespace
/// behind its bridge in the place of a container.
#[test]
fn the_rules_of_docker_and_a_container() {
    sandbox(|sb| {
        let bed = Bed::boot(sb);
        let script = format!(
            "set -e
             ip link add docker0 type bridge
             ip address add 172.17.0.1/16 dev docker0
             ip link set docker0 up
             echo 1 >/proc/sys/net/ipv4/ip_forward
             echo 1 >/proc/sys/net/bridge/bridge-nf-call-iptables
             ip netns add container
             ip link add veth0 type veth peer name eth0 netns container
             ip link set veth0 master docker0 up
             ip -n container address add 172.17.0.2/16 dev eth0
             ip -n container link set lo up
             ip -n container link set eth0 up
             ip -n container route add default via 172.17.0.1
             iptables-restore <<END\n{DOCKER}END"
        );
        let from_container = |to: std::net::SocketAddr| {
            let connect = format!("exec 3<>/dev/tcp/{}/{}", to.ip(), to.port());
            bed.run(&["ip", "netns", "exec", "container", "bash", "-c", &connect]);
            let sources: Vec<_> = sb.deliveries(to.ip()).iter().map(|d| d.source).collect();
            assert_eq!(
                sources,
                ["192.0.2.1".parse::<std::net::IpAddr>().expect("an address")]
            );
        };
        bed.run(&["sh", "-c", &script]);
        bed.holds("docker's rules came");
        from_container(sb.destinations()[0]);
        // dockerd writes them again when it starts, and when firewalld says that it has reloaded.
        bed.run(&["sh", "-c", &format!("iptables-restore <<END\n{DOCKER}END")]);
        bed.holds("docker's rules came again");
        bed.run(&["nft", "delete", "table", "inet", "cgtproxy"]);
        wait_until("the table is back", || sb.has_table());
        bed.installed.wait_in_force(bed.installed.system.alice());
        bed.installed.expect(&bed.browser, by("mihomo"));
        from_container(sb.destinations()[0]);
    });
}
