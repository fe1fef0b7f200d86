//! cgtproxy at work on real packets, in a sandbox that leaves the machine alone.
//!
//! Nothing that is printed about packets is known beforehand: it is what the applications, the
//! servers and the far end of the network have seen.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a demonstration that cannot go on is best ended with a panic, which shows the sandbox"
)]

/// Prints a line.
macro_rules! say {
    () => { $crate::print("") };
    ($($line:tt)*) => { $crate::print(&format!($($line)*)) };
}

mod abroad;
mod report;

use std::io::{ErrorKind, Write, stdout};
use std::net::SocketAddr;
use std::process::ExitCode;

use cgtproxy_tests::agent::Agent;
use cgtproxy_tests::sandbox::{
    App, Outcome, Sandbox, Service, User, direct, proxied, run_in_sandbox,
};
use cgtproxy_tests::wire::Transport::{Tcp, Udp};
use report::Report;

const ALICE: u32 = 1001;
const BOB: u32 = 1002;
/// alice's proxies, and where they listen.
const TUNNEL: (&str, u16) = ("tunnel", 7890);
const TCP_ONLY: (&str, u16) = ("tcp-only", 7891);

fn main() -> ExitCode {
    if let Err(why) = can_run() {
        eprintln!("cgtproxy-demo: {why}");
        return ExitCode::FAILURE;
    }
    run_in_sandbox(demonstrate)
}

/// Prints a line. If whoever reads has seen enough, the demonstration is over.
fn print(line: &str) {
    match writeln!(stdout(), "{line}") {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        written => written.expect("it can be written"),
    }
}

fn can_run() -> Result<(), String> {
    let this = std::env::current_exe().map_err(|e| e.to_string())?;
    if !nix::unistd::Uid::effective().is_root() {
        let this = this.display();
        return Err(format!(
            "only root may make the network of a sandbox: run `sudo {this}`"
        ));
    }
    for program in [
        "cgtproxy-helper",
        "cgtproxy-agent",
        "cgtproxy-relay",
        "cgtproxy-testapp",
    ] {
        if !this.with_file_name(program).exists() {
            return Err(format!(
                "{program} is not beside this program: run `make demo`"
            ));
        }
    }
    Ok(())
}

fn demonstrate(sb: &Sandbox) -> ExitCode {
    let mut report = Report::default();
    let bypassed = sb.destinations();
    let alice = sb.user(ALICE);
    let _tunnel = sb.tproxy(TUNNEL.0).uid(ALICE).port(TUNNEL.1).start();
    let _tcp_only = sb.tproxy(TCP_ONLY.0).uid(ALICE).port(TCP_ONLY.1).start();
    let helper = sb.helper().start();
    let agent = alice.agent(&config(bypassed, "")).start();

    say!("cgtproxy in a sandbox with a network of its own. This machine's stays as it is.\n");
    report.process("cgtproxy-helper", helper.pid(), "for everybody");
    report.process("cgtproxy-agent", agent.pid(), "of the ordinary user alice");
    say!("  two TPROXY servers of alice's, in the place of mihomo, sing-box or xray\n");
    say!("alice's ~/.config/cgtproxy/config.yaml:\n");
    for line in config(bypassed, "").lines() {
        say!("    {line}");
    }

    say!("\nWhere the packets of her applications really went:\n");
    report.heading();
    let browser = app(&alice, "browser");
    packets(sb, &mut report, &alice, &browser, bypassed);
    say!(
        "
  tunnel, tcp-only  that TPROXY server got them, with their original destination
  direct            they left, and the internet answered
  dropped           none left, none reached a server
  ping              ICMP: a TPROXY server takes only TCP and UDP; drop is for everything
  bob's             an application of another user, who has not configured anything"
    );

    first_packets(sb, &mut report, &alice);
    live_changes(sb, &mut report, &alice, &agent, &browser, bypassed);
    abroad::show(sb, &mut report);
    report.conclude()
}

/// alice's configuration, with one more rule before the others.
fn config([v4, v6]: [SocketAddr; 2], rule: &str) -> String {
    let (tunnel, tcp_only) = (TUNNEL, TCP_ONLY);
    format!(
        r#"version: 1
bypass: [{v4}, "{v6}"]
tproxies:
  {}: {{port: {}}}
  {}: {{port: {}, no-udp: true}}
rules:{rule}
  - {{match: app-voice, tproxy: {}}}
  - {{match: app-game, direct: true}}
  - {{match: app-tracker, drop: true}}
  - {{match: /app\.slice$, tproxy: {}}}     # every other application
"#,
        tunnel.0,
        tunnel.1,
        tcp_only.0,
        tcp_only.1,
        tcp_only.0,
        tunnel.0,
        v4 = v4.ip(),
        v6 = v6.ip(),
    )
}

