//! A user of the booted system.

/// An ordinary user.
#[derive(Clone, Debug)]
pub struct SystemUser {
    name: String,
    uid: u32,
}

impl SystemUser {
    pub(super) fn new(name: &str, uid: u32) -> Self {
        Self {
            name: name.to_owned(),
            uid,
        }
    }

    /// The login name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The uid, which is also that of the user's own group.
    pub fn uid(&self) -> u32 {
        self.uid
    }

    /// The home directory.
    pub fn home(&self) -> String {
        format!("/home/{}", self.name)
    }

    /// The path of the user's delegated cgroup, from the cgroup root.
    pub fn service(&self) -> String {
        format!("/user.slice/user-{0}.slice/user@{0}.service", self.uid)
    }

    /// The cgroup that the harness's commands run in: beside the user's own subtree, where a
    /// login shell is.
    pub(super) fn session(&self) -> String {
        format!("/user.slice/user-{}.slice/session-testbed.scope", self.uid)
    }

    pub(super) fn environment(&self) -> Vec<String> {
        let Self { name, uid } = self;
        vec![
            "PATH=/usr/local/bin:/usr/bin:/bin".to_owned(),
            format!("HOME=/home/{name}"),
            format!("USER={name}"),
            format!("LOGNAME={name}"),
            "SHELL=/bin/sh".to_owned(),
            format!("XDG_RUNTIME_DIR=/run/user/{uid}"),
            format!("DBUS_SESSION_BUS_ADDRESS=unix:path=/run/user/{uid}/bus"),
        ]
    }

    /// From root to this user.
    pub(super) fn switch(&self) -> Vec<String> {
        let uid = self.uid.to_string();
        [
            "setpriv",
            "--reuid",
            &uid,
            "--regid",
            &uid,
            "--init-groups",
            "--inh-caps",
            "-all",
        ]
        .map(str::to_owned)
        .to_vec()
    }
}

/// What root's commands find.
pub(super) fn root_environment() -> Vec<String> {
    [
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME=/root",
    ]
    .map(str::to_owned)
    .to_vec()
}
