//! The configuration's manual pages, from docs/configuration.md.

use clap_mangen::roff::{Roff, roman};

use crate::markdown::{self, Section};
use crate::page::{Head, see_also};
use crate::{Error, Paper};

const TEXT: &str = include_str!("../../../docs/configuration.md");

/// Whether the programs' pages say already what a section is about.
fn is_about_programs(title: &str) -> bool {
    ["Options and variables", "Commands of the agent"].contains(&title)
        || title.contains(": cgtproxy-")
}

/// The pages of the user's file, which is the system agent's too, and of the helper's.
pub(crate) fn pages(date: &str) -> Result<[Paper; 2], Error> {
    let sections: Vec<_> = markdown::sections(TEXT)
        .into_iter()
        .filter(|section| !is_about_programs(&section.title))
        .collect();
    let (helper, agent): (Vec<_>, Vec<_>) = sections
        .into_iter()
        .partition(|section| section.title.contains("helper.yaml"));
    Ok([
        page(
            &Head {
                name: "cgtproxy.yaml",
                section: "5",
                date,
            },
            "what happens to the packets of applications",
            "~/.config/cgtproxy/config.yaml",
            &agent,
        )?,
        page(
            &Head {
                name: "cgtproxy-helper.yaml",
                section: "5",
                date,
            },
            "the administrator's limits for cgtproxy",
            "/etc/cgtproxy/helper.yaml",
            &helper,
        )?,
    ])
}

fn page(
    head: &Head<'_>,
    what: &str,
    file: &'static str,
    sections: &[Section],
) -> Result<Paper, Error> {
    let first = sections.first().ok_or(Error::NoSection(file))?;
    let mut roff = Roff::new();
    head.title(&mut roff);
    roff.control("SH", ["NAME"]);
    roff.text([roman(format!("{} - {what}", head.name))]);
    roff.control("SH", ["SYNOPSIS"]);
    // Titles end with the file that they are about, if there is one.
    let files = sections
        .iter()
        .filter_map(|section| section.title.split_once(": "));
    for (number, (_, file)) in files.enumerate() {
        if number > 0 {
            roff.control("br", []);
        }
        roff.text([roman(file)]);
    }
    roff.control("SH", ["DESCRIPTION"]);
    let mut text = roff.render() + &first.roff(0);
    for section in sections.iter().skip(1) {
        let mut heading = Roff::new();
        let title = section.title.split(": ").next().unwrap_or_default();
        heading.control("SH", [title.to_uppercase().as_str()]);
        text += &heading.to_roff();
        text += &section.roff(1);
    }
    let mut end = Roff::new();
    see_also(&mut end, head.name);
    text += &end.to_roff();
    Ok(head.paper(&text))
}
