//! What is said after what, and that the helper ends up with what it should have.

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

/// A control group that a user makes.
fn of_user(uid: u32, name: &str) -> String {
    format!("user.slice/user-{uid}.slice/user@{uid}.service/app.slice/{name}")
}

/// One of which four take a turn, and 62 a call that changes the system policy.
fn long_one_of_user(uid: u32, name: &str) -> String {
    let deep = "-".repeat(245);
    of_user(uid, &format!("{deep}/{deep}/{deep}/{name}{deep}"))
}

/// What the next call is about, in its order: how many control groups of each user in turn, or the only one's name.
fn turns(call: Option<Call>) -> Vec<(String, usize)> {
    let mut turns: Vec<(String, usize)> = Vec::new();
    let (Call::Replace(assign) | Call::Update { assign, .. }) = call.expect("a call");
    for (path, _) in assign {
        let path = path.to_wire();
        let user = path.split('/').nth(1).unwrap_or_default().to_owned();
        match turns.last_mut() {
            Some((last, count)) if *last == user => *count += 1,
            _ => turns.push((user, 1)),
        }
    }
    turns
}

fn turn(user: &str, count: usize) -> (String, usize) {
    (user.to_owned(), count)
}

/// A ledger of the system policy that holds nothing, after its first call.
fn shared(tree: &Tree) -> Ledger {
    let mut ledger = Ledger::of_machine();
    assert_eq!(shown(ledger.next(tree)), "all ");
    ledger.acknowledge(Vec::new());
    ledger
}

#[test]
fn users_take_turns_in_the_system_policy() {
    let mut tree = tree();
    let mut ledger = shared(&tree);
    for number in 100..300 {
        for uid in [1, 3] {
            let path = long_one_of_user(uid, &format!("d{number}"));
            add(&mut tree, &mut ledger, &path);
        }
    }
    add(&mut tree, &mut ledger, &of_user(2, "d"));
    add(&mut tree, &mut ledger, "user.slice/d.slice");
    // What no user makes goes first. One who has little to say waits for a turn of each other one.
    let call = turns(ledger.next(&tree));
    assert_eq!(
        call[..5],
        [
            turn("d.slice", 1),
            turn("user-1.slice", 4),
            turn("user-2.slice", 1),
            turn("user-3.slice", 4),
            turn("user-1.slice", 4),
        ]
    );
    // Who comes now is in the next call, whatever is left of what others say, and whoever sorts first.
    add(&mut tree, &mut ledger, &of_user(2, "d2"));
    add(&mut tree, &mut ledger, &of_user(4, "d"));
    ledger.acknowledge(Vec::new());
    let call = turns(ledger.next(&tree));
    assert!(call.contains(&turn("user-2.slice", 1)), "{call:?}");
    assert!(call.contains(&turn("user-4.slice", 1)), "{call:?}");
    assert!(call[..4].contains(&turn("user-3.slice", 4)), "{call:?}");
}

#[test]
fn a_user_who_always_has_something_to_say_does_not_keep_others_waiting() {
    let mut tree = tree();
    let mut ledger = shared(&tree);
    let name = |round, number| long_one_of_user(1, &format!("d{round}-{number}-"));
    for round in 0..10 {
        // More than there is room for in a call.
        for number in 0..100 {
            add(&mut tree, &mut ledger, &name(round, number));
        }
        let victim = of_user(2, &format!("d{round}"));
        add(&mut tree, &mut ledger, &victim);
        assert!(ledger.next(&tree).is_some());
        ledger.acknowledge(Vec::new());
        assert_eq!(ledger.held_target(&path(&victim)), Some(Target::Drop));
        remove(&mut tree, &mut ledger, &victim);
        for number in 0..100 {
            remove(&mut tree, &mut ledger, &name(round, number));
        }
    }
}

