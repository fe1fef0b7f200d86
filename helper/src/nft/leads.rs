//! The elements of maps that all users share by which packets get to one user's chains.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};

use cgtproxy_proto::name::ProxyName;

use super::ffi::Element;
use super::names::{ListNames, Names};
use super::plan::Layout;
use super::policy::{BypassList, Delivery, Hold, Proxy};
use super::ruleset::{
    CHOICES_ENFORCED, DELIVER, DELIVER_ANSWERS, DIVERT, DROPS, GUARD, MARKS, OWNERS, PORTS,
    RECEIVE, RESOLVE, USERS,
};
use super::transaction::Transaction;
use super::verdicts::{of_hold, of_proxy};
use crate::mark::MarkRange;

/// Where an element is: the map or set, and the key.
pub(super) type Place = (&'static CStr, Vec<u8>);

/// What an element says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Lead {
    /// `goto chain`
    Goto(CString),
    /// `return`
    Return,
    /// A value.
    Value(Vec<u8>),
    /// Only that the key is there.
    Key,
}

/// Elements, each at its place.
pub(super) type Leads = BTreeMap<Place, Lead>;

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
    /// What leads to a proxy.
    pub(super) fn leads_of_proxy(
        &self,
        marks: MarkRange,
        name: &ProxyName,
        proxy: &Proxy,
    ) -> Leads {
        let mark = proxy.mark.value().to_ne_bytes();
        let chain = || Lead::Goto(self.proxy(name));
        let number = of_proxy(marks, proxy).to_ne_bytes();
        let maps = self.choices_maps().iter();
        let mut leads: Leads = maps.map(|map| ((*map, number.to_vec()), chain())).collect();
        let mut lead = |map, key: &[u8], lead| {
            leads.insert((map, key.to_vec()), lead);
        };
        lead(MARKS, &mark, chain());
        if self.is_system() {
            lead(DIVERT, &mark, Lead::Goto(self.divert(name)));
        } else {
            let uid = self.uid.value().to_ne_bytes();
            lead(OWNERS, &[mark, uid].concat(), Lead::Key);
        }
        match proxy.delivery {
            Delivery::Tproxy(port) => {
                let port = port.get().to_be_bytes().to_vec();
                lead(DELIVER, &mark, Lead::Goto(self.deliver().to_owned()));
                let answers = self.deliver_answers().to_owned();
                lead(DELIVER_ANSWERS, &mark, Lead::Goto(answers));
                lead(PORTS, &mark, Lead::Value(port));
                lead(GUARD, &mark, Lead::Goto(self.guard().to_owned()));
                // The delivery guard has checked it already.
                lead(RECEIVE, &mark, Lead::Return);
            }
            Delivery::Redirect(port) => {
                if port.is_some() {
                    lead(RESOLVE, &mark, Lead::Goto(self.redirect(name)));
                }
                lead(RECEIVE, &mark, Lead::Goto(self.receive(name)));
            }
        }
        if proxy.dns_hijack.is_some() {
            let dns = marks.dns_value(proxy.mark).to_ne_bytes();
            lead(RESOLVE, &dns, Lead::Goto(self.resolve(name)));
            lead(RECEIVE, &dns, Lead::Goto(self.receive(name)));
            if !self.is_system() {
                lead(MARKS, &dns, Lead::Goto(self.dns(name)));
            }
        }
        leads
    }

    /// What leads to the chain of control groups below which everything is held, but for these control groups.
    pub(super) fn leads_of_hold(&self, marks: MarkRange, layout: &Layout, hold: &Hold) -> Leads {
        let number = of_hold(marks, layout, hold).to_ne_bytes();
        let maps = match hold.verdict {
            Some(_) => self.choices_maps(),
            None => &[CHOICES_ENFORCED],
        };
        let lead = |map: &&'static CStr| ((*map, number.to_vec()), Lead::Goto(self.hold(hold)));
        maps.iter().map(lead).collect()
    }

    /// That the user has a policy, and below which control group.
    pub(super) fn lead_of_user(&self, layout: &Layout) -> Leads {
        let uid = self.uid.value().to_ne_bytes().to_vec();
        let subtree = layout.subtree.id().to_bytes().to_vec();
        [((USERS, uid), Lead::Value(subtree))].into()
    }

    /// What leads to the destinations that a drop leaves alone.
    pub(super) fn lead_of_drop(&self, layout: &Layout) -> Leads {
        let list = layout.bypass.as_ref().filter(|_| !self.is_system());
        let lead = |list: &BypassList| {
            let subtree = layout.subtree.id().to_bytes().to_vec();
            let drop = ListNames::of(list.number).drop;
            ((DROPS, subtree), Lead::Goto(drop))
        };
        list.map(lead).into_iter().collect()
    }
}

impl Transaction<'_> {
    pub(super) fn add_leads(&mut self, leads: &Leads) {
        for ((map, key), lead) in leads {
            let element = match lead {
                Lead::Goto(chain) => Element::Goto(chain),
                Lead::Return => Element::Return,
                Lead::Value(value) => Element::Value(value),
                Lead::Key => Element::Key,
            };
            self.add_element(map, key, element);
        }
    }

    pub(super) fn delete_leads<'l>(&mut self, places: impl IntoIterator<Item = &'l Place>) {
        for (map, key) in places {
            self.delete_element(map, key);
        }
    }

    /// From what led somewhere to what is to.
    pub(super) fn change_leads(&mut self, before: &Leads, after: &Leads) {
        let differs = |one: &Leads, place: &Place, lead: &Lead| one.get(place) != Some(lead);
        let gone = before
            .iter()
            .filter(|(place, lead)| differs(after, place, lead));
        self.delete_leads(gone.map(|(place, _)| place));
        let new = after
            .iter()
            .filter(|(place, lead)| differs(before, place, lead))
            .map(|(place, lead)| (place.clone(), lead.clone()))
            .collect();
        self.add_leads(&new);
    }
}
