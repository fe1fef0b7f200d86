//! The serving side of a Varlink connection, over the `varlink` crate's sans-io state machine. The crate's own
//! servers know neither the peer nor a limit, and glue text to the names of errors; this one reads
//! whole messages of bounded length and answers with declared errors only.

use std::borrow::Cow;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use varlink::sansio::{Server, ServerEvent};
use varlink::{GetInterfaceDescriptionReply, Reply, Request, ServiceInfo};

use crate::message::{Budget, MessageReader, ReadError};

/// A declared error, as it is sent to the caller.
#[derive(Debug, Clone, PartialEq)]
pub struct Fault {
    /// The error's full name.
    pub name: Cow<'static, str>,
    /// Its parameters, an object.
    pub parameters: Value,
}

impl Fault {
    /// An error of `interface` with these parameters.
    #[must_use]
    pub fn new(interface: &str, error: &str, parameters: Value) -> Self {
        Self {
            name: format!("{interface}.{error}").into(),
            parameters,
        }
    }

    /// `org.varlink.service.InvalidParameter`: a field has a value that it can't have.
    #[must_use]
    pub fn invalid_parameter(parameter: impl Into<String>) -> Self {
        Self::new(
            "org.varlink.service",
            "InvalidParameter",
            json!({ "parameter": parameter.into() }),
        )
    }

    /// `org.varlink.service.PermissionDenied`: the caller may not do this.
    #[must_use]
    pub fn permission_denied() -> Self {
        Self::new("org.varlink.service", "PermissionDenied", json!({}))
    }

    /// `org.varlink.service.MethodNotFound`: the interface has no such method.
    #[must_use]
    pub fn method_not_found(method: &str) -> Self {
        Self::new(
            "org.varlink.service",
            "MethodNotFound",
            json!({ "method": method }),
        )
    }
}

/// Who a service says it is, through `org.varlink.service.GetInfo`.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    /// The name of the program.
    pub product: &'static str,
    /// Its version.
    pub version: &'static str,
    /// Its interface's name.
    pub interface: &'static str,
    /// Its interface's description.
    pub description: &'static str,
}

/// One connection's implementation of an interface.
pub trait Service {
    /// Who this is.
    const IDENTITY: Identity;

    /// Carries out a method of the interface, named without the interface's name.
    fn call(
        &mut self,
        method: &str,
        parameters: Value,
    ) -> impl Future<Output = Result<Value, Fault>>;

    /// What a caller is told whose message is longer than `limit` bytes.
    fn message_too_large(limit: usize) -> Fault;

    /// What a caller is told whose connections hold more of unfinished messages than they may; see
    /// [`MessageReader::with_budget`].
    fn over_budget(&self) -> Option<Fault> {
        None
    }

    /// Returns when a message of this many bytes, which is here but has not been looked at, may be
    /// dealt with. Nothing more is read from the connection meanwhile.
    fn admit(&mut self, _bytes: usize) -> impl Future<Output = ()> {
        std::future::ready(())
    }
}

/// Takes a method's parameters apart. A method without parameters may be called without any.
///
/// # Errors
/// `InvalidParameter` with the path of the first field that is missing or of a wrong type.
pub fn parameters<T: DeserializeOwned>(parameters: Value) -> Result<T, Fault> {
    serde_path_to_error::deserialize(parameters).map_err(|error| {
        let mut path = error.path().to_string();
        // serde reports a missing field at its parent, with the name in the message alone.
        let message = error.inner().to_string();
        if let Some(field) = message
            .strip_prefix("missing field `")
            .and_then(|m| m.split('`').next())
        {
            path = if path == "." {
                field.to_owned()
            } else {
                format!("{path}.{field}")
            };
        }
        Fault::invalid_parameter(path)
    })
}

/// A method's reply as JSON.
///
/// # Errors
/// None for the generated types; `InvalidParameter` stands in because only declared errors are sent.
pub fn reply<T: Serialize>(reply: T) -> Result<Value, Fault> {
    serde_json::to_value(reply).map_err(|_| Fault::invalid_parameter("parameters"))
}

/// Why serving a connection ended early.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A message could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A reply could not be written.
    #[error("can't write a reply")]
    Write(#[source] std::io::Error),
    /// The peer sent something that is not a Varlink call.
    #[error("the peer sent something that is not a Varlink call")]
    Protocol,
}

