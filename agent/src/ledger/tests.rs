//! What is said after what, and that the helper ends up with what it should have.

mod room;
mod turns;

use std::rc::Rc;

use proptest::prelude::*;

use super::model::{Disk, Kernel};
use super::*;
use crate::policy::{Pattern, Rule, Rules, Selector, Start};

fn path(text: &str) -> ControlGroupPath {
    ControlGroupPath::from_wire(text).unwrap()
}

/// Groups named `d…` are dropped, `x…` direct.
fn tree() -> Tree {
    let rule = |pattern: &str, target| Rule {
        selector: Selector::Match(Pattern::new(pattern).unwrap()),
        target,
        enforce: false,
        line: 1,
    };
    let rules = Rules {
        start: Start::Open,
        users: true,
        exec_slices: None,
        rules: vec![
            rule("/d[^/]*$", Target::Drop),
            rule("/x[^/]*$", Target::Direct),
        ],
    };
    Tree::new(b"/u".to_vec(), Rc::new(rules))
}

fn add(tree: &mut Tree, ledger: &mut Ledger, text: &str) {
    if let Some(path) = tree.add(path(text))
        && tree.element(&path).is_some()
    {
        ledger.touch(&path);
    }
}

fn remove(tree: &mut Tree, ledger: &mut Ledger, text: &str) {
    for path in tree.remove(&path(text)) {
        ledger.renew(&path);
    }
}

fn shown(call: Option<Call>) -> String {
    let assigned = |list: Vec<(ControlGroupPath, Element)>| {
        let list: Vec<_> = list
            .iter()
            .map(|(p, t)| format!("{}={t}", p.to_wire()))
            .collect();
        list.join(" ")
    };
    match call {
        None => "-".into(),
        Some(Call::Replace(list)) => format!("all {}", assigned(list)),
        Some(Call::Update { assign, remove }) => {
            let remove: Vec<_> = remove.iter().map(|p| format!("-{}", p.to_wire())).collect();
            format!("{} {}", assigned(assign), remove.join(" "))
        }
    }
}

/// A control group that a user makes.
fn of_user(uid: u32, name: &str) -> String {
    format!("user.slice/user-{uid}.slice/user@{uid}.service/app.slice/{name}")
}

/// Makes the one refusal of a call that there is no room for.
fn bound(tree: &Tree, ledger: &mut Ledger, most: usize) {
    assert!(ledger.next(tree).is_some());
    assert!(ledger.bound(most));
}

#[test]
fn merges_what_happens_during_a_call() {
    let (mut tree, mut ledger) = (tree(), Ledger::default());
    add(&mut tree, &mut ledger, "d1");
    assert_eq!(shown(ledger.next(&tree)), "all d1=drop");
    add(&mut tree, &mut ledger, "d2");
    add(&mut tree, &mut ledger, "d3");
    remove(&mut tree, &mut ledger, "d2");
    assert_eq!(shown(ledger.next(&tree)), "-", "one call at a time");
    ledger.acknowledge(Vec::new());
    assert_eq!(shown(ledger.next(&tree)), "d3=drop ");
    ledger.acknowledge(Vec::new());
    assert!(ledger.is_settled());
    assert_eq!(shown(ledger.next(&tree)), "-");
}

#[test]
fn a_path_that_another_control_group_got_is_assigned_again() {
    let (mut tree, mut ledger) = (tree(), Ledger::default());
    add(&mut tree, &mut ledger, "d");
    ledger.next(&tree);
    ledger.acknowledge(Vec::new());
    remove(&mut tree, &mut ledger, "d");
    add(&mut tree, &mut ledger, "d");
    assert_eq!(ledger.held_target(&path("d")), Some(Target::Direct));
    assert_eq!(shown(ledger.next(&tree)), "d=drop ");
    // And again while that is under way.
    remove(&mut tree, &mut ledger, "d");
    add(&mut tree, &mut ledger, "d");
    ledger.acknowledge(Vec::new());
    assert_eq!(shown(ledger.next(&tree)), "d=drop ");
    remove(&mut tree, &mut ledger, "d");
    ledger.acknowledge(Vec::new());
    assert_eq!(shown(ledger.next(&tree)), " -d");
    ledger.acknowledge(Vec::new());
    assert_eq!(shown(ledger.next(&tree)), "-");
}

