//! The papers are clean, complete, and say what the programs do.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a panic is a failed test"
)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use cgtproxy_papers::Paper;
use clap::CommandFactory;

fn papers() -> Vec<Paper> {
    cgtproxy_papers::all("2026-01-02").expect("the documentation has all sections")
}

/// The papers in a directory, and that directory.
fn written() -> (Vec<Paper>, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let papers = papers();
    cgtproxy_papers::write(&papers, directory.path()).unwrap();
    (papers, directory)
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// All files below a directory with this extension.
fn files(directory: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path, extension));
        } else if path.extension().is_some_and(|e| e == extension) {
            found.push(path);
        }
    }
    found
}

fn run(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|error| {
        panic!(
            "can't run {}: {error}",
            command.get_program().to_string_lossy()
        )
    })
}

/// A page as a reader sees it.
fn page(path: &str) -> String {
    let (_, directory) = written();
    let output = run(Command::new("mandoc")
        .args(["-T", "utf8", "-O", "width=1000"])
        .arg(directory.path().join(path)));
    assert!(output.status.success(), "{output:?}");
    // Bold and underlined by overstriking.
    let mut text = String::new();
    let page = String::from_utf8(output.stdout).unwrap();
    let mut characters = page.chars().peekable();
    while let Some(character) = characters.next() {
        if characters.peek() == Some(&'\u{8}') {
            characters.next();
        } else {
            text.push(character);
        }
    }
    text
}

#[test]
fn no_manual_page_is_worth_a_remark() {
    let (papers, directory) = written();
    let pages: Vec<_> = papers
        .iter()
        .filter(|p| p.path.starts_with("man"))
        .collect();
    assert_eq!(pages.len(), 9);
    for paper in pages {
        let output = run(Command::new("mandoc")
            .args(["-T", "lint", "-W", "style"])
            .arg(directory.path().join(&paper.path)));
        let remarks = String::from_utf8_lossy(&output.stdout);
        assert_eq!(remarks, "", "{}", paper.path);
        assert!(output.status.success(), "{}: {output:?}", paper.path);
        for mention in ["SEE ALSO", ".SH NAME", "2026-01-02"] {
            assert!(paper.text.contains(mention), "{}: {mention}", paper.path);
        }
    }
}

/// groff has no character for others in the C locale, where man warns of each.
#[test]
fn manual_pages_are_read_in_every_locale() {
    for paper in papers().iter().filter(|p| p.path.starts_with("man")) {
        let others = paper.text.lines().filter(|line| !line.is_ascii());
        assert_eq!(others.collect::<Vec<_>>(), [""; 0], "{}", paper.path);
    }
}

/// What a section calls "it" is in its heading, which the page has in another place.
#[test]
fn a_files_page_begins_with_where_the_file_is() {
    for (path, file) in [
        (
            "man5/cgtproxy.yaml.5",
            "The file is config.yaml in $XDG_CONFIG_HOME/cgtproxy",
        ),
        (
            "man5/cgtproxy-helper.yaml.5",
            "The helper reads /etc/cgtproxy/helper.yaml when it starts",
        ),
    ] {
        let page = page(path);
        let (_, description) = page.split_once("DESCRIPTION\n").unwrap();
        let first = description.trim_start();
        assert!(first.starts_with(file), "{path}: {}", &first[..100]);
    }
}

#[test]
fn no_help_is_wider_than_a_page() {
    for mut command in [
        cgtproxy_helper::cli::Arguments::command(),
        cgtproxy_relay::cli::Arguments::command(),
        cgtproxy_agent::cli::Arguments::command(),
        cgtproxy_agent::exec::Options::command(),
    ] {
        command.build();
        assert_narrow(&mut command);
    }
}

/// Insists on that for a command and all of its own.
fn assert_narrow(command: &mut clap::Command) {
    for help in [command.render_help(), command.render_long_help()] {
        for line in help.to_string().lines() {
            assert!(
                line.chars().count() <= 100,
                "{}: {line}",
                command.get_name()
            );
        }
    }
    for sub in command.get_subcommands_mut() {
        assert_narrow(sub);
    }
}

