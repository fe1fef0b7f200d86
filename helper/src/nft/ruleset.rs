//! The table `inet cgtproxy`: how it is laid out, and what of it no user owns.
//!
//! ```text
//! table inet cgtproxy {
//!   chain version-18-ff000000 { }              # the format of this table, the mask of marks, and what UDP goes by
//!   map cgroups { type cgroupsv2 : mark }     # a control group : a number, no mark of a packet's
//!   map choices { type mark : verdict }       # that number : goto proxy-1000-mihomo
//!   map cgroups-0 { … }  map choices-0 { … }  # the same for the system's policy
//!   map enforced { type cgroupsv2 : mark }    # a control group of the system's policy : what of that is enforced
//!   map choices-enforced { type mark : verdict }  # that number : goto proxy-0-mihomo, or goto user-verdicts
//!   map marks   { type mark : verdict }       # a proxy's mark : goto proxy-1000-mihomo
//!                                             # a proxy's DNS mark : goto dns-1000-mihomo
//!   map drops   { type cgroupsv2 : verdict }  # user@1000.service : goto drop-1
//!   map deliver { type mark : verdict }       # a proxy's mark : goto deliver
//!   map deliver-answers { type mark : verdict }   # a proxy's mark : goto deliver-answers
//!   map ports   { type mark : inet_service }  # a proxy's mark : where it listens
//!   map guard   { type mark : verdict }       # a proxy's mark : goto guard
//!   set owners  { type mark . uid }           # a proxy's mark, and whose sockets may receive what has it
//!   map divert  { type mark : verdict }       # a mark of a proxy of the system's : goto divert-0-mihomo
//!   map resolve { type mark : verdict }       # a proxy's DNS mark : goto resolve-1000-mihomo
//!                                             # a proxy's mark : goto redirect-1000-mihomo
//!   map receive { type mark : verdict }       # both : goto receive-1000-mihomo, or return
//!   map users   { type uid : cgroupsv2 }      # whoever has a policy : user@1000.service
//!   map stamps  { type uid : mark }           # a user : the stamp of that user's layout, no mark of a packet's
//!   set proxy-uids { type uid }               # root, and whom the administrator allows
//!   set interfaces { type ifname }            # from where forwarded traffic is diverted
//!   set behind { type ifname }                # from where it has been since the table was made
//!   chain output         { type route hook output priority mangle; … goto enforced, or … }
//!   chain output-nat     { type nat hook output priority -101; … }
//!   chain prerouting     { type filter hook prerouting priority mangle; … goto gateway }
//!   chain prerouting-nat { type nat hook prerouting priority -101; … }
//!   chain input          { type filter hook input priority mangle; … }
//!   chain forward        { type filter hook forward priority mangle; … }
//!   chain delivery       { type filter hook prerouting priority 2147483647; … }
//!   chain postrouting    { type filter hook postrouting priority mangle; … }
//!   chain loopback       { type filter hook postrouting priority mangle; … }
//!   chain enforced { … goto user-verdicts }   # what the system's policy enforces
//!   chain user-verdicts { … goto system }     # users' own verdicts
//!   chain system   { … }                      # what the system's policy says besides
//!   chain enforced-deep { … }  chain user-verdicts-deep { … }   # the same for sockets deeper than level 8
//!   chain system-deep { … }
//!   chain open     { … }                      # connections to proxies go on as they began
//!   chain kernel   { … }                      # but for what no socket of anybody's sends
//!   chain answers  { … goto enforced, or … }  # to somebody for whom a proxy has spoken first
//!   chain replies  { … goto enforced, or … }  # on connections that others have opened
//!   chain brought  { … drop }                 # by a proxy, to who has asked it
//!   chain first-packets { … }                 # of TPROXY servers for others
//!   chain forged   { … drop }                 # first packets from an address that the machine does not have
//!   chain marked   { … goto open }            # connections that this table knows, or another program has marked so
//!   chain drop     { … }   chain refuse  { … }
//!   chain deliver  { … }   chain guard   { … }
//!   chain deliver-answers { … }   chain guard-answers { … }
//!   chain drop-system { … }   chain deliver-system { … }   chain guard-system { … }
//!   chain deliver-answers-system { … }   chain guard-answers-system { … }
//!   chain gateway  { … }   chain forwarded { … }   # what the system's policy says of forwarded packets
//!
//!   set bypass4-1 { type ipv4_addr; flags interval }       # these three for whoever bypasses the same
//!   set bypass6-1 { type ipv6_addr; flags interval }
//!   chain drop-1 { … }
//!   chain proxy-1000-mihomo { … }
//!   chain dns-1000-mihomo { … }      chain resolve-1000-mihomo { … }    # with dns-hijack
//!   chain redirect-1000-mihomo { … }          # if it is no TPROXY server
//!   chain receive-1000-mihomo { … }           # in both cases
//!   chain hold-1000-5-mihomo { … }            # control groups at level 4, below which all is held
//!   chain hold-5-direct { … }                 # the same where all users can have one
//!   chain hold-0-5-_users { … }               # what the system's policy holds before users' own have a say
//! }
//! ```
//!
//! Users share the rules that every packet goes through and the maps that these look into. The kernel goes over
//! every chain with every transaction, so that each chain of each user makes every other user's changes slower;
//! and a packet that had to find its user first would look up one thing more. What is one user's is that all the
//! same: an element's key is a control group below that user's own or a mark of that user's proxy, and chains
//! have the uid in their names.
//!
//! The system's policy is that of root: its objects have the number 0, but for the chains above
//! that stand in for those with a user's number. These chains are there without a policy too, so that nothing else
//! depends on whether there is one. The policy's maps (`cgroups-0`, `choices-0`, `enforced`, `choices-enforced`) come and go
//! with it, and base chains other than `output` and `forward` come when they are first needed.
//!
//! The mark of a proxy has the divert bit, by which the `ip rule` sends a packet back in over lo. The connection keeps
//! it as its conntrack mark, so that it goes on as it began whatever becomes of the rules; only drops look at every
//! packet, and there are such rules only while anything is dropped or held. It is by that mark that a packet is
//! delivered. A hijacked DNS query carries the same mark without the divert bit, as its conntrack mark only: it is not
//! diverted but translated. So is what goes to a proxy that is no TPROXY server; its conntrack mark has the divert bit.
//!
//! In `output`, replies go to `replies` first, where those of local services return, and connections that are open to a
//! proxy go to `open`, by `marked`. What is left is not diverted, or not yet; if `enforced`, `user-verdicts` and `system`
//! return a packet, it leaves as it is.

