//! What says which control groups a rule is about.

use crate::config::finding::{Excerpt, Place};
use crate::config::reader::Reader;
use crate::config::yaml::Node;
use crate::policy::{Pattern, PatternError};
use crate::text::printable;

impl Reader<'_> {
    pub(super) fn pattern(&mut self, node: &Node) -> Option<Pattern> {
        let text = self.text(node, "'match'")?;
        match Pattern::new(&text) {
            Ok(pattern) => Some(pattern),
            Err(PatternError { message, span }) => {
                let span = span.unwrap_or(0..text.len());
                let before = text.get(..span.start).unwrap_or_default();
                let place = self.place_within(node, &text, before);
                let finding = self.error(place, format!("bad regular expression: {message}"));
                // One line of it: a pattern may span several.
                let line_before = before.rsplit('\n').next().unwrap_or_default();
                let rest = text.get(span.start..).unwrap_or_default();
                let part = text.get(span).unwrap_or_default();
                let part = part.split('\n').next().unwrap_or_default();
                finding.excerpt = Some(Excerpt {
                    line: format!(
                        "{line_before}{}",
                        rest.split('\n').next().unwrap_or_default()
                    ),
                    before: printable(line_before).chars().count(),
                    length: printable(part).chars().count(),
                });
                None
            }
        }
    }

    /// Where in the file the part of a scalar after `before` stands, if it is written there as it is.
    fn place_within(&self, node: &Node, value: &str, before: &str) -> Place {
        let source = node.range.clone().and_then(|range| self.text.get(range));
        let shift = match source {
            Some(source) if source == value => 0,
            Some(source)
                if source
                    .strip_prefix(['"', '\''])
                    .and_then(|s| s.strip_suffix(['"', '\'']))
                    == Some(value) =>
            {
                1
            }
            _ => return node.place,
        };
        if before.contains('\n') {
            return node.place;
        }
        Place {
            column: node.place.column + shift + before.chars().count() as u64,
            ..node.place
        }
    }
}
