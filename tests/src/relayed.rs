//! An application whose connections the relay carries on to a proxy elsewhere.

use std::net::{IpAddr, SocketAddr};

use serde_json::Value;

use crate::sandbox::{App, INTERNET_V4, INTERNET_V6, Outcome, Sandbox, Service, User};
use crate::wait::wait_until;

/// Less and more than goes through the relay at once, and so much that it goes by splice(2).
const BYTES: [u64; 3] = [1, 100_000, 8 << 20];

/// A user with an agent, a relay and an application in `app-a.scope`.
pub struct Relayed {
    /// The relay.
    pub relay: Service,
    /// The agent.
    pub agent: Service,
    /// The user.
    pub user: User,
    /// The application.
    pub app: App,
}

/// That user to be.
pub struct RelayedBuilder<'a> {
    sandbox: &'a Sandbox,
    uid: u32,
    connections: Option<u32>,
    certificates: Option<&'a str>,
}

/// What takes everything of the application's to a proxy with these options.
#[must_use]
pub fn config(options: &str) -> String {
    format!("version: 1\nproxies: {{own: {{{options}}}}}\nrules: [{{match: /app-a, proxy: own}}]\n")
}

impl Relayed {
    /// One whose application goes through this upstream alone. There must be a helper.
    #[track_caller]
    pub fn through(sandbox: &Sandbox, upstream: &str) -> Self {
        Self::builder(sandbox).start(&config(&format!("upstream: '{upstream}'")))
    }

    /// One to be told of more.
    #[must_use]
    pub fn builder(sandbox: &Sandbox) -> RelayedBuilder<'_> {
        RelayedBuilder {
            sandbox,
            uid: 1001,
            connections: None,
            certificates: None,
        }
    }

    /// What a command of the agent's prints.
    pub fn agent(&self, command: &str) -> String {
        let output = self.user.run("cgtproxy-agent", &[command]);
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// What the agent tells of the relay's first proxy; nothing if it tells nothing.
    #[must_use]
    pub fn upstream(&self) -> Value {
        let status = self.user.run("cgtproxy-agent", &["status", "--json"]);
        let status: Value = serde_json::from_slice(&status.stdout).unwrap_or_default();
        let upstream = status.pointer("/relay/upstreams/0");
        upstream.cloned().unwrap_or_default()
    }

    /// What becomes of a TCP connection in the end, once somebody has answered.
    #[track_caller]
    pub fn tcp(&self, to: SocketAddr) -> Outcome {
        Outcome::in_the_end(|| self.app.tcp(to))
    }

    /// Insists that either side may end what it says and still hears the other out, byte by byte.
    ///
    /// # Panics
    /// When something does not arrive.
    #[track_caller]
    pub fn assert_ends_are_passed_on(&self, sandbox: &Sandbox) {
        self.assert_servers_may_end_first(sandbox);
        let _echo = sandbox.echo_server(7777);
        for to in sandbox.destinations() {
            for bytes in BYTES {
                self.app.bulk(SocketAddr::new(to.ip(), 7777), bytes);
            }
        }
    }

    /// Insists on that for a server that ends first, with and without a word before that.
    ///
    /// # Panics
    /// When something does not arrive.
    #[track_caller]
    pub fn assert_servers_may_end_first(&self, sandbox: &Sandbox) {
        let first = [(7001, "and that is all"), (7002, "")];
        let servers = first.map(|(port, greeting)| sandbox.listener(port, greeting));
        let mut number = 0;
        for to in sandbox.destinations() {
            for bytes in BYTES {
                for (server, (port, greeting)) in servers.iter().zip(first) {
                    // A length of its own for each, to know it by.
                    number += 1;
                    let bytes = bytes + number;
                    self.app
                        .hear_out(SocketAddr::new(to.ip(), port), greeting, bytes);
                    let heard = format!("heard {bytes} bytes to the end\n");
                    wait_until(&heard, || server.log().contains(&heard));
                }
            }
        }
    }
}

impl<'a> RelayedBuilder<'a> {
    /// Another user than 1001.
    #[must_use]
    pub fn uid(mut self, uid: u32) -> Self {
        self.uid = uid;
        self
    }

    /// A relay that takes so many connections.
    #[must_use]
    pub fn connections(mut self, limit: u32) -> Self {
        self.connections = Some(limit);
        self
    }

    /// A relay that trusts the certificates in this file.
    #[must_use]
    pub fn certificates(mut self, path: &'a str) -> Self {
        self.certificates = Some(path);
        self
    }

    /// Starts it all, with that configuration.
    #[track_caller]
    pub fn start(self, config: &str) -> Relayed {
        let user = self.sandbox.user(self.uid);
        let mut relay = user.relay();
        if let Some(limit) = self.connections {
            relay = relay.argument("--connections").argument(limit.to_string());
        }
        if let Some(path) = self.certificates {
            relay = relay.env("SSL_CERT_FILE", path);
        }
        let relay = relay.start();
        let app = user.cgroup("app.slice/app-a.scope").app();
        let agent = user.agent(config).start();
        Relayed {
            relay,
            agent,
            user,
            app,
        }
    }
}

/// Whether somebody on the internet was asked, by somebody on the internet.
#[must_use]
pub fn came_from_the_internet(outcome: &Outcome, to: SocketAddr) -> bool {
    let inside: [IpAddr; 3] = [to.ip(), INTERNET_V4, INTERNET_V6];
    matches!(outcome, Outcome::Direct { seen_as } if inside.contains(seen_as))
}

/// Insists on that.
///
/// # Panics
/// When it was not.
#[track_caller]
pub fn assert_from_the_internet(outcome: &Outcome, to: SocketAddr) {
    assert!(came_from_the_internet(outcome, to), "{to}: {outcome:?}");
}
