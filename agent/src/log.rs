//! Messages on standard error: for a person with colours, for the journal with priorities.

use std::fmt;
use std::io::{self, IsTerminal};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// Where the level is taken from; the second is the original's name for it.
const VARIABLES: [&str; 2] = ["CGTPROXY_LOG", "LOG_LEVEL"];

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

/// Begins to log, at the level that the environment asks for.
pub fn init() {
    let level = VARIABLES
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
        let mut message = Message(String::new());
        event.record(&mut message);
        writeln!(writer, "{}", message.0)
    }
}

/// An event's message. The agent's have no other fields.
struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.0 = format!("{value:?}");
        }
    }
}
