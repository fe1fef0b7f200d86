//! How often the machine is looked at, whoever asks.

use super::*;
use crate::kernel::model::{Bed, Model};

#[test]
fn the_machine_is_looked_at_once_a_second_at_most() {
    let bed = Bed::new().unwrap();
    let kernel = Model::default();
    let mut state = State::new(
        bed.config.clone(),
        bed.root.clone(),
        kernel.clone(),
        Snapshot::nowhere(),
        BTreeMap::new(),
    )
    .unwrap()
    .0;
    let begun = Instant::now();
    for _ in 0..10_000 {
        state.diagnose();
    }
    // One more for every second that this took.
    let most = 1 + begun.elapsed().as_secs();
    let looks = kernel.looks.get();
    assert!((1..=most).contains(&looks.into()), "{looks}");
    // What was found a second ago does not hold any more.
    if let Some((until, _)) = &mut state.diagnosis {
        *until = Instant::now();
    }
    state.diagnose();
    assert_eq!(kernel.looks.get(), looks + 1);
    // The longer it took, the longer it holds.
    kernel.look_takes.set(DIAGNOSIS_HOLDS.0 / 4);
    if let Some((until, _)) = &mut state.diagnosis {
        *until = Instant::now();
    }
    state.diagnose();
    let (until, _) = state.diagnosis.as_ref().unwrap();
    let holds = until.saturating_duration_since(Instant::now());
    assert!(holds > DIAGNOSIS_HOLDS.0 * 4, "{holds:?}");
}
