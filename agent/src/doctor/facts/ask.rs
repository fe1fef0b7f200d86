//! What the helper, the agent and the configuration file say.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::Duration;

use cgtproxy_proto::agent::{
    ErrorKind as AgentErrorKind, GetStatus_Args as AgentArgs, GetStatus_Reply as AgentStatus,
};
use cgtproxy_proto::client::{CallError, Client};
use cgtproxy_proto::helper::{
    self as wire, Diagnose_Args, Diagnose_Reply, GetStatus_Args, GetStatus_Reply,
};
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use super::{Agent, ConfigState, Dns, Helper, Here, Proxy, Server};
use crate::config::{self, ConfigFile, LoadError, Scope};
use crate::connection::{ConnectError, Connection, is_roots};
use crate::doctor::Look;
use crate::text::chain;

/// A daemon that has not answered by then does not.
const PATIENCE: Duration = Duration::from_secs(5);

/// Calls a method of the helper's. None if there is no answer in time.
async fn call<T: DeserializeOwned>(
    client: &mut Client,
    method: &str,
    arguments: impl serde::Serialize,
) -> Option<Result<T, CallError>> {
    let method = format!("{}.{method}", wire::INTERFACE);
    timeout(PATIENCE, client.call(&method, arguments))
        .await
        .ok()
}

/// Asks the helper for its state, and for what it sees of the machine.
pub(crate) async fn ask_helper(socket: &Path) -> Helper {
    let (mut client, status) = match ask_status(socket).await {
        Ok(answer) => answer,
        Err(problem) => return problem,
    };
    let diagnosis: Look<Diagnose_Reply> =
        match call(&mut client, "Diagnose", Diagnose_Args {}).await {
            Some(diagnosis) => diagnosis.map_err(|error| chain(&error)),
            None => Err(no_answer()),
        };
    Helper::Answers(Box::new(status), diagnosis)
}

/// What the helper says of its state and of this user, if it can be asked.
pub(crate) async fn helper_status(socket: &Path) -> Option<GetStatus_Reply> {
    ask_status(socket).await.ok().map(|(_, status)| status)
}

/// A connection to the helper and its state, or why there is none.
async fn ask_status(socket: &Path) -> Result<(Client, GetStatus_Reply), Helper> {
    let mut client = match timeout(PATIENCE, Client::connect(socket)).await {
        Ok(Ok(client)) => client,
        Ok(Err(error)) => {
            return Err(match error.kind() {
                io::ErrorKind::NotFound => Helper::Missing,
                io::ErrorKind::ConnectionRefused => Helper::Dead,
                io::ErrorKind::PermissionDenied => Helper::Forbidden {
                    // stat(2) needs no permission for the socket itself, only for the directories on the way.
                    in_sight: socket.metadata().is_ok(),
                },
                _ => Helper::Unreachable(chain(&error)),
            });
        }
        Err(_) => return Err(Helper::Unreachable(no_answer())),
    };
    match call(&mut client, "GetStatus", GetStatus_Args {}).await {
        Some(Ok(status)) => Ok((client, status)),
        Some(Err(CallError::Fault(fault))) => {
            let text = chain(&CallError::Fault(fault.clone()));
            Err(Helper::Refuses(fault.name.into_owned(), text))
        }
        Some(Err(error)) => Err(Helper::Unreachable(chain(&error))),
        None => Err(Helper::Unreachable(no_answer())),
    }
}

/// Asks the agent for its state.
pub(crate) async fn ask_agent(socket: &Path, scope: Scope) -> Agent {
    let mut connection = match timeout(PATIENCE, Connection::open(socket.to_owned())).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(ConnectError::NotRunning)) => return Agent::NotRunning,
        Ok(Err(ConnectError::Failed { source, .. })) if is_roots(scope, &source) => {
            return Agent::Roots;
        }
        Ok(Err(ConnectError::Failed { source, .. })) => return Agent::Unreachable(chain(&source)),
        Err(_) => return Agent::Unreachable(no_answer()),
    };
    let call = connection.call::<_, AgentStatus>("GetStatus", AgentArgs {});
    match timeout(PATIENCE, call).await {
        Ok(Ok(status)) => Agent::Answers(Box::new(status)),
        Ok(Err(error)) => match full(&error) {
            Some(limit) => Agent::Full(limit),
            None => Agent::Unreachable(chain(&error)),
        },
        Err(_) => Agent::Unreachable(no_answer()),
    }
}

/// How many programs the agent serves at once, if that is why it does not answer.
fn full(error: &CallError) -> Option<i64> {
    match error {
        CallError::Fault(fault) => match fault.kind() {
            AgentErrorKind::TooManyConnections(Some(args)) => Some(args.limit),
            _ => None,
        },
        _ => None,
    }
}

