//! `cgtproxy-agent doctor`: things are really broken, it says so, and once its own commands have been run it is content.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a panic is a failed test"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;

use cgtproxy_tests::agent::Agent;
use cgtproxy_tests::sandbox::{
    Host, Outcome, Sandbox, Server, Service, User, local, proxied, sandbox,
};
use cgtproxy_tests::system::System;
use cgtproxy_tests::wait::wait_until;
use serde_json::Value;

const CONFIG: &str = r"
version: 1
tproxies:
  mihomo: {port: 7890}
rules:
  - {match: '/app\.slice$', tproxy: mihomo}
";

/// What doctor says to a user.
struct Opinion {
    code: Option<i32>,
    json: Value,
}

impl Opinion {
    fn of(user: &User) -> Self {
        Self::with(user, &[])
    }

    /// What it says with further options.
    fn with(user: &User, options: &[&str]) -> Self {
        let config = user.home().join(".config/cgtproxy/config.yaml");
        let config = config.to_str().expect("UTF-8");
        let arguments = [options, &["doctor", "--json", "--config", config]].concat();
        let output = user.run("cgtproxy-agent", &arguments);
        let json =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"));
        Self {
            code: output.status.code(),
            json,
        }
    }

    fn findings(&self) -> Vec<&Value> {
        let groups = self.json["groups"].as_array().expect("groups");
        groups
            .iter()
            .flat_map(|group| group["findings"].as_array().expect("findings"))
            .collect()
    }

    fn ids(&self) -> Vec<&str> {
        let findings = self.findings();
        findings
            .iter()
            .map(|finding| finding["id"].as_str().expect("an id"))
            .collect()
    }

    fn unseen(&self) -> usize {
        let groups = self.json["groups"].as_array().expect("groups");
        let unseen = |group: &Value| group["unseen"].as_array().map_or(0, Vec::len);
        groups.iter().map(unseen).sum()
    }

    /// Insists on exactly these, whatever their order.
    #[track_caller]
    fn expect(&self, ids: &[&str]) {
        let mut is = self.ids();
        is.sort_unstable();
        is.dedup();
        assert_eq!(is, ids, "{:#}", self.json);
        let errors = self.json["errors"].as_u64().expect("a number");
        assert_eq!(self.code, Some(i32::from(errors > 0)), "{:#}", self.json);
    }

    /// The commands of a finding, for root.
    fn commands(&self, id: &str) -> Vec<String> {
        let findings = self.findings();
        let finding = findings
            .iter()
            .find(|finding| finding["id"] == id)
            .expect("it was found");
        let commands = finding["commands"].as_array().expect("commands");
        commands
            .iter()
            .map(|command| command.as_str().expect("text").replace("sudo ", ""))
            .collect()
    }

    /// Does what it proposes.
    #[track_caller]
    fn mend(&self, sb: &Sandbox, id: &str) {
        for command in self.commands(id) {
            sb.run(&["sh", "-ec", &command]);
        }
    }
}

/// Waits until doctor says exactly that.
#[track_caller]
fn wait_for(user: &User, ids: &[&str]) -> Opinion {
    let mut last = None;
    wait_until(&format!("doctor to say {ids:?}"), || {
        let opinion = Opinion::of(user);
        let mut is = opinion.ids();
        is.sort_unstable();
        is.dedup();
        let same = is == ids;
        last = Some(opinion);
        same
    });
    last.expect("it was asked")
}

/// A machine on which everything is as it should be.
fn fine(sb: &Sandbox) -> (Service, User, Server, Service) {
    let helper = sb.helper().start();
    let alice = sb.user(1001);
    let proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
    let agent = alice.agent(CONFIG).start();
    let app = alice.cgroup("app.slice/app-a.scope");
    Agent::of(&alice).wait_for_verdict(&app, "mihomo");
    (helper, alice, proxy, agent)
}

#[test]
fn is_content_where_nothing_is_wrong_and_needs_no_privilege() {
    sandbox(|sb| {
        let (_helper, alice, _proxy, _agent) = fine(sb);
        let opinion = Opinion::of(&alice);
        opinion.expect(&[]);
        assert_eq!(opinion.unseen(), 0, "{:#}", opinion.json);
        // For people, and by its other name.
        let config = alice.home().join(".config/cgtproxy/config.yaml");
        let config = config.to_str().expect("UTF-8");
        for command in [&["doctor"][..], &["check", "permission"]] {
            let output = alice.run("cgtproxy-agent", &[command, &["--config", config]].concat());
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(output.status.success(), "{text}");
            assert!(text.ends_with("\nnothing is wrong\n"), "{text}");
            assert!(text.contains("ok       proxies"), "{text}");
        }
        // It has only looked.
        assert!(!sb.run(&["nft", "list", "tables"]).contains("probe"));
    });
}

