//! Which verdict a control group has. Pure: nothing here reads a file or talks to anybody.
//!
//! 1. A control group's own verdict is that of the slice of cgtproxy-exec it is in, else that of the
//!    first rule that matches its path. The unit of a user's relay goes direct before any of that.
//! 2. Without one it inherits its parent's verdict.
//! 3. Without one at the subtree's root: direct.

mod application;
mod automaton;
mod below;
mod exec_slices;
mod names;
mod outside;
mod pattern;
mod selector;
mod subject;
mod tree;

use std::fmt;
use std::rc::Rc;

use cgtproxy_proto::name::ProxyName;
use cgtproxy_proto::path::ControlGroupPath;

pub(crate) use application::{application_ids, unescape};
pub(crate) use below::Below;
pub(crate) use exec_slices::{DEFAULT_PROXY, ExecSlices};
pub(crate) use names::Names;
pub(crate) use outside::Outside;
pub(crate) use pattern::{Pattern, PatternCompiler, PatternError};
pub(crate) use selector::Selector;
pub(crate) use subject::{Subject, unit_name};
pub(crate) use tree::Tree;

/// What happens to a control group's packets.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Target {
    /// They leave as if cgtproxy were not there.
    Direct,
    /// They leave only to bypassed destinations.
    Drop,
    /// They don't leave at all.
    DropAll,
    /// They go to this proxy.
    Proxy(Rc<ProxyName>),
}

impl Target {
    /// The name that users and messages have for it.
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Direct => "direct",
            Self::Drop => "drop",
            Self::DropAll => "drop-all",
            Self::Proxy(name) => name.as_str(),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What gives a control group its own verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The rule with this number, counted from 1.
    Rule(u32),
    /// A slice of cgtproxy-exec.
    ExecSlice,
    /// It is the relay, which would otherwise send to itself.
    Relay,
}

/// The unit of a user's relay: what it sends goes direct whatever that user's rules say.
pub(crate) const RELAY_UNIT: &str = "cgtproxy-relay.service";

/// A control group's own verdict.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Choice {
    /// The verdict.
    pub target: Target,
    /// Whether users' own policies don't change it.
    pub enforce: bool,
    /// Where it comes from.
    pub origin: Origin,
}

/// What becomes of a control group's packets, by its own verdict or an inherited one. The kernel has to tell two verdicts
/// apart if they are not equal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// What happens to them.
    pub target: Target,
    /// Users' own policies don't change it. In the system's policy only.
    pub enforce: bool,
    /// No rule says so: they go direct if the system's policy does not say otherwise. In users' own policies only,
    /// for nothing comes after the system's.
    pub undecided: bool,
}

impl Verdict {
    /// What a rule says.
    fn by_rule(target: Target, enforce: bool) -> Self {
        Self {
            target,
            enforce,
            undecided: false,
        }
    }

    /// What has to be held while a control group may have this verdict or the other one.
    fn hold_for(&self, other: &Self) -> Hold {
        if self == other {
            Hold::None
        } else if self.enforce || other.enforce {
            Hold::Enforced
        } else {
            Hold::Plain
        }
    }
}

/// Whether control groups below this one send nothing until they have an element, since their verdicts could differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Hold {
    /// Nothing is held: it has the verdict of what it is in.
    None,
    /// It is held; in the system's policy unless a user's own decides.
    Plain,
    /// It is held whatever users' own policies say. In the system's policy only.
    Enforced,
}

/// What the kernel is told about a control group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Element {
    /// The verdict of its own sockets, and of those below it if nothing is held.
    pub verdict: Verdict,
    /// What is held below it.
    pub hold: Hold,
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hold = match self.hold {
            Hold::None => "",
            Hold::Plain => "+hold",
            Hold::Enforced => "+enforced-hold",
        };
        let enforce = if self.verdict.enforce { "+enforce" } else { "" };
        write!(f, "{}{hold}{enforce}", self.verdict.target)
    }
}

/// What a new control group may do before its verdict is in the kernel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Start {
    /// What its parent may do.
    #[default]
    Open,
    /// Nothing, unless no rule can give it another verdict than its parent's.
    Closed,
}

