//! `cgtproxy-agent apps`

mod processes;
mod shared;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::process::ExitCode;

use cgtproxy_proto::agent::{ControlGroup, Rule};
use cgtproxy_proto::path::ControlGroupPath;
use serde_json::{Value, json};
use unicode_width::UnicodeWidthStr;

use super::Error;
use super::client::Agent;
use super::table::{dash, table};
use crate::cli::Arguments;
use crate::otherwise::{self, Otherwise, is_enforced};
use crate::policy::{Subject, application_ids, unit_name};
use crate::subtree::Subtree;
use crate::text::{count, printable};
use crate::view;
use shared::Shared;

/// How much of a selector is shown, in columns of a terminal.
const SELECTOR_COLUMNS: usize = 40;

/// The verdicts, whoever gave them.
#[derive(Debug)]
struct Verdicts {
    /// What becomes of the rest.
    otherwise: Otherwise,
    /// From an agent that runs, not from the configuration alone.
    running: bool,
    /// What is wrong with the file on disk, if they are not by it.
    config_error: Option<String>,
    /// The same for a person, with what to do.
    older: Option<String>,
    groups: Vec<(ControlGroupPath, ControlGroup)>,
    /// The rules, in their order.
    rules: Vec<Rule>,
}

/// Something that runs.
#[derive(Debug)]
struct Running {
    /// The ids by which rules can mean it, the likeliest first.
    ids: Vec<String>,
    /// The path of its unit, or of a control group in that unit with a verdict of its own, below the
    /// subtree's root.
    path: ControlGroupPath,
    group: ControlGroup,
    rule: Option<Rule>,
    executables: BTreeSet<String>,
}

impl Running {
    /// Whether somebody has started it for its own sake, as far as can be told.
    fn is_of_interest(&self) -> bool {
        !self.ids.is_empty() || self.group.execSlice
    }
}

/// Lists what runs.
pub(super) fn run(arguments: &Arguments, all: bool, json: bool) -> Result<ExitCode, Error> {
    let subtree = super::own_subtree(arguments)?;
    let verdicts = match Agent::connect_if_running(arguments.scope())? {
        Some(mut agent) => ask(&mut agent, arguments, &subtree)?,
        None => compute(arguments, &subtree)?,
    };
    let running = running(&subtree, &verdicts);
    let shared = shared::find(&subtree, &running);
    let mut out = io::BufWriter::new(io::stdout().lock());
    if json {
        let value = to_json(&verdicts, &running, &shared, all);
        serde_json::to_writer_pretty(&mut out, &value).map_err(io::Error::from)?;
        writeln!(out)?;
    } else {
        print(&mut out, &verdicts, &running, &shared, all)?;
    }
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}

/// What the running agent says.
fn ask(agent: &mut Agent, arguments: &Arguments, subtree: &Subtree) -> Result<Verdicts, Error> {
    let status = agent.status(arguments)?;
    let otherwise = super::otherwise(arguments, Some(&status))?;
    let older = super::older(&status, &otherwise);
    let groups = status.controlGroups.into_iter();
    Ok(Verdicts {
        otherwise,
        running: true,
        config_error: status.configError,
        older,
        groups: groups
            .filter_map(|group| Some((subtree.of_wire(&group.path)?, group)))
            .collect(),
        rules: status.rules.unwrap_or_default(),
    })
}

/// What the configuration means for the control groups that there are.
fn compute(arguments: &Arguments, subtree: &Subtree) -> Result<Verdicts, Error> {
    let (config, _) = super::config(arguments)?;
    let judged = |path: ControlGroupPath| {
        let group = view::meant(&config, subtree, &path);
        (path, group)
    };
    let groups = subtree.control_groups().into_iter().map(judged).collect();
    Ok(Verdicts {
        otherwise: super::otherwise(arguments, None)?,
        running: false,
        config_error: None,
        older: None,
        groups,
        rules: view::rules(&config),
    })
}

