//! What is said to the helper, written straight from what the agent has. The generated types would need every path
//! and name copied first, and would say of each control group what it does not have.

use std::borrow::Cow;

use cgtproxy_proto::client::{CallError, Client};
use cgtproxy_proto::helper::{
    Gateway, Proxy, ReplacePolicy_Reply, Skipped, UpdateAssignments_Reply, Verdict as WireVerdict,
};
use cgtproxy_proto::path::ControlGroupPath;
use serde::Serialize;

use super::proxy::proxy;
use crate::config::Config;
use crate::ledger::Call;
use crate::policy::{Element, Hold, Target};
use crate::state::Relay;

/// The parameters of `ReplacePolicy`.
#[derive(Debug, Serialize)]
pub(super) struct ReplacePolicy<'a> {
    pub(super) proxies: Vec<Proxy>,
    pub(super) bypass: Vec<String>,
    pub(super) assignments: Vec<Assignment<'a>>,
    pub(super) gateway: Option<Gateway>,
}

/// The parameters of `UpdateAssignments`.
#[derive(Debug, Serialize)]
pub(super) struct UpdateAssignments<'a> {
    pub(super) assign: Vec<Assignment<'a>>,
    pub(super) remove: Vec<Cow<'a, str>>,
}

/// One control group and its verdict.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Assignment<'a> {
    control_group: Cow<'a, str>,
    verdict: WireVerdict,
    #[serde(skip_serializing_if = "Option::is_none")]
    proxy: Option<&'a str>,
    #[serde(skip_serializing_if = "is_false")]
    undecided: bool,
    #[serde(skip_serializing_if = "is_false")]
    hold: bool,
    #[serde(skip_serializing_if = "is_false")]
    enforce: bool,
    #[serde(skip_serializing_if = "is_false")]
    enforce_hold: bool,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde hands it over so")]
fn is_false(value: &bool) -> bool {
    !value
}

pub(super) fn assignments(list: &[(ControlGroupPath, Element)]) -> Vec<Assignment<'_>> {
    list.iter().map(assignment).collect()
}

fn assignment((path, element): &(ControlGroupPath, Element)) -> Assignment<'_> {
    let (verdict, proxy) = match &element.verdict.target {
        Target::Direct => (WireVerdict::direct, None),
        Target::Drop => (WireVerdict::drop, None),
        Target::DropAll => (WireVerdict::dropAll, None),
        Target::Proxy(name) => (WireVerdict::proxy, Some(name.as_str())),
    };
    Assignment {
        control_group: path.as_wire(),
        verdict,
        proxy,
        undecided: element.verdict.undecided,
        hold: element.hold != Hold::None,
        enforce: element.verdict.enforce,
        enforce_hold: element.hold == Hold::Enforced,
    }
}

/// What both methods reply.
pub(super) struct Reply {
    /// Counts the helper's changes of the policy.
    pub(super) generation: i64,
    /// What was passed over.
    pub(super) skipped: Vec<Skipped>,
}