#[test]
fn what_waits_for_room_does_not_wait_for_who_always_has_something_to_say() {
    let mut tree = tree();
    let flood: Vec<_> = (0..70)
        .map(|number| long_one_of_user(1, &format!("d{number}")))
        .collect();
    // Deeper, so that these get what is left.
    let own = |number| format!("a/b/c/e/f/g/h/i/j/k/d{number}");
    for path_of in flood.iter().cloned().chain((0..70).map(own)) {
        tree.add(path(&path_of));
    }
    let mut ledger = Ledger::of_machine();
    ledger.next(&tree);
    ledger.acknowledge(Vec::new());
    let victim = of_user(2, "d");
    add(&mut tree, &mut ledger, &victim);
    bound(&tree, &mut ledger, 140);
    ledger.next(&tree);
    ledger.acknowledge(Vec::new());
    assert!(ledger.is_waiting(&path(&victim)));
    remove(&mut tree, &mut ledger, &own(0));
    for _ in 0..2 {
        // More than there is room for in a call.
        for path in &flood {
            remove(&mut tree, &mut ledger, path);
            add(&mut tree, &mut ledger, path);
        }
        assert!(ledger.next(&tree).is_some());
        ledger.acknowledge(Vec::new());
    }
    assert_eq!(ledger.held_target(&path(&victim)), Some(Target::Drop));
}

#[test]
fn a_call_that_changes_the_system_policy_is_short() {
    let name = |number| format!("d{number:03}{}", "-".repeat(100));
    let mut tree = tree();
    tree.add(path(&name(0)));
    let length = encoded(&path(&name(0)), tree.element(&path(&name(0))));
    tree.remove(&path(&name(0)));
    let most = 64 * 1024 / length;
    for (system, count, first) in [
        (true, most, most),
        (true, most + 1, most),
        (false, most + 1, most + 1),
    ] {
        let mut ledger = match system {
            true => shared(&tree),
            false => {
                let mut ledger = Ledger::default();
                ledger.next(&tree);
                ledger.acknowledge(Vec::new());
                ledger
            }
        };
        for number in 0..count {
            add(&mut tree, &mut ledger, &name(number));
        }
        let sent = |call| match call {
            Some(Call::Update { assign, .. }) => assign.len(),
            _ => 0,
        };
        assert_eq!(sent(ledger.next(&tree)), first);
        ledger.acknowledge(Vec::new());
        assert_eq!(sent(ledger.next(&tree)), count - first);
        for number in 0..count {
            tree.remove(&path(&name(number)));
        }
    }
}

/// A whole policy that does not fit into one call has something of everybody in it.
#[test]
fn a_whole_policy_in_parts_begins_with_something_of_everybody() {
    let mut tree = tree();
    for number in 0..100 {
        tree.add(path(&long_one_of_user(1, &format!("d{number}"))));
    }
    tree.add(path(&of_user(2, "d")));
    tree.add(path("user.slice/d.slice"));
    let mut ledger = Ledger::of_machine();
    ledger.limit = 20_000;
    let first = turns(ledger.next(&tree));
    let begin = [
        turn("d.slice", 1),
        turn("user-1.slice", 4),
        turn("user-2.slice", 1),
    ];
    assert_eq!(first[..3], begin);
    let mut all: usize = first.iter().map(|(_, count)| count).sum();
    ledger.acknowledge(Vec::new());
    while let Some(call) = ledger.next(&tree) {
        all += turns(Some(call))
            .iter()
            .map(|(_, count)| count)
            .sum::<usize>();
        ledger.acknowledge(Vec::new());
    }
    assert_eq!(all, 102);
}

/// Makes the one refusal of a call that there is no room for.
fn bound(tree: &Tree, ledger: &mut Ledger, most: usize) {
    assert!(ledger.next(tree).is_some());
    assert!(ledger.bound(most));
}

#[test]
fn what_there_is_no_room_for_waits_and_removals_do_not() {
    let (mut tree, mut ledger) = (tree(), Ledger::default());
    for name in ["a/d1", "b/d2", "d3"] {
        add(&mut tree, &mut ledger, name);
    }
    bound(&tree, &mut ledger, 2);
    // What is less deep has room, and of that what comes first.
    assert_eq!(shown(ledger.next(&tree)), "all a/d1=drop d3=drop");
    ledger.acknowledge(Vec::new());
    assert_eq!(shown(ledger.next(&tree)), "-");
    assert!(ledger.is_settled());
    assert_eq!(ledger.shortage(), Some((1, &path("b/d2"), 2)));
    assert!(ledger.is_waiting(&path("b/d2")));
    assert_eq!(ledger.news_of_shortage(), [path("b/d2")]);
    // Nobody asks in vain.
    add(&mut tree, &mut ledger, "d4");
    assert_eq!(shown(ledger.next(&tree)), "-");
    assert!(ledger.news_of_shortage().is_empty(), "once");
    assert_eq!(ledger.shortage(), Some((2, &path("b/d2"), 2)));
    assert!(!ledger.bound(2));
    remove(&mut tree, &mut ledger, "d3");
    assert_eq!(shown(ledger.next(&tree)), " -d3");
    ledger.acknowledge(Vec::new());
    assert_eq!(shown(ledger.next(&tree)), "b/d2=drop ");
    ledger.acknowledge(Vec::new());
    // What has waited may be gone.
    remove(&mut tree, &mut ledger, "d4");
    assert_eq!(ledger.shortage(), None);
    assert_eq!(shown(ledger.next(&tree)), "-");
    // Another helper may take more.
    add(&mut tree, &mut ledger, "d5");
    ledger.lost();
    assert_eq!(shown(ledger.next(&tree)), "all a/d1=drop b/d2=drop d5=drop");
}

