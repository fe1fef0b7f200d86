//! The calling side of a Varlink connection.

use std::borrow::Cow;
use std::io;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use crate::limits::MESSAGE_BYTES;
use crate::message::{MessageReader, ReadError};
use crate::service::Fault;
use crate::stream::Stream;

/// Replies may be longer than calls: a status lists every control group.
const REPLY_BYTES: usize = 16 * MESSAGE_BYTES;

/// Why a call gave no reply.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The other side answered with this error.
    #[error("{}{}", .0.name, details(&.0.parameters))]
    Fault(Fault),
    /// The connection is closed.
    #[error("the connection was closed")]
    Closed,
    /// The connection broke.
    #[error("the connection broke")]
    Io(#[source] io::Error),
    /// The arguments are none that a call can have.
    #[error("can't write the call")]
    Arguments(#[source] serde_json::Error),
    /// What came back is not a reply of this method.
    #[error("the reply is not one of this method")]
    Protocol(#[source] Option<serde_json::Error>),
    /// What came back is longer than any reply.
    #[error("the reply has more than {0} bytes")]
    TooLarge(usize),
}

/// A fault's parameters for a person: ` (name: value, …)`.
fn details(parameters: &Value) -> String {
    match parameters.as_object() {
        Some(fields) if !fields.is_empty() => {
            let fields: Vec<_> = fields
                .iter()
                .map(|(name, value)| format!("{name}: {value}"))
                .collect();
            format!(" ({})", fields.join(", "))
        }
        _ => String::new(),
    }
}

/// A connection on which methods are called, one at a time.
#[derive(Debug)]
pub struct Client {
    messages: MessageReader<Stream>,
}

impl Client {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// As connect(2), and if the runtime can't wait for the socket.
    pub async fn connect(path: &Path) -> io::Result<Self> {
        let stream = Stream::new(UnixStream::connect(path).await?)?;
        Ok(Self::over(stream))
    }

    /// Calls methods over an open connection.
    #[must_use]
    pub fn over(stream: Stream) -> Self {
        Self {
            messages: MessageReader::new(stream, REPLY_BYTES),
        }
    }

    /// Calls a method by its full name and waits for its reply. Not cancel safe: a connection
    /// whose call was given up must be closed.
    ///
    /// # Errors
    /// If the other side refuses, or the connection fails.
    pub async fn call<A: Serialize, R: DeserializeOwned>(
        &mut self,
        method: &str,
        arguments: A,
    ) -> Result<R, CallError> {
        let call = Call {
            method,
            parameters: arguments,
        };
        let mut message = serde_json::to_vec(&call).map_err(CallError::Arguments)?;
        message.push(0);
        // A peer that refuses a message does so before it has read all of it, and closes:
        // what it said is still there to be read.
        if let Err(error) = self.messages.stream_mut().write_all(&message).await
            && !matches!(
                error.kind(),
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
            )
        {
            return Err(CallError::Io(error));
        }
        drop(message);
        let message = match self.messages.next().await {
            Ok(Some(message)) => message,
            Ok(None) => return Err(CallError::Closed),
            Err(ReadError::Io(error)) => return Err(CallError::Io(error)),
            Err(ReadError::TooLarge(limit)) => return Err(CallError::TooLarge(limit)),
            // There is no budget.
            Err(ReadError::OverBudget) => return Err(CallError::Protocol(None)),
        };
        answer(&message)
    }

    /// Returns when the other side closes the connection. To be used between calls only.
    pub async fn closed(&mut self) {
        while let Ok(Some(_)) = self.messages.next().await {}
    }
}

/// A call, as varlink.org's Method-Call page has it.
#[derive(Serialize)]
struct Call<'a, A> {
    method: &'a str,
    parameters: A,
}

/// What comes back.
#[derive(Deserialize)]
struct Reply<'a> {
    #[serde(borrow)]
    error: Option<Cow<'a, str>>,
    #[serde(borrow)]
    parameters: Option<&'a RawValue>,
}

fn answer<R: DeserializeOwned>(message: &[u8]) -> Result<R, CallError> {
    let text = message
        .strip_suffix(b"\0")
        .and_then(|text| std::str::from_utf8(text).ok())
        .ok_or(CallError::Protocol(None))?;
    let not_one = |error| CallError::Protocol(Some(error));
    let reply: Reply<'_> = serde_json::from_str(text).map_err(not_one)?;
    let parameters = reply.parameters.map_or("{}", RawValue::get);
    let Some(name) = reply.error else {
        return serde_json::from_str(parameters).map_err(not_one);
    };
    Err(CallError::Fault(Fault {
        name: name.into_owned().into(),
        parameters: serde_json::from_str(parameters).map_err(not_one)?,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::chain;

    #[test]
    fn says_why_a_reply_is_none() {
        for (reply, why) in [
            ("{", "EOF while parsing"),
            (r#"{"parameters":{"a":"b"}}"#, "missing field `number`"),
            (r#"{"error":"a.b","parameters":[}"#, "expected value"),
            ("\u{0}", "expected value"),
        ] {
            #[derive(Debug, Deserialize)]
            struct Number {
                #[expect(dead_code, reason = "it is not there")]
                number: u32,
            }
            let error = answer::<Number>(format!("{reply}\0").as_bytes()).unwrap_err();
            let error = chain(&error);
            assert!(
                error.starts_with("the reply is not one of this method: "),
                "{error}"
            );
            assert!(error.contains(why), "{error}");
        }
    }
}