#[test]
fn what_was_skipped_is_tried_when_it_comes_back() {
    let (mut tree, mut ledger) = (tree(), Ledger::default());
    add(&mut tree, &mut ledger, "d");
    ledger.next(&tree);
    let skipped = vec![(path("d"), SkipReason::missing)];
    assert_eq!(ledger.acknowledge(skipped).len(), 1);
    assert_eq!(ledger.skipped(&path("d")), Some(&SkipReason::missing));
    assert_eq!(shown(ledger.next(&tree)), "-");
    remove(&mut tree, &mut ledger, "d");
    assert_eq!(
        shown(ledger.next(&tree)),
        "-",
        "the helper has nothing of it"
    );
    add(&mut tree, &mut ledger, "d");
    assert_eq!(ledger.skipped(&path("d")), None);
    assert_eq!(shown(ledger.next(&tree)), "d=drop ");
    ledger.acknowledge(Vec::new());
    assert_eq!(ledger.held_target(&path("d/e")), Some(Target::Drop));
}

#[test]
fn no_call_gets_too_long() {
    let (mut tree, mut ledger) = (tree(), Ledger::default());
    ledger.limit = 230;
    for name in ["d", "d/x", "d/x/d", "d/x/d/x", "d2"] {
        add(&mut tree, &mut ledger, name);
    }
    assert_eq!(shown(ledger.next(&tree)), "all d=drop d/x=direct");
    ledger.acknowledge(Vec::new());
    assert!(!ledger.is_settled());
    assert_eq!(shown(ledger.next(&tree)), "d/x/d=drop d/x/d/x=direct ");
    ledger.acknowledge(Vec::new());
    assert_eq!(shown(ledger.next(&tree)), "d2=drop ");
    ledger.acknowledge(Vec::new());
    assert!(ledger.is_settled());
}

#[test]
fn what_else_is_said_takes_room_of_a_call_that_replaces_everything() {
    let (mut tree, mut ledger) = (tree(), Ledger::default());
    ledger.limit = 220;
    ledger.make_room_for(100);
    for name in ["d1", "d2", "d3"] {
        add(&mut tree, &mut ledger, name);
    }
    assert_eq!(shown(ledger.next(&tree)), "all d1=drop");
    ledger.acknowledge(Vec::new());
    assert_eq!(shown(ledger.next(&tree)), "d2=drop d3=drop ");
    // Also in the next session.
    ledger.lost();
    assert_eq!(shown(ledger.next(&tree)), "all d1=drop");
}

/// So many as one user may have fit into one message, with paths as service managers make them.
#[test]
fn a_whole_policy_is_one_call() {
    let (mut tree, mut ledger) = (tree(), Ledger::default());
    ledger.make_room_for(100_000);
    let application = "user.slice/user-60000.slice/user@60000.service/app.slice/\
                       d-gnome-org.example.an-application-with-a-long-name";
    for number in 0..16384 {
        tree.add(path(&format!("{application}-{number}.scope")));
    }
    let call = ledger.next(&tree);
    assert!(matches!(call, Some(Call::Replace(all)) if all.len() == 16384));
    ledger.acknowledge(Vec::new());
    assert_eq!(shown(ledger.next(&tree)), "-");
}

/// Where a control group's packets go.
fn target(kernel: &Kernel, path: &ControlGroupPath, disk: &Disk) -> Target {
    let element = kernel.element(path, disk);
    element.map_or(Target::Direct, |element| element.verdict.target)
}

