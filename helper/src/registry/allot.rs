//! Which marks a policy's proxies have, and which number its bypass list.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use cgtproxy_proto::name::ProxyName;

use super::{Entry, Refused, Registry};
use crate::mark::MarkAllocator;
use crate::nft::{Before, Bypass, BypassList, Proxy, ProxySettings};
use crate::peer::Uid;

impl Registry {
    /// The list of these destinations: the one that the table has already, or another one.
    pub(super) fn list_of(&self, destinations: Bypass) -> Option<BypassList> {
        if destinations.is_empty() {
            return None;
        }
        let lists = || {
            self.layouts()
                .filter_map(|(.., layout)| layout.bypass.as_ref())
        };
        if let Some(list) = lists().find(|list| *list.destinations == destinations) {
            return Some(list.clone());
        }
        let mut used: BTreeSet<u32> = lists().map(|list| list.number).collect();
        for entry in self.users.values() {
            if let Entry::LeftBehind(left) = entry {
                used.extend(&left.lists);
            }
        }
        let number = (1..=u32::MAX).find(|number| !used.contains(number))?;
        Some(BypassList {
            number,
            destinations: Rc::new(destinations),
        })
    }

    /// The marks that are in use once what a user had is gone.
    pub(super) fn marks_without(&self, uid: Uid, before: &Before) -> MarkAllocator {
        let mut marks = self.marks.clone();
        for (_, mark) in before.marks() {
            marks.free(uid, mark);
        }
        marks
    }

    /// Gives each proxy a mark: the one that a proxy of this name has already, or a new one.
    pub(super) fn assign_marks(
        &self,
        uid: Uid,
        before: &Before,
        requests: Vec<(ProxyName, ProxySettings)>,
    ) -> Result<(BTreeMap<ProxyName, Proxy>, MarkAllocator), Refused> {
        let mut marks = self.marks.clone();
        let mut kept = BTreeMap::new();
        let names: BTreeSet<_> = requests.iter().map(|(name, _)| name.clone()).collect();
        // The first step of a change adds what marks lead to, and the last one deletes what they led to. So a mark that
        // becomes free in a change is not given to another proxy in the same one.
        let mut freed = Vec::new();
        for (name, mark) in before.marks() {
            if names.contains(name) && marks.is_used(mark) {
                kept.insert(name.clone(), mark);
            } else {
                freed.push(mark);
            }
        }
        let mut proxies = BTreeMap::new();
        for (name, settings) in requests {
            let mark = match kept.get(&name) {
                Some(&mark) => mark,
                None => marks.allocate(uid).ok_or(Refused::NoMarksLeft)?,
            };
            let proxy = Proxy { mark, settings };
            if proxies.insert(name.clone(), proxy).is_some() {
                return Err(Refused::ProxyExists(name));
            }
        }
        for mark in freed {
            marks.free(uid, mark);
        }
        Ok((proxies, marks))
    }
}