/// One rule of a configuration.
#[derive(Debug, Clone)]
pub(crate) struct Rule {
    /// Which control groups it is about.
    pub selector: Selector,
    /// Their verdict.
    pub target: Target,
    /// Users' own policies don't change it. In the system's configuration only.
    pub enforce: bool,
    /// The line of the file that it begins in, counted from 1.
    pub line: u64,
}

/// All that decides about verdicts.
#[derive(Debug, Clone, Default)]
pub(crate) struct Rules {
    /// Whether they are a user's own, and not the system's. In users' own the relay's unit goes direct before all else:
    /// anybody can give a control group its name, which must not get anybody out of what root's policy enforces.
    pub users: bool,
    /// The slices of cgtproxy-exec, which come before the rules; none if they are switched off.
    pub exec_slices: Option<ExecSlices>,
    /// The rules in the order of the file; the first that matches decides.
    pub rules: Vec<Rule>,
    /// What new control groups may do before their verdicts are in the kernel.
    pub start: Start,
}

impl Rules {
    /// The own verdict of the control group at `path` below a subtree whose root has the path
    /// `prefix`, with a slash before each component, from the control group root.
    pub(crate) fn choose(&self, prefix: &[u8], path: &ControlGroupPath) -> Option<Choice> {
        if self.users && path.name() == Some(RELAY_UNIT.as_bytes()) {
            return Some(Choice {
                target: Target::Direct,
                origin: Origin::Relay,
                enforce: false,
            });
        }
        if let Some(target) = self.exec_slices.as_ref().and_then(|s| s.find(path)) {
            let origin = Origin::ExecSlice;
            return Some(Choice {
                target,
                enforce: false,
                origin,
            });
        }
        if self.rules.is_empty() {
            return None;
        }
        let subject = Subject::new(prefix, path);
        self.rules
            .iter()
            .zip(1..)
            .find(|(rule, _)| rule.selector.matches(&subject))
            .map(|(rule, number)| Choice {
                target: rule.target.clone(),
                enforce: rule.enforce,
                origin: Origin::Rule(number),
            })
    }

    /// The verdict of what no rule is about.
    pub(crate) fn undecided(&self) -> Verdict {
        Verdict {
            target: Target::Direct,
            enforce: false,
            undecided: self.users,
        }
    }

    /// What has to be held below a control group with this effective verdict: what may have another one. When in
    /// doubt, it may.
    ///
    /// That the relay may come does not count. It may come anywhere, so that everything would be held.
    pub(crate) fn hold_below(
        &self,
        prefix: &[u8],
        path: &ControlGroupPath,
        verdict: &Verdict,
    ) -> Hold {
        let hold_for = |target: &Target, enforce| {
            let other = Verdict::by_rule(target.clone(), enforce);
            verdict.hold_for(&other)
        };
        if let Some(slices) = &self.exec_slices {
            let differs = |target: &Target| hold_for(target, false) != Hold::None;
            if slices.may_come_below(path, differs) {
                return Hold::Plain;
            }
            if slices.find(path).is_some() {
                return Hold::None;
            }
        }
        let subject = Subject::new(prefix, path);
        let most = if self.users {
            Hold::Plain
        } else {
            Hold::Enforced
        };
        let mut hold = Hold::None;
        for rule in &self.rules {
            let below = rule.selector.below(&subject);
            if below != Below::Nothing {
                hold = hold.max(hold_for(&rule.target, rule.enforce));
            }
            // Nothing gets past it, or what does makes no difference any more.
            if below == Below::Everything || hold == most {
                break;
            }
        }
        // What no rule matches inherits.
        hold
    }

    /// Verdict of a control group, and whose own verdict it is, without any [`Tree`].
    pub(crate) fn explain(
        &self,
        prefix: &[u8],
        path: &ControlGroupPath,
    ) -> Option<(Choice, ControlGroupPath)> {
        let mut at = path.clone();
        loop {
            if let Some(choice) = self.choose(prefix, &at) {
                return Some((choice, at));
            }
            at = at.parent()?;
        }
    }
}
