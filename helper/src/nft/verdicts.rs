//! What is said about single control groups.
//!
//! The map from control groups holds numbers, not verdicts, and a second, small map says what each number
//! means. A verdict that names a chain makes the kernel walk through every chain of the table that can be
//! reached, with every element of every verdict map on the way, before it accepts a transaction
//! (nf_tables_validate, net/netfilter/nf_tables_api.c): the more control groups all users have, the longer
//! would each one's change take. A number makes it look at nothing.
//!
//! What the system's policy enforces is in a map of numbers of its own, which has another meaning for what it
//! leaves to users.

use std::ffi::CStr;

use nftnl::MsgType;

use super::ffi::{Comment, Content, Element, KeyType};
use super::map_elements::MapKey;
use super::names::{Names, ProxyChain};
use super::plan::Layout;
use super::policy::{self, Enforced, Hold, Proxy, Verdict};
use super::rule::RuleBuilder;
use super::ruleset::{CHOICES_ENFORCED, DROP_SYSTEM, ENFORCED, SYSTEM, USER_VERDICTS};
use super::shared::Shared;
use super::transaction::Transaction;
use crate::cgroup::{ControlGroupId, OwnedControlGroup};
use crate::mark::MarkRange;

/// What a number means: its upper 24 bits. The lower eight are the level of what is held, or 0.
const DIRECT: u32 = 1 << 8;
const DROP: u32 = 2 << 8;
const DROP_ALL: u32 = 3 << 8;
const UNDECIDED: u32 = 4 << 8;
/// Users' own policies decide, and then the system's.
const USERS: u32 = 5 << 8;
/// The number of the proxy whose mark has number N is `PROXY` + N.
const PROXY: u32 = 16;

/// The number of a proxy's verdict, which comes from its mark and is no other user's.
pub(super) fn of_proxy(marks: MarkRange, proxy: &Proxy) -> u32 {
    (PROXY + marks.number(proxy.mark)) << 8
}

/// The number of a verdict, with the level of what is held below, if anything is.
fn of_verdict(marks: MarkRange, layout: &Layout, verdict: &Verdict, held: Option<&Hold>) -> u32 {
    let number = match verdict {
        Verdict::Direct => DIRECT,
        Verdict::Drop => DROP,
        Verdict::DropAll => DROP_ALL,
        // A verdict names a proxy that the layout has: without one, no rule matches.
        Verdict::Proxy(name) => layout
            .proxies
            .get(name)
            .map_or(0, |proxy| of_proxy(marks, proxy)),
        Verdict::Undecided => UNDECIDED,
    };
    number | held.map_or(0, |hold| hold.level)
}

/// What a number means in this layout: the verdict, and the level of what is held. None if it means nothing.
pub(super) fn meaning(
    marks: MarkRange,
    layout: &Layout,
    number: u32,
) -> Option<(Verdict, Option<u32>)> {
    let (verdict, level) = (number & !0xff, number & 0xff);
    let proxies = layout.proxies.keys().cloned().map(Verdict::Proxy);
    let mut verdicts = Verdict::COMMON.into_iter().chain(proxies);
    let verdict = verdicts.find(|known| of_verdict(marks, layout, known, None) == verdict)?;
    Some((verdict, Some(level).filter(|&level| level != 0)))
}

/// Whether this number drops or holds anything.
pub(super) fn holds_back(number: u32) -> bool {
    matches!(number & !0xff, DROP | DROP_ALL) || number & 0xff != 0
}

/// The number that leads to a hold's chain.
pub(super) fn of_hold(marks: MarkRange, layout: &Layout, hold: &Hold) -> u32 {
    match &hold.verdict {
        Some(verdict) => of_verdict(marks, layout, verdict, Some(hold)),
        None => USERS | hold.level,
    }
}

/// The number that an element has in the map `enforced`: if its verdict is enforced, the number of that.
fn of_enforced(marks: MarkRange, layout: &Layout, level: u32, element: &policy::Element) -> u32 {
    let hold = match element.enforced {
        Enforced::All => Hold::of(level, element),
        Enforced::Hold => Hold::before_users(level, element),
        Enforced::Nothing => None,
    };
    match hold {
        Some(hold) => of_hold(marks, layout, &hold),
        None if element.enforced == Enforced::All => {
            of_verdict(marks, layout, &element.verdict, None)
        }
        // The element says so for what is in a control group whose verdict is enforced.
        None => USERS,
    }
}

/// What a number of the map `enforced` says is enforced.
pub(super) fn what_is_enforced(number: u32) -> Enforced {
    match (number & !0xff, number & 0xff) {
        (USERS, 0) => Enforced::Nothing,
        (USERS, _) => Enforced::Hold,
        _ => Enforced::All,
    }
}

