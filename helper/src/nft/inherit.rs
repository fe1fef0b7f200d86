//! Reads back what an earlier helper left in the table.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CStr, CString};
use std::rc::Rc;

use cgtproxy_proto::name::ProxyName;
use cgtproxy_proto::text;
use rustix::io::Errno;

use super::attributes::{RULE_CHAIN, RULE_EXPRESSIONS, RULE_TABLE, expressions};
use super::ffi::Comment;
use super::names::{self, ListNames, Names};
use super::plan::{Inherited, Known, Layout, LeftBehind, Records, Stamp, Stamped};
use super::policy::{Element, Enforced};
use super::shared::{Remnants, Shared};
use super::socket::Dump;
use super::verdicts::{holds_back, meaning, what_is_enforced};
use super::{Error, Nftables, TABLE, map_elements, ruleset};
use crate::cgroup::{ControlGroupId, OwnedControlGroup};
use crate::mark::{Mark, MarkRange};
use crate::netlink::{Refusal, attribute, push_attribute, string, values};
use crate::peer::Uid;

/// How often a dump is tried while others change what is dumped.
const ATTEMPTS: usize = 8;

/// What an element of a map has beside its key.
enum Value {
    Chain(String),
    Data(Vec<u8>),
    /// A verdict without a chain, or nothing.
    Other,
}

impl Value {
    fn number(&self) -> Option<u32> {
        match self {
            Self::Data(data) => Some(u32::from_ne_bytes(*data.first_chunk()?)),
            Self::Chain(_) | Self::Other => None,
        }
    }
}

/// An element as it is dumped.
struct Found {
    key: Vec<u8>,
    value: Value,
    /// Whose it is, if that is noted.
    whose: Option<Uid>,
}

impl Found {
    fn id(&self) -> Option<ControlGroupId> {
        self.key
            .first_chunk()
            .copied()
            .map(ControlGroupId::from_bytes)
    }