/// The units that have processes, and control groups in them that have another verdict.
fn running(subtree: &Subtree, verdicts: &Verdicts) -> Vec<Running> {
    let mut found: BTreeMap<ControlGroupPath, Running> = BTreeMap::new();
    let groups: BTreeMap<&ControlGroupPath, &ControlGroup> =
        verdicts.groups.iter().map(|(p, g)| (p, g)).collect();
    for (path, group) in &verdicts.groups {
        let executables = processes::executables(&subtree.directory(path));
        if executables.is_empty() {
            continue;
        }
        let subject = Subject::new(&subtree.prefix(), path);
        let mut unit = path.clone();
        for _ in subject.units().count()..path.depth() {
            unit = unit.parent().unwrap_or_default();
        }
        let (shown, group) = match groups.get(&unit) {
            Some(of_unit) if of_unit.target == group.target => (unit, *of_unit),
            _ => (path.clone(), group),
        };
        let entry = found.entry(shown.clone()).or_insert_with(|| Running {
            ids: ids(&subject),
            path: shown,
            group: group.clone(),
            rule: view::rule_index(group).and_then(|index| verdicts.rules.get(index).cloned()),
            executables: BTreeSet::new(),
        });
        entry.executables.extend(executables);
    }
    let mut found: Vec<Running> = found.into_values().collect();
    // Those without an id last.
    found.sort_by(|a, b| (a.ids.is_empty(), a.ids.first()).cmp(&(b.ids.is_empty(), b.ids.first())));
    found
}

/// The ids of the innermost unit that has any.
fn ids(subject: &Subject) -> Vec<String> {
    let of_units = subject.units().map(application_ids);
    of_units
        .filter(|ids| !ids.is_empty())
        .last()
        .unwrap_or_default()
}

fn to_json(verdicts: &Verdicts, running: &[Running], shared: &[Shared], all: bool) -> Value {
    let shown = running.iter().filter(|r| all || r.is_of_interest());
    json!({
        "agentRunning": verdicts.running,
        "configError": verdicts.config_error,
        "systemPolicy": verdicts.otherwise.system_policy(),
        "applications": shown.map(|r| json!({
            "id": r.ids.first(),
            "otherIds": r.ids.get(1..).unwrap_or_default(),
            "unit": unit(r),
            "selector": r.rule.as_ref().map(|rule| &rule.selector),
            "executables": r.executables,
            "controlGroup": r.group,
        })).collect::<Vec<_>>(),
        "shared": shared.iter().map(|s| json!({
            "unit": s.unit,
            "inReach": s.in_reach,
            "executables": s.executables,
        })).collect::<Vec<_>>(),
    })
}

/// The unit's name as systemctl shows it, and what follows it if it is a control group in that unit.
fn unit(running: &Running) -> String {
    let subject = Subject::new(b"/", &running.path);
    let mut names: Vec<_> = running.path.components().collect();
    let above = subject.units().count().saturating_sub(1);
    if let Some(unit) = names.get_mut(above) {
        *unit = unit_name(unit);
    }
    let rest = names.get(above..).unwrap_or_default().join(&b'/');
    String::from_utf8_lossy(&rest).into_owned()
}

fn print(
    out: &mut impl Write,
    verdicts: &Verdicts,
    running: &[Running],
    shared: &[Shared],
    all: bool,
) -> io::Result<()> {
    let otherwise = &verdicts.otherwise;
    let agent = super::program(otherwise.scope());
    let shown: Vec<&Running> = running
        .iter()
        .filter(|r| all || r.is_of_interest())
        .collect();
    if shown.is_empty() {
        writeln!(out, "No application runs in a unit of its own.")?;
    } else {
        let rows = shown.iter().map(|r| {
            [
                r.ids.first().map_or_else(dash, |id| printable(id)),
                printable(otherwise.target(&r.group)),
                by(r),
                printable(&unit(r)),
            ]
        });
        table(out, &["APP", "TARGET", "BY", "UNIT"], rows)?;
    }
    let yields = |r: &&Running| otherwise.yields(&r.group, r.rule.as_ref());
    if shown.iter().any(yields) {
        writeln!(out, "\n{}", otherwise::note())?;
    }
    if !verdicts.running {
        let nothing = super::nothing_is_in_force(otherwise);
        writeln!(out, "\n{nothing}")?;
    } else if !otherwise.waits() && shown.iter().any(|r| !r.group.inForce) {
        writeln!(out, "\nNot all of this is in force; see '{agent} status'.")?;
    }
    if let Some(older) = &verdicts.older {
        writeln!(out, "\n{older}")?;
    }
    let others = running.len() - shown.len();
    if others > 0 {
        let others = count(others, "other unit");
        writeln!(
            out,
            "\n{others}, of no application: '{agent} apps --all' shows them."
        )?;
    }
    shared::print(out, shared, otherwise)
}

