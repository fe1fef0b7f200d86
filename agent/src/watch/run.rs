//! Takes hints from where they come, and looks for what nobody tells of.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep, sleep_until};

use super::dbus::{Follower, Report};
use super::inotify::{Event, Events, Watches};
use super::pace::Pace;
use super::{Error, Watcher};
use crate::config::Monitor;
use crate::state::{Agent, Observer, Watching};
use crate::subtree::Subtree;
use crate::text::{chain, printable};

/// How many directories are looked at before new events are read, so that a burst of new control
/// groups does not keep the next one waiting.
pub(super) const LOOKS: usize = 32;

/// How often everything is looked at while something is not watched.
const RESCAN: Duration = Duration::from_secs(1);

/// The same with systemd's signals.
const RESCAN_SIGNALLED: Duration = Duration::from_secs(5);

/// How soon everything is looked at again at the earliest, when something has happened nearby.
const RESCAN_SOON: Duration = Duration::from_millis(50);

/// How many times as long as it took to look at everything there is a rest, so that looking takes a small part of a
/// processor.
const REST: u32 = 50;

/// The same when something has happened nearby.
const REST_SOON: u32 = 10;

/// How long systemd may take at the start to tell which control groups there are, when nobody else can.
const PATIENCE: Duration = Duration::from_secs(5);

/// How many attempts in a row to reach systemd fail before that is logged.
const LOSSES: u32 = 3;

/// Where hints come from.
pub(crate) struct Sources {
    events: Option<Events>,
    pace: Pace,
    alarm: Alarm,
    follower: Option<Follower>,
    /// systemd has told of everything.
    connected: bool,
    /// Why systemd could not be reached the last time.
    lost: String,
    /// Why inotify could not be used the last time.
    unusable: String,
    /// When everything was looked at the last time, and how long that took.
    looked: (Instant, Duration),
    /// How often in a row systemd could not be reached.
    losses: u32,
}

/// The control groups of a subtree, none of which is known yet, and where word of them comes from.
pub(crate) fn open(subtree: Subtree, monitor: Monitor) -> (Sources, Watcher) {
    let mut watcher = Watcher::new(subtree, monitor);
    let mut sources = Sources {
        events: None,
        pace: Pace::default(),
        alarm: Alarm(None),
        follower: None,
        connected: false,
        lost: String::new(),
        unusable: String::new(),
        looked: (Instant::now(), Duration::ZERO),
        losses: 0,
    };
    sources.open_inotify(&mut watcher);
    (sources, watcher)
}

impl Sources {
    /// Looks at everything for the first time. To be called within a `LocalSet`.
    ///
    /// # Errors
    /// If nobody says which control groups there are.
    pub(crate) async fn start(
        &mut self,
        watcher: &RefCell<Watcher>,
        agent: &Agent,
    ) -> Result<(), Error> {
        if watcher.borrow().watches.is_some() {
            watcher.borrow_mut().discover(&mut *agent.state_mut());
            agent.wake();
        } else {
            self.look_at_everything(watcher, agent);
        }
        self.update_sources(watcher, agent);
        if !watcher.borrow().blind {
            return Ok(());
        }
        // A policy without what is there already would take away what a former agent has in force.
        let patience = sleep(if self.follower.is_some() {
            PATIENCE
        } else {
            Duration::ZERO
        });
        tokio::pin!(patience);
        while !self.connected {
            tokio::select! {
                report = next_report(self.follower.as_mut()) => self.take(report, watcher, agent),
                () = &mut patience => break,
            }
        }
        if !self.connected {
            let root = watcher.borrow().subtree.root().display().to_string();
            let why = match watcher.borrow().monitor {
                Monitor::Inotify => "the configuration says 'monitor: inotify'".to_owned(),
                _ if self.lost.is_empty() => "it does not answer".to_owned(),
                _ => self.lost.clone(),
            };
            let root = printable(&root);
            return Err(Error::Blind { root, why });
        }
        self.update_sources(watcher, agent);
        Ok(())
    }