fn no_answer() -> String {
    format!("no answer within {} seconds", PATIENCE.as_secs())
}

/// Reads the configuration file: what it is, and its `gateway`.
pub(crate) fn read_config(file: &ConfigFile) -> (ConfigState, Option<config::Gateway>) {
    match config::load(&file.path, file.scope) {
        Ok(loaded) => {
            let proxies = loaded.config.proxies.iter().map(configured).collect();
            (ConfigState::Read(proxies), loaded.config.gateway)
        }
        Err(LoadError::Missing(_)) if !file.explicit => (ConfigState::Missing, None),
        Err(error) => (ConfigState::Wrong(chain(&error)), None),
    }
}

fn configured(proxy: &config::Proxy) -> Proxy {
    Proxy {
        name: proxy.name.as_str().to_owned(),
        server: match proxy.means {
            config::Means::Tproxy(port) => Server::Tproxy(port.get()),
            config::Means::Redirect(port) => Server::Redirect(port.get()),
            config::Means::Relay {
                fake_dns,
                ref upstream,
            } => Server::Relay {
                fake_dns,
                here: here(upstream),
                users: upstream.users.clone(),
            },
        },
        tcp: !proxy.no_tcp,
        udp: !proxy.no_udp,
        ipv4: !proxy.no_ipv4,
        ipv6: !proxy.no_ipv6,
        dns: proxy.dns_hijack.as_ref().map(|dns| Dns {
            ipv4: dns.ipv4,
            ipv6: dns.ipv6,
            port: dns.port.get(),
            tcp: dns.tcp,
        }),
    }
}

/// Where an upstream is, if that is at a loopback address.
fn here(upstream: &config::Upstream) -> Option<Here> {
    let (ipv4, ipv6) = match upstream.host.trim_end_matches('.') {
        "localhost" => (Some(Ipv4Addr::LOCALHOST), Some(Ipv6Addr::LOCALHOST)),
        host => match host.parse().ok()? {
            IpAddr::V4(address) => (Some(address), None),
            IpAddr::V6(address) => (None, Some(address)),
        },
    };
    let port = upstream.port.get();
    let is_here = ipv4.is_none_or(|a| a.is_loopback()) && ipv6.is_none_or(|a| a.is_loopback());
    is_here.then_some(Here { ipv4, ipv6, port })
}

/// A TPROXY server of the policy that the helper holds; none if it is another: whether it is the relay, only the
/// configuration says.
pub(super) fn in_force(proxy: &wire::Proxy) -> Option<Proxy> {
    if proxy.redirect == Some(true) {
        return None;
    }
    let dns = proxy.dnsHijack.as_ref().and_then(|dns| {
        Some(Dns {
            ipv4: dns.ipv4.as_deref().and_then(|ip| ip.parse().ok()),
            ipv6: dns.ipv6.as_deref().and_then(|ip| ip.parse().ok()),
            port: dns.port.try_into().ok()?,
            tcp: dns.tcp.unwrap_or(false),
        })
    });
    Some(Proxy {
        name: proxy.name.clone(),
        server: Server::Tproxy(proxy.port.try_into().ok()?),
        tcp: !proxy.noTcp.unwrap_or(false),
        udp: !proxy.noUdp.unwrap_or(false),
        ipv4: !proxy.noIpv4.unwrap_or(false),
        ipv6: !proxy.noIpv6.unwrap_or(false),
        dns,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_which_upstreams_are_here() {
        let here = |text: &str| here(&text.parse().unwrap());
        let at = |ipv4: Option<&str>, ipv6: Option<&str>, port| {
            let ipv4 = ipv4.map(|address| address.parse().unwrap());
            let ipv6 = ipv6.map(|address| address.parse().unwrap());
            Some(Here { ipv4, ipv6, port })
        };
        for (upstream, is) in [
            ("socks5://127.0.0.1", at(Some("127.0.0.1"), None, 1080)),
            ("http://127.3.2.1:8", at(Some("127.3.2.1"), None, 8)),
            ("socks5h://[::1]:9", at(None, Some("::1"), 9)),
            ("http://localhost:8", at(Some("127.0.0.1"), Some("::1"), 8)),
            ("http://localhost.:8", at(Some("127.0.0.1"), Some("::1"), 8)),
            ("http://192.0.2.1:8", None),
            ("http://[2001:db8::1]:8", None),
            ("http://proxy.example:8", None),
        ] {
            assert_eq!(here(upstream), is, "{upstream}");
        }
    }
}
