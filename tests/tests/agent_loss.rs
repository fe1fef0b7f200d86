//! What stays in force of a policy whose agent does not come back: `on-agent-loss` of helper.yaml.

#![allow(clippy::expect_used, reason = "a panic is a failed test")]

use std::net::{IpAddr, SocketAddr};

use cgtproxy_tests::sandbox::{App, Outcome, Sandbox, User, direct, proxied, sandbox};
use cgtproxy_tests::session::{Session, to_proxy, verdict};
use cgtproxy_tests::steady::Steady;
use cgtproxy_tests::wait::wait_until;
use serde_json::{Value, json};

const DROPPED: &str = "app.slice/app-tracker.scope";
const EXCEPTED: &str = "app.slice/app-tracker.scope/excepted";
const PROXIED: &str = "app.slice/app-browser.scope";
const HOLDING: &str = "background.slice";
const HELD: &str = "background.slice/new.scope";
const OTHER: &str = "session.slice/shell.service";

fn proxies() -> Value {
    json!([{ "name": "mihomo", "port": 7890 }])
}

fn bypassed() -> SocketAddr {
    SocketAddr::new(IpAddr::from([203, 0, 113, 77]), 80)
}

/// Takes the user's policy over, or begins it.
fn take(user: &User) -> Session {
    let mut session = Session::of(user);
    session.replace(
        proxies(),
        json!(["203.0.113.77"]),
        json!([
            verdict(DROPPED, "drop"),
            verdict(EXCEPTED, "direct"),
            to_proxy(PROXIED, "mihomo"),
            { "controlGroup": HOLDING, "verdict": "proxy", "proxy": "mihomo", "hold": true },
        ]),
    );
    session
}

/// Applications in each of the user's control groups.
struct Apps {
    dropped: App,
    excepted: App,
    proxied: App,
    holding: App,
    held: App,
    other: App,
}

impl Apps {
    fn of(user: &User) -> Self {
        let app = |path| user.cgroup(path).app();
        Self {
            dropped: app(DROPPED),
            excepted: app(EXCEPTED),
            proxied: app(PROXIED),
            holding: app(HOLDING),
            held: app(HELD),
            other: app(OTHER),
        }
    }

    #[track_caller]
    fn assert_with_agent(&self, sb: &Sandbox) {
        for to in sb.destinations() {
            for app in [&self.dropped, &self.held] {
                assert!(app.udp(to).is_dropped());
            }
            for app in [&self.proxied, &self.holding] {
                assert_eq!(app.tcp(to), proxied("mihomo", to));
            }
            for app in [&self.excepted, &self.other] {
                assert_eq!(app.udp(to), direct(to));
            }
        }
    }

    #[track_caller]
    fn assert_kept(&self, sb: &Sandbox) {
        for to in sb.destinations() {
            for app in [&self.dropped, &self.held] {
                assert!(app.udp(to).is_dropped());
                assert!(app.tcp(to).is_dropped());
            }
            for app in [&self.proxied, &self.holding, &self.excepted, &self.other] {
                assert_eq!(app.tcp(to), direct(to));
                assert_eq!(app.udp(to), direct(to));
            }
        }
        assert_eq!(self.dropped.udp(bypassed()), direct(bypassed()));
        assert!(self.held.udp(bypassed()).is_dropped());
    }
}

fn wait_for(user: &User, session: &str) {
    wait_until(&format!("the session to be '{session}'"), || {
        Session::of(user).status().get("session") == Some(&json!(session))
    });
}

