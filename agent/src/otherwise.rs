//! What becomes of what no rule of the running agent's decides: root may have a policy for the machine, and the helper may
//! hold something of an agent that is gone. All commands say it in these words.

use cgtproxy_proto::agent::{Awaited, ControlGroup, GetStatus_Reply as AgentStatus, Rule};
use cgtproxy_proto::helper::{GetStatus_Reply as HelperStatus, GetStatus_Reply_session as Session};
use cgtproxy_proto::path::manager_path;

use crate::config::Scope;

/// What is shown for a target where the system policy decides. No proxy has a name with a space.
pub(crate) const SYSTEM_POLICY: &str = "system policy";

/// What is shown for a target where there is none.
const NO_TARGET: &str = "-";

/// What is said of the system policy where users come first.
pub(crate) const UNLESS: &str = "unless that user's own rules decide";

/// What is said of that below a table.
pub(crate) fn note() -> String {
    format!("What is below a user@UID.service and not enforced holds {UNLESS}.")
}

/// What is known of it.
#[derive(Debug, Clone)]
pub(crate) struct Otherwise {
    scope: Scope,
    /// Root has a policy for the machine; none: nobody can tell.
    system_policy: Option<bool>,
    /// What the helper holds for the agent; none: nobody can tell.
    session: Option<Session>,
    /// The agent has no configuration yet, and what it shows of verdicts means nothing.
    waits: bool,
}

impl Otherwise {
    /// What the helper says to the user `uid`, and the agent of this scope.
    pub(crate) fn new(
        scope: Scope,
        uid: u32,
        helper: Option<&HelperStatus>,
        agent: Option<&AgentStatus>,
    ) -> Self {
        // The helper speaks of whoever asks, and the system's agent is root's.
        let is_own = scope == Scope::User || uid == 0;
        Self {
            scope,
            system_policy: helper.and_then(|helper| helper.systemPolicy),
            session: helper
                .filter(|_| is_own)
                .map(|helper| helper.session.clone()),
            waits: agent.is_some_and(|agent| agent.awaits == Some(Awaited::configuration)),
        }
    }

    /// Whose agent it is about.
    pub(crate) fn scope(&self) -> Scope {
        self.scope
    }

    /// Whether root has a policy for the machine besides; none if nobody can tell, or if it is this one.
    pub(crate) fn system_policy(&self) -> Option<bool> {
        self.system_policy.filter(|_| self.scope == Scope::User)
    }

    /// Whether the agent has no configuration yet.
    pub(crate) fn waits(&self) -> bool {
        self.waits
    }

    /// Where something goes that no rule in force is about, in words that follow its name.
    pub(crate) fn goes(&self) -> &'static str {
        match (self.scope, self.system_policy) {
            (Scope::System, _) | (Scope::User, Some(false)) => "goes direct",
            (Scope::User, Some(true)) => "goes as the system policy says",
            (Scope::User, None) => "goes direct, or as the system policy says",
        }
    }

    /// Whether an agent is connected to the helper.
    pub(crate) fn is_connected(&self) -> bool {
        self.session == Some(Session::active)
    }

    /// What is in force of another agent's, if this one has nothing there.
    pub(crate) fn left(&self) -> Option<&'static str> {
        match self.session.as_ref()? {
            Session::none => None,
            Session::active => Some("Another agent's rules are in force."),
            Session::grace => Some(
                "What the last agent had in force still is, until grace-seconds in /etc/cgtproxy/helper.yaml are \
                 over.",
            ),
            Session::kept => Some(
                "What the last agent dropped is still dropped, or everything is: on-agent-loss in \
                 /etc/cgtproxy/helper.yaml. Nothing goes to a proxy.",
            ),
        }
    }

    /// What it means that the agent has nothing in force.
    pub(crate) fn idle(&self) -> String {
        match (self.left(), self.scope) {
            (Some(left), _) => left.to_owned(),
            (None, Scope::User) => format!("Everything of yours {}.", self.goes()),
            (None, Scope::System) => {
                "Everything goes direct but for what users say themselves.".to_owned()
            }
        }
    }

    /// What it means that there is no file.
    pub(crate) fn without_file(&self) -> String {
        let goes = self.goes();
        match self.scope {
            Scope::User => format!("everything {goes}, unless cgtproxy-exec says otherwise"),
            Scope::System => format!("everything {goes}"),
        }
    }

    /// Whether the system policy decides about a control group of a user's.
    pub(crate) fn is_left_to_system(&self, group: &ControlGroup) -> bool {
        let decided = group.rule.is_some() || group.execSlice || group.relay == Some(true);
        !decided && self.system_policy() == Some(true)
    }

    /// What is shown for the target of a control group.
    pub(crate) fn target<'g>(&self, group: &'g ControlGroup) -> &'g str {
        if self.waits {
            NO_TARGET
        } else if self.is_left_to_system(group) {
            SYSTEM_POLICY
        } else {
            &group.target
        }
    }

    /// Whether a user's own rules come before what the system policy says of a control group by this rule, or by none.
    pub(crate) fn yields(&self, group: &ControlGroup, rule: Option<&Rule>) -> bool {
        self.scope == Scope::System && !is_enforced(rule) && is_of_user(&group.path)
    }
}

