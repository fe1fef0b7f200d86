//! Reads back what an earlier helper left in the table.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::rc::Rc;

use cgtproxy_proto::name::ProxyName;
use cgtproxy_proto::text;

use super::dump::{Found, Value};
use super::map_elements::{self, MapKey};
use super::names::{self, ListNames, Names};
use super::plan::{Inherited, Known, Layout, LeftBehind, Records, Stamp, Stamped};
use super::policy::{Element, Enforced, Hold};
use super::shared::{Remnants, Shared};
use super::verdicts::{holds_back, meaning, what_is_enforced};
use super::{Error, Nftables, ruleset};
use crate::cgroup::{ControlGroupId, OwnedControlGroup};
use crate::mark::{Mark, MarkRange};
use crate::peer::Uid;

/// What is in the table of all users.
#[derive(Default)]
struct Contents {
    chains: BTreeSet<String>,
    stamps: BTreeMap<Uid, Stamp>,
    subtrees: BTreeMap<Uid, ControlGroupId>,
    /// The proxies' marks.
    proxies: BTreeMap<Uid, BTreeMap<ProxyName, Mark>>,
    /// Control groups and their numbers.
    cgroups: BTreeMap<Uid, Vec<(ControlGroupId, u32)>>,
    /// What of the system policy's elements is enforced.
    enforced: BTreeMap<ControlGroupId, Enforced>,
}

impl Contents {
    /// The users that have anything in the table.
    fn users(&self) -> BTreeSet<Uid> {
        let chains = self.chains.iter().filter_map(|chain| names::owner(chain));
        let uids = self.stamps.keys().chain(self.subtrees.keys());
        uids.chain(self.cgroups.keys())
            .copied()
            .chain(chains)
            .collect()
    }

    /// A user's objects, as the layout says. None if the table stays and lacks a chain of the layout.
    fn known(
        &self,
        marks: MarkRange,
        uid: Uid,
        stamp: Stamp,
        layout: &Layout,
        stays: bool,
    ) -> Option<Known> {
        let names = Names::of(uid);
        let has = |chain: CString| {
            chain
                .to_str()
                .is_ok_and(|chain| self.chains.contains(chain))
        };
        let list = layout.bypass.as_ref();
        let drop = list.map(|list| ListNames::of(list.number).drop);
        if stays && !names.chains(layout).into_iter().chain(drop).all(has) {
            return None;
        }
        let mut elements = Vec::new();
        for &(id, number) in self.cgroups.get(&uid).into_iter().flatten() {
            let (verdict, held) = meaning(marks, layout, number)?;
            let element = Element {
                verdict,
                hold: held.is_some(),
                enforced: match (names.is_system(), self.enforced.get(&id)) {
                    (false, _) => Enforced::Nothing,
                    (true, Some(enforced)) => *enforced,
                    (true, None) => Enforced::All,
                },
            };
            // What a control group holds is one level deeper.
            let level = held.map_or(0, |level| level - 1);
            elements.push((OwnedControlGroup::found(id, level), element));
        }
        Some(Known {
            stamped: Stamped {
                layout: Rc::new(layout.clone()),
                stamp,
            },
            elements,
        })
    }

    /// What can be read of a user's objects that no layout describes.
    fn left_behind(&self, uid: Uid) -> LeftBehind {
        let cgroups = self.cgroups.get(&uid).into_iter().flatten();
        LeftBehind {
            subtree: self.subtrees.get(&uid).copied(),
            proxies: self.proxies.get(&uid).cloned().unwrap_or_default(),
            holds_back: cgroups.into_iter().any(|(_, number)| holds_back(*number)),
            stamp: self.stamps.get(&uid).copied(),
            lists: self.lists(),
        }
    }

    /// The numbers of all bypass lists.
    fn lists(&self) -> BTreeSet<u32> {
        let lists = self.chains.iter().filter_map(|chain| names::list_of(chain));
        lists.collect()
    }
}

impl Nftables {
    /// What an earlier helper left of users, and what they have together, in a table that stays. One that is made anew
    /// is not searched for what no snapshot describes: none of that stays.
    pub(super) fn inherited(
        &self,
        snapshot: &Records,
        stays: bool,
    ) -> Result<(BTreeMap<Uid, Inherited>, Shared), Error> {
        let contents = self.contents()?;
        let mut inherited = BTreeMap::new();
        let mut layouts = BTreeMap::new();
        let mut left = BTreeMap::new();
        for uid in contents.users() {
            let stamp = contents.stamps.get(&uid).copied();
            let layout = stamp.and_then(|stamp| Some((stamp, snapshot.get(uid, stamp)?)));
            let known = layout.and_then(|(stamp, layout)| {
                contents.known(self.settings.marks, uid, stamp, layout, stays)
            });
            let found = match known {
                Some(known) => {
                    layouts.insert(uid, Rc::clone(&known.stamped.layout));
                    Inherited::Known(known)
                }
                None => {
                    left.insert(uid, Remnants::default());
                    Inherited::LeftBehind(contents.left_behind(uid))
                }
            };
            inherited.insert(uid, found);
        }
        if !left.is_empty() {
            let becomes = if stays {
                self.remnants(&contents, &mut left)?;
                "replaced as a whole"
            } else {
                "removed until their agents are back"
            };
            // One line, however many users there are.
            tracing::info!(
                "of what an earlier helper left, that of {} is not in a snapshot: it is {becomes}",
                text::count(left.len(), "user")
            );
        }
        Ok((inherited, Shared::found(layouts, left)))
    }

