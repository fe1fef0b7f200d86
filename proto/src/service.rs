//! The serving side of a Varlink connection. The `varlink` crate's own servers know neither the peer nor a limit,
//! and glue text to the names of errors; this one reads whole messages of bounded length and answers with
//! declared errors only.
//!
//! Parameters go straight from a message's text to a method's types, and replies back, without a tree of JSON values
//! between: a policy names thousands of control groups.

use std::borrow::Cow;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use varlink::{GetInterfaceDescriptionReply, ServiceInfo};

use crate::message::{Budget, MessageReader, ReadError};
use crate::stream::Stream;
use crate::strict::{self, Refused};

/// What a caller is told who may not do something.
const PERMISSION_DENIED: &str = "org.varlink.service.PermissionDenied";

/// What a caller is told who calls a method that there is not.
const METHOD_NOT_FOUND: &str = "org.varlink.service.MethodNotFound";

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

    /// Which error of an interface it is: `K` is the `ErrorKind` that is generated from its description.
    #[must_use]
    pub fn kind<K: for<'a> From<&'a varlink::Reply>>(&self) -> K {
        let parameters = Some(self.parameters.clone());
        K::from(&varlink::Reply::error(self.name.clone(), parameters))
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
        Self {
            name: PERMISSION_DENIED.into(),
            parameters: json!({}),
        }
    }

    /// The message that it is sent as.
    #[must_use]
    pub fn into_message(self) -> String {
        let Self { name, parameters } = self;
        format!("{}\0", json!({ "error": name, "parameters": parameters }))
    }

    /// Whether it is `org.varlink.service.PermissionDenied`.
    #[must_use]
    pub fn is_permission_denied(&self) -> bool {
        self.name == PERMISSION_DENIED
    }

    /// Whether it is `org.varlink.service.MethodNotFound`.
    #[must_use]
    pub fn is_method_not_found(&self) -> bool {
        self.name == METHOD_NOT_FOUND
    }

    /// `org.varlink.service.MethodNotFound`: the interface has no such method.
    #[must_use]
    pub fn method_not_found(method: &str) -> Self {
        Self {
            name: METHOD_NOT_FOUND.into(),
            parameters: json!({ "method": shortened(method) }),
        }
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

/// A method's parameters, as the text of a JSON value; [`parameters`] takes it apart.
#[derive(Debug, Clone, Copy)]
pub struct Parameters<'a>(&'a str);

impl Parameters<'_> {
    /// How many bytes of text they are.
    #[must_use]
    pub fn length(self) -> usize {
        self.0.len()
    }
}

/// What a method replies, as the text of a JSON value; [`reply`] makes one.
#[derive(Debug)]
pub struct Answer(String);

/// One connection's implementation of an interface.
pub trait Service {
    /// Who this is.
    const IDENTITY: Identity;

    /// Carries out a method of the interface, named without the interface's name.
    fn call(
        &mut self,
        method: &str,
        parameters: Parameters<'_>,
    ) -> impl Future<Output = Result<Answer, Fault>>;

    /// What a caller is told who calls a method that the interface has not.
    #[must_use]
    fn no_such_method(method: &str) -> Fault {
        Fault::method_not_found(&format!("{}.{method}", Self::IDENTITY.interface))
    }

    /// What a caller is told whose message is longer than `limit` bytes.
    #[must_use]
    fn message_too_large(limit: usize) -> Fault {
        let limit = json!({ "limit": limit });
        Fault::new(Self::IDENTITY.interface, "MessageTooLarge", limit)
    }

    /// What a caller is told who comes when there are `limit` connections, which are as many as there may be.
    #[must_use]
    fn too_many_connections(limit: usize) -> Fault {
        let limit = json!({ "limit": limit });
        Fault::new(Self::IDENTITY.interface, "TooManyConnections", limit)
    }

    /// What a caller is told whose connections hold more than they may of messages, unfinished or unanswered; see
    /// [`MessageReader::with_budget`].
    fn over_budget(&self) -> Option<Fault> {
        None
    }

