//! Starting a program in a cgroup, as somebody.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{cgroup, network};

/// Where the binaries under test are, inside.
pub(crate) fn binary(name: &str) -> PathBuf {
    Path::new("/run/testbed/bin").join(name)
}

/// Whose process, where and with what rights.
#[derive(Clone, Debug)]
pub(crate) struct Launch {
    uid: u32,
    capabilities: Vec<&'static str>,
    cgroup: PathBuf,
    netns: Option<PathBuf>,
}

impl Launch {
    /// Root, with all there is, in the root cgroup of the machine.
    pub(crate) fn root() -> Self {
        Self {
            uid: 0,
            capabilities: Vec::new(),
            cgroup: PathBuf::from(cgroup::ROOT),
            netns: None,
        }
    }

    /// That uid; one that is not root has no capabilities.
    pub(crate) fn uid(mut self, uid: u32) -> Self {
        self.uid = uid;
        self
    }

    /// These capabilities and no other, named as setpriv names them.
    pub(crate) fn capabilities(mut self, capabilities: &[&'static str]) -> Self {
        self.capabilities = capabilities.to_vec();
        self
    }

    pub(crate) fn cgroup(mut self, cgroup: &Path) -> Self {
        cgroup.clone_into(&mut self.cgroup);
        self
    }

    /// In the internet's network namespace.
    pub(crate) fn on_internet(self) -> Self {
        self.netns(Path::new(network::NETNS))
    }

    /// In another network namespace than the machine's.
    pub(crate) fn netns(mut self, netns: &Path) -> Self {
        self.netns = Some(netns.to_owned());
        self
    }

    /// The command, with the environment that such a user would have.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(binary("cgtproxy-testapp"));
        command.arg("launch").arg(&self.cgroup);
        if let Some(netns) = &self.netns {
            command
                .arg("nsenter")
                .arg(format!("--net={}", netns.display()));
        }
        if self.uid != 0 {
            let uid = self.uid.to_string();
            let mut capabilities = "-all".to_owned();
            for capability in &self.capabilities {
                capabilities += &format!(",+{capability}");
            }
            command.args([
                "setpriv",
                "--reuid",
                &uid,
                "--regid",
                &uid,
                "--clear-groups",
            ]);
            for set in ["--bounding-set", "--inh-caps", "--ambient-caps"] {
                command.args([set, &capabilities]);
            }
        }
        command.arg(program);
        command
            .env_clear()
            .env(
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            )
            .env("HOME", format!("/run/home/{}", self.uid))
            .env("XDG_RUNTIME_DIR", format!("/run/user/{}", self.uid))
            .env("RUST_BACKTRACE", "1")
            .current_dir("/");
        command
    }
}