#[test]
fn strict_reverse_path_filters_do_no_harm_and_are_no_finding() {
    sandbox(|sb| {
        let (_helper, alice, _proxy, _agent) = fine(sb);
        let app = alice.cgroup("app.slice/app-a.scope").app();
        sb.run(&[
            "sh",
            "-ec",
            "for c in /proc/sys/net/ipv4/conf/*; do echo 1 > $c/rp_filter; echo 1 > $c/src_valid_mark; done",
        ]);
        for to in sb.destinations() {
            assert_eq!(app.tcp(to), proxied("mihomo", to));
            assert_eq!(app.udp(to), proxied("mihomo", to));
        }
        Opinion::of(&alice).expect(&[]);
    });
}

#[test]
fn misses_the_helper_and_the_agent() {
    sandbox(|sb| {
        let alice = sb.user(1001);
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        // Nothing is there, and what only the helper can see is not said to be fine.
        let opinion = Opinion::of(&alice);
        opinion.expect(&["agent-not-running", "config-wrong", "helper-missing"]);
        assert!(opinion.unseen() > 0, "{:#}", opinion.json);
        let mut helper = sb.helper().start();
        let agent = alice.agent(CONFIG).start();
        wait_for(&alice, &[]);
        // Its process is gone, its socket is not.
        helper.kill();
        wait_for(&alice, &["agent-disconnected", "helper-dead"]);
        helper.start_again();
        wait_for(&alice, &[]);
        fs::set_permissions(Service::socket(), fs::Permissions::from_mode(0o600))
            .expect("root may");
        wait_for(&alice, &["helper-forbidden"]);
        fs::set_permissions(Service::socket(), fs::Permissions::from_mode(0o666))
            .expect("root may");
        drop(agent);
        wait_for(&alice, &["agent-not-running"]);
    });
}

#[test]
fn says_what_the_helper_refuses_with() {
    sandbox(|sb| {
        let _helper = sb.helper().config("limits: {connections: 1}").start();
        let alice = sb.user(1001);
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let agent = alice.agent(CONFIG).start();
        let opinion = wait_for(&alice, &["helper-refuses"]);
        let problem = opinion.findings()[0]["problem"].as_str().expect("text");
        assert!(
            problem.contains("TooManyConnections (limit: 1)"),
            "{problem}"
        );
        drop(agent);
        wait_for(&alice, &["agent-not-running"]);
    });
}

#[test]
fn says_that_the_administrator_refuses_somebody() {
    sandbox(|sb| {
        let _helper = sb.helper().config("deny: {users: [1001]}").start();
        let alice = sb.user(1001);
        let opinion = Opinion::of(&alice);
        assert!(
            opinion.ids().contains(&"helper-refuses"),
            "{:#}",
            opinion.json
        );
        let problem = opinion.findings()[0]["problem"].as_str().expect("text");
        assert!(problem.contains("PermissionDenied"), "{problem}");
    });
}