    /// Returns when a message of this many bytes, which is here but has not been looked at, may be
    /// dealt with. Nothing more is read from the connection meanwhile. `waited`: it had to be waited for, so that
    /// others have had a turn.
    fn admit(&mut self, _bytes: usize, _waited: bool) -> impl Future<Output = ()> {
        std::future::ready(())
    }
}

/// Takes a method's parameters apart. A method without parameters may be called without any.
///
/// # Errors
/// `InvalidParameter` with the path of the first field that is missing, of a wrong type, or neither the method's nor
/// null.
pub fn parameters<T: DeserializeOwned>(parameters: Parameters<'_>) -> Result<T, Fault> {
    // It is the whole text of one value.
    strict::from_str(parameters.0).map_err(wrong_parameter)
}

/// Insists that a method that has no parameters was given none.
///
/// # Errors
/// As [`parameters`].
pub fn no_parameters(arguments: Parameters<'_>) -> Result<(), Fault> {
    #[derive(Deserialize)]
    struct Nothing {}
    parameters(arguments).map(|Nothing {}| ())
}

fn wrong_parameter(Refused { path, error }: Refused) -> Fault {
    // serde reports a field that is missing or there twice at its parent, with the name in the message alone.
    let message = error.to_string();
    let field = ["missing field `", "duplicate field `"]
        .iter()
        .find_map(|prefix| message.strip_prefix(prefix)?.split('`').next());
    Fault::invalid_parameter(match (field, &*path) {
        (Some(field), "") => field.to_owned(),
        (Some(field), path) => format!("{path}.{field}"),
        (None, "") => "parameters".to_owned(),
        // It has the name of a field that nobody knows.
        (None, path) => shortened(path).to_owned(),
    })
}

/// A method's reply as JSON.
///
/// # Errors
/// None for the generated types; `InvalidParameter` stands in because only declared errors are sent.
pub fn reply<T: Serialize>(reply: T) -> Result<Answer, Fault> {
    serde_json::to_string(&reply)
        .map(Answer)
        .map_err(|_| Fault::invalid_parameter("parameters"))
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
pub async fn serve<R, B, S>(
    messages: &mut MessageReader<R, B>,
    service: &mut S,
) -> Result<(), ServeError>
where
    R: AsyncRead + AsyncWrite + Unpin,
    B: Budget,
    S: Service,
{
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
                    send(messages.stream_mut(), Err(fault)).await?;
                }
                return Err(error.into());
            }
        };
        service.admit(message.len(), messages.waited()).await;
        let call = Call::parse(&message).ok_or(ServeError::Protocol)?;
        let answer = dispatch(service, &call).await;
        if !call.oneway.unwrap_or(false) {
            send(messages.stream_mut(), answer).await?;
        }
    }
}

/// As [`serve`], for one that has just been accepted, with messages of at most `limit` bytes.
///
/// # Errors
/// As [`serve`], and if the runtime can't wait for the connection.
pub async fn serve_stream<S: Service>(
    stream: UnixStream,
    limit: usize,
    service: &mut S,
) -> Result<(), ServeError> {
    let stream = Stream::new(stream).map_err(ReadError::Io)?;
    serve(&mut MessageReader::new(stream, limit), service).await
}

/// A call, as varlink.org's Method-Call page has it. `more` is of no use: no method of ours replies more than once.
#[derive(Deserialize)]
struct Call<'a> {
    #[serde(borrow)]
    method: Cow<'a, str>,
    #[serde(borrow)]
    parameters: Option<&'a RawValue>,
    oneway: Option<bool>,
    upgrade: Option<bool>,
}

impl<'a> Call<'a> {
    /// None if a message is no call, or one that is to turn the connection into something else.
    fn parse(message: &'a [u8]) -> Option<Self> {
        let text = std::str::from_utf8(message.strip_suffix(b"\0")?).ok()?;
        // serde takes a list of a struct's fields, too. JSON has no other white space.
        if !text
            .trim_start_matches([' ', '\t', '\n', '\r'])
            .starts_with('{')
        {
            return None;
        }
        let call: Self = serde_json::from_str(text).ok()?;
        (call.upgrade != Some(true)).then_some(call)
    }
}

