//! The project installed in a whole system and set up as its README says, with a proxy for alice.

use std::net::SocketAddr;
use std::path::Path;

use serde_json::Value;

use crate::sandbox::{App, Outcome, Sandbox};
use crate::system::{System, SystemUser};
use crate::wait::wait_until;

/// The helper's unit.
pub const HELPER: &str = "cgtproxy-helper.service";
/// The socket's.
pub const SOCKET: &str = "cgtproxy-helper.socket";
/// The agents'.
pub const AGENT: &str = "cgtproxy-agent.service";

/// A booted system with the project in it.
pub struct Installed<'a> {
    sandbox: &'a Sandbox,
    /// The system.
    pub system: System,
}

impl<'a> Installed<'a> {
    /// Boots it, with a file for the helper, unless that is empty, and what `install` puts into its root, and enables the
    /// helper's socket.
    ///
    /// # Panics
    /// When it does not come up.
    #[track_caller]
    pub fn boot(sandbox: &'a Sandbox, helper: &str, install: impl FnOnce(&Path)) -> Self {
        let system = System::builder(sandbox)
            .install_project()
            .install(install)
            .boot();
        let this = Self { sandbox, system };
        if !helper.is_empty() {
            this.configure_helper(helper);
        }
        this.system.run(&["systemctl", "enable", "--now", SOCKET]);
        this
    }

    /// Writes the helper's configuration, for the next one that starts.
    pub fn configure_helper(&self, yaml: &str) {
        let script = "mkdir -p /etc/cgtproxy && printf '%s\n' \"$1\" >/etc/cgtproxy/helper.yaml";
        self.system.run(&["sh", "-c", script, "sh", yaml]);
    }

    /// Gives a user a configuration and an agent.
    #[track_caller]
    pub fn enable(&self, user: &SystemUser, config: &str) {
        self.system.write_config(user, config);
        self.system.enable_agent(user);
    }

    /// Waits until the user's agent has the helper's word that everything is in the kernel.
    #[track_caller]
    pub fn wait_in_force(&self, user: &SystemUser) {
        self.system.wait_in_force(Some(user));
    }

    /// Insists on what becomes of what an application asks: see [`Sandbox::expect`].
    ///
    /// # Panics
    /// When something else becomes of it.
    #[track_caller]
    pub fn expect(&self, app: &App, outcome: impl Fn(SocketAddr) -> Outcome) {
        self.sandbox.expect(app, outcome);
    }

    /// Insists that nothing of an application's gets out.
    ///
    /// # Panics
    /// When something does.
    #[track_caller]
    pub fn expect_dropped(&self, app: &App) {
        self.sandbox.expect_dropped(app);
    }

    /// Counts how often the helper has put something back.
    pub fn restored(&self) -> usize {
        self.system.journal(HELPER).matches("restored it").count()
    }
}

impl System {
    /// Writes a user's configuration, all at once.
    #[track_caller]
    pub fn write_config(&self, user: &SystemUser, config: &str) {
        let script = "mkdir -p ~/.config/cgtproxy && cd ~/.config/cgtproxy &&
                      printf %s \"$1\" > new && mv new config.yaml";
        self.run_as(user, &["sh", "-c", script, "sh", config]);
    }

    /// Enables a user's agent, and starts it.
    #[track_caller]
    pub fn enable_agent(&self, user: &SystemUser) {
        self.run_as(user, &["systemctl", "--user", "enable", "--now", AGENT]);
    }

    /// What an agent says about everything, which is the machine's if it is nobody's; nothing if it does not answer.
    #[must_use]
    pub fn agent_status(&self, user: Option<&SystemUser>) -> Value {
        let output = match user {
            Some(user) => self.output_as(user, &["cgtproxy-agent", "status", "--json"]),
            None => self.output(&["cgtproxy-agent", "--system", "status", "--json"]),
        };
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }

    /// Waits until such an agent has the helper's word that everything is in the kernel.
    #[track_caller]
    pub fn wait_in_force(&self, user: Option<&SystemUser>) {
        wait_until("everything is in force", || {
            // None yet, if the agent is about to start again.
            let status = self.agent_status(user);
            let groups = status["controlGroups"].as_array();
            status["connected"] == true
                && groups.is_some_and(|all| all.iter().all(|group| group["inForce"] == true))
        });
    }
}
