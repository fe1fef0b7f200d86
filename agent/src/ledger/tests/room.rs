//! What there is no room for.

use super::*;

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
