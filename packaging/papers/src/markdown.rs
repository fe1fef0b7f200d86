//! From the Markdown of the documentation to the roff of manual pages: what docs/configuration.md uses of it.

use clap_mangen::roff::{Inline, Roff, bold, italic, roman};
use pulldown_cmark::{Event, HeadingLevel, Options, Parser, Tag, TagEnd};

/// A section of the second level.
pub(crate) struct Section {
    /// Its title, without markup.
    pub(crate) title: String,
    events: Vec<Event<'static>>,
}

/// All sections of the second level; what stands before the first is left out.
pub(crate) fn sections(text: &str) -> Vec<Section> {
    let mut sections: Vec<Section> = Vec::new();
    let mut in_title = false;
    for event in Parser::new_ext(text, Options::ENABLE_TABLES).map(Event::into_static) {
        match (&event, sections.last_mut()) {
            (Event::Start(Tag::Heading { level, .. }), _) if *level == HeadingLevel::H2 => {
                in_title = true;
                sections.push(Section {
                    title: String::new(),
                    events: Vec::new(),
                });
            }
            (Event::End(TagEnd::Heading(HeadingLevel::H2)), _) => in_title = false,
            (Event::Text(text) | Event::Code(text), Some(section)) if in_title => {
                section.title.push_str(text);
            }
            (_, Some(section)) => section.events.push(event),
            (_, None) => {}
        }
    }
    sections
}

impl Section {
    /// The section's text, in which a heading of the third level is one of a page's sections if `depth`
    /// is 0, and one of its subsections if it is 1.
    pub(crate) fn roff(&self, depth: usize) -> String {
        let mut writer = Writer {
            roff: Roff::new(),
            depth,
            line: Vec::new(),
            cells: Vec::new(),
            link: None,
            font: Font::Roman,
            after_tag: false,
            in_head: false,
            code: false,
        };
        for event in &self.events {
            writer.event(event);
        }
        writer.roff.to_roff()
    }
}

#[derive(Clone, Copy)]
enum Font {
    Roman,
    Bold,
    Italic,
}

struct Writer {
    roff: Roff,
    depth: usize,
    /// The paragraph, heading or cell that is being read.
    line: Vec<Inline>,
    /// The row of a table that is being read.
    cells: Vec<Vec<Inline>>,
    /// Where the link that is being read leads, if to the web.
    link: Option<String>,
    font: Font,
    /// The next paragraph belongs to what stands before it.
    after_tag: bool,
    in_head: bool,
    code: bool,
}

impl Writer {
    fn event(&mut self, event: &Event<'_>) {
        match event {
            Event::Start(tag) => self.start(tag),
            Event::End(tag) => self.end(*tag),
            Event::Text(text) if self.code => {
                for line in text.lines() {
                    self.roff.text([roman(line)]);
                }
            }
            Event::Text(text) => {
                let text = text.to_string();
                self.line.push(match self.font {
                    Font::Roman => roman(text),
                    Font::Bold => bold(text),
                    Font::Italic => italic(text),
                });
            }
            Event::Code(text) => self.line.push(bold(text.to_string())),
            Event::SoftBreak | Event::HardBreak => self.line.push(roman(" ")),
            _ => {}
        }
    }

    fn start(&mut self, tag: &Tag<'_>) {
        match tag {
            Tag::Paragraph => {
                if !self.after_tag {
                    self.roff.control("PP", []);
                }
                self.after_tag = false;
            }
            Tag::CodeBlock(_) => {
                self.roff.control("PP", []);
                self.roff.control("RS", ["4"]);
                self.roff.control("EX", []);
                self.code = true;
            }
            Tag::Item => {
                self.flush();
                self.roff.control("IP", ["\\(bu", "2"]);
                self.after_tag = true;
            }
            Tag::Link { dest_url, .. } if dest_url.starts_with("http") => {
                self.link = Some(dest_url.to_string());
            }
            Tag::Strong => self.font = Font::Bold,
            Tag::Emphasis => self.font = Font::Italic,
            Tag::TableHead => self.in_head = true,
            _ => {}
        }
    }

    fn end(&mut self, tag: TagEnd) {
        match tag {
            TagEnd::Paragraph | TagEnd::Item => self.flush(),
            TagEnd::Heading(level) => self.heading(level),
            TagEnd::CodeBlock => {
                self.roff.control("EE", []);
                self.roff.control("RE", []);
                self.code = false;
            }
            TagEnd::Link => {
                if let Some(link) = self.link.take() {
                    self.line.push(roman(format!(" ({link})")));
                }
            }
            TagEnd::Strong | TagEnd::Emphasis => self.font = Font::Roman,
            TagEnd::TableCell => self.cells.push(std::mem::take(&mut self.line)),
            TagEnd::TableHead => {
                self.in_head = false;
                self.cells.clear();
            }
            TagEnd::TableRow => self.row(),
            _ => {}
        }
    }

    fn flush(&mut self) {
        if !self.line.is_empty() {
            self.roff.text(std::mem::take(&mut self.line));
        }
    }

    fn heading(&mut self, level: HeadingLevel) {
        let title: String = std::mem::take(&mut self.line)
            .into_iter()
            .map(|inline| match inline {
                Inline::Roman(text) | Inline::Bold(text) | Inline::Italic(text) => text,
                Inline::LineBreak => " ".to_owned(),
            })
            .collect();
        let top = level == HeadingLevel::H3 && self.depth == 0;
        self.roff
            .control(if top { "SH" } else { "SS" }, [title.as_str()]);
        // A paragraph after a heading needs no other beginning.
        self.after_tag = true;
    }

    /// The first cell is what the row is about, the last what is said about it, and one in the middle what
    /// values there are.
    fn row(&mut self) {
        let mut cells = std::mem::take(&mut self.cells).into_iter();
        let mut tag = cells.next().unwrap_or_default();
        let body = cells.next_back().unwrap_or_default();
        for values in cells.filter(|cell| !cell.is_empty()) {
            tag.push(roman(" ("));
            tag.extend(values);
            tag.push(roman(")"));
        }
        self.roff.control("TP", []);
        self.roff.text(tag);
        self.roff.text(body);
    }
}
