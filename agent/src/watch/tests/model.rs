//! In whichever order control groups come and go, events are read and calls are made, the helper has each one's element
//! in the end, and no answer says so before.

use std::collections::{BTreeMap, VecDeque};
use std::os::unix::fs::MetadataExt;

use cgtproxy_proto::helper::SkipReason;
use proptest::prelude::*;

use super::*;

const PATHS: [&str; 4] = ["a", "a/drop-1", "a/drop-1/b", "drop-2"];

#[derive(Debug, Clone, Copy)]
enum Step {
    Make(&'static str),
    Remove(&'static str),
    /// Another one at the same path.
    Again(&'static str),
    /// The next so many events are taken.
    Hear(usize),
    /// More has happened than fits into the queue.
    Overflow,
    /// So many of those that wait for it are looked at.
    Pending(usize),
    /// Somebody asks whether it is in force: what [`Watcher::look`] does, with the events that are in the queue.
    Look(&'static str),
    Scan,
    /// The agent says what there is to say, and the helper carries it out.
    Send,
    /// The agent hears the answer.
    Receive,
    /// Nothing happens until all is in order.
    Settle,
}

fn any_step() -> impl Strategy<Value = Step> {
    let path = || proptest::sample::select(&PATHS[..]);
    prop_oneof![
        4 => path().prop_map(Step::Make),
        2 => path().prop_map(Step::Remove),
        4 => path().prop_map(Step::Again),
        4 => (1usize..4).prop_map(Step::Hear),
        2 => Just(Step::Hear(usize::MAX)),
        1 => Just(Step::Overflow),
        2 => (1usize..3).prop_map(Step::Pending),
        4 => path().prop_map(Step::Look),
        1 => Just(Step::Scan),
        5 => Just(Step::Send),
        5 => Just(Step::Receive),
        2 => Just(Step::Settle),
    ]
}

/// A call that the helper has carried out, with what it passed over, by this configuration.
type Answered = (Call, Vec<(ControlGroupPath, SkipReason)>, Rc<Source>);

struct Model {
    start: Start,
    removed: usize,
    /// In the queue.
    events: VecDeque<Event>,
    /// The inodes of the control groups that have an element.
    kernel: BTreeMap<ControlGroupPath, u64>,
    answered: Option<Answered>,
}

impl Model {
    fn inode(&self, path: &ControlGroupPath) -> Option<u64> {
        let directory = self.start.watcher.subtree.directory(path);
        std::fs::metadata(directory).ok().map(|found| found.ino())
    }

    fn exists(&self, path: &str) -> bool {
        self.inode(&at(path)).is_some()
    }

    fn make(&self, path: &str) {
        let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
        if self.exists(parent) && !self.exists(path) {
            self.start.make(&format!("groups/{path}"));
        }
    }

    /// Removes it and all below.
    fn remove(&mut self, path: &str) {
        let within = |other: &&str| at(other).is_within(&at(path));
        for path in PATHS.into_iter().rev().filter(within) {
            if self.exists(path) {
                self.removed += 1;
                let to = format!("removed/{}", self.removed);
                self.start.rename(&format!("groups/{path}"), &to);
            }
        }
    }

    fn read(&mut self) {
        self.events.extend(self.start.events());
    }

    fn hear(&mut self, count: usize) {
        self.read();
        let count = count.min(self.events.len());
        let events = Vec::from_iter(self.events.drain(..count));
        self.start.take(events);
    }

    fn is_known(&self, path: &str) -> bool {
        self.start.watcher.groups.contains_key(&at(path))
    }

    fn look_down_to(&mut self, path: &str) {
        let mut state = self.start.agent.state_mut();
        self.start.watcher.look_down_to(&at(path), &mut *state);
    }

    fn send(&mut self) {
        let mut state = self.start.agent.state_mut();
        if self.answered.is_some() {
            return;
        }
        let Some(call) = state.next_call() else {
            return;
        };
        let source = Rc::clone(state.source());
        drop(state);
        let (assign, remove) = match &call {
            Call::Replace(assign) => {
                self.kernel.clear();
                (assign, &Vec::new())
            }
            Call::Update { assign, remove } => (assign, remove),
        };
        for path in remove {
            self.kernel.remove(path);
        }
        let mut skipped = Vec::new();
        for (path, _) in assign {
            match self.inode(path) {
                Some(inode) => _ = self.kernel.insert(path.clone(), inode),
                None => {
                    self.kernel.remove(path);
                    skipped.push((path.clone(), SkipReason::missing));
                }
            }
        }
        self.answered = Some((call, skipped, source));
    }

    fn receive(&mut self) {
        if let Some((call, skipped, source)) = self.answered.take() {
            let mut state = self.start.agent.state_mut();
            state.acknowledged(&call, 1, skipped, &source);
        }
    }

    /// Whether the kernel drops what a control group sends.
    fn drops(&self, path: &ControlGroupPath) -> bool {
        let mut all = std::iter::successors(Some(path.clone()), ControlGroupPath::parent);
        all.any(|path| {
            let inode = self.inode(&path);
            inode.is_some() && inode.as_ref() == self.kernel.get(&path)
        })
    }

    fn settle(&mut self) {
        for _ in 0..8 {
            self.hear(usize::MAX);
            self.start.look_at(usize::MAX);
            self.send();
            self.receive();
        }
        let state = self.start.agent.state();
        assert!(state.is_settled());
        for path in PATHS {
            let (exists, path) = (self.exists(path), at(path));
            assert_eq!(state.tree().contains(&path), exists, "{path:?} is known");
            assert_eq!(
                self.start.watcher.is_watched(&path),
                exists,
                "{path:?} is watched"
            );
            assert_eq!(state.in_force(&path), exists, "{path:?} is in force");
            self.check(&path);
        }
    }

    /// The verdict of one that is said to be in force is in the kernel.
    fn check(&self, path: &ControlGroupPath) {
        if self.start.agent.state().in_force(path) {
            let drop = path.to_wire().contains("drop-");
            assert_eq!(self.drops(path), drop, "{path:?}");
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Make(path) => self.make(path),
            Step::Remove(path) => self.remove(path),
            Step::Again(path) => {
                self.remove(path);
                self.make(path);
            }
            Step::Hear(count) => self.hear(count),
            Step::Overflow => {
                self.read();
                self.events.clear();
                let mut state = self.start.agent.state_mut();
                self.start.watcher.hint(Hint::LostTrack, &mut *state);
            }
            Step::Pending(count) => _ = self.start.look_at(count),
            Step::Look(path) => {
                self.look_down_to(path);
                let found = self.is_known(path);
                self.hear(usize::MAX);
                if found && !self.is_known(path) {
                    self.look_down_to(path);
                }
                self.check(&at(path));
            }
            Step::Scan => {
                let mut state = self.start.agent.state_mut();
                self.start.watcher.scan(&mut *state);
            }
            Step::Send => self.send(),
            Step::Receive => self.receive(),
            Step::Settle => self.settle(),
        }
    }
}

fn at(path: &str) -> ControlGroupPath {
    ControlGroupPath::from_wire(path).unwrap()
}

fn run(steps: Vec<Step>) {
    let mut model = Model {
        start: Start::with(&["a/drop-1"]),
        removed: 0,
        events: VecDeque::new(),
        kernel: BTreeMap::new(),
        answered: None,
    };
    for step in steps {
        model.step(step);
    }
    model.settle();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn in_any_order_the_helper_has_in_the_end_what_there_is(
        steps in proptest::collection::vec(any_step(), 0..800),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { run(steps) });
    }
}