    /// Watches for ever.
    ///
    /// While a call to the helper is under way, events stay in inotify's queue and wake nobody: what they tell goes out
    /// with the next call, and the processors are left to the helper and to those who make control groups.
    pub(crate) async fn run(mut self, watcher: &RefCell<Watcher>, agent: &Agent) {
        let mut changed = agent.subscribe();
        // What is known by now goes out before anything is watched.
        tokio::task::yield_now().await;
        loop {
            self.update_sources(watcher, agent);
            let rescan = self.next_rescan(&watcher.borrow());
            if rescan.is_some_and(|at| at <= Instant::now()) {
                self.rescan(watcher, agent);
                continue;
            }
            let quiet = self.keep_pace(agent);
            if quiet.is_none() && self.fetch(watcher, agent) {
                // What is known by now goes out before the new directories are looked into.
                tokio::task::yield_now().await;
                continue;
            }
            // The helper looks them up first. Then the kernel has them cached, and finds them without waiting for
            // programs that make others in the same directory.
            let idle = quiet.is_some() && agent.is_calling() || watcher.borrow().pending.is_empty();
            tokio::select! {
                biased;
                report = next_report(self.follower.as_mut()) => self.take(report, watcher, agent),
                batch = next_events(self.events.as_mut(), quiet.is_some()) => {
                    match batch {
                        Ok(None) => {}
                        Ok(Some(batch)) => {
                            self.notice(batch, watcher, agent);
                            // As above.
                            tokio::task::yield_now().await;
                        }
                        Err(error) => self.give_up_inotify(&error, watcher, agent),
                    }
                }
                () = self.alarm.goes_off(quiet.into_iter().chain(rescan).min()) => {}
                // There may be another configuration, or the call may be over.
                _ = changed.changed() => {}
                () = std::future::ready(()), if !idle => {}
            }
            if agent.is_calling() && self.keep_pace(agent).is_some() {
                continue;
            }
            let looked = {
                let mut watcher = watcher.borrow_mut();
                watcher.look_at_pending(LOOKS, &mut *agent.state_mut())
            };
            if looked {
                agent.wake_if_news();
                // Others have their turn before more is looked at, whatever else there is to do here.
                tokio::task::yield_now().await;
            }
        }
    }

    /// Until when events are left in inotify's queue from now on.
    fn keep_pace(&mut self, agent: &Agent) -> Option<Instant> {
        let now = Instant::now();
        let left = self.events.as_ref().is_some_and(Events::are_left);
        self.pace.update(agent.is_calling(), left, now);
        self.pace.quiet(now)
    }

    /// Takes events that were left in inotify's queue. False if there are none.
    fn fetch(&mut self, watcher: &RefCell<Watcher>, agent: &Agent) -> bool {
        let Some(events) = self.events.as_mut().filter(|events| events.are_left()) else {
            return false;
        };
        let batch = match events.fetch() {
            Ok(batch) => batch,
            Err(error) => {
                self.give_up_inotify(&error, watcher, agent);
                return false;
            }
        };
        if batch.is_empty() {
            self.pace.nothing_left();
            return false;
        }
        self.notice(batch, watcher, agent);
        true
    }

    /// Takes events from inotify.
    fn notice(&mut self, batch: Vec<Event>, watcher: &RefCell<Watcher>, agent: &Agent) {
        watcher.borrow_mut().take(batch, &mut *agent.state_mut());
        agent.wake();
    }

    /// Takes what systemd says.
    fn take(&mut self, report: Report, watcher: &RefCell<Watcher>, agent: &Agent) {
        match report {
            Report::All(all) => {
                tracing::debug!("systemd tells of {} control groups", all.len());
                self.connected = true;
                self.losses = 0;
                if watcher.borrow().blind {
                    let mut watcher = watcher.borrow_mut();
                    watcher.believe_all(all, &mut *agent.state_mut());
                    drop(watcher);
                    agent.wake();
                } else {
                    self.look_at_everything(watcher, agent);
                }
            }
            Report::Hints(hints) => {
                {
                    let mut watcher = watcher.borrow_mut();
                    let mut state = agent.state_mut();
                    for hint in hints {
                        tracing::trace!("systemd: {hint:?}");
                        watcher.hint(hint, &mut *state);
                    }
                }
                agent.wake();
            }
            Report::Lost(why) => {
                self.connected = false;
                self.losses = self.losses.saturating_add(1);
                // Once, and not while the bus is just starting.
                if self.losses == LOSSES {
                    let why = printable(&why);
                    tracing::warn!("can't follow systemd over D-Bus: {why}; trying again");
                }
                self.lost = why;
            }
        }
    }

    /// Opens and closes inotify and the connection to systemd as the configuration and the circumstances demand, and
    /// updates the status.
    fn update_sources(&mut self, watcher: &RefCell<Watcher>, agent: &Agent) {
        let wanted = agent.state().source().config.monitor;
        if watcher.borrow().monitor != wanted {
            let mut now = watcher.borrow_mut();
            now.monitor = wanted;
            if wanted == Monitor::Dbus {
                now.replace_watches(None);
                // There may be some that nobody has read.
                if self.events.take().is_some() {
                    agent.state_mut().lost_track();
                }
            } else {
                self.open_inotify(&mut now);
            }
            drop(now);
            self.look_at_everything(watcher, agent);
        }
        let needed = watcher.borrow().needs_systemd();
        match (needed, &self.follower) {
            (true, None) => {
                self.losses = 0;
                self.follower = Some(Follower::start(&watcher.borrow().subtree));
            }
            (false, Some(_)) => {
                self.follower = None;
                self.connected = false;
            }
            _ => {}
        }
        let watching = self.watching(&watcher.borrow());
        if agent.state().watching != watching {
            if let Some(problem) = &watching.problem {
                tracing::debug!("watching: {problem}");
            }
            agent.state_mut().watching = watching;
            agent.tell();
        }
    }

    /// Opens inotify, if it is to be used and is not open.
    fn open_inotify(&mut self, watcher: &mut Watcher) {
        if watcher.monitor == Monitor::Dbus || watcher.watches.is_some() {
            return;
        }
        match Watches::open() {
            Ok((events, watches)) => {
                self.events = Some(events);
                watcher.replace_watches(Some(watches));
                watcher.said_unusable = false;
            }
            Err(error) => self.say_unusable(&error, watcher),
        }
    }

