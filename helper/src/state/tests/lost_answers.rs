//! What the kernel answers can be lost (ENOBUFS, when memory is short), and with it whether a change was made. What
//! the helper knows is what the kernel has all the same, as soon as it hears from it again.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::kernel::model::{Bed, Model};
use crate::nft::{Bypass, Element, Enforced, Verdict};

#[derive(Debug, Clone)]
enum Call {
    Replace(Vec<bool>),
    Update(Vec<bool>, Vec<usize>),
    Remove,
}

const NAMES: [&str; 3] = ["app.slice", "app.slice/a.scope", "app.slice/b.scope"];

fn call() -> impl Strategy<Value = Call> {
    let verdicts = || proptest::collection::vec(any::<bool>(), 0..=NAMES.len());
    prop_oneof![
        verdicts().prop_map(Call::Replace),
        (
            verdicts(),
            proptest::collection::vec(0..NAMES.len(), 0..=NAMES.len())
        )
            .prop_map(|(assign, remove)| Call::Update(assign, remove)),
        Just(Call::Remove),
    ]
}

fn path(index: usize) -> ControlGroupPath {
    ControlGroupPath::from_wire(NAMES[index]).unwrap()
}

/// A verdict for the first of the names: dropped or direct.
fn elements(verdicts: Vec<bool>) -> BTreeMap<ControlGroupPath, Element> {
    let element = |drop| Element {
        verdict: if drop { Verdict::Drop } else { Verdict::Direct },
        hold: false,
        enforced: Enforced::Nothing,
    };
    let verdicts = verdicts.into_iter().enumerate();
    verdicts
        .map(|(index, drop)| (path(index), element(drop)))
        .collect()
}

fn do_call(state: &mut State<Model>, bed: &Bed, call: Call) -> Result<(), Error> {
    let connection = ConnectionId(1);
    match call {
        Call::Replace(verdicts) => {
            let policy = PolicyRequest {
                subtree: bed.subtree.top(),
                proxies: Vec::new(),
                bypass_entries: 0,
                bypass: Bypass::default(),
                gateway: None,
            };
            let elements = elements(verdicts);
            state.replace(bed.uid, connection, &bed.subtree, policy, elements)?;
        }
        Call::Update(assign, remove) => {
            let remove: BTreeSet<_> = remove.into_iter().map(path).collect();
            state.update(bed.uid, connection, &bed.subtree, elements(assign), remove)?;
        }
        Call::Remove => state.remove(bed.uid, connection)?,
    }
    Ok(())
}

/// What the kernel refuses is written down before it is asked.
#[test]
fn refusals_do_not_fill_the_snapshot() {
    let bed = Bed::new().unwrap();
    let kernel = Model::default();
    let memory = crate::snapshot::Memory::default();
    let (snapshot, _) = Snapshot::in_memory(&memory, bed.config.marks);
    let (config, root) = (bed.config.clone(), bed.root.clone());
    let (mut state, _) =
        State::new(config, root, kernel.clone(), snapshot, BTreeMap::new()).unwrap();
    for _ in 0..10_000 {
        kernel.refuse.set(true);
        let refused = do_call(&mut state, &bed, Call::Replace(vec![true]));
        assert!(matches!(refused, Err(Error::Kernel(_))));
        assert!(!state.snapshot.is_long());
    }
}

/// Whoever is to hear of it hears of it later, or not at all.
#[test]
fn a_table_that_is_found_to_be_gone_is_made_anew() {
    let bed = Bed::new().unwrap();
    bed.make("a.scope");
    let kernel = Model::default();
    let (config, root) = (bed.config.clone(), bed.root.clone());
    let nowhere = Snapshot::nowhere();
    let (mut state, _) =
        State::new(config, root, kernel.clone(), nowhere, BTreeMap::new()).unwrap();
    do_call(&mut state, &bed, Call::Replace(vec![true])).unwrap();
    kernel.flush();
    let update = Call::Update(vec![true, true], Vec::new());
    let refused = do_call(&mut state, &bed, update.clone());
    assert!(matches!(refused, Err(Error::Kernel(_))));
    assert_eq!(kernel.table.borrow().of(bed.uid).unwrap().elements.len(), 1);
    do_call(&mut state, &bed, update).unwrap();
    assert_eq!(kernel.table.borrow().of(bed.uid).unwrap().elements.len(), 2);
    assert!(!state.restore_lost_table().unwrap());
    kernel.flush();
    assert!(state.restore_lost_table().unwrap());
    assert_eq!(kernel.table.borrow().of(bed.uid).unwrap().elements.len(), 2);
}

proptest! {
    #[test]
    fn leave_no_difference(
        calls in proptest::collection::vec(
            (call(), proptest::collection::vec(any::<Option<bool>>(), 0..3)),
            1..12,
        )
    ) {
        let bed = Bed::new().unwrap();
        bed.make("a.scope");
        bed.make("b.scope");
        let kernel = Model::default();
        let (mut state, _) =
            State::new(bed.config.clone(), bed.root.clone(), kernel.clone(), Snapshot::nowhere(), BTreeMap::new()).unwrap();
        for (call, answers) in calls {
            *kernel.lose.borrow_mut() = answers.into();
            // The model panics at a change that does not fit what is there.
            let result = do_call(&mut state, &bed, call);
            let heard = kernel.lose.borrow().iter().all(Option::is_none);
            kernel.lose.borrow_mut().clear();
            if matches!(result, Err(Error::Kernel(_))) || !heard {
                // Whatever comes next sees to it first.
                let _ = state.rebuild_if_doubtful();
            }
            let table = kernel.table.borrow();
            let there = table.of(bed.uid).map(|o| (&o.layout, o.elements.len()));
            let known = state.registry().policy(bed.uid);
            prop_assert_eq!(known.map(|policy| (policy.layout, policy.cgroups)), there);
        }
    }
}
