//! `cgtproxy-agent explain`

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::ExitCode;

use cgtproxy_proto::agent::{
    ControlGroup, ErrorKind, Explain_Args, Explain_Reply, GetStatus_Reply,
};
use cgtproxy_proto::client::CallError;
use cgtproxy_proto::nearest::nearest;
use cgtproxy_proto::path::ControlGroupPath;
use rustix::io::Errno;
use serde_json::{Value, json};

use super::Error;
use super::client::Agent;
use crate::cli::Arguments;
use crate::config::Scope;
use crate::otherwise::{Otherwise, UNLESS, is_of_user};
use crate::policy;
use crate::subtree::{self, Subtree};
use crate::text::{chain, printable, quoted};
use crate::view;

/// What somebody wants to know about.
#[derive(Debug, PartialEq, Eq)]
enum Subject {
    /// A path from the control group root, with a slash before each component.
    Absolute(Vec<u8>),
    /// A path below the user manager's control group, or a unit's name.
    Name(Vec<u8>),
}

/// Explains a control group, or all that an id of an application means.
pub(super) fn run(arguments: &Arguments, what: &OsStr, json: bool) -> Result<ExitCode, Error> {
    let subtree = super::own_subtree(arguments)?;
    let subject = subject(&subtree, what.as_bytes())?;
    let agent = match Agent::connect_if_running(arguments.scope())? {
        Some(mut agent) => {
            let status = agent.status(arguments)?;
            Some((agent, status))
        }
        None => None,
    };
    let otherwise = super::otherwise(arguments, agent.as_ref().map(|(_, status)| status))?;
    let (replies, file, status) = match agent {
        Some((mut agent, status)) => {
            let replies = ask(&mut agent, &status, &subtree, &subject, &otherwise)?;
            (replies, status.config.clone(), Some(status))
        }
        None => {
            let (replies, file) = compute(arguments, &subtree, &subject, &otherwise)?;
            (replies, file, None)
        }
    };
    let mut out = io::stdout().lock();
    if json {
        let value = to_json(&replies, file, status.as_ref(), otherwise.system_policy());
        serde_json::to_writer_pretty(&mut out, &value).map_err(io::Error::from)?;
        writeln!(out)?;
    } else {
        let texts = replies
            .iter()
            .map(|reply| sentences(reply, status.is_some(), &otherwise));
        let mut text = texts.collect::<Vec<_>>().join("\n");
        if let Some(older) = status
            .as_ref()
            .and_then(|status| super::older(status, &otherwise))
        {
            text += &format!("\n{older}\n");
        }
        out.write_all(text.as_bytes())?;
    }
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}

/// The first control group that is meant, with the others, if there are any, in a list of their own.
fn to_json(
    replies: &[Explain_Reply],
    file: Option<String>,
    status: Option<&GetStatus_Reply>,
    system_policy: Option<bool>,
) -> Value {
    let first = replies.first();
    json!({
        "agentRunning": status.is_some(),
        "configError": status.and_then(|status| status.configError.as_ref()),
        "controlGroup": first.map(|reply| &reply.controlGroup),
        "rule": first.map(|reply| &reply.rule),
        "config": file,
        "systemPolicy": system_policy,
        "others": replies.get(1..).unwrap_or_default(),
    })
}

/// Makes out what was typed.
fn subject(subtree: &Subtree, what: &[u8]) -> Result<Subject, Error> {
    if !what.is_empty() && what.iter().all(u8::is_ascii_digit) {
        let pid = String::from_utf8_lossy(what);
        let file = std::fs::read(format!("/proc/{pid}/cgroup"))
            .map_err(|error| Error::NotFound(no_process(&pid, &error)))?;
        return subtree::of_process(&file)
            .map(|path| Subject::Absolute(path.to_vec()))
            .ok_or_else(|| Error::NotFound(format!("process {pid} is in no control group of v2")));
    }
    if what.starts_with(b"/") {
        let path = Path::new(OsStr::from_bytes(what));
        return Ok(Subject::Absolute(match path.strip_prefix(subtree.root()) {
            Ok(below) => [b"/", below.as_os_str().as_bytes()].concat(),
            Err(_) => what.to_vec(),
        }));
    }
    Ok(Subject::Name(what.to_vec()))
}

/// Why nobody knows in which control group a process is.
fn no_process(pid: &str, error: &io::Error) -> String {
    let errno = error.raw_os_error().map(Errno::from_raw_os_error);
    match errno {
        Some(Errno::NOENT | Errno::SRCH) => format!("there is no process {pid}"),
        _ => format!("can't look at process {pid}: {}", chain(error)),
    }
}

