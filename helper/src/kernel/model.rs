//! A model of the kernel: it does what nf_tables would do with a plan, and refuses nothing but when it is told
//! to. A plan that nf_tables would refuse is a panic.

#![allow(clippy::expect_used)]

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rustix::io::Errno;

use super::Kernel;
use crate::cgroup::{ControlGroupId, OwnedControlGroup, Root, Subtree, subtree_path};
use crate::config::Config;
use crate::nft::{
    self, Before, BypassList, Element, Hold, Inherited, Known, Layout, LeftBehind, MarkWriter,
    Plan, Records, Refusal, Stamp, Stamped, Unread,
};
use crate::peer::{Peer, Uid};
use crate::route::{self, Ensured, Family};

/// What the table holds for one user.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Objects {
    pub(crate) layout: Layout,
    pub(crate) stamp: Stamp,
    pub(crate) elements: BTreeMap<ControlGroupId, Element>,
    /// The level of what each of them holds.
    held: BTreeMap<ControlGroupId, u32>,
}

impl Objects {
    /// What can be read of it where the table has these bypass lists.
    fn left_behind(&self, lists: BTreeSet<u32>) -> LeftBehind {
        let elements = self.elements.values();
        self.layout.left_behind(self.stamp, elements, lists)
    }

    /// That this is what was once read of it.
    #[track_caller]
    pub(crate) fn assert_read(&self, left: &LeftBehind) {
        assert_eq!(self.left_behind(left.lists.clone()), *left);
        if let Some(list) = &self.layout.bypass {
            assert!(left.lists.contains(&list.number), "a list went unseen");
        }
    }

    /// Levels can be told of those only below which something is held.
    fn known(&self) -> Known {
        let element = |(&id, element): (&ControlGroupId, &Element)| {
            let held = self.held.get(&id);
            let cgroup = OwnedControlGroup::found(id, held.map_or(0, |level| level - 1));
            let hold = held.is_some();
            (
                cgroup,
                Element {
                    hold,
                    ..element.clone()
                },
            )
        };
        Known {
            stamped: Stamped {
                layout: Rc::new(self.layout.clone()),
                stamp: self.stamp,
            },
            elements: self.elements.iter().map(element).collect(),
        }
    }
}

/// The table.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Table(BTreeMap<Uid, Objects>);

impl Table {
    /// What it holds for a user.
    pub(crate) fn of(&self, uid: Uid) -> Option<&Objects> {
        self.0.get(&uid)
    }

    /// Carries a plan out: what is deleted must be there, what is added must not.
    pub(crate) fn carry_out(&mut self, plan: &Plan) {
        // Nothing is sent then.
        if plan.is_empty() {
            return;
        }
        let before = self.0.remove(&plan.uid);
        if let Some(before) = &before {
            let same = plan.after.as_ref().map(|after| after.stamp) == Some(before.stamp);
            assert_eq!(same, plan.keeps_layout(), "a stamp is one layout's");
            let stamp = plan.before.stamp();
            assert_eq!(stamp, Some(before.stamp), "it has another stamp");
        }
        let (mut elements, mut held) = match &plan.before {
            Before::Nothing => {
                assert_eq!(before, None, "there is something of this user's");
                Default::default()
            }
            Before::Layout(stamped) => {
                let before = before.expect("there is something of this user's");
                assert_eq!(before.layout, *stamped.layout);
                (before.elements, before.held)
            }
            Before::LeftBehind(left) => {
                let before = before.expect("there is something of this user's");
                before.assert_read(left);
                Default::default()
            }
        };
        for id in &plan.delete {
            assert!(elements.remove(id).is_some(), "deleted what is not there");
            held.remove(id);
        }
        for (name, mark) in plan.before.marks() {
            let after = plan.after.iter().flat_map(|after| &after.layout.proxies);
            let mut others = after.filter(|(other, _)| *other != name);
            // EEXIST: what it led to is there until the last step.
            assert!(
                others.all(|(_, proxy)| proxy.mark != mark),
                "a mark leads to two proxies"
            );
        }
        let Some(Stamped { layout, stamp }) = &plan.after else {
            assert!(plan.add.is_empty(), "nowhere to add it");
            assert!(elements.is_empty(), "not all of it is deleted");
            return;
        };
        for (cgroup, element) in &plan.add {
            // A hold that holds nothing is none.
            let hold = Hold::of(cgroup.level(), element).is_some();
            let told = Element {
                hold,
                ..element.clone()
            };
            let replaced = elements.insert(cgroup.id(), told);
            assert_eq!(replaced, None, "added what is there");
            for hold in Hold::all_of(cgroup.level(), element) {
                assert!(
                    layout.holds.contains(&hold),
                    "it leads to a chain that is not there"
                );
                held.insert(cgroup.id(), hold.level);
            }
        }
        assert!(
            layout.holds_back || !elements.values().any(Element::holds_back),
            "what is open would not be dropped"
        );
        let layout = Layout::clone(layout);
        for other in self.lists() {
            let same = layout
                .bypass
                .iter()
                .all(|list| list.number != other.number || list.destinations == other.destinations);
            assert!(same, "two bypass lists have one number");
        }
        let objects = Objects {
            layout,
            stamp: *stamp,
            elements,
            held,
        };
        self.0.insert(plan.uid, objects);
    }

    /// The bypass lists of all users.
    fn lists(&self) -> impl Iterator<Item = &BypassList> {
        let objects = self.0.values();
        objects.filter_map(|objects| objects.layout.bypass.as_ref())
    }

