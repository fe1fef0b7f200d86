//! An agent's session with the helper, spoken by hand.

use serde_json::{Value, json};

use crate::sandbox::{Sandbox, User, Varlink};

/// The helper's socket in the sandbox.
pub const SOCKET: &str = "/run/cgtproxy/helper.sock";

/// A connection of some user to the helper.
pub struct Session(pub Varlink);

impl Session {
    /// Connects as this user.
    pub fn of(user: &User) -> Self {
        Self(user.varlink(SOCKET))
    }

    /// Calls a method of `org.cgtproxy.Helper` and returns its reply's parameters.
    ///
    /// # Panics
    /// When the helper refuses.
    #[track_caller]
    pub fn call(&mut self, method: &str, parameters: Value) -> Value {
        let reply = self
            .0
            .call(&format!("org.cgtproxy.Helper.{method}"), parameters);
        assert_eq!(reply.get("error"), None, "{method}: {reply}");
        reply["parameters"].clone()
    }

    /// Calls a method and returns the short name of the error with which the helper refuses, and
    /// its parameters.
    ///
    /// # Panics
    /// When the helper does not refuse.
    #[track_caller]
    pub fn refusal(&mut self, method: &str, parameters: Value) -> (String, Value) {
        let reply = self
            .0
            .call(&format!("org.cgtproxy.Helper.{method}"), parameters);
        let error = reply["error"]
            .as_str()
            .unwrap_or_else(|| panic!("{method}: {reply}"));
        let short = error
            .strip_prefix("org.cgtproxy.Helper.")
            .or_else(|| error.strip_prefix("org.varlink.service."))
            .unwrap_or_else(|| panic!("{error} is not a declared error"));
        (short.to_owned(), reply["parameters"].clone())
    }

    /// Replaces the policy; every control group must be found.
    ///
    /// # Panics
    /// When the helper refuses, or passes a control group over.
    #[track_caller]
    pub fn replace(&mut self, proxies: Value, bypass: Value, assignments: Value) {
        let policy = json!({ "proxies": proxies, "bypass": bypass, "assignments": assignments });
        let reply = self.call("ReplacePolicy", policy);
        assert_eq!(reply["skipped"], json!([]));
    }

    /// Assigns verdicts; every control group must be found.
    ///
    /// # Panics
    /// When the helper refuses, or passes a control group over.
    #[track_caller]
    pub fn assign(&mut self, assign: Value) {
        let reply = self.call(
            "UpdateAssignments",
            json!({ "assign": assign, "remove": [] }),
        );
        assert_eq!(reply["skipped"], json!([]));
    }

    /// What the helper says about this user.
    ///
    /// # Panics
    /// When it refuses.
    #[track_caller]
    pub fn status(&mut self) -> Value {
        self.call("GetStatus", json!({}))
    }
}

/// An assignment of a control group to a proxy.
pub fn to_proxy(path: &str, proxy: &str) -> Value {
    json!({ "controlGroup": path, "verdict": "proxy", "proxy": proxy })
}

/// An assignment of another verdict: `direct`, `drop` or `dropAll`.
pub fn verdict(path: &str, verdict: &str) -> Value {
    json!({ "controlGroup": path, "verdict": verdict })
}

/// The ids of the control groups that have a verdict of a user's (0: of the system's), in ascending order.
///
/// # Panics
/// When that user has no policy, or nft says something else than a map.
#[track_caller]
pub fn mapped_ids(sb: &Sandbox, uid: u32) -> Vec<u64> {
    mapped_ids_now(sb, uid).unwrap_or_else(|| panic!("{uid} has no policy"))
}

/// The same; none while that user has no policy.
///
/// # Panics
/// When nft says something else than a map.
pub fn mapped_ids_now(_: &Sandbox, uid: u32) -> Option<Vec<u64>> {
    let map = if uid == 0 { "cgroups-0" } else { "cgroups" };
    // Without cgroupfs nft prints the ids as they are. With it, it walks the whole tree for each.
    let list = format!(
        "umount -l /sys/fs/cgroup
         nft -j -n list map inet cgtproxy users && nft -j list map inet cgtproxy {map}"
    );
    let output = crate::command::output_with_input(&["unshare", "-m", "sh", "-c", &list], "");
    if !output.status.success() {
        return None;
    }
    let listed = serde_json::Deserializer::from_slice(&output.stdout).into_iter::<Value>();
    let mut maps = listed.map(|listed| {
        let listed = listed.expect("nft prints JSON");
        let objects = listed["nftables"].as_array().expect("a list");
        let map = objects.iter().find_map(|object| object.get("map"));
        let elements = map.expect("a map")["elem"].as_array().cloned();
        elements.unwrap_or_default()
    });
    let (users, elements) = (maps.next()?, maps.next()?);
    users.iter().find(|user| user[0] == json!(uid))?;
    let whose = |element: &&Value| element[0]["elem"]["comment"] == json!(uid.to_string());
    let id = |element: &Value| element[0]["elem"]["val"].as_str()?.parse().ok();
    let mut ids: Vec<u64> = elements
        .iter()
        .filter(whose)
        .map(|element| id(element).unwrap_or_else(|| panic!("{element}")))
        .collect();
    ids.sort_unstable();
    Some(ids)
}