#[test]
fn every_paper_is_installed() {
    let (papers, directory) = written();
    let output = run(Command::new(workspace().join("packaging/install"))
        .arg("sources")
        .env("PAPERSDIR", directory.path()));
    assert!(output.status.success(), "{output:?}");
    let sources = String::from_utf8(output.stdout).unwrap();
    for paper in papers {
        let path = directory.path().join(paper.path);
        assert!(
            sources.lines().any(|line| Path::new(line) == path),
            "{path:?}"
        );
    }
}

#[test]
fn every_linked_crate_is_among_the_licences() {
    let papers = papers();
    let is_it = |paper: &&Paper| paper.path == "third-party-licenses";
    let text = &papers.iter().find(is_it).unwrap().text;
    let (list, texts) = text.split_once("\n\n----").unwrap();
    for program in ["cgtproxy-helper", "cgtproxy-agent", "cgtproxy-relay"] {
        let tree = run(Command::new(env!("CARGO"))
            .args(["tree", "--locked", "--offline", "--prefix", "none"])
            .args(["--edges", "normal,no-proc-macro", "--package", program])
            .current_dir(workspace()));
        assert!(tree.status.success(), "{tree:?}");
        let tree = String::from_utf8(tree.stdout).unwrap();
        let mut linked = 0;
        for line in tree.lines().filter(|line| !line.starts_with("cgtproxy-")) {
            let of = line.split(' ').take(2).collect::<Vec<_>>().join(" ");
            let of = of.replacen(" v", " ", 1);
            let (_, entry) = list
                .split_once(&format!("\n\n{of}\n    Licence: "))
                .unwrap_or_else(|| panic!("{of}"));
            let entry = entry.split("\n\n").next().unwrap();
            let (_, referred) = entry.split_once("    Texts: ").unwrap();
            if referred != "none in its sources" {
                for reference in referred.split(", ") {
                    let number = reference.split(' ').next().unwrap();
                    assert!(texts.contains(&format!("\n{number} ")), "{of}: {reference}");
                }
            }
            linked += 1;
        }
        assert!(linked > 50, "{program}: {linked}");
    }
    // Nothing stands there twice.
    let title = "Permission is hereby granted, free of charge, to any person";
    assert!(texts.contains(title));
    assert_eq!(
        texts.matches("Mozilla Public License Version 2.0").count(),
        1
    );
}

/// The licences that can be chosen from, for each part of each linked crate.
fn choices() -> BTreeSet<BTreeSet<String>> {
    let papers = papers();
    let is_it = |paper: &&Paper| paper.path == "third-party-licenses";
    let text = &papers.iter().find(is_it).unwrap().text;
    let expressions = text
        .lines()
        .filter_map(|line| line.strip_prefix("    Licence: "));
    // No crate's expression has an AND within an OR. Before there was OR, it was a slash.
    let parts = expressions.flat_map(|expression| expression.split(" AND "));
    parts
        .map(|part| {
            let part = part.trim_matches(['(', ')']).replace('/', " OR ");
            part.split(" OR ").map(str::to_owned).collect()
        })
        .collect()
}

/// What packages say of the licences of what they install is kept by hand.
#[test]
fn packages_name_the_licences_that_the_linked_crates_need_and_no_others() {
    let said = |file: &str, before: &str, after: &str| {
        let text = std::fs::read_to_string(workspace().join("packaging").join(file)).unwrap();
        let (_, rest) = text
            .split_once(before)
            .unwrap_or_else(|| panic!("{file}: {before}"));
        rest.split_once(after).unwrap().0.to_owned()
    };
    let own = "GPL-3.0-or-later AND ";
    let expression = said("cgtproxy.spec", &format!("\nLicense: {own}"), "\n");
    assert_eq!(
        expression,
        said("arch/PKGBUILD", &format!("\nlicense=('{own}"), "')")
    );
    let licences: BTreeSet<_> = expression.split(" AND ").map(str::to_owned).collect();
    let prose = said(
        "debian/copyright",
        "licences of their own:\n ",
        ". Which these are",
    );
    let prose = prose.replace("\n ", " ").replace(" and ", ", ");
    assert_eq!(licences, prose.split(", ").map(str::to_owned).collect());

    let choices = choices();
    for choice in &choices {
        assert!(
            !choice.is_disjoint(&licences),
            "none of {choice:?} is named"
        );
    }
    for licence in &licences {
        let needs = |choice: &BTreeSet<String>| choice.intersection(&licences).eq([licence]);
        assert!(choices.iter().any(needs), "nothing needs {licence}");
    }
}

