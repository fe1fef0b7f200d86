//! What changes at the start, between the steps of it.

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;

use cgtproxy_proto::helper::SkipReason;
use tempfile::TempDir;

use super::directory::WorkingDirectory;
use super::inotify::Event;
use super::run::{LOOKS, Sources};
use super::*;
use crate::config::{self, Monitor, Scope};
use crate::ledger::Call;
use crate::state::{Agent, Source};
use crate::subtree::Subtree;

// The bounds are of such builds.
#[cfg(all(debug_assertions, target_arch = "x86_64"))]
mod counts;
mod model;

/// An agent that drops `drop-…`, and knows what is in its subtree but watches nothing below that yet.
struct Start {
    root: TempDir,
    agent: Agent,
    watcher: Watcher,
    /// Where the watches' events come from: they are not read.
    sources: Sources,
}

impl Start {
    fn with(paths: &[&str]) -> Self {
        let root = tempfile::tempdir().unwrap();
        let groups = root.path().join("groups");
        for path in paths {
            std::fs::create_dir_all(groups.join(path)).unwrap();
        }
        std::fs::create_dir(root.path().join("removed")).unwrap();
        let subtree = Subtree::of_machine(groups);
        let text = b"version: 1\nrules: [{match: '/drop-[^/]*$', drop: true}]\n";
        let loaded = config::parse(Path::new("config.yaml"), text, Scope::User).unwrap();
        let source = Source {
            config: loaded.config,
            file: None,
        };
        let agent = Agent::new(subtree.clone(), source, None);
        let (sources, mut watcher) = open(subtree, Monitor::Inotify);
        // The working directory is that of all tests.
        watcher.working_directory = WorkingDirectory::fixed();
        watcher.discover(&mut *agent.state_mut());
        Self {
            root,
            agent,
            watcher,
            sources,
        }
    }

    fn make(&self, path: &str) {
        std::fs::create_dir(self.root.path().join(path)).unwrap();
    }

    fn rename(&self, from: &str, to: &str) {
        let root = self.root.path();
        std::fs::rename(root.join(from), root.join(to)).unwrap();
    }

    /// Puts it where nobody looks, with its inode, which no other gets meanwhile.
    fn remove(&self, path: &str) {
        self.rename(path, &format!("removed/{}", path.replace('/', "-")));
    }

    /// Another one at the same path.
    fn make_again(&self, path: &str) {
        self.remove(path);
        self.make(path);
    }

    /// Takes the events in inotify's queue.
    fn hear(&mut self) {
        let events = self.events();
        self.take(events);
    }

    fn events(&self) -> Vec<Event> {
        self.watcher.watches.as_ref().unwrap().fetch().unwrap()
    }

    fn take(&mut self, events: Vec<Event>) {
        self.watcher.take(events, &mut *self.agent.state_mut());
    }

    fn look(&mut self, path: &str) {
        let path = ControlGroupPath::from_wire(path).unwrap();
        self.watcher.look(&path, &mut *self.agent.state_mut());
    }

    fn in_force(&self, path: &str) -> bool {
        let path = ControlGroupPath::from_wire(path).unwrap();
        self.agent.state().in_force(&path)
    }

    /// Looks at so many of those that wait for it.
    fn look_at(&mut self, count: usize) -> bool {
        let mut state = self.agent.state_mut();
        self.watcher.look_at_pending(count, &mut *state)
    }

    /// Looks at everything that is still to be looked at.
    fn watch(&mut self) {
        while self.look_at(1) {}
        assert!(self.watcher.noted.is_empty());
    }

    /// What is said to the helper, which passes over these as missing.
    fn said(&self, missing: &[&str]) -> Vec<String> {
        let mut state = self.agent.state_mut();
        let Some(call) = state.next_call() else {
            return Vec::new();
        };
        let path = |path: &&str| ControlGroupPath::from_wire(path).unwrap();
        let skipped = missing.iter().map(|p| (path(p), SkipReason::missing));
        let source = Rc::clone(state.source());
        state.acknowledged(&call, 1, skipped.collect(), &source);
        let (assign, remove) = match call {
            Call::Replace(assign) => (assign, Vec::new()),
            Call::Update { assign, remove } => (assign, remove),
        };
        let assigned = assign.iter().map(|(path, _)| path.to_wire());
        let removed = remove.iter().map(|path| format!("-{}", path.to_wire()));
        assigned.chain(removed).collect()
    }
}

#[tokio::test]
async fn one_made_again_before_what_it_is_in_is_watched_is_assigned_again() {
    let mut start = Start::with(&["a/drop-1", "a/drop-2", "b/c/drop-3"]);
    assert_eq!(start.said(&[]), ["a/drop-1", "a/drop-2", "b/c/drop-3"]);
    start.make_again("groups/a/drop-1");
    start.make_again("groups/b/c/drop-3");
    start.watch();
    assert_eq!(start.said(&[]), ["a/drop-1", "b/c/drop-3"]);
    start.watcher.scan(&mut *start.agent.state_mut());
    assert_eq!(start.said(&[]), [] as [&str; 0]);
}