/// The path in the subtree that an absolute one names.
fn relative(
    subtree: &Subtree,
    absolute: &[u8],
    otherwise: &Otherwise,
) -> Result<ControlGroupPath, Error> {
    subtree.relative(absolute).ok_or_else(|| {
        if subtree::is_out_of_sight(absolute) {
            return out_of_sight();
        }
        let name = String::from_utf8_lossy(absolute);
        let root = subtree.to_wire(&ControlGroupPath::root());
        let who = match is_of_user(&name) {
            true => "that user's may".to_owned(),
            false => format!(
                "it {}; 'cgtproxy-exec TARGET COMMAND' gives a command a target",
                otherwise.goes()
            ),
        };
        let name = printable(&name);
        Error::NotFound(format!(
            "{name} is not below {root}, and your agent does not decide about it: {who}"
        ))
    })
}

/// Paths begin elsewhere here than the agent's.
fn out_of_sight() -> Error {
    Error::NotFound(
        "the agent's control groups can't be seen from here: this is within a control group namespace, as in a \
         container; run it outside"
            .to_owned(),
    )
}

/// Asks the running agent.
fn ask(
    agent: &mut Agent,
    status: &GetStatus_Reply,
    subtree: &Subtree,
    subject: &Subject,
    otherwise: &Otherwise,
) -> Result<Vec<Explain_Reply>, Error> {
    let scope = otherwise.scope();
    let paths = match subject {
        Subject::Absolute(path) => vec![relative(subtree, path, otherwise)?],
        Subject::Name(name) => {
            let groups = status.controlGroups.iter();
            let groups: Vec<_> = groups.filter_map(|g| subtree.of_wire(&g.path)).collect();
            meant(subtree, &groups, name, scope)?
        }
    };
    let mut replies = Vec::new();
    let mut gone = None;
    for path in paths {
        let name = subtree.to_wire(&path);
        let arguments = Explain_Args {
            controlGroup: name.clone(),
        };
        match agent.call("Explain", arguments) {
            // An application may have others.
            Err(Error::Call(CallError::Fault(fault)))
                if matches!(fault.kind(), ErrorKind::ControlGroupNotFound(_)) =>
            {
                gone = Some(unknown(&name, None, scope));
            }
            answer => replies.push(answer?),
        }
    }
    match gone {
        Some(gone) if replies.is_empty() => Err(gone),
        _ => Ok(replies),
    }
}

/// What the configuration means, without an agent, and its file, if there is one.
fn compute(
    arguments: &Arguments,
    subtree: &Subtree,
    subject: &Subject,
    otherwise: &Otherwise,
) -> Result<(Vec<Explain_Reply>, Option<String>), Error> {
    let (config, file) = super::config(arguments)?;
    let paths = match subject {
        Subject::Absolute(path) => vec![relative(subtree, path, otherwise)?],
        Subject::Name(name) => {
            let groups: Vec<_> = subtree.control_groups().into_iter().collect();
            meant(subtree, &groups, name, arguments.scope())?
        }
    };
    let explained = |path| {
        let group = view::meant(&config, subtree, path);
        view::explained(&config, file.as_deref(), group)
    };
    let replies = paths.iter().map(explained).collect();
    Ok((replies, file.as_deref().map(view::file)))
}

/// The control groups that a name means: the one with this path or name, or else that of the service of this name, or
/// else the units of the application with this id.
fn meant(
    subtree: &Subtree,
    groups: &[ControlGroupPath],
    name: &[u8],
    scope: Scope,
) -> Result<Vec<ControlGroupPath>, Error> {
    let path = named(name)?;
    let service = ControlGroupPath::from_bytes(&[name, b".service"].concat()).ok();
    let found = [Some(&path), service.as_ref()].into_iter().flatten();
    let mut found = found.filter_map(|path| view::find(groups.iter(), path));
    if let Some(found) = found.next() {
        return Ok(vec![found.clone()]);
    }
    let prefix = subtree.prefix();
    let is_of_application = |path: &&ControlGroupPath| {
        let subject = policy::Subject::new(&prefix, path);
        let is_unit = subject.units().count() == path.depth();
        let ids = subject.units().last().map(policy::application_ids);
        is_unit && ids.is_some_and(|ids| ids.iter().any(|id| id.as_bytes() == name))
    };
    let units: Vec<_> = groups.iter().filter(is_of_application).cloned().collect();
    if !units.is_empty() {
        return Ok(units);
    }
    let known: BTreeSet<String> = groups
        .iter()
        .flat_map(|path| names(&policy::Subject::new(&prefix, path)))
        .collect();
    let near = nearest(&path.to_wire(), known.iter().map(String::as_str)).map(printable);
    Err(unknown(&path.to_wire(), near.as_deref(), scope))
}

