//! The command line.

use std::path::PathBuf;

use crate::inside::Errand;
use crate::order::Kind;
use crate::yard::MEASURE;

pub(crate) fn help() -> String {
    format!(
        "\
usage: cgtproxy-bench [--quick] [--out DIR] [ROW…]

Measures cgtproxy in sandboxes and prints a table. Without ROWs it measures all of them:
  {}

  --quick    a few samples of each, in less than a minute: shows that the bench works
  --out DIR  writes bench.json and plots there
",
        ROWS.join(" ")
    )
}

/// What the bench is to do.
#[derive(Clone, Debug, Default)]
pub(crate) struct Options {
    pub(crate) quick: bool,
    pub(crate) out: Option<PathBuf>,
    pub(crate) rows: Vec<String>,
}

impl Options {
    /// A number for a full run, or the one for a quick one.
    pub(crate) fn number<T>(&self, full: T, quick: T) -> T {
        if self.quick { quick } else { full }
    }
}

/// What this process is.
#[derive(Debug)]
pub(crate) enum Role {
    Bench(Options),
    Help,
    /// One that measures, in a sandbox.
    Measure(Kind),
    Floor(PathBuf),
    Packets(usize),
    Relay,
    Socks,
    Errand(Errand),
    /// Says what time it is and becomes this program.
    Become(Vec<String>),
}

/// All that can be measured, in the order in which it is.
pub(crate) const ROWS: [&str; 11] = [
    "latency",
    "first-send",
    "burst",
    "start",
    "packets",
    "relay",
    "socks",
    "idle",
    "users",
    "flood",
    "restore",
];

/// Takes the arguments apart. The roles are for this program's own use.
pub(crate) fn parse(arguments: &[String]) -> Result<Role, String> {
    let number = |text: &str| text.parse::<usize>().map_err(|e| format!("{text}: {e}"));
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        [role, kind] if *role == MEASURE => serde_json::from_str(kind)
            .map(Role::Measure)
            .map_err(|e| e.to_string()),
        ["--floor", directory] => Ok(Role::Floor(directory.into())),
        ["--packets", sender] => Ok(Role::Packets(number(sender)?)),
        ["--relay"] => Ok(Role::Relay),
        ["--socks"] => Ok(Role::Socks),
        ["--errand", errand] => serde_json::from_str(errand)
            .map(Role::Errand)
            .map_err(|e| e.to_string()),
        ["--become", ..] => Ok(Role::Become(arguments[1..].to_vec())),
        ["--help" | "-h"] => Ok(Role::Help),
        _ => options(&words).map(Role::Bench),
    }
}

fn options(words: &[&str]) -> Result<Options, String> {
    let mut options = Options::default();
    let mut words = words.iter();
    while let Some(&word) = words.next() {
        match word {
            "--quick" => options.quick = true,
            "--out" => options.out = Some(words.next().ok_or("--out needs a directory")?.into()),
            row if ROWS.contains(&row) => options.rows.push(row.to_owned()),
            other => {
                return Err(format!(
                    "'{other}' is neither an option nor one of {}",
                    ROWS.join(", ")
                ));
            }
        }
    }
    if options.rows.is_empty() {
        options.rows = ROWS.map(str::to_owned).to_vec();
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Role, String> {
        let words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
        parse(&words)
    }

    #[test]
    fn measures_what_it_is_told_to() {
        let Ok(Role::Bench(options)) = parsed("--quick --out /tmp/x idle") else {
            panic!("an ordinary command line");
        };
        assert!(options.quick);
        assert_eq!(
            (options.rows, options.out),
            (vec!["idle".into()], Some("/tmp/x".into()))
        );
        let Ok(Role::Bench(options)) = parsed("") else {
            panic!("an ordinary command line");
        };
        assert_eq!((options.rows.len(), options.quick), (ROWS.len(), false));
    }

    #[test]
    fn says_what_it_does_not_know() {
        assert!(parsed("packet").unwrap_err().contains("'packet'"));
        assert!(parsed("--out").is_err());
        assert!(parsed("--packets many").is_err());
    }
}
