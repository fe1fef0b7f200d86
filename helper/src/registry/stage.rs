//! How a change of a user's policy is staged.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use cgtproxy_proto::name::ProxyName;
use cgtproxy_proto::path::ControlGroupPath;

use super::change::{Census, changes};
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
        let (proxies, marks) = self.assign_marks(uid, &before, policy.proxies)?;
        for element in assignments.values() {
            known(&proxies, &element.verdict)?;
        }
        if let Some(gateway) = &policy.gateway {
            known(&proxies, &Verdict::Proxy(gateway.proxy.clone()))?;
        }
        let opened = assignments.into_iter().filter_map(|(path, element)| {
            let cgroup = open(&path)?;
            Some((path, (cgroup, element)))
        });
        let cgroups: BTreeMap<_, _> = opened.collect();
        let census = Census::of(cgroups.values());
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
        let had = entry.into_iter().flat_map(Entry::elements);
        let (delete, add) = changes(had, cgroups.values());
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
        let after = || cgroups.iter().filter_map(|(_, new)| new.as_ref());
        let mut census = user.census.clone();
        before.iter().for_each(|element| census.remove(element));
        after().for_each(|element| census.add(element));
        let layout = census.layout_after(&user.census, old_layout, subtree);
        let stamped = Stamped::after(Some(&user.stamped), layout);
        let (delete, add) = changes(before, after());
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
        Staged {
            marks: Some(self.marks_without(uid, &before)),
            plan: Plan {
                uid,
                before,
                after: None,
                delete: elements.map(|(cgroup, _)| cgroup.id()).collect(),
                add: Vec::new(),
            },
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
