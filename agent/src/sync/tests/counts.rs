//! The agent's hot paths, from a control group to the text of a call, whose instructions are counted.

use std::hint::black_box;
use std::rc::Rc;

use cgtproxy_proto::path::ControlGroupPath;

use crate::counter::{counted, within_bound};
use crate::ledger::{Call, Ledger};
use crate::policy::{Element, Pattern, Rule, Rules, Selector, Start, Target, Tree};
use crate::sync::wire;

const PREFIX: &[u8] = b"/user.slice/user-1000.slice/user@1000.service";

/// Every other control group has a verdict of its own.
fn rules() -> Rc<Rules> {
    let proxy = Target::Proxy(Rc::new("clash".parse().unwrap()));
    let rule = |(pattern, target): (&str, &Target)| Rule {
        selector: Selector::Match(Pattern::new(pattern).unwrap()),
        target: target.clone(),
        enforce: false,
        line: 1,
    };
    let rules = [
        ("/app-firefox-[0-9]+\\.scope$", &proxy),
        ("/app-steam-", &Target::Drop),
        ("/app-[a-z]+-[0-9]*[02468]\\.scope$", &proxy),
        ("/session\\.slice/", &Target::Direct),
    ];
    Rc::new(Rules {
        start: Start::Open,
        users: true,
        exec_slices: None,
        rules: rules.into_iter().map(rule).collect(),
    })
}

fn scope(number: usize) -> ControlGroupPath {
    ControlGroupPath::from_wire(&format!("app.slice/app-terminal-{number}.scope")).unwrap()
}

fn tree(scopes: usize) -> Tree {
    let mut tree = Tree::new(PREFIX.into(), rules());
    for number in 0..scopes {
        tree.add(scope(number));
    }
    tree
}

fn cover(tree: &Tree) -> Vec<(ControlGroupPath, Element)> {
    tree.cover()
        .map(|(path, element)| (path.clone(), element.clone()))
        .collect()
}

#[test]
fn judging_one_among_2000() {
    within_bound(module_path!(), "judging_one_among_2000", || {
        let mut tree = tree(2000);
        let mut new = Some(scope(2000));
        counted(&mut || {
            black_box(tree.add(new.take().unwrap()));
        });
        assert!(tree.element(&scope(2000)).is_some());
    });
}

#[test]
fn covering_2000() {
    within_bound(module_path!(), "covering_2000", || {
        let mut tree = tree(2000);
        let rules = rules();
        let mut covered = Vec::new();
        counted(&mut || {
            tree.replace_rules(Rc::clone(&rules));
            covered = cover(&tree);
        });
        assert_eq!(covered.len(), 1000);
    });
}

#[test]
fn accounting_for_one_among_2000() {
    within_bound(module_path!(), "accounting_for_one_among_2000", || {
        let mut tree = tree(2000);
        let mut ledger = Ledger::default();
        assert!(matches!(ledger.next(&tree), Some(Call::Replace(all)) if all.len() == 1000));
        assert!(ledger.acknowledge(Vec::new()).is_empty());
        let new = tree.add(scope(2000)).unwrap();
        let mut call = None;
        counted(&mut || {
            ledger.touch(&new);
            call = ledger.next(&tree);
            ledger.acknowledge(Vec::new());
        });
        assert!(matches!(call, Some(Call::Update { assign, .. }) if assign.len() == 1));
    });
}

#[test]
fn writing_one_assignment() {
    within_bound(module_path!(), "writing_one_assignment", || {
        let cover = cover(&tree(1));
        assert_eq!(cover.len(), 1);
        counted(&mut || {
            let update = wire::UpdateAssignments {
                assign: wire::assignments(&cover),
                remove: Vec::new(),
            };
            black_box(serde_json::to_vec(&update).unwrap());
        });
    });
}

#[test]
fn writing_2000_assignments() {
    within_bound(module_path!(), "writing_2000_assignments", || {
        let cover = cover(&tree(4000));
        assert_eq!(cover.len(), 2000);
        counted(&mut || {
            let replace = wire::ReplacePolicy {
                proxies: Vec::new(),
                bypass: Vec::new(),
                assignments: wire::assignments(&cover),
                gateway: None,
            };
            black_box(serde_json::to_vec(&replace).unwrap());
        });
    });
}
