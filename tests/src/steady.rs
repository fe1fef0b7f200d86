//! Traffic whose way must stay the same, whatever happens meanwhile.

use std::net::SocketAddr;

use crate::sandbox::{App, Sandbox, Traffic};
use crate::wait::wait_until;
use crate::wire::Tally;
use crate::wire::Transport::{Tcp, Udp};

/// Traffic of an application, of both families, by TCP and UDP: a new socket for each question.
pub struct Steady {
    traffic: Vec<(String, Traffic)>,
    destinations: [SocketAddr; 2],
}

impl Steady {
    /// Starts it, for destinations of its own.
    pub fn start(sandbox: &Sandbox, app: &App) -> Self {
        let destinations = sandbox.destinations();
        let start = |transport, to| (format!("{transport:?} {to}"), app.traffic(transport, to));
        let pairs = destinations.map(|to| [Tcp, Udp].map(|transport| start(transport, to)));
        Self {
            traffic: pairs.into_iter().flatten().collect(),
            destinations,
        }
    }

    /// Insists that questions begun from now on go through that proxy.
    ///
    /// # Panics
    /// When one does not.
    #[track_caller]
    pub fn assert_proxied(&self, proxy: &str) {
        for (name, traffic) in &self.traffic {
            let tally = traffic.next(5);
            let through = tally.proxied.get(proxy);
            assert_eq!(through, Some(&tally.total()), "{name}: {tally:?}");
        }
    }

    /// Insists that every question since the last time has gone through one of those proxies, and
    /// that not one packet has ever left by itself.
    ///
    /// # Panics
    /// When that is not so.
    #[track_caller]
    pub fn assert_none_strayed(&self, sandbox: &Sandbox, proxies: &[&str]) {
        for (name, tally) in self.tallies() {
            let of = |proxy: &&str| tally.proxied.get(*proxy).copied().unwrap_or(0);
            let through: u64 = proxies.iter().map(of).sum();
            assert_eq!(through, tally.total(), "{name}: {tally:?}");
        }
        self.assert_nothing_left(sandbox);
    }

    /// Insists that the internet itself has answered every question since the last time.
    ///
    /// # Panics
    /// When that is not so.
    #[track_caller]
    pub fn assert_all_direct(&self) {
        for (name, tally) in self.tallies() {
            assert_eq!(tally.direct, tally.total(), "{name}: {tally:?}");
        }
    }

    /// What became of the questions since the last time, of which there is one at least, by what they are.
    #[track_caller]
    fn tallies(&self) -> impl Iterator<Item = (&str, Tally)> {
        self.traffic.iter().map(|(name, traffic)| {
            let mut tally = Tally::default();
            wait_until("a question to be through", || {
                tally.add(&traffic.tally());
                tally.total() > 0
            });
            (name.as_str(), tally)
        })
    }

    /// Insists that not one packet has ever left by itself; questions may have been lost.
    ///
    /// # Panics
    /// When one has.
    #[track_caller]
    pub fn assert_nothing_left(&self, sandbox: &Sandbox) {
        for to in self.destinations {
            sandbox.assert_nothing_left_for(to.ip());
        }
    }
}
