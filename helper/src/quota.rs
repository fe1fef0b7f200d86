//! What one user may use of the helper at a time: connections, bytes of messages, and calls.
//! What a user may *have* is the registry's business.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use cgtproxy_proto::message::Budget;
use tokio::time::{Instant, sleep_until};

use crate::config::Limits;
use crate::peer::{Account, Uid};

/// So many bytes of a message count as a call of their own: to take them apart costs about as much as a short message
/// does in all.
const BYTES_PER_CALL: usize = 16 * 1024;

/// So much processor time of a call counts as another one: some calls cost more than their length tells.
const MICROSECONDS_PER_CALL: u32 = 1000;

/// How many times as many calls root may make as others: the system policy is about everybody's control groups, and must
/// not wait since one user makes many.
const CALLS_OF_ROOT: u32 = 10;

/// For how long the calls of a user who was quiet have been saved up.
const BURST: Duration = Duration::from_secs(20);

/// All users' use of the helper.
#[derive(Debug, Clone)]
pub(crate) struct Quotas {
    limits: Limits,
    users: Rc<RefCell<BTreeMap<Account, Usage>>>,
}

/// One user's use of the helper.
#[derive(Debug)]
struct Usage {
    connections: usize,
    bytes: usize,
    /// When all calls up to now are paid for: the theoretical arrival time of the generic cell rate
    /// algorithm (ITU-T I.371). One that lies in the past is as good as now.
    paid: Instant,
}

impl Quotas {
    /// Nobody uses anything.
    #[must_use]
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            users: Rc::default(),
        }
    }

    /// Counts a connection for as long as the returned value lives; none if the user has too many.
    #[must_use]
    pub(crate) fn connect(&self, account: Account) -> Option<Slot> {
        let mut users = self.users.borrow_mut();
        let now = Instant::now();
        // Who is gone and owes nothing is forgotten.
        users.retain(|_, usage| usage.connections > 0 || usage.paid > now);
        let usage = users.entry(account).or_insert(Usage {
            connections: 0,
            bytes: 0,
            paid: now,
        });
        if usage.connections >= self.limits.connections {
            return None;
        }
        usage.connections += 1;
        Some(Slot {
            account,
            quotas: self.clone(),
        })
    }

    /// Counts a message of this length. Returns when it may be dealt with.
    fn charge(&self, account: Account, bytes: usize) -> Instant {
        let now = Instant::now();
        let mut users = self.users.borrow_mut();
        let Some(usage) = users.get_mut(&account) else {
            return now;
        };
        let calls = u32::try_from(1 + bytes / BYTES_PER_CALL).unwrap_or(u32::MAX);
        usage.paid = usage.paid.max(now) + self.price(account).saturating_mul(calls);
        usage.paid.checked_sub(BURST).map_or(now, |at| at.max(now))
    }

    /// Counts the time that a call has taken.
    fn charge_time(&self, account: Account, taken: Duration) {
        if let Some(usage) = self.users.borrow_mut().get_mut(&account) {
            let taken = u32::try_from(taken.as_micros()).unwrap_or(u32::MAX);
            let price = self.price(account).saturating_mul(taken) / MICROSECONDS_PER_CALL;
            usage.paid = usage.paid.max(Instant::now()) + price;
        }
    }

    /// After how long one more call is paid for.
    fn price(&self, account: Account) -> Duration {
        let rate = u32::try_from(self.limits.calls_per_second).unwrap_or(u32::MAX);
        let times = match account {
            Account::User(Uid::ROOT) => CALLS_OF_ROOT,
            _ => 1,
        };
        Duration::from_secs(1) / rate.max(1).saturating_mul(times)
    }
}

/// The place of one of the connections that a user may have.
#[derive(Debug)]
pub(crate) struct Slot {
    account: Account,
    quotas: Quotas,
}

impl Slot {
    /// What the buffer of this connection counts against.
    #[must_use]
    pub(crate) fn budget(&self) -> impl Budget + use<> {
        Bytes {
            account: self.account,
            quotas: self.quotas.clone(),
        }
    }

    /// Waits until a message of this length may be dealt with. Others get their turn in any case: they have
    /// had it if the message was `waited` for.
    pub(crate) async fn admit(&self, bytes: usize, waited: bool) {
        let at = self.quotas.charge(self.account, bytes);
        if at > Instant::now() {
            sleep_until(at).await;
        } else if !waited {
            tokio::task::yield_now().await;
        }
    }

    /// Counts the processor time that a call has taken.
    pub(crate) fn spent(&self, taken: Duration) {
        self.quotas.charge_time(self.account, taken);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(usage) = self.quotas.users.borrow_mut().get_mut(&self.account) {
            usage.connections -= 1;
        }
    }
}

