//! What comes out: tables for people, on the terminal and in Markdown, and JSON for programs.

use std::fmt::Write as _;

use serde::Serialize;

use crate::cli::Options;
use crate::stats::{Summary, sorted, summary};

/// Samples of one thing.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Series {
    /// What they belong to: `latency`, …
    pub(crate) row: &'static str,
    /// What was measured.
    pub(crate) what: String,
    /// On what.
    pub(crate) on: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) summary: Summary,
    /// In ascending order, at most a few hundred of them.
    pub(crate) quantiles: Vec<f64>,
    /// Where it belongs on a plot's axis, if it was measured at several places.
    pub(crate) at: Option<f64>,
}

/// What is to be reached, and whether it is.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Target {
    pub(crate) row: &'static str,
    pub(crate) what: String,
    pub(crate) required: String,
    pub(crate) measured: String,
    pub(crate) met: bool,
}

/// Everything that was measured.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    quick: bool,
    kernel: String,
    processors: usize,
    pub(crate) series: Vec<Series>,
    pub(crate) targets: Vec<Target>,
}

/// How many samples of a series the report keeps.
const QUANTILES: usize = 201;

impl Report {
    pub(crate) fn new(options: &Options) -> Self {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        Self {
            quick: options.quick,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            series: Vec::new(),
            targets: Vec::new(),
        }
    }

    /// Adds samples and returns what is said about them.
    pub(crate) fn add(
        &mut self,
        row: &'static str,
        what: impl Into<String>,
        on: &'static str,
        unit: &'static str,
        samples: &[f64],
    ) -> Summary {
        self.add_at(row, what, on, unit, samples, None)
    }

    /// The same, for a place on a plot's axis.
    pub(crate) fn add_at(
        &mut self,
        row: &'static str,
        what: impl Into<String>,
        on: &'static str,
        unit: &'static str,
        samples: &[f64],
        at: Option<f64>,
    ) -> Summary {
        let summary = summary(samples);
        let ordered = sorted(samples);
        // The first and the last are among them.
        let (count, last) = (
            ordered.len().min(QUANTILES),
            ordered.len().saturating_sub(1),
        );
        let quantiles = (0..count)
            .map(|n| ordered[n * last / (count - 1).max(1)])
            .collect();
        self.push(Series {
            row,
            what: what.into(),
            on,
            unit,
            summary,
            quantiles,
            at,
        });
        summary
    }

    /// Adds how many of all cases something was so in. Returns it in per cent.
    pub(crate) fn add_share(
        &mut self,
        row: &'static str,
        what: impl Into<String>,
        on: &'static str,
        of_them: usize,
        all: usize,
    ) -> f64 {
        let share = 100.0 * of_them as f64 / all as f64;
        self.push(Series {
            row,
            what: what.into(),
            on,
            unit: " %",
            summary: Summary {
                n: all,
                ..summary(&[share])
            },
            quantiles: vec![share],
            at: None,
        });
        share
    }

    fn push(&mut self, series: Series) {
        let [what, on, median, p99, n] = series.cells();
        let p99 = match p99.is_empty() {
            true => p99,
            false => format!(", p99 {p99}"),
        };
        eprintln!("  {what}, {on}: median {median}{p99}, N {n}");
        self.series.push(series);
    }

    /// Adds a target: `measured` may be at most `most`.
    pub(crate) fn at_most(
        &mut self,
        row: &'static str,
        what: impl Into<String>,
        measured: f64,
        most: f64,
        unit: &str,
    ) {
        self.target(row, what, measured, most, unit, "at most", measured <= most);
    }

    /// Adds a target: `measured` must be at least `least`.
    pub(crate) fn at_least(
        &mut self,
        row: &'static str,
        what: impl Into<String>,
        measured: f64,
        least: f64,
        unit: &str,
    ) {
        self.target(
            row,
            what,
            measured,
            least,
            unit,
            "at least",
            measured >= least,
        );
    }

    #[expect(clippy::too_many_arguments, reason = "one caller for each direction")]
    fn target(
        &mut self,
        row: &'static str,
        what: impl Into<String>,
        measured: f64,
        bound: f64,
        unit: &str,
        direction: &str,
        met: bool,
    ) {
        self.targets.push(Target {
            row,
            what: what.into(),
            required: format!("{direction} {}{unit}", number(bound)),
            measured: format!("{}{unit}", number(measured)),
            met,
        });
    }

    pub(crate) fn json(&self) -> String {
        serde_json::to_string_pretty(self).expect("numbers and names")
    }

    /// Prints the two tables.
    pub(crate) fn print(&self) {
        println!("{}", self.machine());
        let rows = self.series.iter().map(Series::cells);
        print!("\n{}", table(SERIES.map(String::from), rows));
        let rows = self.targets.iter().map(|t| t.cells("NOT REACHED"));
        print!("\n{}", table(TARGETS.map(String::from), rows));
    }

