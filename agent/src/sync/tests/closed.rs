//! The closed start against a model of the helper and the kernel: in no order of events is there a moment in
//! which a control group's packets could leave that are not meant to.

use std::collections::VecDeque;
use std::rc::Rc;

use cgtproxy_proto::helper::SkipReason;
use cgtproxy_proto::path::ControlGroupPath;
use proptest::prelude::*;

use crate::config::{Config, Scope};
use crate::ledger::Call;
use crate::ledger::model::{Disk, Kernel};
use crate::policy::{
    ExecSlices, Hold, Names, Pattern, Rule, Rules, Selector, Start, Target, Verdict,
};
use crate::state::Observer;
use crate::state::{Source, State};
use crate::subtree::Subtree;

const PREFIX: &[u8] = b"/user.slice/user-5.slice/user@5.service";

/// Whether no packet of a control group can go another way than this one.
fn has_or_holds(
    kernel: &Kernel,
    path: &ControlGroupPath,
    disk: &Disk,
    meant: &Verdict,
    rules: &Rules,
) -> bool {
    match kernel.element(path, disk) {
        None => *meant == rules.undecided(),
        Some(element) => match element.hold {
            Hold::None => element.verdict == *meant,
            // Users' own policies decide before it, or are to have no say.
            Hold::Plain => element.verdict == *meant || !(element.verdict.enforce || meant.enforce),
            Hold::Enforced => true,
        },
    }
}

/// The rules as a person would read them.
fn meant(rules: &Rules, path: &ControlGroupPath) -> Verdict {
    match (rules.choose(PREFIX, path), path.parent()) {
        (Some(choice), _) => Verdict {
            target: choice.target,
            enforce: choice.enforce,
            undecided: false,
        },
        (None, Some(parent)) => meant(rules, &parent),
        (None, None) => rules.undecided(),
    }
}

/// What the agent is still to hear of a call, which it made with this configuration.
enum Reply {
    /// It was carried out, but for what was passed over.
    Done(Call, Rc<Source>, Vec<(ControlGroupPath, SkipReason)>),
    /// It was refused.
    Refused(Call, Rc<Source>),
    /// There is not so much room.
    TooMany,
}

#[derive(Debug, Clone)]
enum Event {
    /// On disk; the agent hears of it later.
    Make(ControlGroupPath),
    Unmake(ControlGroupPath),
    /// The agent hears of the next so many events.
    Hear(usize),
    /// The agent says what there is to say, and the helper carries it out.
    Send,
    /// The agent hears the answer.
    Receive,
    /// The helper carries nothing out, and says so when it is heard.
    Refuse,
    /// The connection is lost, or the agent starts anew; the kernel goes on.
    Lose,
    /// Events were lost.
    Rescan,
    /// Another configuration.
    Replace(Rc<Rules>),
}

/// A user's, or the system's.
fn any_rules(users: bool) -> impl Strategy<Value = Rc<Rules>> {
    let target = || {
        (0u8..4).prop_map(|number| match number {
            0 => Target::Direct,
            1 => Target::Drop,
            2 => Target::DropAll,
            _ => Target::Proxy(Rc::new("p".parse().unwrap())),
        })
    };
    let pattern = "(\\^/user\\.slice/user-5\\.slice/user@5\\.service)?\
        (/|a|b|x|\\.s|\\.\\*|[ab]\\+|\\.slice){0,3}(/|\\$|\\.\\*\\$)?";
    let names = |kind: fn(Names) -> Selector| {
        "(a|b|x)?\\*?(\\.slice)?".prop_map(move |name| kind(Names::new(vec![name])))
    };
    let selector = prop_oneof![
        4 => pattern.prop_filter_map("no expression", |pattern| {
            Some(Selector::Match(Pattern::new(&pattern).ok()?))
        }),
        1 => names(Selector::Unit),
        1 => names(Selector::Slice),
        1 => names(Selector::App),
    ];
    let rules = proptest::collection::vec(
        (selector, target(), any::<bool>()).prop_map(|(selector, target, enforce)| Rule {
            selector,
            target,
            enforce,
            line: 1,
        }),
        0..4,
    );
    (rules, any::<bool>()).prop_map(move |(mut rules, exec)| {
        let proxies = ["p", "p-a"].map(|name| Rc::new(name.parse().unwrap()));
        for rule in &mut rules {
            rule.enforce &= !users;
        }
        Rc::new(Rules {
            users,
            exec_slices: (users && exec).then(|| ExecSlices::new(&proxies)),
            rules,
            start: Start::Closed,
        })
    })
}

fn any_path() -> impl Strategy<Value = ControlGroupPath> {
    let name = "[abx](\\.slice)?|app-a-1\\.scope";
    let plain = proptest::collection::vec(name, 1..4).prop_map(|names| names.join("/"));
    let exec = "cgtproxy\\.slice(/cgtproxy-(drop|p)\\.slice(/cgtproxy-p-a\\.slice)?(/[ab])?)?";
    prop_oneof![4 => plain, 1 => exec].prop_map(|path| ControlGroupPath::from_wire(&path).unwrap())
}

fn any_event(users: bool) -> impl Strategy<Value = Event> {
    prop_oneof![
        8 => any_path().prop_map(Event::Make),
        3 => any_path().prop_map(Event::Unmake),
        6 => (1usize..6).prop_map(Event::Hear),
        5 => Just(Event::Send),
        5 => Just(Event::Receive),
        2 => Just(Event::Refuse),
        1 => Just(Event::Lose),
        2 => Just(Event::Rescan),
        2 => any_rules(users).prop_map(Event::Replace),
    ]
}

