//! A program's manual page, from the definition of its command line.

use std::io;

use clap::Command;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, roman};

use crate::page::{Head, MANUAL, SOURCE, see_also};
use crate::{Error, Paper};

/// What `roff` puts before everything it renders; a page needs it once.
const PREAMBLE: &str = ".ie \\n(.g .ds Aq \\(aq\n.el .ds Aq '\n";

/// The page of `command`, with a section for each of its own commands.
pub(crate) fn page(command: Command, section: &str, date: &str) -> Result<Paper, Error> {
    // The end of the help has sections of its own here, and --version says the version.
    let end = command.get_after_long_help().or(command.get_after_help());
    let end = end.map(ToString::to_string).unwrap_or_default();
    let page = command
        .clone()
        .disable_help_subcommand(true)
        .subcommand_value_name("COMMAND");
    let man = Man::new(page)
        .title(command.get_name().to_uppercase())
        .section(section)
        .date(date)
        .source(SOURCE)
        .manual(MANUAL);
    let mut text = PREAMBLE.to_owned();
    text += &rendered(|out| man.render_title(out))?;
    text += &rendered(|out| man.render_name_section(out))?;
    text += &rendered(|out| man.render_synopsis_section(out))?;
    text += &rendered(|out| man.render_description_section(out))?;
    text += &rendered(|out| man.render_options_section(out))?;
    text += &commands(command.clone())?;
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

/// The section about a program's own commands, if it has any.
fn commands(command: Command) -> Result<String, Error> {
    let mut command = command.disable_help_subcommand(true);
    command.build();
    let mut text = String::new();
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        if text.is_empty() {
            text += ".SH COMMANDS\n";
        }
        let mut heading = Roff::new();
        heading.control("SS", [sub.get_name()]);
        text += &heading.to_roff();
        // Options of every command are those of the program.
        let own = sub.clone().disable_help_flag(true).mut_args(|argument| {
            let general = argument.is_global_set() || argument.get_id() == "help";
            argument.hide(general)
        });
        let has_arguments = own.get_arguments().any(|argument| !argument.is_hide_set());
        let man = Man::new(own);
        text += &rendered(|out| man.render_synopsis_section(out))?.replace(".SH SYNOPSIS\n", "");
        text += ".PP\n";
        text +=
            &rendered(|out| man.render_description_section(out))?.replace(".SH DESCRIPTION\n", "");
        if has_arguments {
            text += &rendered(|out| man.render_options_section(out))?.replace(".SH OPTIONS\n", "");
        }
    }
    Ok(text)
}

/// Paragraphs of a help's end that begin with a title and a colon are sections.
fn sections(roff: &mut Roff, text: &str) {
    for paragraph in text.split("\n\n") {
        match paragraph.split_once(':') {
            Some((title, body)) if !title.contains('\n') => {
                roff.control("SH", [title.to_uppercase().as_str()]);
                let body = body.trim_start_matches([' ', '\n']);
                if paragraph.contains("\n ") {
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