#[test]
fn drops_and_holds_are_kept_and_the_rest_is_released() {
    sandbox(|sb| {
        let helper = sb
            .helper()
            .config("grace-seconds: 1\nown-table: false")
            .start();
        let user = sb.user(1001);
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let apps = Apps::of(&user);
        let session = take(&user);
        apps.assert_with_agent(sb);
        let [to, _] = sb.destinations();
        let open = apps.proxied.open_tcp(to).expect("it opens");
        assert_eq!(open.ask(), proxied("mihomo", to));
        let steady = Steady::start(sb, &apps.dropped);

        drop(session);
        wait_for(&user, "kept");
        helper.wait_log("an agent is gone: what is dropped stays so");
        // In the middle of what it was saying to the proxy.
        assert!(matches!(open.ask(), Outcome::Refused | Outcome::Closed));
        apps.assert_kept(sb);
        assert!(
            !sb.objects_of(1001)
                .iter()
                .any(|name| name.contains("mihomo"))
        );
        assert_eq!(Session::of(&user).status()["proxies"], json!([]));
        let late = user.cgroup("app.slice/app-tracker.scope/late").app();
        assert!(late.udp(to).is_dropped());

        let mut session = take(&user);
        apps.assert_with_agent(sb);
        assert_eq!(session.status()["session"], "active");
        drop(session);
        wait_for(&user, "kept");
        apps.assert_kept(sb);
        steady.assert_nothing_left(sb);

        // What others take away is put back.
        sb.nft("flush ruleset");
        wait_until("the table to be back", || sb.has_table());
        apps.assert_kept(sb);
        let mut session = take(&user);
        session.call("RemovePolicy", json!({}));
        assert_eq!(sb.objects_of(1001), Vec::<String>::new());
    });
}

#[test]
fn what_is_kept_outlives_the_helper() {
    sandbox(|sb| {
        let mut helper = sb.helper().config("grace-seconds: 1").start();
        let (user, neighbour) = (sb.user(1001), sb.user(1002));
        neighbour.cgroup(PROXIED);
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let apps = Apps::of(&user);
        drop(take(&user));
        wait_for(&user, "kept");
        let steady = Steady::start(sb, &apps.dropped);
        let kept = sb.objects_of(1001);
        helper.kill();
        apps.assert_kept(sb);
        helper.start_again();
        wait_for(&user, "kept");
        assert_eq!(sb.objects_of(1001), kept);
        apps.assert_kept(sb);

        // All end at once. Nothing says to the next helper what the proxies' rules are, so they stay.
        let session = take(&user);
        let mut neighbours = Session::of(&neighbour);
        neighbours.replace(
            proxies(),
            json!([]),
            json!([to_proxy(PROXIED, "mihomo"), verdict("", "direct")]),
        );
        helper.kill();
        drop((session, neighbours));
        helper.start_again();
        wait_for(&user, "kept");
        // Nothing was dropped or held of these.
        wait_for(&neighbour, "none");
        apps.assert_with_agent(sb);
        let mut session = take(&user);
        apps.assert_with_agent(sb);
        steady.assert_nothing_left(sb);
        session.call("RemovePolicy", json!({}));
        assert_eq!(sb.objects_of(1001), Vec::<String>::new());
    });
}

#[test]
fn everything_goes_direct_if_the_administrator_says_so() {
    sandbox(|sb| {
        let config = "grace-seconds: 1\non-agent-loss: direct";
        let _helper = sb.helper().config(config).start();
        let user = sb.user(1001);
        let apps = Apps::of(&user);
        drop(take(&user));
        wait_for(&user, "none");
        assert_eq!(sb.objects_of(1001), Vec::<String>::new());
        for to in sb.destinations() {
            assert_eq!(apps.dropped.udp(to), direct(to));
            assert_eq!(apps.held.udp(to), direct(to));
        }
    });
}

#[test]
fn everything_is_dropped_if_the_administrator_says_so() {
    sandbox(|sb| {
        let config = "grace-seconds: 1\non-agent-loss: drop";
        let _helper = sb.helper().config(config).start();
        let (user, neighbour) = (sb.user(1001), sb.user(1002));
        let _proxy = sb.tproxy("mihomo").uid(1001).port(7890).start();
        let apps = Apps::of(&user);
        let others = neighbour.cgroup(PROXIED).app();
        let session = take(&user);
        let steady = Steady::start(sb, &apps.dropped);
        drop(session);
        wait_for(&user, "kept");
        let late = user.cgroup("late.slice/late.scope").app();
        for to in sb.destinations() {
            for app in [
                &apps.dropped,
                &apps.excepted,
                &apps.proxied,
                &apps.holding,
                &apps.held,
                &apps.other,
                &late,
            ] {
                assert!(app.udp(to).is_dropped());
                assert!(app.tcp(to).is_dropped());
                assert_eq!(app.udp(bypassed()), direct(bypassed()));
            }
            assert_eq!(others.udp(to), direct(to));
        }
        let mut session = take(&user);
        apps.assert_with_agent(sb);
        steady.assert_nothing_left(sb);
        session.call("RemovePolicy", json!({}));
        assert_eq!(sb.objects_of(1001), Vec::<String>::new());
    });
}