#[test]
fn what_was_passed_over_takes_no_room() {
    let (mut tree, mut ledger) = (tree(), Ledger::default());
    for name in ["d1", "d2", "d3"] {
        add(&mut tree, &mut ledger, name);
    }
    bound(&tree, &mut ledger, 2);
    assert_eq!(shown(ledger.next(&tree)), "all d1=drop d2=drop");
    ledger.acknowledge(vec![(path("d1"), SkipReason::missing)]);
    assert_eq!(shown(ledger.next(&tree)), "d3=drop ");
    ledger.acknowledge(Vec::new());
    assert_eq!(ledger.shortage(), None);
}

#[test]
fn nobody_loses_what_they_have_when_everything_is_said_anew() {
    let (mut tree, mut ledger) = (tree(), Ledger::default());
    for name in ["a/b/d1", "d2", "d3"] {
        add(&mut tree, &mut ledger, name);
    }
    bound(&tree, &mut ledger, 2);
    assert_eq!(shown(ledger.next(&tree)), "all d2=drop d3=drop");
    ledger.acknowledge(Vec::new());
    remove(&mut tree, &mut ledger, "d2");
    assert_eq!(shown(ledger.next(&tree)), " -d2");
    ledger.acknowledge(Vec::new());
    assert_eq!(shown(ledger.next(&tree)), "a/b/d1=drop ");
    ledger.acknowledge(Vec::new());
    // Less deep, but later.
    add(&mut tree, &mut ledger, "d4");
    ledger.replace_all();
    assert_eq!(shown(ledger.next(&tree)), "all a/b/d1=drop d3=drop");
    ledger.acknowledge(Vec::new());
    assert!(ledger.is_waiting(&path("d4")));
}

#[test]
fn one_users_control_groups_leave_room_for_others() {
    let (mut tree, mut ledger) = (tree(), Ledger::default());
    let mine = of_user;
    let count = |call: Option<Call>| match call {
        Some(Call::Replace(assign) | Call::Update { assign, .. }) => assign.len(),
        None => 0,
    };
    for number in 0..100 {
        tree.add(path(&mine(1, &format!("d{number}"))));
    }
    bound(&tree, &mut ledger, 12);
    assert_eq!(count(ledger.next(&tree)), 6);
    ledger.acknowledge(Vec::new());
    // The next one who does the same, and what the system's service manager makes.
    for number in 0..100 {
        add(&mut tree, &mut ledger, &mine(2, &format!("d{number}")));
    }
    assert_eq!(count(ledger.next(&tree)), 3);
    ledger.acknowledge(Vec::new());
    for name in [
        "d",
        "system.slice/d.service",
        "user.slice/user-1.slice/d.scope",
    ] {
        add(&mut tree, &mut ledger, name);
    }
    assert_eq!(count(ledger.next(&tree)), 3);
    ledger.acknowledge(Vec::new());
    assert_eq!(ledger.news_of_shortage().len(), 2, "once for each");
    assert_eq!(ledger.shortage().map(|(count, ..)| count), Some(191));
    // What one of them gives back is there for others.
    remove(&mut tree, &mut ledger, &mine(1, "d0"));
    assert_eq!(shown(ledger.next(&tree)), format!(" -{}", mine(1, "d0")));
    ledger.acknowledge(Vec::new());
    add(&mut tree, &mut ledger, "d.service");
    assert_eq!(shown(ledger.next(&tree)), "d.service=drop ");
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
