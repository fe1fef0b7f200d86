//! What becomes of what no rule of the agent's decides: root may have a policy for the machine. All commands say it in
//! these words.

use cgtproxy_proto::agent::{ControlGroup, Rule};
use cgtproxy_proto::helper::GetStatus_Reply as HelperStatus;
use cgtproxy_proto::path::manager_path;

use crate::config::Scope;

/// What is shown for a target where the system policy decides. No proxy has a name with a space.
pub const SYSTEM_POLICY: &str = "system policy";

/// What is said of the system policy where users come first.
pub const UNLESS: &str = "unless that user's own rules decide";

/// What is said of that below a table.
#[must_use]
pub fn note() -> String {
    format!("What is below a user@UID.service and not enforced holds {UNLESS}.")
}

/// What is known of it.
#[derive(Debug, Clone, Copy)]
pub struct Otherwise {
    scope: Scope,
    /// Root has a policy for the machine; none: nobody can tell.
    system_policy: Option<bool>,
}

impl Otherwise {
    /// What the helper says.
    #[must_use]
    pub fn new(scope: Scope, helper: Option<&HelperStatus>) -> Self {
        Self {
            scope,
            system_policy: helper.and_then(|helper| helper.systemPolicy),
        }
    }

    /// Whose agent it is about.
    #[must_use]
    pub fn scope(&self) -> Scope {
        self.scope
    }

    /// Whether root has a policy for the machine besides; none if nobody can tell, or if it is this one.
    #[must_use]
    pub fn system_policy(&self) -> Option<bool> {
        self.system_policy.filter(|_| self.scope == Scope::User)
    }

    /// Where something goes that no rule in force is about, in words that follow its name.
    #[must_use]
    pub fn goes(&self) -> &'static str {
        match (self.scope, self.system_policy) {
            (Scope::System, _) | (Scope::User, Some(false)) => "goes direct",
            (Scope::User, Some(true)) => "goes as the system policy says",
            (Scope::User, None) => "goes direct, or as the system policy says",
        }
    }

    /// What it means that the agent has nothing in force.
    #[must_use]
    pub fn idle(&self) -> String {
        match self.scope {
            Scope::User => format!("Everything of yours {}.", self.goes()),
            Scope::System => "Everything goes direct but for what users say themselves.".to_owned(),
        }
    }

    /// What it means that there is no file.
    #[must_use]
    pub fn without_file(&self) -> String {
        let goes = self.goes();
        match self.scope {
            Scope::User => format!("everything {goes}, unless cgtproxy-exec says otherwise"),
            Scope::System => format!("everything {goes}"),
        }
    }

    /// Whether the system policy decides about a control group of a user's.
    #[must_use]
    pub fn is_left_to_system(&self, group: &ControlGroup) -> bool {
        let decided = group.rule.is_some() || group.execSlice || group.relay == Some(true);
        !decided && self.system_policy() == Some(true)
    }

    /// What is shown for the target of a control group.
    #[must_use]
    pub fn target<'g>(&self, group: &'g ControlGroup) -> &'g str {
        if self.is_left_to_system(group) {
            SYSTEM_POLICY
        } else {
            &group.target
        }
    }

    /// Whether a user's own rules come before what the system policy says of a control group by this rule, or by none.
    #[must_use]
    pub fn yields(&self, group: &ControlGroup, rule: Option<&Rule>) -> bool {
        self.scope == Scope::System && !is_enforced(rule) && is_of_user(&group.path)
    }
}

/// Whether users' own rules don't change what this one says.
#[must_use]
pub fn is_enforced(rule: Option<&Rule>) -> bool {
    rule.is_some_and(|rule| rule.enforce == Some(true))
}

/// Whether a path from the control group root leads to a user's service manager, or to what is below.
#[must_use]
fn is_of_user(path: &str) -> bool {
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

    impl Otherwise {
        /// What it is if the helper says this.
        pub(crate) fn knowing(scope: Scope, system_policy: bool) -> Self {
            Self {
                scope,
                system_policy: Some(system_policy),
            }
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
}
