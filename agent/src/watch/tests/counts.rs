//! The agent's hot path from inotify's events to a tree that is watched, whose instructions are counted.

use super::*;
use crate::counter::{counted, within_bound};

/// Applications in slices of their own, as many as one read(2) has events of.
#[tokio::test]
async fn hearing_of_32_among_2000() {
    within_bound(module_path!(), "hearing_of_32_among_2000", || {
        let there: Vec<String> = (0..2000)
            .map(|n| format!("app.slice/a-{n}.scope"))
            .collect();
        let there: Vec<&str> = there.iter().map(String::as_str).collect();
        let mut start = Start::with(&there);
        start.watch();
        let scope = |n| format!("app.slice/part-{n}.slice/drop-{n}");
        for n in 0..32 {
            start.make(&format!("groups/app.slice/part-{n}.slice"));
            start.make(&format!("groups/{}", scope(n)));
        }
        let mut events = Some(start.events());
        counted(&mut || {
            start.take(events.take().unwrap());
            start.watch();
        });
        let watched = |n| {
            let path = ControlGroupPath::from_wire(&scope(n)).unwrap();
            start.watcher.is_watched(&path)
        };
        assert!((0..32).all(watched));
    });
}
