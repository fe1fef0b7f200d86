//! Messages on standard error: for a person with colours, for the journal with priorities.

use std::fmt::{self, Write as _};
use std::io::{self, IsTerminal};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

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

struct Lines(Style);

/// Begins to log, at the level that the first of these environment variables asks for.
pub fn init(variables: &[&str]) {
    let level = variables
        .iter()
        .filter_map(|name| std::env::var(name).ok())
        .find_map(|level| level.to_lowercase().parse().ok())
        .unwrap_or(LevelFilter::INFO);
    let style = if io::stderr().is_terminal() {
        match std::env::var_os("NO_COLOR") {
            Some(value) if !value.is_empty() => Style::Plain,
            _ => Style::Colour,
        }
    } else if std::env::var_os("JOURNAL_STREAM").is_some() {
        Style::Journal
    } else {
        Style::Plain
    };
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(io::stderr)
        // It would panic where standard error is closed.
        .log_internal_errors(false)
        .event_format(Lines(style))
        .finish();
    // It fails only if there is one already, which is as good.
    let _ = tracing::subscriber::set_global_default(subscriber);
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let (priority, name, colour) = match *event.metadata().level() {
            Level::ERROR => (3, "error", "31"),
            Level::WARN => (4, "warning", "33"),
            Level::INFO => (6, "info", "32"),
            Level::DEBUG => (7, "debug", "34"),
            Level::TRACE => (7, "trace", "35"),
        };
        match self.0 {
            Style::Journal => write!(writer, "<{priority}>")?,
            Style::Plain => write!(writer, "{name}: ")?,
            Style::Colour => write!(writer, "\x1b[{colour}m{name}\x1b[0m: ")?,
        }
        let mut line = Line::default();
        event.record(&mut line);
        // A line break would begin a line without a priority.
        writeln!(writer, "{}", printable(&(line.message + &line.fields)))
    }
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
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn written(style: Style, log: impl FnOnce()) -> String {
        let written = Written::default();
        let to = written.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(move || to.clone())
            .event_format(Lines(style))
            .finish();
        tracing::subscriber::with_default(subscriber, log);
        String::from_utf8(written.0.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn each_line_has_its_priority_and_every_field() {
        let log = || {
            tracing::warn!(uid = 1000, "refused: {}", "two\nlines");
            tracing::info!("ready");
        };
        assert_eq!(
            written(Style::Journal, log),
            "<4>refused: two\\u{a}lines uid=1000\n<6>ready\n"
        );
        assert_eq!(
            written(Style::Plain, log),
            "warning: refused: two\\u{a}lines uid=1000\ninfo: ready\n"
        );
    }
}
