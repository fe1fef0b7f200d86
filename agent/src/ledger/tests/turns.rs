//! Users take turns in the system policy.

use super::*;

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