fn any_history() -> impl Strategy<Value = (Rc<Rules>, Vec<Event>)> {
    any::<bool>().prop_flat_map(|users| {
        let events = proptest::collection::vec(any_event(users), 0..80);
        (any_rules(users), events)
    })
}

/// A configuration with these rules.
fn source(rules: Rc<Rules>) -> Source {
    let config = Config {
        rules,
        ..Config::without_file(Scope::User)
    };
    Source { config, file: None }
}

/// Looks at everything, since events were lost.
fn scan(state: &mut State, disk: &Disk) {
    let known = state.tree().iter();
    let gone: Vec<_> = known
        .filter(|path| !disk.contains_key(*path))
        .cloned()
        .collect();
    for path in gone {
        state.removed(&path);
    }
    for path in disk.keys() {
        state.added(path.clone());
    }
    state.lost_track();
}

/// The next call, as a session makes it.
fn next_call(state: &mut State) -> Option<(Call, Rc<Source>)> {
    state.try_postponed();
    let source = state.source().clone();
    Some((state.next_call()?, source))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn nothing_leaves_before_its_verdict(
        (first, events) in any_history(),
        limit in 200usize..2000,
        most in prop_oneof![Just(1000), 1usize..12],
    ) {
        let root = ControlGroupPath::root();
        let subtree = Subtree::of_user("/sys/fs/cgroup".into(), 5).unwrap();
        let mut state = State::new(subtree, source(first), None);
        state.ledger_mut().limit = limit;
        let mut disk = Disk::from([(root.clone(), 0)]);
        let mut kernel = Kernel::default();
        // What the kernel's elements were made of; none before the agent has said anything.
        let mut in_force: Option<Rc<Rules>> = None;
        let mut identity = 0;
        let mut unheard: VecDeque<(bool, ControlGroupPath)> = VecDeque::new();
        let mut reply = None;
        state.added(root);
        let settle = [Event::Receive, Event::Hear(1000), Event::Send, Event::Receive];
        let rounds = std::iter::repeat_n(settle, 60).flatten();
        for event in events.into_iter().chain(rounds) {
            match event {
                Event::Make(path) => {
                    let mut missing: Vec<_> = std::iter::successors(Some(path), |path| path.parent())
                        .take_while(|path| !disk.contains_key(path))
                        .collect();
                    while let Some(path) = missing.pop() {
                        identity += 1;
                        disk.insert(path.clone(), identity);
                        unheard.push_back((true, path));
                    }
                }
                Event::Unmake(path) => {
                    let gone: Vec<_> = disk.keys().filter(|other| other.is_within(&path)).cloned().collect();
                    for path in gone.into_iter().rev() {
                        disk.remove(&path);
                        unheard.push_back((false, path));
                    }
                }
                Event::Hear(count) => {
                    for _ in 0..count {
                        match unheard.pop_front() {
                            Some((true, path)) => _ = state.added(path),
                            Some((false, path)) => _ = state.removed(&path),
                            None => {}
                        }
                    }
                }
                Event::Send => {
                    if let Some((call, source)) = next_call(&mut state) {
                        if !kernel.has_room(&call, most) {
                            reply = Some(Reply::TooMany);
                            continue;
                        }
                        if matches!(call, Call::Replace(_)) {
                            in_force = Some(source.config.rules.clone());
                        }
                        let skipped = kernel.carry_out(&call, &disk);
                        reply = Some(Reply::Done(call, source, skipped));
                    }
                }
                Event::Receive => match reply.take() {
                    Some(Reply::Done(call, source, skipped)) => {
                        state.acknowledged(&call, 1, skipped, &source);
                    }
                    Some(Reply::Refused(call, source)) => {
                        state.refused(&call, "no", false, &source);
                    }
                    // Nobody says too much twice.
                    Some(Reply::TooMany) => assert!(state.bound(most)),
                    None => {}
                },
                Event::Refuse => {
                    if let Some((call, source)) = next_call(&mut state) {
                        reply = Some(Reply::Refused(call, source));
                    }
                }
                Event::Lose => {
                    reply = None;
                    state.disconnected("lost".to_owned());
                }
                Event::Rescan => {
                    unheard.clear();
                    scan(&mut state, &disk);
                }
                Event::Replace(rules) => {
                    state.replace_config(source(rules));
                }
            }
            if let Some(rules) = &in_force {
                for path in disk.keys() {
                    let meant = meant(rules, path);
                    prop_assert!(
                        has_or_holds(&kernel, path, &disk, &meant, rules),
                        "{:?} of {:?}: {:?}", path, kernel.held, meant
                    );
                }
            }
        }
        prop_assert!(state.is_settled());
        prop_assert_eq!(state.ledger().shortage().is_none(), state.tree().cover().count() <= most);
        if state.ledger().shortage().is_some() {
            prop_assert_eq!(kernel.held.len(), most);
            return Ok(());
        }
        // And in the end nobody is held for whom there is room.
        for path in disk.keys() {
            let meant = meant(state.tree().rules(), path);
            let has = kernel.element(path, &disk);
            let free = has.as_ref().is_none_or(|element| element.hold == Hold::None);
            prop_assert!(free, "{:?}", path);
            let verdict = has.map_or_else(|| state.tree().rules().undecided(), |element| element.verdict);
            prop_assert_eq!(&verdict, &meant, "{:?}", path);
            prop_assert_eq!(state.ledger().held_target(path), Some(meant.target));
        }
    }
}
