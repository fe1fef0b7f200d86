//! What has happened, printed for somebody who has never seen cgtproxy.

use std::fs;
use std::net::SocketAddr;
use std::process::ExitCode;

use cgtproxy_tests::sandbox::{INTERNET_V4, INTERNET_V6, Outcome};

/// The mask of CAP_NET_ADMIN alone, as /proc shows it.
const NET_ADMIN: &str = "0000000000001000";
const NO_CAPABILITY: &str = "0000000000000000";

/// The columns of the table, each kind for IPv4 and for IPv6.
const KINDS: [&str; 6] = ["TCP", "TCP", "UDP", "UDP", "ping", "ping"];

/// Where a question was sent, what became of it, and what should have.
pub(crate) type Cell = (SocketAddr, Outcome, Outcome);

/// Prints, and remembers what was not as it should be.
#[derive(Default)]
pub(crate) struct Report {
    checked: usize,
    wrong: Vec<String>,
}

impl Report {
    /// A running daemon, with the rights that the kernel says it has.
    pub(crate) fn process(&mut self, name: &str, pid: u32, what: &str) {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it is running");
        let field = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key));
            let values = line.expect("the kernel tells").split_whitespace();
            values.map(str::to_owned).collect::<Vec<_>>()
        };
        // The effective uid; the other sets of capabilities allow to get more.
        let uid = field("Uid:")[1].clone();
        let sets = ["CapPrm:", "CapEff:", "CapBnd:"].map(|set| field(set)[0].clone());
        let rights = match sets.each_ref().map(String::as_str) {
            [NO_CAPABILITY, NO_CAPABILITY, _] => "no capabilities at all".to_owned(),
            [NET_ADMIN, NET_ADMIN, NET_ADMIN] => "CAP_NET_ADMIN and nothing else".to_owned(),
            [permitted, effective, _] => format!("capabilities {effective} of {permitted}"),
        };
        say!("  {name:<15}  {what:<26}  uid {uid:<4}  {rights}");
        let allowed = match name {
            "cgtproxy-helper" => rights.starts_with("CAP_NET_ADMIN"),
            _ => rights.starts_with("no "),
        };
        let right = allowed && uid != "0";
        self.check(right, || format!("{name} has uid {uid} and {rights}"));
    }

    /// The first lines of the table.
    pub(crate) fn heading(&self) {
        let families = ["IPv4", "IPv6", "IPv4", "IPv6", "IPv4", "IPv6"];
        print_row("", "", KINDS.map(str::to_owned));
        print_row("application", "configured", families.map(str::to_owned));
    }

    /// A line of the table.
    pub(crate) fn row(&mut self, name: &str, configured: &str, cells: &[Cell; 6]) {
        for (kind, cell) in KINDS.iter().zip(cells) {
            self.compare(&format!("{name}, {kind}"), cell);
        }
        print_row(name, configured, cells.each_ref().map(shown));
    }

    /// One fact.
    pub(crate) fn line(&mut self, name: &str, fact: &str, right: bool) {
        say!("  {name:<11}  {fact}");
        self.check(right, || format!("{name}: {fact}"));
    }

    /// The first line of the table of changes.
    pub(crate) fn heading_of_changes(&self) {
        print_change("first rule", "open connection", "new connection");
    }

    /// What a new first rule has made of an open connection and of a new one.
    pub(crate) fn change(&mut self, rule: &str, old: &Cell, new: &Cell) {
        print_change(rule, &shown(old), &shown(new));
        self.compare(&format!("{rule}, the open connection"), old);
        self.compare(&format!("{rule}, a new connection"), new);
    }

    /// The last line, and what the program returns.
    pub(crate) fn conclude(self) -> ExitCode {
        let Self { checked, wrong } = self;
        if wrong.is_empty() {
            say!("\nAll {checked} observations are as configured.");
            return ExitCode::SUCCESS;
        }
        say!(
            "\n{} of {checked} observations are NOT as configured:",
            wrong.len()
        );
        for line in wrong {
            say!("  {line}");
        }
        ExitCode::FAILURE
    }

    fn compare(&mut self, what: &str, (to, outcome, expected): &Cell) {
        let right = outcome == expected || outcome.is_dropped() && expected.is_dropped();
        self.check(right, || {
            format!("{what} to {to}: {outcome:?} instead of {expected:?}")
        });
    }

    fn check(&mut self, right: bool, what: impl FnOnce() -> String) {
        self.checked += 1;
        if !right {
            self.wrong.push(what());
        }
    }
}

fn print_row(name: &str, configured: &str, cells: [String; 6]) {
    let line: String = cells.iter().map(|cell| format!("  {cell:<8}")).collect();
    say!("  {name:<11}  {configured:<10}{}", line.trim_end());
}

fn print_change(rule: &str, old: &str, new: &str) {
    say!("  {rule:<36}{old:<17}{new}");
}

/// An outcome in one word.
fn shown((to, outcome, _): &Cell) -> String {
    match outcome {
        // It came from the SOCKS5 server.
        Outcome::Direct { seen_as } if [INTERNET_V4, INTERNET_V6].contains(seen_as) => {
            "abroad".to_owned()
        }
        Outcome::Direct { .. } => "direct".to_owned(),
        Outcome::Redirected { .. } => "redirected".to_owned(),
        Outcome::Proxied {
            by,
            original_destination,
        } if original_destination == to => by.clone(),
        Outcome::Proxied { .. } => "misled".to_owned(),
        Outcome::Forbidden | Outcome::Silent => "dropped".to_owned(),
        Outcome::Local { .. } => "local".to_owned(),
        Outcome::LeftUnanswered | Outcome::AnswerLost => "lost".to_owned(),
        Outcome::Refused => "refused".to_owned(),
        Outcome::Closed => "closed".to_owned(),
        Outcome::Failed { errno } => format!("error {errno}"),
    }
}
