//! What was said of control groups: of each kind once for each user who makes them, since one may make as many as one
//! likes.

use std::collections::BTreeSet;

use cgtproxy_proto::path::ControlGroupPath;
use tracing::Level;

use crate::makers::{Maker, maker};

/// What can be said of a control group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// No path can name what is in it.
    Unnameable,
    /// This user may not look into it.
    Closed,
    /// It can't be watched.
    Unwatched,
    /// The helper passed it over, for this reason.
    PassedOver(&'static str),
}

/// What was said.
#[derive(Debug, Default)]
pub(crate) struct Said(BTreeSet<(Kind, Option<Maker>)>);

impl Said {
    /// Whether nothing of this kind was said yet of a control group that the same user makes. It is said now.
    pub(crate) fn is_news(&mut self, kind: Kind, path: &ControlGroupPath) -> bool {
        self.0.insert((kind, maker(path).map(Maker::from)))
    }

    /// Everything is news again.
    pub(crate) fn forget(&mut self) {
        self.0.clear();
    }
}

/// Logs a text at this level, which is that of warnings or of information, if it is news, else for debugging. The text is
/// made only if somebody wants it.
pub(crate) fn say(is_news: bool, level: Level, text: impl FnOnce() -> String) {
    match is_news {
        true if level == Level::WARN => tracing::warn!("{}", text()),
        true => tracing::info!("{}", text()),
        false => tracing::debug!("{}", text()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_one_user_makes_is_said_once() {
        let path = |text: &str| ControlGroupPath::from_wire(text).unwrap();
        let alices = "user.slice/user-1.slice/user@1.service/a";
        let bobs = "user.slice/user-2.slice/user@2.service/a";
        let mut said = Said::default();
        assert!(said.is_news(Kind::Closed, &path(alices)));
        assert!(!said.is_news(Kind::Closed, &path(&format!("{alices}/b"))));
        assert!(said.is_news(Kind::Unnameable, &path(alices)));
        assert!(said.is_news(Kind::Closed, &path(bobs)));
        assert!(said.is_news(Kind::PassedOver("a"), &path("a.slice")));
        assert!(said.is_news(Kind::PassedOver("b"), &path("a.slice")));
        assert!(!said.is_news(Kind::PassedOver("a"), &path("b.slice")));
        said.forget();
        assert!(said.is_news(Kind::Closed, &path(alices)));
    }
}
