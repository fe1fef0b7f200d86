//! What is said about single control groups.
//!
//! The map from control groups holds numbers, not verdicts, and a second, small map says what each number
//! means. A verdict that names a chain makes the kernel walk through every chain of the table that can be
//! reached, with every element of every verdict map on the way, before it accepts a transaction
//! (nf_tables_validate, net/netfilter/nf_tables_api.c): the more control groups all users have, the longer
//! would each one's change take. A number makes it look at nothing.
//!
//! What the system's policy enforces is in a map of verdicts all the same: those are few.

use std::collections::BTreeSet;
use std::ffi::{CStr, CString};

use cgtproxy_proto::name::ProxyName;
use nftnl::MsgType;

use super::ffi::{Content, Element, KeyType};
use super::names::Names;
use super::plan::{self, Hold, Layout, Proxy, Verdict};
use super::rule::RuleBuilder;
use super::ruleset::{ENFORCED, SESSIONS};
use super::transaction::Transaction;
use crate::cgroup::{ControlGroupId, OwnedControlGroup};

/// What a number means: its upper 24 bits. The lower eight are the level of what is held, or 0.
const DIRECT: u32 = 1 << 8;
const DROP: u32 = 2 << 8;
const DROP_ALL: u32 = 3 << 8;
const RELEASED: u32 = 4 << 8;
/// The first proxy's.
const PROXY: u32 = 16 << 8;

/// The number of a proxy. A message has no room for so many that they would not fit.
fn of_proxy(proxy: &Proxy) -> u32 {
    PROXY.saturating_add(proxy.number.saturating_mul(1 << 8))
}

/// The number of a verdict; with what is held below, if anything is.
fn of_verdict(layout: &Layout, verdict: &Verdict, held: Option<&Hold>) -> u32 {
    let number = match verdict {
        Verdict::Direct => DIRECT,
        Verdict::Drop => DROP,
        Verdict::DropAll => DROP_ALL,
        // A verdict names a proxy that the layout has: without one, no rule matches.
        Verdict::Proxy(name) => layout.proxies.get(name).map_or(0, of_proxy),
        Verdict::Released => RELEASED,
    };
    number | held.map_or(0, |hold| hold.level)
}

/// What such a number of this layout's means: the verdict, and the level of what is held. None if it means
/// nothing.
pub(super) fn meaning(layout: &Layout, number: u32) -> Option<(Verdict, Option<u32>)> {
    let (verdict, level) = (number & !0xff, number & 0xff);
    let proxies = layout.proxies.keys().cloned().map(Verdict::Proxy);
    let mut verdicts = [
        Verdict::Direct,
        Verdict::Drop,
        Verdict::DropAll,
        Verdict::Released,
    ]
    .into_iter()
    .chain(proxies);
    let verdict = verdicts.find(|known| of_verdict(layout, known, None) == verdict)?;
    Some((verdict, Some(level).filter(|&level| level != 0)))
}

/// Which proxy's number this is, if it is one's and says nothing of what is held.
pub(super) fn proxy_number(number: u32) -> Option<u32> {
    (number >= PROXY && number & 0xff == 0).then(|| (number - PROXY) >> 8)
}

/// Whether with this number anything is dropped or held.
pub(super) fn holds_back(number: u32) -> bool {
    matches!(number & !0xff, DROP | DROP_ALL) || number & 0xff != 0
}

fn of_hold(layout: &Layout, hold: &Hold) -> u32 {
    of_verdict(layout, &hold.verdict, Some(hold))
}

