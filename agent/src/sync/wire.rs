//! What is said to the helper, written straight from what the agent has. The generated types would need every path
//! and name copied first, and would say of each control group what it does not have.

use std::borrow::Cow;

use cgtproxy_proto::helper::{Gateway, Proxy, Verdict};
use cgtproxy_proto::path::ControlGroupPath;
use serde::Serialize;

use crate::policy::{Element, Target};

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
    verdict: Verdict,
    #[serde(skip_serializing_if = "Option::is_none")]
    proxy: Option<&'a str>,
    #[serde(skip_serializing_if = "is_false")]
    hold: bool,
    #[serde(skip_serializing_if = "is_false")]
    enforce: bool,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde hands it over so")]
fn is_false(value: &bool) -> bool {
    !value
}

pub(super) fn assignments(list: &[(ControlGroupPath, Element)]) -> Vec<Assignment<'_>> {
    list.iter().map(assignment).collect()
}

fn assignment((path, element): &(ControlGroupPath, Element)) -> Assignment<'_> {
    let (verdict, proxy) = match &element.target {
        Target::Direct => (Verdict::direct, None),
        Target::Drop => (Verdict::drop, None),
        Target::DropAll => (Verdict::dropAll, None),
        Target::Proxy(name) => (Verdict::proxy, Some(name.as_str())),
    };
    Assignment {
        control_group: path.as_wire(),
        verdict,
        proxy,
        hold: element.hold,
        enforce: element.enforce,
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use cgtproxy_proto::helper::{self as generated, ReplacePolicy_Args, UpdateAssignments_Args};
    use cgtproxy_proto::path::ControlGroupPath;

    use super::*;

    /// What is written is what the interface says.
    #[test]
    fn the_generated_types_read_it() {
        let element = |target, hold, enforce| Element {
            target,
            hold,
            enforce,
        };
        let proxy = Target::Proxy(Rc::new("p".parse().unwrap()));
        let list: Vec<(ControlGroupPath, Element)> = [
            (&b""[..], element(Target::Direct, false, false)),
            (b"a.slice", element(Target::Drop, true, false)),
            (b"a%b/\xff", element(Target::DropAll, false, true)),
            ("a.slice/\u{e9}\"".as_bytes(), element(proxy, true, true)),
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
        let meant = vec![
            meant("", Verdict::direct, None, false, false),
            meant("a.slice", Verdict::drop, None, true, false),
            meant("a%25b/%FF", Verdict::dropAll, None, false, true),
            meant("a.slice/\u{e9}\"", Verdict::proxy, Some("p"), true, true),
        ];
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
}
