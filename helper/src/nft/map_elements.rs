//! The elements of shared maps and sets that are about one user: by them, packets get to that user's chains.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};

use cgtproxy_proto::name::ProxyName;

use super::ffi::Element;
use super::names::{ListNames, Names, ProxyChain};
use super::plan::Layout;
use super::policy::{BypassList, Delivery, Hold, Proxy};
use super::ruleset::{
    CHOICES_ENFORCED, DELIVER, DELIVER_ANSWERS, DIVERT, DROPS, GUARD, MARKS, OWNERS, PORTS,
    RECEIVE, RESOLVE, USERS,
};
use super::transaction::Transaction;
use super::verdicts::{of_hold, of_proxy};
use crate::mark::MarkRange;

/// What identifies an element: its map or set, and its key there.
pub(super) type MapKey = (&'static CStr, Vec<u8>);

/// What an element has beside its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ElementData {
    /// `goto chain`
    Goto(CString),
    /// `return`
    Return,
    /// A value.
    Value(Vec<u8>),
    /// Nothing: an element of a set.
    Nothing,
}

/// Elements of several maps and sets.
pub(super) type MapElements = BTreeMap<MapKey, ElementData>;

/// The maps and sets whose keys begin with a mark.
pub(super) const BY_MARK: [&CStr; 9] = [
    MARKS,
    DELIVER,
    DELIVER_ANSWERS,
    PORTS,
    GUARD,
    OWNERS,
    DIVERT,
    RESOLVE,
    RECEIVE,
];

impl Names {
    /// The elements that lead to a proxy.
    pub(super) fn proxy_elements(
        &self,
        marks: MarkRange,
        name: &ProxyName,
        proxy: &Proxy,
    ) -> MapElements {
        let mark = proxy.mark.value().to_ne_bytes();
        let goto = |chain| ElementData::Goto(self.chain(chain, name));
        let number = of_proxy(marks, proxy).to_ne_bytes();
        let maps = self.choices_maps().iter();
        let mut elements: MapElements = maps
            .map(|map| ((*map, number.to_vec()), goto(ProxyChain::Proxy)))
            .collect();
        let mut add = |map, key: &[u8], element| {
            elements.insert((map, key.to_vec()), element);
        };
        add(MARKS, &mark, goto(ProxyChain::Proxy));
        if self.is_system() {
            add(DIVERT, &mark, goto(ProxyChain::Divert));
        } else {
            let uid = self.uid.value().to_ne_bytes();
            add(OWNERS, &[mark, uid].concat(), ElementData::Nothing);
        }
        match proxy.settings.delivery {
            Delivery::Tproxy(port) => {
                let port = port.get().to_be_bytes().to_vec();
                add(DELIVER, &mark, ElementData::Goto(self.deliver().to_owned()));
                let answers = self.deliver_answers().to_owned();
                add(DELIVER_ANSWERS, &mark, ElementData::Goto(answers));
                add(PORTS, &mark, ElementData::Value(port));
                add(GUARD, &mark, ElementData::Goto(self.guard().to_owned()));
                // The delivery guard has checked it already.
                add(RECEIVE, &mark, ElementData::Return);
            }
            Delivery::Redirect(port) => {
                if port.is_some() {
                    add(RESOLVE, &mark, goto(ProxyChain::Redirect));
                }
                add(RECEIVE, &mark, goto(ProxyChain::Receive));
            }
        }
        if proxy.settings.dns_hijack.is_some() {
            let dns = marks.dns_value(proxy.mark).to_ne_bytes();
            add(RESOLVE, &dns, goto(ProxyChain::Resolve));
            add(RECEIVE, &dns, goto(ProxyChain::Receive));
            if !self.is_system() {
                add(MARKS, &dns, goto(ProxyChain::Dns));
            }
        }
        elements
    }

    /// The elements that lead to a hold's chain from its number.
    pub(super) fn hold_elements(
        &self,
        marks: MarkRange,
        layout: &Layout,
        hold: &Hold,
    ) -> MapElements {
        let number = of_hold(marks, layout, hold).to_ne_bytes();
        let maps = match hold.verdict {
            Some(_) => self.choices_maps(),
            None => &[CHOICES_ENFORCED],
        };
        let element = |map: &&'static CStr| {
            let goto = ElementData::Goto(self.hold(hold));
            ((*map, number.to_vec()), goto)
        };
        maps.iter().map(element).collect()
    }

    /// The element that says that the user has a policy, and below which control group.
    pub(super) fn user_element(&self, layout: &Layout) -> MapElements {
        let uid = self.uid.value().to_ne_bytes().to_vec();
        let subtree = layout.subtree.id().to_bytes().to_vec();
        [((USERS, uid), ElementData::Value(subtree))].into()
    }

    /// The element that leads to the destinations that a drop leaves alone.
    pub(super) fn drop_element(&self, layout: &Layout) -> MapElements {
        let list = layout.bypass.as_ref().filter(|_| !self.is_system());
        let element = |list: &BypassList| {
            let subtree = layout.subtree.id().to_bytes().to_vec();
            let drop = ListNames::of(list.number).drop;
            ((DROPS, subtree), ElementData::Goto(drop))
        };
        list.map(element).into_iter().collect()
    }
}

impl Transaction<'_> {
    pub(super) fn add_map_elements(&mut self, elements: &MapElements) {
        for ((map, key), data) in elements {
            let element = match data {
                ElementData::Goto(chain) => Element::Goto(chain),
                ElementData::Return => Element::Return,
                ElementData::Value(value) => Element::Value(value),
                ElementData::Nothing => Element::Key,
            };
            self.add_element(map, key, element);
        }
    }

    pub(super) fn delete_map_elements<'k>(&mut self, keys: impl IntoIterator<Item = &'k MapKey>) {
        for (map, key) in keys {
            self.delete_element(map, key);
        }
    }

    /// Deletes and adds what differs between the elements that there are and those that there are to be.
    pub(super) fn change_map_elements(&mut self, before: &MapElements, after: &MapElements) {
        let differs =
            |others: &MapElements, key: &MapKey, data: &ElementData| others.get(key) != Some(data);
        let gone = before
            .iter()
            .filter(|(key, data)| differs(after, key, data));
        self.delete_map_elements(gone.map(|(key, _)| key));
        let new = after
            .iter()
            .filter(|(key, data)| differs(before, key, data))
            .map(|(key, data)| (key.clone(), data.clone()))
            .collect();
        self.add_map_elements(&new);
    }
}
