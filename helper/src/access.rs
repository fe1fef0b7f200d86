//! Who may use the helper at all, as the administrator says.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use nix::unistd::{Gid, User, getgrouplist};
use tokio::time::Instant;

use crate::peer::Uid;

/// For how long an answer of the databases is good.
const ANSWER_HOLDS: Duration = Duration::from_secs(1);

/// How many are remembered at most.
const MOST_ANSWERS: usize = 1024;

/// Users and groups, by number.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Accounts {
    /// These users.
    pub uids: BTreeSet<u32>,
    /// Users that are members of one of these groups, by the user and group databases.
    pub gids: BTreeSet<u32>,
}

/// `allow` and `deny` of the configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Access {
    /// Nobody else may; none: everybody may.
    pub allow: Option<Accounts>,
    /// They may not, whatever `allow` says.
    pub deny: Accounts,
}

impl Access {
    /// Whether a user may connect. Root always may, who could change the configuration as well.
    #[must_use]
    pub fn allows(&self, uid: Uid) -> bool {
        // Who can't be told to be in no denied group is not let in.
        self.decides(uid).unwrap_or(false)
    }

    /// Whether the databases of users and groups have to be asked. They are files, or on another machine.
    #[must_use]
    pub fn names_groups(&self) -> bool {
        let allow = self.allow.as_ref();
        !self.deny.gids.is_empty() || allow.is_some_and(|allow| !allow.gids.is_empty())
    }

    /// The same; none if the databases can't be asked, or don't know a user who may be in a denied group.
    #[must_use]
    pub fn decides(&self, uid: Uid) -> Option<bool> {
        if uid.value() == 0 {
            return Some(true);
        }
        // Only asked for where it matters: the databases may be on another machine.
        let groups = match self.names_groups() {
            true => groups_of(uid)?,
            false => Some(BTreeSet::new()),
        };
        let groups = match groups {
            Some(groups) => groups,
            // Its account may be where nobody can be asked at the moment.
            None if !self.deny.gids.is_empty() => return None,
            None => BTreeSet::new(),
        };
        let has = |accounts: &Accounts| {
            accounts.uids.contains(&uid.value()) || !accounts.gids.is_disjoint(&groups)
        };
        Some(!has(&self.deny) && self.allow.as_ref().is_none_or(has))
    }
}

/// What was found out about users a moment ago: whoever connects all the time has the databases asked once a second.
#[derive(Debug, Default)]
pub struct Answers(BTreeMap<Uid, (Instant, bool)>);

impl Answers {
    /// What was found out about this user, or is now.
    pub fn get(&mut self, uid: Uid, ask: impl FnOnce() -> bool) -> bool {
        let now = Instant::now();
        let holds = |when: Instant| now.saturating_duration_since(when) < ANSWER_HOLDS;
        match self.0.get(&uid) {
            Some(&(when, answer)) if holds(when) => return answer,
            _ => {}
        }
        let answer = ask();
        if self.0.len() >= MOST_ANSWERS {
            self.0.retain(|_, (when, _)| holds(*when));
        }
        if self.0.len() < MOST_ANSWERS {
            self.0.insert(uid, (now, answer));
        }
        answer
    }
}

/// A user's groups, the primary one included, or that there is no such user; none if the databases can't be asked.
fn groups_of(uid: Uid) -> Option<Option<BTreeSet<u32>>> {
    let Some(user) = User::from_uid(uid.value().into()).ok()? else {
        return Some(None);
    };
    let name = std::ffi::CString::new(user.name).ok()?;
    let groups = getgrouplist(&name, user.gid).ok()?;
    Some(Some(groups.into_iter().map(Gid::as_raw).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accounts(uids: &[u32], gids: &[u32]) -> Accounts {
        Accounts {
            uids: uids.iter().copied().collect(),
            gids: gids.iter().copied().collect(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_databases_are_asked_once_a_second() {
        let mut answers = Answers::default();
        let mut asked = 0;
        for round in 0..3 {
            for _ in 0..100 {
                let first = answers.get(Uid::for_test(1), || {
                    asked += 1;
                    round == 1
                });
                assert_eq!(first, round == 1);
            }
            assert_eq!(asked, round + 1);
            tokio::time::advance(ANSWER_HOLDS).await;
        }
        // However many come, no more are remembered.
        for uid in 0..3000 {
            assert!(answers.get(Uid::for_test(uid), || true));
        }
        assert_eq!(answers.0.len(), MOST_ANSWERS);
        tokio::time::advance(ANSWER_HOLDS).await;
        assert!(!answers.get(Uid::for_test(5000), || false));
        assert_eq!(answers.0.len(), 1);
    }

    // Debian's static accounts: daemon is user 1 in group 1, games user 5 with the primary group 60.
    #[test]
    #[cfg_attr(miri, ignore = "asks the user database")]
    fn deny_comes_before_allow_and_nothing_means_everybody() {
        let (daemon, games, nobody_there) =
            (Uid::for_test(1), Uid::for_test(5), Uid::for_test(987_654));
        let everybody = Access::default();
        assert!(everybody.allows(daemon) && everybody.allows(nobody_there));
        let some = Access {
            allow: Some(accounts(&[987_654], &[60])),
            deny: Accounts::default(),
        };
        assert!(some.allows(games) && some.allows(nobody_there) && !some.allows(daemon));
        let but = Access {
            allow: Some(accounts(&[1, 5], &[])),
            deny: accounts(&[], &[60]),
        };
        assert!(but.allows(daemon) && !but.allows(games));
        let all_but = Access {
            allow: None,
            deny: accounts(&[], &[60]),
        };
        assert!(all_but.allows(daemon) && !all_but.allows(games) && !all_but.allows(nobody_there));
        assert_eq!(all_but.decides(nobody_there), None);
        let none = Access {
            allow: Some(Accounts::default()),
            deny: accounts(&[0], &[]),
        };
        assert!(!none.allows(daemon) && none.allows(Uid::for_test(0)));
    }
}