#[test]
fn knows_a_proxy_that_can_not_have_packets() {
    sandbox(|sb| {
        let helper = sb.helper().start();
        let alice = sb.user(1001);
        let agent = alice.agent(CONFIG).start();
        wait_for(&alice, &["proxy-not-listening"]);
        for (at, finding) in [
            (&["192.0.2.1:7890"][..], "proxy-address"),
            (&["0.0.0.0:7890"], "proxy-incomplete"),
            (&["[::]:7890"], "proxy-incomplete"),
        ] {
            let mut server = sb.tproxy("mihomo").uid(1001);
            for address in at {
                server = server.at(address.parse().expect("an address"));
            }
            let server = server.start();
            wait_for(&alice, &[finding]);
            drop(server);
        }
        // One that is no tproxy.
        let plain = sb.service("plain").uid(1001).port(7890).start();
        wait_for(&alice, &["proxy-not-transparent"]);
        drop(plain);
        // On the loopback addresses alone it is reached.
        let loopback = sb
            .tproxy("mihomo")
            .uid(1001)
            .at("127.0.0.1:7890".parse().expect("an address"))
            .at("[::1]:7890".parse().expect("an address"))
            .start();
        wait_for(&alice, &[]);
        let app = alice.cgroup("app.slice/app-a.scope").app();
        for to in sb.destinations() {
            assert_eq!(app.tcp(to), proxied("mihomo", to));
        }
        drop(loopback);
        // Somebody else's, until the administrator allows it.
        let _other = sb.tproxy("mihomo").uid(993).port(7890).start();
        let opinion = wait_for(&alice, &["proxy-user"]);
        let advice = opinion.findings()[0]["advice"].as_str().expect("text");
        assert!(advice.contains("add 993 to proxy-users"), "{advice}");
        drop((helper, agent));
        fs::remove_file(Service::socket()).expect("it was killed");
        let _helper = sb.helper().config("proxy-users: [993]").start();
        let _agent = alice.agent(CONFIG).start();
        wait_for(&alice, &[]);
    });
}

#[test]
fn knows_a_proxy_that_is_sent_through_itself() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let alice = sb.user(1001);
        let cgroup = alice.cgroup("app.slice/mihomo.service");
        let proxy = sb.tproxy("mihomo").uid(1001).port(7890).cgroup(&cgroup);
        let _proxy = proxy.start();
        let agent = alice.agent(CONFIG).start();
        wait_for(&alice, &["proxy-loop"]);
        let rule = "rules:\n  - {match: mihomo, direct: true}";
        agent.write_config(&CONFIG.replace("rules:", rule));
        wait_for(&alice, &[]);
    });
}

#[test]
fn knows_where_a_server_for_redirected_connections_has_to_run() {
    const REDIRECT: &str = r"
version: 1
redirects:
  redir: {port: 7892, dns-hijack: {port: 1053}}
rules:
  - {unit: redir, direct: true}
  - {slice: app, proxy: redir}
";
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let alice = sb.user(1001);
        let _agent = alice.agent(REDIRECT).start();
        let cgroup = alice.cgroup("app.slice/redir.service");
        let app = alice.cgroup("app.slice/app-a.scope");
        Agent::of(&alice).wait_for_verdict(&app, "redir");
        let app = app.app();
        wait_for(&alice, &["dns-not-listening", "proxy-not-listening"]);
        let _dns = sb.service("dns").port(1053).start();
        wait_for(&alice, &["proxy-not-listening"]);
        let redir = || sb.service("redir").uid(1001).port(7892);
        // By hand, in a session that is not below the service manager: it is true that nothing gets there.
        let outside = redir().start();
        wait_for(&alice, &["proxy-elsewhere"]);
        for to in sb.destinations() {
            assert_eq!(app.tcp(to), Outcome::Refused);
        }
        drop(outside);
        let _server = redir().cgroup(&cgroup).start();
        wait_for(&alice, &[]);
        for to in sb.destinations() {
            let loopback = if to.is_ipv4() {
                "127.0.0.1:7892"
            } else {
                "[::1]:7892"
            };
            let at = loopback.parse().expect("an address");
            assert_eq!(app.tcp(to), local("redir", at));
        }
    });
}

#[test]
fn knows_a_proxy_on_this_machine_that_the_relay_can_not_use() {
    const RELAYED: &str = r"
version: 1
proxies:
  ss: {upstream: 'socks5h://127.0.0.1:1080'}
rules:
  - {slice: app, proxy: ss}
";
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let alice = sb.user(1001);
        let _relay = alice.relay().start();
        let agent = alice.agent(RELAYED).start();
        wait_for(&alice, &["upstream-not-listening"]);
        let socks = || sb.service("socks").uid(1001);
        // Where nobody looks for it.
        let elsewhere = socks().at("[::1]:1080".parse().expect("an address"));
        let elsewhere = elsewhere.start();
        wait_for(&alice, &["upstream-not-listening"]);
        agent.write_config(&RELAYED.replace("127.0.0.1", "localhost"));
        wait_for(&alice, &[]);
        drop(elsewhere);
        // In a session, which goes direct.
        let outside = socks().port(1080).start();
        wait_for(&alice, &[]);
        drop(outside);
        // One of root's may be for everybody.
        let common = sb.service("socks").uid(0).port(1080).start();
        wait_for(&alice, &[]);
        drop(common);
        let bobs = sb.service("socks").uid(1002).port(1080).start();
        wait_for(&alice, &["upstream-of-another"]);
        drop(bobs);
        let cgroup = alice.cgroup("app.slice/mysocks.service");
        let _server = socks().port(1080).cgroup(&cgroup).start();
        wait_for(&alice, &["proxy-loop"]);
        let rule = "rules:\n  - {unit: mysocks, direct: true}";
        agent.write_config(&RELAYED.replace("rules:", rule));
        wait_for(&alice, &[]);
    });
}