use std::ffi::{CStr, CString};

pub(super) use cgtproxy_proto::SYSTEM_UIDS;
use nftnl::{ChainType, Hook, MsgType};

use super::ffi::{Content, Element, KeyType};
use super::names;
use super::policy::UdpVerdicts;
use super::rule::Protocol;
use super::shared::Shared;
use super::transaction::Transaction;
use crate::mark::MarkRange;

/// The version of the table's layout, which changes with its chains, maps and rules.
const VERSION: u32 = 18;
pub(super) const CGROUPS: &CStr = c"cgroups";
pub(super) const CGROUPS_SYSTEM: &CStr = c"cgroups-0";
pub(super) const CHOICES: &CStr = c"choices";
pub(super) const CHOICES_SYSTEM: &CStr = c"choices-0";
pub(super) const CHOICES_ENFORCED: &CStr = c"choices-enforced";
pub(super) const MARKS: &CStr = c"marks";
pub(super) const DROPS: &CStr = c"drops";
pub(super) const PORTS: &CStr = c"ports";
pub(super) const OWNERS: &CStr = c"owners";
pub(super) const USERS: &CStr = c"users";
pub(super) const INTERFACES: &CStr = c"interfaces";
pub(super) const BEHIND: &CStr = c"behind";
pub(super) const BROUGHT: &CStr = c"brought";
/// A chain, and the map that it looks into: every control group of the system's policy.
pub(super) const ENFORCED: &CStr = c"enforced";
pub(super) const USER_VERDICTS: &CStr = c"user-verdicts";
pub(super) const SYSTEM: &CStr = c"system";
/// The chains for sockets that are deeper than level 8.
pub(super) const ENFORCED_DEEP: &CStr = c"enforced-deep";
pub(super) const USER_VERDICTS_DEEP: &CStr = c"user-verdicts-deep";
pub(super) const SYSTEM_DEEP: &CStr = c"system-deep";
pub(super) const OPEN: &CStr = c"open";
pub(super) const KERNEL: &CStr = c"kernel";
pub(super) const DROP: &CStr = c"drop";
pub(super) const DROP_SYSTEM: &CStr = c"drop-system";
pub(super) const REFUSE: &CStr = c"refuse";
pub(super) const GATEWAY: &CStr = c"gateway";
pub(super) const FORWARDED: &CStr = c"forwarded";
/// `deliver`, `guard` and `deliver-answers` are the names of a map and of a chain that it leads to.
pub(super) const DELIVER: &CStr = c"deliver";
pub(super) const GUARD: &CStr = c"guard";
pub(super) const DELIVER_SYSTEM: &CStr = c"deliver-system";
pub(super) const GUARD_SYSTEM: &CStr = c"guard-system";
pub(super) const ANSWERS: &CStr = c"answers";
pub(super) const REPLIES: &CStr = c"replies";
pub(super) const FIRST_PACKETS: &CStr = c"first-packets";
pub(super) const FORGED: &CStr = c"forged";
pub(super) const MARKED: &CStr = c"marked";
pub(super) const DELIVER_ANSWERS: &CStr = c"deliver-answers";
pub(super) const DELIVER_ANSWERS_SYSTEM: &CStr = c"deliver-answers-system";
pub(super) const GUARD_ANSWERS: &CStr = c"guard-answers";
pub(super) const GUARD_ANSWERS_SYSTEM: &CStr = c"guard-answers-system";
pub(super) const DIVERT: &CStr = c"divert";
pub(super) const RESOLVE: &CStr = c"resolve";
pub(super) const RECEIVE: &CStr = c"receive";
pub(super) const STAMPS: &CStr = c"stamps";
pub(super) const PROXY_UIDS: &CStr = c"proxy-uids";
pub(super) const OUTPUT: &CStr = c"output";
pub(super) const OUTPUT_NAT: &CStr = c"output-nat";
pub(super) const PREROUTING: &CStr = c"prerouting";
pub(super) const DELIVERY: &CStr = c"delivery";
pub(super) const PREROUTING_NAT: &CStr = c"prerouting-nat";
pub(super) const INPUT: &CStr = c"input";
pub(super) const FORWARD: &CStr = c"forward";
pub(super) const POSTROUTING: &CStr = c"postrouting";
pub(super) const LOOPBACK: &CStr = c"loopback";

