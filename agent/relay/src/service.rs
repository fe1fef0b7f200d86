//! Serves `org.cgtproxy.Relay` to the user's agent.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use cgtproxy_proto::limits::MESSAGE_BYTES;
use cgtproxy_proto::relay::{
    self as wire, Configure_Args, Configure_Reply, GetStatus_Reply, Listener, UpstreamStatus,
};
use cgtproxy_proto::service::{
    Answer, Fault, Identity, Parameters, Service, no_parameters, parameters, reply,
};
use cgtproxy_proto::socket::Socket;
use serde_json::json;
use tokio::sync::Notify;

use crate::entry::Wanted;
use crate::fake::{LeftOut, Networks};
use crate::relay::Relay;
use crate::socks::{Credentials, FIELD_BYTES};
use crate::upstream::{Protocol, Upstream};

/// How long the relay goes on without anybody who has configured it: longer than the helper keeps the
/// policy of an agent that is gone.
pub(crate) const LINGER: Duration = Duration::from_secs(30);

/// How many programs may be connected at once.
const CONNECTIONS: usize = 16;

/// Who is connected.
#[derive(Default)]
struct Agents {
    /// How many connections have configured the relay.
    count: Cell<usize>,
    changed: Notify,
}

/// Serves until nobody has wanted the relay for `linger`. To be run within a `LocalSet`.
pub(crate) async fn run(socket: &Socket, relay: &Rc<Relay>, linger: Duration) {
    let agents = Rc::new(Agents::default());
    let connection = || Connection {
        relay: relay.clone(),
        agents: agents.clone(),
        counted: false,
    };
    tokio::select! {
        () = socket.serve(CONNECTIONS, MESSAGE_BYTES, connection) => {}
        () = idle(&agents, linger) => tracing::info!("no agent needs the relay any more"),
    }
}

/// Returns when there has been no agent for a while.
async fn idle(agents: &Agents, linger: Duration) {
    loop {
        if agents.count.get() > 0 {
            agents.changed.notified().await;
            continue;
        }
        tokio::select! {
            () = agents.changed.notified() => {}
            () = tokio::time::sleep(linger) => return,
        }
    }
}

struct Connection {
    relay: Rc<Relay>,
    agents: Rc<Agents>,
    /// It has configured the relay.
    counted: bool,
}

impl Drop for Connection {
    fn drop(&mut self) {
        if self.counted {
            self.agents
                .count
                .set(self.agents.count.get().saturating_sub(1));
            self.agents.changed.notify_one();
        }
    }
}

impl Connection {
    fn configure(&mut self, arguments: Configure_Args) -> Result<Configure_Reply, Fault> {
        let networks =
            Networks::parse(arguments.fakeIpv4.as_deref(), arguments.fakeIpv6.as_deref())
                .map_err(Fault::invalid_parameter)?;
        let mut names = BTreeSet::new();
        let mut wanted = Vec::new();
        for (index, upstream) in arguments.upstreams.into_iter().enumerate() {
            if !names.insert(upstream.name.clone()) {
                let parameters = json!({ "name": upstream.name });
                return Err(Fault::new(wire::INTERFACE, "UpstreamExists", parameters));
            }
            let wanted_one = self::wanted(upstream);
            let invalid = |field| Fault::invalid_parameter(format!("upstreams[{index}].{field}"));
            wanted.push(wanted_one.map_err(invalid)?);
        }
        let ports = self.relay.configure(wanted).map_err(|error| {
            let parameters = json!({ "message": error.to_string() });
            Fault::new(wire::INTERFACE, "CannotListen", parameters)
        })?;
        self.relay
            .shared()
            .fakes
            .borrow_mut()
            .set_networks(networks);
        if !self.counted {
            self.counted = true;
            self.agents.count.set(self.agents.count.get() + 1);
            self.agents.changed.notify_one();
        }
        let listener = |ports: crate::relay::Ports| Listener {
            name: ports.name,
            port: ports.port.into(),
            dnsPort: ports.dns_port.map(Into::into),
        };
        Ok(Configure_Reply {
            listeners: ports.into_iter().map(listener).collect(),
        })
    }

    fn get_status(&self) -> GetStatus_Reply {
        let status = |report: crate::entry::Report| UpstreamStatus {
            name: report.name,
            port: report.port.into(),
            connections: number(report.open),
            flows: number(report.flows),
            total: i64::try_from(report.total).unwrap_or(i64::MAX),
            problem: report.problem,
            udpProblem: report.udp_problem,
        };
        GetStatus_Reply {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            limit: number(self.relay.shared().limit),
            upstreams: self.relay.reports().into_iter().map(status).collect(),
        }
    }
}

/// What was asked for; the name of the field that is wrong otherwise.
fn wanted(upstream: wire::Upstream) -> Result<Wanted, &'static str> {
    let port = |number: i64, field| match u16::try_from(number) {
        Ok(port) if port != 0 => Ok(port),
        _ => Err(field),
    };
    let protocol = match upstream.protocol {
        wire::Protocol::socks5 => Protocol::Socks5,
        wire::Protocol::http => Protocol::Http,
        wire::Protocol::https => Protocol::Https,
    };
    let fits = |text: &str| !text.is_empty() && text.len() <= FIELD_BYTES;
    let credentials = match (upstream.user, upstream.password) {
        (None, None) => None,
        (Some(user), _) if !fits(&user) => return Err("user"),
        (Some(user), Some(password)) if fits(&password) => Some(Credentials { user, password }),
        _ => return Err("password"),
    };
    if upstream.host.is_empty() {
        return Err("host");
    }
    let preferred =
        |number: Option<i64>, field| number.map(|number| port(number, field)).transpose();
    let preferred_port = preferred(upstream.preferredPort, "preferredPort")?;
    let preferred_dns_port = preferred(upstream.preferredDnsPort, "preferredDnsPort")?;
    let users = upstream.upstreamUsers.unwrap_or_default().into_iter();
    let users: Result<_, _> = users.map(u32::try_from).collect();
    let users = users.map_err(|_| "upstreamUsers")?;
    Ok(Wanted {
        upstream: Upstream::new(
            upstream.name,
            protocol,
            upstream.host,
            port(upstream.port, "port")?,
            credentials,
        )
        .of_users(users),
        fake_dns: upstream.fakeDns,
        left_out: LeftOut {
            ipv4: upstream.noIpv4.unwrap_or(false),
            ipv6: upstream.noIpv6.unwrap_or(false),
        },
        preferred_port,
        preferred_dns_port,
    })
}

impl Service for Connection {
    const IDENTITY: Identity = Identity {
        product: "cgtproxy-relay",
        version: env!("CARGO_PKG_VERSION"),
        interface: wire::INTERFACE,
        description: wire::DESCRIPTION,
    };

    fn call(
        &mut self,
        method: &str,
        arguments: Parameters<'_>,
    ) -> impl Future<Output = Result<Answer, Fault>> {
        std::future::ready(match method {
            "Configure" => parameters(arguments)
                .and_then(|arguments| self.configure(arguments))
                .and_then(reply),
            "GetStatus" => no_parameters(arguments).and_then(|()| reply(self.get_status())),
            _ => Err(Self::no_such_method(method)),
        })
    }
}

/// Varlink's integers are signed.
fn number(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
