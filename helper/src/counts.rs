//! The helper's hot paths, from the bytes of a call to the batch for the kernel, whose instructions are counted.

#[path = "../../tests/counts/counter.rs"]
mod counter;

use std::collections::{BTreeMap, BTreeSet};
use std::hint::black_box;

use cgtproxy_proto::helper::{
    Assignment, INTERFACE, ReplacePolicy_Args, UpdateAssignments_Args, Verdict as Wire,
};
use cgtproxy_proto::limits::MESSAGE_BYTES;
use cgtproxy_proto::message::MessageReader;
use cgtproxy_proto::path::ControlGroupPath;
use cgtproxy_proto::service::{Answer, Fault, Identity, Parameters, Service, parameters, serve};
use serde_json::{Value, json};

use crate::cgroup::{OwnedControlGroup, Top};
use crate::config::Limits;
use crate::mark::MarkRange;
use crate::nft::{self, Bypass, Element, Enforced, Verdict};
use crate::peer::Uid;
use crate::registry::{PolicyRequest, Registry, Staged};
use crate::session::convert::assignments;
use counter::{counted, within_bound};

fn scope(number: usize) -> String {
    format!("app.slice/app-terminal-{number}.scope")
}

/// Takes assignments in, and does nothing with them.
struct Reader {
    read: usize,
}

impl Service for Reader {
    const IDENTITY: Identity = Identity {
        product: "counts",
        version: "0",
        interface: INTERFACE,
        description: "",
    };

    async fn call(&mut self, method: &str, arguments: Parameters<'_>) -> Result<Answer, Fault> {
        let list: Vec<Assignment> = match method {
            "UpdateAssignments" => parameters::<UpdateAssignments_Args>(arguments)?.assign,
            _ => parameters::<ReplacePolicy_Args>(arguments)?.assignments,
        };
        self.read = assignments(Uid::for_test(1000), "assign", list)
            .unwrap()
            .len();
        Err(Fault::new(INTERFACE, "NoPolicy", json!({})))
    }
}

fn list(count: usize) -> Vec<Value> {
    (0..count)
        .map(|number| json!({ "controlGroup": scope(number), "verdict": Wire::proxy, "proxy": "clash" }))
        .collect()
}

/// Reads a call, and counts it.
fn read(method: &str, arguments: Value, assignments: usize) {
    let call = json!({ "method": format!("{INTERFACE}.{method}"), "parameters": arguments });
    let message = [&serde_json::to_vec(&call).unwrap()[..], b"\0"].concat();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let mut reader = Reader { read: 0 };
    counted(&mut || {
        let stream = tokio::io::join(&message[..], Vec::new());
        let mut messages = MessageReader::new(stream, MESSAGE_BYTES);
        runtime.block_on(serve(&mut messages, &mut reader)).unwrap();
    });
    assert_eq!(reader.read, assignments);
}

#[test]
fn reading_one_assignment() {
    within_bound(module_path!(), "reading_one_assignment", || {
        let arguments = json!({ "assign": list(1), "remove": [] });
        read("UpdateAssignments", arguments, 1);
    });
}

#[test]
fn reading_2000_assignments() {
    within_bound(module_path!(), "reading_2000_assignments", || {
        let arguments = json!({ "proxies": [], "bypass": [], "assignments": list(2000) });
        read("ReplacePolicy", arguments, 2000);
    });
}

fn subtree() -> Top {
    Top::for_test(1, 3)
}

fn marks() -> MarkRange {
    MarkRange::new(0xff00_0000).unwrap()
}

fn elements(numbers: impl Iterator<Item = usize>) -> BTreeMap<ControlGroupPath, Element> {
    let element = |number| {
        let element = Element {
            verdict: Verdict::Drop,
            hold: false,
            enforced: Enforced::Nothing,
        };
        let path = ControlGroupPath::from_wire(&scope(number)).unwrap();
        (path, element)
    };
    numbers.map(element).collect()
}

fn open(id: u64) -> impl FnMut(&ControlGroupPath) -> Option<OwnedControlGroup> {
    let mut ids = id..;
    move |path| {
        Some(OwnedControlGroup::for_test(
            ids.next()?,
            3 + path.depth() as u32,
        ))
    }
}

fn replace(registry: &Registry, count: usize) -> Staged {
    let policy = PolicyRequest {
        subtree: subtree(),
        proxies: Vec::new(),
        bypass_entries: 0,
        bypass: Bypass::default(),
        gateway: None,
    };
    registry
        .replace(Uid::for_test(1000), policy, elements(0..count), open(10))
        .unwrap()
}

fn registry() -> Registry {
    let limits = Limits {
        control_groups: 20_000,
        ..Limits::default()
    };
    Registry::new(limits, marks())
}

fn update(registry: &Registry, assign: &BTreeMap<ControlGroupPath, Element>) -> Staged {
    let assign = assign.clone();
    let uid = Uid::for_test(1000);
    registry
        .update(uid, subtree(), assign, BTreeSet::new(), open(100_000))
        .unwrap()
}

#[test]
fn staging_one_among_10000() {
    within_bound(module_path!(), "staging_one_among_10000", || {
        let mut registry = registry();
        let staged = replace(&registry, 10_000);
        registry.apply(staged);
        let assign = elements(10_000..10_001);
        counted(&mut || {
            let staged = update(&registry, &assign);
            registry.apply(staged);
        });
        let policy = registry.policy(Uid::for_test(1000)).unwrap();
        assert_eq!(policy.cgroups, 10_001);
    });
}

#[test]
fn batching_one_among_10000() {
    within_bound(module_path!(), "batching_one_among_10000", || {
        let mut registry = registry();
        let staged = replace(&registry, 10_000);
        registry.apply(staged);
        let staged = update(&registry, &elements(10_000..10_001));
        counted(&mut || {
            black_box(nft::batch(staged.plan(), marks()));
        });
    });
}

#[test]
fn batching_2000() {
    within_bound(module_path!(), "batching_2000", || {
        let staged = replace(&registry(), 2000);
        counted(&mut || {
            black_box(nft::batch(staged.plan(), marks()));
        });
    });
}