#[tokio::test]
async fn one_that_was_missing_is_assigned_when_it_is_back() {
    let mut start = Start::with(&["a/drop-1", "a/drop-2"]);
    start.remove("groups/a/drop-1");
    assert_eq!(start.said(&["a/drop-1"]), ["a/drop-1", "a/drop-2"]);
    start.make("groups/a/drop-1");
    start.watch();
    assert_eq!(start.said(&[]), ["a/drop-1"]);
}

#[tokio::test]
async fn one_that_is_back_only_after_its_directory_was_listed_is_assigned_again() {
    let mut start = Start::with(&["a/drop-1", "a/drop-2"]);
    start.said(&[]);
    start.remove("groups/a/drop-1");
    // What it is in, and nothing more: that is watched from then on.
    start.look_at(1);
    start.make("groups/a/drop-1");
    start.hear();
    start.watch();
    assert_eq!(start.said(&[]), ["a/drop-1"]);
}

#[tokio::test]
async fn one_in_another_that_was_made_again_is_assigned_again() {
    let mut start = Start::with(&["a/b/drop-1", "a/b/drop-2"]);
    start.said(&[]);
    start.make_again("groups/a/b");
    start.make("groups/a/b/drop-1");
    start.watch();
    assert_eq!(start.said(&[]), ["a/b/drop-1", "-a/b/drop-2"]);
}

#[tokio::test]
async fn what_is_looked_at_as_a_whole_first_is_no_exception() {
    let mut start = Start::with(&["a/drop-1", "a/drop-2"]);
    start.said(&[]);
    start.make_again("groups/a/drop-1");
    start.watcher.scan(&mut *start.agent.state_mut());
    assert_eq!(start.said(&[]), ["a/drop-1"]);
    start.watch();
    assert_eq!(start.said(&[]), [] as [&str; 0]);
}

#[tokio::test]
async fn without_watches_the_inode_that_was_noted_counts() {
    let mut start = Start::with(&["a/drop-1", "a/drop-2"]);
    start.said(&[]);
    start.watcher.replace_watches(None);
    // What it is in, and nothing more.
    start.look_at(1);
    start.make_again("groups/a/drop-1");
    start.watch();
    assert_eq!(start.said(&[]), ["a/drop-1"]);
}

/// No event tells of it.
#[tokio::test]
async fn without_watches_one_made_again_after_its_directory_was_listed_is_assigned_again() {
    let mut start = Start::with(&["a"]);
    start.watch();
    start.said(&[]);
    start.watcher.replace_watches(None);
    start.make("groups/a/b");
    start.make("groups/a/b/drop-1");
    start
        .watcher
        .pending
        .push_back(ControlGroupPath::from_wire("a/b").unwrap());
    // What it is in, and nothing more.
    start.look_at(1);
    assert_eq!(start.said(&[]), ["a/b/drop-1"]);
    start.make_again("groups/a/b/drop-1");
    start.watch();
    assert_eq!(start.said(&[]), ["a/b/drop-1"]);
}

#[tokio::test]
async fn what_is_in_a_directory_that_was_made_again_is_not_in_force_by_what_was_said_before() {
    let mut start = Start::with(&["a/drop-1/b"]);
    start.watch();
    assert_eq!(start.said(&[]), ["a/drop-1"]);
    assert!(start.in_force("a/drop-1/b"));
    // The events of this are not read.
    start.make_again("groups/a/drop-1");
    start.make("groups/a/drop-1/c");
    start.look("a/drop-1/c");
    assert!(!start.in_force("a/drop-1/c"));
    let gone = ControlGroupPath::from_wire("a/drop-1/b").unwrap();
    assert!(!start.agent.state().tree().contains(&gone));
    assert_eq!(start.said(&[]), ["a/drop-1"]);
    assert!(start.in_force("a/drop-1/c"));
}

#[tokio::test]
async fn word_that_one_is_gone_is_not_about_another_that_was_seen_since() {
    let mut start = Start::with(&["a/drop-1"]);
    start.watch();
    start.said(&[]);
    start.make_again("groups/a/drop-1");
    start.look("a/drop-1");
    assert_eq!(start.said(&[]), ["a/drop-1"]);
    start.hear();
    start.watch();
    assert_eq!(start.said(&[]), [] as [&str; 0]);
    start.remove("groups/a/drop-1");
    start.hear();
    assert_eq!(start.said(&[]), ["-a/drop-1"]);
}

