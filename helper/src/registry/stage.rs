//! How a change of a user's policy is staged.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use cgtproxy_proto::name::ProxyName;
use cgtproxy_proto::path::ControlGroupPath;

use super::change::{Census, Changes};
use super::{Effect, Entry, PolicyRequest, Refused, Registry, Staged, User};
use crate::cgroup::{OwnedControlGroup, Top};
use crate::nft::{Before, Element, Layout, Plan, Proxy, Stamped, Verdict};
use crate::peer::Uid;

impl Registry {
    /// Stages a whole new policy. The control groups of `assignments` are opened only after the limits have been checked.
    ///
    /// # Errors
    /// If it breaks a limit or contradicts itself.
    pub fn replace(
        &self,
        uid: Uid,
        policy: PolicyRequest,
        assignments: BTreeMap<ControlGroupPath, Element>,
        mut open: impl FnMut(&ControlGroupPath) -> Option<OwnedControlGroup>,
    ) -> Result<Staged, Refused> {
        self.admit(
            policy.proxies.len(),
            policy.bypass_entries,
            assignments.len(),
        )?;
        let before = self.before(uid);
        let (proxies, marks) = self.assign_marks(&before, policy.proxies)?;
        for element in assignments.values() {
            known(&proxies, &element.verdict)?;
        }
        if let Some(gateway) = &policy.gateway {
            known(&proxies, &Verdict::Proxy(gateway.proxy.clone()))?;
        }
        let mut census = Census::default();
        let opened = assignments.into_iter().filter_map(|(path, element)| {
            let cgroup = open(&path)?;
            census.add(cgroup, &element);
            Some((path, (cgroup, element)))
        });
        let cgroups: BTreeMap<_, _> = opened.collect();
        let layout = Rc::new(Layout {
            subtree: policy.subtree,
            proxies,
            bypass: self.list_of(policy.bypass),
            levels: census.levels(),
            holds: census.holds(),
            enforced: census.enforced(),
            holds_back: census.holds_back(),
            gateway: policy.gateway,
        });
        let entry = self.users.get(&uid);
        let stamped = Stamped::after(entry.and_then(Entry::stamped), layout);
        let generation = match entry {
            Some(Entry::Policy(user)) => user.generation,
            Some(Entry::Known(_) | Entry::LeftBehind(_)) | None => 0,
        };
        let mut changes = Changes::default();
        for (cgroup, element) in entry.into_iter().flat_map(Entry::elements) {
            changes.had(*cgroup, element);
        }
        for (cgroup, element) in cgroups.values() {
            changes.has(*cgroup, element);
        }
        let (delete, add) = changes.finish();
        Ok(Staged {
            plan: Plan {
                uid,
                before,
                after: Some(stamped.clone()),
                delete,
                add,
            },
            marks: Some(marks),
            effect: Effect::Replace(User {
                stamped,
                cgroups,
                census,
                generation,
            }),
        })
    }

    /// Stages a change of some control groups' verdicts.
    ///
    /// # Errors
    /// If it breaks a limit or names a proxy that the policy has not.
    pub fn update(
        &self,
        uid: Uid,
        subtree: Top,
        assign: BTreeMap<ControlGroupPath, Element>,
        remove: BTreeSet<ControlGroupPath>,
        mut open: impl FnMut(&ControlGroupPath) -> Option<OwnedControlGroup>,
    ) -> Result<Staged, Refused> {
        let Some(Entry::Policy(user)) = self.users.get(&uid) else {
            return Err(Refused::NoPolicy);
        };
        let old_layout = &user.stamped.layout;
        // Each is looked up once.
        let removed: Vec<_> = remove
            .into_iter()
            .filter(|path| !assign.contains_key(path))
            .filter_map(|path| user.cgroups.get(&path).map(|old| (path, old)))
            .collect();
        let assigned: Vec<_> = assign
            .into_iter()
            .map(|(path, element)| (user.cgroups.get(&path), path, element))
            .collect();
        let added = assigned.iter().filter(|(old, ..)| old.is_none()).count();
        self.admit(0, 0, user.cgroups.len() + added - removed.len())?;
        for (_, _, element) in &assigned {
            known(&old_layout.proxies, &element.verdict)?;
        }

        let mut before = Vec::with_capacity(removed.len() + assigned.len());
        let mut cgroups = Vec::with_capacity(removed.len() + assigned.len());
        for (path, old) in removed {
            before.push(old);
            cgroups.push((path, None));
        }
        for (old, path, element) in assigned {
            let opened = open(&path).map(|cgroup| (cgroup, element));
            before.extend(old);
            // If the control group is gone, the verdict goes as well that an earlier one of this name had.
            if opened.is_some() || old.is_some() {
                cgroups.push((path, opened));
            }
        }
        let mut census = user.census.clone();
        let mut changes = Changes::default();
        for (cgroup, element) in before {
            changes.had(*cgroup, element);
            census.remove(*cgroup, element);
        }
        for (cgroup, element) in cgroups.iter().filter_map(|(_, new)| new.as_ref()) {
            changes.has(*cgroup, element);
            census.add(*cgroup, element);
        }
        // A level that no control group needs any more is left out one change later: what starts next is often what has
        // just ended, and writing another layout takes longer than everything else that a new control group needs.
        let holds_back = census.holds_back() || user.census.holds_back();
        let same = census.is_of(old_layout)
            && census.levels_are(&user.census, &old_layout.levels)
            && holds_back == old_layout.holds_back
            && subtree == old_layout.subtree;
        let layout = if same {
            Rc::clone(old_layout)
        } else {
            Rc::new(Layout {
                subtree,
                levels: &census.levels() | &user.census.levels(),
                holds: census.holds(),
                enforced: census.enforced(),
                holds_back,
                ..Layout::clone(old_layout)
            })
        };
        let stamped = Stamped::after(Some(&user.stamped), layout);
        let (delete, add) = changes.finish();
        Ok(Staged {
            plan: Plan {
                uid,
                before: Before::Layout(user.stamped.clone()),
                after: Some(stamped.clone()),
                delete,
                add,
            },
            marks: None,
            effect: Effect::Change {
                stamped,
                census,
                cgroups,
            },
        })
    }

    /// Stages the removal of everything that a user has.
    #[must_use]
    pub fn remove(&self, uid: Uid) -> Staged {
        let before = self.before(uid);
        let elements = self.users.get(&uid).into_iter().flat_map(Entry::elements);
        let mut marks = self.marks.clone();
        for (_, mark) in before.marks() {
            marks.free(mark);
        }
        Staged {
            plan: Plan {
                uid,
                before,
                after: None,
                delete: elements.map(|(cgroup, _)| cgroup.id()).collect(),
                add: Vec::new(),
            },
            marks: Some(marks),
            effect: Effect::Remove,
        }
    }
}

pub(super) fn known(
    proxies: &BTreeMap<ProxyName, Proxy>,
    verdict: &Verdict,
) -> Result<(), Refused> {
    match verdict {
        Verdict::Proxy(name) if !proxies.contains_key(name) => {
            Err(Refused::UnknownProxy(name.clone()))
        }
        _ => Ok(()),
    }
}