impl Transaction<'_> {
    /// Adds the elements of a map of verdicts for the numbers that every policy has.
    pub(super) fn common_choices(&mut self, choices: &CStr, drop: &CStr, undecided: Element<'_>) {
        let mut map = self.set(choices, KeyType::Mark, Content::Verdicts);
        map.push(&DIRECT.to_ne_bytes(), Element::Return);
        map.push(&DROP.to_ne_bytes(), Element::Goto(drop));
        map.push(&DROP_ALL.to_ne_bytes(), Element::Drop);
        map.push(&UNDECIDED.to_ne_bytes(), undecided);
        self.write_elements(&map, MsgType::Add);
    }

    /// Adds the elements of the system policy's two maps of verdicts for the numbers that it has without proxies and
    /// holds.
    pub(super) fn common_system_choices(&mut self, names: &Names) {
        for choices in [names.choices(), CHOICES_ENFORCED] {
            self.common_choices(choices, DROP_SYSTEM, Element::Return);
        }
        let key = USERS.to_ne_bytes();
        self.add_element(CHOICES_ENFORCED, &key, Element::Goto(USER_VERDICTS));
    }

    /// Makes a hold's chain. The control groups' own sockets have their verdict. A socket that is deeper comes here
    /// only if nothing nearer to it is in the map: what it may do is not decided yet.
    ///
    /// It is dropped before anything is looked at that could let it through. Replies on connections that came from
    /// outside have left before, in `output`.
    pub(super) fn create_hold(&mut self, names: &Names, layout: &Layout, hold: &Hold) {
        let chain = names.hold(hold);
        self.add_chain(&chain);
        self.flush_chain(&chain);
        self.add_rules(
            &chain,
            [
                // socket cgroupv2 level LEVEL != 0 drop
                &|rule| rule.socket_level_exists(hold.level).drop(),
                // goto CHAIN, return or drop
                &|rule| match &hold.verdict {
                    Some(verdict) => decide(rule, names, verdict),
                    None => rule.goto(USER_VERDICTS),
                },
            ],
        );
        self.add_map_elements(&names.hold_elements(self.marks, layout, hold));
    }

    /// Deletes a hold's chain, unless another user has it too.
    pub(super) fn delete_hold(
        &mut self,
        names: &Names,
        layout: &Layout,
        hold: &Hold,
        shared: &Shared,
    ) {
        if hold.is_common() && !names.is_system() && shared.is_held_elsewhere(names.uid, hold) {
            return;
        }
        let elements = names.hold_elements(self.marks, layout, hold);
        self.delete_hold_chain(names, hold, elements.keys());
    }

    /// Deletes the chains of holds of which it is only known that they are there, unless another user may have them.
    pub(super) fn delete_holds<'h>(
        &mut self,
        names: &Names,
        holds: impl IntoIterator<Item = (&'h Hold, &'h MapKey)>,
        shared: &Shared,
    ) {
        for (hold, key) in holds {
            if !shared.is_held_elsewhere(names.uid, hold) {
                self.delete_hold_chain(names, hold, [key]);
            }
        }
    }

    fn delete_hold_chain<'p>(
        &mut self,
        names: &Names,
        hold: &Hold,
        elements: impl IntoIterator<Item = &'p MapKey>,
    ) {
        let chain = names.hold(hold);
        self.delete_map_elements(elements);
        self.flush_chain(&chain);
        self.delete_chain(&chain);
    }

    pub(super) fn delete_verdicts(
        &mut self,
        names: &Names,
        ids: impl Iterator<Item = ControlGroupId> + Clone,
    ) {
        for map in names.number_maps() {
            let mut deleted = self.set(map, KeyType::ControlGroup, Content::Keys);
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
        verdicts: &[&(OwnedControlGroup, policy::Element)],
    ) {
        let content = Content::Values(KeyType::Mark);
        let mut map = self.set(names.cgroups(), KeyType::ControlGroup, content);
        let whose = Comment::new(names.uid);
        for (cgroup, element) in verdicts {
            let hold = Hold::of(cgroup.level(), element);
            let number = of_verdict(self.marks, layout, &element.verdict, hold.as_ref());
            let number = number.to_ne_bytes();
            map.push_with(
                &cgroup.id().to_bytes(),
                Element::Value(&number),
                Some(&whose),
            );
        }
        self.write_elements(&map, MsgType::Add);
        if names.is_system() {
            let mut map = self.set(ENFORCED, KeyType::ControlGroup, content);
            for (cgroup, element) in verdicts {
                let number = of_enforced(self.marks, layout, cgroup.level(), element);
                let number = number.to_ne_bytes();
                map.push(&cgroup.id().to_bytes(), Element::Value(&number));
            }
            self.write_elements(&map, MsgType::Add);
        }
    }
}

/// What becomes of packets that have a verdict.
fn decide<'a>(rule: RuleBuilder<'a>, names: &Names, verdict: &Verdict) -> RuleBuilder<'a> {
    match verdict {
        Verdict::Direct => rule.return_(),
        Verdict::Drop => rule.goto(names.dropping()),
        Verdict::DropAll => rule.drop(),
        Verdict::Proxy(proxy) => rule.goto(&names.chain(ProxyChain::Proxy, proxy)),
        // A user's packets go on to the system's policy; after that there is nothing.
        Verdict::Undecided if names.is_system() => rule.return_(),
        Verdict::Undecided => rule.goto(SYSTEM),
    }
}