/// Serves one connection until the peer closes it.
///
/// # Errors
/// If the peer breaks the protocol or a limit, or the connection fails. The connection is of no
/// use after that.
pub async fn serve<R, B, W, S>(
    messages: &mut MessageReader<R, B>,
    stream: &mut W,
    service: &mut S,
) -> Result<(), ServeError>
where
    R: AsyncRead + Unpin,
    B: Budget,
    W: AsyncWrite + Unpin,
    S: Service,
{
    let mut server = Server::new();
    loop {
        let message = match messages.next().await {
            Ok(Some(message)) => message,
            Ok(None) => return Ok(()),
            Err(error) => {
                let fault = match error {
                    ReadError::TooLarge(limit) => Some(S::message_too_large(limit)),
                    ReadError::OverBudget => service.over_budget(),
                    ReadError::Io(_) => None,
                };
                if let Some(fault) = fault {
                    let refusal = Reply::error(fault.name, Some(fault.parameters));
                    if server.send_reply(refusal).is_ok() {
                        flush(&mut server, stream).await?;
                    }
                }
                return Err(error.into());
            }
        };
        service.admit(message.len()).await;
        server
            .handle_input(&message)
            .map_err(|_| ServeError::Protocol)?;
        drop(message);
        while let Some(event) = server.poll_event() {
            let ServerEvent::Request { request } = event else {
                return Err(ServeError::Protocol);
            };
            let oneway = request.oneway.unwrap_or(false);
            let answer = dispatch(service, request).await;
            if oneway {
                continue;
            }
            let reply = match answer {
                Ok(parameters) => Reply::parameters(Some(parameters)),
                Err(fault) => Reply::error(fault.name, Some(fault.parameters)),
            };
            server.send_reply(reply).map_err(|_| ServeError::Protocol)?;
            flush(&mut server, stream).await?;
        }
    }
}

async fn flush<W: AsyncWrite + Unpin>(
    server: &mut Server,
    stream: &mut W,
) -> Result<(), ServeError> {
    while let Some(transmit) = server.poll_transmit() {
        stream
            .write_all(&transmit.payload)
            .await
            .map_err(ServeError::Write)?;
    }
    Ok(())
}

async fn dispatch<S: Service>(service: &mut S, request: Request<'static>) -> Result<Value, Fault> {
    let parameters = request.parameters.unwrap_or_else(|| json!({}));
    let Some((interface, method)) = request.method.rsplit_once('.') else {
        return Err(Fault::method_not_found(&request.method));
    };
    match interface {
        "org.varlink.service" => describe::<S>(method, parameters),
        _ if interface == S::IDENTITY.interface => service.call(method, parameters).await,
        _ => Err(interface_not_found(interface)),
    }
}

fn interface_not_found(interface: &str) -> Fault {
    Fault::new(
        "org.varlink.service",
        "InterfaceNotFound",
        json!({ "interface": interface }),
    )
}

/// The methods of `org.varlink.service`.
fn describe<S: Service>(method: &str, arguments: Value) -> Result<Value, Fault> {
    /// The parameters of `GetInterfaceDescription`.
    #[derive(serde::Deserialize)]
    struct Interface {
        interface: String,
    }
    let identity = S::IDENTITY;
    match method {
        "GetInfo" => reply(ServiceInfo {
            vendor: "cgtproxy".into(),
            product: identity.product.into(),
            version: identity.version.into(),
            url: "https://github.com/black-desk/cgtproxy".into(),
            interfaces: vec!["org.varlink.service".into(), identity.interface.into()],
        }),
        "GetInterfaceDescription" => {
            let Interface { interface } = parameters(arguments)?;
            let description = match &*interface {
                "org.varlink.service" => SERVICE_DESCRIPTION,
                _ if interface == identity.interface => identity.description,
                _ => return Err(interface_not_found(&interface)),
            };
            reply(GetInterfaceDescriptionReply {
                description: Some(description.to_owned()),
            })
        }
        _ => Err(Fault::method_not_found(&format!(
            "org.varlink.service.{method}"
        ))),
    }
}

