//! The relay, which carries connections on to proxies elsewhere: told what to do, and asked where it listens.
//!
//! systemd starts it when the agent connects to its socket. Nothing waits for it: until it has said where it
//! listens, the helper has what goes to it refused.

use std::io;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use cgtproxy_proto::back_off::BackOff;
use cgtproxy_proto::client::{CallError, Client};
use cgtproxy_proto::relay::{
    Configure_Args, Configure_Reply, ErrorKind, GetStatus_Args, GetStatus_Reply, Protocol, Upstream,
};
pub(crate) use cgtproxy_proto::socket::of_relay as default_socket;
use tokio::time::{sleep, timeout};

use crate::config::{Means, Network, Proxy, Scheme};
use crate::connection::nobody_listens;
use crate::policy::Target;
use crate::state::{Agent, Ports, Relay, Source, State};
use crate::text::{chain, printable};

/// How long to wait before connecting again, at first and at most.
const RECONNECT: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(2));

/// How long the relay may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why packets for this target are refused though the verdict is in the kernel, if they are: it is a proxy of the relay's,
/// and nobody knows yet where that listens, or the helper does not.
pub(crate) fn lacks(state: &State, target: &Target) -> Option<String> {
    let Target::Proxy(name) = target else {
        return None;
    };
    let mut proxies = state.source().config.proxies.iter();
    let proxy = proxies.find(|proxy| proxy.name == *name)?;
    if !matches!(proxy.means, Means::Relay { .. }) {
        return None;
    }
    if let Some(problem) = &state.relay.problem {
        return Some(problem.clone());
    }
    if state.relay.port(proxy) == 0 {
        return Some("the relay has not said yet where it listens".to_owned());
    }
    let untold = state.ledger().is_replacing();
    untold.then(|| {
        let problem = state.problem();
        problem.unwrap_or_else(|| "the helper does not know yet where the relay listens".into())
    })
}

/// Whether to ask the relay how it is doing, by what the agent says: asking starts it, so only who has one asks it.
pub(crate) fn is_to_be_asked(status: &cgtproxy_proto::agent::GetStatus_Reply) -> bool {
    let mut targets = status.targets.iter();
    targets.any(|target| target.relayed == Some(true))
}

/// How the relay and its proxies are doing.
///
/// # Errors
/// Why it does not say, in a sentence.
pub(crate) async fn status(socket: &Path) -> Result<GetStatus_Reply, String> {
    let mut client = Client::connect(socket)
        .await
        .map_err(|error| unreachable(socket, &error))?;
    let call = client.call("org.cgtproxy.Relay.GetStatus", GetStatus_Args {});
    match timeout(PATIENCE, call).await {
        Ok(reply) => reply.map_err(|error| lost(&error)),
        Err(_) => Err("the relay does not answer".to_owned()),
    }
}

/// Keeps the relay in step with the configuration, for ever.
pub(crate) async fn run(agent: &Agent, socket: &Path) {
    let mut changes = agent.subscribe();
    let mut back_off = BackOff::new(RECONNECT);
    loop {
        let basis = Basis::of(agent);
        let wanted = wanted(agent);
        if wanted.upstreams.is_empty() {
            note(agent, Relay::default());
            while Basis::of(agent) == basis {
                if changes.changed().await.is_err() {
                    return;
                }
            }
            continue;
        }
        let why = match Client::connect(socket).await {
            Ok(mut client) => {
                let (why, configured) = converse(agent, &mut client, &mut changes, wanted).await;
                if configured {
                    back_off.reset();
                }
                why
            }
            Err(error) => Some(unreachable(socket, &error)),
        };
        let Some(why) = why else { continue };
        // Its ports stay known: the next relay tries to listen on them again.
        let known = agent.state().relay.clone();
        if known.problem.as_ref() != Some(&why) {
            tracing::warn!("{why}; what goes to proxies by it is refused; trying again");
        }
        let problem = Some(why);
        note(agent, Relay { problem, ..known });
        sleep(back_off.next_wait()).await;
    }
}

/// Tells the relay what to do until it is gone, or nothing is left for it to do. Returns why it is gone, and whether it
/// was told anything.
async fn converse(
    agent: &Agent,
    client: &mut Client,
    changes: &mut tokio::sync::watch::Receiver<()>,
    mut told: Configure_Args,
) -> (Option<String>, bool) {
    let mut configured = false;
    loop {
        let call = client.call("org.cgtproxy.Relay.Configure", &told);
        let reply: Configure_Reply = match timeout(PATIENCE, call).await {
            Ok(Ok(reply)) => reply,
            Ok(Err(error)) => return (Some(lost(&error)), configured),
            Err(_) => return (Some("the relay does not answer".to_owned()), configured),
        };
        configured = true;
        let port = |number| u16::try_from(number).unwrap_or(0);
        let listeners = reply.listeners.into_iter();
        let ports = listeners.map(|l| (l.name, (port(l.port), l.dnsPort.map(port))));
        let ports: Ports = ports.collect();
        // It need not be told which ports it listens on now. Anything else that differs has changed during the call.
        for upstream in &mut told.upstreams {
            (upstream.preferredPort, upstream.preferredDnsPort) = preferred(&ports, &upstream.name);
        }
        note(
            agent,
            Relay {
                ports,
                problem: None,
            },
        );
        let mut basis = None;
        loop {
            let now = Basis::of(agent);
            if basis.as_ref() != Some(&now) {
                basis = Some(now);
                let now = wanted(agent);
                if now.upstreams.is_empty() {
                    return (None, configured);
                }
                if now != told {
                    told = now;
                    break;
                }
            }
            tokio::select! {
                changed = changes.changed() => {
                    if changed.is_err() {
                        return (None, configured);
                    }
                }
                () = client.closed() => {
                    return (Some("the relay is gone".to_owned()), configured);
                }
            }
        }
    }
}