#[test]
fn finds_routing_rules_in_the_way_and_mends_them() {
    sandbox(|sb| {
        let (_helper, alice, proxy, _agent) = fine(sb);
        let app = alice.cgroup("app.slice/app-a.scope").app();
        for family in ["-4", "-6"] {
            sb.run(&[
                "ip", family, "rule", "add", "priority", "100", "lookup", "main",
            ]);
            let opinion = Opinion::of(&alice);
            opinion.expect(&["rule-before"]);
            // It is true.
            let to = sb.destinations()[usize::from(family == "-6")];
            assert_ne!(app.tcp(to), proxied("mihomo", to));
            opinion.mend(sb, "rule-before");
            Opinion::of(&alice).expect(&[]);
            assert_eq!(app.tcp(to), proxied("mihomo", to));
        }
        // Those that say nothing of what is diverted are in nobody's way, and one that says it by a mark is.
        for (words, found) in [
            ("iif uplink lookup main", &[][..]),
            ("uidrange 5-5 lookup main", &[]),
            ("ipproto sctp lookup main", &[]),
            ("lookup main suppress_prefixlength 0", &[]),
            ("fwmark 0x0/0x80000000 lookup main", &[]),
            ("not fwmark 0x0/0x80000000 lookup main", &["rule-before"]),
            ("fwmark 0x1/0x80000001 lookup main", &[]),
            ("not fwmark 0x1/0x80000001 lookup main", &["rule-before"]),
        ] {
            let rule = |verb| format!("ip rule {verb} priority 100 {words}");
            sb.run(&["sh", "-ec", &rule("add")]);
            Opinion::of(&alice).expect(found);
            let [to, _] = sb.destinations();
            assert_eq!(
                app.tcp(to) == proxied("mihomo", to),
                found.is_empty(),
                "{words}"
            );
            sb.run(&["sh", "-ec", &rule("del")]);
        }
        // One that looks for a mark that is ours.
        let mark = ["fwmark", "0x90000000/0xf0000000"];
        let rule = [&["priority", "900"][..], &mark, &["lookup", "99"]].concat();
        sb.run(&[&["ip", "rule", "add"][..], &rule].concat());
        Opinion::of(&alice).expect(&["marks-in-rule"]);
        sb.run(&[&["ip", "rule", "del"][..], &rule].concat());
        Opinion::of(&alice).expect(&[]);
        drop(proxy);
    });
}

