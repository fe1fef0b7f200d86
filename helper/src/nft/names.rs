//! Names of objects in the table. Everything that is a user's carries the uid.

use std::ffi::{CStr, CString};

use cgtproxy_proto::name::ProxyName;

use super::plan::{Hold, Verdict};
use super::ruleset::{ENFORCED, MARKS, OPEN, SYSTEM};
use crate::peer::Uid;

/// The prefix of a chain that diverts to a proxy, as dumps are searched for it.
pub(super) const DIVERT_PREFIX: &str = "divert-";
/// The prefix of a chain that chooses what is diverted to a proxy, as dumps are searched for it.
pub(super) const TPROXY_PREFIX: &str = "tproxy-";
/// The prefix of a user's first chain, as dumps are searched for it.
pub(super) const USER_PREFIX: &str = "user-";
/// The prefix of a chain that everybody with a policy has, as dumps are searched for it.
pub(super) const DROP_PREFIX: &str = "drop-";

const DIRECT: &str = "direct";
const DROP: &str = "drop";
const DROP_ALL: &str = "drop-all";
/// No proxy's name begins like that.
const RELEASED: &str = "_released";

/// A name made of our own prefixes, a number and a proxy's name, none of which has a NUL.
fn name(text: String) -> CString {
    CString::new(text).unwrap_or_default()
}

/// The names of a user's objects. For root they are those of the system's policy, some of which the table
/// has in any case.
pub(super) struct Names {
    pub(super) uid: Uid,
    pub(super) user: CString,
    pub(super) open: CString,
    pub(super) drop: CString,
    pub(super) guard: CString,
    pub(super) owner: CString,
    pub(super) cgroups: CString,
    pub(super) choices: CString,
    pub(super) marks: CString,
    pub(super) bypass4: CString,
    pub(super) bypass6: CString,
}

impl Names {
    pub(super) fn of(uid: Uid) -> Self {
        Self {
            uid,
            user: match uid {
                Uid::ROOT => SYSTEM.to_owned(),
                uid => name(format!("{USER_PREFIX}{uid}")),
            },
            open: match uid {
                Uid::ROOT => OPEN.to_owned(),
                uid => name(format!("open-{uid}")),
            },
            drop: name(format!("{DROP_PREFIX}{uid}")),
            guard: name(format!("guard-{uid}")),
            owner: name(format!("owner-{uid}")),
            cgroups: name(format!("cgroups-{uid}")),
            choices: name(format!("choices-{uid}")),
            marks: marks(uid),
            bypass4: name(format!("bypass4-{uid}")),
            bypass6: name(format!("bypass6-{uid}")),
        }
    }

    /// No proxy can be named as another target is.
    pub(super) fn hold(&self, hold: &Hold) -> CString {
        let verdict = match &hold.verdict {
            Verdict::Direct => DIRECT,
            Verdict::Drop => DROP,
            Verdict::DropAll => DROP_ALL,
            Verdict::Proxy(proxy) => proxy.as_str(),
            Verdict::Released => RELEASED,
        };
        let (prefix, level) = (hold_prefix(self.uid), hold.level);
        name(format!("{prefix}{level}-{verdict}"))
    }

    /// Whether these are those of the system's policy.
    pub(super) fn is_system(&self) -> bool {
        self.uid == Uid::ROOT
    }

    /// Where packets go that the policy says nothing about.
    pub(super) fn rest(&self) -> &'static CStr {
        if self.is_system() { OPEN } else { SYSTEM }
    }

    /// The chains that come and go with the policy, but for those of its proxies.
    pub(super) fn own_chains(&self) -> Vec<&CString> {
        let mut chains = vec![&self.drop, &self.guard, &self.owner];
        if !self.is_system() {
            chains.extend([&self.user, &self.open]);
        }
        chains
    }

    /// The sets and maps that come and go with the policy.
    pub(super) fn own_sets(&self) -> [&CStr; 5] {
        let other: &CStr = if self.is_system() {
            ENFORCED
        } else {
            &self.marks
        };
        [
            &self.cgroups,
            &self.choices,
            other,
            &self.bypass4,
            &self.bypass6,
        ]
    }

    /// The maps that have every control group of the policy as a key.
    pub(super) fn verdict_maps(&self) -> Vec<&CStr> {
        let mut maps = vec![self.cgroups.as_c_str()];
        if self.is_system() {
            maps.push(ENFORCED);
        }
        maps
    }

    pub(super) fn tproxy(&self, proxy: &ProxyName) -> CString {
        name(format!("{TPROXY_PREFIX}{}-{proxy}", self.uid))
    }

    pub(super) fn divert(&self, proxy: &ProxyName) -> CString {
        name(format!("{DIVERT_PREFIX}{}-{proxy}", self.uid))
    }

    pub(super) fn deliver(&self, proxy: &ProxyName) -> CString {
        name(format!("deliver-{}-{proxy}", self.uid))
    }

    pub(super) fn dns(&self, proxy: &ProxyName) -> CString {
        name(format!("dns-{}-{proxy}", self.uid))
    }

    pub(super) fn resolve(&self, proxy: &ProxyName) -> CString {
        name(format!("resolve-{}-{proxy}", self.uid))
    }

    pub(super) fn redirect(&self, proxy: &ProxyName) -> CString {
        name(format!("redirect-{}-{proxy}", self.uid))
    }

    pub(super) fn receive(&self, proxy: &ProxyName) -> CString {
        name(format!("receive-{}-{proxy}", self.uid))
    }

    /// All chains of a proxy.
    pub(super) fn of_proxy(&self, proxy: &ProxyName) -> [CString; 7] {
        [
            self.tproxy(proxy),
            self.divert(proxy),
            self.deliver(proxy),
            self.dns(proxy),
            self.resolve(proxy),
            self.redirect(proxy),
            self.receive(proxy),
        ]
    }
}

/// The name of a user's map of marks.
pub(super) fn marks(uid: Uid) -> CString {
    match uid {
        Uid::ROOT => MARKS.to_owned(),
        uid => name(format!("marks-{uid}")),
    }
}

/// What the names of a user's chains begin with that hold what is below a control group.
fn hold_prefix(uid: Uid) -> String {
    format!("hold-{uid}-")
}

/// Which chain of that kind has this name, if one has.
pub(super) fn parse_hold(uid: Uid, chain: &str) -> Option<Hold> {
    let (level, verdict) = chain.strip_prefix(&hold_prefix(uid))?.split_once('-')?;
    let verdict = match verdict {
        DIRECT => Verdict::Direct,
        DROP => Verdict::Drop,
        DROP_ALL => Verdict::DropAll,
        RELEASED => Verdict::Released,
        proxy => Verdict::Proxy(proxy.parse().ok()?),
    };
    Some(Hold {
        level: level.parse().ok()?,
        verdict,
    })
}