#[derive(Debug, Clone)]
enum Event {
    /// On disk; the agent hears of it later.
    Make(String),
    Unmake(String),
    /// The agent hears of the next so many events.
    Hear(usize),
    Send,
    Receive,
    Refuse,
    Lose,
}

fn any_event() -> impl Strategy<Value = Event> {
    let any_path = || proptest::collection::vec("[dxn][12]?", 1..4).prop_map(|n| n.join("/"));
    prop_oneof![
        6 => any_path().prop_map(Event::Make),
        3 => any_path().prop_map(Event::Unmake),
        6 => (1usize..5).prop_map(Event::Hear),
        4 => Just(Event::Send),
        4 => Just(Event::Receive),
        1 => Just(Event::Refuse),
        1 => Just(Event::Lose),
    ]
}

proptest! {
    #[test]
    fn the_helper_ends_up_with_the_cover(
        events in proptest::collection::vec(any_event(), 0..80),
        limit in 100usize..1000,
        most in prop_oneof![Just(1000), 0usize..10],
    ) {
        let (mut tree, mut ledger, mut helper) = (tree(), Ledger::default(), Kernel::default());
        ledger.limit = limit;
        let mut disk = Disk::from([(ControlGroupPath::root(), 0)]);
        tree.add(ControlGroupPath::root());
        let mut identity = 0;
        let mut unheard: std::collections::VecDeque<(bool, String)> = Default::default();
        let mut reply = None;
        let settle = [Event::Receive, Event::Hear(1000), Event::Send, Event::Receive];
        let rounds = std::iter::repeat_n(settle, 100).flatten();
        for event in events.into_iter().chain(rounds) {
            match event {
                Event::Make(text) => {
                    let p = path(&text);
                    if disk.contains_key(&p.parent().unwrap()) && !disk.contains_key(&p) {
                        identity += 1;
                        disk.insert(p, identity);
                        unheard.push_back((true, text));
                    }
                }
                Event::Unmake(text) => {
                    let p = path(&text);
                    let gone: Vec<_> = disk.keys().filter(|o| o.is_within(&p)).cloned().collect();
                    for p in gone.into_iter().rev() {
                        disk.remove(&p);
                        unheard.push_back((false, p.to_wire()));
                    }
                }
                Event::Hear(count) => {
                    for _ in 0..count {
                        match unheard.pop_front() {
                            Some((true, text)) => add(&mut tree, &mut ledger, &text),
                            Some((false, text)) => remove(&mut tree, &mut ledger, &text),
                            None => {}
                        }
                    }
                }
                Event::Send => {
                    if let Some(call) = ledger.next(&tree) {
                        if !helper.has_room(&call, most) {
                            // Nobody says too much twice.
                            assert!(ledger.bound(most));
                            continue;
                        }
                        reply = Some(helper.carry_out(&call, &disk));
                    }
                }
                Event::Receive => {
                    if let Some(skipped) = reply.take() {
                        ledger.acknowledge(skipped);
                    }
                }
                Event::Refuse => {
                    // Refused before anything was done.
                    if reply.is_none() && ledger.next(&tree).is_some() {
                        ledger.refuse();
                    }
                }
                Event::Lose => {
                    helper = Kernel::default();
                    reply = None;
                    ledger.lost();
                }
            }
        }
        prop_assert!(ledger.is_settled());
        // Nothing is left of what is gone.
        for path in helper.held.keys() {
            prop_assert!(disk.contains_key(path), "{:?}", path);
        }
        let waiting = ledger.shortage().map_or(0, |(count, ..)| count);
        prop_assert_eq!(waiting, tree.cover().count().saturating_sub(most));
        prop_assert_eq!(helper.held.len() + waiting, tree.cover().count());
        if waiting > 0 {
            return Ok(());
        }
        for path in disk.keys() {
            let meant = tree.get(path).unwrap().target.clone();
            prop_assert_eq!(target(&helper, path, &disk), meant.clone(), "{:?}", path);
            prop_assert_eq!(ledger.held_target(path), Some(meant));
        }
    }
}