#[test]
fn knows_what_a_gateway_needs_and_mends_it() {
    const GATEWAY: &str = r"
version: 1
tproxies:
  company: {port: 7890}
rules: []
gateway: {interfaces: [INTERFACE], tproxy: company}
";
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let root = sb.user(0);
        let _proxy = sb.tproxy("company").uid(0).port(7890).start();
        let agent = root
            .agent(&GATEWAY.replace("INTERFACE", "lan0"))
            .argument("--system")
            .start();
        let host = sb.host_behind("lan0");
        let app = host.app();
        let doctor = || Opinion::with(&root, &["--system"]);
        doctor().expect(&[]);
        for to in sb.destinations() {
            assert_eq!(app.tcp(to), proxied("company", to));
        }
        let [v4, v6] = sb.destinations();
        for (variable, to) in [
            ("net.ipv4.ip_forward", v4),
            ("net.ipv6.conf.all.forwarding", v6),
        ] {
            sb.run(&["sysctl", "-w", &format!("{variable}=0")]);
            // What is diverted is not forwarded, and needs none of it.
            let connect = format!("exec 3<>/dev/tcp/{}/{}", to.ip(), to.port());
            let inside = ["ip", "netns", "exec", "behind-1-2"];
            sb.run(&[&inside[..], &["bash", "-c", &connect]].concat());
            let opinion = doctor();
            opinion.expect(&["gateway-forwarding"]);
            opinion.mend(sb, "gateway-forwarding");
            doctor().expect(&[]);
            assert_eq!(app.ping(to.ip()), host.direct(to));
        }
        for interface in ["all", "lan0"] {
            let variable = format!("net.ipv4.conf.{interface}.src_valid_mark=1");
            sb.run(&["sysctl", "-w", &variable]);
            assert_eq!(app.tcp(v4), Outcome::Silent);
            let opinion = doctor();
            opinion.expect(&["gateway-src-valid-mark"]);
            opinion.mend(sb, "gateway-src-valid-mark");
            doctor().expect(&[]);
            assert_eq!(app.tcp(v4), proxied("company", v4));
        }
        let hosts: [Host; 2] = sb.hosts_on_bridge("br0");
        let app = hosts[0].app();
        let bridged = "cd /proc/sys/net/bridge; for f in *tables; do echo 1 > $f; done";
        sb.run(&["sh", "-ec", bridged]);
        // It is nobody's business yet.
        doctor().expect(&["bridge-filter"]);
        agent.write_config(&GATEWAY.replace("INTERFACE", "br0"));
        wait_until("the bridge to be the gateway's", || {
            sb.run(&["nft", "list", "set", "inet", "cgtproxy", "interfaces"])
                .contains("br0")
        });
        assert_eq!(app.tcp(v4), Outcome::Refused);
        let opinion = doctor();
        opinion.expect(&["gateway-bridge"]);
        opinion.mend(sb, "gateway-bridge");
        doctor().expect(&[]);
        assert_eq!(app.tcp(v4), proxied("company", v4));
    });
}

#[test]
fn finds_rules_of_others_that_change_its_marks() {
    sandbox(|sb| {
        let (mut helper, alice, _proxy, agent) = fine(sb);
        let app = alice.cgroup("app.slice/app-a.scope").app();
        sb.nft(
            "table ip vpn { chain out { type route hook output priority 0;
               meta mark set 0x1 ; ct mark set mark & 0xffff | 0x2
             }
             }
             table inet peaceful { chain out { type route hook output priority 0;
               meta mark set mark & 0xffff0000 | 0x77
             }
             }",
        );
        let opinion = wait_for(&alice, &["marks-changed"]);
        let problem = opinion.findings()[0]["problem"].as_str().expect("text");
        assert!(
            problem.contains("'ip vpn' change bits 0xff000000"),
            "{problem}"
        );
        // It is true.
        let [v4, v6] = sb.destinations();
        assert_ne!(app.tcp(v4), proxied("mihomo", v4));
        assert_eq!(app.tcp(v6), proxied("mihomo", v6));
        // What it says to list is there.
        let [list, ..] = &opinion.commands("marks-changed")[..] else {
            panic!("no commands");
        };
        assert!(sb.run(&["sh", "-ec", list]).contains("chain out"));
        sb.nft("delete table ip vpn");
        wait_for(&alice, &[]);
        assert_eq!(app.tcp(v4), proxied("mihomo", v4));
        // Another program with bits of its own is left alone by a mask without them.
        sb.nft(
            "table ip vpn { chain out { type route hook output priority 0;
               meta mark set mark & 0xf7ffffff | 0x08000000
             }
             }",
        );
        wait_for(&alice, &["marks-changed"]);
        // Stopped, as it says: the helper takes everything along.
        drop(agent);
        assert!(helper.stop().success());
        let _helper = sb.helper().config("mark-mask: 0x00ff0000").start();
        let _agent = alice.agent(CONFIG).start();
        wait_for(&alice, &[]);
        let [v4, _] = sb.destinations();
        assert_eq!(app.tcp(v4), proxied("mihomo", v4));
    });
}

#[test]
fn finds_ipv6_switched_off_and_mends_it() {
    sandbox(|sb| {
        let (_helper, alice, _proxy, _agent) = fine(sb);
        let app = alice.cgroup("app.slice/app-a.scope").app();
        sb.run(&["sysctl", "-w", "net.ipv6.conf.lo.disable_ipv6=1"]);
        let opinion = Opinion::of(&alice);
        assert!(
            opinion.ids().contains(&"ipv6-off-on-lo"),
            "{:#}",
            opinion.json
        );
        assert_eq!(opinion.code, Some(1));
        let [_, v6] = sb.destinations();
        assert_ne!(app.udp(v6), proxied("mihomo", v6));
        opinion.mend(sb, "ipv6-off-on-lo");
        wait_for(&alice, &[]);
        let [_, v6] = sb.destinations();
        assert_eq!(app.udp(v6), proxied("mihomo", v6));
        // There is nothing to mend where there is none at all.
        sb.run(&["ip", "-6", "route", "del", "default"]);
        Opinion::of(&alice).expect(&["no-route"]);
    });
}

