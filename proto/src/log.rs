//! Messages on standard error: for a person with colours, for the journal with priorities.

use std::fmt::{self, Write as _};
use std::io::{self, IsTerminal, Write as _};
use std::os::fd::AsFd;

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use crate::text::printable;

/// The variable that says how much is logged.
pub const VARIABLE: &str = "CGTPROXY_LOG";

/// How a line begins.
#[derive(Debug, Clone, Copy)]
enum Style {
    /// With a priority as sd-daemon(3) has it.
    Journal,
    /// With the level's name.
    Plain,
    /// With the level's name in colour.
    Colour,
}

/// Hands each event to `write`, as a line.
struct Lines<W> {
    level: LevelFilter,
    style: Style,
    write: W,
}

/// Begins to log, at the level that the first of these environment variables asks for.
pub fn init(variables: &[&str]) {
    let level = variables
        .iter()
        .filter_map(|name| std::env::var(name).ok())
        .find_map(|text| parsed(&text))
        .unwrap_or(LevelFilter::INFO);
    let style = if colours(&io::stderr()) {
        Style::Colour
    } else if is_journal(
        std::env::var("JOURNAL_STREAM").ok().as_deref(),
        io::stderr(),
    ) {
        Style::Journal
    } else {
        Style::Plain
    };
    let subscriber = Lines {
        level,
        style,
        // There may be no standard error, and nowhere else to say so.
        write: |line: &str| drop(io::stderr().write_all(line.as_bytes())),
    };
    // It fails only if there is one already, which is as good.
    let _ = tracing::subscriber::set_global_default(subscriber);
    // Other variables may be other programs' as well.
    if let Ok(text) = std::env::var(VARIABLE)
        && !text.is_empty()
        && parsed(&text).is_none()
    {
        tracing::warn!(
            "{VARIABLE} is '{text}', which is ignored; write 'error', 'warn', 'info', 'debug' or 'trace'"
        );
    }
}

/// Whether a file is a terminal that has colours, and whose user likes them (no-color.org).
pub fn colours(file: &impl IsTerminal) -> bool {
    let said = |name| std::env::var_os(name).filter(|text| !text.is_empty());
    let has_some = said("TERM").is_some_and(|terminal| terminal != "dumb");
    has_some && said("NO_COLOR").is_none() && file.is_terminal()
}

/// How much a variable's text asks for.
fn parsed(text: &str) -> Option<LevelFilter> {
    text.to_lowercase().parse().ok()
}

/// Whether a file is what the journal reads, by the variable that says which one that is, as `DEVICE:INODE`. It is
/// inherited by programs whose standard error has been redirected: systemd.exec(5).
fn is_journal(stream: Option<&str>, file: impl AsFd) -> bool {
    let Some((device, inode)) = stream.and_then(|stream| stream.split_once(':')) else {
        return false;
    };
    rustix::fs::fstat(file)
        .is_ok_and(|stat| device.parse() == Ok(stat.st_dev) && inode.parse() == Ok(stat.st_ino))
}

impl<W: Fn(&str) + Send + Sync + 'static> Subscriber for Lines<W> {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= self.level
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.level)
    }

    fn event(&self, event: &Event<'_>) {
        let (priority, name, colour) = match *event.metadata().level() {
            Level::ERROR => (3, "error", "31"),
            Level::WARN => (4, "warning", "33"),
            Level::INFO => (6, "info", "32"),
            Level::DEBUG => (7, "debug", "34"),
            Level::TRACE => (7, "trace", "35"),
        };
        let begin = match self.style {
            Style::Journal => format!("<{priority}>"),
            Style::Plain => format!("{name}: "),
            Style::Colour => format!("\x1b[{colour}m{name}\x1b[0m: "),
        };
        let mut line = Line::default();
        event.record(&mut line);
        // A line break would begin a line without a priority.
        let said = printable(&(line.message + &line.fields));
        (self.write)(&format!("{begin}{said}\n"));
    }

    // What libraries do takes its time as well (spans), of which nothing is said: none is enabled.
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// An event's message, and its other fields behind it.
#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    fn written(style: Style, level: LevelFilter, log: impl FnOnce()) -> String {
        let written = Arc::new(Mutex::new(String::new()));
        let to = written.clone();
        let write = move |line: &str| to.lock().unwrap().push_str(line);
        let subscriber = Lines {
            level,
            style,
            write,
        };
        tracing::subscriber::with_default(subscriber, log);
        let written = written.lock().unwrap();
        written.clone()
    }

    #[test]
    fn each_line_has_its_priority_and_every_field() {
        let log = || {
            tracing::warn!(uid = 1000, "refused: {}", "two\nlines");
            tracing::info!("ready");
            tracing::debug!("nobody wants to know");
            let _within = tracing::error_span!("within").entered();
        };
        assert_eq!(
            written(Style::Journal, LevelFilter::INFO, log),
            "<4>refused: two\\u{a}lines uid=1000\n<6>ready\n"
        );
        assert_eq!(
            written(Style::Plain, LevelFilter::WARN, log),
            "warning: refused: two\\u{a}lines uid=1000\n"
        );
    }

    #[test]
    #[cfg_attr(miri, ignore = "asks the system")]
    fn the_journal_is_known_by_its_stream() {
        let (_, journal) = io::pipe().unwrap();
        let (_, other) = io::pipe().unwrap();
        let stat = rustix::fs::fstat(&journal).unwrap();
        let stream = format!("{}:{}", stat.st_dev, stat.st_ino);
        assert!(is_journal(Some(&stream), &journal));
        assert!(!is_journal(Some(&stream), &other));
        for stream in [None, Some(""), Some("1:1"), Some("x:y")] {
            assert!(!is_journal(stream, &journal), "{stream:?}");
        }
    }
}
