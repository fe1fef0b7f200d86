//! Names of objects in the table. Everything that is a user's carries the uid.

use std::collections::BTreeSet;
use std::ffi::{CStr, CString};

use cgtproxy_proto::name::ProxyName;

use super::plan::Layout;
use super::policy::{Delivery, Hold, Proxy, Verdict};
use super::ruleset::{
    CGROUPS, CGROUPS_SYSTEM, CHOICES, CHOICES_ENFORCED, CHOICES_SYSTEM, DELIVER, DELIVER_ANSWERS,
    DELIVER_ANSWERS_SYSTEM, DELIVER_SYSTEM, DROP, DROP_SYSTEM, ENFORCED, GUARD, GUARD_ANSWERS,
    GUARD_ANSWERS_SYSTEM, GUARD_SYSTEM,
};
use crate::peer::Uid;

/// A chain of a proxy's.
#[derive(Debug, Clone, Copy)]
pub(super) enum ProxyChain {
    Proxy,
    Divert,
    Dns,
    Resolve,
    Redirect,
    Receive,
}

impl ProxyChain {
    const ALL: [Self; 6] = [
        Self::Proxy,
        Self::Divert,
        Self::Dns,
        Self::Resolve,
        Self::Redirect,
        Self::Receive,
    ];

    /// What its name begins with.
    fn prefix(self) -> &'static str {
        match self {
            Self::Proxy => "proxy-",
            Self::Divert => "divert-",
            Self::Dns => "dns-",
            Self::Resolve => "resolve-",
            Self::Redirect => "redirect-",
            Self::Receive => "receive-",
        }
    }
}

/// What the name of a hold's chain begins with.
const HOLD_PREFIX: &str = "hold-";
/// What the name of a hold before users' own policies has in place of a verdict. No proxy's name begins like that.
const BEFORE_USERS: &str = "_users";

/// What the name of a bypass list's chain begins with.
const DROP_PREFIX: &str = "drop-";

/// A name made of our own prefixes, a number and a proxy's name, none of which has a NUL.
pub(super) fn name(text: String) -> CString {
    CString::new(text).unwrap_or_default()
}

/// The names of a user's objects. For root they are those of the system's policy, some of which the table
/// has in any case.
pub(super) struct Names {
    pub(super) uid: Uid,
}

impl Names {
    pub(super) fn of(uid: Uid) -> Self {
        Self { uid }
    }

    /// Whether these are the names of the system's policy.
    pub(super) fn is_system(&self) -> bool {
        self.uid == Uid::ROOT
    }

    /// `system` for the system's policy, and else `users`.
    fn either(&self, system: &'static CStr, users: &'static CStr) -> &'static CStr {
        if self.is_system() { system } else { users }
    }

    /// The map from control groups to numbers.
    pub(super) fn cgroups(&self) -> &'static CStr {
        self.either(CGROUPS_SYSTEM, CGROUPS)
    }

    /// The map from numbers to verdicts.
    pub(super) fn choices(&self) -> &'static CStr {
        self.either(CHOICES_SYSTEM, CHOICES)
    }

    /// All maps from numbers to verdicts: for the system's policy, also the one for what is enforced.
    pub(super) fn choices_maps(&self) -> &'static [&'static CStr] {
        match self.is_system() {
            true => &[CHOICES_SYSTEM, CHOICES_ENFORCED],
            false => &[CHOICES],
        }
    }

    /// The chain that what is dropped goes to.
    pub(super) fn dropping(&self) -> &'static CStr {
        self.either(DROP_SYSTEM, DROP)
    }

    /// The chain that delivers diverted packets.
    pub(super) fn deliver(&self) -> &'static CStr {
        self.either(DELIVER_SYSTEM, DELIVER)
    }

    /// The chain that delivers answers to peers for whom a TPROXY server has spoken first.
    pub(super) fn deliver_answers(&self) -> &'static CStr {
        self.either(DELIVER_ANSWERS_SYSTEM, DELIVER_ANSWERS)
    }

    /// The delivery guard for such answers.
    pub(super) fn guard_answers(&self) -> &'static CStr {
        self.either(GUARD_ANSWERS_SYSTEM, GUARD_ANSWERS)
    }

    /// The delivery guard.
    pub(super) fn guard(&self) -> &'static CStr {
        self.either(GUARD_SYSTEM, GUARD)
    }

    /// All maps from control groups to numbers: for the system's policy, also the one for what is enforced.
    pub(super) fn number_maps(&self) -> &'static [&'static CStr] {
        match self.is_system() {
            true => &[CGROUPS_SYSTEM, ENFORCED],
            false => &[CGROUPS],
        }
    }

    /// The chain of a hold. Holds that lead to no chain of one user's share one for all users. It can't be mistaken for
    /// that of a proxy: no proxy can be named as another target is.
    pub(super) fn hold(&self, hold: &Hold) -> CString {
        let verdict = hold.verdict.as_ref().map_or(BEFORE_USERS, held);
        let level = hold.level;
        if hold.is_common() && !self.is_system() {
            name(format!("{HOLD_PREFIX}{level}-{verdict}"))
        } else {
            name(format!("{HOLD_PREFIX}{}-{level}-{verdict}", self.uid))
        }
    }

    /// A chain of a proxy's.
    pub(super) fn chain(&self, chain: ProxyChain, proxy: &ProxyName) -> CString {
        name(format!("{}{}-{proxy}", chain.prefix(), self.uid))
    }

    /// All chains of a proxy. The kernel goes over every chain of the machine with every transaction
    /// (nf_tables_commit, net/netfilter/nf_tables_api.c): there is none that has nothing to do.
    pub(super) fn of_proxy(&self, name: &ProxyName, proxy: &Proxy) -> Vec<CString> {
        let mut chains = vec![ProxyChain::Proxy];
        if self.is_system() {
            chains.push(ProxyChain::Divert);
        }
        if proxy.settings.dns_hijack.is_some() {
            chains.extend([ProxyChain::Dns, ProxyChain::Resolve]);
        }
        if matches!(proxy.settings.delivery, Delivery::Redirect(Some(_))) {
            chains.push(ProxyChain::Redirect);
        }
        if proxy.is_translated() {
            chains.push(ProxyChain::Receive);
        }
        let chains = chains.into_iter();
        chains.map(|chain| self.chain(chain, name)).collect()
    }

    /// All chains that a layout needs of this user's alone, and those of its holds.
    pub(super) fn chains(&self, layout: &Layout) -> BTreeSet<CString> {
        let proxies = layout.proxies.iter();
        let mut chains: BTreeSet<_> = proxies
            .flat_map(|(name, proxy)| self.of_proxy(name, proxy))
            .collect();
        chains.extend(layout.holds.iter().map(|hold| self.hold(hold)));
        chains
    }
}

