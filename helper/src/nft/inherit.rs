//! What an earlier helper left in the table, read back.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CStr;
use std::rc::Rc;

use cgtproxy_proto::name::ProxyName;
use rustix::io::Errno;

use super::names::{self, Names};
use super::plan::{Element, Inherited, Known, Layout, LeftBehind, Stamp};
use super::socket::Dump;
use super::verdicts::{holds_back, meaning, proxy_number};
use super::{Error, Nftables, TABLE, ruleset};
use crate::cgroup::{ControlGroupId, OwnedControlGroup};
use crate::mark::Mark;
use crate::netlink::{Refusal, attribute, attributes, string};
use crate::peer::Uid;
use crate::snapshot::Records;

/// How often a dump is begun anew that others' changes spoilt.
const ATTEMPTS: usize = 8;

/// What an element of a map leads to.
enum Value {
    Chain(String),
    Number(u32),
    /// A verdict without a chain.
    Other,
}

impl Nftables {
    /// The users whose objects an earlier helper left. A transaction makes or deletes all of a
    /// user's objects, so one chain stands for the rest.
    pub(super) fn inherited(&self, snapshot: &Records) -> Result<BTreeMap<Uid, Inherited>, Error> {
        let chains = self.chains()?;
        let mut stamps = BTreeMap::new();
        for (key, value) in self.elements(ruleset::STAMPS)? {
            if let (Some(uid), Value::Number(stamp)) = (key.first_chunk(), value) {
                stamps.insert(u32::from_ne_bytes(*uid), Stamp::found(stamp));
            }
        }
        let mut left: BTreeMap<Uid, LeftBehind> = BTreeMap::new();
        let mut inherited = BTreeMap::new();
        for chain in &chains {
            let Some(uid) = chain
                .strip_prefix(names::DROP_PREFIX)
                .and_then(Uid::from_name)
            else {
                continue;
            };
            let stamp = stamps.get(&uid.value()).copied();
            let layout = stamp.and_then(|stamp| Some((stamp, snapshot.get(uid, stamp)?)));
            let known = match layout {
                Some((stamp, layout)) => self.known(uid, stamp, layout, &chains)?,
                None => None,
            };
            match known {
                Some(known) => {
                    inherited.insert(uid, Inherited::Known(known));
                }
                None => left.entry(uid).or_default().stamp = stamp,
            }
        }
        if !left.is_empty() {
            self.read_back(&mut left, &chains)?;
            // One line, however many users there are.
            tracing::info!(
                "of what an earlier helper left, that of {} users is not in a snapshot: it is replaced as a whole",
                left.len()
            );
        }
        inherited.extend(
            left.into_iter()
                .map(|(uid, left)| (uid, Inherited::LeftBehind(left))),
        );
        Ok(inherited)
    }

    /// A user's objects, if they are what the layout says.
    fn known(
        &self,
        uid: Uid,
        stamp: Stamp,
        layout: &Layout,
        chains: &BTreeSet<String>,
    ) -> Result<Option<Known>, Error> {
        let names = Names::of(uid);
        let proxies = layout
            .proxies
            .keys()
            .flat_map(|proxy| names.of_proxy(proxy));
        let holds = layout.holds.iter().map(|hold| names.hold(hold));
        let own = names.own_chains().into_iter().cloned();
        let mut expected = own.chain(proxies).chain(holds);
        if !expected.all(|chain| chain.to_str().is_ok_and(|chain| chains.contains(chain))) {
            return Ok(None);
        }
        let mut free = BTreeSet::new();
        if names.is_system() {
            let sessions = ruleset::SESSIONS.to_str().ok();
            for (key, value) in self.elements(ruleset::ENFORCED)? {
                if let Value::Chain(chain) = value
                    && Some(chain.as_str()) == sessions
                {
                    free.insert(key);
                }
            }
        }
        let mut elements = Vec::new();
        for (key, value) in self.elements(&names.cgroups)? {
            let (Some(&id), Value::Number(number)) = (key.first_chunk(), value) else {
                return Ok(None);
            };
            let Some((verdict, held)) = meaning(layout, number) else {
                return Ok(None);
            };
            let element = Element {
                verdict,
                hold: held.is_some(),
                enforced: names.is_system() && !free.contains(&key),
            };
            // What is held is one level deeper.
            let level = held.map_or(0, |level| level - 1);
            let cgroup = OwnedControlGroup::found(ControlGroupId::from_bytes(id), level);
            elements.push((cgroup, element));
        }
        let layout = Rc::new(layout.clone());
        Ok(Some(Known {
            layout,
            stamp,
            elements,
        }))
    }