/// "Every CLI flag is in help and manual page."
#[test]
fn every_option_and_command_is_in_the_programs_page() {
    for (path, command) in [
        (
            "man8/cgtproxy-helper.8",
            cgtproxy_helper::cli::Arguments::command(),
        ),
        (
            "man8/cgtproxy-relay.8",
            cgtproxy_relay::cli::Arguments::command(),
        ),
        (
            "man1/cgtproxy-agent.1",
            cgtproxy_agent::cli::Arguments::command(),
        ),
        (
            "man1/cgtproxy-exec.1",
            cgtproxy_agent::exec::Options::command(),
        ),
    ] {
        let page = page(path);
        let words = page.split_whitespace().collect::<Vec<_>>().join(" ");
        is_described(path, &page, &words, &command, "");
    }
}

/// Finds all arguments of a command in a page, and its own commands with theirs.
fn is_described(path: &str, page: &str, words: &str, command: &clap::Command, prefix: &str) {
    for argument in command.get_arguments() {
        if let Some(long) = argument.get_long() {
            let value = match argument.get_value_names() {
                Some([name, ..]) if argument.get_action().takes_values() => format!(" {name}"),
                _ => String::new(),
            };
            let typed = format!("--{long}{value}");
            assert!(words.contains(&typed), "{path}: {typed}");
        }
        let help = argument.get_help().expect("every argument has help");
        let help = help.to_string();
        let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(words.contains(&help), "{path}: {help}");
    }
    for sub in command.get_subcommands() {
        let name = format!("{prefix}{}", sub.get_name());
        let heading = format!("\n   {name}\n");
        assert!(page.contains(&heading), "{path}: {heading}");
        is_described(path, page, words, sub, &format!("{name} "));
    }
}

#[test]
fn every_programs_page_has_its_environment_and_exit_status() {
    for (path, variables) in [
        (
            "man8/cgtproxy-helper.8",
            &["CGTPROXY_LOG", "NO_COLOR", "CGTPROXY_SOCKET"][..],
        ),
        (
            "man8/cgtproxy-relay.8",
            &[
                "CGTPROXY_LOG",
                "NO_COLOR",
                "CGTPROXY_SOCKET",
                "SSL_CERT_FILE",
                "STATE_DIRECTORY",
                "XDG_STATE_HOME",
            ],
        ),
        (
            "man1/cgtproxy-agent.1",
            &[
                "CGTPROXY_LOG",
                "LOG_LEVEL",
                "NO_COLOR",
                "CGTPROXY_SOCKET",
                "XDG_CONFIG_HOME",
                "XDG_RUNTIME_DIR",
                "XDG_CURRENT_DESKTOP",
                "DBUS_SESSION_BUS_ADDRESS",
                "all_proxy",
                "ALL_PROXY",
                "https_proxy",
                "HTTPS_PROXY",
                "http_proxy",
            ],
        ),
        (
            "man1/cgtproxy-exec.1",
            &["XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS"],
        ),
    ] {
        let page = page(path);
        let (_, environment) = page.split_once("\nENVIRONMENT\n").expect(path);
        for variable in variables {
            assert!(environment.contains(variable), "{path}: {variable}");
        }
        assert!(page.contains("\nEXIT STATUS\n"), "{path}");
    }
}

/// Whether a page has the key as a term or a heading of its own.
fn describes(page: &str, key: &str) -> bool {
    page.lines().any(|line| {
        let line = line.trim_start().split(" (").next().unwrap();
        let line = line.split("  ").next().unwrap();
        line.split(", ")
            .any(|term| term.split('.').any(|part| part == key))
    })
}

#[test]
fn every_key_of_the_users_file_is_in_its_page() {
    // The reader's lists of keys are constants.
    let mut keys = Vec::new();
    for path in files(&workspace().join("agent/src/config/read"), "rs") {
        let source = std::fs::read_to_string(path).unwrap();
        for list in source.split("KEYS: &[&str] = &[").skip(1) {
            let list = list.split(']').next().unwrap();
            keys.extend(list.split('"').skip(1).step_by(2).map(str::to_owned));
        }
    }
    for known in ["version", "no-udp", "loopback", "match"] {
        assert!(keys.iter().any(|key| key == known), "{keys:?}");
    }
    let page = page("man5/cgtproxy.yaml.5");
    for key in keys {
        assert!(describes(&page, &key), "{key}");
    }
    assert!(!describes(&page, "no-such-key"));
}