    /// The same for docs/performance/results.md.
    pub(crate) fn markdown(&self) -> String {
        let mut text = format!(
            "# Results of `make bench`\n\n{}. `make bench` has written this; [Performance](../performance.md) says what it \
             means.\nOf fewer than 100 samples there is no p99.\n",
            self.machine()
        );
        let mut row = "";
        for series in &self.series {
            if series.row != row {
                row = series.row;
                let _ = write!(text, "\n## {row}\n\n{}", head(SERIES));
            }
            let [_, rest @ ..] = series.cells();
            let _ = writeln!(text, "| {} | {} |", series.what, rest.join(" | "));
        }
        let _ = write!(text, "\n## What was to be reached\n\n{}", head(TARGETS));
        for target in &self.targets {
            let _ = writeln!(text, "| {} |", target.cells("**missed**").join(" | "));
        }
        text
    }

    fn machine(&self) -> String {
        let quick = match self.quick {
            true => "; --quick: too few samples to go by",
            false => "",
        };
        // Without what a distribution calls its build of it.
        let version = self.kernel.split('-').next().unwrap_or_default();
        format!("Linux {version}, {} processors{quick}", self.processors)
    }
}

/// The heads of the two tables.
const SERIES: [&str; 5] = ["", "on", "median", "p99", "N"];
const TARGETS: [&str; 4] = ["", "must reach", "measured", ""];

impl Series {
    fn cells(&self) -> [String; 5] {
        let value = |value| format!("{}{}", number(value), self.unit);
        [
            format!("{}: {}", self.row, self.what),
            self.on.to_owned(),
            value(self.summary.median),
            self.summary.p99.map(value).unwrap_or_default(),
            self.summary.n.to_string(),
        ]
    }
}

impl Target {
    fn cells(&self, missed: &str) -> [String; 4] {
        [
            format!("{}: {}", self.row, self.what),
            self.required.clone(),
            self.measured.clone(),
            if self.met { "reached" } else { missed }.to_owned(),
        ]
    }
}

/// The head of a table in Markdown: the first two columns on the left and the others on the right.
fn head<const N: usize>(names: [&str; N]) -> String {
    let rule = (0..N).map(|column| if column < 2 { "---" } else { "---:" });
    let rule: Vec<_> = rule.collect();
    format!("| {} |\n|{}|\n", names.join(" | "), rule.join("|"))
}

/// Three significant digits.
pub(crate) fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// Columns, the first on the left and the others on the right.
fn table<const N: usize>(head: [String; N], rows: impl Iterator<Item = [String; N]>) -> String {
    let rows: Vec<[String; N]> = std::iter::once(head).chain(rows).collect();
    let widths: Vec<usize> = (0..N)
        .map(|column| {
            rows.iter()
                .map(|r| r[column].chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let width = widths[column];
            let _ = match column {
                0 => write!(line, "{cell:width$}"),
                _ => write!(line, "  {cell:>width$}"),
            };
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_ends_of_a_long_series() {
        let mut report = Report::new(&Options::default());
        let samples: Vec<f64> = (0..1000).map(f64::from).collect();
        report.add("latency", "x", "floor", " µs", &samples);
        let series = &report.series[0];
        assert_eq!(series.quantiles.len(), QUANTILES);
        assert_eq!(series.quantiles[0], 0.0);
        assert_eq!(series.quantiles[QUANTILES - 1], 999.0);
    }

    #[test]
    fn says_what_is_reached() {
        let mut report = Report::new(&Options::default());
        report.at_most("idle", "helper", 5.0, 4.0, " MB");
        report.at_least("relay", "bulk", 90.0, 85.0, " %");
        let met: Vec<bool> = report.targets.iter().map(|t| t.met).collect();
        assert_eq!(met, [false, true]);
        assert_eq!(report.targets[0].required, "at most 4.00 MB");
    }

    #[test]
    fn writes_a_table_for_each_row() {
        let mut report = Report::new(&Options::default());
        report.add("latency", "mkdir", "floor", " µs", &[1.0, 2.0, 3.0]);
        let share = report.add_share("first-send", "leaks", "cgtproxy", 1, 200);
        report.at_most("first-send", "leaks", share, 0.1, " %");
        let text = report.markdown();
        let (_, tables) = text.split_once("\n## ").unwrap();
        assert_eq!(
            tables,
            "latency\n\n\
             |  | on | median | p99 | N |\n|---|---|---:|---:|---:|\n\
             | mkdir | floor | 2.00 µs |  | 3 |\n\
             \n## first-send\n\n\
             |  | on | median | p99 | N |\n|---|---|---:|---:|---:|\n\
             | leaks | cgtproxy | 0.50 % |  | 200 |\n\
             \n## What was to be reached\n\n\
             |  | must reach | measured |  |\n|---|---|---:|---:|\n\
             | first-send: leaks | at most 0.10 % | 0.50 % | **missed** |\n"
        );
    }

    #[test]
    fn columns_line_up() {
        let rows = [["a".to_owned(), "10".to_owned()]].into_iter();
        assert_eq!(
            table(["".to_owned(), "µs".to_owned()], rows),
            "   µs\na  10\n"
        );
    }
}