    /// What the kernel itself says of users' objects.
    fn read_back(
        &self,
        left: &mut BTreeMap<Uid, LeftBehind>,
        chains: &BTreeSet<String>,
    ) -> Result<(), Error> {
        for (key, value) in self.elements(ruleset::USERS)? {
            let Value::Chain(chain) = value else { continue };
            let uid = chain
                .strip_prefix(names::USER_PREFIX)
                .and_then(Uid::from_name);
            if let (Some(left), Some(&id)) =
                (uid.and_then(|uid| left.get_mut(&uid)), key.first_chunk())
            {
                left.subtree = Some(ControlGroupId::from_bytes(id));
            }
        }
        for (&uid, left) in left {
            left.holds = chains
                .iter()
                .filter_map(|chain| names::parse_hold(uid, chain))
                .collect();
            let verdicts = self.elements(&Names::of(uid).cgroups)?;
            left.holds_back = verdicts
                .iter()
                .any(|(_, value)| matches!(value, Value::Number(number) if holds_back(*number)));
            for (name, mark) in self.proxies(uid, &names::marks(uid), names::DIVERT_PREFIX)? {
                left.proxies.insert(name, Mark::adopted(mark));
            }
            for (name, number) in
                self.proxies(uid, &Names::of(uid).choices, names::TPROXY_PREFIX)?
            {
                left.numbers
                    .extend(proxy_number(number).map(|number| (name, number)));
            }
        }
        Ok(())
    }

    /// The proxies to whose chains of this kind a map leads, and by which keys.
    fn proxies(&self, uid: Uid, map: &CStr, prefix: &str) -> Result<Vec<(ProxyName, u32)>, Error> {
        let prefix = format!("{prefix}{uid}-");
        let mut proxies = Vec::new();
        for (key, value) in self.elements(map)? {
            let Value::Chain(chain) = value else { continue };
            let name = chain
                .strip_prefix(&prefix)
                .and_then(|name| name.parse().ok());
            if let (Some(name), Some(key)) = (name, key.first_chunk()) {
                proxies.push((name, u32::from_ne_bytes(*key)));
            }
        }
        Ok(proxies)
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

    /// A map's keys and what they lead to. A map that is not there has none.
    fn elements(&self, map: &CStr) -> Result<Vec<(Vec<u8>, Value)>, Error> {
        // enum nft_set_elem_list_attributes, nft_list_attributes, nft_set_elem_attributes,
        // nft_data_attributes, nft_verdict_attributes
        const LIST_TABLE: u16 = 1;
        const LIST_SET: u16 = 2;
        const LIST_ELEMENTS: u16 = 3;
        const ELEMENT_KEY: u16 = 1;
        const ELEMENT_DATA: u16 = 2;
        const DATA_VALUE: u16 = 1;
        const DATA_VERDICT: u16 = 2;
        const VERDICT_CHAIN: u16 = 2;
        let mut request = Vec::new();
        for (kind, value) in [(LIST_TABLE, TABLE), (LIST_SET, map)] {
            let value = value.to_bytes_with_nul();
            request.extend_from_slice(&((4 + value.len()) as u16).to_ne_bytes());
            request.extend_from_slice(&kind.to_ne_bytes());
            request.extend_from_slice(value);
            request.resize(request.len().next_multiple_of(4), 0);
        }
        let pages = match self.read(Dump::Elements, &request) {
            Err(Error::Dump(refusal)) if refusal.errno == Errno::NOENT => return Ok(Vec::new()),
            pages => pages?,
        };
        let mut elements = Vec::new();
        for page in pages {
            let list = attribute(&page, LIST_ELEMENTS).unwrap_or_default();
            for element in attributes(list) {
                let element = element.value();
                let key =
                    attribute(element, ELEMENT_KEY).and_then(|key| attribute(key, DATA_VALUE));
                let data = attribute(element, ELEMENT_DATA).unwrap_or_default();
                let chain = attribute(data, DATA_VERDICT)
                    .and_then(|verdict| attribute(verdict, VERDICT_CHAIN));
                let number = attribute(data, DATA_VALUE).and_then(<[u8]>::first_chunk);
                let value = match (chain, number) {
                    (Some(chain), _) => Value::Chain(string(chain)),
                    (None, Some(number)) => Value::Number(u32::from_ne_bytes(*number)),
                    (None, None) => Value::Other,
                };
                elements.extend(key.map(|key| (key.to_vec(), value)));
            }
        }
        Ok(elements)
    }

    /// A dump, once more if others changed something meanwhile.
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