/// What was typed as a path.
fn named(name: &[u8]) -> Result<ControlGroupPath, Error> {
    ControlGroupPath::from_bytes(name).map_err(|why| {
        let name = printable(&String::from_utf8_lossy(name));
        Error::NotFound(format!("'{name}' is no control group: {why}"))
    })
}

/// What the innermost unit of a control group can be called.
fn names(subject: &policy::Subject) -> Vec<String> {
    let Some(unit) = subject.units().last() else {
        return Vec::new();
    };
    let mut names = policy::application_ids(unit);
    let unit = String::from_utf8_lossy(policy::unit_name(unit));
    names.extend(unit.strip_suffix(".service").map(str::to_owned));
    names.push(unit.into_owned());
    names
}

/// Nothing has this name; something may have one that is nearly the same.
fn unknown(name: &str, near: Option<&str>, scope: Scope) -> Error {
    let (name, agent) = (printable(name), super::program(scope));
    let near = near.map_or_else(String::new, |near| format!("; did you mean '{near}'?"));
    Error::NotFound(format!(
        "there is no control group or unit '{name}', nor an application: '{agent} apps --all' lists what runs{near}"
    ))
}

/// What the rule says, and where it stands, as far as the agent tells that: a line, or nothing.
fn rule(reply: &Explain_Reply) -> String {
    let (Some(number), Some(rule)) = (reply.controlGroup.rule, &reply.rule) else {
        return String::new();
    };
    let rule_and_selector = format!("rule {number} ({})", printable(&rule.selector));
    match (&reply.config, rule.line) {
        (Some(file), Some(line)) => {
            format!("  {rule_and_selector}, {}:{line}\n", printable(file))
        }
        _ => format!("  {rule_and_selector}\n"),
    }
}

/// What a person types for the path of a control group.
fn typed(path: &str) -> String {
    let wire = path.strip_prefix('/').unwrap_or(path);
    let bytes = ControlGroupPath::from_wire(wire).map(|path| path.as_bytes().to_vec());
    let name = bytes.ok().and_then(|bytes| String::from_utf8(bytes).ok());
    quoted(&name.map_or_else(|| path.to_owned(), |name| format!("/{name}")))
}

/// What a person is told of one control group.
fn sentences(reply: &Explain_Reply, running: bool, otherwise: &Otherwise) -> String {
    let group = &reply.controlGroup;
    let path = printable(&group.path);
    if otherwise.waits() {
        return format!(
            "{path}\n  has no verdict of the agent's, which waits for the configuration\n"
        );
    }
    if otherwise.is_left_to_system(group) {
        let (system, typed) = (
            super::program(Scope::System),
            printable(&typed(&group.path)),
        );
        let left = match (running, otherwise.left()) {
            (false, Some(_)) => format!("  {}\n", super::nothing_is_in_force(otherwise)),
            _ => String::new(),
        };
        return format!(
            "{path}\n  is left to the system policy\n  No rule of yours matches it or anything above \
             it. This says what happens to it:\n  $ {system} explain {typed}\n{left}"
        );
    }
    let mut what = match group.target.as_str() {
        "direct" => "goes direct".to_owned(),
        "drop" => "is dropped, but for bypassed destinations".to_owned(),
        "drop-all" => "is dropped altogether".to_owned(),
        name => format!("goes through '{}'", printable(name)),
    };
    if otherwise.yields(group, reply.rule.as_ref()) {
        what += &format!(", {UNLESS}");
    }
    let system = match otherwise.system_policy() {
        Some(true) => "  The system policy wins over this only where it has 'enforce: true'.\n",
        _ => "",
    };
    let (why, rule) = (why(group), rule(reply));
    let force = force(group, running, otherwise);
    format!("{path}\n  {what}\n  {why}\n{rule}  {force}\n{system}")
}

/// What gives a control group its verdict.
fn why(group: &ControlGroup) -> String {
    let from = group.inheritedFrom.as_deref().map(printable);
    match (group.rule, &from) {
        _ if group.execSlice => "It is in a slice of cgtproxy-exec.".to_owned(),
        _ if group.relay == Some(true) => {
            "It is the relay, which goes direct whatever the rules say.".to_owned()
        }
        (Some(number), None) => format!("Rule {number} matches it."),
        (Some(number), Some(from)) => {
            format!("No rule matches it; it inherits from {from}, which rule {number} matches.")
        }
        (None, _) => "No rule matches it or anything above it.".to_owned(),
    }
}

