//! What a rule looks like where it is dumped (linux/netfilter/nf_tables.h).

use crate::netlink::{attribute, string, values};

/// enum nft_rule_attributes
pub(super) const RULE_TABLE: u16 = 1;
pub(super) const RULE_CHAIN: u16 = 2;
pub(super) const RULE_EXPRESSIONS: u16 = 4;

/// enum nft_expr_attributes
pub(super) const EXPRESSION_NAME: u16 = 1;
pub(super) const EXPRESSION_DATA: u16 = 2;

/// The name and the attributes of each expression in a rule's list of them.
pub(super) fn expressions(list: &[u8]) -> impl Iterator<Item = (String, &[u8])> {
    values(list).filter_map(|expression| {
        let name = attribute(expression, EXPRESSION_NAME).map(string)?;
        let data = attribute(expression, EXPRESSION_DATA).unwrap_or_default();
        Some((name, data))
    })
}
