//! The manual pages and the shells' completions of cgtproxy, each from what says the same thing elsewhere: the
//! programs' from the definitions of their command lines, the configuration's from docs/configuration.md, the
//! interfaces' from their descriptions. And the licences of the crates that are linked, from their sources (build.rs).

#![forbid(unsafe_code)]

use std::io;
use std::path::{Path, PathBuf};

mod completion;
mod configuration;
mod interface;
mod markdown;
mod page;
mod program;

use clap::CommandFactory;

const LICENCES: &str = include_str!(concat!(env!("OUT_DIR"), "/third-party-licenses"));

/// A file to be installed.
#[derive(Debug)]
pub struct Paper {
    /// Where it is, below the directory of all papers.
    pub path: String,
    /// What is in it.
    pub text: String,
}

/// Why there are no papers.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// docs/configuration.md has a section that no page wants.
    #[error("docs/configuration.md has no section for {0}")]
    NoSection(&'static str),
    /// A file can't be written.
    #[error("can't write '{path}'")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A page can't be rendered.
    #[error("can't render a page")]
    Render(#[from] io::Error),
}

/// All papers. `date` is what manual pages bear.
///
/// # Errors
/// If what they are made of is not as it should be.
pub fn all(date: &str) -> Result<Vec<Paper>, Error> {
    let helper = cgtproxy_helper::cli::Arguments::command();
    let agent = cgtproxy_agent::cli::Arguments::command();
    let exec = cgtproxy_agent::exec::Options::command();
    let relay = cgtproxy_relay::cli::Arguments::command();
    let mut papers = vec![
        program::page(helper, "8", date)?,
        program::page(relay, "8", date)?,
        program::page(agent.clone(), "1", date)?,
        program::page(exec.clone(), "1", date)?,
        interface::page(
            cgtproxy_proto::helper::INTERFACE,
            cgtproxy_proto::helper::DESCRIPTION,
            date,
        ),
        interface::page(
            cgtproxy_proto::agent::INTERFACE,
            cgtproxy_proto::agent::DESCRIPTION,
            date,
        ),
        interface::page(
            cgtproxy_proto::relay::INTERFACE,
            cgtproxy_proto::relay::DESCRIPTION,
            date,
        ),
    ];
    papers.extend(configuration::pages(date)?);
    papers.extend(completion::of_agent(agent)?);
    papers.extend(completion::of_exec(exec));
    papers.push(Paper {
        path: "third-party-licenses".to_owned(),
        text: LICENCES.to_owned(),
    });
    Ok(papers)
}

/// Writes them below `directory`.
///
/// # Errors
/// If a file or a directory can't be written.
pub fn write(papers: &[Paper], directory: &Path) -> Result<(), Error> {
    for paper in papers {
        let path = directory.join(&paper.path);
        let written = match path.parent() {
            Some(parent) => std::fs::create_dir_all(parent),
            None => Ok(()),
        }
        .and_then(|()| std::fs::write(&path, &paper.text));
        written.map_err(|source| Error::Write { path, source })?;
    }
    Ok(())
}