/// Makes a call, and returns what the helper replies.
pub(super) async fn send(
    client: &mut Client,
    call: &Call,
    config: &Config,
    relay: &Relay,
) -> Result<Reply, CallError> {
    match call {
        Call::Replace(assign) => {
            let arguments = ReplacePolicy {
                proxies: config
                    .proxies
                    .iter()
                    .map(|p| proxy(p, &config.fake_addresses, relay))
                    .collect(),
                bypass: config.bypass.iter().map(ToString::to_string).collect(),
                assignments: assignments(assign),
                gateway: config.gateway.as_ref().map(|gateway| Gateway {
                    interfaces: gateway.interfaces.iter().map(ToString::to_string).collect(),
                    proxy: gateway.proxy.to_string(),
                }),
            };
            let reply: ReplacePolicy_Reply = client
                .call("org.cgtproxy.Helper.ReplacePolicy", arguments)
                .await?;
            Ok(Reply {
                generation: reply.generation,
                skipped: reply.skipped,
            })
        }
        Call::Update { assign, remove } => {
            let arguments = UpdateAssignments {
                assign: assignments(assign),
                remove: remove.iter().map(|path| path.as_wire()).collect(),
            };
            let reply: UpdateAssignments_Reply = client
                .call("org.cgtproxy.Helper.UpdateAssignments", arguments)
                .await?;
            Ok(Reply {
                generation: reply.generation,
                skipped: reply.skipped,
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use cgtproxy_proto::helper::{self as generated, ReplacePolicy_Args, UpdateAssignments_Args};
    use cgtproxy_proto::path::ControlGroupPath;

    use super::*;
    use crate::ledger::encoded;
    use crate::policy::Verdict;

    /// What is written is what the interface says.
    #[test]
    fn the_generated_types_read_it() {
        let element = |target, hold, enforce| Element {
            verdict: Verdict {
                target,
                enforce,
                undecided: false,
            },
            hold,
        };
        let mut undecided = element(Target::Direct, Hold::Plain, false);
        undecided.verdict.undecided = true;
        let proxy = Target::Proxy(Rc::new("p".parse().unwrap()));
        let list: Vec<(ControlGroupPath, Element)> = [
            (&b""[..], element(Target::Direct, Hold::None, false)),
            (b"a.slice", element(Target::Drop, Hold::Plain, false)),
            (b"a%b/\xff", element(Target::DropAll, Hold::None, true)),
            (
                "a.slice/\u{e9}\"".as_bytes(),
                element(proxy, Hold::Enforced, true),
            ),
            (b"u", undecided),
        ]
        .into_iter()
        .map(|(path, element)| (ControlGroupPath::from_bytes(path).unwrap(), element))
        .collect();
        let yes = |value: bool| value.then_some(true);
        let meant =
            |path: &str, verdict, proxy: Option<&str>, hold, enforce| generated::Assignment {
                controlGroup: path.into(),
                verdict,
                proxy: proxy.map(str::to_owned),
                undecided: None,
                hold: yes(hold),
                enforce: yes(enforce),
                enforceHold: None,
            };
        let mut meant = vec![
            meant("", WireVerdict::direct, None, false, false),
            meant("a.slice", WireVerdict::drop, None, true, false),
            meant("a%25b/%FF", WireVerdict::dropAll, None, false, true),
            meant(
                "a.slice/\u{e9}\"",
                WireVerdict::proxy,
                Some("p"),
                true,
                true,
            ),
            meant("u", WireVerdict::direct, None, true, false),
        ];
        meant[3].enforceHold = Some(true);
        meant[4].undecided = Some(true);
        let replace = ReplacePolicy {
            proxies: Vec::new(),
            bypass: vec!["::/0".into()],
            assignments: assignments(&list),
            gateway: None,
        };
        let read: ReplacePolicy_Args =
            serde_json::from_str(&serde_json::to_string(&replace).unwrap()).unwrap();
        assert_eq!(
            read,
            ReplacePolicy_Args {
                proxies: Vec::new(),
                bypass: vec!["::/0".into()],
                assignments: meant.clone(),
                gateway: None,
            }
        );
        let update = UpdateAssignments {
            assign: assignments(&list),
            remove: list.iter().map(|(path, _)| path.as_wire()).collect(),
        };
        let read: UpdateAssignments_Args =
            serde_json::from_str(&serde_json::to_string(&update).unwrap()).unwrap();
        let remove = meant.iter().map(|a| a.controlGroup.clone()).collect();
        assert_eq!(
            read,
            UpdateAssignments_Args {
                assign: meant,
                remove,
            }
        );
    }

    #[test]
    fn no_assignment_is_longer_than_is_counted() {
        for bytes in [&b""[..], b"a.slice/b", b"%\"\\\x01\x7f\xff/\xc3\xa9"] {
            let path = ControlGroupPath::from_bytes(bytes).unwrap();
            for target in [
                Target::Direct,
                Target::DropAll,
                Target::Proxy(Rc::new("p".repeat(64).parse().unwrap())),
            ] {
                // A user's own can be undecided, and no other thing besides.
                let element = Element {
                    verdict: Verdict {
                        target,
                        enforce: true,
                        undecided: false,
                    },
                    hold: Hold::Enforced,
                };
                let counted = encoded(&path, Some(&element));
                let said = [(path.clone(), element)];
                let said = assignments(&said);
                // With brackets in place of the comma after it.
                let length = serde_json::to_string(&said).unwrap().len() - 1;
                assert!(length <= counted, "{length} > {counted}");
            }
            let removed = serde_json::to_string(&[path.as_wire()]).unwrap();
            assert!(removed.len() - 1 <= encoded(&path, None));
        }
    }
}
