//! A program's manual page, from the definition of its command line.

use std::io;

use clap::{Arg, ArgAction, Command};
use clap_mangen::Man;
use clap_mangen::roff::{Inline, Roff, bold, italic, roman};

use crate::page::{Head, MANUAL, SOURCE, see_also};
use crate::{Error, Paper};

/// What `roff` puts before everything it renders; a page needs it once.
const PREAMBLE: &str = ".ie \\n(.g .ds Aq \\(aq\n.el .ds Aq '\n";

/// The page of `command`, with a section for each of its own commands.
pub(crate) fn page(command: Command, section: &str, date: &str) -> Result<Paper, Error> {
    // The end of the help has sections of its own here, and --version says the version.
    let end = command.get_after_long_help().or(command.get_after_help());
    let end = end.map(ToString::to_string).unwrap_or_default();
    let mut page = command.clone().disable_help_subcommand(true);
    page.build();
    let man = Man::new(page.clone())
        .title(command.get_name().to_uppercase())
        .section(section)
        .date(date)
        .source(SOURCE)
        .manual(MANUAL);
    let mut text = PREAMBLE.to_owned();
    text += &rendered(|out| man.render_title(out))?;
    text += &rendered(|out| man.render_name_section(out))?;
    let mut heading = Roff::new();
    heading.control("SH", ["SYNOPSIS"]);
    synopsis(&mut heading, page.clone(), command.get_name());
    text += &heading.to_roff();
    text += &rendered(|out| man.render_description_section(out))?;
    text += &rendered(|out| man.render_options_section(out))?;
    if page.has_subcommands() {
        text += ".SH COMMANDS\n";
    }
    text += &commands(&page, "")?;
    let mut rest = Roff::new();
    sections(&mut rest, &end);
    see_also(&mut rest, command.get_name());
    text += &rest.to_roff();
    let head = Head {
        name: command.get_name(),
        section,
        date,
    };
    Ok(head.paper(&text))
}

/// What a function of clap_mangen writes, which is a page by itself each time.
fn rendered(
    render: impl FnOnce(&mut dyn io::Write) -> Result<(), io::Error>,
) -> Result<String, Error> {
    let mut bytes = Vec::new();
    render(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).replace(PREAMBLE, ""))
}

/// A section for each of a program's own commands, and for each of theirs; `prefix` is what comes before their names.
fn commands(command: &Command, prefix: &str) -> Result<String, Error> {
    let mut text = String::new();
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        let name = format!("{prefix}{}", sub.get_name());
        // Options of every command are those of the program.
        let own = sub
            .clone()
            .disable_help_flag(true)
            .disable_help_subcommand(true)
            .mut_args(|argument| {
                let general = argument.is_global_set() || argument.get_id() == "help";
                argument.hide(general)
            });
        let mut heading = Roff::new();
        heading.control("SS", [name.as_str()]);
        synopsis(&mut heading, own.clone(), &name);
        text += &heading.to_roff();
        text += ".PP\n";
        let has_arguments = own.get_arguments().any(|argument| !argument.is_hide_set());
        let man = Man::new(own);
        text +=
            &rendered(|out| man.render_description_section(out))?.replace(".SH DESCRIPTION\n", "");
        if has_arguments {
            text += &rendered(|out| man.render_options_section(out))?.replace(".SH OPTIONS\n", "");
        }
        text += &commands(sub, &format!("{name} "))?;
    }
    Ok(text)
}

/// How a command is typed: as its help says if there are several ways, else with all options and their values.
fn synopsis(roff: &mut Roff, mut command: Command, name: &str) {
    let usage = command.render_usage().to_string();
    let usage = usage.trim_start_matches("Usage: ");
    if usage.contains('\n') && !command.has_subcommands() {
        for (number, line) in usage.lines().enumerate() {
            if number > 0 {
                roff.control("br", []);
            }
            let line = line.trim_start();
            let rest = line.strip_prefix(name).unwrap_or(line);
            roff.text([bold(name), roman(rest)]);
        }
        return;
    }
    let mut line = vec![bold(name)];
    let shown = || {
        command
            .get_arguments()
            .filter(|argument| !argument.is_hide_set())
    };
    for option in shown().filter(|argument| !argument.is_positional()) {
        line.push(roman(" ["));
        let short = option.get_short().map(|short| format!("-{short}"));
        let long = option.get_long().map(|long| format!("--{long}"));
        for (number, way) in short.into_iter().chain(long).enumerate() {
            if number > 0 {
                line.push(roman("|"));
            }
            line.push(bold(way));
        }
        if option.get_action().takes_values() {
            line.push(roman(" "));
            line.push(value(option));
        }
        line.push(roman("]"));
    }
    for positional in shown().filter(|argument| argument.is_positional()) {
        let required = positional.is_required_set();
        line.push(roman(if required { " " } else { " [" }));
        line.push(value(positional));
        if matches!(positional.get_action(), ArgAction::Append) {
            line.push(roman("..."));
        }
        if !required {
            line.push(roman("]"));
        }
    }
    if command.has_subcommands() {
        line.extend([roman(" ["), italic("COMMAND"), roman("]")]);
    }
    roff.text(line);
}

/// What stands for an argument's value.
fn value(argument: &Arg) -> Inline {
    match argument.get_value_names() {
        Some([name, ..]) => italic(name.as_str()),
        _ => italic(argument.get_id().as_str().to_uppercase()),
    }
}

/// Paragraphs of a help's end that begin with a title and a colon are sections. Variables of the environment, each in a
/// line with what it is for behind two spaces, are terms.
fn sections(roff: &mut Roff, text: &str) {
    for paragraph in text.split("\n\n") {
        match paragraph.split_once(':') {
            Some((title, body)) if !title.contains('\n') => {
                roff.control("SH", [title.to_uppercase().as_str()]);
                let body = body.trim_start_matches([' ', '\n']);
                if title == "Environment" {
                    for line in body.lines() {
                        let line = line.trim_start();
                        let (term, meaning) = line.split_once("  ").unwrap_or((line, ""));
                        roff.control("TP", []);
                        roff.text([bold(term)]);
                        roff.text([roman(meaning.trim_start())]);
                    }
                } else if paragraph.contains("\n ") {
                    roff.control("EX", []);
                    for line in body.lines() {
                        roff.text([roman(line.trim_start())]);
                    }
                    roff.control("EE", []);
                } else {
                    roff.text([roman(capitalised(body))]);
                }
            }
            _ => {
                roff.control("PP", []);
                roff.text([roman(paragraph)]);
            }
        }
    }
}

fn capitalised(text: &str) -> String {
    let mut characters = text.chars();
    let first = characters.next().map(char::to_uppercase);
    first.into_iter().flatten().chain(characters).collect()
}