    /// The first four bytes of the key.
    fn number(&self) -> Option<u32> {
        Some(u32::from_ne_bytes(*self.key.first_chunk()?))
    }
}

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
            if let (Value::Chain(chain), Some(mark)) = (&found.value, found.number())
                && let Some((uid, name)) = names::proxy_of(chain)
            {
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
        // Whose a mark is.
        let mut marks = BTreeMap::new();
        for (&uid, proxies) in &contents.proxies {
            marks.extend(proxies.values().map(|mark| (mark.value(), uid)));
        }
        // The marks of DNS queries too.
        for found in self.elements(ruleset::RESOLVE)? {
            if let (Value::Chain(chain), Some(mark)) = (&found.value, found.number()) {
                marks.extend(names::owner(chain).map(|uid| (mark, uid)));
            }
        }
        let chains = [
            ruleset::SYSTEM,
            ruleset::SYSTEM_DEEP,
            ruleset::USER_VERDICTS,
            ruleset::USER_VERDICTS_DEEP,
        ];
        let [mut system, deep, mut users, deep_users] = self.levels_of(chains)?;
        system.extend(deep);
        users.extend(deep_users);
        let mut holds = BTreeMap::new();
        for found in self.elements(ruleset::CHOICES)? {
            if let Value::Chain(chain) = &found.value
                && let Some(hold) = names::hold_of(chain)
            {
                holds.insert(hold, (ruleset::CHOICES, found.key));
            }
        }
        let lists = contents.lists();
        let drops: BTreeSet<_> = self
            .elements(ruleset::DROPS)?
            .into_iter()
            .map(|found| found.key)
            .collect();
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
            let key = uid.value().to_ne_bytes().to_vec();
            if let Some(subtree) = contents.subtrees.get(&uid) {
                left.map_keys.insert((ruleset::USERS, key));
                let drop = (ruleset::DROPS, subtree.to_bytes().to_vec());
                left.map_keys
                    .extend(drops.contains(&drop.1).then_some(drop));
            }
        }
        let by_chain = [
            ruleset::CHOICES,
            ruleset::CHOICES_SYSTEM,
            ruleset::CHOICES_ENFORCED,
        ];
        for map in by_chain.into_iter().chain(map_elements::BY_MARK) {
            for found in self.elements(map)? {
                let chain = match &found.value {
                    Value::Chain(chain) => names::owner(chain),
                    Value::Data(_) | Value::Other => None,
                };
                let mark = || found.number().and_then(|mark| marks.get(&mark)).copied();
                let uid = chain.or_else(|| mark().filter(|_| !by_chain.contains(&map)));
                if let Some(left) = uid.and_then(|uid| left.get_mut(&uid)) {
                    left.map_keys.insert((map, found.key));
                }
            }
        }
        Ok(())
    }

    /// The levels that the rules of each of these chains look at.
    fn levels_of<const N: usize>(&self, chains: [&CStr; N]) -> Result<[BTreeSet<u32>; N], Error> {
        /// enum nft_socket_attributes
        const SOCKET_LEVEL: u16 = 3;
        let is =
            |value: Option<&[u8]>, name: &CStr| value.map(string).as_deref() == name.to_str().ok();
        let mut levels = [const { BTreeSet::new() }; N];
        // Only the rules of this table: a firewall may have many.
        for rule in self.read(Dump::Rules, &names(&[(RULE_TABLE, TABLE)]))? {
            if !is(attribute(&rule, RULE_TABLE), TABLE) {
                continue;
            }
            let chain = attribute(&rule, RULE_CHAIN);
            let mut each = chains.iter().zip(&mut levels);
            let Some((_, levels)) = each.find(|(name, _)| is(chain, name)) else {
                continue;
            };
            let list = attribute(&rule, RULE_EXPRESSIONS).unwrap_or_default();
            for (name, data) in expressions(list) {
                let level = attribute(data, SOCKET_LEVEL).and_then(<[u8]>::first_chunk);
                if let ("socket", Some(level)) = (name.as_str(), level) {
                    levels.insert(u32::from_be_bytes(*level));
                }
            }
        }
        Ok(levels)
    }

    /// The names of the table's chains.
    pub(super) fn chains(&self) -> Result<BTreeSet<String>, Error> {
        /// enum nft_chain_attributes
        const TABLE_NAME: u16 = 1;
        const NAME: u16 = 3;
        let chains = self.read(Dump::Chains, &[])?;
        let ours = chains.iter().filter(|chain| {
            attribute(chain, TABLE_NAME).map(string).as_deref() == TABLE.to_str().ok()
        });
        Ok(ours
            .filter_map(|chain| attribute(chain, NAME).map(string))
            .collect())
    }

    /// The elements of a map. A map that is not there has none.
    fn elements(&self, map: &CStr) -> Result<Vec<Found>, Error> {
        // enum nft_set_elem_list_attributes, nft_list_attributes, nft_set_elem_attributes,
        // nft_data_attributes, nft_verdict_attributes
        const LIST_TABLE: u16 = 1;
        const LIST_SET: u16 = 2;
        const LIST_ELEMENTS: u16 = 3;
        const ELEMENT_KEY: u16 = 1;
        const ELEMENT_DATA: u16 = 2;
        const ELEMENT_USER_DATA: u16 = 6;
        const DATA_VALUE: u16 = 1;
        const DATA_VERDICT: u16 = 2;
        const VERDICT_CHAIN: u16 = 2;
        let request = names(&[(LIST_TABLE, TABLE), (LIST_SET, map)]);
        let pages = match self.read(Dump::Elements, &request) {
            Err(Error::Dump(refusal)) if refusal.errno == Errno::NOENT => return Ok(Vec::new()),
            pages => pages?,
        };
        let mut elements = Vec::new();
        for page in pages {
            let list = attribute(&page, LIST_ELEMENTS).unwrap_or_default();
            for element in values(list) {
                let key =
                    attribute(element, ELEMENT_KEY).and_then(|key| attribute(key, DATA_VALUE));
                let data = attribute(element, ELEMENT_DATA).unwrap_or_default();
                let chain = attribute(data, DATA_VERDICT)
                    .and_then(|verdict| attribute(verdict, VERDICT_CHAIN));
                let value = match (chain, attribute(data, DATA_VALUE)) {
                    (Some(chain), _) => Value::Chain(string(chain)),
                    (None, Some(data)) => Value::Data(data.to_vec()),
                    (None, None) => Value::Other,
                };
                let whose = attribute(element, ELEMENT_USER_DATA).and_then(Comment::parse);
                elements.extend(key.map(|key| Found {
                    key: key.to_vec(),
                    value,
                    whose,
                }));
            }
        }
        Ok(elements)
    }

    /// Dumps, and does so again if others changed something meanwhile.
    fn read(&self, what: Dump, request: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        let mut attempt = 0;
        loop {
            attempt += 1;
            match self.socket.dump(what, request) {
                Err(Refusal { errno, .. }) if errno == Errno::INTR && attempt < ATTEMPTS => {}
                objects => return objects.map_err(Error::Dump),
            }
        }
    }
}

/// Attributes with names, by which a dump is told what is wanted.
fn names(names: &[(u16, &CStr)]) -> Vec<u8> {
    let mut request = Vec::new();
    for (kind, name) in names {
        push_attribute(&mut request, *kind, name.to_bytes_with_nul());
    }
    request
}