/// The names of the chain and sets of a bypass list.
pub(super) struct ListNames {
    /// The chain that drops, but for these destinations.
    pub(super) drop: CString,
    pub(super) ipv4: CString,
    pub(super) ipv6: CString,
}

impl ListNames {
    pub(super) fn of(number: u32) -> Self {
        Self {
            drop: name(format!("{DROP_PREFIX}{number}")),
            ipv4: name(format!("bypass4-{number}")),
            ipv6: name(format!("bypass6-{number}")),
        }
    }
}

/// The number of the bypass list whose chain this is.
pub(super) fn list_of(chain: &str) -> Option<u32> {
    chain.strip_prefix(DROP_PREFIX)?.parse().ok()
}

/// Whose chain this is, if it is one user's alone.
pub(super) fn owner(chain: &str) -> Option<Uid> {
    let mut prefixes = ProxyChain::ALL
        .into_iter()
        .map(ProxyChain::prefix)
        .chain([HOLD_PREFIX]);
    let rest = prefixes.find_map(|prefix| chain.strip_prefix(prefix))?;
    let (uid, rest) = rest.split_once('-').unwrap_or((rest, ""));
    // `hold-LEVEL-VERDICT` is everybody's.
    if chain.starts_with(HOLD_PREFIX) {
        rest.split_once('-')?.0.parse::<u32>().ok()?;
    }
    Uid::from_name(uid)
}

/// A verdict as the name of a hold's chain has it.
fn held(verdict: &Verdict) -> &str {
    match verdict {
        Verdict::Direct => "direct",
        Verdict::Drop => "drop",
        Verdict::DropAll => "drop-all",
        Verdict::Proxy(proxy) => proxy.as_str(),
        // No proxy's name begins like that.
        Verdict::Undecided => "_undecided",
    }
}

/// The hold whose chain this is, if all users have it together.
pub(super) fn hold_of(chain: &str) -> Option<Hold> {
    let (level, verdict) = chain.strip_prefix(HOLD_PREFIX)?.split_once('-')?;
    let mut verdicts = Verdict::COMMON.into_iter();
    Some(Hold {
        level: level.parse().ok()?,
        verdict: Some(verdicts.find(|known| held(known) == verdict)?),
    })
}

/// Whose proxy's chain this is, and which proxy's.
pub(super) fn proxy_of(chain: &str) -> Option<(Uid, ProxyName)> {
    let (uid, name) = chain
        .strip_prefix(ProxyChain::Proxy.prefix())?
        .split_once('-')?;
    Some((Uid::from_name(uid)?, name.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_tell_whose_they_are() {
        for (chain, uid) in [
            ("proxy-1000-mihomo", Some(1000)),
            ("proxy-0-a-b", Some(0)),
            ("drop-1000", None),
            ("hold-1000-5-mihomo", Some(1000)),
            ("hold-1000-5-a-b", Some(1000)),
            ("hold-5-direct", None),
            ("hold-5-_undecided", None),
            ("hold-0-5-_users", Some(0)),
            ("drop", None),
            ("drop-system", None),
            ("deliver-system", None),
            ("user-verdicts-deep", None),
            ("system-deep", None),
            ("proxy-01000-mihomo", None),
            ("proxy-4294967296-mihomo", None),
            ("version-8", None),
        ] {
            assert_eq!(owner(chain), uid.map(Uid::for_test), "{chain}");
        }
        for verdict in Verdict::COMMON {
            let hold = Hold {
                level: 12,
                verdict: Some(verdict),
            };
            let chain = Names::of(Uid::for_test(1000)).hold(&hold);
            assert_eq!(hold_of(chain.to_str().unwrap()), Some(hold));
        }
        for chain in [
            "hold-0-5-direct",
            "hold-5-mihomo",
            "hold-1000-5-a",
            "drop-5",
        ] {
            assert_eq!(hold_of(chain), None, "{chain}");
        }
        let mihomo = "mihomo".parse().unwrap();
        let uid = Uid::for_test(1000);
        assert_eq!(proxy_of("proxy-1000-mihomo"), Some((uid, mihomo)));
        assert_eq!(proxy_of("proxy-1000-drop"), None);
        assert_eq!(proxy_of("dns-1000-mihomo"), None);
        assert_eq!(list_of("drop-7"), Some(7));
        assert_eq!(list_of("drop-system"), None);
        assert_eq!(list_of("drop"), None);
    }
}
