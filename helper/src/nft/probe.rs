//! What the kernel can do, found by asking it: a rule in a table that is made and deleted in one transaction, and so
//! never sees a packet.

use std::ffi::CStr;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use nftnl::{ProtoFamily, Table};
use rustix::io::Errno;

use super::rule::RuleBuilder;
use super::{Nftables, PROBE};
use crate::conntrack::Conntrack;
use crate::netlink::Refusal;
use crate::route::Family;

const CHAIN: &CStr = c"probe";

/// Makes a rule of what is to be tried.
type Attempt = fn(RuleBuilder<'_>) -> RuleBuilder<'_>;

/// What proxies need besides what the table itself needs, without which the helper does not start.
pub(super) const FEATURES: [(&str, Attempt); 3] = [
    ("tproxy", |rule| rule.tproxy(Family::Ipv4, 1)),
    ("fib", |rule| rule.daddr_local_or_many().return_()),
    ("dnat", |rule| rule.dnat(IpAddr::V4(Ipv4Addr::LOCALHOST), 1)),
];

/// What tells the relay where UDP was going.
const CTNETLINK: &str = "ctnetlink";

impl Nftables {
    /// What the kernel lacks of what proxies need: statements and expressions of nft, and ctnetlink.
    #[must_use]
    pub fn missing_features(&self) -> Vec<&'static str> {
        let missing = FEATURES
            .iter()
            .filter(|(_, rule)| self.attempt(*rule).is_err());
        let missing = missing.map(|(feature, _)| *feature);
        missing
            .chain(lacks_ctnetlink().then_some(CTNETLINK))
            .collect()
    }

    /// Whether the kernel can tell whose address a packet is from.
    ///
    /// # Errors
    /// If it does not say.
    pub(super) fn has_fib(&self) -> Result<bool, Refusal> {
        match self.attempt(|rule| rule.saddr_is_local().return_()) {
            Err(refusal) if is_unknown(&refusal) => Ok(false),
            result => result.map(|()| true),
        }
    }

    fn attempt(&self, rule: Attempt) -> Result<(), Refusal> {
        let table = Table::new(PROBE, ProtoFamily::Inet);
        let mut transaction = self.transaction_on(&table);
        transaction.add_table(0);
        transaction.add_chain(CHAIN);
        transaction.add_rules(CHAIN, [&rule]);
        transaction.delete_table();
        self.socket.transact(&transaction.finish())
    }
}

/// Whether the kernel has no such expression, or not for this family (`nf_tables_expr_parse`, net/netfilter/nf_tables_api.c).
fn is_unknown(refusal: &Refusal) -> bool {
    matches!(
        refusal.errno,
        Errno::NOENT | Errno::OPNOTSUPP | Errno::INVAL
    )
}

/// Whether the kernel knows no such netlink subsystem, found by asking for a connection that is not there.
fn lacks_ctnetlink() -> bool {
    let nowhere = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let answer = Conntrack::open()
        .map_err(Refusal::from)
        .and_then(|conntrack| conntrack.find_udp(nowhere, nowhere));
    answer.is_err_and(|refusal| refusal.errno == Errno::INVAL)
}