/// Whether a control group's verdict is in the kernel, and why it is not.
fn force(group: &ControlGroup, running: bool, otherwise: &Otherwise) -> String {
    if !running {
        return super::nothing_is_in_force(otherwise);
    }
    let agent = super::program(otherwise.scope());
    match (group.skipped.as_deref(), group.inForce) {
        (Some(view::NO_ROOM), _) => {
            format!(
                "It is not in force: there is no room for another verdict; see '{agent} status'."
            )
        }
        (Some(reason), _) => {
            let why = view::named_sentence(reason);
            format!("It is not in force: the helper passed it over ({why}).")
        }
        (None, true) => "The kernel holds this verdict.".to_owned(),
        (None, false) => format!("The kernel does not hold this verdict; see '{agent} status'."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn otherwise(scope: Scope) -> Otherwise {
        Otherwise::new(scope, 0, None, None)
    }

    #[test]
    fn makes_out_what_is_meant() {
        let subtree = Subtree::of_user("/sys/fs/cgroup".into(), 5).unwrap();
        let absolute = |text: &str| Subject::Absolute(text.as_bytes().to_vec());
        let cases = [
            ("/sys/fs/cgroup/user.slice/x", absolute("/user.slice/x")),
            ("/user.slice/x", absolute("/user.slice/x")),
            ("/sys/fs/cgroups", absolute("/sys/fs/cgroups")),
            ("/sys/fs/cgroup/user.slice/x/", absolute("/user.slice/x")),
            ("/sys/fs/cgroup", absolute("/")),
            ("/sys/fs/cgroup/", absolute("/")),
            ("a.scope", Subject::Name(b"a.scope".to_vec())),
        ];
        // However it is written.
        let slash = Subtree::of_user("/sys/fs//cgroup/".into(), 5).unwrap();
        for (what, meant) in &cases {
            for subtree in [&subtree, &slash] {
                let subject = super::subject(subtree, what.as_bytes()).unwrap();
                assert_eq!(subject, *meant, "{what}");
            }
        }
        let machine = Subtree::of_machine("/".into());
        assert_eq!(
            super::subject(&machine, b"/user.slice").unwrap(),
            absolute("/user.slice")
        );
        assert!(super::subject(&subtree, b"4294967295").is_err());
    }

    #[test]
    fn says_what_may_have_been_meant() {
        let subtree = Subtree::of_user("/sys/fs/cgroup".into(), 5).unwrap();
        let groups = [
            "app.slice/app-gnome-org.example.Browser-7.scope",
            "app.slice/mihomo.service/below",
        ];
        let groups = groups.map(|path| ControlGroupPath::from_wire(path).unwrap());
        let said = |name: &str| {
            let meant = meant(&subtree, &groups, name.as_bytes(), Scope::User);
            meant.unwrap_err().to_string()
        };
        for (name, near) in [
            ("org.example.Browsr", "org.example.Browser"),
            ("org.example.browser", "org.example.Browser"),
            ("mihmo", "mihomo"),
            ("mihmo.service", "mihomo.service"),
        ] {
            let said = said(name);
            assert!(
                said.ends_with(&format!("; did you mean '{near}'?")),
                "{said}"
            );
        }
        assert!(said("x").ends_with("lists what runs"), "{}", said("x"));
    }

    #[test]
    fn tells_a_process_that_is_hidden_from_one_that_is_not_there() {
        let why = |errno: Errno| no_process("7", &errno.into());
        assert_eq!(why(Errno::NOENT), "there is no process 7");
        assert_eq!(why(Errno::SRCH), "there is no process 7");
        assert!(why(Errno::ACCESS).starts_with("can't look at process 7: "));
    }

    #[test]
    fn says_why_the_helper_passed_it_over() {
        let subtree = Subtree::of_user("/sys/fs/cgroup".into(), 5).unwrap();
        let mut reply = Explain_Reply {
            controlGroup: view::judged(&subtree, &ControlGroupPath::root(), None),
            rule: None,
            config: None,
        };
        for (reason, said) in [
            ("tooDeep", "(it is nested deeper than any rule looks)"),
            ("later\x1b", "(later\\u{1b})"),
        ] {
            reply.controlGroup.skipped = Some(reason.into());
            let text = sentences(&reply, true, &otherwise(Scope::User));
            assert!(text.contains(said), "{text}");
        }
    }

    #[test]
    fn names_the_agent_that_was_asked() {
        let subtree = Subtree::of_machine("/sys/fs/cgroup".into());
        let mut reply = Explain_Reply {
            controlGroup: view::judged(&subtree, &ControlGroupPath::root(), None),
            rule: None,
            config: None,
        };
        for skipped in [None, Some(view::NO_ROOM.to_owned())] {
            reply.controlGroup.skipped = skipped;
            let text = |scope| sentences(&reply, true, &otherwise(scope));
            assert!(text(Scope::System).contains("see 'sudo cgtproxy-agent --system status'"));
            assert!(text(Scope::User).contains("see 'cgtproxy-agent status'"));
        }
        let text = sentences(&reply, false, &otherwise(Scope::System));
        assert!(text.contains("the system's cgtproxy-agent is not running"));
    }
}