/// Writes a reply, or a declared error, in one piece.
async fn send<W: AsyncWrite + Unpin>(
    stream: &mut W,
    answer: Result<Answer, Fault>,
) -> Result<(), ServeError> {
    let written = match answer {
        Ok(Answer(parameters)) => {
            let message = format!("{{\"parameters\":{parameters}}}\0");
            stream.write_all(message.as_bytes()).await
        }
        Err(fault) => send_fault(stream, fault).await,
    };
    written.map_err(ServeError::Write)
}

/// Writes a declared error in one piece, also to whoever has called nothing yet.
///
/// # Errors
/// If it can't be written.
pub async fn send_fault<W: AsyncWrite + Unpin>(
    stream: &mut W,
    fault: Fault,
) -> std::io::Result<()> {
    stream.write_all(fault.into_message().as_bytes()).await
}

async fn dispatch<S: Service>(service: &mut S, call: &Call<'_>) -> Result<Answer, Fault> {
    let parameters = Parameters(call.parameters.map_or("{}", RawValue::get));
    let Some((interface, method)) = call.method.rsplit_once('.') else {
        return Err(Fault::method_not_found(&call.method));
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
        json!({ "interface": shortened(interface) }),
    )
}

/// What is repeated of a name that nobody has: a message may be nothing else.
fn shortened(name: &str) -> &str {
    const MOST: usize = 256;
    let end = (0..=MOST.min(name.len()))
        .rev()
        .find(|&end| name.is_char_boundary(end));
    end.and_then(|end| name.get(..end)).unwrap_or_default()
}