/// Whether users' own rules don't change what this one says.
pub(crate) fn is_enforced(rule: Option<&Rule>) -> bool {
    rule.is_some_and(|rule| rule.enforce == Some(true))
}

/// Whether a path from the control group root leads to a user's service manager, or to what is below.
pub(crate) fn is_of_user(path: &str) -> bool {
    let uid = path
        .strip_prefix("/user.slice/user-")
        .and_then(|rest| rest.split_once(".slice/")?.0.parse().ok());
    uid.is_some_and(|uid| {
        let below = path
            .strip_prefix('/')
            .and_then(|path| path.strip_prefix(&manager_path(uid)));
        below.is_some_and(|below| below.is_empty() || below.starts_with('/'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn helper(session: Session, system_policy: bool) -> HelperStatus {
        HelperStatus {
            version: "1".into(),
            session,
            generation: 1,
            proxies: Vec::new(),
            controlGroups: 1,
            ipv6: true,
            tableOwned: true,
            proxyUids: Vec::new(),
            systemPolicy: Some(system_policy),
        }
    }

    impl Otherwise {
        /// What the helper says where it holds nothing of another agent's.
        pub(crate) fn knowing(scope: Scope, system_policy: bool) -> Self {
            let helper = helper(Session::none, system_policy);
            Self::new(scope, 0, Some(&helper), None)
        }
    }

    #[test]
    fn knows_what_is_a_users() {
        for (path, is) in [
            ("/user.slice/user-5.slice/user@5.service", true),
            ("/user.slice/user-5.slice/user@5.service/a.slice", true),
            ("/user.slice/user-5.slice/user@5.servicex", false),
            ("/user.slice/user-5.slice/user@6.service/a", false),
            ("/user.slice/user-5.slice/session-1.scope", false),
            ("/user.slice/user-5.slice", false),
            ("/user.slice/user-x.slice/user@x.service", false),
            ("/system.slice/a.service", false),
            ("/", false),
        ] {
            assert_eq!(is_of_user(path), is, "{path}");
        }
    }

    #[test]
    fn nobody_else_is_told_what_the_helper_holds_for_root() {
        let helper = helper(Session::kept, true);
        let left = |scope, uid| Otherwise::new(scope, uid, Some(&helper), None).left();
        assert_eq!(left(Scope::System, 1000), None);
        assert!(left(Scope::System, 0).is_some() && left(Scope::User, 1000).is_some());
        let system = Otherwise::new(Scope::System, 0, Some(&helper), None);
        assert_eq!(
            (system.system_policy(), system.goes()),
            (None, "goes direct")
        );
        // Without the helper nobody can tell.
        let unknown = Otherwise::new(Scope::User, 1000, None, None);
        assert_eq!(
            unknown.idle(),
            "Everything of yours goes direct, or as the system policy says."
        );
    }
}