impl Transaction<'_> {
    /// Rules that look at the levels of a socket's control group, deepest first: the nearest control group
    /// with a verdict of its own decides.
    pub(super) fn level_rules_of(
        &mut self,
        chain: &CStr,
        levels: &BTreeSet<u32>,
        look: impl Fn(RuleBuilder<'_>, u32) -> RuleBuilder<'_>,
    ) {
        for &level in levels.iter().rev() {
            if level == 0 {
                // At the root are the kernel's own sockets too, which nobody has open: what they say
                // (neighbour discovery, ICMP errors, resets) is about everybody's connections.
                // meta skuid >= 0 socket cgroupv2 level 0 …
                self.add_rules(chain, [&|rule| look(rule.skuid_known(), level)]);
            } else {
                // socket cgroupv2 level LEVEL map @cgroups-UID vmap @choices-UID
                self.add_rules(chain, [&|rule| look(rule, level)]);
            }
        }
    }

    /// What the numbers mean that every policy has.
    pub(super) fn common_choices(&mut self, names: &Names) {
        let mut map = self.set(&names.choices, KeyType::Mark, Content::Verdicts);
        map.push(&DIRECT.to_ne_bytes(), Element::Goto(&names.open));
        map.push(&DROP.to_ne_bytes(), Element::Goto(&names.drop));
        map.push(&DROP_ALL.to_ne_bytes(), Element::Drop);
        map.push(&RELEASED.to_ne_bytes(), Element::Goto(names.rest()));
        self.write_elements(&map, MsgType::Add);
    }

    pub(super) fn proxy_choice(&mut self, names: &Names, name: &ProxyName, proxy: &Proxy) {
        let number = of_proxy(proxy).to_ne_bytes();
        self.map_to_chain(&names.choices, KeyType::Mark, &number, &names.tproxy(name));
    }

    pub(super) fn delete_proxy_choice(&mut self, names: &Names, proxy: &Proxy) {
        let number = of_proxy(proxy).to_ne_bytes();
        self.delete_element(&names.choices, KeyType::Mark, &number);
    }

    /// The control groups' own sockets have their verdict. A socket that is deeper comes here only if
    /// nothing nearer to it is in the map: what it may do is not decided yet.
    ///
    /// It is dropped before anything is looked at that could let it through. Connections that came
    /// from outside have been let go at the beginning of the output chain.
    pub(super) fn create_hold(&mut self, names: &Names, layout: &Layout, hold: &Hold) {
        let chain = names.hold(hold);
        self.add_chain(&chain);
        // socket cgroupv2 level LEVEL != 0 drop
        self.add_rules(&chain, [&|rule| rule.socket_as_deep_as(hold.level).drop()]);
        match chain_of(names, &hold.verdict) {
            // goto CHAIN
            Some(decided) => self.add_rules(&chain, [&|rule| rule.goto(&decided)]),
            // drop
            None => self.add_rules(&chain, [&|rule| rule.drop()]),
        }
        let number = of_hold(layout, hold).to_ne_bytes();
        self.map_to_chain(&names.choices, KeyType::Mark, &number, &chain);
    }

    pub(super) fn delete_hold(&mut self, names: &Names, layout: &Layout, hold: &Hold) {
        let chain = names.hold(hold);
        let number = of_hold(layout, hold).to_ne_bytes();
        self.delete_element(&names.choices, KeyType::Mark, &number);
        self.flush_chain(&chain);
        self.delete_chain(&chain);
    }

    pub(super) fn delete_verdicts(
        &mut self,
        names: &Names,
        ids: impl Iterator<Item = ControlGroupId> + Clone,
    ) {
        for map in names.verdict_maps() {
            let mut deleted = self.set(map, KeyType::ControlGroup, Content::Numbers);
            for id in ids.clone() {
                deleted.push(&id.to_bytes(), Element::Key);
            }
            self.write_elements(&deleted, MsgType::Del);
        }
    }

    pub(super) fn add_verdicts(
        &mut self,
        names: &Names,
        layout: &Layout,
        verdicts: &[&(OwnedControlGroup, plan::Element)],
    ) {
        let mut map = self.set(&names.cgroups, KeyType::ControlGroup, Content::Numbers);
        for (cgroup, element) in verdicts {
            let hold = Hold::of(cgroup.level(), element);
            let number = of_verdict(layout, &element.verdict, hold.as_ref());
            map.push(&cgroup.id().to_bytes(), Element::Number(number));
        }
        self.write_elements(&map, MsgType::Add);
        if names.is_system() {
            let mut map = self.set(ENFORCED, KeyType::ControlGroup, Content::Verdicts);
            for (cgroup, element) in verdicts {
                let key = cgroup.id().to_bytes();
                if !element.enforced {
                    // It may be in one whose verdict is enforced.
                    map.push(&key, Element::Goto(SESSIONS));
                    continue;
                }
                let chain = match Hold::of(cgroup.level(), element) {
                    Some(hold) => Some(names.hold(&hold)),
                    None => chain_of(names, &element.verdict),
                };
                match &chain {
                    Some(chain) => map.push(&key, Element::Goto(chain)),
                    None => map.push(&key, Element::Drop),
                }
            }
            self.write_elements(&map, MsgType::Add);
        }
    }
}

/// The chain for packets with this verdict; none if it is to drop them all.
fn chain_of(names: &Names, verdict: &Verdict) -> Option<CString> {
    match verdict {
        Verdict::Direct => Some(names.open.clone()),
        Verdict::Drop => Some(names.drop.clone()),
        Verdict::DropAll => None,
        Verdict::Proxy(proxy) => Some(names.tproxy(proxy)),
        Verdict::Released => Some(names.rest().to_owned()),
    }
}