#[test]
fn every_key_of_the_administrators_file_is_in_its_page() {
    let page = page("man5/cgtproxy-helper.yaml.5");
    for key in cgtproxy_helper::config::keys() {
        assert!(describes(&page, key), "{key}");
    }
}

#[test]
fn every_member_of_an_interface_is_in_its_page() {
    for (name, description) in [
        ("Helper", cgtproxy_proto::helper::DESCRIPTION),
        ("Agent", cgtproxy_proto::agent::DESCRIPTION),
        ("Relay", cgtproxy_proto::relay::DESCRIPTION),
    ] {
        let page = page(&format!("man7/org.cgtproxy.{name}.7"));
        let mut members = 0;
        for line in description.lines().filter(|line| {
            ["method ", "error ", "type "]
                .iter()
                .any(|kind| line.starts_with(kind))
        }) {
            assert!(page.contains(line.trim_end()), "{name}: {line}");
            members += 1;
        }
        assert!(members > 6, "{name}");
    }
}

/// Asks a shell, which finds the papers and a cgtproxy-exec that knows two targets.
fn shell(shell: &str, script: &str) -> Vec<String> {
    let (_, directory) = written();
    let program = directory.path().join("cgtproxy-exec");
    std::fs::write(
        &program,
        "#!/bin/sh\nprintf 'direct\\nmihomo\\nmy-proxy\\n'\n",
    )
    .unwrap();
    run(Command::new("chmod").arg("755").arg(&program));
    let path = format!(
        "{}:{}",
        directory.path().display(),
        std::env::var("PATH").unwrap()
    );
    let output = run(Command::new(shell)
        .args(["-c", script])
        .current_dir(directory.path())
        .env("HOME", directory.path())
        .env("PATH", path));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{script}");
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(str::to_owned).collect()
}

#[test]
fn bash_completes_targets_options_processes_and_commands() {
    let complete = |words: &str, at: usize| {
        shell(
            "bash",
            &format!(
                ". bash-completion/completions/cgtproxy-exec\n\
                 COMP_WORDS=({words}); COMP_CWORD={at}; _cgtproxy_exec\n\
                 printf '%s\\n' \"${{COMPREPLY[@]}}\""
            ),
        )
    };
    assert_eq!(complete("cgtproxy-exec m", 1), ["mihomo", "my-proxy"]);
    assert_eq!(complete("cgtproxy-exec --no-wait d", 2), ["direct"]);
    assert_eq!(complete("cgtproxy-exec --pid 1 d", 3), ["direct"]);
    assert_eq!(complete("cgtproxy-exec --pid = 1 my", 4), ["my-proxy"]);
    assert_eq!(complete("cgtproxy-exec --no", 1), ["--no-wait"]);
    // Once for each directory of the PATH that has it.
    let commands = complete("cgtproxy-exec direct setpri", 2);
    assert!(commands.iter().all(|c| c == "setpriv"), "{commands:?}");
    assert_eq!(complete("cgtproxy-exec --pid 1 direct setpri", 4), [""]);
    let own = std::process::id().to_string();
    assert!(complete("cgtproxy-exec --pid ''", 2).contains(&own));
}