    /// Closes inotify, since its events can't be read or waited for. Until it can be opened again, control groups are
    /// looked for.
    fn give_up_inotify(&mut self, error: &io::Error, watcher: &RefCell<Watcher>, agent: &Agent) {
        self.events = None;
        watcher.borrow_mut().replace_watches(None);
        agent.state_mut().lost_track();
        self.say_unusable(error, &mut watcher.borrow_mut());
        self.look_at_everything(watcher, agent);
    }

    fn say_unusable(&mut self, error: &io::Error, watcher: &mut Watcher) {
        self.unusable = chain(error);
        if !std::mem::replace(&mut watcher.said_unusable, true) {
            tracing::warn!(
                "can't use inotify: {}; if that is 'too many open files', raise \
                 fs.inotify.max_user_instances with sysctl; until then control groups are looked at \
                 every now and then",
                self.unusable
            );
        }
    }

    /// Looks at everything again, and whether inotify can be used again.
    fn rescan(&mut self, watcher: &RefCell<Watcher>, agent: &Agent) {
        self.open_inotify(&mut watcher.borrow_mut());
        self.look_at_everything(watcher, agent);
    }

    fn look_at_everything(&mut self, watcher: &RefCell<Watcher>, agent: &Agent) {
        let start = Instant::now();
        watcher.borrow_mut().scan(&mut *agent.state_mut());
        let end = Instant::now();
        self.looked = (end, end - start);
        agent.wake();
    }

    /// When everything is to be looked at again, if at all.
    fn next_rescan(&self, watcher: &Watcher) -> Option<Instant> {
        let incomplete = watcher.is_incomplete();
        if watcher.blind || !incomplete && watcher.monitor != Monitor::Dbus {
            return None;
        }
        let (looked, took) = self.looked;
        let after = match (watcher.hinted && incomplete, self.connected) {
            (true, _) => RESCAN_SOON.max(took * REST_SOON),
            (false, false) => RESCAN.max(took * REST),
            (false, true) => RESCAN_SIGNALLED.max(took * REST),
        };
        Some(looked + after)
    }

    /// How well control groups are noticed.
    fn watching(&self, watcher: &Watcher) -> Watching {
        let mut by = Vec::new();
        if watcher.watches.is_some() && !watcher.blind {
            by.push("inotify");
        }
        if self.connected {
            by.push("dbus");
        }
        let mut problems = Vec::new();
        if watcher.blind {
            problems.push("cgroupfs can't be read".to_owned());
        } else {
            if watcher.monitor != Monitor::Dbus && watcher.watches.is_none() {
                problems.push(format!("inotify can't be used ({})", self.unusable));
            }
            if !watcher.unwatched.is_empty() {
                problems.push(watcher.unwatched_why.clone());
            }
            if !watcher.unlisted.is_empty() {
                problems.push(format!(
                    "control groups can't be listed ({})",
                    watcher.unlisted_why
                ));
            }
        }
        if self.follower.is_some() && !self.connected && !self.lost.is_empty() {
            problems.push(format!(
                "systemd can't be followed over D-Bus ({})",
                printable(&self.lost)
            ));
        }
        let consequence = match (watcher.blind, self.connected) {
            (true, true) => "what units make in their own control groups goes unnoticed",
            (true, false) => "what starts now goes unnoticed",
            (false, true) => "what units make in their own control groups is found within seconds",
            (false, false) => "what starts now is found within seconds",
        };
        let problem =
            (!problems.is_empty()).then(|| format!("{}: {consequence}", problems.join(", and ")));
        Watching { by, problem }
    }
}

/// A timer that may go off too early, but not too late. A timer of its own for each call to the helper, which hardly ever
/// goes off, would cost the runtime three system calls, while the helper may wait for the processor.
struct Alarm(Option<Pin<Box<Sleep>>>);

impl Alarm {
    /// Returns at that time at the latest; never if there is none. Cancel safe.
    async fn goes_off(&mut self, at: Option<Instant>) {
        let Some(at) = at else {
            return std::future::pending().await;
        };
        let timer = self.0.get_or_insert_with(|| Box::pin(sleep_until(at)));
        if timer.is_elapsed() || timer.deadline() > at {
            timer.as_mut().reset(at);
        }
        timer.as_mut().await;
    }
}

/// The next report, if there is anybody to report.
async fn next_report(follower: Option<&mut Follower>) -> Report {
    match follower {
        Some(follower) => follower.next().await,
        None => std::future::pending().await,
    }
}

/// The next events of inotify; never if it is not open. None if there are events that are to be left in its queue.
async fn next_events(events: Option<&mut Events>, leave: bool) -> io::Result<Option<Vec<Event>>> {
    let Some(events) = events else {
        return std::future::pending().await;
    };
    match leave {
        true if events.are_left() => std::future::pending().await,
        true => events.leave().await.map(|()| None),
        false => events.next().await.map(Some),
    }
}