/// The bytes that a user's connections hold of messages that are not whole, not dealt with or not answered yet.
#[derive(Debug)]
struct Bytes {
    account: Account,
    quotas: Quotas,
}

impl Budget for Bytes {
    fn resize(&self, from: usize, to: usize) -> bool {
        let mut users = self.quotas.users.borrow_mut();
        let Some(usage) = users.get_mut(&self.account) else {
            return true;
        };
        let others = usage.bytes.saturating_sub(from);
        if to > from && others.saturating_add(to) > self.quotas.limits.message_bytes {
            return false;
        }
        usage.bytes = others + to;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quotas(limits: Limits) -> Quotas {
        Quotas::new(limits)
    }

    fn user(uid: u32) -> Account {
        Account::User(Uid::for_test(uid))
    }

    #[tokio::test(start_paused = true)]
    async fn calls_beyond_the_rate_wait_and_no_others() {
        let quotas = quotas(Limits {
            calls_per_second: 10,
            ..Limits::default()
        });
        let (one, two) = (user(1), user(2));
        let first = quotas.connect(one).unwrap();
        let start = Instant::now();
        // What twenty seconds have saved up.
        for _ in 0..200 {
            first.admit(100, false).await;
        }
        assert_eq!(start.elapsed(), Duration::ZERO);
        first.admit(100, false).await;
        assert_eq!(start.elapsed().as_millis(), 100);
        // Another connection, even after the first is gone, is the same user.
        drop(first);
        let again = quotas.connect(one).unwrap();
        again.admit(100, false).await;
        assert_eq!(start.elapsed().as_millis(), 200);
        // Length counts too.
        again.admit(9 * BYTES_PER_CALL, false).await;
        assert_eq!(start.elapsed().as_millis(), 1200);
        let other = quotas.connect(two).unwrap();
        other.admit(100, false).await;
        assert_eq!(start.elapsed().as_millis(), 1200);
    }

    #[tokio::test(start_paused = true)]
    async fn what_takes_long_counts_as_more_calls() {
        let quotas = quotas(Limits {
            calls_per_second: 10,
            ..Limits::default()
        });
        let one = quotas.connect(user(1)).unwrap();
        let start = Instant::now();
        one.admit(100, false).await;
        // With the call itself, what twenty seconds have saved up.
        one.spent(Duration::from_millis(199));
        one.admit(100, false).await;
        assert_eq!(start.elapsed().as_millis(), 100);
        one.spent(Duration::from_micros(500));
        one.admit(100, false).await;
        assert_eq!(start.elapsed().as_millis(), 250);
        // Others owe nothing for it.
        let other = quotas.connect(user(2)).unwrap();
        other.admit(100, false).await;
        assert_eq!(start.elapsed().as_millis(), 250);
    }

    #[tokio::test(start_paused = true)]
    async fn root_may_make_ten_times_as_many_calls() {
        let quotas = quotas(Limits {
            calls_per_second: 10,
            ..Limits::default()
        });
        let root = quotas.connect(user(0)).unwrap();
        let start = Instant::now();
        // What twenty seconds have saved up.
        root.admit(1999 * BYTES_PER_CALL, false).await;
        assert_eq!(start.elapsed(), Duration::ZERO);
        root.admit(100, false).await;
        assert_eq!(start.elapsed().as_millis(), 10);
        root.spent(Duration::from_millis(1));
        root.admit(100, false).await;
        assert_eq!(start.elapsed().as_millis(), 30);
    }

    #[tokio::test(start_paused = true)]
    async fn who_owes_nothing_is_forgotten() {
        let quotas = quotas(Limits::default());
        for uid in 0..100 {
            let connection = quotas.connect(user(uid)).unwrap();
            connection.admit(1, false).await;
        }
        tokio::time::advance(Duration::from_secs(1)).await;
        let last = quotas.connect(user(100)).unwrap();
        assert_eq!(quotas.users.borrow().len(), 1);
        drop(last);
    }

    #[tokio::test]
    async fn bytes_and_connections_at_n_and_one_more() {
        let quotas = quotas(Limits {
            connections: 2,
            message_bytes: 1000,
            ..Limits::default()
        });
        let uid = user(1);
        let (first, second) = (quotas.connect(uid).unwrap(), quotas.connect(uid).unwrap());
        assert!(quotas.connect(uid).is_none());
        let (a, b) = (first.budget(), second.budget());
        assert!(a.resize(0, 600));
        assert!(!b.resize(0, 401));
        assert!(b.resize(0, 400));
        assert!(a.resize(600, 0));
        assert!(b.resize(400, 1000));
        drop(second);
        assert!(quotas.connect(uid).is_some());
    }
}
