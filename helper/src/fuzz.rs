//! What comes from outside, as bytes: each function takes any, and must neither panic nor break what it asserts.
//! libFuzzer runs them (tests/fuzz), and so does every `cargo test`, over the corpus and variations of it.

#![allow(clippy::expect_used, clippy::missing_panics_doc, clippy::panic)]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;

use cgtproxy_proto::helper::DESCRIPTION;
use cgtproxy_proto::limits::MESSAGE_BYTES;
use cgtproxy_proto::message::MessageReader;
use cgtproxy_proto::path::ControlGroupPath;
use cgtproxy_proto::service::serve;
use serde_json::Value;

use crate::config::{Config, OnAgentLoss};
use crate::kernel::model::{Bed, Model};
use crate::netlink::{Messages, attribute, attributes, string};
use crate::peer::{Account, Peer, Uid};
use crate::quota::Quotas;
use crate::session::Session;
use crate::snapshot::Snapshot;
use crate::state::{ConnectionId, Holder, Outcome, State};

/// What the kernel answers and announces.
pub fn netlink(bytes: &[u8]) {
    for message in Messages(bytes) {
        if let Some(refusal) = message.refusal() {
            assert!(!refusal.to_string().is_empty());
        }
        for found in attributes(message.payload) {
            let _ = attribute(message.payload, found.kind()).map(string);
        }
        if let Some((_, _, attributes)) = message.netfilter() {
            crate::conntrack::fuzz(attributes);
            crate::nft::fuzz(attributes);
        }
    }
}

/// The administrator's configuration.
pub fn configuration(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    if let Err(error) = Config::parse(text, Path::new("helper.yaml")) {
        assert!(error.to_string().contains("helper.yaml"), "{error}");
    }
}

/// The path of a control group, as a message and as the file system has it.
pub fn path(bytes: &[u8]) {
    if let Ok(path) = ControlGroupPath::from_bytes(bytes) {
        assert_eq!(
            ControlGroupPath::from_wire(&path.to_wire()).as_ref(),
            Ok(&path)
        );
    }
    let Ok(path) = ControlGroupPath::from_wire(&String::from_utf8_lossy(bytes)) else {
        return;
    };
    assert!(!path.as_bytes().starts_with(b"/") && !path.as_bytes().contains(&0));
    for component in path.components() {
        assert!(!matches!(component, b"" | b"." | b".."));
    }
    assert_eq!(
        ControlGroupPath::from_bytes(path.as_bytes()).as_ref(),
        Ok(&path)
    );
    match (path.parent(), path.name()) {
        (Some(parent), Some(name)) => assert_eq!(parent.join(name).as_ref(), Ok(&path)),
        (parent, name) => assert_eq!((parent, name), (None, None)),
    }
}

/// What an earlier helper wrote down.
pub fn snapshot(bytes: &[u8]) {
    crate::snapshot::fuzz(bytes);
}

thread_local! {
    static BED: Bed = Bed::new().expect("a directory");
}

/// An agent that comes, takes over what is there, and goes.
const NOTHING: &[u8] = b"\
    {\"method\":\"org.cgtproxy.Helper.ReplacePolicy\",\
    \"parameters\":{\"proxies\":[],\"bypass\":[],\"assignments\":[]}}\0\
    {\"method\":\"org.cgtproxy.Helper.RemovePolicy\"}\0";

/// What a peer sends. Every reply is a message with parameters or a declared error, what the helper knows is what
/// the kernel has, and nothing of it is left after the grace.
pub fn session(bytes: &[u8]) {
    BED.with(|bed| {
        let uids = match bytes.len() % 2 {
            0 => [bed.uid, Uid::ROOT],
            _ => [Uid::ROOT, bed.uid],
        };
        let kernel = Model::default();
        let (mut config, root) = (bed.config.clone(), bed.root.clone());
        config.on_agent_loss = match bytes.len() / 2 % 3 {
            0 => OnAgentLoss::Keep,
            1 => OnAgentLoss::Direct,
            _ => OnAgentLoss::Drop,
        };
        let (state, _) = State::new(
            config,
            root,
            kernel.clone(),
            Snapshot::nowhere(),
            BTreeMap::new(),
        )
        .expect("routing");
        let state = Rc::new(RefCell::new(state));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        for (uid, id) in uids
            .into_iter()
            .zip(1..)
            .map(|(uid, id)| (uid, ConnectionId(id)))
        {
            let replies = runtime.block_on(converse(bytes, uid, id, &state));
            for reply in replies.split_inclusive(|&byte| byte == 0) {
                assert_declared(reply);
            }
            assert_known(&state, &kernel, uid);
            let grace = state.borrow_mut().disconnected(uid, id);
            if let Some(grace) = grace {
                let over = state.borrow_mut().grace_is_over(uid, grace);
                assert_known(&state, &kernel, uid);
                if let Ok(Outcome::Kept) = over {
                    let next = ConnectionId(id.0 + 2);
                    runtime.block_on(converse(NOTHING, uid, next, &state));
                } else {
                    assert!(matches!(over, Ok(Outcome::Removed)), "{over:?}");
                }
            }
            assert_eq!(state.borrow().holder(uid), Holder::None);
            assert_eq!(kernel.table.borrow().of(uid), None);
        }
    });
}

async fn converse(
    bytes: &[u8],
    uid: Uid,
    id: ConnectionId,
    state: &Rc<RefCell<State<Model>>>,
) -> Vec<u8> {
    let quotas = Quotas::new(state.borrow().config.limits);
    let connection = quotas.connect(Account::User(uid)).expect("it is the first");
    let mut session = Session::new(Peer::for_test(uid), connection, id, Rc::clone(state));
    let mut replies = Vec::new();
    let stream = tokio::io::join(bytes, &mut replies);
    let mut messages = MessageReader::new(stream, MESSAGE_BYTES);
    // What is no message ends the connection.
    let _ = serve(&mut messages, &mut session).await;
    drop(messages);
    replies
}

fn assert_declared(reply: &[u8]) {
    let reply = reply.strip_suffix(b"\0").expect("it ends with NUL");
    let reply: Value = serde_json::from_slice(reply).expect("it is JSON");
    let Some(error) = reply.get("error").and_then(Value::as_str) else {
        assert!(
            reply.get("parameters").is_some_and(Value::is_object),
            "{reply}"
        );
        return;
    };
    let declared = match error.strip_prefix("org.cgtproxy.Helper.") {
        Some(name) => DESCRIPTION.contains(&format!("\nerror {name} ")),
        None => error.starts_with("org.varlink.service."),
    };
    assert!(declared, "{reply}");
}

fn assert_known(state: &RefCell<State<Model>>, kernel: &Model, uid: Uid) {
    let state = state.borrow();
    let table = kernel.table.borrow();
    let known = state
        .registry()
        .policy(uid)
        .map(|policy| (policy.layout, policy.cgroups));
    let there = table.of(uid).map(|o| (&o.layout, o.elements.len()));
    assert_eq!(known, there);
}

#[cfg(test)]
#[path = "../../tests/fuzz/variations.rs"]
mod variations;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_answer_of_the_kernel_panics() {
        variations::run("netlink", netlink);
    }

    #[test]
    fn no_configuration_panics() {
        variations::run("helper-configuration", configuration);
    }

    #[test]
    fn no_path_gets_out() {
        variations::run("path", path);
    }

    #[test]
    fn no_snapshot_panics() {
        variations::run("snapshot", snapshot);
    }

    #[test]
    fn no_message_makes_an_undeclared_answer_or_leaves_something_behind() {
        variations::run("session", session);
    }
}