    /// Reads the maps that tell of users.
    fn contents(&self) -> Result<Contents, Error> {
        let mut contents = Contents {
            chains: self.chains()?,
            ..Contents::default()
        };
        let uid = |found: &Found| found.number().map(Uid::found);
        for found in self.elements(ruleset::STAMPS)? {
            if let (Some(uid), Some(stamp)) = (uid(&found), found.value.number()) {
                contents.stamps.insert(uid, Stamp::found(stamp));
            }
        }
        for found in self.elements(ruleset::USERS)? {
            if let (Some(uid), Value::Data(id)) = (uid(&found), &found.value)
                && let Some(&id) = id.first_chunk()
            {
                contents
                    .subtrees
                    .insert(uid, ControlGroupId::from_bytes(id));
            }
        }
        for found in self.elements(ruleset::MARKS)? {
            let proxy = found.value.chain().and_then(names::proxy_of);
            if let (Some((uid, name)), Some(mark)) = (proxy, found.number()) {
                let proxies = contents.proxies.entry(uid).or_default();
                proxies.insert(name, Mark::adopted(mark));
            }
        }
        for found in self.elements(ruleset::ENFORCED)? {
            if let (Some(number), Some(id)) = (found.value.number(), found.id()) {
                contents.enforced.insert(id, what_is_enforced(number));
            }
        }
        for map in [ruleset::CGROUPS, ruleset::CGROUPS_SYSTEM] {
            for found in self.elements(map)? {
                if let (Some(uid), Some(id), Some(number)) =
                    (found.whose, found.id(), found.value.number())
                {
                    contents.cgroups.entry(uid).or_default().push((id, number));
                }
            }
        }
        Ok(contents)
    }

    /// Notes all objects of the users in `left`.
    fn remnants(
        &self,
        contents: &Contents,
        left: &mut BTreeMap<Uid, Remnants>,
    ) -> Result<(), Error> {
        for chain in &contents.chains {
            if let Some(left) = names::owner(chain).and_then(|uid| left.get_mut(&uid)) {
                left.chains.extend(CString::new(chain.as_str()));
            }
        }
        let [system, users] = self.levels_of([
            [ruleset::SYSTEM, ruleset::SYSTEM_DEEP],
            [ruleset::USER_VERDICTS, ruleset::USER_VERDICTS_DEEP],
        ])?;
        let holds = self.common_holds()?;
        let lists = contents.lists();
        for (&uid, left) in &mut *left {
            if uid == Uid::ROOT {
                left.levels.clone_from(&system);
            } else {
                left.levels.clone_from(&users);
                left.holds.clone_from(&holds);
            }
            let cgroups = contents.cgroups.get(&uid).into_iter().flatten();
            left.cgroups = cgroups.map(|(id, _)| *id).collect();
            left.lists.clone_from(&lists);
        }
        self.remnants_in_maps(contents, left)
    }

    /// The holds that users have together, each with the element that leads to its chain.
    fn common_holds(&self) -> Result<BTreeMap<Hold, MapKey>, Error> {
        let mut holds = BTreeMap::new();
        for found in self.elements(ruleset::CHOICES)? {
            if let Some(hold) = found.value.chain().and_then(names::hold_of) {
                holds.insert(hold, (ruleset::CHOICES, found.key));
            }
        }
        Ok(holds)
    }

    /// Notes the elements of shared maps that lead to chains of the users in `left`, or are about their marks or subtrees.
    fn remnants_in_maps(
        &self,
        contents: &Contents,
        left: &mut BTreeMap<Uid, Remnants>,
    ) -> Result<(), Error> {
        let drops = self.elements(ruleset::DROPS)?;
        let drops: BTreeSet<_> = drops.into_iter().map(|found| found.key).collect();
        for (uid, subtree) in &contents.subtrees {
            let Some(left) = left.get_mut(uid) else {
                continue;
            };
            let user = uid.value().to_ne_bytes().to_vec();
            left.map_keys.insert((ruleset::USERS, user));
            let drop = subtree.to_bytes().to_vec();
            if drops.contains(&drop) {
                left.map_keys.insert((ruleset::DROPS, drop));
            }
        }
        let by_chain = [
            ruleset::CHOICES,
            ruleset::CHOICES_SYSTEM,
            ruleset::CHOICES_ENFORCED,
        ];
        let marks = self.owners_of_marks(contents)?;
        for map in by_chain.into_iter().chain(map_elements::BY_MARK) {
            for found in self.elements(map)? {
                let chain = found.value.chain().and_then(names::owner);
                let mark = || found.number().and_then(|mark| marks.get(&mark)).copied();
                let uid = chain.or_else(|| mark().filter(|_| !by_chain.contains(&map)));
                if let Some(left) = uid.and_then(|uid| left.get_mut(&uid)) {
                    left.map_keys.insert((map, found.key));
                }
            }
        }
        Ok(())
    }

    /// Whose each mark is, that of a proxy or of its DNS queries.
    fn owners_of_marks(&self, contents: &Contents) -> Result<BTreeMap<u32, Uid>, Error> {
        let mut marks = BTreeMap::new();
        for (&uid, proxies) in &contents.proxies {
            marks.extend(proxies.values().map(|mark| (mark.value(), uid)));
        }
        for found in self.elements(ruleset::RESOLVE)? {
            let owner = found.value.chain().and_then(names::owner);
            marks.extend(found.number().zip(owner));
        }
        Ok(marks)
    }
}