/// The methods of `org.varlink.service`.
fn describe<S: Service>(method: &str, arguments: Parameters<'_>) -> Result<Answer, Fault> {
    /// The parameters of `GetInterfaceDescription`.
    #[derive(Deserialize)]
    struct Interface {
        interface: String,
    }
    let identity = S::IDENTITY;
    match method {
        "GetInfo" => {
            no_parameters(arguments)?;
            reply(ServiceInfo {
                vendor: "cgtproxy".into(),
                product: identity.product.into(),
                version: identity.version.into(),
                url: "https://github.com/black-desk/cgtproxy".into(),
                interfaces: vec!["org.varlink.service".into(), identity.interface.into()],
            })
        }
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

    struct Echo;

    #[derive(Debug, Deserialize)]
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

        async fn call(&mut self, method: &str, arguments: Parameters<'_>) -> Result<Answer, Fault> {
            match method {
                "Say" => {
                    let Args { text, items } = parameters(arguments)?;
                    reply(json!({ "text": text, "items": items }))
                }
                _ => Err(Fault::method_not_found(method)),
            }
        }
    }

    fn with_echo<F: Future>(limit: usize, test: impl FnOnce(Client) -> F) -> F::Output {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .unwrap();
        runtime.block_on(async {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let (ours, theirs) = (Stream::new(ours).unwrap(), Stream::new(theirs).unwrap());
            let served = async move {
                let _ = serve(&mut MessageReader::new(theirs, limit), &mut Echo).await;
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
                (json!(["a", null]), "parameters"),
                (json!("a"), "parameters"),
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

    /// They may be protections of a later interface, or slips of the pen. Interfaces grow by fields that may be null.
    #[test]
    fn refuses_fields_that_a_method_has_not_unless_they_are_null() {
        #[derive(Debug, PartialEq, Deserialize)]
        struct Item {
            name: String,
            port: Option<i64>,
        }
        #[derive(Debug, PartialEq, Deserialize)]
        struct List {
            items: Vec<Item>,
            first: Option<Item>,
            #[serde(default)]
            any: Value,
        }
        let said = |text| parameters::<List>(Parameters(text)).map_err(|fault| fault.parameters);
        for (text, wrong) in [
            (r#"{"items":[],"itens":[]}"#, "itens"),
            (
                r#"{"items":[{"name":"a"},{"nam":1,"name":"a"}]}"#,
                "items[1].nam",
            ),
            (r#"{"items":[],"first":{"name":"a","x":false}}"#, "first.x"),
            (r#"{"items":[],"x":null,"y":"null"}"#, "y"),
        ] {
            assert_eq!(said(text), Err(json!({ "parameter": wrong })), "{text}");
        }
        let item = |port| Item {
            name: "a".into(),
            port,
        };
        let text = r#"{"items":[{"name":"a","x":null},{"port":1,"name":"a","x":null}],"x":null,"any":{"x":1},
            "first":{"name":"a","port":null}}"#;
        let list = List {
            items: vec![item(None), item(Some(1))],
            first: Some(item(None)),
            any: json!({ "x": 1 }),
        };
        assert_eq!(said(text), Ok(list));
        let long = format!(r#"{{"{}":1}}"#, "x".repeat(10_000));
        assert!(said(&long).unwrap_err().to_string().len() < 300);
    }

    #[test]
    fn a_method_without_parameters_takes_none() {
        with_echo(1000, |mut client| async move {
            let call = error(
                &mut client,
                "org.varlink.service.GetInfo",
                json!({ "x": 1 }),
            );
            assert_eq!(call.await.1, json!({ "parameter": "x" }));
        });
    }

    #[test]
    fn names_what_a_name_is_in_that_cannot_be_read() {
        #[derive(Debug, Deserialize)]
        struct List {
            #[allow(dead_code, reason = "it is never read")]
            list: Vec<Args>,
        }
        for (text, parameter) in [
            (r#"{"\ud800":1}"#, "parameters"),
            (r#"{"list":[{"text":"a"},{"\ud800":1}]}"#, "list[1]"),
            (r#"{"list":[{"text":"a","\ud800":1}]}"#, "list[0]"),
        ] {
            let fault = parameters::<List>(Parameters(text)).unwrap_err();
            assert_eq!(fault, Fault::invalid_parameter(parameter), "{text}");
        }
    }

    #[test]
    fn names_the_parameter_that_is_there_twice() {
        let twice = r#"{"text":"a","text":"b"}"#;
        let fault = parameters::<Args>(Parameters(twice)).err().unwrap();
        assert_eq!(fault, Fault::invalid_parameter("text"));
    }

    #[test]
    fn takes_calls_and_nothing_else() {
        let call = |text: &str| {
            let message = [text.as_bytes(), b"\0"].concat();
            Call::parse(&message).map(|call| {
                let parameters = call.parameters.map(|raw| raw.get().to_owned());
                (call.method.into_owned(), parameters)
            })
        };
        let some = |method: &str, parameters: Option<&str>| {
            Some((method.to_owned(), parameters.map(str::to_owned)))
        };
        assert_eq!(call(r#"{"method":"a.\u0062"}"#), some("a.b", None));
        assert_eq!(
            call(r#" {"parameters": {"x" : 1} , "method":"a.b", "more":true,"other":[]}"#),
            some("a.b", Some(r#"{"x" : 1}"#))
        );
        assert_eq!(
            call(r#"{"method":"a.b","parameters":null}"#),
            some("a.b", None)
        );
        for text in [
            "",
            "[]",
            "1",
            "{}",
            r#"["a.b",null,null,null]"#,
            r#"{"method":1}"#,
            r#"{"method":"a.b"} x"#,
            r#"{"method":"a.b","upgrade":true}"#,
            r#"{"method":"a.b","parameters":{]}"#,
        ] {
            assert_eq!(call(text), None, "{text}");
        }
        assert!(Call::parse(b"{\"method\":\"\xff\"}\0").is_none());
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
    fn names_that_are_not_there_are_repeated_in_short() {
        let long = "ä".repeat(1000);
        for method in [
            long.clone(),
            format!("org.example.Echo.{long}"),
            format!("{long}.Say"),
        ] {
            let reply = with_echo(10_000, |mut client| async move {
                error(&mut client, &method, json!({})).await
            });
            assert!(reply.1.to_string().len() < 300, "{reply:?}");
        }
        assert_eq!(shortened(""), "");
        assert_eq!(shortened(&"x".repeat(256)).len(), 256);
        assert_eq!(shortened(&"x".repeat(257)).len(), 256);
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
                ("org.example.Echo.MessageTooLarge", json!({ "limit": 100 }))
            );
        });
    }
}