#[test]
fn bash_completes_the_agents_commands_and_their_options() {
    let complete = |words: &str, at: usize| {
        shell(
            "bash",
            &format!(
                ". bash-completion/completions/cgtproxy-agent\n\
                 COMP_WORDS=({words}); COMP_CWORD={at}\n\
                 _cgtproxy_agent\n\
                 printf '%s\\n' \"${{COMPREPLY[@]}}\""
            ),
        )
    };
    assert_eq!(complete("cgtproxy-agent chec", 1), ["check"]);
    assert_eq!(complete("cgtproxy-agent status --js", 2), ["--json"]);
    assert_eq!(complete("cgtproxy-agent migrate --ou", 2), ["--output"]);
    let permission = complete("cgtproxy-agent check permission --js", 3);
    assert_eq!(permission, ["--json"]);
    let check = complete("cgtproxy-agent check perm", 2);
    assert_eq!(check, ["permission"]);
    assert_eq!(complete("cgtproxy-agent --config status st", 3), ["status"]);
    assert_eq!(complete("cgtproxy-agent --config = a st", 4), ["status"]);
    assert_eq!(complete("cgtproxy-agent help st", 2), ["status"]);
    let commands = complete("cgtproxy-agent ''", 1);
    assert!(
        commands.iter().all(|word| !word.starts_with('-')),
        "{commands:?}"
    );
    // Where there is nothing, bash completes files.
    for (words, at) in [
        ("cgtproxy-agent migrate ''", 2),
        ("cgtproxy-agent check x", 2),
        ("cgtproxy-agent --config ''", 2),
        ("cgtproxy-agent --config = ''", 3),
        ("cgtproxy-agent status --config c", 3),
    ] {
        assert_eq!(complete(words, at), [""], "{words}");
    }
    let both = complete("cgtproxy-agent check ''", 2);
    assert!(
        both.contains(&"config".to_owned()) && both.contains(&"man1".to_owned()),
        "{both:?}"
    );
}

#[test]
fn fish_completes_targets_options_and_commands() {
    let complete = |line: &str| {
        shell(
            "fish",
            &format!(
                "source fish/vendor_completions.d/cgtproxy-exec.fish\n\
                 source fish/vendor_completions.d/cgtproxy-agent.fish\n\
                 complete -C '{line}'"
            ),
        )
    };
    assert_eq!(complete("cgtproxy-exec mi"), ["mihomo\tTarget"]);
    assert_eq!(complete("cgtproxy-exec --no-wait mi"), ["mihomo\tTarget"]);
    assert_eq!(complete("cgtproxy-exec --pid 1 mi"), ["mihomo\tTarget"]);
    let option = complete("cgtproxy-exec --no");
    assert!(option[0].starts_with("--no-wait\tGo ahead"), "{option:?}");
    for line in [
        "cgtproxy-exec direct setpri",
        "cgtproxy-exec --no-wait direct setpri",
    ] {
        let command = complete(line);
        assert!(command[0].starts_with("setpriv"), "{line}: {command:?}");
    }
    assert_eq!(complete("cgtproxy-exec --pid 1 direct setpri"), [""; 0]);
    let check = complete("cgtproxy-agent chec");
    assert!(check[0].starts_with("check\tFind"), "{check:?}");
    let help = complete("cgtproxy-agent help stat");
    assert!(help[0].starts_with("status\tShow"), "{help:?}");
}

#[test]
fn zsh_completes_targets_options_and_commands() {
    // zsh completes only at a terminal: one of its own.
    let complete = |line: &str| {
        let answer = shell(
            "zsh",
            &format!(
                r#"zmodload zsh/zpty
                zpty shell zsh -f -i
                zpty -w shell 'PS1=; TERM=dumb; fpath=($PWD/zsh/site-functions $fpath)'
                zpty -w shell 'autoload -Uz compinit; compinit -u -D'
                zpty -w shell 'compadd() {{ builtin compadd -O found "$@"; builtin compadd "$@"; all+=($found) }}'
                zpty -w shell 'list() {{ all=(); _main_complete; print -r -- "<<${{(j: :)all}}>>"; exit }}'
                zpty -w shell 'zle -C list complete-word list; bindkey "^I" list; print ready-now'
                zpty -r -m shell text $'*\nready-now*'
                zpty -w -n shell {line:?}$'\t'
                zpty -r -m shell text '*<<*>>*'
                text=${{text##*<<}}
                print -r -- "${{text%%>>*}}""#
            ),
        );
        answer.join("\n")
    };
    assert_eq!(complete("cgtproxy-exec mi"), "mihomo");
    assert_eq!(complete("cgtproxy-exec --no-wait my"), "my-proxy");
    assert!(complete("cgtproxy-exec --no-w").contains("--no-wait"));
    assert!(complete("cgtproxy-exec direct setpri").contains("setpriv"));
    assert!(complete("cgtproxy-agent chec").contains("check"));
}