/// The user's service manager ends, and its control group with it.
fn log_out(user: &User) {
    user.cgroup("app.slice").remove();
    user.service().remove();
}

#[test]
fn nothing_is_kept_for_a_user_who_is_gone() {
    sandbox(|sb| {
        let helper = sb.helper().config("grace-seconds: 1").start();
        let user = sb.user(1001);
        let policy = |session: &mut Session| {
            session.replace(json!([]), json!([]), json!([verdict("", "drop")]));
        };
        let mut session = Session::of(&user);
        policy(&mut session);
        drop(session);
        wait_for(&user, "kept");
        // Logged out, and in again: it is another control group.
        log_out(&user);
        let user = sb.user(1001);
        wait_for(&user, "none");
        assert_eq!(sb.objects_of(1001), Vec::<String>::new());
        helper.wait_log("removed what was kept of a policy whose user is gone");

        // The manager ends with its agent: there is nobody left when the grace is over.
        let mut session = Session::of(&user);
        policy(&mut session);
        log_out(&user);
        drop(session);
        wait_for(&sb.user(1001), "none");
        assert_eq!(sb.objects_of(1001), Vec::<String>::new());
    });
}

#[test]
fn what_the_machines_own_policy_drops_is_kept_too() {
    sandbox(|sb| {
        let _helper = sb.helper().config("grace-seconds: 1").start();
        let root = sb.user(0);
        let _proxy = sb.tproxy("company").uid(0).port(7890).start();
        let user = sb.user(1001);
        let app = user.cgroup(PROXIED).app();
        let (tracker, service) = (
            sb.cgroup("system.slice/tracker.service").app(),
            sb.cgroup("system.slice/other.service").app(),
        );
        let take = || {
            let mut session = Session::of(&root);
            session.replace(
                json!([{ "name": "company", "port": 7890 }]),
                json!([]),
                json!([
                    to_proxy("", "company"),
                    verdict("system.slice/tracker.service", "drop"),
                    {
                        "controlGroup": "user.slice", "verdict": "proxy", "proxy": "company",
                        "enforce": true,
                    },
                ]),
            );
            session
        };
        let session = take();
        for to in sb.destinations() {
            assert!(tracker.udp(to).is_dropped());
            assert_eq!(service.udp(to), proxied("company", to));
            assert_eq!(app.udp(to), proxied("company", to));
        }
        drop(session);
        wait_for(&root, "kept");
        let mut users = Session::of(&user);
        users.replace(json!([]), json!([]), json!([verdict(PROXIED, "direct")]));
        for to in sb.destinations() {
            assert!(tracker.udp(to).is_dropped());
            assert_eq!(service.tcp(to), direct(to));
            assert_eq!(app.tcp(to), direct(to));
        }
        // What is released of a user's goes where the system policy says.
        let mut root = take();
        let _users_proxy = sb.tproxy("mihomo").uid(1001).port(7891).start();
        let user_policy = |session: &mut Session| {
            session.replace(
                json!([{ "name": "mihomo", "port": 7891 }]),
                json!([]),
                json!([to_proxy(PROXIED, "mihomo"), verdict(DROPPED, "drop")]),
            );
        };
        user.cgroup(DROPPED);
        root.replace(
            json!([{ "name": "company", "port": 7890 }]),
            json!([]),
            json!([to_proxy("", "company")]),
        );
        user_policy(&mut users);
        for to in sb.destinations() {
            assert_eq!(app.udp(to), proxied("mihomo", to));
        }
        drop(users);
        wait_for(&user, "kept");
        for to in sb.destinations() {
            assert_eq!(app.udp(to), proxied("company", to));
        }
    });
}