/// `org.varlink.service` as varlink.org's Service page defines it.
const SERVICE_DESCRIPTION: &str = include_str!("org.varlink.service.varlink");

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::{CallError, Client};
    use serde::Deserialize;
    use tokio::net::UnixStream;

    struct Echo;

    #[derive(Deserialize)]
    struct Args {
        text: String,
        items: Option<Vec<u8>>,
    }

    impl Service for Echo {
        const IDENTITY: Identity = Identity {
            product: "echo",
            version: "1",
            interface: "org.example.Echo",
            description: "interface org.example.Echo\n",
        };

        async fn call(&mut self, method: &str, arguments: Value) -> Result<Value, Fault> {
            match method {
                "Say" => {
                    let Args { text, items } = parameters(arguments)?;
                    reply(json!({ "text": text, "items": items }))
                }
                _ => Err(Fault::method_not_found(method)),
            }
        }

        fn message_too_large(limit: usize) -> Fault {
            Fault::new("org.example.Echo", "TooLarge", json!({ "limit": limit }))
        }
    }

    fn with_echo<F: Future>(limit: usize, test: impl FnOnce(Client) -> F) -> F::Output {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .unwrap();
        runtime.block_on(async {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let (read, mut write) = theirs.into_split();
            let served = async move {
                let _ = serve(&mut MessageReader::new(read, limit), &mut write, &mut Echo).await;
            };
            let (output, ()) = tokio::join!(test(Client::over(ours)), served);
            output
        })
    }

    async fn error(client: &mut Client, method: &str, parameters: Value) -> (String, Value) {
        match client.call::<_, Value>(method, parameters).await {
            Err(CallError::Fault(fault)) => (fault.name.into_owned(), fault.parameters),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn calls_a_method() {
        with_echo(1000, |mut client| async move {
            let said: Value = client
                .call("org.example.Echo.Say", json!({ "text": "a" }))
                .await
                .unwrap();
            assert_eq!(said, json!({ "text": "a", "items": null }));
        });
    }

    #[test]
    fn names_the_parameter_that_is_wrong() {
        with_echo(1000, |mut client| async move {
            for (sent, parameter) in [
                (json!({ "text": "a", "items": [1, 2, "x"] }), "items[2]"),
                (json!({ "text": 1 }), "text"),
                (json!({}), "text"),
            ] {
                assert_eq!(
                    error(&mut client, "org.example.Echo.Say", sent).await,
                    (
                        "org.varlink.service.InvalidParameter".into(),
                        json!({ "parameter": parameter })
                    ),
                );
            }
        });
    }

    #[test]
    fn answers_with_declared_errors_only() {
        with_echo(1000, |mut client| async move {
            for (method, name) in [
                (
                    "org.example.Echo.Nothing",
                    "org.varlink.service.MethodNotFound",
                ),
                (
                    "org.example.Other.Say",
                    "org.varlink.service.InterfaceNotFound",
                ),
                (
                    "org.varlink.service.Nothing",
                    "org.varlink.service.MethodNotFound",
                ),
                ("nothing", "org.varlink.service.MethodNotFound"),
            ] {
                assert_eq!(
                    error(&mut client, method, json!({})).await.0,
                    name,
                    "{method}"
                );
            }
        });
    }

    #[test]
    fn describes_itself() {
        with_echo(1000, |mut client| async move {
            let info: Value = client
                .call("org.varlink.service.GetInfo", json!({}))
                .await
                .unwrap();
            assert_eq!(
                info["interfaces"],
                json!(["org.varlink.service", "org.example.Echo"])
            );
            let text: Value = client
                .call(
                    "org.varlink.service.GetInterfaceDescription",
                    json!({ "interface": "org.example.Echo" }),
                )
                .await
                .unwrap();
            assert_eq!(text["description"], "interface org.example.Echo\n");
        });
    }

    #[test]
    fn refuses_a_message_that_is_too_long_by_name() {
        with_echo(100, |mut client| async move {
            let (name, parameters) = error(
                &mut client,
                "org.example.Echo.Say",
                json!({ "text": "x".repeat(200) }),
            )
            .await;
            assert_eq!(
                (&*name, parameters),
                ("org.example.Echo.TooLarge", json!({ "limit": 100 }))
            );
        });
    }
}
