//! What stays of a policy whose agent is gone for good.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::change::{Census, changes};
use super::{Effect, Entry, Registry, Staged};
use crate::cgroup::OwnedControlGroup;
use crate::config::OnAgentLoss;
use crate::nft::{Before, Element, Enforced, Known, Layout, Plan, Stamped, Verdict};
use crate::peer::Uid;

/// What stays of a policy.
#[derive(Debug)]
pub enum Remains {
    /// Nothing: it is to be removed.
    Nothing,
    /// All of it, since it is not known what it is.
    All,
    /// What this change leaves.
    Part(Box<Staged>),
}

impl Registry {
    /// Stages what stays of a user's policy when nobody is there any more who could change it.
    #[must_use]
    pub fn remains(&self, uid: Uid, loss: OnAgentLoss) -> Remains {
        if loss == OnAgentLoss::Direct {
            return Remains::Nothing;
        }
        let Some(entry) = self.users.get(&uid) else {
            return Remains::Nothing;
        };
        let stamped = match entry {
            Entry::LeftBehind(left) => {
                return match left.holds_back || loss == OnAgentLoss::Drop {
                    true => Remains::All,
                    false => Remains::Nothing,
                };
            }
            Entry::Policy(user) => &user.stamped,
            Entry::Known(known) => &known.stamped,
        };
        let layout = &stamped.layout;
        let (rest, levels) = match loss {
            OnAgentLoss::Drop => {
                let all = (layout.subtree.cgroup(), Verdict::Drop.into());
                (vec![all], [layout.subtree.level()].into())
            }
            // Of some control groups it is not known how deep they are.
            _ => (without_proxies(entry.elements()), layout.levels.clone()),
        };
        let census = Census::of(&rest);
        if !census.holds_back() {
            return Remains::Nothing;
        }
        let after = Layout {
            proxies: BTreeMap::new(),
            gateway: None,
            levels,
            holds: census.holds(),
            enforced: census.enforced(),
            holds_back: true,
            ..Layout::clone(layout)
        };
        let after = Stamped::after(Some(stamped), Rc::new(after));
        let (delete, add) = changes(entry.elements(), &rest);
        let before = Before::Layout(stamped.clone());
        Remains::Part(Box::new(Staged {
            marks: Some(self.marks_without(uid, &before)),
            plan: Plan {
                uid,
                before,
                after: Some(after.clone()),
                delete,
                add,
            },
            effect: Effect::Reduce(Known {
                stamped: after,
                elements: rest,
            }),
        }))
    }
}

/// These elements without proxies: the verdict of what went to a proxy is not decided here any more.
fn without_proxies<'a>(
    elements: impl Iterator<Item = &'a (OwnedControlGroup, Element)>,
) -> Vec<(OwnedControlGroup, Element)> {
    let without_proxy = |(cgroup, element): &(OwnedControlGroup, Element)| {
        let element = match &element.verdict {
            Verdict::Proxy(_) => Element {
                verdict: Verdict::Undecided,
                hold: element.hold,
                // What is held stays so.
                enforced: match element.hold && element.enforced != Enforced::Nothing {
                    true => Enforced::Hold,
                    false => Enforced::Nothing,
                },
            },
            _ => element.clone(),
        };
        (*cgroup, element)
    };
    elements.map(without_proxy).collect()
}
