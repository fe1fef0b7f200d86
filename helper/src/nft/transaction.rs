//! A transaction in the making: one method for each command of nft.

use std::ffi::CStr;

use nftnl::{
    Batch, Chain, ChainType, FinalizedBatch, Hook, MsgType, NlMsg, Policy, Priority, Rule, Table,
};

use super::ffi::{Content, Element, FlaggedTable, FlushSet, KeyType, Set};
use super::policy::UdpVerdicts;
use super::rule::RuleBuilder;
use super::shared::LookedAt;
use crate::mark::MarkRange;

/// A batch in the making, in the order in which the kernel will carry it out.
pub(super) struct Transaction<'a> {
    batch: Batch,
    table: &'a Table,
    pub(super) marks: MarkRange,
    pub(super) udp_verdicts: UdpVerdicts,
    /// What the rules of the output hook look at once all of this is carried out.
    pub(super) looked_at: LookedAt,
    /// How many messages it has by now.
    messages: usize,
    next_set_id: u32,
}

impl<'a> Transaction<'a> {
    /// A transaction on a table that has nothing yet.
    pub(super) fn new(table: &'a Table, marks: MarkRange, udp_verdicts: UdpVerdicts) -> Self {
        Self {
            batch: Batch::new(),
            table,
            marks,
            udp_verdicts,
            looked_at: LookedAt::default(),
            messages: 0,
            next_set_id: 1,
        }
    }

    pub(super) fn finish(self) -> FinalizedBatch {
        self.batch.finalize()
    }

    fn add(&mut self, message: &impl NlMsg, kind: MsgType) {
        self.batch.add(message, kind);
        self.messages += 1;
    }

    /// How many messages it has by now.
    pub(super) fn messages(&self) -> usize {
        self.messages
    }

    /// `add table inet cgtproxy { flags … }`
    pub(super) fn add_table(&mut self, flags: u32) {
        self.add(
            &FlaggedTable {
                table: self.table,
                flags,
            },
            MsgType::Add,
        );
    }

    /// `delete table inet cgtproxy`
    pub(super) fn delete_table(&mut self) {
        self.add(self.table, MsgType::Del);
    }

    pub(super) fn add_chain(&mut self, chain: &CStr) {
        self.add(&Chain::new(chain, self.table), MsgType::Add);
    }

    pub(super) fn delete_chain(&mut self, chain: &CStr) {
        self.add(&Chain::new(chain, self.table), MsgType::Del);
    }

    /// Deletes chains, which may lead to each other.
    pub(super) fn delete_chains<C: AsRef<CStr>>(
        &mut self,
        chains: impl IntoIterator<Item = C> + Clone,
    ) {
        for chain in chains.clone() {
            self.flush_chain(chain.as_ref());
        }
        for chain in chains {
            self.delete_chain(chain.as_ref());
        }
    }

    /// `flush chain`: a deletion that names no rule deletes all of a chain.
    pub(super) fn flush_chain(&mut self, chain: &CStr) {
        let chain = Chain::new(chain, self.table);
        self.add(&Rule::new(&chain), MsgType::Del);
    }

    /// Adds a base chain, which may be there already, and flushes it.
    pub(super) fn add_base_chain(
        &mut self,
        name: &CStr,
        kind: ChainType,
        hook: Hook,
        priority: Priority,
    ) {
        let mut base = Chain::new(name, self.table);
        base.set_type(kind);
        base.set_hook(hook, priority);
        base.set_policy(Policy::Accept);
        self.add(&base, MsgType::Add);
        self.flush_chain(name);
    }

    /// Adds rules to the end of a chain.
    pub(super) fn add_rules<const N: usize>(
        &mut self,
        chain: &CStr,
        rules: [&dyn Fn(RuleBuilder<'_>) -> RuleBuilder<'_>; N],
    ) {
        let chain = Chain::new(chain, self.table);
        for rule in rules {
            self.add(&rule(RuleBuilder::new(&chain)).finish(), MsgType::Add);
        }
    }

    /// A set or map to write. Its key and content count for [`Self::add_set`] alone; elements are written by its name.
    pub(super) fn set(&mut self, name: &CStr, key: KeyType, content: Content) -> Set<'a> {
        let id = self.next_set_id;
        self.next_set_id += 1;
        Set::new(self.table, name, id, key, content)
    }

    pub(super) fn add_set(&mut self, name: &CStr, key: KeyType, content: Content) {
        let set = self.set(name, key, content);
        self.add(&set, MsgType::Add);
    }

    pub(super) fn delete_set(&mut self, name: &CStr) {
        let set = self.set(name, KeyType::Mark, Content::Keys);
        self.add(&set, MsgType::Del);
    }

    pub(super) fn flush_set(&mut self, name: &CStr) {
        let set = self.set(name, KeyType::Mark, Content::Keys);
        self.add(&FlushSet(&set), MsgType::Add);
    }

    /// Adds the set's elements, or deletes them.
    pub(super) fn write_elements(&mut self, set: &Set<'_>, message: MsgType) {
        let mut messages = set.elements();
        while let Some(elements) = messages.next() {
            self.add(&elements, message);
        }
    }

    pub(super) fn delete_element(&mut self, set: &CStr, key: &[u8]) {
        let mut set = self.set(set, KeyType::Mark, Content::Keys);
        set.push(key, Element::Key);
        self.write_elements(&set, MsgType::Del);
    }

    pub(super) fn add_element(&mut self, set: &CStr, key: &[u8], element: Element<'_>) {
        let mut set = self.set(set, KeyType::Mark, Content::Keys);
        set.push(key, element);
        self.write_elements(&set, MsgType::Add);
    }
}
