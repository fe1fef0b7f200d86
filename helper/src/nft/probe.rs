//! What the kernel can do, found by asking it: a rule in a table that is made and deleted in one transaction, and so
//! never sees a packet.

use std::ffi::CStr;
use std::net::{IpAddr, Ipv4Addr};

use nftnl::{ProtoFamily, Table};

use super::rule::RuleBuilder;
use super::transaction::Transaction;
use super::{Nftables, PROBE};

const CHAIN: &CStr = c"probe";

/// Makes a rule of what is to be tried.
pub(super) type Attempt = fn(RuleBuilder<'_>) -> RuleBuilder<'_>;

/// What proxies need besides what the table itself needs, without which the helper does not start.
pub(super) const FEATURES: [(&str, Attempt); 3] = [
    ("tproxy", |rule| rule.tproxy(1)),
    ("fib", |rule| rule.daddr_local_or_many().return_()),
    ("dnat", |rule| rule.dnat(IpAddr::V4(Ipv4Addr::LOCALHOST), 1)),
];

impl Nftables {
    /// What the kernel lacks of what proxies need, in nft's words.
    #[must_use]
    pub fn missing_features(&self) -> Vec<&'static str> {
        let missing = FEATURES.iter().filter(|(_, rule)| !self.takes(*rule));
        missing.map(|(feature, _)| *feature).collect()
    }

    fn takes(&self, rule: Attempt) -> bool {
        let table = Table::new(PROBE, ProtoFamily::Inet);
        let mut transaction = Transaction::new(&table, self.marks);
        transaction.add_table(0);
        transaction.add_chain(CHAIN);
        transaction.add_rules(CHAIN, [&rule]);
        transaction.delete_table();
        self.socket.transact(&transaction.finish()).is_ok()
    }
}
