//! Where cgroupfs can't be seen, what systemd tells is believed.

use std::collections::BTreeSet;

use cgtproxy_proto::path::ControlGroupPath;

use super::known::Known;
use super::watcher::Watcher;
use crate::state::Observer;

impl Watcher {
    /// Takes a control group as there without having seen it.
    pub(super) fn believe(
        &mut self,
        path: ControlGroupPath,
        id: Option<u64>,
        observer: &mut dyn Observer,
    ) {
        let known = self.groups.get(&path).and_then(|known| known.id);
        if known.is_some() && id.is_some() && known != id {
            self.gone(&path, observer);
        }
        let shared = observer.added(path);
        self.groups.insert(shared, Known { watch: None, id });
    }

    /// Takes these control groups, and those above them, as all that there are.
    pub(super) fn believe_all(
        &mut self,
        all: Vec<(ControlGroupPath, Option<u64>)>,
        observer: &mut dyn Observer,
    ) {
        let mut there = BTreeSet::new();
        for (path, _) in &all {
            let mut at = Some(path.clone());
            while let Some(path) = at {
                at = path.parent();
                there.insert(path);
            }
        }
        let gone = self.groups.keys().filter(|path| !there.contains(*path));
        for path in gone.cloned().collect::<Vec<_>>() {
            self.gone(&path, observer);
        }
        for (path, id) in all {
            self.believe(path, id, observer);
        }
    }
}