/// What gives the verdict.
fn by(running: &Running) -> String {
    let group = &running.group;
    let what = match (group.execSlice, group.rule) {
        (true, _) => "cgtproxy-exec".to_owned(),
        (false, None) if group.relay == Some(true) => "the relay".to_owned(),
        (false, None) => return dash(),
        (false, Some(number)) => match &running.rule {
            None => format!("rule {number}"),
            Some(rule) => format!("rule {number} ({})", shortened(&printable(&rule.selector))),
        },
    };
    let enforced = match is_enforced(running.rule.as_ref()) {
        true => ", enforced",
        false => "",
    };
    match group.inheritedFrom {
        Some(_) => format!("{what}{enforced}, inherited"),
        None => format!("{what}{enforced}"),
    }
}

fn shortened(text: &str) -> String {
    if text.width() <= SELECTOR_COLUMNS {
        return text.to_owned();
    }
    let mut short = String::new();
    for c in text.chars() {
        short.push(c);
        if short.width() >= SELECTOR_COLUMNS {
            short.pop();
            break;
        }
    }
    short + "…"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Scope;

    fn running(path: &str, rule: Option<i64>, selector: Option<&str>) -> Running {
        let path = ControlGroupPath::from_wire(path).unwrap();
        let subject = Subject::new(b"/x", &path);
        Running {
            ids: ids(&subject),
            group: ControlGroup {
                path: path.to_wire(),
                target: "mihomo".into(),
                rule,
                inheritedFrom: None,
                execSlice: false,
                inForce: true,
                skipped: None,
                relay: None,
            },
            path,
            rule: selector.map(|selector| Rule {
                selector: selector.into(),
                target: "mihomo".into(),
                line: None,
                enforce: None,
            }),
            executables: BTreeSet::new(),
        }
    }

    #[test]
    fn shows_ids_to_copy_and_names_of_others_harmlessly() {
        let long = "match: ".to_owned() + &"x".repeat(50);
        let list = [
            running(
                "app.slice/app-flatpak-org.telegram.desktop-7.scope",
                Some(1),
                Some("app: org.telegram.desktop"),
            ),
            running("app.slice/app-a\x1b[2J-1.scope/b", Some(2), Some(&long)),
            running("app.slice/_io.github.Foo.service/_io.x", None, None),
        ];
        // As systemctl shows it; what the unit has made in itself is nobody else's to name.
        assert_eq!(unit(&list[2]), "io.github.Foo.service/_io.x");
        let shared = [Shared {
            unit: "session-2.scope".into(),
            in_reach: false,
            executables: ["fire\x1bfox", "xterm"].map(str::to_owned).into(),
        }];
        let mut verdicts = Verdicts {
            otherwise: Otherwise::new(Scope::User, 0, None, None),
            running: true,
            config_error: None,
            older: None,
            groups: Vec::new(),
            rules: Vec::new(),
        };
        let mut out = Vec::new();
        print(&mut out, &verdicts, &list, &shared, false).unwrap();
        let text = String::from_utf8(out).unwrap();
        let (table, rest) = text.split_once("\n\n").unwrap();
        assert_eq!(
            table,
            "APP                   TARGET  BY                                                 UNIT\n\
             org.telegram.desktop  mihomo  rule 1 (app: org.telegram.desktop)                 \
             app-flatpak-org.telegram.desktop-7.scope\n\
             a\\u{1b}[2J            mihomo  rule 2 (match: xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx…)  \
             app-a\\u{1b}[2J-1.scope/b"
        );
        assert!(
            rest.starts_with("1 other unit, of no application"),
            "{rest}"
        );
        assert!(
            rest.contains("session-2.scope: fire\\u{1b}fox, xterm\n"),
            "{rest}"
        );
        assert!(rest.contains("cgtproxy-exec"), "{rest}");
        let system = "'sudo cgtproxy-agent --system apps --all'";
        assert!(!rest.contains(system), "{rest}");
        verdicts.otherwise = Otherwise::new(Scope::System, 0, None, None);
        let mut out = Vec::new();
        print(&mut out, &verdicts, &list, &shared, false).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(text.contains(system), "{text}");
    }
}
