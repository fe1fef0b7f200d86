//! Who may use the helper at all, as the administrator says.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use nix::unistd::{Gid, User, getgrouplist};
use tokio::time::Instant;

use crate::freshness;
use crate::peer::{Account, Uid};
use crate::spare::Spare;

/// For how long an answer of the databases is good to whoever connects.
const ANSWER_HOLDS: Duration = Duration::from_secs(1);

/// For how long an answer of the databases is good to what is only kept: nobody waits there for a group to be another one.
const ANSWER_HOLDS_FOR_KEPT: Duration = Duration::from_secs(60);

/// For how long an answer of slow databases is good at most.
const ANSWER_HOLDS_AT_MOST: Duration = Duration::from_secs(600);

/// For how long it is good at most that slow databases gave no answer: who is refused for that is not to wait for long once
/// they are back.
const FAILURE_HOLDS_AT_MOST: Duration = Duration::from_secs(60);

/// How many answers are remembered at most.
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
    /// Whether a user may connect, if that can be told without the databases of users and groups: they are files, or on
    /// another machine. Root always may, who could change the configuration as well.
    fn decides_by_uid(&self, uid: Uid) -> Option<bool> {
        if uid.value() == 0 {
            return Some(true);
        }
        if self.deny.uids.contains(&uid.value()) {
            return Some(false);
        }
        if !self.deny.gids.is_empty() {
            return None;
        }
        match &self.allow {
            None => Some(true),
            Some(allow) if allow.uids.contains(&uid.value()) => Some(true),
            Some(allow) if allow.gids.is_empty() => Some(false),
            Some(_) => None,
        }
    }

    /// Whether a user may connect, by the databases of users and groups; none if they can't be asked, or don't know a user
    /// who may be in a denied group.
    fn decides(&self, uid: Uid) -> Option<bool> {
        if let Some(decided) = self.decides_by_uid(uid) {
            return Some(decided);
        }
        let groups = match groups_of(uid)? {
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

/// Lets users in, by the configuration and by what the databases of users and groups have answered.
#[derive(Debug)]
pub(crate) struct Gate {
    access: Access,
    /// The databases are files, and may need room for descriptors.
    spare: Spare,
    answers: Answers,
}

impl Gate {
    /// Lets those in whom this lets in.
    #[must_use]
    pub(crate) fn new(access: Access, spare: Spare) -> Self {
        Self {
            access,
            spare,
            answers: Answers::default(),
        }
    }

    /// Whether a user may connect. A user who may be in a denied group, for all that can be found out, is refused. So is
    /// a uid without a service manager where groups would have to be looked up: one user may have thousands of these
    /// (subuid(5)), and everybody else would wait for the databases.
    pub(crate) fn allows(&mut self, account: Account, uid: Uid) -> bool {
        let decided = match account {
            Account::User(_) => self.decides(uid, ANSWER_HOLDS),
            Account::Others => self.access.decides_by_uid(uid),
        };
        decided.unwrap_or(false)
    }

    /// Whether a user may still have what is kept. What can't be told at the moment is no reason to let go of a drop.
    pub(crate) fn may_keep(&mut self, uid: Uid) -> bool {
        self.decides(uid, ANSWER_HOLDS_FOR_KEPT) != Some(false)
    }

    /// Whether a user may use the helper, as was found out within this time.
    fn decides(&mut self, uid: Uid, within: Duration) -> Option<bool> {
        let Self {
            access,
            spare,
            answers,
        } = self;
        access.decides_by_uid(uid).or_else(|| {
            answers.get(uid, within, || {
                let _room = spare.make_room();
                access.decides(uid)
            })
        })
    }
}

/// What was found out about users a moment ago: whoever connects all the time has the databases asked once a second, or
/// less often if they are slow.
#[derive(Debug, Default)]
struct Answers(BTreeMap<Uid, Answer>);

/// What was found out about one user.
#[derive(Debug, Clone, Copy)]
struct Answer {
    allowed: Option<bool>,
    when: Instant,
    took: Duration,
}

impl Answer {
    /// Whether it is still good to whom answers are good within this time, or longer if they are slow.
    fn holds(&self, now: Instant, within: Duration) -> bool {
        let at_most = match self.allowed {
            Some(_) => ANSWER_HOLDS_AT_MOST,
            None => FAILURE_HOLDS_AT_MOST,
        };
        now.saturating_duration_since(self.when) < freshness::holds(self.took, within, at_most)
    }
}

impl Answers {
    /// What was found out about this user within this time, or is now.
    fn get(
        &mut self,
        uid: Uid,
        within: Duration,
        ask: impl FnOnce() -> Option<bool>,
    ) -> Option<bool> {
        self.get_by(Instant::now, uid, within, ask)
    }

    /// What was found out about this user within this time by this clock, or is now.
    fn get_by(
        &mut self,
        clock: impl Fn() -> Instant,
        uid: Uid,
        within: Duration,
        ask: impl FnOnce() -> Option<bool>,
    ) -> Option<bool> {
        let asked = clock();
        match self.0.get(&uid) {
            Some(answer) if answer.holds(asked, within) => return answer.allowed,
            _ => {}
        }
        let allowed = ask();
        let now = clock();
        if self.0.len() >= MOST_ANSWERS {
            self.0
                .retain(|_, answer| answer.holds(now, ANSWER_HOLDS_FOR_KEPT));
        }
        if self.0.len() < MOST_ANSWERS || self.0.contains_key(&uid) {
            let answer = Answer {
                allowed,
                when: now,
                took: now.saturating_duration_since(asked),
            };
            self.0.insert(uid, answer);
        }
        allowed
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
    use std::cell::Cell;

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
                let first = answers.get(Uid::for_test(1), ANSWER_HOLDS, || {
                    asked += 1;
                    Some(round == 1)
                });
                assert_eq!(first, Some(round == 1));
            }
            assert_eq!(asked, round + 1);
            tokio::time::advance(ANSWER_HOLDS).await;
        }
        // What is kept needs no newer one.
        let kept = answers.get(Uid::for_test(1), ANSWER_HOLDS_FOR_KEPT, || None);
        assert_eq!(kept, Some(false));
        // However many come, no more are remembered.
        for uid in 0..3000 {
            assert_eq!(answers.get(Uid::for_test(uid), ANSWER_HOLDS, || None), None);
        }
        assert_eq!(answers.0.len(), MOST_ANSWERS);
        tokio::time::advance(ANSWER_HOLDS_FOR_KEPT).await;
        let other = answers.get(Uid::for_test(5000), ANSWER_HOLDS, || Some(true));
        assert_eq!(other, Some(true));
        assert_eq!(answers.0.len(), 1);
    }

    #[test]
    fn who_has_slow_databases_asked_leaves_most_of_the_time_to_others() {
        let took = Duration::from_secs(3);
        let start = Instant::now();
        let now = Cell::new(start);
        let mut answers = Answers::default();
        let mut asked = 0;
        // Somebody connects ten times a second for an hour.
        while now.get() - start < Duration::from_secs(3600) {
            let answer = answers.get_by(
                || now.get(),
                Uid::for_test(1),
                ANSWER_HOLDS,
                || {
                    asked += 1;
                    now.set(now.get() + took);
                    Some(true)
                },
            );
            assert_eq!(answer, Some(true));
            now.set(now.get() + Duration::from_millis(100));
        }
        let asking = took * asked;
        assert!(asking * 20 <= now.get() - start, "{asking:?}");
        assert!(asked > 50, "{asked}");
        // What has once taken very long is not believed for as long.
        now.set(now.get() + ANSWER_HOLDS_AT_MOST);
        for answer in [Some(true), Some(false)] {
            let got = answers.get_by(
                || now.get(),
                Uid::for_test(1),
                ANSWER_HOLDS,
                || {
                    now.set(now.get() + Duration::from_secs(3600));
                    answer
                },
            );
            assert_eq!(got, answer);
            now.set(now.get() + ANSWER_HOLDS_AT_MOST);
        }
    }

    #[test]
    fn who_could_not_be_looked_up_is_looked_up_again_in_a_minute() {
        let now = Cell::new(Instant::now());
        let mut answers = Answers::default();
        let mut get = |after: Duration| {
            now.set(now.get() + after);
            let mut asked = false;
            let ask = || {
                asked = true;
                now.set(now.get() + Duration::from_secs(30));
                None
            };
            answers.get_by(|| now.get(), Uid::for_test(1), ANSWER_HOLDS, ask);
            asked
        };
        assert!(get(Duration::ZERO));
        assert!(!get(FAILURE_HOLDS_AT_MOST - Duration::from_secs(1)));
        assert!(get(Duration::from_secs(1)));
    }

    #[test]
    fn numbers_are_looked_at_before_the_databases() {
        let (one, two, root) = (Uid::for_test(1), Uid::for_test(2), Uid::for_test(0));
        let decides = |access: &Access| [root, one, two].map(|uid| access.decides_by_uid(uid));
        let some = Some(accounts(&[1], &[]));
        let group = Some(accounts(&[1], &[60]));
        for (allow, deny, one, two) in [
            (None, accounts(&[], &[]), Some(true), Some(true)),
            (some.clone(), accounts(&[], &[]), Some(true), Some(false)),
            (group.clone(), accounts(&[], &[]), Some(true), None),
            (some, accounts(&[], &[60]), None, None),
            (group, accounts(&[2], &[]), Some(true), Some(false)),
            (None, accounts(&[1], &[60]), Some(false), None),
        ] {
            let access = Access { allow, deny };
            assert_eq!(decides(&access), [Some(true), one, two], "{access:?}");
        }
    }

    // Debian's static accounts: daemon is user 1 in group 1, games user 5 with the primary group 60.
    #[test]
    #[cfg_attr(miri, ignore = "asks the user database")]
    fn deny_comes_before_allow_and_nothing_means_everybody() {
        let (daemon, games, nobody_there) =
            (Uid::for_test(1), Uid::for_test(5), Uid::for_test(987_654));
        let allows = |access: &Access, uid| access.decides(uid) == Some(true);
        let everybody = Access::default();
        assert!(allows(&everybody, daemon) && allows(&everybody, nobody_there));
        let some = Access {
            allow: Some(accounts(&[987_654], &[60])),
            deny: Accounts::default(),
        };
        assert!(allows(&some, games) && allows(&some, nobody_there) && !allows(&some, daemon));
        let but = Access {
            allow: Some(accounts(&[1, 5], &[])),
            deny: accounts(&[], &[60]),
        };
        assert!(allows(&but, daemon) && !allows(&but, games));
        let all_but = Access {
            allow: None,
            deny: accounts(&[], &[60]),
        };
        assert!(
            allows(&all_but, daemon) && !allows(&all_but, games) && !allows(&all_but, nobody_there)
        );
        assert_eq!(all_but.decides(nobody_there), None);
        // Who is not known at the moment is not let in, and keeps what there is.
        let spare = Spare::of(&std::fs::File::open("/").unwrap().into());
        let mut gate = Gate::new(all_but, spare);
        for (uid, allowed, keeps) in [
            (daemon, true, true),
            (games, false, false),
            (nobody_there, false, true),
        ] {
            assert_eq!(gate.allows(Account::User(uid), uid), allowed, "{uid:?}");
            assert_eq!(gate.may_keep(uid), keeps, "{uid:?}");
        }
        let none = Access {
            allow: Some(Accounts::default()),
            deny: accounts(&[0], &[]),
        };
        assert!(!allows(&none, daemon) && allows(&none, Uid::for_test(0)));
    }
}
