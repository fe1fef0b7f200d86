//! A user without any proxy on the machine, but with a SOCKS5 server somewhere else.

use std::net::SocketAddr;

use cgtproxy_tests::sandbox::{App, INTERNET_V4, INTERNET_V6, Outcome, Sandbox, User, direct};

use crate::app;
use crate::report::Report;

const CAROL: u32 = 1003;

const CONFIG: &str = r#"version: 1
proxies:
  abroad: {upstream: "socks5h://192.0.2.2:1080"}   # or what `ssh -D` listens on
rules:
  - {match: /app\.slice$, proxy: abroad}
"#;

pub(crate) fn show(sb: &Sandbox, report: &mut Report) {
    let mut server = sb.socks_server(SocketAddr::new(INTERNET_V4, 1080));
    let carol = sb.user(CAROL);
    let relay = carol.relay().start();
    let _agent = carol.agent(CONFIG).start();
    let browser = app(&carol, "browser");

    say!("\ncarol runs no proxy at all. There is a SOCKS5 server on the internet:\n");
    for line in CONFIG.lines() {
        say!("    {line}");
    }
    say!();
    report.process("cgtproxy-relay", relay.pid(), "of the ordinary user carol");
    say!();
    report.heading();
    let [v4, v6] = sb.destinations();
    let udp = |to| {
        let socket = browser.open_udp(to);
        Outcome::in_the_end(|| socket.ask())
    };
    let cells = [
        (v4, Outcome::in_the_end(|| browser.tcp(v4)), abroad(v4)),
        (v6, Outcome::in_the_end(|| browser.tcp(v6)), abroad(v6)),
        (v4, udp(v4), abroad(v4)),
        (v6, udp(v6), abroad(v6)),
        (v4, browser.ping(v4.ip()), direct(v4)),
        (v6, browser.ping(v6.ip()), direct(v6)),
    ];
    report.row("carol's", "abroad", &cells);

    say!("\n  abroad            the internet answered, and saw the SOCKS5 server ask\n");
    name(sb, report, &carol, &browser);

    server.kill();
    let mut closed = 0;
    let mut left = 0;
    for to in sb.destinations() {
        closed += usize::from(Outcome::in_the_end(|| browser.tcp(to)) == Outcome::Closed);
        sb.settle();
        left += sb.deliveries(to.ip()).len();
    }
    report.line(
        "carol's",
        &format!(
            "with that server down, {closed} of 2 connections are closed, {left} go out directly"
        ),
        (closed, left) == (2, 0),
    );
}

/// A name that nobody knows but that server.
fn name(sb: &Sandbox, report: &mut Report, carol: &User, browser: &App) {
    sb.count_queries();
    let [to, _] = sb.destinations();
    let name = format!("{}.example", to.ip().to_string().replace('.', "-"));
    let resolver = format!("nameserver {}\n", sb.fresh_v4());
    std::fs::write("/run/resolv.conf", resolver).expect("/run is the sandbox's own");
    sb.run(&["mount", "--bind", "/run/resolv.conf", "/etc/resolv.conf"]);
    let cgroup = carol.cgroup("app.slice/app-look-up.scope");
    let answer = carol.output(&cgroup, &["getent", "ahostsv4", &name]);
    let address = answer.split_whitespace().next().unwrap_or_default();
    let fake = SocketAddr::new(address.parse().expect("an address"), to.port());
    let arrived = Outcome::in_the_end(|| browser.tcp(fake)) == Outcome::Redirected { to };
    report.line(
        "carol's",
        &format!("{name} is {address} here, and a connection there is one to that name"),
        arrived,
    );
    let queries = sb.queries_left();
    report.line(
        "carol's",
        &format!("{queries} DNS queries have left the machine"),
        queries == 0,
    );
}

fn abroad(to: SocketAddr) -> Outcome {
    Outcome::Direct {
        seen_as: if to.is_ipv4() {
            INTERNET_V4
        } else {
            INTERNET_V6
        },
    }
}
