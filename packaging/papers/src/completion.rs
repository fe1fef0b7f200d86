//! The shells' completions.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::io;

use clap::{Arg, Command};
use clap_complete::Generator;
use clap_complete::shells::{Fish, Zsh};

use crate::{Error, Paper};

/// Where bash, zsh and fish look for the completion of a command.
fn places(command: &str) -> [String; 3] {
    [
        format!("bash-completion/completions/{command}"),
        format!("zsh/site-functions/_{command}"),
        format!("fish/vendor_completions.d/{command}.fish"),
    ]
}

/// The completions of `cgtproxy-agent`, by clap but for bash.
pub(crate) fn of_agent(mut command: Command) -> Result<[Paper; 3], Error> {
    let name = command.get_name().to_owned();
    command.set_bin_name(&name);
    command.build();
    let [bash, zsh, fish] = places(&name);
    Ok([
        paper(bash, bash_script(&command)),
        paper(zsh, generated(&Zsh, &command)?),
        paper(fish, fish_script(&command)?),
    ])
}

fn paper(path: String, text: String) -> Paper {
    Paper { path, text }
}

fn generated(shell: &impl Generator, command: &Command) -> Result<String, io::Error> {
    let mut bytes = Vec::new();
    shell.try_generate(command, &mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The script for bash. In clap_complete's, options hide the files that a command takes, and a file with a space in its name
/// is two.
fn bash_script(command: &Command) -> String {
    let mut all = Vec::new();
    below(command, command.get_name(), &mut all);
    let (mut known, mut cases, mut with_value) = (Vec::new(), String::new(), BTreeSet::new());
    for (path, command) in &all {
        if *path != command.get_name() {
            known.push(format!("'{path}'"));
        }
        let commands: Vec<_> = command.get_subcommands().map(Command::get_name).collect();
        let options: Vec<&Arg> = command.get_opts().chain(flags(command)).collect();
        let files = match command.get_positionals().next() {
            Some(_) => " files=yes",
            None => "",
        };
        // Writing to a String can't fail.
        let _ = writeln!(
            cases,
            "    '{path}') commands='{}' options='{}'{files} ;;",
            commands.join(" "),
            words(&options, |_| true)
        );
        with_value.extend(
            options
                .iter()
                .filter(|option| takes_value(option))
                .map(|option| words(&[option], |_| true).replace(' ', " | ")),
        );
    }
    include_str!("completion/cgtproxy-agent.bash")
        .replace("@WITH_VALUE@", &Vec::from_iter(with_value).join(" | "))
        .replace(
            "@COMMANDS@",
            &format!("            {})", known.join(" | \\\n                ")),
        )
        .replace("@CASES@\n", &cases)
}

/// The options without a value, which are all that clap does not call options.
fn flags(command: &Command) -> impl Iterator<Item = &Arg> {
    let arguments = command.get_arguments();
    arguments.filter(|argument| !argument.is_positional() && !takes_value(argument))
}

/// A command and those below it, each with all the words that name it.
fn below<'a>(command: &'a Command, path: &str, all: &mut Vec<(String, &'a Command)>) {
    all.push((path.to_owned(), command));
    for one in command.get_subcommands() {
        below(one, &format!("{path} {}", one.get_name()), all);
    }
}

/// The script for fish. To clap_complete's, `help` is the command that help is asked for, so that there is none to complete.
fn fish_script(command: &Command) -> Result<String, io::Error> {
    let names: Vec<_> = command.get_subcommands().map(Command::get_name).collect();
    let names = names.join(" ");
    let seen = format!("using_subcommand help; and not __fish_seen_subcommand_from {names}");
    let others = seen.strip_suffix(" help").unwrap_or(&seen);
    Ok(generated(&Fish, command)?.replace(&seen, others))
}

/// The completions of `cgtproxy-exec`, whose options come from clap. What follows them clap can't complete: targets,
/// which the program itself lists, and another command with all its words, which the shell completes.
pub(crate) fn of_exec(mut command: Command) -> [Paper; 3] {
    command.build();
    let options: Vec<&Arg> = command
        .get_arguments()
        .filter(|argument| !argument.is_positional() && !argument.is_hide_set())
        .collect();
    let [bash, zsh, fish] = places(command.get_name());
    [
        paper(
            bash,
            include_str!("completion/cgtproxy-exec.bash")
                .replace("@OPTIONS@", &words(&options, |_| true))
                .replace("@WITH_VALUE@", &words(&options, takes_value)),
        ),
        paper(
            zsh,
            include_str!("completion/cgtproxy-exec.zsh")
                .replace("@OPTIONS@\n", &zsh_specs(&options)),
        ),
        paper(
            fish,
            include_str!("completion/cgtproxy-exec.fish")
                .replace("@OPTIONS@\n", &fish_options(&options))
                .replace("@WITH_VALUE@", &words(&options, takes_value)),
        ),
    ]
}

fn takes_value(option: &Arg) -> bool {
    option.get_num_args().is_some_and(|n| n.takes_values())
}

/// The options as they are typed.
fn words(options: &[&Arg], wanted: impl Fn(&Arg) -> bool) -> String {
    let mut words = Vec::new();
    for option in options.iter().filter(|option| wanted(option)) {
        words.extend(option.get_short().map(|short| format!("-{short}")));
        words.extend(option.get_long().map(|long| format!("--{long}")));
    }
    words.join(" ")
}

/// The first sentence of what the help says about an option, in single quotes of a shell.
fn summary(option: &Arg, escape: impl Fn(&str) -> String) -> String {
    let help = option
        .get_help()
        .map(ToString::to_string)
        .unwrap_or_default();
    let help = help.replace('\n', " ");
    let first = help.split(". ").next().unwrap_or_default();
    escape(first)
}

/// One argument of `_arguments` for each way to write an option.
fn zsh_specs(options: &[&Arg]) -> String {
    let mut specs = String::new();
    for option in options {
        let help = summary(option, |help| {
            let help = help.replace('\\', "\\\\").replace('\'', "'\\''");
            help.replace('[', "\\[")
                .replace(']', "\\]")
                .replace(':', "\\:")
        });
        let value = match option.get_value_names() {
            Some([name, ..]) if takes_value(option) => match name.as_str() {
                "PID" => ":process:_pids".to_owned(),
                name => format!(":{name}:_files"),
            },
            _ => String::new(),
        };
        let short = option.get_short().map(|short| format!("-{short}"));
        let equals = if takes_value(option) { "=" } else { "" };
        let long = option.get_long().map(|long| format!("--{long}{equals}"));
        for way in short.into_iter().chain(long) {
            // Writing to a String can't fail.
            let _ = writeln!(specs, "    '{way}[{help}]{value}' \\");
        }
    }
    specs
}

fn fish_options(options: &[&Arg]) -> String {
    let mut lines = String::new();
    for option in options {
        let mut line = "complete -c cgtproxy-exec -n __cgtproxy_exec_needs_target".to_owned();
        if let Some(short) = option.get_short() {
            line += &format!(" -s {short}");
        }
        if let Some(long) = option.get_long() {
            line += &format!(" -l {long}");
        }
        if takes_value(option) {
            line += match option.get_value_names() {
                Some([name, ..]) if name == "PID" => " -x -a '(__fish_complete_pids)'",
                _ => " -r",
            };
        }
        let help = summary(option, |help| {
            help.replace('\\', "\\\\").replace('\'', "\\'")
        });
        let _ = writeln!(lines, "{line} -d '{help}'");
    }
    lines
}