/// An application as a desktop starts it: in a control group of its own.
fn app(user: &User, name: &str) -> App {
    user.cgroup(format!("app.slice/app-{name}.scope")).app()
}

fn packets(
    sb: &Sandbox,
    report: &mut Report,
    alice: &User,
    browser: &App,
    bypassed: [SocketAddr; 2],
) {
    let mut row = |name, configured, app: &App, to: [SocketAddr; 2], outcomes: [Expected; 3]| {
        let [tcp, udp, ping] = outcomes;
        let [v4, v6] = to;
        let cells = [
            (v4, app.tcp(v4), tcp(v4)),
            (v6, app.tcp(v6), tcp(v6)),
            (v4, app.udp(v4), udp(v4)),
            (v6, app.udp(v6), udp(v6)),
            (v4, app.ping(v4.ip()), ping(v4)),
            (v6, app.ping(v6.ip()), ping(v6)),
        ];
        report.row(name, configured, &cells);
    };
    let fresh = || sb.destinations();
    let [voice, game, tracker] = ["voice", "game", "tracker"].map(|name| app(alice, name));
    let others = app(&sb.user(BOB), "browser");
    row(
        "browser",
        TUNNEL.0,
        browser,
        fresh(),
        [tunnel, tunnel, direct],
    );
    row("browser", "bypass", browser, bypassed, [direct; 3]);
    row(
        "voice",
        TCP_ONLY.0,
        &voice,
        fresh(),
        [tcp_only, direct, direct],
    );
    row("game", "direct", &game, fresh(), [direct; 3]);
    row("tracker", "drop", &tracker, fresh(), [dropped; 3]);
    row("bob's", "nothing", &others, fresh(), [direct; 3]);
}

/// What is to become of a question to that destination.
type Expected = fn(SocketAddr) -> Outcome;

fn tunnel(to: SocketAddr) -> Outcome {
    proxied(TUNNEL.0, to)
}

fn tcp_only(to: SocketAddr) -> Outcome {
    proxied(TCP_ONLY.0, to)
}

fn dropped(_: SocketAddr) -> Outcome {
    Outcome::Silent
}

/// An application that inherits its verdict has no moment in which it is wrong.
fn first_packets(sb: &Sandbox, report: &mut Report, alice: &User) {
    const CONNECTIONS: u32 = 250;
    say!("\nAn application that nobody has seen before starts, and connects at once:\n");
    let started = app(alice, "new");
    let mut total = 0;
    let mut through_tunnel = 0;
    for to in sb.destinations() {
        for transport in [Tcp, Udp] {
            let tally = started.burst(transport, to, CONNECTIONS);
            total += tally.total();
            through_tunnel += tally.proxied.get(TUNNEL.0).copied().unwrap_or(0);
        }
    }
    report.line(
        "new",
        &format!("{through_tunnel} of {total} connections, from the first on, through the tunnel"),
        through_tunnel == total,
    );
}

fn live_changes(
    sb: &Sandbox,
    report: &mut Report,
    alice: &User,
    agent: &Service,
    browser: &App,
    bypassed: [SocketAddr; 2],
) {
    let [to, _] = sb.destinations();
    let open = browser.open_tcp(to).expect("the tunnel answers");
    say!("\nalice edits the file while the browser has a connection open:\n");
    report.heading_of_changes();
    let mut step = |first_rule: &str, old: Expected, new: Expected| {
        let [fresh, _] = sb.destinations();
        let old = (to, open.ask(), old(to));
        let new = (fresh, browser.tcp(fresh), new(fresh));
        report.change(first_rule, &old, &new);
    };
    step("(as above)", tunnel, tunnel);
    let changes: [(&str, &str, Expected, Expected); 2] = [
        ("direct", "direct: true", tunnel, direct),
        ("drop", "drop: true", dropped, dropped),
    ];
    for (target, yaml, old, new) in changes {
        let rule = format!("{{match: app-browser, {yaml}}}");
        agent.write_config(&config(bypassed, &format!("\n  - {rule}")));
        let browser = alice.cgroup("app.slice/app-browser.scope");
        Agent::of(alice).wait_for_verdict(&browser, target);
        step(&rule, old, new);
    }
    say!("\n  A new rule is for new connections. Only drop is for those that are open, too.");
}