    /// What a helper that starts reads back, with this snapshot.
    pub(crate) fn inherited(&self, snapshot: &Records) -> BTreeMap<Uid, Inherited> {
        let left = |(&uid, objects): (&Uid, &Objects)| {
            let left = match snapshot.get(uid, objects.stamp) {
                Some(layout) => {
                    assert_eq!(*layout, objects.layout, "the snapshot has another layout");
                    Inherited::Known(objects.known())
                }
                None => {
                    let lists = self.lists().map(|list| list.number);
                    Inherited::LeftBehind(objects.left_behind(lists.collect()))
                }
            };
            (uid, left)
        };
        self.0.iter().map(left).collect()
    }
}

/// A kernel with such a table, which outlives the helpers that change it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Model {
    pub(crate) table: Rc<RefCell<Table>>,
    /// Somebody else has taken the table away.
    pub(crate) gone: Rc<Cell<bool>>,
    /// The next transaction is refused.
    pub(crate) refuse: Rc<Cell<bool>>,
    /// The answers to the next transactions are lost, those whose outcome this says; true if it is carried out.
    pub(crate) lose: Rc<RefCell<VecDeque<Option<bool>>>>,
    /// How often it was looked for what of the machine may be in the way.
    pub(crate) looks: Rc<Cell<u32>>,
    /// How long each of these takes.
    pub(crate) look_takes: Rc<Cell<Duration>>,
}

impl Model {
    /// `nft flush ruleset`, where nothing protects the table.
    pub(crate) fn flush(&self) {
        *self.table.borrow_mut() = Table::default();
        self.gone.set(true);
    }

    fn accept(&self) -> Result<(), nft::Error> {
        match self.refuse.take() {
            true => Err(refused(Errno::NOMEM)),
            false => Ok(()),
        }
    }

    /// Hands on what becomes of a transaction, unless nobody hears of it.
    fn answer(&self, carry_out: impl FnOnce() -> Result<(), nft::Error>) -> Result<(), nft::Error> {
        let lost = self.lose.borrow_mut().pop_front().flatten();
        if lost != Some(false) {
            let result = carry_out();
            if lost.is_none() {
                return result;
            }
        }
        let (errno, text) = (Errno::NOBUFS, None);
        Err(nft::Error::Unknown(Refusal { errno, text }))
    }
}

fn refused(errno: Errno) -> nft::Error {
    nft::Error::Refused(Refusal { errno, text: None })
}

impl Kernel for Model {
    fn commit(&mut self, plan: &Plan) -> Result<(), nft::Error> {
        if plan.is_empty() {
            return Ok(());
        }
        self.accept()?;
        self.answer(|| {
            if self.gone.get() {
                return Err(refused(Errno::NOENT));
            }
            self.table.borrow_mut().carry_out(plan);
            Ok(())
        })
    }

    fn rebuild(&mut self, plans: &[Plan]) -> Result<(), nft::Error> {
        self.accept()?;
        self.answer(|| {
            let mut table = Table::default();
            for plan in plans {
                table.carry_out(plan);
            }
            *self.table.borrow_mut() = table;
            self.gone.set(false);
            Ok(())
        })
    }

    fn has_table(&self) -> Result<bool, nft::Error> {
        Ok(!self.gone.get())
    }

    fn owned(&self) -> bool {
        false
    }

    fn ensure_routing(&self, _: Family) -> Result<Ensured, route::Error> {
        Ok(Ensured::AsItWas)
    }

    fn missing_features(&self) -> Vec<&'static str> {
        Vec::new()
    }

    fn mark_writers(&self) -> Result<Vec<MarkWriter>, Unread> {
        self.looks.set(self.looks.get() + 1);
        std::thread::sleep(self.look_takes.get());
        Ok(Vec::new())
    }
}

/// A user with control groups, which are directories somewhere, and the default configuration.
#[derive(Debug)]
pub(crate) struct Bed {
    pub(crate) directory: PathBuf,
    pub(crate) uid: Uid,
    pub(crate) config: Config,
    pub(crate) root: Root,
    /// The user's, with `app.slice` in it.
    pub(crate) subtree: Subtree,
}

impl Bed {
    pub(crate) fn new() -> io::Result<Self> {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("cgtproxy-model-{}-{number}", std::process::id());
        let directory = std::env::temp_dir().join(name);
        std::fs::create_dir(&directory)?;
        let owner = directory.metadata()?.uid();
        // Root's control groups are everybody's.
        let uid = Uid::for_test(if owner == 0 { 1000 } else { owner });
        let app = format!("{}/app.slice", subtree_path(uid));
        std::fs::create_dir_all(directory.join(&app))?;
        if owner == 0 {
            for path in Path::new(&app).ancestors() {
                chown(directory.join(path), Some(uid.value()), None)?;
            }
        }
        let config = Config::default();
        let root = Root::for_test(&directory)?;
        let subtree = root
            .subtree(&Peer::for_test(uid))
            .map_err(io::Error::other)?;
        Ok(Self {
            directory,
            uid,
            config,
            root,
            subtree,
        })
    }
}

#[cfg(test)]
impl Bed {
    /// Makes a control group in the user's `app.slice`.
    pub(crate) fn make(&self, name: &str) {
        let path = format!("{}/app.slice/{name}", subtree_path(self.uid));
        let path = self.directory.join(path);
        std::fs::create_dir(&path).expect("it is new");
        chown(&path, Some(self.uid.value()), None).expect("it is ours");
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}