/// `mangle` of the inet family (linux/netfilter_ipv4.h, NF_IP_PRI_MANGLE).
pub(super) const PRIORITY_MANGLE: i32 = -150;

/// The level of user@UID.service: user.slice, user-UID.slice, user@UID.service.
const USER_LEVEL: u32 = 3;

/// The chain that says how a table is laid out, by which bits of marks its rules go, and what UDP goes by. A table without
/// it is made anew: under another mask, the number of one user's proxy may be that of another's.
pub(super) fn version(marks: MarkRange, udp_verdicts: UdpVerdicts) -> CString {
    let suffix = match udp_verdicts {
        UdpVerdicts::PerConversation => "",
        UdpVerdicts::PerDatagram => "-per-datagram",
    };
    names::name(format!("version-{VERSION}-{:08x}{suffix}", marks.mask()))
}

/// What the table depends on besides what users have.
pub(super) struct Base<'a> {
    /// Whose proxies may receive diverted packets of every user.
    pub(super) proxy_uids: &'a [u32],
    /// The kernel knows `fib`.
    pub(super) has_fib: bool,
}

/// Whether a chain says how a table is laid out, whatever it says.
pub(super) fn is_version(chain: &str) -> bool {
    chain.starts_with("version-")
}

impl Transaction<'_> {
    /// Everything that no user owns. Unless the table is `fresh`, what is there stays, and its rules are written anew,
    /// but for those of the system's policy if there is one.
    pub(super) fn base(&mut self, base: &Base<'_>, shared: &Shared, fresh: bool) {
        self.add_chain(&version(self.marks, self.udp_verdicts));
        let group = KeyType::ControlGroup;
        self.add_set(CGROUPS, group, Content::Values(KeyType::Mark));
        self.add_set(DROPS, group, Content::Verdicts);
        for map in [
            CHOICES,
            MARKS,
            DELIVER,
            DELIVER_ANSWERS,
            DIVERT,
            GUARD,
            RESOLVE,
            RECEIVE,
        ] {
            self.add_set(map, KeyType::Mark, Content::Verdicts);
        }
        self.add_set(PORTS, KeyType::Mark, Content::Values(KeyType::Port));
        self.add_set(OWNERS, KeyType::MarkAndUid, Content::Keys);
        self.add_set(USERS, KeyType::Uid, Content::Values(group));
        self.add_set(STAMPS, KeyType::Uid, Content::Values(KeyType::Mark));
        self.add_set(INTERFACES, KeyType::Interface, Content::Keys);
        self.add_set(BEHIND, KeyType::Interface, Content::Keys);
        self.add_set(PROXY_UIDS, KeyType::Uid, Content::Keys);
        self.flush_set(PROXY_UIDS);
        let mut uids = self.set(PROXY_UIDS, KeyType::Uid, Content::Keys);
        for uid in base.proxy_uids {
            uids.push(&uid.to_ne_bytes(), Element::Key);
        }
        self.write_elements(&uids, MsgType::Add);
        for chain in [
            ENFORCED,
            ENFORCED_DEEP,
            USER_VERDICTS,
            USER_VERDICTS_DEEP,
            SYSTEM,
            SYSTEM_DEEP,
            OPEN,
            KERNEL,
            DROP,
            DROP_SYSTEM,
            REFUSE,
            DELIVER,
            DELIVER_SYSTEM,
            GUARD,
            GUARD_SYSTEM,
            ANSWERS,
            REPLIES,
            BROUGHT,
            FIRST_PACKETS,
            FORGED,
            MARKED,
            DELIVER_ANSWERS,
            DELIVER_ANSWERS_SYSTEM,
            GUARD_ANSWERS,
            GUARD_ANSWERS_SYSTEM,
            GATEWAY,
            FORWARDED,
        ] {
            self.add_chain(chain);
        }
        self.common_choices(CHOICES, DROP, Element::Goto(SYSTEM));
        let mangle = PRIORITY_MANGLE;
        self.add_base_chain(OUTPUT, ChainType::Route, Hook::Out, mangle);
        self.add_base_chain(FORWARD, ChainType::Filter, Hook::Forward, mangle);
        self.first_rules(shared.has_system());
        self.drop_and_refuse_rules();
        self.kernel_rules();
        self.first_packet_rules();
        self.brought_rules(base.has_fib);
        self.forged_rules(base.has_fib);
        self.guard_rules();
        self.forward_rules();
        if !fresh {
            // There may be proxies, whose agents come back later.
            self.tproxy_chains();
        }
    }

    /// Chains `drop` and `refuse`.
    fn drop_and_refuse_rules(&mut self) {
        self.flush_chain(DROP);
        self.add_rules(
            DROP,
            [
                // socket cgroupv2 level 3 vmap @drops
                &|rule| rule.socket_cgroupv2_vmap(USER_LEVEL, DROPS),
                // drop
                &|rule| rule.drop(),
            ],
        );
        self.flush_chain(REFUSE);
        self.add_rules(
            REFUSE,
            [
                // meta l4proto tcp reject with tcp reset
                &|rule| rule.l4proto(Protocol::Tcp).reject_with_tcp_reset(),
                // reject
                &|rule| rule.reject(),
            ],
        );
    }
}