#[tokio::test]
async fn one_made_again_before_it_is_watched_is_not_in_force_by_what_was_said_before() {
    let mut start = Start::with(&["a"]);
    start.watch();
    start.said(&[]);
    start.make("groups/a/drop-1");
    start.hear();
    assert_eq!(start.said(&[]), ["a/drop-1"]);
    // It is told of, and not watched yet. The events of this are not read.
    start.make_again("groups/a/drop-1");
    start.look("a/drop-1");
    assert!(!start.in_force("a/drop-1"));
    assert_eq!(start.said(&[]), ["a/drop-1"]);
    assert!(start.in_force("a/drop-1"));
    start.hear();
    start.watch();
    assert_eq!(start.said(&[]), [] as [&str; 0]);
    assert!(start.in_force("a/drop-1"));
}

#[tokio::test]
async fn nothing_is_in_force_by_what_was_said_before_events_were_lost() {
    let mut start = Start::with(&["a/drop-1"]);
    start.watch();
    assert_eq!(start.said(&[]), ["a/drop-1"]);
    assert!(start.in_force("a/drop-1"));
    let lost = Hint::LostTrack;
    start.watcher.hint(lost, &mut *start.agent.state_mut());
    assert!(!start.in_force("a/drop-1"));
    assert_eq!(start.said(&[]), ["a/drop-1"]);
    assert!(start.in_force("a/drop-1"));
}

#[tokio::test]
async fn one_made_again_before_it_is_watched_is_not_in_force_where_events_are_lost() {
    let mut start = Start::with(&["a/drop-1"]);
    assert_eq!(start.said(&[]), ["a/drop-1"]);
    start.make_again("groups/a/drop-1");
    let lost = Hint::LostTrack;
    start.watcher.hint(lost, &mut *start.agent.state_mut());
    start.look("a/drop-1");
    assert!(!start.in_force("a/drop-1"));
    assert_eq!(start.said(&[]), ["a/drop-1"]);
    assert!(start.in_force("a/drop-1"));
}

/// One user could have the machine's agent grow without end.
#[tokio::test]
async fn what_is_gone_before_it_was_looked_at_waits_no_more() {
    let mut start = Start::with(&["a"]);
    start.watch();
    for name in ["b", "c", "b"] {
        start.make(&format!("groups/a/{name}"));
        start.hear();
        assert_eq!(start.watcher.pending.iter().count(), 1);
        start.remove(&format!("groups/a/{name}"));
        std::fs::remove_dir(start.root.path().join(format!("removed/groups-a-{name}"))).unwrap();
        start.hear();
        assert!(start.watcher.pending.is_empty());
    }
}

/// Who waits for a verdict waits for no second call.
#[tokio::test]
async fn one_that_is_looked_at_before_it_is_watched_is_said_once() {
    let mut start = Start::with(&["a"]);
    start.watch();
    start.said(&[]);
    start.make("groups/a/drop-1");
    start.hear();
    assert_eq!(start.said(&[]), ["a/drop-1"]);
    start.look("a/drop-1");
    assert!(start.in_force("a/drop-1"));
    assert_eq!(start.said(&[]), [] as [&str; 0]);
}

/// Who tells the helper and who answers need not wait until everything is watched.
#[tokio::test]
async fn others_have_their_turn_between_what_is_watched() {
    const COUNT: usize = 20 * LOOKS;
    let paths: Vec<_> = (0..COUNT).map(|number| format!("a/{number}")).collect();
    let paths: Vec<_> = paths.iter().map(String::as_str).collect();
    let start = Start::with(&paths);
    let (agent, watcher) = (start.agent, RefCell::new(start.watcher));
    let mut turns = 0;
    let others = async {
        while !watcher.borrow().pending.is_empty() {
            turns += 1;
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        biased;
        () = start.sources.run(&watcher, &agent) => {}
        () = others => {}
    }
    assert!(turns >= COUNT / LOOKS, "{turns} turns");
}

#[tokio::test]
async fn nobody_is_woken_by_what_is_known() {
    let mut start = Start::with(&["a/drop-1"]);
    start.agent.wake_if_news();
    let changed = start.agent.subscribe();
    start.watch();
    start.agent.wake_if_news();
    assert!(!changed.has_changed().unwrap());
    start.make_again("groups/a/drop-1");
    let path = ControlGroupPath::from_wire("a/drop-1").unwrap();
    start.watcher.look(&path, &mut *start.agent.state_mut());
    start.agent.wake_if_news();
    assert!(changed.has_changed().unwrap());
}

/// That is where service managers make others.
#[tokio::test]
async fn what_has_others_in_it_is_watched_first() {
    let mut start = Start::with(&["a", "b/c", "b/d/e", "b/f", "g"]);
    start.look_at(2);
    let watched = |path| {
        let path = ControlGroupPath::from_wire(path).unwrap();
        start.watcher.is_watched(&path)
    };
    assert_eq!(
        ["b", "b/d", "a", "g"].map(watched),
        [true, true, false, false]
    );
}
