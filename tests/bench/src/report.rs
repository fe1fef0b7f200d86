//! What comes out: a table for people, JSON for programs.

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
        let what = what.into();
        eprintln!(
            "  {row}: {what}, {on}: median {}{unit}, p99 {}{unit}, N {}",
            number(summary.median),
            number(summary.p99),
            summary.n
        );
        self.series.push(Series {
            row,
            what,
            on,
            unit,
            summary,
            quantiles,
            at,
        });
        summary
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
        println!(
            "Linux {}, {} processors{}",
            self.kernel,
            self.processors,
            if self.quick {
                "; --quick: too few samples to go by"
            } else {
                ""
            }
        );
        let head = ["", "on", "median", "p99", "N"].map(String::from);
        let rows = self.series.iter().map(|s| {
            [
                format!("{}: {}", s.row, s.what),
                s.on.to_owned(),
                format!("{}{}", number(s.summary.median), s.unit),
                format!("{}{}", number(s.summary.p99), s.unit),
                s.summary.n.to_string(),
            ]
        });
        print!("\n{}", table(head, rows));
        let head = ["", "must reach", "measured", ""].map(String::from);
        let rows = self.targets.iter().map(|t| {
            [
                format!("{}: {}", t.row, t.what),
                t.required.clone(),
                t.measured.clone(),
                if t.met { "reached" } else { "NOT REACHED" }.to_owned(),
            ]
        });
        print!("\n{}", table(head, rows));
    }
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
    fn columns_line_up() {
        let rows = [["a".to_owned(), "10".to_owned()]].into_iter();
        assert_eq!(
            table(["".to_owned(), "µs".to_owned()], rows),
            "   µs\na  10\n"
        );
    }
}
