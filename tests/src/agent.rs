//! The interface of a user's running agent, which is what cgtproxy-exec and `status` speak.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde_json::{Value, json};

use crate::sandbox::{Cgroup, User, Varlink};
use crate::wait::wait_until;

/// A connection to the agent of some user.
pub struct Agent(pub Varlink);

impl Agent {
    /// Connects as the user it is the agent of.
    pub fn of(user: &User) -> Self {
        let socket = format!("/run/user/{}/cgtproxy/agent.sock", user.uid());
        Self(user.varlink(Path::new(&socket)))
    }

    /// Calls a method of `org.cgtproxy.Agent` and returns its reply's parameters.
    ///
    /// # Panics
    /// When the agent refuses.
    #[track_caller]
    pub fn call(&mut self, method: &str, parameters: Value) -> Value {
        let reply = self
            .0
            .call(&format!("org.cgtproxy.Agent.{method}"), parameters);
        assert_eq!(reply.get("error"), None, "{method}: {reply}");
        reply["parameters"].clone()
    }

    /// What the agent says about everything.
    ///
    /// # Panics
    /// When it refuses.
    #[track_caller]
    pub fn status(&mut self) -> Value {
        self.call("GetStatus", json!({}))
    }

    /// Counts the helper's transactions in this session.
    ///
    /// # Panics
    /// When the agent refuses.
    #[track_caller]
    pub fn generation(&mut self) -> u64 {
        self.status()["generation"].as_u64().expect("a number")
    }

    /// Waits until the agent has learnt of a configuration that gives this control group that
    /// verdict, and the kernel holds it.
    ///
    /// # Panics
    /// When that does not come.
    #[track_caller]
    pub fn wait_for_verdict(&mut self, cgroup: &Cgroup, target: &str) {
        let path = wire_path(&cgroup.path());
        let what = format!("the kernel to have {target} for {path}");
        wait_until(&what, || {
            let parameters = json!({ "controlGroup": path, "target": target });
            let reply = self.0.call("org.cgtproxy.Agent.AwaitTarget", parameters);
            // Until it has read its new configuration, it says that the verdict is another one.
            reply.get("error").is_none()
        });
    }
}

/// A control group's path as messages have it: `%` and what is not UTF-8 as `%XX`.
pub fn wire_path(path: &Path) -> String {
    let mut text = String::new();
    for chunk in path.as_os_str().as_bytes().utf8_chunks() {
        text += &chunk.valid().replace('%', "%25");
        for byte in chunk.invalid() {
            text += &format!("%{byte:02X}");
        }
    }
    text
}
