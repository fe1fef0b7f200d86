//! What the state is told of control groups.

use cgtproxy_proto::path::ControlGroupPath;

/// Who is told of control groups.
pub(crate) trait Observer {
    /// A control group is there. It may be known already. Returns the path as it is kept.
    fn added(&mut self, path: ControlGroupPath) -> ControlGroupPath;
    /// A control group is gone, with everything below. Returns all that were known.
    fn removed(&mut self, path: &ControlGroupPath) -> Vec<ControlGroupPath>;
    /// Events were lost: any control group may be another one than before.
    fn lost_track(&mut self);
}

/// How well control groups are noticed, for those who ask.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Watching {
    /// What tells of them: `inotify`, `dbus`, both or neither.
    pub by: Vec<&'static str>,
    /// Why some are noticed late or not at all, if that is so.
    pub problem: Option<String>,
}