/// Notes what is known of the relay, and has the helper told if it matters to it.
fn note(agent: &Agent, relay: Relay) {
    {
        let mut state = agent.state_mut();
        if state.relay == relay {
            return;
        }
        let mut proxies = state.source().config.proxies.iter();
        let ports = |relay: &Relay, proxy: &Proxy| (relay.port(proxy), relay.dns_port(proxy));
        let moved = proxies.any(|proxy| ports(&state.relay, proxy) != ports(&relay, proxy));
        state.relay = relay;
        if moved {
            state.relay_moved();
        }
    }
    agent.wake();
}

/// What decides what the relay is to do, beside what it has said itself. Nearly all changes of the state are of something
/// else.
struct Basis {
    source: Rc<Source>,
    accepted: Option<Rc<Source>>,
}

impl Basis {
    fn of(agent: &Agent) -> Self {
        let state = agent.state();
        Self {
            source: state.source().clone(),
            accepted: state.accepted().cloned(),
        }
    }
}

impl PartialEq for Basis {
    fn eq(&self, other: &Self) -> bool {
        let accepted = match (&self.accepted, &other.accepted) {
            (Some(a), Some(b)) => Rc::ptr_eq(a, b),
            (a, b) => a.is_none() && b.is_none(),
        };
        accepted && Rc::ptr_eq(&self.source, &other.source)
    }
}

/// What the relay is to do.
fn wanted(agent: &Agent) -> Configure_Args {
    let state = agent.state();
    let config = &state.source().config;
    // What the helper holds stays as it is until the helper has taken what is to replace it: it may refuse that.
    let held = state.accepted().map_or(config, |source| &source.config);
    let relayed = |proxy: &&Proxy| matches!(proxy.means, Means::Relay { .. });
    let is_held = |p: &Proxy| {
        held.proxies
            .iter()
            .filter(relayed)
            .any(|h| h.name == p.name)
    };
    let coming = config.proxies.iter().filter(|proxy| !is_held(proxy));
    let upstreams = held.proxies.iter().chain(coming).filter_map(|proxy| {
        let Means::Relay { upstream, fake_dns } = &proxy.means else {
            return None;
        };
        let (user, password) = upstream.credentials.clone().unzip();
        let (port, dns_port) = preferred(&state.relay.ports, proxy.name.as_str());
        Some(Upstream {
            name: proxy.name.to_string(),
            protocol: match upstream.scheme {
                Scheme::Socks5 | Scheme::Socks5h => Protocol::socks5,
                Scheme::Http => Protocol::http,
                Scheme::Https => Protocol::https,
            },
            host: upstream.host.clone(),
            port: upstream.port.get().into(),
            user,
            password,
            fakeDns: *fake_dns,
            noIpv6: Some(proxy.no_ipv6),
            noIpv4: Some(proxy.no_ipv4),
            preferredPort: port,
            preferredDnsPort: dns_port,
            // An older relay refuses it, and need not hear of it where nobody is named.
            upstreamUsers: (!upstream.users.is_empty())
                .then(|| upstream.users.iter().map(|uid| (*uid).into()).collect()),
        })
    });
    let text = |network: Option<Network>| network.map(|network| network.to_string());
    Configure_Args {
        upstreams: upstreams.collect(),
        fakeIpv4: text(held.fake_addresses.ipv4),
        fakeIpv6: text(held.fake_addresses.ipv6),
    }
}

/// The ports that the relay is to take for a proxy again, for connections and for queries, if it has had any.
fn preferred(ports: &Ports, proxy: &str) -> (Option<i64>, Option<i64>) {
    let (port, dns_port) = ports.get(proxy).copied().unzip();
    let known = |port: Option<u16>| port.filter(|port| *port != 0).map(i64::from);
    (known(port), known(dns_port.flatten()))
}

fn unreachable(socket: &Path, error: &io::Error) -> String {
    let socket = printable(&socket.to_string_lossy());
    match nobody_listens(error) {
        true => format!(
            "no relay listens on {socket}: is cgtproxy-relay.socket running? (systemctl --user start \
             cgtproxy-relay.socket)"
        ),
        false => format!("can't connect to the relay at {socket}: {}", chain(error)),
    }
}

fn lost(error: &CallError) -> String {
    if let CallError::Fault(fault) = error
        && let ErrorKind::TooManyConnections(Some(args)) = fault.kind()
    {
        return format!(
            "the relay serves no more than {} programs at once",
            args.limit
        );
    }
    match error {
        CallError::Fault(_) => format!("the relay refuses: {}", chain(error)),
        error => format!("lost the relay: {}", chain(error)),
    }
}