#[test]
fn knows_what_asks_past_the_dns_hijack() {
    sandbox(|sb| {
        let (_helper, alice, _proxy, agent) = fine(sb);
        let hijack = "{port: 7890, dns-hijack: {ip: 127.0.0.1, port: 1053}}";
        agent.write_config(&CONFIG.replace("{port: 7890}", hijack));
        wait_for(&alice, &["dns-not-listening"]);
        let _dns = sb
            .service("dns")
            .at("127.0.0.1:1053".parse().expect("an address"))
            .start();
        wait_for(&alice, &[]);
    });
}

#[test]
fn is_content_with_a_system_that_is_set_up_as_the_readme_says() {
    sandbox(|sb| {
        let system = System::builder(sb).install_project().boot();
        let alice = system.alice();
        let doctor = || {
            let output = system.output_as(alice, &["cgtproxy-agent", "doctor", "--json"]);
            let json: Value = serde_json::from_slice(&output.stdout)
                .unwrap_or_else(|e| panic!("{e}: {output:?}"));
            Opinion {
                code: output.status.code(),
                json,
            }
        };
        // Nothing is set up: what it says to run sets it up.
        let opinion = doctor();
        opinion.expect(&["agent-not-running", "config-missing", "helper-missing"]);
        for command in opinion.commands("helper-missing") {
            system.run(&["sh", "-ec", &command]);
        }
        let hijack = "{port: 7890, dns-hijack: {ip: 127.0.0.1, port: 1053}}";
        let config = CONFIG.replace("{port: 7890}", hijack);
        system.write_config(alice, &config);
        for command in opinion.commands("agent-not-running") {
            system.run_as(alice, &["sh", "-ec", &command]);
        }
        let _proxy = sb.tproxy("mihomo").uid(alice.uid()).port(7890).start();
        let _dns = sb
            .service("dns")
            .at("127.0.0.1:1053".parse().expect("an address"))
            .start();
        let mut last = String::new();
        wait_until("doctor to be content", || {
            let opinion = doctor();
            last = format!("{:#}", opinion.json);
            opinion.code == Some(0) && opinion.ids().is_empty() && opinion.unseen() == 0
        });
        // Names by systemd-resolved, and its own command against that.
        let hosts = "printf 'passwd: files\\nhosts: files resolve [!UNAVAIL=return] dns\\n'";
        let script = format!("{hosts} > /etc/nsswitch.conf; mkdir -p /run/systemd/resolve");
        system.run(&["sh", "-ec", &script]);
        let socket = system.root().join("run/systemd/resolve/io.systemd.Resolve");
        let _resolved = UnixListener::bind(&socket).expect("nobody else is there");
        fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).expect("it is ours");
        wait_until("nss-resolve", || doctor().ids() == ["nss-resolve"]);
        let opinion = doctor();
        assert_eq!(opinion.code, Some(0));
        for command in opinion.commands("nss-resolve") {
            system.run(&["sh", "-ec", &command]);
        }
        doctor().expect(&[]);
        let line = system.run(&["grep", "hosts:", "/etc/nsswitch.conf"]);
        assert_eq!(
            line.split_whitespace().collect::<Vec<_>>(),
            ["hosts:", "files", "dns"]
        );
        // The original's daemon, which has the same table.
        let unit = "[Service]\nExecStart=/bin/sleep infinity\n";
        let file = system.root().join("etc/systemd/system/cgtproxy.service");
        fs::write(file, unit).expect("it is ours");
        system.run(&["systemctl", "daemon-reload"]);
        system.run(&["systemctl", "start", "cgtproxy.service"]);
        let opinion = doctor();
        opinion.expect(&["original-runs"]);
        for command in opinion.commands("original-runs") {
            system.run(&["sh", "-ec", &command]);
        }
        doctor().expect(&[]);
    });
}
