//! MPTCP (RFC 8684): a program opens a connection, and the kernel opens further paths for it, from other addresses, by
//! sockets of its own.

#![allow(clippy::expect_used, reason = "a panic is a failed test")]

use std::net::{IpAddr, SocketAddr};

use cgtproxy_tests::sandbox::{App, Connection, MULTIPATH_PORT, Sandbox, by, direct, sandbox};
use cgtproxy_tests::session::{Session, to_proxy, verdict};
use cgtproxy_tests::wait::wait_until;
use serde_json::json;

const APP: &str = "app.slice/app-a.scope";

/// The machine's second addresses.
const SECOND: [&str; 2] = ["192.0.2.11", "2001:db8::11"];

/// Gives the machine its second addresses, and counts each SYN that programs and the kernel send from there, whatever
/// becomes of it.
fn prepare(sb: &Sandbox) {
    sb.run(&["ip", "address", "add", "192.0.2.11/24", "dev", "uplink"]);
    // Not for what chooses its address by itself.
    sb.ip6("address add 2001:db8::11/64 dev uplink nodad preferred_lft 0");
    for namespace in [&["ip"][..], &["ip", "-netns", "internet"]] {
        let limits = ["mptcp", "limits", "set", "subflow", "8"];
        sb.run(&[namespace, &limits].concat());
    }
    sb.nft(
        "table inet paths {
             counter begun {}
             chain output {
                 type filter hook output priority -400
                 ip saddr 192.0.2.11 tcp flags syn / syn,ack counter name begun
                 ip6 saddr 2001:db8::11 tcp flags syn / syn,ack counter name begun
             }
         }",
    );
}

/// How many times the kernel has tried to open a further path.
fn begun(sb: &Sandbox) -> u64 {
    sb.counted("paths", "begun")
}

/// Has the kernel open further paths for connections that are open.
fn add_paths(sb: &Sandbox) {
    for address in SECOND {
        let endpoint = ["ip", "mptcp", "endpoint", "add", address];
        sb.run(&[&endpoint[..], &["dev", "uplink", "subflow"]].concat());
    }
}

fn remove_paths(sb: &Sandbox) {
    sb.run(&["ip", "mptcp", "endpoint", "flush"]);
}

/// How many packets have come from the second addresses.
fn by_further_paths(sb: &Sandbox, to: IpAddr) -> u64 {
    let second = SECOND.map(|address| address.parse::<IpAddr>().expect("an address"));
    let deliveries = sb.deliveries(to).into_iter();
    let further = deliveries.filter(|delivery| second.contains(&delivery.source));
    further.map(|delivery| delivery.packets).sum()
}

/// Connections that have carried something: before that there are no further paths.
fn open(sb: &Sandbox, app: &App) -> Vec<(SocketAddr, Connection)> {
    let destinations = sb.destinations().into_iter();
    destinations
        .map(|to| {
            let to = SocketAddr::new(to.ip(), MULTIPATH_PORT);
            let flow = app.open_tcp(to).expect("it opens");
            assert_eq!(flow.ask(), direct(to));
            (to, flow)
        })
        .collect()
}

#[test]
fn programs_that_would_use_several_paths_go_by_their_verdicts() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let alice = sb.user(1001);
        let app = alice.cgroup(APP).app();
        app.multipath();
        let mut session = Session::of(&alice);
        session.replace(
            json!([{ "name": "mihomo", "port": 7890 }]),
            json!([]),
            json!([to_proxy(APP, "mihomo")]),
        );
        sb.expect(&app, by("mihomo"));
        session.replace(json!([]), json!([]), json!([verdict(APP, "drop")]));
        sb.expect_dropped(&app);
        session.call("RemovePolicy", json!({}));
        sb.expect(&app, direct);
    });
}

/// Whoever has come to be dropped has no further paths either, with a rule about that very control group and about
/// the root, which has the kernel's own sockets too.
#[test]
fn further_paths_of_an_open_connection_go_by_its_programs_verdict() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        prepare(sb);
        let alice = sb.user(1001);
        for (owner, path) in [(alice.clone(), APP), (sb.user(0), "")] {
            let app = alice.cgroup(APP).app();
            app.multipath();
            let mut session = Session::of(&owner);

            let flows = open(sb, &app);
            add_paths(sb);
            for (to, _) in &flows {
                wait_until("there is a further path", || {
                    by_further_paths(sb, to.ip()) > 0
                });
            }
            remove_paths(sb);
            // The kernel would try further paths for these as well.
            drop(flows);

            let flows = open(sb, &app);
            let before = begun(sb);
            session.replace(json!([]), json!([]), json!([verdict(path, "drop")]));
            add_paths(sb);
            let count = flows.len() as u64;
            wait_until("paths have been tried", || begun(sb) >= before + count);
            for (to, flow) in flows {
                assert_eq!(by_further_paths(sb, to.ip()), 0, "{path:?} {to}");
                let outcome = flow.ask();
                assert!(outcome.is_dropped(), "{path:?} {to}: {outcome:?}");
            }
            remove_paths(sb);
            session.call("RemovePolicy", json!({}));
        }
    });
}
